"""What the model of `kernels.workbench.model` makes of a training step on cards that are not at hand: predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ibp_triton import LossIBP, Method
from ibp_triton.harness.step_counts import KINDS, recorded

BATCHES = (32, 256, 1024)


@dataclass(frozen=True)
class Prediction:
    """The range of one step in a CUDA graph, before the optimizer, in µs."""

    card: str
    network: str
    method: str
    batch: int
    dtype: str
    low: float
    high: float

    @property
    def text(self) -> str:
        """Both ends, to two digits."""
        return "–".join(f"{float(f'{end:.2g}'):.0f}" for end in (self.low, self.high))


def predicted(
    cards: Sequence[str],
    dtypes: Sequence[str] = tuple(KINDS),
    batches: Sequence[int] = BATCHES,
    network: str = "mnist",
    method: Method | None = None,
) -> list[Prediction]:
    """A paper network's step of a method (Loss IBP by default) on each card, in each dtype and at each batch size.

    Raises ValueError for an unknown card. Kernels are compiled: 0.5 s for each of some thirty a card and dtype.
    """
    from ibp_triton.kernels.workbench import model  # here, so that the harness does without triton

    unknown = set(cards) - set(model.CARDS)
    if unknown:
        raise ValueError(f"unknown card {', '.join(sorted(unknown))}; choose from {', '.join(model.CARDS)}")
    chosen = method or LossIBP(0.1)
    found = []
    for name in cards:
        card = model.CARDS[name]
        for dtype in dtypes:
            for batch in batches:
                launches, others = recorded(network, chosen, batch, kind=dtype, family=card.family)
                step = [model.counts(launch, card.target) for launch in launches]
                step += [model.torch_operator(moved) for moved, _ in others.costs]
                low, high = model.microseconds(step, card, dtype)
                found.append(Prediction(name, network, chosen.key, batch, dtype, low, high))
    return found


NOTE = (
    "Predictions of a model (`kernels.workbench.model`) that no GPU confirmed: µs of a step in a CUDA graph, before "
    "the optimizer, from the instructions of the compiled code, the bytes counted and the cards' data sheets."
)


def head(found: Sequence[Prediction]) -> list[str]:
    """The columns of the table: what is run, then the cards."""
    return ["network", "method", "dtype", "batch", *dict.fromkeys(p.card for p in found)]


def lines(found: Sequence[Prediction]) -> list[list[str]]:
    """One line of cells for each step, one cell for each card."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for p in found:
        rows.setdefault((p.network, p.method, p.dtype, str(p.batch)), []).append(p.text)
    return [[*step, *cells] for step, cells in rows.items()]
