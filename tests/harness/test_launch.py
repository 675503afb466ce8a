from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ibp_triton.errors import DataError, LaunchError
from ibp_triton.harness import evaluate, grid, loading, store, train
from ibp_triton.harness.interrupts import ended_alike
from ibp_triton.harness.launch import Job, download, launch, remaining

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
Events = list[dict[str, Any]]


def job(path: Path, root: Path, *overrides: str) -> Job:
    return Job(grid.runs(loading.load(path, overrides)), root)


def test_runs_are_trained_once(tree: Tree, write: Write, tmp_path: Path) -> None:
    events: Events = []
    path = write(tree)
    assert launch(job(path, tmp_path / "runs"), 1, events.append) == []
    assert [event["kind"] for event in events] == ["start", "epoch", "epoch", "evaluate", "evaluate", "done"] * 4
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*")}
    events.clear()
    assert launch(job(path, tmp_path / "runs"), 1, events.append) == []
    assert events == []
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*")}


def test_what_remains_of_each_run(tree: Tree, write: Write, tmp_path: Path) -> None:
    task = job(write(tree), tmp_path)
    trained, _, stopped, new = (tmp_path / run.name for run in task.runs)
    launch(replace(task, runs=task.runs[:2]), 1, lambda _: None)
    for path in trained.glob("evaluation-*"):
        path.unlink()
    store.write_bytes(stopped / store.METRICS, b'{"epoch": 1}\n')
    assert remaining(task) == {trained.name: 0.0, stopped.name: 0.5, new.name: 1.0}


def test_the_resume_file_tells_what_remains_better_than_the_metrics(tree: Tree, write: Write, tmp_path: Path) -> None:
    task = job(write({**tree, "training": {"epochs": 4, "batch_size": 16}}), tmp_path)
    name = task.runs[0].name
    store.write_tensors(tmp_path / name / store.RESUME, {"a": torch.zeros(1)}, {"epochs": "3"})
    assert remaining(task)[name] == 0.25


def test_two_workers_give_the_bits_of_one(tree: Tree, write: Write, tmp_path: Path) -> None:
    path = write(tree)
    events: Events = []
    launch(job(path, tmp_path / "one"), 1, lambda _: None)
    assert launch(job(path, tmp_path / "two"), 2, events.append) == []
    assert sum(event["kind"] == "done" for event in events) == 4
    for folder in (tmp_path / "one").iterdir():
        one, two = ((tmp_path / n / folder.name / store.CHECKPOINT).read_bytes() for n in ("one", "two"))
        assert one == two


def test_a_locked_run_is_left_to_its_owner(tree: Tree, write: Write, tmp_path: Path) -> None:
    events: Events = []
    task = job(write(tree), tmp_path)
    with store.lock(tmp_path / task.runs[0].name):
        launch(task, 1, events.append)
    assert events[0] == {"kind": "busy", "run": task.runs[0].name}
    assert not (tmp_path / task.runs[0].name / store.RESULT).exists()
    assert (tmp_path / task.runs[1].name / store.RESULT).exists()


def test_one_failing_run_does_not_stop_the_others(tree: Tree, write: Write, tmp_path: Path) -> None:
    task = job(write(tree), tmp_path)

    def refuse(run: grid.Run, *rest: Any) -> store.Record:
        if run.name == task.runs[1].name:
            raise KeyError("out of luck")
        return original(run, *rest)

    original = train.course
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ibp_triton.harness.launch.course", refuse)
        failures = launch(task, 1, lambda _: None)
    assert failures == [f"{task.runs[1].name}: KeyError: 'out of luck'"]
    assert "out of luck" in (tmp_path / task.runs[1].name / "error.txt").read_text(encoding="utf-8")
    assert sum((tmp_path / run.name / store.RESULT).exists() for run in task.runs) == 3
    assert launch(task, 1, lambda _: None) == []
    assert not (tmp_path / task.runs[1].name / "error.txt").exists(), "it says nothing about the run that went well"


@pytest.mark.parametrize("file", [store.RESULT, store.CHECKPOINT, store.MEAN, store.ENVIRONMENT, store.METRICS])
def test_one_damaged_run_leaves_the_others(tree: Tree, write: Write, tmp_path: Path, file: str) -> None:
    task, events = job(write({**tree, "methods": {"bp": None}}), tmp_path), list[dict[str, Any]]()
    first = tmp_path / task.runs[0].name
    launch(replace(task, runs=task.runs[:1]), 1, lambda _: None)
    (first / file).write_bytes((first / file).read_bytes()[:-9])
    next(first.glob("evaluation-*.json")).write_text("{", encoding="utf-8")
    failures = launch(task, 1, events.append)
    assert store.result(tmp_path / task.runs[1].name)
    if file == store.CHECKPOINT:
        assert len(failures) == 1
        assert f"missing or damaged; delete {first / store.RESULT}, and `ibp-triton run` trains" in failures[0]
        (first / store.RESULT).unlink()
        assert launch(task, 1, events.append) == []
    assert failures == [] or file == store.CHECKPOINT
    assert any(event["kind"] == "note" for event in events) == (file in (store.RESULT, store.CHECKPOINT))
    assert remaining(task) == {}


def test_runs_whose_folder_cannot_be_used_fail_alone(tree: Tree, write: Write, tmp_path: Path) -> None:
    task = job(write(tree), tmp_path)
    (tmp_path / task.runs[0].name).write_text("a file", encoding="utf-8")
    (tmp_path / task.runs[1].name).mkdir()
    (tmp_path / task.runs[1].name / store.LOCK).symlink_to(tmp_path / "elsewhere")
    failures = launch(task, 1, lambda _: None)
    assert [failure.partition(":")[0] for failure in failures] == [run.name for run in task.runs[:2]]
    assert len(list(tmp_path.glob(f"*/{store.RESULT}"))) == 2


def test_data_unfit_for_some_runs_leave_the_others(tree: Tree, write: Write, tmp_path: Path) -> None:
    tree["variants"] = {"large": {"data.subset": 65}, "right": {}}
    task, events = job(write(tree), tmp_path), list[dict[str, Any]]()
    failures = launch(task, 1, events.append)
    assert len(failures) == 4
    assert all("do not fit into the 64 training examples" in failure for failure in failures)
    assert [event["kind"] for event in events].count("failed") == 1, "the others of that variant are not tried"
    assert len(list(tmp_path.glob(f"*/{store.RESULT}"))) == 4


def test_a_run_computes_on_one_thread_and_leaves_the_others_to_their_owner(
    tree: Tree, write: Write, tmp_path: Path
) -> None:
    seen: list[int] = []
    torch.set_num_threads(2)
    launch(job(write(tree), tmp_path), 1, lambda _: seen.append(torch.get_num_threads()))
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2
    environments = [store.read_json(path) or {} for path in tmp_path.glob(f"*/{store.ENVIRONMENT}")]
    assert {one["threads"] for one in environments} == {1}


class OddError(BaseException):
    """As asyncio.CancelledError, no Exception."""


@pytest.mark.parametrize("error", [SystemExit(0), OddError("odd"), MemoryError()])
def test_whatever_a_run_raises_the_others_go_on(
    tree: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    task, original = job(write(tree), tmp_path), train.course

    def refuse(run: grid.Run, *rest: Any) -> store.Record:
        if run.name == task.runs[1].name:
            raise error
        return original(run, *rest)

    monkeypatch.setattr("ibp_triton.harness.launch.course", refuse)
    assert launch(task, 1, lambda _: None) == [f"{task.runs[1].name}: {type(error).__name__}: {error}"]
    assert len(list(tmp_path.glob(f"*/{store.RESULT}"))) == 3


def test_a_full_disk_stops_everything(
    tree: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LaunchError, match="No space left on device; is there space"):
        launch(job(write(tree), tmp_path / "runs"), 1, lambda _: None)


EXITS = """
import os, signal, sys
from pathlib import Path
from torch import nn

def build(shape, classes, how):
    once = Path(__file__).parent / "once"
    if how == "exit":
        sys.exit(0)
    if how == "always":
        os._exit(0)
    if how == "once" and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, classes))
"""


@pytest.fixture
def exits(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Three runs with an own model, one of which, by its option, ends the process that builds it."""
    (tmp_path / "exits_in_build.py").write_text(EXITS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "exits_in_build", raising=False)
    network = {"import": "exits_in_build:build", "options": {"how": "no"}}
    return {**tree, "network": network, "variants": {"bad": {"seeds": [0]}, "good": {}}, "methods": {"bp": None}}


def test_sys_exit_in_a_model_is_a_failed_run(exits: Tree, write: Write, tmp_path: Path) -> None:
    exits["variants"]["bad"]["network.options.how"] = "exit"
    failures = launch(job(write(exits), tmp_path / "runs"), 1, lambda _: None)
    assert len(failures) == 1
    assert "raised SystemExit: 0" in failures[0]
    assert len(list((tmp_path / "runs").glob(f"*/{store.RESULT}"))) == 2


@pytest.mark.parametrize(("how", "reason"), [("once", "ended by signal 9"), ("always", "ended with code 0")])
def test_the_run_of_a_killed_worker_is_taken_up(
    exits: Tree, write: Write, tmp_path: Path, how: str, reason: str
) -> None:
    exits["variants"]["bad"]["network.options.how"] = how
    events: Events = []
    failures = launch(job(write(exits), tmp_path / "runs"), 2, events.append)
    notes = [event["message"] for event in events if event["kind"] == "note"]
    assert notes == [f"a worker process {reason}; another one takes this run up"]
    assert len(list((tmp_path / "runs").glob(f"*/{store.RESULT}"))) == (3 if how == "once" else 2)
    assert [failure.partition(": ")[2] for failure in failures] == (
        [] if how == "once" else [f"a worker process {reason} while it trained this run, as one before"]
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_unfit_data_stop_everything_with_one_message(tree: Tree, write: Write, tmp_path: Path, workers: int) -> None:
    with pytest.raises(LaunchError, match=r"do not fit into the 64 training examples"):
        launch(job(write(tree), tmp_path, "data.subset=65"), workers, lambda _: None)


def test_data_are_looked_for_before_any_worker_starts_and_only_for_what_is_left(
    tree: Tree, write: Write, tmp_path: Path
) -> None:
    tree["data"] = {"source": "mnist", "dir": str(tmp_path / "nowhere"), "subset": 64}
    task = job(write(tree), tmp_path / "runs")
    with pytest.raises(DataError, match="nowhere/mnist/train-images-idx3-ubyte: no such file"):
        download(task)
    stem = evaluate.file_stem(task.evaluate)
    for run in task.runs:
        result = {"test_error": 1.0, "seconds_per_epoch": 1.0, "predicted_ratio": 1.0}
        store.write_json(task.root / run.name / store.RESULT, result)
        store.write_json(task.root / run.name / f"{stem}.json", {"clean": {}})
        store.write_tensors(task.root / run.name / f"{stem}.safetensors", {})
    download(task)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_stops_everything(tree: Tree, write: Write, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"training.device: cuda:0 cannot be used here \(.*\); take cpu"):
        launch(job(write(tree), tmp_path, "training.device=cuda:0"), 2, lambda _: None)
    assert not list(tmp_path.glob("*/config.json"))


SEEDBED = """
import multiprocessing, os, sys
from ibp_triton.harness import cli, launch

context = multiprocessing.get_context
multiprocessing.get_context = lambda method: context("fork")  # workers have torch imported too
child = 0
for line in sys.stdin:
    if child:
        os.waitpid(child, 0)
    if not (child := os.fork()):
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["ibp-triton", *line.split()]
        sys.exit(cli.main())
    print(child, flush=True)
"""


@pytest.mark.slow
def test_killed_at_random_moments_every_run_ends_with_the_same_bits(tree: Tree, write: Write, tmp_path: Path) -> None:
    """Twenty kill -9 of the command and its two workers: half a minute of training.

    Each is forked off one process that has torch imported: what is killed is training, not its start. The command that
    goes on at the end starts as a user's does.
    """
    tree["data"]["examples"], tree["training"]["epochs"], tree["seeds"] = 256, 40, [0, 1, 2, 3]
    path = write(tree)
    calm, killed = tmp_path / "calm", tmp_path / "out" / "runs"
    launch(job(path, calm), 1, lambda _: None)
    options = ["run", str(path), "--workers", "2"]
    command = [sys.executable, "-m", "ibp_triton.harness.cli", *options]
    moments, half_way = random.Random(0), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-c", SEEDBED], **pipes) as seedbed:
        for _ in range(20):
            if len(list(killed.glob(f"*/{store.RESULT}"))) == 8:  # a fast machine: check, and begin anew
                _same_bits(calm, killed, command, environment)
                shutil.rmtree(killed)
            seedbed.stdin.write(" ".join(options) + "\n")
            seedbed.stdin.flush()
            child = int(seedbed.stdout.readline())
            _wait_for(killed, 8)
            time.sleep(moments.uniform(0, 0.4))
            os.killpg(child, signal.SIGKILL)
            half_way += len(list(killed.glob(f"*/{store.RESUME}")))
        seedbed.stdin.close()
    assert half_way >= 10
    _same_bits(calm, killed, command, environment)


def _same_bits(calm: Path, killed: Path, command: list[str], environment: dict[str, str]) -> None:
    """Let the command finish, and compare everything but the time it took."""
    subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=True)
    for folder in calm.iterdir():
        other = killed / folder.name
        names = sorted(entry.name for entry in folder.iterdir())
        assert names == sorted(entry.name for entry in other.iterdir())
        for name in names:
            if name.endswith(".safetensors") or name.startswith("evaluation-"):
                assert (folder / name).read_bytes() == (other / name).read_bytes(), name
        results = [json.loads((where / store.RESULT).read_text(encoding="utf-8")) for where in (folder, other)]
        assert {k: v for k, v in results[0].items() if k != "seconds_per_epoch"} == {
            k: v for k, v in results[1].items() if k != "seconds_per_epoch"
        }


def _wait_for(folder: Path, runs: int = 4) -> None:
    """Until training writes into `folder`: start-up of the processes is not worth killing."""
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.jsonl")} if folder.exists() else {}
    for _ in range(600):
        now = {p: p.stat().st_mtime_ns for p in folder.rglob("*.jsonl")} if folder.exists() else {}
        if now != before or len(list(folder.glob("*/result.json"))) == runs:
            return
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_and_its_kin_keep_what_is_done_and_say_so(
    tree: Tree, write: Write, tmp_path: Path, number: signal.Signals
) -> None:
    tree["training"]["epochs"] = 2000
    command = [sys.executable, "-m", "ibp_triton.harness.cli", "run", str(write(tree))]
    listening = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}  # nohup and background jobs ignore some
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **listening
    ) as process:
        _wait_for(tmp_path / "out" / "runs")
        process.send_signal(number)
        try:
            _, message = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "the same command goes on" in message.replace("\n", " ")
    assert list((tmp_path / "out" / "runs").glob("*/metrics.jsonl"))


def test_a_signal_that_comes_inside_a_callback_is_heard_after_it() -> None:
    """Python shows what a weak reference's callback raises, and goes on."""

    class Thing:
        pass

    told: list[str] = []

    def ended(_: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        told.append("never")

    def work() -> None:
        thing = Thing()
        watched = weakref.ref(thing, ended)
        del thing
        assert watched() is None
        told.append("after the callback")
        time.sleep(20)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), ended_alike():
        work()
    assert time.monotonic() - start < 10, "heard in the middle of a wait"
    assert told == ["after the callback"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_workers_end_with_their_parent(tree: Tree, write: Write, tmp_path: Path) -> None:
    tree["training"]["epochs"] = 2000
    command = [sys.executable, "-m", "ibp_triton.harness.cli", "run", str(write(tree)), "--workers", "2"]
    environment = {**os.environ, "MARK": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        _wait_for(tmp_path / "out" / "runs")
        process.kill()
        process.wait()
        moment = time.monotonic()
        while _alive(str(tmp_path)) and time.monotonic() < moment + 10:
            time.sleep(0.05)
    assert time.monotonic() < moment + 6


def _alive(mark: str) -> bool:
    """Whether a process lives that was started with this mark, multiprocessing's own tracker left out."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            ours = mark.encode() in (entry / "environ").read_bytes()
            if ours and b"resource_tracker" not in (entry / "cmdline").read_bytes():
                return True
    return False


def test_two_commands_on_one_folder_share_the_work(tree: Tree, write: Write, tmp_path: Path) -> None:
    tree["training"]["epochs"] = 20
    command = [sys.executable, "-m", "ibp_triton.harness.cli", "run", str(write(tree))]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    closings = [line for output in outputs for line in output.splitlines() if line.startswith("[")]
    assert len(closings) == 4, "each run is trained by one of the two"
    assert len(list((tmp_path / "out" / "runs").glob("*/result.json"))) == 4
    assert not list((tmp_path / "out" / "runs").glob("*/error.txt"))
