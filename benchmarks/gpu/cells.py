"""What is measured: steps beside three ways of autograd, and each kernel beside what the card could do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from benchmarks.gpu.device import Cuda, Run
from ibp_triton.bench import by_hand, candidates, parity, whole_steps
from ibp_triton.bench.candidates import Case, Entry
from ibp_triton.kernels.launcher import Launch, recording, relaunch
from ibp_triton.kernels.workbench import autotune, model
from ibp_triton.kernels.workbench.cases import allowing_tf32

KINDS = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16"}  # a precision by the model's name of it
BASELINES = ("eager", "eager in a graph", "torch.compile")
LIMITS = {"fp32": parity.PARITY["fp32"], "tf32": 0.05, "bf16": parity.PARITY["bf16"]}


@dataclass(frozen=True)
class Grid:
    """What is measured, the most important first."""

    networks: Sequence[str] = ("mnist", "cifar10")
    batches: Sequence[int] = (32, 256, 1024)
    precisions: Sequence[str] = tuple(KINDS)
    methods: Sequence[str] = ("loss_ibp", "bp", "fast_at", "fast_tbp", "at", "prediction_ibp", "tbp")
    own: Entry | None = None  # a network for rehearsals

    def cells(self, device: str) -> Iterator[tuple[Case, str, str]]:
        """Case, precision and method of each cell; tf32 is float32 with torch's settings."""
        for method in self.methods:
            for network in self.networks:
                for batch in self.batches:
                    for precision in self.precisions:
                        kind = "bf16" if precision == "bf16" else "fp32"
                        case = Case(network, batch, kind, device=device, backend="triton", own=self.own)
                        yield case, precision, method


def measured(device: Cuda, case: Case, precision: str, method: str, rounds: int, inductor: bool) -> dict[str, Any]:
    """One cell: parity, then µs of our step, eager and captured, and of the baselines; why one of them has none."""
    row: dict[str, Any] = {"network": case.network, "batch": case.batch, "precision": precision, "method": method}
    with allowing_tf32(precision == "tf32"):
        row["off"] = parity.parity(case, method)
        if not row["off"] <= LIMITS[precision]:
            return row | {"failed": f"off autograd's gradient by {row['off']:.2g}, more than {LIMITS[precision]:g}"}
        ours, hand = candidates.ours(case, method), by_hand.autograd(case, method)
        makers: dict[str, Callable[[], Run]] = {
            "ours": lambda: ours,
            "captured": lambda: device.graphed(ours),
            "eager": lambda: hand,
            "eager in a graph": lambda: device.graphed(hand),
        }
        if inductor:
            makers["torch.compile"] = lambda: compiled(hand)
        runs = dict(_made(makers, row))
        found = device.seconds(runs, rounds)
    return row | {"us": {name: 1e6 * seconds for name, seconds in found.items()}}


def _made(makers: dict[str, Callable[[], Run]], row: dict[str, Any]) -> Iterator[tuple[str, Run]]:
    """What could be made and ran once; into `row` why the others could not."""
    for name, make in makers.items():
        try:
            run = make()
            run()
        except Exception as error:  # whatever torch says to a second derivative in a graph or in its compiler
            row.setdefault("without", {})[name] = in_short(error)
        else:
            yield name, run


def compiled(step: Run) -> Run:
    """Autograd's step as one function of inductor's, which tunes its kernels and captures it."""
    torch._dynamo.reset()
    torch._dynamo.config.trace_autograd_ops = True
    run: Run = torch.compile(step, fullgraph=True, mode="max-autotune")
    return run


def in_short(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]:.200}"


def off_eager(case: Case, precision: str, method: str) -> dict[str, Any]:
    """How far captured steps move parameters and momenta from where eager ones do, relative to the largest entry."""
    with allowing_tf32(precision == "tf32"):
        pair = [whole_steps.ours(case, method, kind) for kind in ("captured", "eager")]
        off = whole_steps.off_twin(*pair)
    row = {"network": case.network, "batch": case.batch, "precision": precision, "method": method, "off": off}
    return row if off <= 1e-6 else row | {"failed": f"captured steps are off eager ones by {off:.2g}"}


def launches(case: Case, precision: str, method: str) -> list[Launch]:
    """Those of a step that has run once."""
    step = candidates.ours(case, method)
    with allowing_tf32(precision == "tf32"):
        step()
        with recording() as record:
            step()
    return record


def card_of(name: str) -> model.Card | None:
    """The model's card of a device's name, unless it is one of fewer watts."""
    known = (card for key, card in model.CARDS.items() if key in name)
    return None if any(word in name for word in ("PCIe", "Laptop", " NVL")) else next(known, None)


@dataclass(frozen=True)
class Reach:
    """What a card was measured to give, and the model's card if it has this one."""

    bandwidth: float
    peaks: dict[str, float]
    card: model.Card | None


def roofline(device: Cuda, case: Case, precision: str, method: str, reach: Reach) -> list[dict[str, Any]]:
    """Each launch of a step alone in a graph: µs, the share of what the card could, the model's range."""
    rows = []
    for launch in launches(case, precision, method):
        run = device.graphed(lambda launch=launch: relaunch(launch))
        seconds = device.seconds({"one": run}, 10)["one"]
        least = max(launch.unique_bytes / reach.bandwidth, launch.cost.flops / reach.peaks[precision])
        row: dict[str, Any] = {"kernel": launch.name, "precision": precision, "batch": case.batch}
        row |= {"channels": launch.arguments.get("C"), "columns": launch.arguments.get("J"), "grid": launch.grid}
        row |= {"us": 1e6 * seconds, "share": least / seconds}
        if reach.card is not None:
            bounds = model.bounds(model.counts(launch, reach.card.target), reach.card, KINDS[precision])
            row["predicted"] = [1e6 * bounds.seconds(end) for end in (model.LOW, model.HIGH)]
            row["bound"] = bounds.name
        rows.append(row)
    return rows


def tuned(device: Cuda, grid: Grid, path: Path, seconds: float) -> dict[str, Any]:
    """Tune the first method's steps, within a time, into a file: how many tiles are better than the table's."""
    end, found = time.monotonic() + seconds, {}
    for case, precision, method in grid.cells(device.name):
        left = end - time.monotonic()
        if method != grid.methods[0] or left <= 0:
            break
        with allowing_tf32(precision == "tf32"):
            found |= autotune.tune(candidates.ours(case, method), clock=device.milliseconds, seconds=left)
    autotune.save(found, path)
    return {"file": path.name, "tiles": len(found)}
