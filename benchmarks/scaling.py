"""How the cost of a step grows with batch, width, depth and tangents: `python -m benchmarks.scaling`."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ibp_triton as ibp
from benchmarks import timing
from benchmarks.cases import METHODS, Case
from ibp_triton.harness.launch import keep_freed_memory

SWEPT = ("bp", "loss_ibp", "fast_tbp", "prediction_ibp", "tbp")
AXES: dict[str, tuple[int, ...]] = {
    "batch": (32, 64, 128, 256, 512),
    "width": (64, 128, 256, 512, 1024),
    "depth": (2, 4, 8, 16),
    "tangents": (1, 2, 4, 8, 16, 32),
}


def step(axis: str, size: int, key: str) -> Callable[[], Any]:
    """One step: the MNIST network along batch and tangents, a perceptron of that width or depth otherwise."""
    method = METHODS[key]
    if axis in ("batch", "tangents"):
        case = Case("mnist", size if axis == "batch" else 32, "fp32")
        model, (x, labels, tau) = case.model(), case.data()
        count = size if axis == "tangents" else 5
        tau = tau.repeat(math.ceil(count / 5), 1, 1, 1, 1)[:count]
    else:
        width, depth = (size, 4) if axis == "width" else (256, size)
        torch.manual_seed(0)
        hidden = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())]
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), *hidden, nn.Linear(width, 10))
        x, labels, tau = Case("mnist", 128, "fp32", channels_last=False).data()
    network, tangents = ibp.Network(model), tau if method.needs_tangents else None
    return lambda: method.gradients(network, x, labels, tangents)


def curve(axis: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every method at every size of an axis."""
    found: dict[str, list[float]] = {key: [] for key in SWEPT}
    for size in AXES[axis]:
        times = timing.interleave({key: step(axis, size, key) for key in SWEPT}, rounds, warmup=1)
        for key, seconds in times.items():
            found[key].append(1e3 * seconds.median)
    return found


def slope(sizes: tuple[int, ...], milliseconds: list[float]) -> float:
    """The exponent of the fitted power law: 1 means twice the size costs twice the time."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(m) for m in milliseconds]).slope


def table(curves: dict[str, dict[str, list[float]]]) -> str:
    """Fitted exponents as Markdown."""
    lines = [f"| axis | sizes | {' | '.join(SWEPT)} |", "|---" * (len(SWEPT) + 2) + "|"]
    for axis, found in curves.items():
        cells = [f"{slope(AXES[axis], found[key]):.2f}" for key in SWEPT]
        lines.append(f"| {axis} | {AXES[axis][0]} … {AXES[axis][-1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """A panel an axis, both scales logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    for panel, (axis, found) in zip(figure.subplots(2, 2).flat, curves.items(), strict=True):
        for key, milliseconds in found.items():
            panel.loglog(AXES[axis], milliseconds, marker="o", markersize=3, label=key)
        panel.set_xlabel(axis)
        panel.set_ylabel("ms, CPU time")
    panel.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Measure every axis; print the exponents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    curves = {axis: curve(axis, arguments.rounds) for axis in AXES}
    print(f"{timing.machine()}\n\n{table(curves)}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": timing.machine(), "axes": AXES, "milliseconds": curves}, indent=1)
        )
    if arguments.figure:
        draw(curves, arguments.figure)


if __name__ == "__main__":
    main()
