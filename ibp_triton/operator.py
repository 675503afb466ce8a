"""The loss as one operator of torch, for functions that a user compiles: ``torch.compile(step, fullgraph=True)``.

An operator takes tensors and numbers; methods and networks are passed by the number that they have while they live.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ibp_triton.layer import HALF

if TYPE_CHECKING:
    from ibp_triton.methods.base import Method
    from ibp_triton.network import Network

_COUNT = itertools.count()
_LIVING: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def number_of(thing: Any) -> int:
    """A new number by which the operator finds this object as long as it lives."""
    number = next(_COUNT)
    _LIVING[number] = thing
    return number


def loss_operator(
    method: Method, network: Network, x: Tensor, y: Tensor, tangents: Tensor | None, extra: dict[str, Tensor]
) -> Tensor:
    """``method(network, x, y)`` as a single call, with its gradient."""
    parameters = [p for p in network.model.parameters() if p.requires_grad]
    values = list(extra.values())
    found: list[Tensor] = torch.ops.ibp_triton.loss(
        method.number, network.number, x, y, tangents, values, ",".join(extra), parameters
    )
    return found[0]


@torch.library.custom_op("ibp_triton::loss", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _loss(
    method: int,
    network: int,
    x: Tensor,
    y: Tensor,
    tangents: Tensor | None,
    extra: list[Tensor],
    names: str,
    parameters: list[Tensor],
) -> list[Tensor]:
    model = _LIVING[network]
    inputs = dict(zip(names.split(","), extra, strict=True)) if extra else None
    value, found = _LIVING[method].gradients(model, x, y, tangents, extra=inputs)
    own = [name for name, p in model.parameters().items() if p.requires_grad]
    return [value, *(found[name] for name in own)]


@_loss.register_fake
def _(method, network, x, y, tangents, extra, names, parameters):  # type: ignore[no-untyped-def]
    first = parameters[0]
    value = first.new_empty((), dtype=torch.float32 if first.dtype in HALF else first.dtype)
    return [value, *(torch.empty_like(p) for p in parameters)]


def _keep(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.extra = len(inputs[5])


def _backward(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    return *[None] * 5, [None] * ctx.extra, None, [g * upstream[0].to(g.dtype) for g in ctx.saved_tensors]


_loss.register_autograd(_backward, setup_context=_keep)
