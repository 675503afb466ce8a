"""`ibp-triton schema`: every shipped file passes the JSON Schema, and what the harness refuses as a typo does not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from ibp_triton.harness import loading, schema, shipped

Tree = dict[str, Any]
EXPERIMENTS = sorted(shipped.folder().glob("*.yaml"))
SUITES = sorted((shipped.folder() / "bench").glob("*.yaml"))


@cache
def validator(of: Callable[[], Tree]) -> Any:
    """Of a schema that is a sound one itself: to make it and to look takes a tenth of a second."""
    jsonschema = pytest.importorskip("jsonschema", reason="the package jsonschema is of the extra dev")
    found = of()
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def faults(tree: Any, of: Callable[[], Tree]) -> list[str]:
    return [error.message for error in validator(of).iter_errors(tree)]


def written(path: Path) -> Any:
    """As an editor sees the file."""
    return loading.parse(path.read_text(encoding="utf-8"), str(path))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_passes(path: Path) -> None:
    assert faults(written(path), schema.experiment) == []
    assert faults(loading.read_tree(path), schema.experiment) == []


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_suite_passes(path: Path) -> None:
    assert faults(written(path), schema.suite) == []


HALF = {"every": 1, "factor": 0.5}
RICH = {
    "training.optimizer": {"AdamW": {"lr": 0.001}},
    "schedule": {
        "beta": [{"linear": {"from": 0, "epochs": 2}}, {"cosine": {"to": 0}}],
        "epsilon": {"linear": {"to": 1}},
    },
    "seeds": ["0..3", 7, {"subset": 1, "weights": 2, "order": 3}],
    "methods": {"bp": None, "mine": {"method": "loss_ibp", "beta": [0, 0.1]}, "at": {"method": "bp"}},
    "network": {"import": "package.module:build", "options": {"anything": 1}},
    "variants": {"a": {"training.epochs": 3, "methods.mine.beta": 1}, "b": {"preset": "paper", "data": {}}},
}
TYPOS = [
    ("trainng", {}),
    ("training.epoch", 3),
    ("training.epochs", "many"),
    ("training.optimizer", "AdamV"),
    ("training.optimizer", {"AdamW": {"weight_decy": 0.1}}),
    ("data.sauce", "mnist"),
    ("data.source", "mnits"),
    ("network", "paper_minst"),
    ("network", {"hidden": 3}),
    ("methods", {"lossibp": {"beta": 1}}),
    ("methods", {"loss_ibp": {"bta": 1}}),
    ("methods", {"loss_ibp": {"beta": "a"}}),
    ("methods", {"at": {"method": "loss_ibp", "epsilon": 1}}),
    ("methods", {}),
    ("schedule", {"betta": {"linear": {"from": 0}}}),
    ("schedule", {"beta": {"lineal": {"from": 0}}}),
    ("seeds", {"from": 0}),
    ("variants", {"a": {"training.epoch": 3}}),
    ("variants", {"a": {"workers": 3}}),
    ("evaluate", {"adverserial": [0.1]}),
    ("extend", "quickstart.yaml"),
]


def changed(key: str, value: Any) -> Tree:
    tree = written(shipped.folder() / "quickstart.yaml")
    loading.override(tree, key, value, "")
    return tree


@pytest.mark.parametrize("key", RICH)
def test_what_the_harness_takes_passes(key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    tree = changed(key, RICH[key]) | {"select": "test"}
    tree |= {"methods": {**changed(key, RICH[key])["methods"], "loss_ibp": {"beta": 1}, "fast_at": {"epsilon": 1}}}
    if key == "variants":
        tree["methods"] |= RICH["methods"]
        del tree["variants"]["b"]["data"]
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    loading.load(path)
    assert faults(tree, schema.experiment) == []


@pytest.mark.parametrize(("key", "value"), TYPOS)
def test_planted_typos_fail(key: str, value: Any) -> None:
    assert faults(changed(key, value), schema.experiment)


@pytest.mark.parametrize(
    ("key", "value"), [("methods", ["los_ibp"]), ("networks", {"x": {"netwrok": "vit"}}), ("batches", [1])]
)
def test_planted_typos_fail_in_suites(key: str, value: Any) -> None:
    assert faults(written(SUITES[0]) | {key: value}, schema.suite)


def test_only_a_file_that_extends_another_may_leave_keys_out() -> None:
    assert faults({"name": "a"}, schema.experiment)
    assert faults({"name": "a", "extends": "quickstart.yaml"}, schema.experiment) == []


@pytest.mark.parametrize(("arguments", "expected"), [((), schema.experiment), (("--bench",), schema.suite)])
def test_the_command_prints_it(arguments: tuple[str, ...], expected: Any) -> None:
    command = [sys.executable, "-m", "ibp_triton", "schema", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(expected()))
