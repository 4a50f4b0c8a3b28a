"""The one parser of method chains, typed settings, near-name errors, plug-ins."""

from __future__ import annotations

import re

import pytest

from evalbench import registry
from evalbench.errors import UserError
from evalbench.registry import build_method, parse_methods


def test_a_chain_has_one_canonical_text() -> None:
    spellings = [
        "ddim(eta=0.5)+cfg(scale=3)",
        " ddim( eta = 0.50 ) + cfg(scale=3.0)".replace(" ", ""),
        "ddim(eta=.5)+cfg(scale=3)",
    ]
    chains = [build_method(text) for text in spellings]
    assert {chain.text for chain in chains} == {"ddim(eta=0.5)+cfg(scale=3.0)"}
    assert all(chain.settings() == chains[0].settings() for chain in chains)


def test_defaults_are_part_of_the_settings_but_not_of_the_text() -> None:
    assert build_method("ddim(eta=0)").text == "ddim"
    assert build_method("ddim").settings()[0]["eta"] == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ddimm", "unknown method 'ddimm'; did you mean 'ddim'"),
        ("ddim(et=1)", "unknown setting 'et' in method 'ddim'; did you mean 'eta'"),
        ("ddim(eta=x)", "setting 'eta=x' of method 'ddim'"),
        ("ddim(eta={[]: 1})", "setting 'eta={[]: 1}' of method 'ddim'"),
        (f"ddim(eta={'-' * 100_000}1)", "setting 'eta=--"),
        ("ddim(eta)", "needs a value"),
        ("ddim(eta=1,eta=0)", "given twice"),
        ("ddim(", "unbalanced parentheses"),
        ("ddim(eta=1))", "unbalanced parentheses"),
        ("ddim+ddim", "exactly one solver, found ddim, ddim"),
        ("cfg", "exactly one solver, found none"),
        ("ddim cfg", "parts are joined by"),
        ("", "cannot read method"),
    ],
)
def test_what_cannot_be_read_says_so(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        build_method(text)


def test_a_text_that_reads_as_a_number_is_a_text() -> None:
    """Its name says so by quotes, and is read as the same."""
    for typed, name in (
        ("ddim+layer-skip(blocks=3)", 'ddim+layer-skip(blocks="3")'),
        ("ddim+faster-diffusion(keys=0)", 'ddim+faster-diffusion(keys="0")'),
    ):
        assert registry.build_method(typed).text == registry.build_method(name).text == name


def test_lists_split_outside_parentheses() -> None:
    assert parse_methods("a(x=1,y=2), b+c(z=[1,2])") == ["a(x=1,y=2)", "b+c(z=[1,2])"]
    with pytest.raises(UserError, match="empty method name"):
        parse_methods("a,,b")


def test_plus_plus_belongs_to_the_name() -> None:
    tokens = registry._tokens("dpm-solver++(order=2)+cfg(scale=2)")
    assert tokens == [("dpm-solver++", "order=2"), ("cfg", "scale=2")]
    assert registry._tokens("dpm-solver+++cfg") == [("dpm-solver++", None), ("cfg", None)]


def test_a_name_is_registered_once() -> None:
    source = (
        "from evalbench.engine import PlannedSolver\n"
        "from evalbench.registry import register\n"
        "@register('ddim')\n"
        "class Other(PlannedSolver):\n"
        "    '''Not DDIM.'''\n"
    )
    with pytest.raises(UserError, match="method 'ddim' is registered twice"):
        registry.load_plugin(source, "other.py")


def test_a_plugin_that_does_not_import_names_its_file() -> None:
    with pytest.raises(UserError, match=r"plug-in broken\.py does not import: NameError"):
        registry.load_plugin("undefined_name", "broken.py")


def test_every_part_has_a_summary() -> None:
    """Those of the project: tests that ran before in this process have left plug-ins in the registry."""
    for kind in registry.KINDS:
        for name in registry.names(kind):
            part = registry.get(kind, name)
            assert part.__module__.startswith("evalbench_plugin_") or part.summary().endswith("."), f"{kind} {name}"
