"""What a criterion is: losses of single samples, two derivatives, and how much each sample counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ibp_triton.checks import readable
from ibp_triton.errors import InputError, InputTypeError
from ibp_triton.head import Head


@dataclass(eq=False)
class Loss:
    """A criterion at the logits z of a batch.

    Attributes:
        losses: ℓ [N].
        c: ∂ℓ/∂z per sample, in z's shape and dtype.
        hessian: t → H t, for tangents of z's shape or [T, *z.shape].
        weights: N κ_n [N]; None where all are one. Zero for a sample that does not count: its ℓ, c and R are zero.
    """

    losses: Tensor
    c: Tensor
    hessian: Callable[[Tensor], Tensor]
    weights: Tensor | None = None


class Criterion:
    """How a batch's logits and targets become a ``Loss``."""

    reduction = "mean"

    def divisor(self, batch: int) -> int:
        """What the sum over samples is divided by."""
        return 1 if self.reduction == "sum" else batch

    def targets(self, y: Any, x: Tensor) -> Tensor:
        """The targets as a tensor on x's device, with one entry a sample.

        Raises:
            InputError, InputTypeError: otherwise.
        """
        found = as_tensor(y, x)
        if found.dim() == 0 or found.shape[0] != x.shape[0]:
            shape = list(found.shape)
            raise InputError(f"the targets must have one entry a sample, [{x.shape[0]}, ...], not {shape}")
        if found.device != x.device:
            raise InputError(f"the targets are on {found.device}, x on {x.device}; move them to one device")
        return found

    def weigh(self, y: Tensor, alone: bool) -> Tensor | None:
        """W_n [N], how much a sample counts beside others; None where all count alike, whatever their targets.

        Not ``alone``: samples of other processes must agree, so that what these targets say does not decide.
        """
        return None

    def at(self, z: Tensor, y: Tensor, head: Head, weights: Tensor | None = None) -> Loss:
        """The loss at logits z [N, ...] and targets y, by ``head`` where it has kernels for it; weights N κ_n [N]."""
        raise NotImplementedError


def as_tensor(y: Any, x: Tensor) -> Tensor:
    """Targets in a tensor, an array or a list, as a tensor on x's device."""
    if isinstance(y, Tensor):
        return y
    try:
        return torch.as_tensor(np.asarray(y)).to(x.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(f"labels must be a tensor of class numbers, not {type(y).__name__}") from error


def per_sample(each: Tensor) -> Tensor:
    """[N, ...] added up to [N]."""
    return each if each.dim() == 1 else each.flatten(1).sum(1)


def share_of(each: Tensor, reduction: str) -> float:
    """What each number counts in its sample's loss: all alike, together one; for sums one each."""
    return 1.0 if reduction == "sum" else each.shape[0] / max(each.numel(), 1)


def shares(v: Tensor, reduction: str, alike: bool) -> Any:
    """1 / W_n [N] for positions that count v [N, ...], W_n being what a sample's add up to; 0 where none counts."""
    if alike:
        return share_of(v, reduction)
    total = per_sample(v)
    counts = (total > 0).to(v.dtype)
    return counts / torch.where(total > 0, total, 1) if reduction == "mean" else share_of(v, reduction) * counts


def position_weights(module: Any, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """w_y of class numbers y [N, ...], 0 at positions that are ignored; and which are not."""
    counted = y != module.ignore_index
    if module.weight is None:
        return counted.to(dtype), counted
    return module.weight.to(dtype)[torch.where(counted, y, 0)] * counted, counted


def class_weights(module: Any, y: Tensor, alone: bool) -> Tensor | None:
    """W_n of class numbers y [N, ...]: Σ w_y over the positions that are not ignored."""
    w, counted = module.weight, y != module.ignore_index
    if w is None:
        if alone and readable(y) and bool(counted.all()):
            return None
    elif w.device != y.device:
        raise InputError(
            f"the criterion's class weights are on {w.device}, labels on {y.device}; use criterion.to(device)"
        )
    elif readable(y) and bool((counted & ((y < 0) | (y >= len(w)))).any()):
        raise InputError(f"labels must lie in 0 … {len(w) - 1} for {len(w)} class weights")
    return per_sample(position_weights(module, y, torch.float64)[0])
