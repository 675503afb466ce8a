"""Checks of what a user passes in. Values of batched (vmap), fake and compiled tensors are not looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

if TYPE_CHECKING:
    from ibp_triton.methods import Method
    from ibp_triton.network import Network

SEMANTICS = ("paper", "exact")


def readable(tensor: Any) -> bool:
    """Whether the values of this tensor can be looked at without a transform, a trace or a device stall."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.device.type != "cpu":
        return False
    if get_proxy_mode() is not None:  # make_fx records operations: no value may steer it
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_hyperparameters(method: Method) -> None:
    """β, ε ≥ 0, norm ≥ 1, a known semantics.

    Raises:
        TypeError: for a value that is no number.
        ValueError: for a value out of range.
    """
    if method.parameter is not None:
        _number(method, method.parameter, 0)
    if hasattr(method, "norm"):
        _number(method, "norm", 1)
    semantics = getattr(method, "semantics", "paper")
    if semantics not in SEMANTICS:
        raise ValueError(
            f"semantics must be 'paper' (Algorithm 1) or 'exact' (the objective's true gradient), not {semantics!r}"
        )


def _number(method: Method, name: str, least: float) -> None:
    value: Any = getattr(method, name)
    if isinstance(value, Tensor):
        if value.dim() != 0 or not readable(value):
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{type(method).__name__}: {name} must be a number, not {value!r}")
    if not least <= value < float("inf"):
        raise ValueError(f"{type(method).__name__}: {name} must be finite and at least {least}, not {value}")


def check_batch(
    network: Network, own: Mapping[str, Tensor], x: Tensor, labels: Tensor, parameters: Mapping[str, Tensor]
) -> None:
    """Shapes, dtypes and devices are checked against the network and its model's own parameters.

    Raises:
        TypeError, ValueError, RuntimeError: naming the cause and the cure.
    """
    unknown = sorted(set(parameters) - set(own))
    if unknown:
        raise ValueError(f"parameters has names the model lacks: {unknown}; the model's are {sorted(own)}")
    if torch.is_autocast_enabled(x.device.type):
        raise RuntimeError(
            "the methods choose the dtype of each sweep themselves: leave torch.autocast before the loss and pass "
            "Network(model, dtype=torch.bfloat16), which computes in bfloat16 with the parameters as master weights"
        )
    _check_input(network, x, own)
    if labels.dim() != 1 or labels.shape[0] != x.shape[0]:
        raise ValueError(f"labels must have shape [{x.shape[0]}], one a sample of x, not {list(labels.shape)}")
    if labels.dtype not in (torch.int64,):
        raise TypeError(f"labels must be int64 class numbers, not {labels.dtype}; use labels.long()")
    if labels.device != x.device:
        raise ValueError(f"labels are on {labels.device}, x on {x.device}; move them to one device")


def _check_input(network: Network, x: Tensor, own: Mapping[str, Tensor]) -> None:
    if x.dim() < 2 or x.shape[0] == 0:
        raise ValueError(f"x must be a batch [N, ...] with N >= 1, not {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, not {x.dtype}: the penalties need derivatives with respect to it")
    if not own:
        raise ValueError("the model has no parameters to train")
    first = next(iter(own.values()))
    if first.device != x.device:
        raise ValueError(f"x is on {x.device}, the model on {first.device}; move one with .to(device)")
    dtypes = {p.dtype for p in own.values() if p.is_floating_point()}
    if network.dtype is None and dtypes != {x.dtype}:
        names = ", ".join(sorted(map(str, dtypes)))
        raise TypeError(
            f"x is {x.dtype}, the parameters are {names}; use x.to({first.dtype}) or Network(model, dtype=...)"
        )


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Logits [N, M], and labels from 0 to M − 1 where they can be read.

    Raises:
        ValueError: otherwise.
    """
    if logits.dim() != 2 or logits.shape[0] != labels.shape[0]:
        raise ValueError(f"the model must return logits [{labels.shape[0]}, M], not {list(logits.shape)}")
    if readable(labels) and bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(
            f"labels must lie in 0 … {logits.shape[1] - 1} for {logits.shape[1]} logits, got {low} … {high}"
        )


def check_tangents(key: str, needed: bool, x: Tensor, tangents: Tensor | None) -> None:
    """Tangent methods need [T, N, ...] tangents; others take none.

    Raises:
        ValueError, TypeError: otherwise.
    """
    if needed != (tangents is not None):
        cure = "pass tangents=lie_tangents(images)" if needed else "leave tangents out"
        raise ValueError(f"method '{key}' {'needs' if needed else 'takes no'} tangents: {cure}")
    if tangents is None:
        return
    if tangents.dim() != x.dim() + 1 or tangents.shape[1:] != x.shape:
        raise ValueError(
            f"tangents must have shape [T, *x.shape] = [T, {str(list(x.shape))[1:]}, not {list(tangents.shape)}"
        )
    if not tangents.is_floating_point() or tangents.device != x.device:
        raise TypeError(f"tangents must be floating point on {x.device}, not {tangents.dtype} on {tangents.device}")
