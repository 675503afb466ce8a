"""What R replicas in the kernels' grid are predicted to take on a card, in µs; needs triton, no GPU.

python -m benchmarks.replicas --card H100         # what one call gains on the CPU: ibp-triton bench replicas
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ibp_triton as ibp


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
    parser.add_argument("--card", default="H100", help="of those that the model knows")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 10, 100])
    options = parser.parse_args()
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


if __name__ == "__main__":
    main()
