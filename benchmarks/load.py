"""Thousands of tiny runs through an executor: `python -m benchmarks.load 2000 processes FOLDER`.

Prints milliseconds a run by the wall clock and of the CPU (start-up included), and whether a run was lost or doubled.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from ibp_triton.harness import grid, loading
from ibp_triton.harness.executors.desk import Executor
from ibp_triton.harness.executors.local import Processes, Serial
from ibp_triton.harness.executors.ray_tasks import Ray
from ibp_triton.harness.launch import Job, launch

EXECUTORS: dict[str, Executor] = {"serial": Serial(), "processes": Processes(2), "ray": Ray()}


def tiny(count: int) -> dict[str, Any]:
    """An experiment of so many runs: one step of a network of two channels on eight images."""
    data = {"source": "synthetic", "size": 16, "channels": 1, "classes": 4, "examples": 8, "holdout": 4}
    network = {"name": "paper_mnist", "widths": [2, 2], "hidden": 2, "init": "uniform"}
    training = {"epochs": 1, "batch_size": 8}
    return {"name": "load", "data": data, "network": network, "training": training, "seeds": list(range(count))}


def cpu_seconds() -> float:
    """Of this process and of those that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def main(count: int, name: str, folder: Path) -> None:
    """Train them all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "load.yaml"
    path.write_text(yaml.safe_dump({**tiny(count), "methods": {"bp": None}}), encoding="utf-8")
    runs, done = grid.runs(loading.load(path)), Counter[str]()
    executor = EXECUTORS[name]
    executor.width  # noqa: B018 a cluster is there before the clock starts
    begin, cpu = time.perf_counter(), cpu_seconds()
    failures = launch(Job(runs, folder / "runs"), executor, lambda e: done.update([e["run"]] * (e["kind"] == "done")))
    wall, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    stored = len(list(folder.glob("runs/*/result.json")))
    print(f"{name}: {1e3 * wall / count:.1f} ms a run, of the CPU {1e3 * cpu / count:.1f} ms")
    print(f"{stored} of {count} stored, {sum(n > 1 for n in done.values())} doubled, {len(failures)} failed")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
