"""How the cost of a step grows with batch, width, depth and tangents: `python -m benchmarks.scaling`."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ibp_triton.bench import by_hand, candidates, measure
from ibp_triton.bench.candidates import METHODS, TANGENTS, Case
from ibp_triton.harness.threads import keep_freed_memory

AXES: dict[str, tuple[int, ...]] = {
    "batch": (32, 128, 512, 2048, 4096),
    "width": (16, 32, 64, 128, 256),
    "depth": (2, 4, 8, 16, 32),
    "tangents": (1, 2, 4, 8, 16, 32),
}
LABELS = {
    "batch": "batch size N, examples",
    "width": "width, channels of every convolution",
    "depth": "depth, convolutions after the first",
    "tangents": "tangent vectors T of an example",
}
LEADING = {"batch": 1, "width": 2, "depth": 1}  # the exponent that multiply-adds tend to
SWEPT = {axis: tuple(METHODS) for axis in AXES} | {
    "tangents": ("bp", "fast_tbp", "tbp", "autograd fast_tbp", "autograd tbp")
}
Curves = dict[str, list[float]]  # CPU milliseconds of a step for every size of an axis, by candidate


@dataclass(frozen=True)
class Stack(Case):
    """A stack of equal 3×3 convolutions on 7×7 maps: small enough for batch 4096, and linear in its depth."""

    width: int = 32
    depth: int = 4
    tangents: int = TANGENTS

    def model(self) -> nn.Module:
        """28×28 images → `width` channels of 7×7 → `depth` convolutions with ReLU → 10 logits."""
        torch.manual_seed(0)
        width = self.width
        hidden = [part for _ in range(self.depth) for part in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
        model = nn.Sequential(nn.Conv2d(1, width, 4, 4), nn.ReLU(), *hidden, nn.Flatten(), nn.Linear(49 * width, 10))
        return model.to(memory_format=self.layout)  # type: ignore[call-overload,no-any-return]

    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        """As any case, with `tangents` tangents: the five Lie tangents over and over."""
        x, labels, tau = super().data()
        return x, labels, tau[torch.arange(self.tangents) % len(tau)]


def candidate(axis: str, size: int, name: str) -> Callable[[], Any]:
    """One step of ours, or of autograd where the name says so, at one size of one axis."""
    case = Stack("mnist", **{"batch": 32, "precision": "fp32", axis: size})  # type: ignore[arg-type]
    key = name.removeprefix("autograd ")
    return candidates.ours(case, key) if key == name else by_hand.autograd(case, key)


def curves(axis: str, rounds: int) -> Curves:
    """Every candidate at every size of an axis."""
    found: Curves = {name: [] for name in SWEPT[axis]}
    for size in AXES[axis]:
        steps = {name: candidate(axis, size, name) for name in SWEPT[axis]}
        for name, seconds in measure.interleave(steps, rounds, warmup=1).items():
            found[name].append(1e3 * seconds.median)
        print(f"{axis} {size}: bp {found['bp'][-1]:.1f} ms", flush=True)
    return found


def slope(sizes: tuple[int, ...], milliseconds: list[float]) -> float:
    """The exponent of the fitted power law: 1 means twice the size costs twice the time."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(m) for m in milliseconds]).slope


def relative(found: Curves, name: str) -> list[float]:
    """A curve in units of BP's step at the same size."""
    return [a / b for a, b in zip(found[name], found["bp"], strict=True)]


def table(found: dict[str, Curves]) -> str:
    """Fitted exponents, in brackets that of the two largest sizes, and the lines of cost against T, as Markdown."""
    exponents = [axis for axis in AXES if axis != "tangents"]
    heads = [f"{axis} {AXES[axis][0]} … {AXES[axis][-1]}" for axis in exponents]
    lines = [f"| slope of | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for key in METHODS:
        cells = [_exponents(AXES[axis], found[axis][key]) for axis in exponents]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    lines += ["", "| cost in steps of BP | a + b T | T = 1 | T = 32 |", "|---|---|---|---|"]
    for name in SWEPT["tangents"][1:]:
        costs = relative(found["tangents"], name)
        b, a = statistics.linear_regression(AXES["tangents"], costs)
        lines.append(f"| {name} | {a:.2f} + {b:.3f} T | {costs[0]:.2f} | {costs[-1]:.2f} |")
    return "\n".join(lines)


def _exponents(sizes: tuple[int, ...], milliseconds: list[float]) -> str:
    return f"{slope(sizes, milliseconds):.2f} ({slope(sizes[-2:], milliseconds[-2:]):.2f})"


def draw(found: dict[str, Curves], path: Path) -> None:
    """A panel an axis, side by side, both scales logarithmic."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same file from the same figures
    figure = Figure(figsize=(16, 4.6), layout="constrained", facecolor="white")
    panels = dict(zip(AXES, figure.subplots(1, len(AXES)), strict=True))
    for axis, panel in panels.items():
        for name in SWEPT[axis]:
            key = name.removeprefix("autograd ")
            shown = relative(found[axis], name) if axis == "tangents" else found[axis][name]
            style = {"color": f"C{list(METHODS).index(key)}", "linestyle": "-" if key == name else "--"}
            panel.loglog(AXES[axis], shown, marker="o", markersize=3, label=name, **style)
        if axis in LEADING:
            _guide(panel, axis, found[axis]["bp"][-1])
        panel.set_xlabel(LABELS[axis])
        panel.set_ylabel("cost of a step, steps of BP" if axis == "tangents" else "CPU time of a step, ms")
        panel.set_xticks(AXES[axis], [str(s) for s in AXES[axis]])
        panel.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    panels["tangents"].legend(fontsize=8, frameon=False)
    shown, names = panels["batch"].get_legend_handles_labels()
    figure.legend(shown, names, loc="outside upper center", ncols=len(names), fontsize=9, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def _guide(panel: Any, axis: str, last: float) -> None:
    """A dotted power law below BP's curve."""
    sizes, power = AXES[axis], LEADING[axis]
    panel.loglog(sizes, [0.7 * last * (size / sizes[-1]) ** power for size in sizes], ":k", linewidth=1)
    panel.set_ylim(bottom=0.35 * min(panel.get_lines()[0].get_ydata()))
    panel.annotate(f"slope {power}", (sizes[-2], 0.6 * last * (sizes[-2] / sizes[-1]) ** power), va="top", fontsize=8)


def main() -> None:
    """Measure every axis, or read what was measured; print the slopes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--figure", type=Path, help="also draw them, .svg or .png")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (5)")
    parser.add_argument("--read", type=Path, help="measure nothing: print and draw what --json wrote")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if arguments.read:
        results = json.loads(arguments.read.read_text())
    else:
        found = {axis: curves(axis, arguments.rounds) for axis in AXES}
        results = {
            "machine": measure.machine(),
            "rounds": arguments.rounds,
            "axes": AXES,
            "milliseconds": found,
        }
    print(f"{results['machine']}\n\n{table(results['milliseconds'])}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.figure:
        draw(results["milliseconds"], arguments.figure)


if __name__ == "__main__":
    main()
