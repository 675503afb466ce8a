"""What replicas gain: R gradients in one call over R, measured here; with R in the kernels' grid, predicted.

python -m benchmarks.replicas                     # milliseconds of a gradient on this CPU, and their ratio
python -m benchmarks.replicas --card H100         # the model's microseconds; needs triton, no GPU
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import ibp_triton as ibp
from ibp_triton.harness.models import paper_cifar10, paper_mnist
from ibp_triton.vmapped import Inputs

Build = Callable[[], nn.Module]


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def narrow() -> nn.Module:
    return paper_mnist(widths=(4, 8), hidden=16)


NETWORKS: dict[str, tuple[Build, tuple[int, int, int]]] = {
    "perceptron, 784-64-64-10": (perceptron, (1, 28, 28)),
    "the MNIST network, 4 and 8 channels wide": (narrow, (1, 28, 28)),
    "the MNIST network": (paper_mnist, (1, 28, 28)),
    "the CIFAR-10 network": (paper_cifar10, (3, 32, 32)),
}


def seconds(call: Callable[[], Any]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def measured(build: Build, shape: tuple[int, int, int], count: int, batch: int, rounds: int) -> tuple[float, float]:
    """CPU milliseconds of all replicas' gradients together and one by one, the least of the rounds."""
    network = ibp.ReplicatedNetwork([build() for _ in range(count)], seeds=range(count))
    methods = [ibp.LossIBP(0.01 + 0.1 * r / count) for r in range(count)]
    step = ibp.ReplicatedStep(network, methods, [torch.optim.SGD(own.values(), lr=0.1) for own in network.own])
    inputs = Inputs(torch.rand(batch, *shape), torch.arange(batch) % 10, None, {})
    both = [(lambda: step._together(methods, inputs)), (lambda: step._one_by_one(inputs))]
    for call in both:
        call()
    times = [[seconds(call) for call in both] for _ in range(rounds)]
    together, alone = (1e3 * min(each) for each in zip(*times, strict=True))
    return together, alone


def predicted(card: str, counts: tuple[int, ...]) -> Iterator[tuple[str, str, int, int, list[tuple[float, float]]]]:
    """Both ends of a Loss IBP step in a CUDA graph, in µs, for kernels with an axis of replicas in their grid."""
    from ibp_triton.harness.step_counts import KINDS, recorded
    from ibp_triton.kernels.workbench import model

    chip = model.CARDS[card]
    for network in ("mnist", "cifar10"):
        for kind in KINDS:
            launches, others = recorded(network, ibp.LossIBP(0.1), 32, kind=kind, family=chip.family)
            step = [model.counts(launch, chip.target) for launch in launches]
            step += [model.torch_operator(moved) for moved, _ in others.costs]
            ends = [model.microseconds([beside(one, r) for one in step], chip, kind) for r in counts]
            yield network, kind, 32, len(step), ends


def beside(one: Any, count: int) -> Any:
    """The same launch for so many replicas: that many programs, bytes and products."""
    grown = {name: count * getattr(one, name) for name in ("programs", "moved", "unique", "flops")}
    return replace(one, **grown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", help="predict for this card instead")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="networks whose name has this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.card:
        for network, kind, batch, launches, ends in predicted(options.card, tuple(options.replicas)):
            cells = [f"R={r}: {a:.0f}–{b:.0f} µs" for r, (a, b) in zip(options.replicas, ends, strict=True)]
            gains = [
                "–".join(f"{x:.1f}" for x in sorted(r * one / own for one, own in zip(ends[0], end, strict=True)))
                for r, end in zip(options.replicas, ends, strict=True)
            ]
            print(
                f"{network} {kind} batch {batch}, {launches} launches: {', '.join(cells)}; gain {', '.join(gains)}",
                flush=True,
            )
        return
    for name, (build, shape) in NETWORKS.items():
        for count in options.replicas if options.only in name else ():
            together, alone = measured(build, shape, count, 32, options.rounds)
            print(f"{name}, R={count}: together {together:.1f} ms, one by one {alone:.1f} ms, {alone / together:.2f}")


if __name__ == "__main__":
    main()
