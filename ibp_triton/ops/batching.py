"""The operators under torch.func.vmap: over replicas, each with weights of its own, or over anything else.

What has no weights acts on each sample alone, so that the samples of all are one batch and one launch. Where
weights are in it the kernels have an axis of replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map

from ibp_triton.kernels import gates, loss, norm_seeds
from ibp_triton.layer import stacked_like_first, wrapped
from ibp_triton.ops import activation_operators as activations
from ibp_triton.ops import attention_operators as attention
from ibp_triton.ops import norm_operators as norms
from ibp_triton.ops import operators as ops

Rule = Callable[..., tuple[Any, Any]]


def _objective(
    losses: Tensor, penalties: Tensor, a: Any, b: Any, on_device: Any, scale: float = 1.0, absolute: bool = False
) -> Tensor:
    a, b = ops.numbers([a, b], on_device)
    return loss.objective(losses, penalties, a, b, scale=scale, absolute=absolute, replicated=True)


def _fgsm_step(x: Tensor, d: Tensor, epsilon: float, on_device: Tensor | None = None) -> Tensor:
    return norm_seeds.fgsm_step(x, d, epsilon if on_device is None else on_device, replicated=True)


# operator → what takes an axis of replicas in front of all its tensors, of stride 0 where they share one
REPLICATED: dict[Any, Callable[..., Any]] = {
    ops.linear: ops.linear._init_fn,
    ops.linear_vjp: ops.linear_vjp._init_fn,
    activations.linear_activation: activations.linear_activation._init_fn,
    ops.conv2d: ops.conv2d._init_fn,
    ops.conv2d_vjp: ops.conv2d_vjp._init_fn,
    ops.weight_gradient: ops.weight_gradient._init_fn,
    ops.conv2d_max_pool2d: ops.conv2d_max_pool2d._init_fn,
    ops.conv2d_max_pool2d_jvp: ops.conv2d_max_pool2d_jvp._init_fn,
    ops.objective: _objective,
    ops.fgsm_step: _fgsm_step,
    ops.relu: partial(gates.relu, replicated=True),
    norms.group_norm: partial(norms.norm, replicated=True),
    norms.group_norm_vjp: partial(norms.norm_vjp, replicated=True),
    norms.group_norm_jvp: partial(norms.norm_jvp, replicated=True),
    norms.group_norm_cross: partial(norms.norm_cross, replicated=True),
    norms.group_norm_curvature: partial(norms.norm_curvature, replicated=True),
    norms.batch_norm_project: partial(norms.column_project, replicated=True),
    norms.batch_norm_cross: partial(norms.column_cross, replicated=True),
}
# operator → the axis of samples in each tensor that it takes and gives; from the end where tangents may precede it, and
# None where a number stands among them
JOINED: dict[Any, tuple[tuple[int | None, ...], tuple[int, ...]]] = {
    activations.activation_curvature: ((1, 1, 0), (0,)),
    attention.attention: ((0, 0, 0, None, 0), (0, 0)),
    attention.attention_jvp: ((0, 0, 0, 0, 0, 1, 1, 1, None, 0), (1,)),
    attention.attention_vjp: ((1, 0, 0, 0, 0, 0, None, 0), (1, 1, 1)),
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
        out = tree_map(lambda *parts: _stacked(parts), *found)
        return out, tree_map(lambda _: 0, out)

    return rule


def replicated(operator: Any, function: Callable[..., Any]) -> Rule:
    """One call of the function for all replicas; one of the operator for each where torch must see operators."""
    one_by_one = each(operator)

    def rule(info: Any, axes: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if _seen([a for a in tree_leaves(args) if isinstance(a, Tensor)]):
            return one_by_one(info, axes, *args, **kwargs)
        out = function(*_in_front(args, axes, info.batch_size), **kwargs)
        return out, tree_map(lambda _: 0, out)

    return rule


def joined(operator: Any, given: tuple[int | None, ...], gives: tuple[int, ...]) -> Rule:
    """One call on the samples of all."""

    def rule(info: Any, axes: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        count, tensors = info.batch_size, len(given)
        folded = [
            a if a is None or at is None else _folded(a, axis, at, count)
            for a, axis, at in zip(args, axes, given, strict=False)
        ]
        out = operator(*folded, *args[tensors:], **kwargs)
        parts = out if isinstance(out, tuple) else (out,)
        places = [at % part.dim() for part, at in zip(parts, gives, strict=True)]
        apart = tuple(
            part.unflatten(at, (count, part.shape[at] // count)) for part, at in zip(parts, places, strict=True)
        )
        return (apart, tuple(places)) if isinstance(out, tuple) else (apart[0], places[0])

    return rule


def _own(args: Any, axes: Any, r: int) -> list[Any]:
    """One's arguments; a list of tensors has a list of axes."""
    return [
        _own(a, axis, r) if isinstance(axis, (list, tuple)) else a if axis is None else a.select(axis, r)
        for a, axis in zip(args, axes, strict=True)
    ]


def _in_front(args: Any, axes: Any, count: int) -> list[Any]:
    """All replicas' arguments, the axis in front of every tensor."""
    return [
        _in_front(a, axis, count) if isinstance(a, (list, tuple)) and any(isinstance(one, Tensor) for one in a)
        else a if not isinstance(a, Tensor)
        else a.expand(count, *a.shape) if axis is None else a.movedim(axis, 0)
        for a, axis in zip(args, axes, strict=True)
    ]  # fmt: skip


def _seen(tensors: list[Tensor]) -> bool:
    """Whether autograd, an outer transform, a tracer or a mode is to follow what becomes of tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or wrapped(*tensors)
        or any(type(a) not in (Tensor, Parameter) for a in tensors)
        or (torch.is_grad_enabled() and any(a.requires_grad for a in tensors))
    )


def _stacked(parts: tuple[Tensor, ...]) -> Tensor:
    """[R, ...] in the memory format of one; where autograd follows, which can't where views are written, in any."""
    return torch.stack(parts) if parts[0].requires_grad else stacked_like_first(parts)


def _folded(a: Tensor, axis: int | None, samples: int, count: int) -> Tensor:
    """The axis of replicas in front of that of samples, and both as one."""
    at = samples % (a.dim() - (axis is not None))
    moved = a.unsqueeze(at).expand(*a.shape[:at], count, *a.shape[at:]) if axis is None else a.movedim(axis, at)
    return moved.flatten(at, at + 1)


for _operator, _function in REPLICATED.items():
    torch.library.register_vmap(_operator, replicated(_operator, _function))
for _operator, (_given, _gives) in JOINED.items():
    torch.library.register_vmap(_operator, joined(_operator, _given, _gives))
