"""Checks of what a user passes in. Values of batched (vmap), fake and compiled tensors are not looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ibp_triton.errors import AutocastError, InputError, InputTypeError, MethodError

SEMANTICS = ("paper", "exact")


def readable(tensor: Any) -> bool:
    """Whether the values of this tensor can be looked at without a transform, a trace or a device stall."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.device.type != "cpu":
        return False
    if get_proxy_mode() is not None:  # make_fx records operations: no value may steer it
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_hyperparameters(method: Any) -> None:
    """β, ε, λ, step_size ≥ 0, norm ≥ 1, steps and projections from 1, a known semantics.

    Raises:
        InputTypeError (a TypeError): for a value that is no number.
        MethodError (a ValueError): for a value out of range.
    """
    for name in (f.name for f in dataclasses.fields(method)):
        value = getattr(method, name)
        if name in _LEAST:
            _number(method, name, value, _LEAST[name])
        elif name in _COUNTS and not (name == "projections" and value == "all"):
            _count(method, name, value)
    semantics = getattr(method, "semantics", "paper")
    if semantics not in SEMANTICS:
        raise MethodError(
            f"semantics must be 'paper' (Algorithm 1) or 'exact' (the objective's true gradient), not {semantics!r}"
        )


_LEAST = {"beta": 0, "epsilon": 0, "lam": 0, "step_size": 0, "norm": 1}
_COUNTS = ("steps", "projections")


def _number(method: Any, name: str, value: Any, least: float) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0:
            shape = list(value.shape)
            raise InputTypeError(
                f"{type(method).__name__}: {name} must be a number or a 0-d tensor, not of shape {shape}"
            )
        if value.requires_grad:
            raise MethodError(
                f"{type(method).__name__}: a loss has no derivative by its {name}, which would not be learnt: pass "
                f"{name}.detach()"
            )
        if not readable(value):
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputTypeError(f"{type(method).__name__}: {name} must be a number, not {value!r}")
    if not least <= value < float("inf"):
        raise MethodError(f"{type(method).__name__}: {name} must be finite and at least {least}, not {value}")


def _count(method: Any, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(f"{type(method).__name__}: {name} must be a whole number, not {value!r}")
    if value < 1:
        raise MethodError(f"{type(method).__name__}: {name} must be at least 1, not {value}")


def check_batch(
    own: Mapping[str, Tensor], dtype: torch.dtype | None, x: Tensor, parameters: Mapping[str, Tensor], least: int = 1
) -> None:
    """Shapes, dtypes and devices of x are checked against the model's own parameters.

    Raises:
        InputError, InputTypeError, AutocastError: naming the cause and the cure.
    """
    unknown = sorted(set(parameters) - set(own))
    if unknown:
        raise InputError(f"parameters has names the model lacks: {unknown}; the model's are {sorted(own)}")
    _check_input(x, dtype, own, least)


def _check_input(x: Any, dtype: torch.dtype | None, own: Mapping[str, Tensor], least: int) -> None:
    if not isinstance(x, Tensor):
        raise InputTypeError(f"x must be a tensor, not {type(x).__name__}; use torch.as_tensor(x)")
    if torch.is_autocast_enabled(x.device.type):
        raise AutocastError(
            "the methods choose the dtype of each sweep themselves: leave torch.autocast before the loss and pass "
            "Network(model, dtype=torch.bfloat16), which computes in bfloat16 with the parameters as master weights"
        )
    if x.dim() < 2 or x.shape[0] < least:
        raise InputError(f"x must be a batch [N, ...] with N >= 1, not {list(x.shape)}")
    if not x.is_floating_point():
        raise InputTypeError(
            f"x must be floating point, not {x.dtype}: the penalties need derivatives with respect to it. For a model "
            "of tokens pass their embeddings, as Network(model, x='inputs_embeds') where the model takes them"
        )
    if not own:
        raise InputError("the model has no parameters to train")
    meta = [name for name, p in own.items() if p.is_meta]
    if meta and not x.is_meta:
        raise InputError(
            f"parameter '{meta[0]}' is on the meta device, without numbers: model.to_empty(device=…) first"
        )
    first = next(iter(own.values()))
    if first.device != x.device:
        raise InputError(f"x is on {x.device}, the model on {first.device}; move one with .to(device)")
    dtypes = {p.dtype for p in own.values() if p.is_floating_point()}
    if dtype is None and dtypes and x.dtype not in dtypes:
        names = ", ".join(sorted(map(str, dtypes)))
        cast = f"use x.to({first.dtype}) or " if len(dtypes) == 1 else "pass "
        raise InputTypeError(f"x is {x.dtype}, the parameters are {names}; {cast}Network(model, dtype=...)")


def refuse_mixed() -> None:
    """Refuse torch.autocast around what runs now, a model's own or that of a wrapper of its forward.

    Raises:
        AutocastError: with the cure.
    """
    if torch._C._is_any_autocast_enabled():
        raise AutocastError(
            "the model computes under torch.autocast (its own, or that of a wrapper of its forward): the methods "
            "choose the dtype of each sweep themselves. Pass Network(model, dtype=torch.bfloat16), which computes "
            "in bfloat16 with the parameters as master weights"
        )


def check_labels(labels: Tensor, logits: Tensor, ignored: int | None = None) -> None:
    """Logits [N, M, ...] with M > 1, labels [N, ...] from 0 to M − 1 (or ``ignored``) where they can be read.

    Raises:
        InputError: otherwise.
    """
    if logits.dim() < 2 or (logits.shape[0], *logits.shape[2:]) != tuple(labels.shape):
        wanted = ", ".join(["M", *map(str, labels.shape[1:])])
        raise InputError(f"the model must return logits [{labels.shape[0]}, {wanted}], not {list(logits.shape)}")
    if logits.shape[1] < 2:
        raise InputError(
            "the model returns one logit, whose cross-entropy is always 0: let it return two, [N, 2], or pass "
            "criterion=nn.BCEWithLogitsLoss()"
        )
    if not readable(labels):
        return
    labels = labels if ignored is None else labels[labels != ignored]
    if labels.numel() == 0:
        return
    low, high = (int(label) for label in torch.aminmax(labels))
    if low < 0 or high >= logits.shape[1]:
        raise InputError(
            f"labels must lie in 0 … {logits.shape[1] - 1} for {logits.shape[1]} logits, got {low} … {high}"
        )


def check_tangents(key: str, needed: bool, x: Tensor, tangents: Tensor | None) -> None:
    """Tangent methods need [T, N, ...] tangents; others take none.

    Raises:
        InputError, InputTypeError: otherwise.
    """
    if needed != (tangents is not None):
        cure = "pass tangents=lie_tangents(images)" if needed else "leave tangents out"
        raise InputError(f"method '{key}' {'needs' if needed else 'takes no'} tangents: {cure}")
    if tangents is None:
        return
    if not isinstance(tangents, Tensor):
        raise InputTypeError(f"tangents must be a tensor [T, *x.shape], not {type(tangents).__name__}")
    if tangents.dim() != x.dim() + 1 or tangents.shape[1:] != x.shape:
        raise InputError(
            f"tangents must have shape [T, *x.shape] = [T, {str(list(x.shape))[1:]}, not {list(tangents.shape)}"
        )
    if not tangents.is_floating_point() or tangents.device != x.device:
        raise InputTypeError(
            f"tangents must be floating point on {x.device}, not {tangents.dtype} on {tangents.device}"
        )
