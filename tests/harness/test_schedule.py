"""`schedule:` of a YAML file: what a number is in each epoch, in every kind of step, and what a run is then."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ibp_triton as ibp
from ibp_triton.errors import ConfigError
from ibp_triton.harness import grid, loading, store, train
from ibp_triton.harness.report.gather import Findings
from ibp_triton.harness.report.tables import state
from ibp_triton.harness.schedule import Schedule

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
WARM = {"beta": {"linear": {"from": 0, "epochs": 2}}, "learning_rate": [{"step": {"every": 2, "factor": 0.5}}]}


class StopError(Exception):
    """Stands in for a kill between two epochs."""


def numbers(phases: Any, epochs: int, own: float = 1.0) -> list[float]:
    schedule = Schedule.model_validate({"beta": phases})
    return [schedule.value("beta", own, epoch, epochs) for epoch in range(epochs)]


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ({"linear": {"from": 0, "to": 0.4, "epochs": 4}}, [0, 0.1, 0.2, 0.3, 0.4, 0.4]),
        ({"linear": {"from": 0, "epochs": 2}}, [0, 0.5, 1, 1, 1, 1]),
        ({"cosine": {"to": 0}}, [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
        ({"step": {"every": 2, "factor": 0.1}}, [1, 1, 0.1, 0.1, 0.01, 0.01]),
        ({"steps": {"at": [1, 4], "to": [5, 2]}}, [1, 5, 5, 5, 2, 2]),
        ([{"linear": {"from": 0.5, "epochs": 2}}, {"cosine": {"to": 0}}], [0.5, 0.75, 1, 0.8535534, 0.5, 0.1464466]),
        (
            [{"step": {"every": 1, "factor": 0.5, "epochs": 2}}, {"linear": {"to": 0, "epochs": 2}}],
            [1, 0.5, 0.25, 0.125, 0, 0],
        ),
    ],
)
def test_a_number_in_each_epoch(phases: Any, expected: list[float]) -> None:
    assert numbers(phases, 6) == pytest.approx(expected)


def test_the_ends_of_a_ramp_are_the_very_numbers_of_the_file() -> None:
    found = numbers({"cosine": {"from": 0.1, "to": 0.3, "epochs": 3}}, 5)
    assert [found[0], found[3], found[4]] == [0.1, 0.3, 0.3]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"betta": {"linear": {"from": 0}}}, "schedule.betta: no number of the training or of one of the methods; did"),
        ({"beta": {"linear": {"form": 0}}}, "schedule.beta.0.linear.form: unknown key; did you mean from?"),
        ({"beta": {"lineal": {"from": 0}}}, "schedule.beta.0.lineal: unknown key; did you mean linear?"),
        ({"beta": {"linear": {"from": -1}}}, "schedule.beta: LossIBP: beta must be finite and at least 0, not -1"),
        ({"semantics": {"linear": {"from": 0}}}, "schedule.semantics: no number of the training or of one of the"),
        ({"beta": {"linear": {}}}, "beta: its first phase stays where it is; give from, or to, or both"),
        ({"beta": [{"linear": {"from": 0}}, {"cosine": {"to": 0}}]}, "beta: every phase but the last needs epochs"),
        ({"beta": []}, "schedule.beta: List should have at least 1 item"),
        ({"beta": {}}, "schedule.beta.0: give one of linear, cosine, step, steps"),
        ({"beta": {"linear": {"from": 0}, "step": {"every": 1, "factor": 2}}}, "give one of linear, cosine, step"),
        ({"beta": {"steps": {"at": [2, 1], "to": [0, 1]}}}, "give at as growing epochs and to with one number for"),
        ({"learning_rate": {"linear": {"from": 0}}}, "schedule.learning_rate: 0 in epoch 1; it must be positive"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_file_and_line(
    tree: Tree, write: Write, schedule: Tree, expected: str
) -> None:
    path = write({**tree, "schedule": schedule})
    with pytest.raises(ConfigError) as caught:
        loading.load(path)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"{path}: line ")
    assert len(str(caught.value).splitlines()) == 1


def runs(tree: Tree, write: Write, *overrides: str) -> dict[str, grid.Run]:
    return {run.row: run for run in grid.runs(loading.load(write({**tree, "seeds": [0]}), overrides))}


def test_it_is_a_part_of_what_a_run_is_where_the_run_has_the_number(tree: Tree, write: Write) -> None:
    tree["methods"]["pgd_training"] = {"epsilon": 0.1, "step_size": 0.1, "steps": 2}
    before, after = runs(tree, write), runs({**tree, "schedule": {"beta": WARM["beta"]}}, write)
    assert before["bp"].name == after["bp"].name
    assert before["pgd_training"].name == after["pgd_training"].name
    assert "schedule" not in before["loss_ibp"].config()
    assert before["loss_ibp"].name != after["loss_ibp"].name
    config = json.loads(json.dumps(after["loss_ibp"].config()))
    assert config["schedule"] == {"beta": [{"linear": {"from": 0.0, "epochs": 2}}]}
    assert grid.Run.from_config(config).name == after["loss_ibp"].name


def test_scheduled_numbers_do_not_decay_and_whole_ones_stay_whole(tree: Tree, write: Write) -> None:
    tree["methods"]["pgd_training"] = {"epsilon": 0.1, "step_size": 0.1, "steps": 1}
    schedule = {"steps": {"linear": {"to": 4, "epochs": 2}}, "epsilon": {"step": {"every": 1, "factor": 0.5}}}
    found = runs({**tree, "schedule": {**WARM, **schedule}}, write, "training.epochs=3")
    assert [found["loss_ibp"].method_in(epoch) for epoch in range(3)] == [ibp.LossIBP(b) for b in (0, 0.015, 0.03)]
    methods = [found["pgd_training"].method_in(epoch) for epoch in range(3)]
    assert methods == [ibp.PGDTraining(e, 0.1, s) for e, s in ((0.1, 1), (0.05, 2), (0.025, 4))]
    assert [found["bp"].rate_in(epoch) for epoch in range(3)] == [0.1, 0.1, 0.05]


@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_every_step_follows_it_and_a_stopped_run_ends_with_the_same_bits(
    tree: Tree, write: Write, tmp_path: Path, kind: str
) -> None:
    if kind == "compiled" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    tree["training"] |= {"epochs": 6, "batch_size": 24, "compile": kind == "compiled"}  # the last batch is smaller
    run = runs({**tree, "schedule": WARM}, write)["loss_ibp"]

    def stop(record: store.Record) -> None:
        if record["epoch"] == 5:
            raise StopError

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train.train(run, tmp_path / "whole", lambda _: None)
        with pytest.raises(StopError):
            train.train(run, tmp_path / "stopped", stop)
        train.train(run, tmp_path / "stopped", lambda _: None)
    whole, stopped = (tmp_path / name for name in ("whole", "stopped"))
    assert (whole / store.CHECKPOINT).read_bytes() == (stopped / store.CHECKPOINT).read_bytes()
    records = store.read_metrics(stopped)
    assert [record["beta"] for record in records] == [0, 0.015, 0.03, 0.03, 0.03, 0.03]
    assert [record["learning_rate"] for record in records] == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]


def test_what_is_scheduled_is_what_is_trained(tree: Tree, write: Write, tmp_path: Path) -> None:
    """Constant by schedule and constant by itself end alike; β = 0 is BP."""
    tree |= {"training": {**tree["training"], "beta_decay": False, "decay": 1.0}}
    flat = {"beta": {"linear": {"from": 0.0, "to": 0.0}}, "learning_rate": {"steps": {"at": [0], "to": [0.1]}}}
    found = runs({**tree, "schedule": flat}, write)
    train.train(found["loss_ibp"], tmp_path / "flat", lambda _: None)
    train.train(runs(tree, write)["bp"], tmp_path / "bp", lambda _: None)
    flat_weights, weights = (store.read_tensors(tmp_path / name / store.CHECKPOINT) for name in ("flat", "bp"))
    assert flat_weights is not None
    assert weights is not None
    assert all(torch.allclose(flat_weights[0][name], value, atol=1e-6) for name, value in weights[0].items())


def test_the_report_tells_it(tree: Tree, write: Write, tmp_path: Path) -> None:
    tree["variants"] = {"cold": {}, "warm": {"schedule.beta": WARM["beta"]}}
    plan = loading.load(write({**tree, "schedule": {"learning_rate": [*WARM["learning_rate"]]}}))
    text = state(Findings(plan, tmp_path))
    assert "Scheduled: learning_rate: steps times 0.5 every 2 epochs." in text
    assert "Scheduled in warm: β: linear from 0 in 2 epochs." in text
