"""examples/adapters: short, and no pickle of theirs is opened before the user says so."""

from __future__ import annotations

import ast
import pickle
import sys
from pathlib import Path

import pytest
import torch

from evalbench import registry
from evalbench.errors import UserError
from evalbench.own_model import with_model
from evalbench.spec import Suite, load_suite

ADAPTERS = sorted((Path(__file__).resolve().parent.parent / "examples" / "adapters").glob("*.py"))
PICKLES = [file for file in ADAPTERS if "pickle" in file.read_text("utf-8")]

CLONE = """
import torch

class Net(torch.nn.Module):
    label_dim, img_channels, img_resolution = 10, 3, 32

    def forward(self, x, sigma, labels):
        return 0.5 * x if labels is None else x * labels.sum(1)[:, None, None, None]
"""


class Opened:
    """Leaves a mark when a pickle of it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository as edm's is: its classes are imported when its pickle is opened."""
    (tmp_path / "their_network.py").write_text(CLONE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.syspath_prepend(str(tmp_path))
    from their_network import Net  # type: ignore[import-not-found]

    with (tmp_path / "net.pkl").open("wb") as file:
        pickle.dump({"mark": Opened(tmp_path / "opened"), "ema": Net()}, file)
    return tmp_path


def suite_of(adapter: Path, clone: Path, *, trust: bool) -> Suite:
    text = f"{adapter}:load(clone={clone},checkpoint={clone / 'net.pkl'})"
    suite, plugins = with_model(load_suite("cifar10"), text, trust_remote_code=trust)
    registry.load_plugins(plugins)
    return suite


def test_there_are_four_and_two_of_them_open_pickles() -> None:
    assert [file.stem for file in ADAPTERS] == ["edm", "edm2", "guided_diffusion", "sit"]
    assert [file.stem for file in PICKLES] == ["edm", "edm2"]


@pytest.mark.parametrize("file", ADAPTERS, ids=lambda file: file.stem)
def test_an_adapter_has_at_most_twenty_lines_and_loads_weights_alone(file: Path) -> None:
    tree = ast.parse(file.read_text("utf-8"))
    documented = [tree.body[0], *(node.body[0] for node in tree.body if isinstance(node, ast.FunctionDef))]
    words = {line for node in documented for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    lines = enumerate(file.read_text("utf-8").splitlines(), 1)
    assert len([line for number, line in lines if line.strip() and number not in words]) <= 20
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(call)


@pytest.mark.parametrize("adapter", PICKLES, ids=lambda file: file.stem)
def test_a_pickle_is_not_opened_without_trust(adapter: Path, clone: Path) -> None:
    suite = suite_of(adapter, clone, trust=False)
    with pytest.raises(UserError, match="if you trust it: --trust-remote-code"):
        registry.build_model(suite.model.loader, suite.model.options)
    assert not (clone / "opened").exists()


@pytest.mark.parametrize("adapter", PICKLES, ids=lambda file: file.stem)
def test_with_trust_the_network_is_called_as_theirs(adapter: Path, clone: Path) -> None:
    suite = suite_of(adapter, clone, trust=True)
    model = registry.build_model(suite.model.loader, suite.model.options)
    assert (clone / "opened").exists()
    assert (model.shape, model.num_classes, model.native) == ((3, 32, 32), 10, "x0")
    x = torch.ones(2, 3, 32, 32)
    assert torch.equal(model.predict(x, 1.0, 1.0, 1.0, None), 0.5 * x)
    assert torch.equal(model.predict(x, 1.0, 1.0, 1.0, torch.tensor([3, 4])), x)  # one class is on
