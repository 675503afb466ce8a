"""The parts of the proof, in their order; one that fails is named in the results and leaves the others alone."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import cells
from benchmarks.gpu.cells import Grid, Reach, in_short
from benchmarks.gpu.device import Cuda, slug
from ibp_triton.kernels.workbench import autotune

Results = dict[str, Any]
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Plan:
    """How much is done, in seconds where time decides."""

    grid: Grid = field(default_factory=Grid)
    tests: tuple[str, ...] = ("-m", "gpu", "tests/compiled")
    tuning: float = 240.0
    measuring: float = 540.0  # cells that are left then are named
    rounds: int = 20
    inductor: bool = True


QUICK = Plan(
    Grid(("mnist",), (32, 1024), methods=("loss_ibp",)),
    tests=("-m", "gpu", "tests/compiled", "-k", "oracle or replayed or segments"),
    tuning=0.0,
    measuring=60.0,
    rounds=10,
    inductor=False,
)


def prove(device: Cuda, plan: Plan, folder: Path, say: Callable[[str], None] = print) -> Results:
    """All parts; files of the tuner in `folder`. What failed stands under "failed", part by part."""
    results: Results = {"environment": device.environment(), "failed": {}}
    say(" · ".join(f"{name} {value}" for name, value in results["environment"].items()))
    reach = Reach(0.0, {}, None)

    def reached() -> Results:
        nonlocal reach
        peaks = {precision: device.peak(precision) for precision in plan.grid.precisions}
        reach = Reach(device.bandwidth(), peaks, cells.card_of(results["environment"]["gpu"] or ""))
        return {"bandwidth": reach.bandwidth, "peaks": peaks, "model": reach.card and reach.card.name}

    parts: dict[str, Callable[[], Any]] = {
        "tests": lambda: tested(plan.tests),
        "captured": lambda: list(captured(device, plan)),
        "tuned": lambda: tiles(device, plan, folder, results["environment"]["gpu"] or ""),
        "steps": lambda: list(steps(device, plan)),
        "reach": reached,
        "kernels": lambda: list(kernels(device, plan, reach)),
    }
    for name, part in parts.items():
        start = time.monotonic()
        try:
            results[name] = part()
        except Exception as error:  # the other parts are worth having all the same
            results[name], results["failed"][name] = [], in_short(error)
        results.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        say(f"{name}: {results['failed'].get(name, 'done')}, {results['seconds'][name]:.0f} s")
    results["short"] = list(short(results))
    return results


def tested(arguments: tuple[str, ...]) -> Results:
    """pytest's last line, in a process of its own; raises RuntimeError where a test failed or none ran."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    line = (run.stdout.strip().splitlines() or ["no output"])[-1]
    failed = re.findall(r"^FAILED (\S+)", run.stdout, re.MULTILINE)
    if run.returncode or " passed" not in line:
        raise RuntimeError(f"{line}; {' '.join(failed)} {run.stderr.strip()[-300:]}")
    return {"pytest": line}


def captured(device: Cuda, plan: Plan) -> Iterator[Results]:
    """A CUDA graph of a step trains as eager steps do: each network and precision, the smallest batch."""
    small = Grid(plan.grid.networks, plan.grid.batches[:1], plan.grid.precisions, plan.grid.methods[:1], plan.grid.own)
    for case, precision, method in small.cells(device.name):
        yield cells.off_eager(case, precision, method)


def tiles(device: Cuda, plan: Plan, folder: Path, card: str) -> Results:
    """The tuner's tiles, in force for what follows, and read back from their file."""
    if not plan.tuning:
        return {}
    path = folder / f"{slug(card)}-tiles.json"
    found = cells.tuned(device, plan.grid, path, plan.tuning)
    return found | {"loaded": autotune.load(path)}


def steps(device: Cuda, plan: Plan) -> Iterator[Results]:
    """Each cell until the time is over, those that were left with the reason."""
    end = time.monotonic() + plan.measuring
    for case, precision, method in plan.grid.cells(device.name):
        row: Results = {"network": case.network, "batch": case.batch, "precision": precision, "method": method}
        if time.monotonic() > end:
            yield row | {"left": "the time was over"}
            continue
        try:
            yield cells.measured(device, case, precision, method, plan.rounds, plan.inductor)
        except Exception as error:
            yield row | {"failed": in_short(error)}


def kernels(device: Cuda, plan: Plan, reach: Reach) -> Iterator[Results]:
    """The first method's launches on the first network, at the smallest and the largest batch."""
    batches = sorted({plan.grid.batches[0], plan.grid.batches[-1]})
    first = Grid(plan.grid.networks[:1], batches, plan.grid.precisions, plan.grid.methods[:1], plan.grid.own)
    for case, precision, method in first.cells(device.name):
        yield from cells.roofline(device, case, precision, method, reach)


def short(results: Results) -> Iterator[str]:
    """In a sentence each: what failed, what is slower than a baseline, what took longer than the model's high end."""
    for name, reason in results["failed"].items():
        yield f"{name} failed: {reason}"
    for row in (*results["captured"], *results["steps"]):
        what = " ".join(str(row[key]) for key in ("method", "network", "batch", "precision"))
        if "failed" in row:
            yield f"{what}: {row['failed']}"
        times = row.get("us", {})
        for other in set(times) & set(cells.BASELINES):
            if "captured" in times and times["captured"] > times[other]:
                yield f"{what}: captured {times['captured']:.0f} µs, {other} {times[other]:.0f}"
    for row in results["kernels"]:
        high = row.get("predicted", (0.0, float("inf")))[1]
        if row["us"] > high:
            what = f"{row['kernel']} {row['channels']}→{row['columns']} {row['batch']} {row['precision']}"
            yield f"{what}: {row['us']:.1f} µs, the model's high end is {high:.1f} ({row['bound']})"


def cuda_or_exit() -> Cuda:
    """The device; without one the process ends with a sentence."""
    if not torch.cuda.is_available():
        raise SystemExit(
            f"make gpu needs a CUDA device, and torch {torch.__version__} sees none: run it on such a machine"
        )
    return Cuda()
