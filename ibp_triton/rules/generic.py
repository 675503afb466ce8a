"""The generic rule: any differentiable torch function or module, through torch.func. Slower, and right.

Second derivatives are always taken forward over reverse: in torch 2.13 differentiating a forward-mode tangent in
reverse is silently wrong for some normalisation layers and impossible for softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from ibp_triton.randomness import RandomState
from ibp_triton.rules.base import Layer, Names, Tangents
from ibp_triton.rules.structural import Pieces


class DetachPrimals(TorchFunctionMode):
    """Cut the primal part of every dual number that a torch function returns; the tangent part stays connected.

    The paper's third pass in autograd's terms: what a later operation sees of the first pass is a constant.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map(_cut, func(*args, **(kwargs or {})))


class SteadyDropout(TorchFunctionMode):
    """Dropout on contiguous copies: inside torch.func the mask of another memory layout is drawn in another order."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DROPOUTS and args:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


_DROPOUTS = (torch.dropout, *(getattr(nn.functional, f"dropout{kind}") for kind in ("", "1d", "2d", "3d")))


def _cut(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    primal, tangent = forward_ad.unpack_dual(value)
    return value if tangent is None else forward_ad.make_dual(primal.detach(), tangent)


class Generic(Layer):
    """f by its own torch code. Operands are named "0", "1", … in the order of the flattened arguments."""

    label = "generic"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate once for real: random numbers are drawn, module buffers updated."""
        self._bind(args, kwargs)
        before = RandomState.now(self.inputs)
        self.buffers = self.node.function.snapshot() if isinstance(self.node.function, ModuleCall) else {}
        with SteadyDropout(), self._kernels():
            self.output = self.node.function(*args, **kwargs)
        if self.node.shares and getattr(self.node.function, "changed_input", False):
            raise RuntimeError(
                f"{self.node.where}: this untraceable module changes its input in place, and the input is used "
                "elsewhere too; work on a copy (x = x.clone()) in its forward"
            )
        self.random = before if before.differs(RandomState.now(self.inputs)) else None
        return self.output

    def replay(self, first: Layer, *args: Any, **kwargs: Any) -> Any:
        """At other values, with the first evaluation's random numbers and buffers; changes neither."""
        assert isinstance(first, Generic)
        self._bind(args, kwargs)
        self.random, self.buffers = first.random, first.buffers
        with self._kernels():
            self.output = self._again(*self.inputs)
        return self.output

    def _bind(self, args: Any, kwargs: Any) -> None:
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.slots = self.node.slots
        self.inputs = [self.leaves[slot] for slot in self.slots]

    def _again(self, *inputs: Tensor) -> Any:
        """The function of its operands, as often as needed, without side effects."""
        leaves = list(self.leaves)
        for slot, value in zip(self.slots, inputs, strict=True):
            leaves[slot] = value
        args, kwargs = tree_unflatten(leaves, self.spec)
        function = self.node.function
        with nullcontext() if self.random is None else self.random.again(), SteadyDropout():
            if isinstance(function, ModuleCall):
                return function.pure(self.buffers, *args, **kwargs)
            return function(*args, **kwargs)

    def _kernels(self) -> AbstractContextManager[None]:
        """Any attention kernel, but under vmap the one with batching rules."""
        wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in self.inputs if isinstance(x, Tensor))
        return sdpa_kernel(SDPBackend.MATH) if wrapped else nullcontext()

    def _of(self, names: Names) -> tuple[Callable[..., Any], list[Tensor]]:
        """The function of the named operands alone, and their values."""
        positions = [int(name) for name in names]

        def function(*values: Tensor) -> Any:
            inputs = list(self.inputs)
            for position, value in zip(positions, values, strict=True):
                inputs[position] = value
            with sdpa_kernel(SDPBackend.MATH):  # the only attention kernel with forward AD on the CPU
                return _parts(self._again(*inputs))

        return function, [self.inputs[p] for p in positions]

    def _pull(self, names: Names, d: Any) -> dict[str, Tensor]:
        function, values = self._of(names)
        output, pull = torch.func.vjp(function, *values)  # type: ignore[misc]
        return dict(zip(names, pull(_complete(output, d)), strict=True))

    def vjp(self, d: Any, wanted: Names) -> dict[str, Tensor]:
        """torch.func.vjp."""
        names = sorted(wanted)
        if not _batched(d, self.output):
            return self._pull(names, d)
        return torch.func.vmap(lambda d: self._pull(names, d), randomness="same")(_plain(d))

    def jvp(self, t: Tangents) -> Any:
        """torch.func.jvp."""
        names = sorted(t)
        function, values = self._of(names)

        def push(*tangents: Tensor) -> Any:
            return torch.func.jvp(function, tuple(values), tangents)[1]

        tangents = [t[name] for name in names]
        batched = tangents[0].dim() > values[0].dim()
        return torch.func.vmap(push, randomness="same")(*tangents) if batched else push(*tangents)

    def _move(self, t: Tangents, d: Any, wanted: Names, detached: bool) -> dict[str, Tensor]:
        """∇_wanted ⟨d, Df[t]⟩, summed over tangents."""
        along, names = sorted(t), sorted(wanted)
        values = [self.inputs[int(name)] for name in along]

        def one(tangents: tuple[Tensor, ...], d: Any) -> dict[str, Tensor]:
            if detached:
                return self._detached(tangents, along, names, d)

            def pulled(*moved: Tensor) -> dict[str, Tensor]:
                layer = self._at(along, moved)
                return layer._pull(names, d)

            return torch.func.jvp(pulled, tuple(values), tangents)[1]  # type: ignore[no-any-return]

        tangents = tuple(t[name] for name in along)
        if tangents[0].dim() == values[0].dim():
            return one(tangents, d)
        per_tangent = torch.func.vmap(one, randomness="same")(tangents, _plain(d))
        return {name: value.sum(0) for name, value in per_tangent.items()}

    def _at(self, names: Names, values: tuple[Tensor, ...]) -> Generic:
        """This layer with other values of the named operands."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.inputs = list(self.inputs)
        for name, value in zip(names, values, strict=True):
            other.inputs[int(name)] = value
        return other

    def _detached(self, tangents: Any, along: list[str], names: list[str], d: Any) -> dict[str, Tensor]:
        """The paper's semantics inside a module of several operations: duals with the primal cut after each."""

        def tangent(*params: Tensor) -> Any:
            function, values = self._at(names, params)._of(along)

            def watched(*inputs: Tensor) -> Any:
                with DetachPrimals():
                    return function(*inputs)

            return torch.func.jvp(watched, tuple(values), tangents)[1]

        output, pull = torch.func.vjp(  # type: ignore[misc]
            tangent, *[self.inputs[int(name)] for name in names]
        )
        return dict(zip(names, pull(_complete(output, d)), strict=True))

    def tangent_param_vjp(self, t: Tangents, r: Any, wanted: Names, exact: bool = False) -> dict[str, Tensor]:
        """Forward over reverse; inside a module in the paper's semantics, reverse over duals with cut primals."""
        return self._move(t, r, wanted, detached=not exact and isinstance(self.node.function, ModuleCall))

    def curvature(self, d: Any, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """The derivative of the vjp along t."""
        return self._move(t, d, wanted, detached=False)

    def multiply_adds(self) -> int:
        """As torch's flop counter sees them, halved."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self._again(*self.inputs)
        return counter.get_total_flops() // 2  # type: ignore[no-any-return]


class BatchNormTrain(Generic):
    """Batch normalisation by the batch's own statistics; running statistics are updated by the first forward only."""

    label = "batch_norm (train)"

    def _again(self, *inputs: Tensor) -> Any:
        leaves = list(self.leaves)
        for slot, value in zip(self.slots, inputs, strict=True):
            leaves[slot] = value
        args, _ = tree_unflatten(leaves, self.spec)
        module = self.node.function.module
        weight, bias = args[0].get("weight"), args[0].get("bias")
        return nn.functional.batch_norm(args[1], None, None, weight, bias, True, 0.0, module.eps)

    def tangent_param_vjp(self, t: Tangents, r: Any, wanted: Names, exact: bool = False) -> dict[str, Tensor]:
        """One operation: both semantics agree."""
        return self._move(t, r, wanted, detached=False)


class ModuleCall:
    """A module as a function of its parameters and its arguments."""

    def __init__(self, module: nn.Module, path: str) -> None:
        self.module, self.path, self.changed_input = module, path, False
        self.__name__ = type(module).__name__

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the buffers as they are now."""
        return {name: buffer.clone() for name, buffer in self.module.named_buffers()}

    def __call__(self, parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """For real: the module's own buffers change."""
        args = _copies(args)
        result = torch.func.functional_call(self.module, parameters, args, kwargs)
        self.changed_input = any(isinstance(a, Tensor) and a._version > 0 for a in args)
        return result

    def pure(self, buffers: dict[str, Tensor], parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """On copies of ``buffers``."""
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        return torch.func.functional_call(self.module, parameters | copies, _copies(args), kwargs)


def _copies(args: Any) -> Any:
    """Copies of the tensors: an opaque module may work in place."""
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in args)


def _batched(d: Any, output: Any) -> bool:
    """Whether d carries an axis of tangents."""
    while isinstance(d, Pieces):
        position = next(iter(d))
        d, output = d[position], output[position]
    return bool(d.dim() > output.dim())


def _plain(d: Any) -> Any:
    """Pieces as the plain dictionaries that torch.func knows."""
    return {i: _plain(part) for i, part in d.items()} if isinstance(d, Pieces) else d


def _parts(output: Any) -> Any:
    """What can carry a derivative: the tensor, or {position: part} of a tuple without its None and integer entries."""
    if isinstance(output, (tuple, list)):
        parts = {i: _parts(part) for i, part in enumerate(output)}
        return {i: part for i, part in parts.items() if part is not None}
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def _complete(parts: Any, d: Any) -> Any:
    """A derivative for each of ``parts``, zeros where nothing came back."""
    if isinstance(parts, Tensor):
        return torch.zeros_like(parts) if d is None else d
    return {i: _complete(part, (d or {}).get(i)) for i, part in parts.items()}
