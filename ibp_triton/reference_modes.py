"""How torch's functions behave while the reference runs a model: as autograd in forward mode needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ibp_triton.errors import ModelError
from ibp_triton.recording import calls


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Keep nn.MultiheadAttention in eval mode on its differentiable path."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class SteadyDropout(TorchFunctionMode):
    """Dropout on contiguous copies: inside torch.func the mask of another memory layout is drawn in another order."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout) and args:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


class Unrounded(TorchFunctionMode):
    """Hardsigmoid, of which torch has no second derivative, as relu6(a + 3) / 6, and celu: it rounds both constants."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        if func in (F.celu, torch.celu) and args[0].dtype is torch.float64:
            alpha = (kwargs or {}).get("alpha", args[1] if len(args) > 1 else 1.0)
            return torch.maximum(args[0], torch.zeros_like(args[0])) + alpha * torch.expm1(args[0].clamp(max=0) / alpha)
        return func(*args, **(kwargs or {}))


class NoGradConstants(TorchFunctionMode):
    """What runs with gradients off is a constant in forward mode too, which torch's duals go through."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.detach_, torch.detach_) and torch._C._functorch.maybe_current_level() is not None:
            raise ModelError("the reference cannot judge a model that calls detach_, which forward mode goes through")
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return func(*args, **kwargs).detach()
        if torch.is_grad_enabled() or calls.KINDS.get(func) in (calls.Kind.READ, calls.Kind.NUMBER):
            return func(*args, **kwargs)
        if calls.in_place(func) is not None and args and isinstance(args[0], Tensor):
            func(args[0].detach(), *args[1:], **kwargs)  # the numbers change, the derivatives do not
            return args[0]
        return tree_map(lambda y: y.detach() if isinstance(y, Tensor) else y, func(*args, **kwargs))


_SOLVERS = (torch.linalg.solve, torch.linalg.solve_ex, torch.linalg.tensorsolve)


class CutPrimals(TorchFunctionMode):
    """The primal part of every result is a constant, so that of a tangent only each Df_i depends on parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.level = torch._C._functorch.maybe_current_level()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_below_another():
            raise ModelError(
                "the reference cannot judge, in the paper's semantics, a model that calls torch.func.jvp or vmap itself"
            )
        if func in _SOLVERS and not _moves(args[0] if args else kwargs["A"]):
            raise ModelError(
                "the reference cannot judge, in the paper's semantics, a model that solves by a parameter's matrix "
                "(torch.linalg.solve): torch's forward mode forgets that its factors depend on that"
            )
        return tree_map(_cut, func(*args, **kwargs))

    def _is_below_another(self) -> bool:
        """Whether the duals found here would be those of the model's own forward mode, or of single samples."""
        if torch._C._functorch.maybe_current_level() == self.level:
            return False
        return torch._C._functorch.peek_interpreter_stack().key() != torch._C._functorch.TransformType.Grad


def _moves(value: Any) -> bool:
    """Whether it has a tangent."""
    return forward_ad.unpack_dual(value).tangent is not None


def _cut(value: Any) -> Any:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    primal, tangent = forward_ad.unpack_dual(value)
    return value if tangent is None else forward_ad.make_dual(primal.detach(), tangent)
