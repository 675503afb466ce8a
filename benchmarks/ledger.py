"""Where the time of a step goes, by method, beside its predicted ratio: `python -m benchmarks.ledger`."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ibp_triton as ibp
from ibp_triton.allocator import keep_freed_memory
from ibp_triton.backends.torch import dense
from ibp_triton.bench import candidates
from ibp_triton.bench.candidates import METHODS, NETWORKS, PRECISIONS, TANGENTS, Case

KINDS = ("products", "image vjp", "pools", "elementwise")
_PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm")
_POOLS = ("max_pool2d_with_indices", "max_pool2d_with_indices_backward", "gather")


class Clock(TorchDispatchMode):
    """CPU seconds of torch's operations by kind. What an image layer's data gradient does is a kind of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()
        self.image = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.thread_time()
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        kind = "products" if name in _PRODUCTS else "pools" if name in _POOLS else "elementwise"
        self.seconds["image vjp" if self.image else kind] += time.thread_time() - start
        return result

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Operations are timed inside."""
        original = dense.Conv2d.input_vjp

        def input_vjp(layer: dense.Conv2d, d: torch.Tensor) -> torch.Tensor:
            self.image = layer.input.shape[1] <= 3
            try:
                return original(layer, d)
            finally:
                self.image = False

        with mock.patch.object(dense.Conv2d, "input_vjp", input_vjp), self:
            yield


def measure(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by method and kind; "Python" is what is left of the step's own time, "step"."""
    steps = {key: candidates.ours(case, key) for key in METHODS}
    found: dict[str, list[dict[str, float]]] = {key: [] for key in METHODS}
    for number in range(rounds + 2):
        for key, step in steps.items():
            start = time.thread_time()
            step()
            total, clock = time.thread_time() - start, Clock()
            with clock.watching():
                step()
            if number >= 2:
                found[key].append({"step": total, **{kind: clock.seconds[kind] for kind in KINDS}})
    medians = {
        k: {kind: 1e3 * statistics.median(r[kind] for r in rows) for kind in rows[0]} for k, rows in found.items()
    }
    return {key: {**row, "Python": row["step"] - sum(row[kind] for kind in KINDS)} for key, row in medians.items()}


def table(case: Case, found: dict[str, dict[str, float]]) -> str:
    """Markdown: what each method's ratio to BP is, what multiply-adds predict, and which kinds make the difference.

    A kind's share of the difference is (its time − predicted ratio · BP's time in it) / BP's step: the shares add up.
    """
    network = ibp.Network(case.model())
    kinds, bp = (*KINDS, "Python"), found["bp"]
    lines = [f"| method | step (ms) | {' | '.join(kinds)} | × BP | predicted | {' | '.join(kinds)} |"]
    lines.append("|---" * (2 * len(kinds) + 4) + "|")
    for key, row in found.items():
        predicted = METHODS[key].predicted_ratio(network, case.shape, TANGENTS)
        times = " | ".join(f"{row[kind]:.1f}" for kind in kinds)
        shares = " | ".join(f"{(row[kind] - predicted * bp[kind]) / bp['step']:+.2f}" for kind in kinds)
        lines.append(
            f"| {key} | {row['step']:.1f} | {times} | {row['step'] / bp['step']:.2f} | {predicted:.2f} | {shares} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="mnist", choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    case = Case(arguments.network, arguments.batch, arguments.precision)
    print(table(case, measure(case, arguments.rounds)))


if __name__ == "__main__":
    main()
