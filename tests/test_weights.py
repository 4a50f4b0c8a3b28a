"""Weights of published networks: local first, verified, atomic, recorded where nobody knows the digest."""

from __future__ import annotations

import errno
import hashlib
import os

import pytest

from evalbench import weights
from evalbench.errors import UserError
from evalbench.weights import KNOWN, Weights, expected, fetch, find, missing

CONTENT = b"weights of a network"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EVALBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def offered(tmp_path, monkeypatch, folder):
    """A file that can be fetched without a network."""
    (tmp_path / "remote.bin").write_bytes(CONTENT)
    url = (tmp_path / "remote.bin").as_uri()
    monkeypatch.setitem(KNOWN, "net", Weights("net.bin", DIGEST, url))
    return tmp_path / "remote.bin"


def test_fetched_once_and_verified(offered, folder):
    assert fetch("net").read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["net.bin"]
    offered.unlink()
    assert fetch("net") == find(KNOWN["net"], "net") == folder / "net.bin"  # the local file is enough


def test_a_wrong_file_leaves_nothing_behind(offered, folder):
    offered.write_bytes(b"half of it")
    with pytest.raises(UserError, match=f"gave a file with SHA-256 .* expected {DIGEST}"):
        fetch("net")
    assert list(folder.iterdir()) == []


def test_unreachable(offered, folder):
    offered.unlink()
    with pytest.raises(UserError, match=r"cannot fetch file:.*put net\.bin \(SHA-256 .*\) into .*weights"):
        fetch("net")
    assert list(folder.iterdir()) == []


def test_a_local_file_that_changed_is_refused(offered, folder):
    fetch("net")
    (folder / "net.bin").write_bytes(b"other")
    with pytest.raises(UserError, match="expected"):
        find(KNOWN["net"], "net")


def test_unverified_digests_are_recorded_at_first_use(folder):
    wild = Weights("sub/wild.bin", how="get it --to {folder}")
    assert missing(wild) == (
        f"put sub/wild.bin (SHA-256 unverified) into {folder}, or type: get it --to {folder / 'sub'}"
    )
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "wild.bin").write_bytes(CONTENT)
    assert expected(wild) == weights.UNVERIFIED
    find(wild)
    assert expected(wild) == DIGEST
    assert (folder / "sub" / "wild.bin.sha256").read_text() == f"{DIGEST}  wild.bin\n"
    (folder / "sub" / "wild.bin").write_bytes(b"changed later")
    with pytest.raises(UserError, match=f"expected {DIGEST}"):
        find(wild)


def test_only_a_folder_shared_read_only_may_lack_the_record(folder, monkeypatch):
    def refuses(code):
        def write(file, content):
            raise OSError(code, os.strerror(code))

        return write

    wild = Weights("wild.bin")
    folder.mkdir(parents=True)
    (folder / "wild.bin").write_bytes(CONTENT)
    monkeypatch.setattr(weights, "write_atomic", refuses(errno.EROFS))
    assert find(wild) == folder / "wild.bin"
    monkeypatch.setattr(weights, "write_atomic", refuses(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        find(wild)


def test_pins_are_those_of_the_published_files():
    """The file name of the port carries the first digits of its digest."""
    assert KNOWN["inception-pth"].file.removesuffix(".pth").endswith(KNOWN["inception-pth"].sha256[:8])
    assert all(len(known.sha256) == 64 for known in KNOWN.values())


def test_unknown_name(folder):
    with pytest.raises(UserError, match="did you mean 'inception-pth'"):
        fetch("inception-pt")
