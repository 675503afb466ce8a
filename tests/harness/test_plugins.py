"""Methods, networks, data sources and optimizers of other packages, by entry point and by import path."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ibp_triton as ibp
from ibp_triton.errors import ConfigError, LaunchError
from ibp_triton.harness import grid, loading, plugins, provenance, rows, schema, shipped, store
from ibp_triton.harness.cli import app
from ibp_triton.harness.launch import Job, launch

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
CODE = '''
from dataclasses import dataclass
import numpy as np
import torch
from torch import nn
import ibp_triton as ibp

@dataclass(frozen=True, repr=False, eq=False)
class Louder(ibp.LossIBP):
    """Loss IBP, {factor} times as strong.

    Args:
        factor: by which β is multiplied.
    """
    key, title = "louder", "Louder"
    factor: int = 2
    mood: str = "calm"

    def recipe(self, s):
        return ibp.LossIBP(self.beta * self.factor, self.norm, self.semantics).recipe(s)

class NoDataclass(ibp.BP):
    key = "no_dataclass"

@dataclass(frozen=True, repr=False, eq=False)
class Taken(ibp.BP):
    key = "loss_ibp"

def build(shape, classes, width=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))

def load(path):
    draw = np.random.default_rng(0)
    x, y = draw.random((48, 8, 8), np.float32), np.arange(48) % 3
    return torch.from_numpy(x), y, x[:12], y[:12]

def broken(path):
    raise SystemExit("no data today")

class Slow(torch.optim.SGD):
    """Half as fast."""
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr / 2)
'''
POINTS = """
[ibp_triton.methods]
louder = {name}.parts:Louder
[ibp_triton.networks]
tiny_net = {name}:build
[ibp_triton.sources]
tiny_data = {name}:load
[ibp_triton.optimizers]
Slow = {name}:Slow
"""


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """An installed package of this test's name: a module, one beside it, and its metadata."""
    name = f"tiny_{abs(hash(request.node.name))}"
    site = tmp_path / "site-packages"
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(
        f"from {name}.parts import *\nfrom {name}.parts import build, load, Slow\n"
    )
    (site / name / "parts.py").write_text(CODE, encoding="utf-8")
    about = site / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text(POINTS.format(name=name), encoding="utf-8")
    monkeypatch.syspath_prepend(site)
    yield name
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def by_name(tree: Tree) -> Tree:
    training = {**tree["training"], "optimizer": {"Slow": {"lr": 0.2}}}
    own = {"data": {"source": "tiny_data"}, "network": {"name": "tiny_net", "options": {"width": 4}}}
    return {**tree, **own, "training": training, "methods": {"bp": None, "louder": {"beta": 0.03}}, "seeds": [0]}


def by_path(tree: Tree, name: str) -> Tree:
    training = {**tree["training"], "optimizer": {f"{name}:Slow": {"lr": 0.2}}}
    own = {"data": {"source": f"{name}:load"}, "network": {"import": f"{name}:build", "options": {"width": 4}}}
    methods = {"bp": None, "louder": {"method": f"{name}.parts:Louder", "beta": 0.03}}
    return {**tree, **own, "training": training, "methods": methods, "seeds": [0]}


def run_all(path: Path, root: Path, workers: int = 1) -> dict[str, grid.Run]:
    runs = grid.runs(loading.load(path))
    assert launch(Job(runs, root), workers, lambda _: None) == []
    return {run.row: run for run in runs}


@pytest.mark.parametrize("how", ["by entry point", "by import path"])
def test_they_train_evaluate_and_report(tree: Tree, write: Write, tmp_path: Path, name: str, how: str) -> None:
    path = write(by_name(tree) if how == "by entry point" else by_path(tree, name))
    runs = run_all(path, tmp_path / "out" / "runs")
    assert CliRunner().invoke(app, ["run", str(path)]).exit_code == 0
    folder = tmp_path / "out" / "runs" / runs["louder"].name
    assert folder.name.startswith("louder-")
    assert CliRunner().invoke(app, ["evaluate", str(folder), "--set", "adversarial=[0.1]"]).exit_code == 0
    assert CliRunner().invoke(app, ["report", str(tmp_path / "out")]).exit_code == 0
    assert "louder" in (tmp_path / "out" / "results.csv").read_text(encoding="utf-8")
    config = json.loads((folder / store.CONFIG).read_text(encoding="utf-8"))
    stored = {"key": "louder", "import": f"{name}.parts:Louder", "beta": 0.03, "norm": 1.0, "semantics": "paper"}
    assert config["method"] == {**stored, "factor": 2, "mood": "calm"}
    assert set(config["digests"]) == {"code", "method", "source", "optimizer"}
    assert grid.Run.from_config(config).method == runs["louder"].method
    assert grid.Run.from_config(config).name == runs["louder"].name


def test_other_processes_find_them(tree: Tree, write: Write, tmp_path: Path, name: str) -> None:
    runs = run_all(write(by_name(tree)), tmp_path, workers=2)
    assert all((tmp_path / run.name / store.RESULT).exists() for run in runs.values())


def test_the_code_of_each_is_a_part_of_the_run(tree: Tree, write: Write, tmp_path: Path, name: str) -> None:
    path = write(by_name(tree))
    runs = run_all(path, tmp_path / "runs")
    parts = tmp_path / "site-packages" / name / "parts.py"
    parts.write_text(CODE + "# another\n", encoding="utf-8")
    with pytest.raises(LaunchError, match="the code of the method"):
        launch(Job([runs["louder"]], tmp_path / "runs"), 1, lambda _: None)
    assert set(provenance.changes(runs["bp"], tmp_path / "runs" / runs["bp"].name)) == {"code", "source", "optimizer"}


def test_plain_runs_import_nothing(tree: Tree, write: Write) -> None:
    run = grid.runs(loading.load(write(tree)))[0]
    assert provenance.targets(run) == {}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("methods", {"laudr": {"beta": 1}}, "'laudr' is no method; choose one of bp, "),
        ("methods", {"louder": {"bta": 1}}, "methods.louder.bta: louder takes no bta; did you mean beta?"),
        ("methods", {"a": {"method": "{name}:nothing"}}, "methods.a: cannot import {name}:nothing (AttributeError: "),
        ("methods", {"a": {"method": "{name}:build"}}, "{name}:build is no dataclass derived from ibp_triton.Method"),
        ("methods", {"a": {"method": "{name}.parts:Taken"}}, "its key 'loss_ibp' is taken"),
        ("methods", {"a": {"method": "ibp_triton:BP"}}, "ibp_triton:BP is a method of the package; write bp"),
        ("network", {"name": "tiny_ned"}, "network.name: 'tiny_ned' is no network; choose one of paper_mnist, "),
        ("data", {"source": "tiny_date"}, "data.source: 'tiny_date' is no source; choose one of mnist, "),
        ("training.optimizer", "Slwo", "training.optimizer: 'Slwo' is no optimizer of torch.optim; did you mean Slow?"),
        ("training.optimizer", "{name}:build", "{name}:build is no class derived from torch.optim.Optimizer"),
    ],
)
def test_what_is_none_is_one_sentence(tree: Tree, write: Write, name: str, key: str, value: Any, expected: str) -> None:
    given = json.loads(json.dumps(value).replace("{name}", name))
    tree = by_name(tree)
    loading.override(tree, key, given, "")
    with pytest.raises(ConfigError) as caught:
        loading.load(write(tree))
    assert expected.replace("{name}", name) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("what", ["load_nothing", "broken"])
def test_a_source_that_fails_is_named(tree: Tree, write: Write, tmp_path: Path, name: str, what: str) -> None:
    runs = grid.runs(loading.load(write({**by_name(tree), "data": {"source": f"{name}.parts:{what}"}})))
    with pytest.raises(LaunchError, match=r"no data today|cannot import .*:load_nothing"):
        launch(Job(runs, tmp_path), 1, lambda _: None)


def test_a_run_whose_package_is_gone_says_what_is_missing(tree: Tree, write: Write, tmp_path: Path, name: str) -> None:
    run = run_all(write(by_name(tree)), tmp_path)["louder"]
    sys.path.remove(str(tmp_path / "site-packages"))
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / run.name)])
    assert isinstance(result.exception, ConfigError)
    assert f"(cannot import {name}.parts:Louder (ModuleNotFoundError" in str(result.exception)
    assert "install its package" in str(result.exception)


def test_any_model_is_evaluated_on_a_source_from_elsewhere(tmp_path: Path, name: str) -> None:
    model = plugins.load(f"{name}:build")((1, 8, 8), 3)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    options = ["--checkpoint", str(tmp_path / "a.pt"), "--data", "tiny_data", "--attack", "fgsm=0.1"]
    result = CliRunner().invoke(app, ["evaluate", f"{name}:build", *options])
    assert result.exit_code == 0, result.exception
    assert "12 examples" in result.output


def test_text_of_a_foreign_method_is_data(tree: Tree, write: Write, tmp_path: Path, name: str) -> None:
    labels = ["=1+1", "[/x]"]
    tree |= {"methods": {"loud": {"method": "louder", "beta": 0.03, "mood": labels}}, "select": "test", "seeds": [0]}
    path = write(tree)
    result = CliRunner().invoke(app, ["run", str(path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.exception
    rows_shown = [line for line in result.output.splitlines() if line.startswith("│ loud")]
    assert [label in row for label, row in zip(labels, rows_shown, strict=True)] == [True, True]
    assert CliRunner().invoke(app, ["report", str(tmp_path / "out")]).exit_code == 0
    for file in ("results.csv", "curves.csv"):
        assert ",=1+1" not in (tmp_path / "out" / file).read_text(encoding="utf-8")


def test_they_are_listed_and_in_the_schema(name: str) -> None:
    found = shipped.listing()
    assert found["methods"]["louder"] == f"{name}.parts:Louder"
    assert found["data sources"]["tiny_data"] == f"{name}:load"
    assert (found["networks"], found["optimizers"]) == ({"tiny_net": f"{name}:build"}, {"Slow": f"{name}:Slow"})
    of = schema.experiment()
    assert "factor" in of["$defs"]["row louder"]["properties"]
    assert "tiny_net" in of["$defs"]["NetworkChoice"]["properties"]["name"]["enum"]
    assert rows.methods()[-1] == "louder"
    assert set(ibp.METHODS) == set(rows.methods()[:-1])
    assert plugins.target_of("methods", "nothing") is None
