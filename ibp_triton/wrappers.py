"""Other libraries' wrappers around a model: what is taken off, and what is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ibp_triton.errors import AutocastError, ModelError

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def unwrapped(model: Any, dtype: torch.dtype | None) -> Any:
    """The module inside Lightning Fabric's wrapper, which runs a forward under hooks and a precision of its own.

    What it wraps once more for data parallelism stays wrapped, to be refused.

    Raises:
        AutocastError: for mixed precision that is not asked for by ``dtype`` too.
        ModelError: for a precision that changes the layers themselves.
    """
    if type(model).__name__ != "_FabricModule":
        return model
    inner, precision = model._forward_module, type(model._strategy.precision).__name__
    if isinstance(inner, _WRAPPERS) or type(inner).__name__ == "OptimizedModule":
        return inner
    if precision == "MixedPrecision" and dtype is None:
        raise AutocastError(
            "Fabric's mixed precision computes under torch.autocast, and the methods choose the dtype of each sweep "
            "themselves: pass Network(model, dtype=torch.bfloat16), with the parameters as master weights"
        )
    if precision not in ("Precision", "HalfPrecision", "DoublePrecision", "MixedPrecision"):
        raise ModelError(f"Network can't follow Fabric's {precision}: set the model up with precision='32-true'")
    return model.module


def check_model(model: Any) -> None:
    """Refuse what isn't a plain module, or is one of torch's wrappers.

    Raises:
        ModelError: with the cure.
    """
    if isinstance(model, _WRAPPERS):
        raise ModelError(
            f"Network needs the plain model, not {type(model).__name__}: put the loss inside the wrapper instead. "
            "Write a module whose forward(x, labels) returns method(self.network, x, labels), with self.model = model "
            "and self.network = Network(model), and wrap that module"
        )
    if type(model).__name__ == "OptimizedModule":
        raise ModelError("Network needs the plain model, not the result of torch.compile: pass the module you compiled")
    if not isinstance(model, nn.Module):
        raise ModelError(f"Network needs a torch.nn.Module, not {type(model).__name__}")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ModelError(
            "Network can't follow FullyShardedDataParallel, which hides the parameters: shard the plain model's "
            "blocks, and then the whole, by torch.distributed.fsdp.fully_shard"
        )
