"""The gradients of several replicas by one call under torch.func.vmap, which leaves the replicas as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ibp_triton.checks import check_labels
from ibp_triton.criteria import CrossEntropy, criterion_for
from ibp_triton.draws import Draws
from ibp_triton.errors import InputError, MethodError
from ibp_triton.methods.base import Method
from ibp_triton.methods.cost import none
from ibp_triton.randomness import RandomState
from ibp_triton.replicas import ReplicatedNetwork, Tensors, with_buffers


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of a step, one for all replicas, or with an axis of so many of them in front: ``each``."""

    x: Tensor
    y: Any
    tangents: Tensor | None
    extra: dict[str, Any]
    each: int | None = None

    def check(self) -> None:
        """Refuse what lacks the axis of replicas."""
        tensors = [a for a in tree_leaves(self.whole) if isinstance(a, Tensor)]
        if self.each is not None and any(a.dim() == 0 or len(a) != self.each for a in tensors):
            raise InputError(f"ReplicatedStep: each=True needs inputs [{self.each}, ...], one for each replica")

    @property
    def whole(self) -> tuple[Tensor, Any, Any, Any]:
        """As a step takes them."""
        return self.x, self.y, self.tangents, self.extra

    def of(self, r: int) -> tuple[Tensor, Any, Any, Any]:
        """One replica's."""
        x, y, tangents, extra = tree_map(lambda a: a[r] if self._has_axis(a) else a, self.whole)
        return x, y, tangents, extra

    def axes(self) -> tuple[Any, ...]:
        """Where each has its axis of replicas."""
        axes: tuple[Any, ...] = tree_map(lambda a: 0 if self._has_axis(a) else None, self.whole)
        return axes

    def spread(self, count: int) -> Inputs:
        """The same with an axis of replicas, as random numbers of its shape need one."""
        if self.each is not None:
            return self
        x, y, tangents, extra = tree_map(
            lambda a: a.expand(count, *a.shape) if isinstance(a, Tensor) else a, self.whole
        )
        return Inputs(x, y, tangents, extra, count)

    def _has_axis(self, a: Any) -> bool:
        return self.each is not None and isinstance(a, Tensor)


@dataclass(frozen=True, eq=False)
class Together:
    """What one call found for all replicas, [R, ...] each: parts, gradients, buffers and random states afterwards."""

    parts: Tensors
    gradients: Tensors
    buffers: Tensors
    states: Sequence[RandomState]


class Vmapped:
    """``vmapped(methods, inputs)`` is a ``Together``; it raises whatever torch's transforms can't do."""

    def __init__(self, network: ReplicatedNetwork) -> None:
        self.network = network
        self.draws = False  # whether the model or the method draws random numbers, as far as is known

    def __call__(self, methods: Sequence[Method], inputs: Inputs) -> Together:
        """Each replica's numbers, drawn as if it were alone; torch's own generator is left as it was."""
        before = RandomState.now([inputs.x])
        try:
            if not self.draws:
                try:
                    return Together(*self._run(methods, inputs, "error"), self.network.states)
                except RuntimeError as error:
                    if "randomness" not in str(error):
                        raise
                    self.draws = True
            with Draws(self.network.states, inputs.x) as draws:
                found = self._run(methods, inputs.spread(len(self.network)), "different")
                return Together(*found, draws.states())
        finally:
            before.restore()

    def _run(self, methods: Sequence[Method], inputs: Inputs, randomness: str) -> tuple[Tensors, Tensors, Tensors]:
        buffers = {name: b.clone() for name, b in self.network.buffers.items()}
        strengths = _strengths(methods, inputs.x)
        axes = (0, *(0 if tree else None for tree in (buffers, strengths)), *inputs.axes())

        def one(parameters: Tensors, buffers: Tensors, strengths: Tensors, *inputs: Any) -> Any:
            return _gradients(methods[0].at(**strengths), self.network, parameters, buffers, inputs)

        with torch.no_grad():
            every = torch.func.vmap(one, axes, randomness=randomness)
            found: tuple[Tensors, ...] = every(self.network.parameters, buffers, strengths, *inputs.whole)
        _check_labels(methods[0], inputs, found[0]["logits"])
        return found[0], found[1], found[2]


def _gradients(
    method: Method, network: ReplicatedNetwork, parameters: Tensors, buffers: Tensors, inputs: Any
) -> tuple[Tensors, Tensors, Tensors]:
    """One replica's parts, gradients of the parameters that take part, and buffers, by the first model's code."""
    x, y, tangents, extra = inputs
    with with_buffers(network.networks[0].model, buffers) as now:
        value, found, step = method.step(network.networks[0], x, y, tangents, parameters, extra)
        parts = method.parts_of(value, step)._asdict()
        taking_part = [n for n, p in step.own.items() if p.requires_grad and (n in step.used or n in found)]
        gradients = {n: found[n] if n in found else torch.zeros_like(parameters[n]) for n in taking_part}
        return {name: part for name, part in parts.items() if part is not None}, gradients, now()


def _check_labels(method: Method, inputs: Inputs, logits: Tensor) -> None:
    """As each replica would alone, where values can be looked at."""
    criterion = criterion_for(method.criterion)
    if not isinstance(criterion, CrossEntropy) or inputs.y.is_floating_point():
        return
    for y, z in [(inputs.y, logits[0])] if inputs.each is None else zip(inputs.y, logits, strict=True):
        check_labels(y, z, criterion.ignored)


def structure(method: Method) -> tuple[Any, ...]:
    """What methods share that can be trained together: their class and fields, of a strength whether it is 0."""
    values = ((field, getattr(method, field.name)) for field in fields(method))
    return type(method), *(none(value) if field.type == "Strength" else value for field, value in values)


def _strengths(methods: Sequence[Method], x: Tensor) -> Tensors:
    """The numbers in which they differ, [R] each, in float32 at least.

    Raises:
        MethodError: where they differ in more than a strength, or some have one that is 0 and so other passes.
    """
    first, found = methods[0], Tensors()
    if any(type(method) is not type(first) for method in methods):
        raise MethodError("the methods are of several kinds")
    for field in fields(first):
        values = [getattr(method, field.name) for method in methods]
        if all(_same(value, values[0]) for value in values):
            continue
        if field.type != "Strength" or any(none(value) for value in values):
            what = "some are 0" if field.type == "Strength" else "only strengths may be tensors"
            raise MethodError(f"the methods differ in {field.name}: {what}")
        dtype = torch.promote_types(x.dtype, torch.float32)
        found[field.name] = torch.stack([torch.as_tensor(v, dtype=dtype, device=x.device) for v in values])
    return found


def _same(a: Any, b: Any) -> bool:
    """Whether they are one object, or equal numbers or texts."""
    return a is b or (isinstance(a, (int, float, str)) and isinstance(b, (int, float, str)) and a == b)
