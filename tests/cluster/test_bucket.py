"""Runs in a bucket of moto's S3 on this machine: locks, the same bits whoever dies, whole objects, reports, errors."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ibp_triton.errors import DamageError, LaunchError, OvertakenError
from ibp_triton.harness import bucket, mirror, store
from ibp_triton.harness.bucket import Bucket
from ibp_triton.harness.executors.local import Processes
from ibp_triton.harness.launch import Job, launch
from ibp_triton.harness.leases import LOCK, Lease
from tests.cluster.conftest import ObjectStore, copied
from tests.harness.test_cli import ibp_triton
from tests.harness.test_executors import content, job

pytest.importorskip("s3fs")
pytest.importorskip("moto")

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


def remote(path: Path, root: Path, runs: Bucket, *overrides: str) -> Job:
    """The runs of a file, in a bucket; `root` gets the small files of them."""
    root.mkdir(exist_ok=True)
    mirror.fetch_small(runs, root)
    return replace(job(path, root, *overrides), bucket=runs)


def race(runs: Bucket, rounds: int, line: Any) -> None:
    """Takes each lock once at the same time as another process, and tells which it got."""
    won = []
    for number in range(rounds):
        line.send(number)
        line.recv()
        if Lease(runs, f"run{number}/{LOCK}").take():
            won.append(number)
    line.send(won)


@pytest.mark.slow
def test_of_two_processes_that_want_a_lock_exactly_one_gets_it(runs: Bucket) -> None:
    """Slow: two processes import torch."""
    context, rounds = multiprocessing.get_context("spawn"), 20
    lines, processes = [], []
    for _ in range(2):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=race, args=(replace(runs, lease=60.0), rounds, theirs)))
        processes[-1].start()
        lines.append(ours)
    for number in range(rounds):
        assert [line.recv() for line in lines] == [number, number]
        for line in lines:
            line.send("go")
    won = [line.recv() for line in lines]
    for process in processes:
        process.join()
    assert sorted(won[0] + won[1]) == list(range(rounds))


def test_a_lock_outlives_its_lease_only_while_its_owner_lives(runs: Bucket) -> None:
    first, second = Lease(runs, f"run/{LOCK}"), Lease(runs, f"run/{LOCK}")
    assert first.take()
    time.sleep(2 * runs.lease)
    assert not second.take()
    assert not Lease(replace(runs, patient=True), f"run/{LOCK}").take(), "its owner lives"
    first._ended.set()  # as if its process had died
    patient = Lease(replace(runs, patient=True), f"run/{LOCK}")
    assert patient.take()
    with pytest.raises(OvertakenError, match=r"s3://bucket/tiny/runs/run/run.lock: another process has written it"):
        first.renew()
    told = json.loads(runs.get(f"run/{LOCK}").content)  # type: ignore[union-attr]
    assert told["owner"].endswith(f"process {os.getpid()}")
    assert told["lease"] == runs.lease
    patient.free()
    assert second.take(), "what is freed is anybody's at once"
    second.free()


def test_a_process_that_stood_still_writes_nothing_over_its_successor(runs: Bucket, tmp_path: Path) -> None:
    with mirror.held(tmp_path, "run", runs) as old:
        assert isinstance(old, mirror.Mirror)
        (old.folder / store.RESUME).write_bytes(b"old 1")
        old.commit()
        old._lease._ended.set()  # stopped, as a suspended machine is
        old._lease._turn.acquire()
        with mirror.held(tmp_path, "run", replace(runs, patient=True)) as new:
            assert new is not None
            assert (new.folder / store.RESUME).read_bytes() == b"old 1"
            (new.folder / store.RESUME).write_bytes(b"new 2")
            new.commit()
            old._lease._turn.release()
            (old.folder / store.RESUME).write_bytes(b"old 2")
            for late in (True, False):  # also where it believes that it has the lock
                old._lease._last = 0.0 if late else time.monotonic()
                with pytest.raises(OvertakenError):
                    old.commit()
    assert runs.get(f"run/{store.RESUME}").content == b"new 2"  # type: ignore[union-attr]


@pytest.mark.slow
def test_runs_in_a_bucket_have_the_bits_of_those_in_a_folder(
    tree: Tree, write: Write, tmp_path: Path, runs: Bucket
) -> None:
    """Slow: two workers import torch."""
    path, events = write(tree), list[dict[str, Any]]()
    calm = job(path, tmp_path / "calm")
    launch(calm, 1, lambda _: None)
    assert launch(remote(path, tmp_path / "small", runs), Processes(2), events.append) == []
    found = copied(runs, tmp_path / "copy")
    for run in calm.runs:
        assert content(tmp_path / "calm" / run.name) == content(found / run.name)
        there = {one.name for one in (tmp_path / "calm" / run.name).iterdir() if one.name != store.LOCK}
        assert there == {one.name for one in (found / run.name).iterdir()}
        kinds = [event["kind"] for event in events if event["run"] == run.name]
        assert kinds == ["start", "epoch", "epoch", "evaluate", "evaluate", "done"]
    assert launch(remote(path, tmp_path / "again", runs), 1, lambda event: pytest.fail(str(event))) == []


def test_a_command_waits_for_the_runs_of_dead_owners_alone(
    tree: Tree, write: Write, tmp_path: Path, runs: Bucket
) -> None:
    task, events = remote(write({**tree, "seeds": [0]}), tmp_path / "small", runs), list[dict[str, Any]]()
    dead, alive = (Lease(runs, f"{run.name}/{LOCK}") for run in task.runs)
    assert dead.take()
    assert alive.take()
    dead._ended.set()
    assert launch(task, 1, events.append) == []
    alive.free()
    assert [event["kind"] for event in events if event["run"] == task.runs[0].name][::5] == ["start", "done"]
    assert [event["kind"] for event in events if event["run"] == task.runs[1].name] == ["busy"]
    told = [event["message"] for event in events if event["kind"] == "note"]
    assert told == ["2 runs are locked by other processes; waits to see which of these live"]


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_no_run_and_changes_no_bit(
    tree: Tree, write: Write, tmp_path: Path, runs: Bucket
) -> None:
    """Slow: two workers import torch, one after another."""
    tree["training"]["epochs"], tree["seeds"], tree["methods"] = 30, [0], {"loss_ibp": {"beta": 0.03}}
    path, events = write(tree), list[dict[str, Any]]()
    calm = job(path, tmp_path / "calm")
    launch(calm, 1, lambda _: None)
    (run,) = calm.runs

    def listen(event: dict[str, Any]) -> None:
        events.append(event)
        if event["kind"] == "epoch" and event["epoch"] == 5:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]

    assert launch(remote(path, tmp_path / "small", runs), Processes(1), listen) == []
    notes = [event["message"] for event in events if event["kind"] == "note"]
    assert notes[0] == "a worker process ended by signal 9; another one takes this run up"
    epochs = [event["epoch"] for event in events if event["kind"] == "epoch"]
    assert max(Counter(epochs).values()) <= 2, "it goes on from the last epoch in the bucket"
    assert len(epochs) < 30 + 5
    assert content(tmp_path / "calm" / run.name) == content(copied(runs, tmp_path / "copy") / run.name)


def test_a_reader_never_sees_half_a_file_nor_a_state_without_what_it_speaks_of(
    tree: Tree, write: Write, tmp_path: Path, runs: Bucket
) -> None:
    tree["training"]["epochs"], tree["seeds"] = 12, [0]
    task, ended, seen = remote(write(tree), tmp_path / "small", runs), threading.Event(), Counter[str]()

    def poll() -> None:
        while not ended.is_set():
            for name in (store.RESULT, store.METRICS, store.RESUME):
                for run in task.runs:
                    seen[name] += check(run.name, name)
            time.sleep(0.01)

    def check(run: str, name: str) -> bool:
        found = runs.get(f"{run}/{name}")
        if found is None:
            return False
        folder = tmp_path / "read" / run
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(found.content)
        if name == store.RESUME:
            assert store.read_tensors(folder / name) is not None
        elif name == store.METRICS:
            assert len(store.read_metrics(folder)) == len(found.content.splitlines()) > 0
        else:
            assert store.result(folder) is not None
            runs.fetch([f"{run}/{store.CHECKPOINT}", f"{run}/{store.MEAN}"], tmp_path / "read")
            seals = store.result(folder)[store.SEAL]  # type: ignore[index]
            assert all(store.digest(folder / name) == seal for name, seal in seals.items())
        return True

    failures: list[BaseException] = []

    def watch() -> None:
        try:
            poll()
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=watch)
    reader.start()
    try:
        assert launch(task, 1, lambda _: None) == []
        time.sleep(0.5)
    finally:
        ended.set()
        reader.join()
    assert failures == []
    assert all(seen[name] > 3 for name in (store.RESULT, store.METRICS, store.RESUME)), seen


def run_in_bucket(monkeypatch: pytest.MonkeyPatch, path: Path, *more: str) -> int:
    return ibp_triton(monkeypatch, "run", str(path), "--set", "output=s3://bucket/tiny", *more)


def test_the_command_on_a_bucket_and_its_report(
    tree: Tree,
    write: Write,
    tmp_path: Path,
    runs: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both commands agree on what is finished, and the report is that of a folder with the same runs."""
    tree["evaluate"] = {"adversarial": [0.0, 0.1], "gaussian": [], "pgd": []}
    path, whole = write(tree), Bucket("s3://bucket/tiny")
    assert run_in_bucket(monkeypatch, path, "--dry-run") == 0
    assert "4 runs, about" in capsys.readouterr().out
    assert whole.names() == {}, "a dry run writes nothing"
    assert run_in_bucket(monkeypatch, path, "--only", "method=bp", "--only", "seed=0") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "0 finished before, in s3://bucket/tiny/runs" in out
    assert "report: ibp-triton report s3://bucket/tiny" in out
    assert run_in_bucket(monkeypatch, path, "--dry-run", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["state"] for one in listed] == ["finished", "to do", "to do", "to do"]
    assert ibp_triton(monkeypatch, "run", "s3://bucket/tiny") == 0
    assert "4 runs, 1 finished before, in s3://bucket/tiny/runs" in " ".join(capsys.readouterr().out.split())
    assert ibp_triton(monkeypatch, "report", "s3://bucket/tiny") == 0
    written = capsys.readouterr().out.split()
    assert "s3://bucket/tiny/report.html" in written
    copied(whole, tmp_path / "copy")
    page = {name: (tmp_path / "copy" / name).read_bytes() for name in whole.names() if not name.startswith("runs/")}
    assert {one.removeprefix("s3://bucket/tiny/") for one in written} | {"experiment.yaml"} == set(page)
    assert "figures/samples.svg" in page, "pictures from a checkpoint"
    for name in page:
        if name != "experiment.yaml":
            (tmp_path / "copy" / name).unlink()
    assert ibp_triton(monkeypatch, "report", str(tmp_path / "copy")) == 0
    assert page == {name: (tmp_path / "copy" / name).read_bytes() for name in page}
    assert b"4 of 4 runs are finished" in page["tables.md"]


def test_runs_alone_may_lie_in_a_bucket(
    tree: Tree, write: Write, tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write({**tree, "methods": {"bp": None}, "runs": "s3://bucket/shared"})
    assert ibp_triton(monkeypatch, "run", str(path)) == 0
    (first, _), there = job(path, tmp_path).runs, Bucket("s3://bucket/shared")
    assert f"{first.name}/{store.RESULT}" in there.names()
    assert ibp_triton(monkeypatch, "report", str(tmp_path / "out")) == 0
    assert "2 of 2 runs are finished" in (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "figures" / "filters.svg").exists(), "pictures from a checkpoint"
    assert not (tmp_path / "out" / "runs").exists()


def test_evaluate_and_keep_read_a_bucket(
    tree: Tree,
    write: Write,
    tmp_path: Path,
    runs: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write({**tree, "methods": {"bp": None}, "seeds": [0]})
    assert run_in_bucket(monkeypatch, path) == 0
    (run,) = job(path, tmp_path).runs
    before = set(runs.names())
    assert ibp_triton(monkeypatch, "evaluate", runs.of(run.name), "--set", "pgd=[0.05]") == 0
    new = {name for name in set(runs.names()) - before if "evaluation-" in name}
    assert {name.rpartition(".")[2] for name in new} == {"json", "safetensors"}
    assert f"written to {runs.of(run.name)}/evaluation-" in " ".join(capsys.readouterr().out.split())
    assert ibp_triton(monkeypatch, "keep", "s3://bucket/tiny", str(tmp_path / "kept")) == 0
    assert json.loads((tmp_path / "kept" / "runs.jsonl").read_text(encoding="utf-8"))["run"] == run.name


def test_a_failed_run_says_so_in_the_bucket_and_the_next_attempt_takes_it_back(
    tree: Tree, write: Write, tmp_path: Path, runs: Bucket
) -> None:
    path = write({**tree, "methods": {"bp": None}, "seeds": [0]})
    task = remote(path, tmp_path / "small", runs)
    (run,) = task.runs
    assert launch(task, 1, lambda _: None) == []
    runs.replace(f"{run.name}/{store.CHECKPOINT}", b"half")
    for name in runs.names():
        if "evaluation-" in name:
            runs.delete(name)
    (failure,) = launch(remote(path, tmp_path / "again", runs), 1, lambda _: None)
    assert (
        f"{runs.of(run.name)}/{store.CHECKPOINT}: missing or damaged; delete {runs.of(run.name)}/{store.RESULT}"
        in failure
    )
    assert DamageError.__name__.encode() in runs.get(f"{run.name}/error.txt").content  # type: ignore[union-attr]
    runs.delete(f"{run.name}/{store.RESULT}")
    assert launch(remote(path, tmp_path / "third", runs), 1, lambda _: None) == []
    assert runs.get(f"{run.name}/error.txt") is None


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence of a command that fails."""
    assert ibp_triton(monkeypatch, *arguments) == 1
    text = " ".join(capsys.readouterr().err.split())
    assert text.startswith("error: ")
    assert "Traceback" not in text
    return text


@pytest.mark.usefixtures("object_store")
def test_what_a_bucket_cannot_do_is_one_sentence(
    tree: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", str(write(tree)), "--set"]
    text = told(monkeypatch, capsys, *run, "output=s3://absent/tiny")
    assert f"s3://absent/tiny/runs: {os.environ['AWS_ENDPOINT_URL']} has no bucket absent; make it, or" in text
    text = told(monkeypatch, capsys, *run, "output=s3://bucket/tiny", "--executor", "slurm")
    assert "--executor slurm: its array needs a folder that all nodes share, s3://bucket/tiny is none" in text
    text = told(monkeypatch, capsys, *run, "output=s3://bucket/tiny", "--tensorboard")
    assert "--log tensorboard: boards read a run's folder, which lies in s3://bucket/tiny/runs" in text
    text = told(monkeypatch, capsys, "report", "s3://bucket/nothing")
    assert "s3://bucket/nothing: no experiment.yaml; give the folder that" in text
    text = told(monkeypatch, capsys, "evaluate", "s3://bucket/tiny/runs/nothing")
    assert "s3://bucket/tiny/runs/nothing: no config.json; give the folder of a run" in text


@pytest.mark.usefixtures("object_store")
def test_without_credentials_or_a_connection_it_is_one_sentence(
    tree: Tree, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = ["run", str(write(tree)), "--set", "output=s3://bucket/tiny"]
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("HOME", str(tmp_path))
        bucket._files.cache_clear()
        text = told(monkeypatch, capsys, *run)
    assert "s3://bucket/tiny/runs: no credentials to be used (Unable to locate credentials); set AWS_ACCESS" in text
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    bucket._files.cache_clear()
    text = told(monkeypatch, capsys, *run)
    assert "s3://bucket/tiny/runs: http://127.0.0.1:9 is not to be reached (Could not connect" in text


def test_a_store_that_heeds_no_conditions_is_refused_by_name(
    tree: Tree, write: Write, tmp_path: Path, runs: Bucket, object_store: ObjectStore
) -> None:
    task = remote(write(tree), tmp_path / "small", runs)
    for condition in ("HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH"):
        object_store.hear = lambda request, name=condition: request.pop(name, None)  # type: ignore[misc]
        with pytest.raises(LaunchError, match=rf"{object_store.address} puts objects without heeding If-None-Match"):
            launch(task, 1, lambda event: pytest.fail(str(event)))
    assert runs.names() == {}


def test_a_connection_that_is_lost_loses_nothing(
    tree: Tree, write: Write, tmp_path: Path, runs: Bucket, object_store: ObjectStore
) -> None:
    path = write({**tree, "methods": {"bp": None}, "seeds": [0]})
    task = remote(path, tmp_path / "small", replace(runs, lease=1.0), "training.epochs=6")
    calm = job(path, tmp_path / "calm", "training.epochs=6")
    launch(calm, 1, lambda _: None)
    epochs: list[int] = []

    def cut(request: dict[str, Any]) -> None:
        raise ConnectionResetError

    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "epoch":
            epochs.append(event["epoch"])
            if event["epoch"] == 3 and len(epochs) == 3:
                object_store.hear = cut

    with pytest.raises(LaunchError, match=r"is not to be reached .*; what is stored there is whole, and the same"):
        launch(task, 1, listen)
    object_store.hear = lambda request: None
    assert launch(task, 1, listen) == []
    assert epochs == [1, 2, 3, 4, 5, 6]
    (run,) = task.runs
    assert content(tmp_path / "calm" / run.name) == content(copied(runs, tmp_path / "copy") / run.name)
