"""A job array: by submitit's executor of local processes, and as it is handed to an sbatch that writes it down."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ibp_triton.harness import evaluate, store
from ibp_triton.harness.bucket import Bucket
from ibp_triton.harness.executors.slurm_array import Slurm
from ibp_triton.harness.launch import launch, remaining
from ibp_triton.harness.leases import LOCK, Lease
from tests.cluster.conftest import copied
from tests.harness.test_cli import ibp_triton
from tests.harness.test_executors import content, job

submitit = pytest.importorskip("submitit")

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


def wait_for(found: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.1)


def said(stream: str) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in Path("slurm").glob(f"*_log.{stream}"))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for a process's children in /proc")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit leaves its process to itself
@pytest.mark.usefixtures("elsewhere")
def test_an_array_trains_the_same_bits_and_goes_on_after_its_time(
    tree: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree["training"]["epochs"], tree["data"]["examples"] = 30, 256
    path, events = write({**tree, "seeds": [0]}), list[dict[str, Any]]()
    calm, other = job(path, tmp_path / "calm"), job(Path("tiny.yaml"), Path("array"))
    launch(calm, 1, lambda _: None)
    monkeypatch.setattr("ibp_triton.harness.executors.slurm_array.MOST", 1)
    assert launch(other, Slurm(Path("slurm"), cluster="local"), events.append) == []
    assert [event["kind"] for event in events] == ["note", "busy", "busy"]
    told = re.search(r"submitted as job (\d+), 1 elements", events[0]["message"])
    assert told
    wait_for(lambda: store.count_epochs(tmp_path / "array" / calm.runs[0].name) >= 2)
    for child in Path(f"/proc/{told[1]}/task/{told[1]}/children").read_text(encoding="utf-8").split():
        os.kill(int(child), signal.SIGUSR2)  # as Slurm does shortly before the time is up
    wait_for(lambda: not remaining(other))
    for run in calm.runs:
        assert content(tmp_path / "calm" / run.name) == content(tmp_path / "array" / run.name)
        assert not (tmp_path / "array" / run.name / "error.txt").exists()
    wait_for(lambda: "[2/2] loss_ibp" in said("out"))
    assert "Requeued job" in said("err") + said("out")
    os.waitpid(int(told[1]), 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("elsewhere")
def test_an_array_has_its_runs_in_a_bucket_and_waits_for_a_dead_ones(
    tree: Tree, write: Write, tmp_path: Path, runs: Bucket
) -> None:
    """Slow: its one element imports torch."""
    path, events = write({**tree, "methods": {"bp": None}, "seeds": [0]}), list[dict[str, Any]]()
    calm = job(path, tmp_path / "calm")
    launch(calm, 1, lambda _: None)
    (run,) = calm.runs
    dead = Lease(replace(runs, lease=30.0), f"{run.name}/{LOCK}")
    assert dead.take()
    dead._ended.set()
    other = replace(job(path, tmp_path / "none"), bucket=replace(runs, patient=True))
    assert launch(other, Slurm(Path("slurm"), cluster="local"), events.append) == []
    assert [event["kind"] for event in events] == ["note", "busy"]
    wait_for(lambda: f"{run.name}/{evaluate.file_stem(other.evaluate)}.json" in runs.names())
    assert content(tmp_path / "calm" / run.name) == content(copied(runs, tmp_path / "copy") / run.name)
    assert not (tmp_path / "none").exists()
    told = re.search(r"submitted as job (\d+)", events[0]["message"])
    assert told
    os.waitpid(int(told[1]), 0)


SBATCH = """#!/bin/sh
cp "$1" {place}
echo "Submitted batch job 4711"
"""


@pytest.mark.usefixtures("elsewhere")
def test_what_slurm_is_given_and_what_the_user_is_told(
    tree: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun"):
        (tmp_path / "bin" / name).write_text(SBATCH.format(place=tmp_path / "script"), encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    options = ["--executor", "slurm", "--partition", "short", "--time", "90", "--gpus-per-run", "1"]
    assert ibp_triton(monkeypatch, "run", str(write(tree)), *options) == 0
    script = (tmp_path / "script").read_text(encoding="utf-8")
    for line in ("--array=0-3%", "--partition=short", "--time=90", "--gpus-per-node=1", "--cpus-per-task=1"):
        assert f"#SBATCH {line}" in script
    out = " ".join(capsys.readouterr().out.split())
    assert "submitted as job 4711, 4 elements; their output: " in out
    assert "4 runs are in the hands of another process" in out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "--executor slurm: nothing was submitted (Could not detect"),
        (["--gpus-per-run", "0.5"], "--gpus-per-run 0.5: Slurm gives whole ones; write 1, or take --executor ray"),
    ],
)
@pytest.mark.usefixtures("elsewhere")
def test_without_slurm_nothing_is_submitted(
    tree: Tree,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    told: str,
) -> None:
    monkeypatch.setenv("PATH", "")
    assert ibp_triton(monkeypatch, "run", str(write(tree)), "--executor", "slurm", *options) == 1
    assert told in " ".join(capsys.readouterr().err.split())
