"""What a family of methods can do here is tried once, and again where anything that decides it has changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import evalbench
from evalbench import availability
from evalbench.interfaces import Registered

FOUND = [("Good", ""), ("Bad", "needs a library")]


class Family(Registered):
    """A family of methods that counts how often it is tried."""

    name = "family:*"
    tried = 0

    @classmethod
    def members(cls) -> list[tuple[str, str]]:
        cls.tried += 1
        return list(FOUND)


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Family]]:
    """A family of evalbench's own, and an empty cache."""
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Family, "__module__", "evalbench.methods.family")
    monkeypatch.setattr(Family, "tried", 0)
    availability.key.cache_clear()
    yield Family
    availability.key.cache_clear()


def test_the_second_call_tries_nothing(family: type[Family]) -> None:
    assert [availability.members_of(family) for _ in range(3)] == [FOUND] * 3
    assert family.tried == 1


def test_families_are_kept_beside_each_other(family: type[Family]) -> None:
    other = type("Other", (family,), {"name": "other:*", "__module__": family.__module__})
    for each in (family, other, family, other):
        assert availability.members_of(each) == FOUND
    assert (family.tried, other.tried) == (1, 1 + 1), "its own, after it inherited the count"


@pytest.mark.parametrize("library", ["diffusers", "torch"])
def test_another_version_is_tried_again(library: str, family: type[Family], monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"diffusers": "1", "torch": "1"}

    def installed() -> list[SimpleNamespace]:
        return [SimpleNamespace(metadata={"Name": name}, version=version) for name, version in versions.items()]

    monkeypatch.setattr(availability, "distributions", installed)
    for version, tried in (("1", 1), ("2", 2), ("2", 2), ("1", 3)):
        versions[library] = version
        availability.key.cache_clear()
        assert availability.members_of(family) == FOUND
        assert family.tried == tried


def test_other_sources_are_tried_again(family: type[Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sources").mkdir()
    monkeypatch.setattr(evalbench, "__path__", [str(tmp_path / "sources")])
    for text, tried in (("a = 1", 1), ("a = 1", 1), ("a = 2", 2)):
        (tmp_path / "sources" / "module.py").write_text(text)
        availability.key.cache_clear()
        availability.members_of(family)
        assert family.tried == tried


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"key": "KEY"}'),
        *('{"key": "KEY", "members": [1]}', '{"key": "KEY", "members": {"a": [1]}}'),
    ],
)
def test_a_damaged_file_is_ignored_and_written_again(text: str, family: type[Family]) -> None:
    file = availability.file()
    file.parent.mkdir()
    file.write_text(text.replace("KEY", availability.key()))
    for _ in range(2):
        assert availability.members_of(family) == FOUND
    assert family.tried == 1
    assert json.loads(file.read_text())["members"] == {"family:*": [list(pair) for pair in FOUND]}
    assert [path.name for path in file.parent.iterdir()] == [file.name], "no half-written file is left"


def test_a_folder_that_nobody_may_write_to_is_no_error(
    family: type[Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path / "file"))
    assert availability.members_of(family) == FOUND


def test_the_family_of_a_plug_in_is_tried_every_time(family: type[Family], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "__module__", "evalbench_plugin_0123")
    assert [availability.members_of(family) for _ in range(2)] == [FOUND] * 2
    assert family.tried == 2
    assert not availability.file().exists()
