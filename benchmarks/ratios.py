"""The targets table: `python -m benchmarks.ratios [--json FILE] [--rounds N]`, one thread, CPU time, interleaved."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import ibp_triton as ibp
from benchmarks import baselines, cases, timing
from benchmarks.cases import METHODS, PRECISIONS, Case
from ibp_triton.harness.launch import keep_freed_memory

# (what, over what): upper bound in float32, in bfloat16
TARGETS: dict[str, tuple[float, float]] = {
    "bp / eager bp": (1.00, 1.00),
    "bp / floor": (1.4, 3.0),
    "loss_ibp / bp": (1.40, 1.70),
    "fast_tbp / bp": (1.50, 1.80),
    "fast_at / bp": (1.75, 1.75),
    "at / bp": (2.1, 2.1),
    "prediction_ibp / bp": (2.1, 2.1),
    "tbp / bp": (5.5, 5.5),
    "loss_ibp_exact / bp": (2.2, 2.2),
    "loss_ibp / eager nchw fp32 bp": (float("inf"), 0.4),
    "loss_ibp / autograd": (0.65, 0.65),
    "fast_tbp / autograd": (0.65, 0.65),
    **{f"{key} / autograd": (1.0, 1.0) for key in ("fast_at", "at", "prediction_ibp", "tbp", "loss_ibp_exact")},
    "memory loss_ibp / eager bp": (1.6, 1.6),
    "memory loss_ibp / autograd": (1.0, 1.0),
}
QUICK = ("bp", "loss_ibp", "fast_tbp")  # at batch 256, to stay within minutes


def measure(case: Case, rounds: int, keys: tuple[str, ...]) -> dict[str, Any]:
    """Every ratio of the table in one cell; parity is asserted before anything is timed."""
    candidates, parity = {}, {}
    compared = keys if len(keys) > len(QUICK) else ("bp",)
    for key in keys:
        candidates[key] = cases.ours(case, key)
        if key in compared:
            candidates[f"autograd {key}"] = baselines.autograd(case, key)
            parity[key] = baselines.parity(case, key)
            if parity[key] > baselines.PARITY[case.precision]:
                raise AssertionError(
                    f"{case}: {key} is off autograd's gradient by {parity[key]:.2g}; nothing was timed"
                )
    candidates["eager nchw"] = baselines.eager_bp_nchw(case)
    times = timing.interleave(candidates, rounds)
    memory = {name: timing.peak_memory(candidates[name]) for name in _remembered(candidates)}
    return {
        **case.info(),
        "batch": case.batch,
        "milliseconds": {name: 1e3 * found.median for name, found in times.items()},
        "ratios": _ratios(case, keys, compared, times, memory),
        "predicted": _predicted(case, keys),
        "parity": parity,
        "memory_bytes": memory,
    }


def _remembered(candidates: dict[str, Any]) -> list[str]:
    return [name for name in ("loss_ibp", "autograd bp", "autograd loss_ibp") if name in candidates]


def _ratios(case: Case, keys: tuple[str, ...], compared: tuple[str, ...], times: Any, memory: Any) -> dict[str, float]:
    rate = timing.best_rate(PRECISIONS[case.precision] or torch.float32)
    work = ibp.Network(case.model()).multiply_adds(case.shape)
    floor = METHODS["bp"].multiply_adds(work, cases.TANGENTS) / rate
    found = {
        "bp / eager bp": timing.ratio(times["bp"], times["autograd bp"]),
        "bp / floor": times["bp"].median / floor,
        "loss_ibp / eager nchw fp32 bp": timing.ratio(times["loss_ibp"], times["eager nchw"]),
        "memory loss_ibp / eager bp": memory["loss_ibp"] / memory["autograd bp"],
    }
    found |= {f"{key} / bp": timing.ratio(times[key], times["bp"]) for key in keys if key != "bp"}
    found |= {f"{k} / autograd": timing.ratio(times[k], times[f"autograd {k}"]) for k in compared if k != "bp"}
    if "autograd loss_ibp" in memory:
        found["memory loss_ibp / autograd"] = memory["loss_ibp"] / memory["autograd loss_ibp"]
    return found


def _predicted(case: Case, keys: tuple[str, ...]) -> dict[str, float]:
    network = ibp.Network(case.model())
    return {f"{key} / bp": METHODS[key].predicted_ratio(network, case.shape, cases.TANGENTS) for key in keys}


def table(cells: list[dict[str, Any]]) -> str:
    """The targets and every cell as Markdown; a figure over its target is bold."""
    heads = [f"{cell['network']} {cell['batch']} {cell['precision']}" for cell in cells]
    lines = [f"| ratio | target | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for name, bounds in TARGETS.items():
        shown = " / ".join("–" if bound == float("inf") else f"{bound:g}" for bound in dict.fromkeys(bounds))
        lines.append(f"| {name} | ≤ {shown} | {' | '.join(_figure(cell, name, bounds) for cell in cells)} |")
    return "\n".join(lines)


def _figure(cell: dict[str, Any], name: str, bounds: tuple[float, float]) -> str:
    if name not in cell["ratios"]:
        return "–"
    value, bound = cell["ratios"][name], bounds[cell["precision"] == "bf16"]
    predicted = f" ({cell['predicted'][name]:.2f})" if name in cell["predicted"] else ""
    return (f"**{value:.2f}**" if value > bound else f"{value:.2f}") + predicted


def main() -> None:
    """Measure, print, and write what is printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (15)")
    parser.add_argument("--full", action="store_true", help="all methods at batch 256 too")
    parser.add_argument("--only", help="a network: mnist or cifar10")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the harness does, for every candidate alike
    start, cells = time.perf_counter(), []
    for network in [arguments.only] if arguments.only else list(cases.NETWORKS):
        for batch in (32, 256):
            for precision in PRECISIONS:
                keys = tuple(METHODS) if batch == 32 or arguments.full else QUICK
                cells.append(measure(Case(network, batch, precision), arguments.rounds, keys))
                print(f"{network} {batch} {precision}: {time.perf_counter() - start:.0f} s", flush=True)
    facts = timing.machine()
    print(f"\n{facts}\n\nmeasured (predicted from multiply-adds), bold where over the target\n\n{table(cells)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": facts, "rounds": arguments.rounds, "cells": cells}, indent=1))


if __name__ == "__main__":
    main()
