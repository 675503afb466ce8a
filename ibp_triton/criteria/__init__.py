"""Criteria: the loss of each sample as a function of its logits, two derivatives of it, and how much a sample counts.

The objective of every method is Σ κ_n (ℓ_n + β R_n), where Σ κ_n ℓ_n is the criterion on the batch: κ_n = 1/N for a
plain mean. Here κ_n is held as weights N κ_n, None where all are one, and a divisor, N or (for sums) 1.

For cross-entropy with targets q ≥ 0 (one-hot, soft, smoothed, weighted) and S = Σ q: c = S p − q and
H t = S p∘(t − ⟨p, t⟩). Binary cross-entropy and squares act on each number alone. Any other criterion is differentiated
by autograd: H t = ∇_z ⟨c(z), t⟩.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ibp_triton.checks import readable
from ibp_triton.criteria.by_autograd import Differentiated, NegativeLogLikelihood
from ibp_triton.criteria.closed import BinaryCrossEntropy, CrossEntropy, SquaredError
from ibp_triton.criteria.criterion import Criterion, Loss
from ibp_triton.errors import InputError, InputTypeError
from ibp_triton.world import World

__all__ = ["Criterion", "CrossEntropy", "Loss", "criterion_for", "sample_weights"]


def criterion_for(criterion: Any) -> Criterion:
    """What a method's ``criterion=`` stands for; None is plain cross-entropy on class numbers.

    Raises:
        InputTypeError: for something that can't be called.
    """
    known: dict[Any, Callable[[Any], Criterion]] = {
        nn.CrossEntropyLoss: CrossEntropy,
        nn.BCEWithLogitsLoss: BinaryCrossEntropy,
        nn.MSELoss: SquaredError,
    }
    if criterion is None:
        return CrossEntropy()
    if isinstance(criterion, type) or not callable(criterion):
        raise InputTypeError(
            f"criterion must be a loss such as nn.CrossEntropyLoss() or a function (z, y) -> [N], not {criterion!r}"
        )
    other = NegativeLogLikelihood if isinstance(criterion, nn.NLLLoss) else Differentiated
    return known.get(type(criterion), other)(criterion)


def sample_weights(criterion: Criterion, y: Tensor, world: World | None) -> tuple[int, Tensor | None]:
    """The number of samples, over all processes, and N κ_n of these [N]; None where all count alike.

    Raises:
        InputError (a ValueError): where none counts.
    """
    weights, count = criterion.weigh(y, world is None), y.shape[0]
    total = None if weights is None else weights.sum()
    if world is not None:
        count, total = world.total(count, total, y.device)
    if count == 0:
        raise InputError("no process has a sample")
    if weights is None or total is None:
        return count, None
    if readable(total) and not float(total) > 0:
        raise InputError("no label of the batch counts: all are ignored, or their classes weigh nothing")
    return count, weights * (count / total) if criterion.reduction == "mean" else (weights > 0).to(weights.dtype)
