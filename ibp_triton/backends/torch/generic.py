"""Rules for any differentiable torch function, by torch's own autograd. Dearer than a rule of its own, and right.

The function is evaluated once, with a graph that belongs to the layer and goes with it; reverse and curvature are walks
over that graph, at autograd's price. The linear sweep is forward-mode autograd where that is the adjoint of reverse
mode, which is tried once: of operators of one's own it is zero, of some of torch's wrong. Under torch.func transforms,
where no graph can be kept, everything goes through torch.func.

Second derivatives are taken with grad mode on: torch picks formulas without a further derivative where it is off. They
are never a forward-mode tangent differentiated in reverse, which torch 2.13 gets silently wrong for some norm layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from ibp_triton import adjoint
from ibp_triton.backends.torch.functional import Functional
from ibp_triton.backends.torch.outputs import (
    carries_tangents,
    continuous,
    mapped,
    paired,
    positions,
    ranks,
    stacked,
    tensors,
    unbound,
)
from ibp_triton.layer import Layer, Names, Pieces, Tangents
from ibp_triton.randomness import RandomState
from ibp_triton.steady import Steady

_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_UPDATE_STATISTICS = (*(torch.nn.functional.batch_norm, torch.nn.functional.instance_norm), torch.batch_norm)


@dataclass(frozen=True, eq=False)
class Meeting:
    """What a derivative d and tangents t of one function give: J t, and ∇⟨Jᵀd, t⟩ by operands, absent where zero."""

    d: Any
    tangents: tuple[Tensor, ...]
    pushed: Any
    bent: dict[str, Tensor]


class Generic(Layer):
    """f by its own torch code. Operands are named "0", "1", … in the order of the flattened arguments."""

    label = "generic"
    unseen = False  # whether the function itself is unknown, and only its graph is there

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate once for real: random numbers are drawn, running statistics updated."""
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.slots = self.node.slots
        self.inputs = [self.leaves[slot] for slot in self.slots]
        self.wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in self.inputs)
        versions = [
            (leaf, leaf._version) for leaf in self.leaves if isinstance(leaf, Tensor) and not leaf.is_inference()
        ]
        before = RandomState.now(self.inputs)
        self.random: RandomState | None = None
        self.bendable: Any = None  # the output with a graph that has second derivatives, and the leaves of that
        self.meeting: Meeting | None = None
        if self.wrapped:
            with Steady(), sdpa_kernel(SDPBackend.MATH):  # of the attention kernels the one with batching rules
                self.output = self.node.function(*args, **kwargs)
        else:
            self.output = self._graphed()
        self.random = before if before.differs(RandomState.now(self.inputs)) else None
        self._keep_off([leaf for leaf, version in versions if leaf._version != version])
        return self.output

    def _graphed(self) -> Any:
        """The function at leaves of a graph of its own."""
        with torch.enable_grad():
            self.sources = [x.detach().requires_grad_() for x in self.inputs]
            self.graphed = self._call(self.sources)
        return mapped(self.graphed, lambda y: y.detach() if continuous(y) else y)

    def _call(self, inputs: Sequence[Tensor]) -> Any:
        leaves = list(self.leaves)
        for slot, value in zip(self.slots, inputs, strict=True):
            leaves[slot] = value
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.node.function(*args, **kwargs)

    def _keep_off(self, written: list[Tensor]) -> None:
        """Later evaluations shall leave alone what the function wrote to, as running statistics."""
        ids = {id(leaf) for leaf in written}
        if any(id(leaf) in ids for leaf in self.inputs):
            raise RuntimeError(
                f"{self.node.where}: {self.node.label} changes its input in place in a way that is not known here; "
                "work on a copy (x = x.clone()) before it"
            )
        norm = self.node.function in _UPDATE_STATISTICS  # without moving a tensor's version
        others = [i for i, leaf in enumerate(self.leaves) if i not in self.slots and isinstance(leaf, Tensor)]
        for i in others:
            self.leaves[i] = self.leaves[i].clone() if norm or id(self.leaves[i]) in ids else self.leaves[i]

    @property
    def differentiable(self) -> bool:
        """Whether the output depends on the operands in a way that has a derivative."""
        return self.wrapped or any(y.requires_grad for y in tensors(self.graphed))

    # ------------------------------------------------------------------------------------------ by the kept graph

    def vjp(self, d: Any, wanted: Names) -> dict[str, Tensor]:
        """The graph walked backwards; all operands at once, as a second call asks for the rest at the same d."""
        if self.wrapped:
            return self._functional.vjp(d, wanted, carries_tangents(d, self.output))
        if carries_tangents(d, self.output):
            found = [self._pull(part, list(wanted)) for part in unbound(d)]
            return {name: torch.stack([one[name] for one in found]) for name in wanted}
        if getattr(self, "_last", (None, None))[0] is not d:
            self._last = (d, self._pull(d, [str(i) for i in range(len(self.sources))]))
        return {name: self._last[1][name] for name in wanted}

    def _pull(self, d: Any, names: list[str]) -> dict[str, Tensor]:
        return self._pulled(self.graphed, self.sources, d, names)

    def _pulled(self, graphed: Any, roots: Any, d: Any, names: Any, create: bool = False) -> dict[str, Tensor]:
        outputs, seeds = paired(graphed, d)
        sources = [roots[int(name)] for name in names]
        if not outputs:
            return {name: torch.zeros_like(x) for name, x in zip(names, sources, strict=True)}
        found = _grad(outputs, sources, seeds, create_graph=create)
        if create and self.unseen:
            _refuse_cut(found)
        return dict(zip(names, found, strict=True))

    def jvp(self, t: Tangents) -> Any:
        """Forward-mode autograd, one tangent after the other; reverse mode twice where f has no forward mode."""
        names = sorted(t)
        tangents = [t[name] for name in names]
        if len(self.slots) > 1 and self._can_meet(names, tangents):
            try:
                return self._met(names, tangents, self._last[0]).pushed
            except (NotImplementedError, RuntimeError):
                pass  # no second derivative: forward mode may do without
        batched = tangents[0].dim() > self.inputs[int(names[0])].dim()
        rows = list(zip(*(tangent.unbind(0) for tangent in tangents), strict=True)) if batched else [tuple(tangents)]
        try:
            pushed = [self._pushed(names, row) for row in rows]
        except (NotImplementedError, RuntimeError):
            if self.wrapped:
                raise
            try:
                pushed = [self._walk(names, row, None, [])[0] for row in rows]
            except NotImplementedError as error:
                raise self._lacking(error) from error
        found = [Pieces(one) if isinstance(one, dict) else one for one in pushed]
        return stacked(found) if batched else found[0]

    def _pushed(self, names: list[str], tangents: Sequence[Tensor]) -> Any:
        """J t by forward mode; under transforms, where that is wrong, by reverse mode twice."""
        if self.node.pushes is None and adjoint.has_numbers(self.inputs):
            self.node.pushes = self._pushes_alone(names) if self.wrapped else self._pushes(names)
        if self.node.pushes is not False:
            return self._functional.jvp(names, tangents)
        if self.wrapped:
            return self._functional.jvp_by_reverse(names, tangents)
        raise NotImplementedError(f"torch has no right forward mode of {self.node.label}")

    def _pushes(self, names: list[str]) -> bool:
        """Whether forward mode is the adjoint of reverse mode, tried on a tangent that is nowhere zero."""
        tangents = [adjoint.some(self.inputs[int(name)]) for name in names]
        found = self._functional.jvp(names, tangents)
        pushed = [found] if isinstance(found, Tensor) else [*found.values()]
        pairs = [(y, p) for y, p in zip(tensors(self.graphed), pushed, strict=True) if y.requires_grad]
        return not pairs or self._is_adjoint(names, tangents, *map(list, zip(*pairs, strict=True)))

    def _pushes_alone(self, names: list[str]) -> bool:
        """The same outside all transforms, on the numbers of one of those that they join."""
        leaves = [_one(leaf) for leaf in self.leaves]
        before = RandomState.now([leaf for leaf in leaves if isinstance(leaf, Tensor)])
        with temporarily_clear_interpreter_stack(), before.again():
            alone = Generic(replace(self.node))
            args, kwargs = tree_unflatten(leaves, self.spec)
            alone.forward(*args, **kwargs)
            try:
                return alone._pushes(names)
            except (NotImplementedError, RuntimeError):
                return False

    def _can_meet(self, names: list[str], tangents: Sequence[Tensor]) -> bool:
        """Whether these are tangents of one vector, and a reverse sweep of one vector has passed."""
        one = all(t.dim() == self.inputs[int(name)].dim() for name, t in zip(names, tangents, strict=True))
        return one and not self.wrapped and getattr(self, "_last", None) is not None

    def _met(self, names: list[str], tangents: Sequence[Tensor], d: Any) -> Meeting:
        """By one walk back over the graph of Jᵀd, for both who ask for it."""
        if self.meeting is not None and self.meeting.d is d and _same(self.meeting.tangents, tangents):
            return self.meeting
        pushed, rest = self._walk(names, tangents, d, self.sources)
        bent = {str(i): part for i, part in enumerate(rest) if part is not None}
        self.meeting = Meeting(d, tuple(tangents), pushed, bent)
        return self.meeting

    def _walk(
        self, names: list[str], tangents: Sequence[Tensor], d: Any, more: Sequence[Tensor]
    ) -> tuple[Any, Sequence[Tensor | None]]:
        """⟨Jᵀu, t⟩ at u = d (None: 0) differentiated by u, which it is linear in, and by ``more`` (None: zero).

        The former is J t, which is checked.
        """
        outputs = {i: y for i, y in enumerate(tensors(self.graphed)) if y.requires_grad}
        known = {} if d is None else {0: d} if isinstance(self.graphed, Tensor) else ranks(self.graphed, d)
        with torch.enable_grad():
            seeds = [
                (torch.zeros_like(y) if known.get(i) is None else known[i].detach()).requires_grad_()
                for i, y in outputs.items()
            ]
            pulled = _grad(list(outputs.values()), [self.sources[int(n)] for n in names], seeds, create_graph=True)
            if self.unseen:
                _refuse_cut(pulled)
            moving = [(p, t) for p, t in zip(pulled, tangents, strict=True) if p.requires_grad]
            found: Sequence[Tensor | None] = [None] * (len(seeds) + len(more))
            if moving:
                sides = [list(side) for side in zip(*moving, strict=True)]
                found = torch.autograd.grad(sides[0], [*seeds, *more], sides[1], retain_graph=True, allow_unused=True)
        pushed = [torch.zeros_like(y) if p is None else p for p, y in zip(found, seeds, strict=False)]
        self._check(outputs, names, tangents, pushed)
        parts = dict(zip(outputs, pushed, strict=True))
        whole = parts[0] if isinstance(self.graphed, Tensor) else positions(self.graphed, parts)
        return whole, found[len(seeds) :]

    def _check(self, outputs: dict[int, Tensor], names: list[str], tangents: Any, pushed: list[Tensor]) -> None:
        """That the second derivative is right: once for a function of torch's, at every step for unseen code."""
        if (self.node.proven and not self.unseen) or not adjoint.has_numbers(self.inputs):
            return
        if not self._is_adjoint(names, tangents, list(outputs.values()), pushed):
            raise RuntimeError(f"torch has no right second derivative of {self.node.label}")
        self.node.proven = any(bool(t.any()) for t in tangents)

    def _is_adjoint(self, names: list[str], tangents: Any, outputs: list[Tensor], pushed: list[Tensor]) -> bool:
        """Whether that is J t."""
        seeds = [adjoint.some(y) for y in outputs]
        back = _grad(outputs, [self.sources[int(name)] for name in names], seeds)
        return adjoint.agrees(seeds, pushed, tangents, back)

    def _lacking(self, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"{self.node.where or 'the model'}: {self.node.label} has no second derivative, which this method needs "
            f"({error}); bp, at and fast_at work"
        )

    def tangent_param_vjp(self, t: Tangents, r: Any, wanted: Names) -> dict[str, Tensor]:
        """∇_w ⟨Jᵀ r, t⟩: a torch function is one layer, so both semantics agree."""
        return self._bend(t, r, wanted)

    def curvature(self, d: Any, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """∇_a ⟨Jᵀ d, t⟩."""
        return self._bend(t, d, wanted)

    def _bend(self, t: Tangents, d: Any, wanted: Names) -> dict[str, Tensor]:
        """∇_wanted ⟨Jᵀ d, t⟩, summed over tangents."""
        along, names = sorted(t), sorted(wanted)
        if self.wrapped:
            return self._functional.bend(t, d, wanted, forward=self.node.pushes is not False)
        tangents = [t[name] for name in along]
        if self._can_meet(along, tangents) and not carries_tangents(d, self.output):
            with suppress(NotImplementedError, RuntimeError):  # what is wrong is said below
                found = self._met(along, tangents, d).bent
                return {name: found[name] for name in names if name in found}
        batched = t[along[0]].dim() > self.inputs[int(along[0])].dim()
        rows = zip(*(t[name].unbind(0) for name in along), strict=True) if batched else [tuple(t[n] for n in along)]
        total: dict[str, Tensor] = {}
        for row, part in zip(rows, unbound(d) if batched else [d], strict=True):
            for name, bent in self._bent(along, row, part, names).items():
                total[name] = total[name] + bent if name in total else bent
        return total

    def _bent(self, along: list[str], tangents: Sequence[Tensor], d: Any, names: list[str]) -> dict[str, Tensor]:
        """Reverse over reverse, as ``create_graph=True`` does it; by other kernels where torch's have no second one."""
        if self.bendable is None:
            self.bendable = self.graphed, self.sources
        try:
            return self._bent_by(self.bendable[0], self.bendable[1], along, tangents, d, names)
        except (NotImplementedError, RuntimeError) as error:
            if "is not implemented" not in str(error) or self.bendable[0] is not self.graphed or self.unseen:
                raise self._lacking(error) from error
        replayed = nullcontext() if self.random is None else self.random.again()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), replayed:
            sources = [x.detach().requires_grad_() for x in self.inputs]
            self.bendable = self._call(sources), sources
        return self._bent(along, tangents, d, names)

    def _bent_by(self, graphed: Any, roots: Any, along: Any, tangents: Any, d: Any, names: Any) -> dict[str, Tensor]:
        with torch.enable_grad():
            pulled = self._pulled(graphed, roots, d, along, create=True)
            moving = [(pulled[n], t) for n, t in zip(along, tangents, strict=True) if pulled[n].requires_grad]
            if not moving:
                return {}
            sources = [roots[int(name)] for name in names]
            pairs = [list(side) for side in zip(*moving, strict=True)]
            found = torch.autograd.grad(pairs[0], sources, pairs[1], retain_graph=True, allow_unused=True)
        return {name: g for name, g in zip(names, found, strict=True) if g is not None}

    # ------------------------------------------------------------------------------------------------ once more

    def _again(self, *inputs: Tensor) -> Any:
        """The function of its operands, as often as needed, without side effects."""
        with nullcontext() if self.random is None else self.random.again(), Steady():
            return self._call(inputs)

    @property
    def _functional(self) -> Functional:  # made when asked for: kept, it would be a circle
        return Functional(self._again, self.inputs)

    def multiply_adds(self) -> int:
        """As torch's flop counter sees them, halved; it doesn't see recurrent layers."""
        if self.node.function in _RECURRENT:
            x, *others = self.inputs
            weights: int = sum(w.numel() for w in others if w.dim() == 2)
            return weights * (x.numel() // x.shape[-1])  # type: ignore[no-any-return]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self._again(*self.inputs)
        return counter.get_total_flops() // 2  # type: ignore[no-any-return]


def _grad(outputs: Any, sources: Any, seeds: Any, create_graph: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(
        outputs,
        sources,
        seeds,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return list(found)


def _refuse_cut(found: Sequence[Tensor]) -> None:
    """``once_differentiable`` leaves the graph of a derivative open, and autograd.grad takes that for zero."""
    done, todo = set(), [g.grad_fn for g in found]
    while todo:
        function: Any = todo.pop()
        if function is None or function in done:
            continue
        done.add(function)
        if function.name() in ("torch::autograd::Error", "torch::autograd::DelayedError"):
            raise RuntimeError("it is marked once_differentiable")
        todo += [edge[0] for edge in function.next_functions]


def _one(x: Any) -> Any:
    """A tensor's numbers without what transforms have put around them, the first of a batch of vmap's."""
    functorch = torch._C._functorch
    while isinstance(x, Tensor) and functorch.is_functorch_wrapped_tensor(x):
        axis = functorch.maybe_get_bdim(x)
        x = functorch.get_unwrapped(x)
        x = x.select(axis, 0) if axis >= 0 else x
    return x


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(one is other for one, other in zip(a, b, strict=True))
