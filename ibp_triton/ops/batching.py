"""The operators under torch.func.vmap: over replicas, each with weights of its own, or over anything else.

What has no weights acts on each sample alone, so that the samples of all are one batch and one launch. Where
weights, strengths or sums are in it there is a launch for each, until a kernel has an axis for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ibp_triton.layer import stacked_like_first
from ibp_triton.ops import norm_operators as norms
from ibp_triton.ops import operators as ops

Rule = Callable[..., tuple[Any, Any]]

EACH = (
    *(ops.linear, ops.linear_vjp, ops.conv2d, ops.conv2d_vjp, ops.weight_gradient),
    *(ops.conv2d_max_pool2d, ops.conv2d_max_pool2d_jvp),
    *(ops.objective, ops.fgsm_step, ops.relu),
    *(
        norms.group_norm,
        norms.group_norm_vjp,
        norms.group_norm_jvp,
        norms.group_norm_cross,
        norms.group_norm_curvature,
        norms.batch_norm_project,
        norms.batch_norm_cross,
    ),
)
# operator → the axis of samples in each tensor that it takes and gives; from the end where tangents may precede it
JOINED: dict[Any, tuple[tuple[int, ...], tuple[int, ...]]] = {
    ops.max_pool2d: ((0,), (0, 0)),
    ops.max_pool2d_jvp: ((1, 0), (1,)),
    ops.max_pool2d_vjp: ((1, 0), (1,)),
    ops.avg_pool2d: ((1,), (1,)),
    ops.avg_pool2d_vjp: ((1,), (1,)),
    ops.cross_entropy: ((0, 0), (0, 0, 0)),
    ops.hessian_product: ((-2, -2), (-2,)),
    ops.norm_seed: ((0,), (0, 0)),
    ops.norm_value: ((0,), (0,)),
    ops.fast_tbp_seed: ((0, 1), (0, 0)),
}


def each(operator: Any) -> Rule:
    """A call for each, the results in the memory format of one."""

    def rule(info: Any, axes: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        found = [operator(*_own(args, axes, r), **kwargs) for r in range(info.batch_size)]
        out = tree_map(lambda *parts: stacked_like_first(parts), *found)
        return out, tree_map(lambda _: 0, out)

    return rule


def joined(operator: Any, given: tuple[int, ...], gives: tuple[int, ...]) -> Rule:
    """One call on the samples of all."""

    def rule(info: Any, axes: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        count, tensors = info.batch_size, len(given)
        folded = [_folded(a, axis, at, count) for a, axis, at in zip(args, axes, given, strict=False)]
        out = operator(*folded, *args[tensors:], **kwargs)
        parts = out if isinstance(out, tuple) else (out,)
        places = [at % part.dim() for part, at in zip(parts, gives, strict=True)]
        apart = tuple(part.unflatten(at, (count, -1)) for part, at in zip(parts, places, strict=True))
        return (apart, tuple(places)) if isinstance(out, tuple) else (apart[0], places[0])

    return rule


def _own(args: Any, axes: Any, r: int) -> list[Any]:
    """One's arguments; a list of tensors has a list of axes."""
    return [
        _own(a, axis, r) if isinstance(axis, (list, tuple)) else a if axis is None else a.select(axis, r)
        for a, axis in zip(args, axes, strict=True)
    ]


def _folded(a: Tensor, axis: int | None, samples: int, count: int) -> Tensor:
    """The axis of replicas in front of that of samples, and both as one."""
    at = samples % (a.dim() - (axis is not None))
    moved = a.unsqueeze(at).expand(*a.shape[:at], count, *a.shape[at:]) if axis is None else a.movedim(axis, at)
    return moved.flatten(at, at + 1)


for _operator in EACH:
    torch.library.register_vmap(_operator, each(_operator))
for _operator, (_given, _gives) in JOINED.items():
    torch.library.register_vmap(_operator, joined(_operator, _given, _gives))
