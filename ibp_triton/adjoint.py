"""Whether torch's forward mode, or its second derivative, of a function fits its reverse mode.

Of ``torch.library.custom_op`` with a backward forward mode is zero without a word, of some of torch's own functions
(scatter_reduce of products, Cholesky factors of one triangle) it is not the adjoint of reverse mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_numbers(tensors: Sequence[Tensor]) -> bool:
    """Whether there is something to try: not of tensors on no device, nor of those that stand for shapes."""
    return not any(x.is_meta or isinstance(x, FakeTensor) for x in tensors)


def some(y: Tensor) -> Tensor:
    """Numbers like y without a pattern, the same each time, and none of anybody's random ones."""
    turns = torch.arange(1, y.numel() + 1, dtype=torch.float64, device=y.device).square().mul(0.6180339887).cos()
    return turns.reshape(y.shape).to(y.dtype)


def agrees(u: Sequence[Tensor], pushed: Sequence[Tensor], t: Sequence[Tensor], pulled: Sequence[Tensor]) -> bool:
    """Whether ⟨u, J t⟩ = ⟨Jᵀu, t⟩ to rounding; where J is zero, that of a J about 1.

    Args:
        u: like the outputs, ``some`` of each.
        pushed: J t.
        t: like the inputs.
        pulled: Jᵀu.
    """
    there, here = _inner(u, pushed), _inner(t, pulled)
    if not (there.isfinite() and here.isfinite()):  # what is no number is none in both
        return not (there.isfinite() or here.isfinite())
    eps = max((torch.finfo(y.dtype).eps for y in u), default=0.0)
    sizes = _size(u) * _size(pushed) + _size(t) * _size(pulled)
    return bool((there - here).abs() <= sizes * eps ** (1 / 3) / 4 + _size(u) * _size(t) * eps * 100)


def _size(a: Sequence[Tensor]) -> Tensor:
    return _inner(a, a).sqrt()


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    if not a:
        return torch.zeros((), dtype=torch.float64)
    parts = [torch.sum((u.conj() * v).real, dtype=torch.float64) for u, v in zip(a, b, strict=True)]
    return torch.stack(parts).sum()
