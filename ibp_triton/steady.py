"""torch's functions in the form in which all ways to a derivative agree: same random numbers, same rounding.

torch draws a dropout mask in the order of the memory, so that the same seed gives another mask in another layout; the
methods draw it as for a contiguous input. It rounds the 1/6 of hardsigmoid's derivative and the 1/α of celu's to
float32. And the process dies in the reverse sweep of a group norm in channels-last whose input has no derivative.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def dropout_mask(input: Tensor, p: float, axes: int | None) -> Tensor:
    """0 with probability p, else 1 / (1 − p): for every element, or one number for what the first axes share."""
    shape = input.shape if axes is None else [*input.shape[:axes], *[1] * (input.dim() - axes)]
    if p == 1:
        return input.new_zeros(shape)  # as torch does, which draws no numbers for it
    return input.new_empty(shape).bernoulli_(1 - p).div_(1 - p)


def _dropout(function: Any, axes: int | None) -> Any:
    def drop(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or input.is_contiguous() or not 0 < p < 1:
            return function(input, p, training, inplace)  # type: ignore[no-any-return]
        mask = dropout_mask(input, p, axes)
        return input.mul_(mask) if inplace else input * mask

    return drop


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    if input.dtype is not torch.float64 or inplace:
        return F.hardsigmoid(input, inplace)
    return F.relu6(input + 3) / 6


def _celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    if input.dtype is not torch.float64 or inplace:
        return F.celu(input, alpha, inplace)
    return torch.where(input > 0, input, alpha * torch.expm1(input.clamp(max=0) / alpha))


def _group_norm(function: Any) -> Any:
    def normalise(input: Tensor, num_groups: int, *args: Any, **kwargs: Any) -> Tensor:
        plain = input if input.requires_grad else input.contiguous()
        return function(plain, num_groups, *args, **kwargs)  # type: ignore[no-any-return]

    return normalise


_OWN: dict[Any, Any] = {
    F.dropout: _dropout(F.dropout, None),
    torch.dropout: _dropout(torch.dropout, None),
    **{function: _dropout(function, 2) for function in (F.dropout1d, F.dropout2d, F.dropout3d)},
    F.hardsigmoid: _hardsigmoid,
    F.celu: _celu,
    torch.celu: _celu,
    F.group_norm: _group_norm(F.group_norm),
    torch.group_norm: _group_norm(torch.group_norm),
}


class Steady(TorchFunctionMode):
    """Inside, dropout draws as for contiguous tensors, no constant is rounded, and group norms don't crash."""

    own: ClassVar[Mapping[Any, Any]] = _OWN

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = self.own.get(func, func)
        return own(*args, **kwargs) if kwargs else own(*args)
