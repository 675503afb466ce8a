"""How a pass runs: reverse, linear and curvature sweeps over a trace, and the weight gradients.

Sweeps are pure functions of tensors. What a sweep saves belongs to its Trace and is never overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ibp_triton import head
from ibp_triton.errors import MethodError
from ibp_triton.forward import Trace
from ibp_triton.graph import Node
from ibp_triton.layer import Layer, Pieces, Share, compact, is_one, scaled, summed
from ibp_triton.seeds import Seed, numbers
from ibp_triton.tape import Tape, added

if TYPE_CHECKING:
    from typing_extensions import Self


LARGE = 8 << 20  # bytes


class Freed:
    """What a sweep let go of: no derivative, and not zero either."""

    def __repr__(self) -> str:
        return "freed"


FREED = Freed()


class Sweep(list[Any]):
    """A derivative or tangent for each node, None where there is none, FREED where it was let go of.

    ``run()`` fills it. One that has not run yet may enter the terms of a weight gradient: it then runs along with it,
    each node's sides being used while they are in the cache, and let go of before the next node's are made.
    """

    trace: Trace
    forward = False  # the order of nodes in which it runs
    done = False

    def advance(self, node: Node) -> None:
        """Pass one active node."""
        raise NotImplementedError

    def run(self) -> Self:
        """Pass all nodes now."""
        self.done = True
        for node in self.trace.graph.active if self.forward else reversed(self.trace.graph.active):
            self.advance(node)
        return self

    def at(self, index: int) -> Any:
        """What the sweep has at a node.

        Raises:
            MethodError: where it has been let go of.
        """
        found = self[index]
        if found is FREED:
            where = self.trace.graph.nodes[index].where or "the input"
            raise MethodError(f"a recipe reads a sweep at {where} after it was used up: read it before its terms are")
        return found


class Reverse(Sweep):
    """Second pass: δ_{i−1} = f~_i(δ_i) from δ_K = ``d`` [N, M] or [T, N, M].

    Args:
        trace: the forward pass whose masks and values are used.
        d: the derivative of the output.
        to_input: whether the input's own derivative is wanted; without it the first layer's vjp is skipped.
        bends: pairs (reverse sweep r, linear sweep t); each adds curvature_i(r_i, t_{i−1}) to δ_{i−1}.
        bent_by: that often, a number or a 0-d tensor.
        passing: nothing else will read the forward pass: its layers are let go of one by one.
    """

    def __init__(
        self,
        trace: Trace,
        d: Tensor | None,
        *,
        to_input: bool,
        bends: Sequence[tuple[Sweep, Sweep]] = (),
        bent_by: Any = 1,
        passing: bool = False,
    ) -> None:
        super().__init__([None] * len(trace.graph.nodes))
        self.trace, self.to_input, self.bends, self.passing = trace, to_input, bends, passing
        self.bent_by = bent_by
        self.start = d  # before it was rounded to the logits' dtype
        self[trace.graph.output] = d

    @property
    def at_input(self) -> Tensor:
        """The derivative with respect to x; runs the sweep. Zero where the logits do not depend on it."""
        if not self.done:
            self.to_input = True
            self.run()
        if not self.to_input:
            raise MethodError("a recipe reads the input's derivative of a sweep that ran without it: read it first")
        d_0 = self.at(self.trace.graph.input)
        return torch.zeros_like(self.trace.input) if d_0 is None else d_0

    def advance(self, node: Node) -> None:
        """The node's vjp, added to the derivatives of its operands."""
        trace, index = self.trace, node.index
        layer, wanted = trace.layers[index], trace.plan.wants[self.to_input][index]
        if layer is None:
            return
        if trace.shards is not None:
            trace.reach(node)
        keeps = trace.frugal and self.done and trace.plan.takes[index]  # a weight gradient reads d when this has run
        own = self.at(index) if wanted else None
        pulled = {}
        if own is not None:
            own = compact(own) if keeps else own
            pulled = layer.vjp(own, wanted)
            self._receive(node, pulled)
        for r, t in self.bends if wanted else ():
            tangents, side = _tangents_of(node, t), r.at(index)
            if side is not None and tangents:
                self._receive(node, _times(layer.curvature(side, tangents, wanted), self.bent_by))
        if trace.frugal:
            layer.let_go_of_bends()
            if not keeps:
                self[index] = FREED
            elif own is not None:
                self[index] = layer.condensed(own, pulled)
                _spare(trace, node, layer)
        if self.passing:
            trace.layers[index] = None

    def _receive(self, node: Node, parts: Mapping[str, Any]) -> None:
        for name, part in parts.items():
            index = node.operands[name]
            self[index] = summed(self[index], part)


class Linear(Sweep):
    """Third pass: t_i = f~~_i(t_{i−1}) from t_0 = ``t`` [N, ...] or [T, N, ...], no biases, the first pass's masks.

    Without ``to_output`` layers after the last trainable one are skipped, and the last one's own jvp is.
    """

    forward = True

    def __init__(self, trace: Trace, t: Tensor | Seed, *, to_output: bool) -> None:
        super().__init__([None] * len(trace.graph.nodes))
        self.trace, self.to_output = trace, to_output
        self[trace.graph.input] = numbers(t)

    @property
    def side(self) -> Linear:
        """As a left side of g: the sweep itself."""
        return self

    @property
    def at_output(self) -> Tensor:
        """The tangent of the logits; runs the sweep. Zero where they do not depend on x."""
        if not self.done:
            self.to_output = True
            self.run()
        if not self.to_output:
            raise MethodError("a recipe reads the logits' tangent of a sweep that ran without it: read it first")
        t_K = self.at(self.trace.graph.output)
        return torch.zeros_like(self.trace.logits) if t_K is None else t_K

    def advance(self, node: Node) -> None:
        """The node's jvp of its operands' tangents."""
        trace, plan = self.trace, self.trace.plan
        layer = trace.layers[node.index]
        if layer is None:
            return
        if trace.shards is not None:
            trace.reach(node)
        if plan.needs[self.to_output][node.index]:
            tangents = _tangents_of(node, self)
            if tangents:
                self[node.index] = layer.jvp(tangents)
        if trace.frugal:
            for index in trace.graph.last_uses[node.index]:
                if not (self.done and plan.taken[index]):  # no weight gradient reads t when this has run
                    self[index] = FREED


def reverse(trace: Trace, d: Tensor | None, *, to_input: bool, bends: Sequence[tuple[Sweep, Sweep]] = ()) -> Sweep:
    """The second pass, run: see ``Reverse``."""
    return Reverse(trace, d, to_input=to_input, bends=bends).run()


def linear_sweep(trace: Trace, t: Tensor, *, to_output: bool) -> Sweep:
    """The third pass, run: see ``Linear``."""
    return Linear(trace, t, to_output=to_output).run()


def _spare(trace: Trace, node: Node, layer: Layer) -> None:
    """Let go of numbers that the layer before can make anew."""
    if layer.spared is None or trace.shards is not None:  # in pieces, another layer's parameters may be away by then
        return
    source = _again(trace, node.operands[layer.spared], node)
    if source is not None:
        layer.spare(source)


def _again(trace: Trace, index: int, reader: Node) -> Callable[[], Tensor] | None:
    """What makes a node's value anew for its only reader."""
    node, layer = trace.graph.nodes[index], trace.layers[index]
    if layer is None or trace.graph.consumers[index] != [reader.index]:
        return None
    if layer.follows:
        source = _again(trace, node.operands["input"], node)
        return None if source is None else layer.after(source)
    if layer.dear and not (trace.lean and (trace.graph.heavy or _large(layer.input))):
        return None
    return layer.again()


def _large(x: Tensor) -> bool:
    """Whether memory is what a map costs: no cache holds it from one sweep to the next."""
    return x.numel() * x.element_size() >= LARGE


def _times(parts: dict[str, Any], factor: Any) -> dict[str, Any]:
    return parts if is_one(factor) else {name: scaled(part, factor) for name, part in parts.items()}


def _tangents_of(node: Node, sweep: Sweep) -> dict[str, Any]:
    return {name: t for name, i in node.operands.items() if (t := sweep.at(i)) is not None}


@dataclass(eq=False)
class Term:
    """coefficient · g(left, right): the weight gradient of a sweep.

    Without ``tangents`` the left side is the trace's activations (biases included); with them it is the linear sweep,
    and the term is ∇_w ⟨right_i, Df_i(a; w)[t]⟩ for every layer.
    """

    coefficient: Any
    trace: Any  # a Trace, or a Tape
    right: Any  # a reverse sweep over it
    tangents: Sweep | None = None

    def __rmul__(self, coefficient: Any) -> Term:
        """The same, that often."""
        return replace(self, coefficient=coefficient if is_one(self.coefficient) else coefficient * self.coefficient)


def g(left: Any, right: Any) -> Term:
    """The weight gradient of a reverse sweep with the activations of its pass, or with a linear sweep over it."""
    return Term(1, right.trace, right, left.side)


Made = Callable[[str, Tensor], None]


def weight_gradients(terms: Sequence[Term], batch: int, made: Made | None = None) -> dict[str, Tensor]:
    """Sum of the terms divided by ``batch``: {parameter name: gradient}, of each trainable parameter in the graphs.

    Sweeps that have not run do so here, in one order. Bilinear layers get all their products at once and merge those
    that share a right side (see ``Bilinear.merged``). Frugal traces and their sweeps are used up. Passes that took
    different ways through the model are summed up one by one. ``made`` gets the gradients that are whole before the
    end, each when it is, and the result lacks them.
    """
    groups: dict[int, list[Term]] = {}
    for term in terms:
        alone = isinstance(term.trace, Tape) or term.trace.graph.computes_parameters
        groups.setdefault(id(term.trace if alone else term.trace.graph), []).append(term)
    if not groups:
        return {}
    *first, last = groups.values()
    found = added([_of_group(group, batch, None) for group in first])
    return added([found, _of_group(last, batch, None if made is None else _after(found, made))])


def _after(earlier: dict[str, Tensor], made: Made) -> Made:
    """``made`` of sums, with what there already is, and no longer after that."""

    def both(name: str, d: Tensor) -> None:
        made(name, earlier.pop(name) + d if name in earlier else d)

    return both


def _of_group(terms: Sequence[Term], batch: int, made: Made | None) -> dict[str, Tensor]:
    trace = terms[0].trace
    return trace.gradients(terms, made) if isinstance(trace, Tape) else _gradients(terms, batch, made)


def _gradients(terms: Sequence[Term], batch: int, made: Made | None) -> dict[str, Tensor]:
    """``weight_gradients`` of terms that share a graph."""
    trace = terms[0].trace
    graph, layers, trains, means = trace.graph, trace.layers, trace.plan.trains, dict[int, Any]()
    running = [
        *{id(s): s for term in terms for s in (term.right, term.tangents) if s is not None and not s.done}.values()
    ]
    forward, missing = _direction(running), set(trace.plan.trainable)
    frugal = terms if trace.frugal else ()
    alone = made is None and trace.shards is None  # nobody else reads a gradient before all are there
    with (trace.head if alone else head).sums_together() as sums:
        for node in graph.active if forward else reversed(graph.active):
            wanted = trains[node.index]
            if trace.shards is not None:
                trace.reach(node)
            if wanted:
                _collect(means, node, _of_layer(terms, node, wanted, batch), sums)
            if made is not None:
                missing -= _whole(trace, trace.plan.last[forward][node.index], means, made)
            for term in frugal:
                _let_go(term, node, forward)
            for sweep in running:
                sweep.advance(node)
            for term in frugal:
                term.trace.layers[node.index] = None
    for sweep in running:
        sweep.done = True
    if graph.nodes[graph.output].kind == "parametric":  # logits in which x has no part: no layer passed them on
        means |= _at_the_output(terms, batch)
    for node in reversed(graph.nodes) if graph.computes_parameters else ():
        wanted, layer = trains[node.index], layers[node.index]
        if node.kind == "parametric" and layer is not None and wanted and node.index in means:
            if trace.shards is not None:
                trace.reach(node)
            parts = layer.vjp(_like(means.pop(node.index), trace.values[node.index]), wanted)
            _collect(means, node, parts, sums)
    means |= {i: torch.zeros_like(trace.values[i]) for i in missing if i not in means}
    return {graph.parameters[i]: mean for i, mean in sorted(means.items())}


def _at_the_output(terms: Sequence[Term], batch: int) -> dict[int, Tensor]:
    """The derivative by the logits themselves, as a mean over the samples; tangents move nothing there."""
    logits, index = terms[0].trace.logits, terms[0].trace.graph.output
    starts = [(term.coefficient, term.right.at(index)) for term in terms if term.tangents is None]
    parts = [scaled(d.sum(0) if d.dim() > logits.dim() else d, c) for c, d in starts if d is not None]
    return {index: sum(parts[1:], parts[0]) / batch} if parts else {}


def _whole(trace: Trace, found: Sequence[int], means: dict[int, Any], made: Made) -> set[int]:
    """Pass on the gradients of parameters of which no later node has a part."""
    for i in found:
        made(trace.graph.parameters[i], means.pop(i) if i in means else torch.zeros_like(trace.values[i]))
    return set(found)


def _direction(sweeps: Collection[Sweep]) -> bool:
    """Whether the sweeps that run along with a weight gradient go forward.

    Raises:
        MethodError: for two that go in different directions.
    """
    kinds = {sweep.forward: type(sweep).__name__ for sweep in sweeps}
    if len(kinds) > 1:
        raise MethodError(
            "the terms of a recipe bring a reverse and a linear sweep that have not run, and these can't run in one "
            "order: read .at_output of the linear or .at_input of the reverse one before the terms"
        )
    return any(kinds)


def _let_go(term: Term, node: Node, forward: bool) -> None:
    """Forget of the sweeps that have run what no later node's weight gradient reads."""
    if term.right.done:
        term.right[node.index] = FREED
    if term.tangents is not None and term.tangents.done:
        for index in node.operands.values():
            if term.trace.graph.consumers[index][-1 if forward else 0] == node.index:
                term.tangents[index] = FREED


def _of_layer(terms: Sequence[Term], node: Node, wanted: list[str], batch: int) -> dict[str, Any]:
    """The terms' gradient with respect to the operands of one layer."""
    shares = []
    for term in terms:
        layer, right = term.trace.layers[node.index], term.right.at(node.index)
        tangents = None if term.tangents is None else _tangents_of(node, term.tangents)
        if layer is not None and right is not None and tangents != {}:
            shares.append(Share(term.coefficient, layer, right, tangents))
    return shares[0].layer.weight_gradient(shares, wanted, batch) if shares else {}


def _like(d: Any, value: Any) -> Any:
    """A derivative in the dtype of the value it belongs to."""
    if isinstance(d, Pieces):
        return Pieces({k: _like(v, value[k]) for k, v in d.items()})
    return d.to(value.dtype)


def _collect(means: dict[int, Any], node: Node, parts: Mapping[str, Any], sums: Callable[[], None]) -> None:
    """Add each part to its operand's sum, in float32 at least; ``sums``: makes what can't be read yet."""
    for name, part in parts.items():
        index = node.operands[name]
        if index in means:
            sums()
        means[index] = summed(means.get(index), scaled(part, 1))
