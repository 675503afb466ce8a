"""Runs of a grid, in this process or in several: whoever holds a run's lock trains it, finished runs are skipped."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from ibp_triton.harness import evaluate, sources, store
from ibp_triton.harness.config import Evaluate
from ibp_triton.harness.files import DataError
from ibp_triton.harness.grid import Run
from ibp_triton.harness.models import ModelError
from ibp_triton.harness.train import train

ERROR = "error.txt"
Event = dict[str, Any]
Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Job:
    """Runs to train and evaluate under `root`, one folder each; `data_dir` overrides data.dir."""

    runs: Sequence[Run]
    root: Path
    data_dir: str | None = None
    evaluate: Evaluate = field(default_factory=Evaluate)


class LaunchError(RuntimeError):
    """Training stopped for all runs: unfit data or model, or a worker that died. What is finished is stored."""


def launch(job: Job, workers: int, listen: Listener) -> list[str]:
    """Train what is not finished yet; returns the messages of runs that failed.

    `listen` gets events {"kind": "start" | "epoch" | "done" | "busy" | "failed", "run": name, ...} in this process.
    Raises LaunchError for data and models that no run can use and if a worker process dies.
    """
    failures: dict[str, str] = {}

    def note(event: Event) -> None:
        if event["kind"] == "fatal":
            raise LaunchError(event["message"])
        if event["kind"] == "failed":
            failures[event["run"]] = f"{event['run']}: {event['message']}"
        listen(event)

    pending = [run for run in job.runs if not finished(job, run)]
    for device in dict.fromkeys(run.training.device for run in pending):
        check_device(device, "training.device")
    todo = replace(job, runs=pending)
    if workers <= 1 or len(pending) <= 1:
        work(todo, note)
    else:
        _spread(todo, min(workers, len(pending)), note)
    return list(failures.values())


def download(job: Job) -> None:
    """Fetch the files of public sets that unfinished runs lack, once and before any worker; raises DataError."""
    needed = {(run.data.source, run.data.dir): run.data for run in job.runs if not finished(job, run)}
    for data in needed.values():
        sources.public_files(data.found_in(job.data_dir))


def check_device(name: str, key: str) -> None:
    """Raise LaunchError unless torch can compute on the device that the setting `key` names."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        reason = str(error).partition("\n")[0]
        raise LaunchError(f"{key}: {name} cannot be used here ({reason}); take cpu, or another machine") from None


def finished(job: Job, run: Run) -> bool:
    """Whether the run's result and its evaluation are stored."""
    folder = job.root / run.name
    return (folder / store.RESULT).exists() and evaluate.done(folder, job.evaluate)


def remaining(job: Job) -> dict[str, float]:
    """The share of its training that each unfinished run still needs; 0 where only its evaluation is missing."""
    return {run.name: _remaining(job.root / run.name, run) for run in job.runs if not finished(job, run)}


def _remaining(folder: Path, run: Run) -> float:
    if (folder / store.RESULT).exists():
        return 0.0
    return 1.0 - min(1.0, store.count_epochs(folder) / run.training.epochs)


def work(job: Job, listen: Listener) -> None:
    """Train each run of `job` that is neither finished nor locked by another process; one thread on the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        for run in job.runs:
            _one(run, job, listen)
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step, which otherwise faults every page of it in again.

    Where there is no glibc nothing happens. Loss IBP's float32 step took 24 ms instead of 29 with it, BP's 17 instead
    of 23 (MNIST network, batch 32, one AVX-512 core). No chunk is mapped on its own, however large: a threshold may
    not exceed 32 MiB, and at batch 256 of CIFAR-10's network a map has 51 (Loss IBP 565 ms instead of 630).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 1 << 30), (_M_TOP_PAD, 64 << 20)):
        mallopt(option, value)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h


def _one(run: Run, job: Job, listen: Listener) -> None:
    folder = job.root / run.name
    with store.lock(folder) as mine:
        if not mine:
            return listen({"kind": "busy", "run": run.name})
        if finished(job, run):
            return None
        listen({"kind": "start", "run": run.name})
        (folder / ERROR).unlink(missing_ok=True)

        def report(record: store.Record) -> None:
            listen({"kind": "epoch", "run": run.name, **record})

        try:
            result = store.read_json(folder / store.RESULT) or train(run, folder, report, job.data_dir)
            if not evaluate.done(folder, job.evaluate):
                listen({"kind": "evaluate", "run": run.name})
                evaluate.evaluate(run, folder, job.evaluate, job.data_dir)
        except (DataError, ModelError) as error:
            listen({"kind": "fatal", "run": run.name, "message": str(error)})
        except Exception as error:  # whatever one run's model or data raise, the other runs go on
            store.write_bytes(folder / ERROR, traceback.format_exc().encode())
            listen({"kind": "failed", "run": run.name, "message": f"{type(error).__name__}: {error}"})
        else:
            listen({"kind": "done", "run": run.name, **result})


def _spread(job: Job, workers: int, listen: Listener) -> None:
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    processes = [
        context.Process(target=_worker, args=(_rotated(job, k, workers), events, os.getpid()), daemon=True)
        for k in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        _collect(processes, events, listen)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rotated(job: Job, worker: int, workers: int) -> Job:
    """The same runs, each worker starting elsewhere only by its number: neighbours do not wait for one lock."""
    return replace(job, runs=[*job.runs[worker:], *job.runs[:worker]])


def _collect(processes: Sequence[Any], events: Any, listen: Listener) -> None:
    """Pass events on until every worker has said it is through or has died."""
    through = 0
    while through < len(processes):
        try:
            event = events.get(timeout=0.5)
        except Empty:
            dead = [p for p in processes if p.exitcode not in (None, 0)]
            if dead:
                raise LaunchError(
                    f"a worker process ended with code {dead[0].exitcode}; finished runs and epochs are stored, "
                    "run the same command again to go on"
                ) from None
            continue
        if event["kind"] == "through":
            through += 1
        elif event["kind"] != "busy":
            listen(event)


def _worker(job: Job, events: Any, parent: int) -> None:
    def send(event: Event) -> None:
        if os.getppid() != parent:
            os._exit(1)
        events.put(event)

    try:
        work(job, send)
        send({"kind": "through", "run": ""})
    except KeyboardInterrupt:
        os._exit(130)
