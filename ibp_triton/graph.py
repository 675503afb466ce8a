"""A model as nodes in order of evaluation: each torch function with its operands, their kinds and its rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_flatten

if TYPE_CHECKING:
    from ibp_triton.rules import Layer


@dataclass(frozen=True)
class Ref:
    """The value of another node, inside a call's arguments."""

    index: int


@dataclass(eq=False)
class Node:
    """One step of the forward pass. ``operands`` names the tensors a derivative may flow to: {name: node}."""

    index: int
    where: str
    kind: str
    function: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    rule: type[Layer] | None = None
    operands: dict[str, int] = field(default_factory=dict)
    slots: list[int] = field(default_factory=list)
    consumers: list[int] = field(default_factory=list)
    shares: bool = False  # an operand has other consumers too
    fused: set[str] = field(default_factory=set)  # what a backend's lowering makes this node do besides, or leave out
    settings: dict[str, Any] = field(default_factory=dict)  # and with which numbers

    @cached_property
    def _template(self) -> tuple[list[Any], list[tuple[int, int]]] | None:
        """The positional arguments and which of them are values of other nodes; None where references lie deeper."""
        refs = [(position, arg.index) for position, arg in enumerate(self.args) if isinstance(arg, Ref)]
        deep = tree_flatten((self.args, self.kwargs))[0]
        slices = any(isinstance(leaf, slice) for leaf in deep)
        return None if slices or sum(isinstance(leaf, Ref) for leaf in deep) > len(refs) else (list(self.args), refs)

    def arguments(self, values: list[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """The arguments of the call, with the values of the nodes they refer to."""
        if self._template is None:
            return _resolve(self.args, values), _resolve(self.kwargs, values)
        args, refs = list(self._template[0]), self._template[1]
        for position, index in refs:
            args[position] = values[index]
        return args, self.kwargs

    @property
    def label(self) -> str:
        """What the node does, for people."""
        if self.rule is not None and self.rule.label not in ("generic", "linear map", "reshape"):
            return self.rule.label
        function = self.function
        return getattr(function, "__name__", str(function)) if function is not None else self.kind


def _resolve(arguments: Any, values: list[Any]) -> Any:
    if isinstance(arguments, Ref):
        return values[arguments.index]
    if isinstance(arguments, slice):
        return slice(*(_resolve(part, values) for part in (arguments.start, arguments.stop, arguments.step)))
    if isinstance(arguments, dict):
        return {key: _resolve(value, values) for key, value in arguments.items()}
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(_resolve(part, values) for part in arguments)
    return arguments


class Plan:
    """What the sweeps do at each node when these parameter nodes are trainable."""

    def __init__(self, nodes: list[Node], trainable: frozenset[int], output: int) -> None:
        self.trainable = trainable
        self.moves: list[bool] = []  # whether a node depends on a trainable parameter
        for node in nodes:
            self.moves.append(node.index in trainable or any(self.moves[i] for i in node.operands.values()))
        # operands that enter the node's weight gradient, and whether there are any
        self.trains = [self._operands(nodes, node, "parametric", True) for node in nodes]
        self.takes = [bool(names) for names in self.trains]
        # active operands that get a derivative: without and with the input's own
        self.wants = {w: [self._operands(nodes, node, "active", not w) for node in nodes] for w in (False, True)}
        # whether a node's tangent reaches a layer that takes it: without and with the output
        self.needs = {to_output: self._needed(nodes, output, to_output) for to_output in (False, True)}

    def _operands(self, nodes: list[Node], node: Node, kind: str, moving: bool) -> list[str]:
        found = [(name, i) for name, i in node.operands.items() if nodes[i].kind == kind]
        return [name for name, i in found if self.moves[i] or not moving]

    def _needed(self, nodes: list[Node], output: int, to_output: bool) -> list[bool]:
        needed = [False] * len(nodes)
        needed[output] = to_output
        for node in reversed(nodes):
            if node.kind == "active" and (self.takes[node.index] or needed[node.index]):
                for index in node.operands.values():
                    needed[index] = True
        return needed


@dataclass(eq=False)
class Graph:
    """A model as nodes in order; ``input`` and ``output`` are positions, ``parameters`` maps position to name."""

    nodes: list[Node]
    input: int
    output: int
    parameters: dict[int, str]
    _plans: dict[frozenset[int], Plan] = field(default_factory=dict)

    def plan(self, trainable: frozenset[int]) -> Plan:
        """Made once for each set of trainable parameter nodes."""
        if trainable not in self._plans:
            self._plans[trainable] = Plan(self.nodes, trainable, self.output)
        return self._plans[trainable]

    @cached_property
    def last_uses(self) -> list[list[int]]:
        """For each node the active nodes whose value no later node reads (x and the logits are kept)."""
        last: dict[int, int] = {}
        for node in self.nodes:
            for leaf in tree_flatten((node.args, node.kwargs))[0]:
                for ref in (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,):
                    if isinstance(ref, Ref):
                        last[ref.index] = node.index
        found: list[list[int]] = [[] for _ in self.nodes]
        for index, user in last.items():
            if self.nodes[index].kind == "active" and index not in (self.input, self.output):
                found[user].append(index)
        return found
