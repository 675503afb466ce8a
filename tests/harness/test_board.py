"""Runs on boards: the protocol by one that records, TensorBoard, W&B offline and trackio by the real packages."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from ibp_triton.errors import BoardError, ConfigError
from ibp_triton.harness import board, store
from ibp_triton.harness.cli import app
from ibp_triton.harness.grid import Run

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
ROOT = Path(__file__).parents[2]
HERE = __name__
CURVES = {"adversarial": [0.0, 0.1], "masking": 0.05}
ROBUST = {"robustness/clean", "robustness/adversarial/0", "robustness/adversarial/0.1", "masking/zero_entries"}


class Recorder:
    """A board's page that remembers what it gets, by run."""

    heard: ClassVar[dict[str, list[tuple[Any, ...]]]] = {}

    def __init__(self, run: Run, folder: Path, place: str) -> None:
        self.mine = self.heard.setdefault(run.name, [])
        self.mine.append(("open", place))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.mine.append(("scalars", step, dict(values)))

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        self.mine.append(("picture", step, name, tuple(pixels.shape), pixels.dtype))

    def close(self) -> None:
        self.mine.append(("close",))


class Broken(Recorder):
    """Fails at the second epoch."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step == 2:
            raise ConnectionError("no [network]")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Recorder.heard.clear()


@pytest.fixture
def config(tree: Tree, write: Write) -> Path:
    return write({**tree, "seeds": [0], "evaluate": CURVES, "schedule": {"beta": {"linear": {"from": 0}}}})


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300"})
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def of(method: str) -> list[tuple[Any, ...]]:
    (found,) = (calls for name, calls in Recorder.heard.items() if name.startswith(f"{method}-"))
    return found


def test_a_run_is_logged_as_it_goes(config: Path) -> None:
    command("run", config, "--log", f"{HERE}:Recorder=a place")
    calls = of("loss_ibp")
    assert [call[0] for call in calls] == ["open", *["scalars"] * 3, *["picture"] * 2, "close"]
    assert calls[0] == ("open", "a place")
    first, second, last = (call[2] for call in calls[1:4])
    assert [call[1] for call in calls[1:4]] == [1, 2, 2]
    assert {"loss", "seconds", "learning_rate"} < set(first)
    assert (first["beta"], second["beta"]) == (0, 0.015)
    assert set(last) > ROBUST | {"test_error", "predicted_ratio"}
    assert "epochs" not in last
    assert [call[1:] for call in calls[4:6]] == [
        (2, "samples/clean", (16, 8 * 16, 3), torch.uint8),
        (2, "samples/fgsm 0.1", (16, 8 * 16, 3), torch.uint8),
    ]


def test_finished_runs_are_logged_once_and_again_on_demand(config: Path, tmp_path: Path) -> None:
    command("run", config, "--only", "method=bp")
    command("run", config, "--log", f"{HERE}:Recorder")
    steps = {method: [call[1] for call in of(method) if call[0] == "scalars"] for method in ("bp", "loss_ibp")}
    assert steps == {"bp": [1, 2, 2], "loss_ibp": [1, 2, 2]}
    Recorder.heard.clear()
    command("run", config, "--log", f"{HERE}:Recorder")
    assert Recorder.heard == {}
    assert "2 of 2 runs are finished and logged" in command("log", tmp_path / "out", f"{HERE}:Recorder")
    assert len(Recorder.heard) == 2
    Recorder.heard.clear()
    (folder,) = (tmp_path / "out" / "runs").glob("bp-*")
    assert "1 of 1 runs are finished and logged" in command("log", folder, f"{HERE}:Recorder=x", f"{HERE}:Recorder=y")
    assert [call for call in of("bp") if call[0] == "open"] == [("open", "x"), ("open", "y")]
    boards = (store.read_json(folder / board.LOGGED) or {})["boards"]
    assert boards == [f"{HERE}:Recorder", f"{HERE}:Recorder=x", f"{HERE}:Recorder=y"]


def test_what_a_board_raises_stops_nothing(config: Path, tmp_path: Path) -> None:
    out = command("run", config, "--only", "method=bp", "--log", f"{HERE}:Broken", "--log", f"{HERE}:Recorder")
    assert f"bp seed 0: not logged to {HERE}:Broken; ConnectionError: no [network]" in out
    assert of("bp")[-1] == ("close",)
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    assert (store.read_json(folder / board.LOGGED) or {})["boards"] == [f"{HERE}:Recorder"]


def test_without_its_data_a_run_is_logged_but_for_the_pictures(config: Path, tmp_path: Path) -> None:
    command("run", config, "--only", "method=bp")
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    (folder / store.CHECKPOINT).unlink()
    out = command("log", folder, f"{HERE}:Recorder")
    assert "bp seed 0: no sample images on the boards; " in out
    assert [call[0] for call in of("bp")] == ["open", *["scalars"] * 3, "close"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("tensorbaord", ConfigError, "tensorbaord: no board; choose one of tensorboard, wandb, trackio, or package"),
        (
            "wandb=mine",
            BoardError,
            "wandb=mine: wandb is not installed; install it with: pip install 'ibp-triton[wandb]'",
        ),
        (f"{HERE}:Nothing", ConfigError, f"cannot import {HERE}:Nothing"),
    ],
)
def test_a_board_that_is_none_is_refused_before_anything_is_trained(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(board, "find_spec", lambda _: None)
    result = CliRunner().invoke(app, ["run", str(config), "--log", name])
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert not (tmp_path / "out" / "runs").exists()


def test_pictures_of_any_number_of_channels() -> None:
    for channels in (1, 2, 3, 4):
        row = board._row(torch.full((2, channels, 4, 5), 0.5))
        assert (row.shape, row.unique().tolist()) == ((4, 10, 3), [128])


def test_tensorboard_has_scalars_and_pictures_of_finished_runs_too(config: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    command("run", config, "--only", "method=bp")
    command("run", config, "--tensorboard")
    command("log", tmp_path / "out", f"tensorboard={tmp_path}/board")
    folders = [*(tmp_path / "out" / "runs").glob("*/tensorboard"), *(tmp_path / "board").iterdir()]
    assert len(folders) == 4
    for folder in folders:
        events = accumulator.EventAccumulator(str(folder)).Reload()
        assert [event.step for event in events.Scalars("loss")] == [1, 2]
        assert set(events.Tags()["scalars"]) > ROBUST
        assert events.Tags()["images"] == ["samples/clean", "samples/fgsm 0.1"]


def real(package: str, config: Path, **environment: str) -> None:
    """Two processes, so that two runs are logged at a time, with the real package."""
    pytest.importorskip(package, reason=f"the package {package} is not installed: pip install 'ibp-triton[{package}]'")
    arguments = ["run", str(config), "--workers", "2", "--log", f"{package}=tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    line = [sys.executable, "-m", "ibp_triton", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment, cwd=config.parent)
    assert done.returncode == 0, done.stderr
    assert "not logged" not in done.stdout


def test_wandb_has_scalars_and_pictures(config: Path, tmp_path: Path) -> None:
    """The real package, offline: its start takes some seconds."""
    real("wandb", config, WANDB_MODE="offline", WANDB_SILENT="true")
    runs = [folder.name for folder in (tmp_path / "out" / "runs").iterdir()]
    assert len(runs) == 2
    for run in runs:
        (record,) = (tmp_path / "out" / "runs" / run / "wandb").glob(f"offline-run-*/run-{run}.wandb")
        content = record.read_bytes()
        assert all(name.encode() in content for name in (*ROBUST, "samples/clean", "learning_rate"))
        assert list(record.parent.glob("files/media/images/samples/clean*.png"))


def test_trackio_has_scalars_and_pictures(config: Path, tmp_path: Path) -> None:
    """The real package, into a local folder: its start takes some seconds."""
    real("trackio", config, TRACKIO_DIR=str(tmp_path / "trackio"))
    (database,) = (tmp_path / "trackio").glob("tiny*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("select run_name, step, metrics from metrics").fetchall()
    connection.close()
    assert len({name for name, _, _ in found}) == 2
    assert {step for _, step, _ in found} == {1, 2}
    assert all(any(name in str(text) for _, _, text in found) for name in (*ROBUST, "samples/clean", "learning_rate"))
    assert list((tmp_path / "trackio" / "media").rglob("*.png"))
