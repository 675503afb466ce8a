"""Batch normalisation by the statistics of all processes' samples together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from ibp_triton.backends.torch.normalisation import Normalisation
from ibp_triton.errors import ModelError
from ibp_triton.layer import wide, wrapped
from ibp_triton.world import World


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    world: World,
) -> Tensor:
    """``F.batch_norm`` in training, of [N, C, ...] in each process; a process may have no sample.

    Raises:
        ValueError: where all processes together have a single number a channel.
    """
    given = (input, running_mean, running_var, weight, bias)
    settings = (momentum, eps, world)
    if has_torch_function(given):
        return handle_torch_function(sync_batch_norm, given, *given, *settings)
    mean, rstd, _ = _statistics(input, running_mean, running_var, *settings)
    return _normal(input, weight, bias, mean, rstd)


def _normal(input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    shape = (-1, *[1] * (input.dim() - 2))
    y = (wide(input) - mean.view(shape)) * rstd.view(shape)
    y = y if weight is None else y * wide(weight).view(shape)
    return (y if bias is None else y + wide(bias).view(shape)).to(input.dtype)


def _statistics(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float, world: World
) -> tuple[Tensor, Tensor, Tensor]:
    """μ and 1/s, [C], and how many numbers of a channel all have, [1], by two sums; running statistics move."""
    x, axes = wide(input), [0, *range(2, input.dim())]
    count = torch.full((1,), x.numel() // x.shape[1], dtype=x.dtype, device=x.device)
    *total, count = _Sum.apply(torch.cat([x.sum(axes), count]), world).split([x.shape[1], 1])  # type: ignore[no-untyped-call]
    if float(count.detach()) <= 1:
        raise ValueError(
            f"expected more than 1 value per channel when training, got {list(input.shape)} of one process"
        )
    mean = total[0] / count
    centred = x - mean.view(-1, *[1] * (input.dim() - 2))
    var = _Sum.apply(centred.square().sum(axes), world) / count  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for running, now in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
            if running is not None:
                running.lerp_(now.to(running.dtype), momentum)
    return mean, (var + eps).rsqrt(), count


class _Sum(torch.autograd.Function):
    """Σ over the processes, which is its own derivative."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.sum(value.clone())

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        return _Sum.apply(d, ctx.world), None  # type: ignore[no-untyped-call]


class SyncBatchNorm(Normalisation):
    """Each channel by the statistics of all processes' samples, [N, C, ...]: a mean is a sum over processes more."""

    label = "batch_norm (all processes)"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Of an activation; a γ or b that depends on x would need sums that nothing here takes."""
        if not super().accepts(kinds, arguments):
            raise ModelError(
                "a synchronised batch norm normalises activations by parameters; here they are the reverse"
            )
        return True

    def forward(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
        world: World,
    ) -> Tensor:
        """The same shape."""
        if wrapped(input, weight, bias):
            raise ModelError(f"{self.node.where}: a synchronised batch norm cannot run under torch.func.vmap")
        self.input, self.weight, self.eps, self.world = input, weight, eps, world
        self.inner, self.group = tuple(input.shape), (-input.dim(), *range(2 - input.dim(), 0))
        self.shape, self.affine = (input.shape[1],), (input.shape[1], *[1] * (input.dim() - 2))
        mean, rstd, self.count = _statistics(input, running_mean, running_var, momentum, eps, world)
        self.mean, self.rstd = mean.view(self.affine), rstd.view(self.affine)
        return _normal(input, weight, bias, mean, rstd)

    def _mean(self, v: Tensor) -> Tensor:
        return self.world.sum(v.sum(self.group, keepdim=True)) / self.count

    def _product(self, u: Tensor, v: Tensor) -> Tensor:
        return self._mean(u * v)


@dataclass(eq=False)
class Synchronised:
    """While a model runs in it: its nn.SyncBatchNorm, and all other batch norms where ``every``, see all processes."""

    world: World
    every: bool
    met: bool = False  # whether one has

    def applies(self, model: nn.Module) -> bool:
        """Whether the model has a batch norm that it changes."""
        return self.every or bool(_own(model))

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        """The context of one forward pass."""
        own = _own(model)
        for module in own:  # torch's own forward refuses CPUs and hides its sums from the sweeps
            module.forward = partial(self._forward, module)  # type: ignore[method-assign]
        try:
            with _Mode(self.world, self) if self.every else nullcontext():
                yield
        finally:
            for module in own:
                del module.forward

    def _forward(self, module: nn.SyncBatchNorm, input: Tensor) -> Tensor:
        group = module.process_group
        with _Mode(self.world if group is None else World(group), self):
            return _BatchNorm.forward(module, input)


def _own(model: nn.Module) -> list[nn.SyncBatchNorm]:
    return [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]


class _Mode(TorchFunctionMode):
    def __init__(self, world: World, owner: Synchronised) -> None:
        super().__init__()
        self.world, self.owner = world, owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        return _batch_norm(self, *args, **(kwargs or {}))


def _batch_norm(
    mode: _Mode,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    mode.owner.met = True
    return sync_batch_norm(input, running_mean, running_var, weight, bias, momentum, eps, mode.world)
