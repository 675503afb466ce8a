"""Rows of `methods`: the fields of each method's dataclass, each of them an axis where it has several values."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ibp_triton as ibp
from ibp_triton.errors import ConfigError
from ibp_triton.harness import estimates, grid, loading, rows
from ibp_triton.harness.cli import app

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
ROOT = Path(__file__).parents[2]
NAMES = {  # the number of runs of a file in configs/, and the SHA-256 of their names
    "calibration_cifar10": (12, "929bac49f25c"),
    "calibration_mnist": (12, "38b5f83ddc57"),
    "fashion_mnist": (57, "959d4a111e9e"),
    "fig2_adversarial_cifar10": (36, "62dd0824a746"),
    "fig2_adversarial_mnist": (24, "cb6d1e447510"),
    "fig3_gaussian_cifar10": (36, "62dd0824a746"),
    "fig3_gaussian_mnist": (24, "cb6d1e447510"),
    "fig4_dataset_size": (96, "03ae5fc9a478"),
    "own_model": (10, "b9f97cf7b5f9"),
    "prediction_ibp_inquiry": (50, "d2162fc81fa7"),
    "quickstart": (14, "b5c964088ba0"),
    "semantics_gap": (39, "c8285625459b"),
    "table1_cifar10": (36, "62dd0824a746"),
    "table1_mnist": (24, "cb6d1e447510"),
}
NEW: Tree = {
    "jacobian": {"beta": 0.01, "projections": [1, "all"]},
    "pgd_training": {"epsilon": 0.1, "step_size": 0.05, "steps": [1, 2], "random_start": [True, False]},
    "trades": {"lam": [1, 6], "epsilon": 0.1, "step_size": 0.05, "steps": 2},
}


@pytest.mark.parametrize("stem", NAMES)
def test_runs_keep_the_names_of_their_folders(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = [run.name for run in grid.runs(loading.load(Path("configs") / f"{stem}.yaml"))]
    assert (len(names), hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]) == NAMES[stem]


@pytest.mark.parametrize("key", ibp.METHODS)
def test_every_method_is_stored_and_read_back(key: str) -> None:
    examples = {"epsilon": 0.1, "beta": 1, "lam": 2.5, "step_size": 0.02, "steps": 3}
    given = {
        name: examples[name]
        for name, kind in rows.kinds(ibp.METHODS[key]).items()
        if kind.default is dataclasses.MISSING
    }
    (method,) = rows.MethodRow.model_validate({"method": key, **given}).points
    assert rows.from_stored(json.loads(json.dumps(rows.stored(method)))) == method
    assert rows.stored(ibp.METHODS[key](**given)) == rows.stored(method), "whole numbers are floats where fields are"


def test_a_list_on_any_field_is_an_axis(tree: Tree, write: Write) -> None:
    every = grid.runs(loading.load(write({**tree, "methods": NEW, "seeds": [0], "select": "test"})))
    assert [run.label for run in every] == [
        "jacobian 0.01 projections=1 seed 0",
        "jacobian 0.01 projections=all seed 0",
        "pgd_training 0.1 steps=1 random_start=true seed 0",
        "pgd_training 0.1 steps=1 random_start=false seed 0",
        "pgd_training 0.1 steps=2 random_start=true seed 0",
        "pgd_training 0.1 steps=2 random_start=false seed 0",
        "trades 1 seed 0",
        "trades 6 seed 0",
    ]
    assert every[-1].method == ibp.TRADES(6.0, 0.1, 0.05, 2)
    assert len({run.name for run in every}) == 8


def test_only_takes_every_field(tree: Tree, write: Write) -> None:
    every = grid.runs(loading.load(write({**tree, "methods": {**NEW, "bp": None}, "seeds": [0], "select": "test"})))

    def labels(*only: str) -> list[str]:
        return [run.label.removesuffix(" seed 0") for run in grid.select(every, only)]

    assert labels("steps=2", "random_start=false") == ["pgd_training 0.1 steps=2 random_start=false"]
    assert labels("steps=2", "method=trades") == ["trades 1", "trades 6"]
    assert labels("projections=all") == ["jacobian 0.01 projections=all"]
    assert labels("lam=6.0", "parameter=6") == ["trades 6"]
    with pytest.raises(ConfigError, match=r"steps=7: no such run; there is none, 1, 2"):
        labels("steps=7")
    with pytest.raises(ConfigError, match=r"norm=2: write one of method, row, variant, seed, parameter, .*lam"):
        labels("norm=2")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("trades.beta", "1", "methods.trades.beta: trades takes no beta; its fields: lam, epsilon, step_size, steps"),
        ("trades.step_sise", "1", "takes no step_sise; did you mean step_size? its fields: lam,"),
        ("trades.steps", "2.5", "methods.trades.steps: expected a whole number, or a list of such values, got 2.5"),
        ("trades.steps", "true", "methods.trades.steps: expected a whole number, or a list of such values, got True"),
        ("trades.steps", "0", "methods.trades: TRADES: steps must be at least 1, not 0"),
        ("trades.lam", "[1, 1.0]", "methods.trades.lam: 1.0 is given twice; give each once"),
        ("trades.lam", "-1", "methods.trades: TRADES: lam must be finite and at least 0, not -1"),
        ("trades.lam", ".inf", "methods.trades.lam: expected a number, or a list of such values, got inf"),
        ("trades.lam", "{a: 1}", "methods.trades.lam: expected a number, or a list of such values, got {'a': 1}"),
        ("trades", "{lam: 1}", "methods.trades: trades needs epsilon and step_size and steps"),
        ("trades", "6", "methods.trades: expected the method's fields, such as {beta: 0.03}"),
        ("jacobian.projections", "some", "projections: expected a whole number or all, or a list of such values, got"),
        ("jacobian.semantics", "papers", "methods.jacobian: semantics must be 'paper' (Algorithm 1) or 'exact'"),
        ("pgd_training.random_start", "1", "random_start: expected true or false, or a list of such values, got 1"),
        ("mine.method", "[bp]", "methods.mine: ['bp'] is no method; choose one of bp,"),
    ],
)
def test_faults_of_a_row_are_named(tree: Tree, write: Write, key: str, value: str, expected: str) -> None:
    path = write({**tree, "methods": NEW, "select": "test"})
    with pytest.raises(ConfigError) as caught:
        loading.load(path, [f"methods.{key}={value}"])
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_row_has_a_line_for_each_fault_and_a_limit(tree: Tree, write: Write) -> None:
    path = write({**tree, "methods": {"trades": {"lam": "a", "steps": "b"}}, "select": "test"})
    with pytest.raises(ConfigError) as caught:
        loading.load(path)
    assert [line.split(": ")[2] for line in str(caught.value).splitlines()] == [
        "methods.trades.lam",
        "methods.trades.steps",
    ]
    many = list(range(1, 400))
    path = write({**tree, "methods": {"trades": {"lam": many, "epsilon": many, "step_size": many, "steps": 1}}})
    with pytest.raises(ConfigError, match=r"63521199 combinations of values are more than 100000; shorten a list"):
        loading.load(path)


def test_costs_follow_the_fields(tree: Tree, write: Write) -> None:
    every = grid.runs(loading.load(write({**tree, "methods": {**NEW, "bp": None}, "seeds": [0], "select": "test"})))
    ratios = {run.label.removesuffix(" seed 0"): estimates.ratio(run) for run in every}
    assert ratios["bp"] == 1.0
    assert ratios["pgd_training 0.1 steps=1 random_start=true"] < ratios["pgd_training 0.1 steps=2 random_start=true"]
    assert ratios["jacobian 0.01 projections=1"] < ratios["jacobian 0.01 projections=all"]
    assert ratios["trades 1"] == ratios["trades 6"]
    for run in every:
        assert estimates.weight(run) == pytest.approx(2 * 64 * ratios[run.label.removesuffix(" seed 0")])


def test_new_methods_train_and_report_from_yaml(tree: Tree, write: Write, tmp_path: Path) -> None:
    tree |= {"methods": {"bp": None, **NEW}, "seeds": [0], "data": {**tree["data"], "validation": 8}}
    path, call = write({**tree, "track_cosine": True, "evaluate": {"gaussian": [0.1]}}), CliRunner().invoke
    dry = call(app, ["run", str(path), "--dry-run"], env={"COLUMNS": "120"})
    assert dry.exit_code == 0
    assert "pgd_training 0.1 steps=2 random_start=false seed 0" in dry.output
    done = call(app, ["run", str(path), "--only", "steps=2", "--set", "methods.trades.steps=[1,2]"])
    assert done.exit_code == 0, done.output
    assert "4 runs, 0 finished before" in done.output
    done = call(app, ["run", str(path)], env={"COLUMNS": "140"})
    assert done.exit_code == 0, done.output
    assert "9 runs, 4 finished before" in done.output
    (heads,) = (line for line in done.output.splitlines() if line.startswith("┃"))
    assert heads.replace("┃", " ").split()[:6] == ["method", "β", "ε", "λ", "projections", "steps"]
    assert call(app, ["report", str(tmp_path / "out")]).exit_code == 0
    text = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    assert "The best projections, steps, random_start, λ were chosen on the validation split." in text
    assert "| method | β | ε | λ | projections | steps | random_start |" in text
    with (tmp_path / "out" / "results.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    fields = ("beta", "projections", "semantics", "epsilon", "step_size", "steps", "random_start", "lam")
    assert [tuple(line[name] for name in fields) for line in lines if line["method"] in ("bp", "trades")] == [
        ("", "", "", "", "", "", "", ""),
        ("", "", "", "0.1", "0.05", "2", "", "1.0"),
        ("", "", "", "0.1", "0.05", "2", "", "6.0"),
    ]
    records = [json.loads(file.read_text().splitlines()[0]) for file in (tmp_path / "out/runs").glob("*/metrics.jsonl")]
    assert sum("cosine" in record for record in records) == 2, "both rows of jacobian, whose fields have semantics"


@pytest.mark.parametrize("key", ibp.METHODS)
def test_the_documentation_has_every_field_and_default(key: str) -> None:
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    lines = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    (fields,) = (fields for methods, fields in lines if f"`{key}`" in methods.replace(" ", "").split(","))
    for name, kind in rows.kinds(ibp.METHODS[key]).items():
        default = "" if kind.default is dataclasses.MISSING else f" ({grid.shown(kind.default)}"
        assert f"`{name}`{default}" in fields
