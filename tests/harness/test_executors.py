"""Executors in this machine's processes: the same runs, events and checks by each, and options that fit."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ibp_triton.errors import LaunchError
from ibp_triton.harness import grid, loading, store
from ibp_triton.harness.executors.desk import Executor
from ibp_triton.harness.executors.local import Local, Processes, Serial
from ibp_triton.harness.launch import Job, launch
from tests.harness.test_cli import ibp_triton

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
TIMES = ("seconds", "wall_seconds", "seconds_per_epoch")


def job(path: Path, root: Path, *overrides: str) -> Job:
    return Job(grid.runs(loading.load(path, overrides)), root)


def content(folder: Path) -> dict[str, Any]:
    """What a run's folder says but for the time it took: bytes of tensors and evaluations, records and result."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(("eval", "check"))}
    records = [{k: v for k, v in one.items() if k not in TIMES} for one in store.read_metrics(folder)]
    result = store.result(folder)
    assert result is not None, folder
    return {**files, "records": records, "result": {k: v for k, v in result.items() if k not in TIMES}}


@pytest.mark.parametrize("executor", [Serial(), Processes(1), Processes(2), Local(2)], ids=str)
def test_each_executor_gives_the_same_files_and_events(
    tree: Tree, write: Write, tmp_path: Path, executor: Executor
) -> None:
    path, events = write(tree), list[dict[str, Any]]()
    launch(job(path, tmp_path / "one"), 1, lambda _: None)
    assert launch(job(path, tmp_path / "other"), executor, events.append) == []
    for run in grid.runs(loading.load(path)):
        assert content(tmp_path / "one" / run.name) == content(tmp_path / "other" / run.name)
        kinds = [event["kind"] for event in events if event["run"] == run.name]
        assert kinds == ["start", "epoch", "epoch", "evaluate", "evaluate", "done"]


def test_one_run_alone_is_trained_here_unless_processes_are_asked_for(
    tree: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "which_process.py").write_text(
        "import os\nfrom pathlib import Path\nfrom torch import nn\n"
        "def build(shape, classes, place):\n    Path(place).write_text(str(os.getpid()))\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(256, classes))\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "which_process", raising=False)
    place = tmp_path / "place"
    network = {"import": "which_process:build", "options": {"place": str(place)}}
    path = write({**tree, "network": network, "methods": {"bp": None}, "seeds": [0]})
    for executor, here in ((Local(2), True), (Processes(2), False)):
        launch(job(path, tmp_path / str(here)), executor, lambda _: None)
        assert (place.read_text(encoding="utf-8") == str(os.getpid())) == here


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("executor", [Serial(), Processes(1)], ids=str)
def test_a_device_is_looked_for_where_the_run_is_trained(
    tree: Tree, write: Write, tmp_path: Path, executor: Executor
) -> None:
    task = job(write(tree), tmp_path, "training.device=cuda:0")
    with pytest.raises(LaunchError, match=r"training.device: cuda:0 cannot be used here"):
        launch(task, executor, lambda _: None)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--executor", "rai"], "--executor rai: no executor; choose one of serial, processes"),
        (["--executor", "serial", "--workers", "2"], "--workers is of --executor processes, not of serial"),
    ],
)
def test_what_no_executor_can_do_is_one_sentence(
    tree: Tree,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    told: str,
) -> None:
    assert ibp_triton(monkeypatch, "run", str(write(tree)), *options) == 1
    assert told in " ".join(capsys.readouterr().err.split())


def test_the_command_trains_by_the_executor_it_names(
    tree: Tree, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("serial", "processes"):
        output = tmp_path / name
        assert ibp_triton(monkeypatch, "run", str(write(tree)), "--executor", name, "--set", f"output={output}") == 0
        assert len(list(output.glob(f"runs/*/{store.RESULT}"))) == 4
        assert "[4/4]" in capsys.readouterr().out
