"""A model as nodes in order of evaluation: each torch function with its operands, their kinds and its rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ibp_triton.layer import Layer


@dataclass(frozen=True)
class Ref:
    """The value of another node, inside a call's arguments."""

    index: int


@dataclass(frozen=True)
class Constant:
    """A tensor that depends on no input or parameter, inside a call's arguments: whichever the call brings."""


@dataclass(eq=False)
class Node:
    """One step of the forward pass. ``operands`` names the tensors a derivative may flow to: {name: node}.

    ``kind`` is active (depends on x) or parametric (on parameters alone). ``call`` is what must be equal for the next
    step's call to be the same node again. A node holds no tensor.
    """

    index: int
    where: str
    kind: str
    function: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    rule: type[Layer] | None = None
    operands: dict[str, int] = field(default_factory=dict)
    slots: list[int] = field(default_factory=list)
    call: Any = None
    proven: bool = False  # torch's second derivative of this function has been checked
    pushes: bool | None = None  # whether torch's forward mode of it is right, None before it has been checked
    observed: bool = False  # the model reads its numbers otherwise than through its consumers
    fused: set[str] = field(default_factory=set)  # what a backend's lowering makes this node do besides, or leave out
    settings: dict[str, Any] = field(default_factory=dict)  # and with which numbers
    sloped_by: int | None = None  # an earlier node by whose layer's slope this one's reverse multiplies besides

    @property
    def label(self) -> str:
        """What the node does, for people."""
        if self.rule is not None and self.rule.label not in ("generic", "linear map", "reshape", "autograd"):
            return self.rule.label
        function = self.function
        return getattr(function, "__name__", str(function)) if function is not None else self.kind


@dataclass(eq=False)
class Graph:
    """A model as nodes in order; ``input`` and ``output`` are positions, ``parameters`` maps position to name.

    ``passed``: the calls that gave an argument back, as a dropout does that is off; they are no nodes.
    """

    nodes: list[Node]
    input: int
    output: int
    parameters: dict[int, str]
    passed: list[Any] = field(default_factory=list)

    @cached_property
    def computes_parameters(self) -> bool:
        """Whether weights are computed from parameters, so that what a step's data say may take part in it."""
        return any(node.kind == "parametric" and node.operands for node in self.nodes)

    @cached_property
    def active(self) -> list[Node]:
        """Those that depend on x, in order."""
        return [node for node in self.nodes if node.kind == "active"]

    @cached_property
    def heavy(self) -> bool:
        """Whether a layer keeps what is larger than its operands and result, and BP does not."""
        return any(node.rule is not None and node.rule.heavy for node in self.nodes)

    @cached_property
    def watched(self) -> bool:
        """Whether hooks of the model shall see derivatives."""
        return any(node.rule is not None and node.rule.watched for node in self.nodes)

    @cached_property
    def consumers(self) -> list[list[int]]:
        """For each node those that read its value, in order, each once."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for operand in dict.fromkeys(node.operands.values()):
                found[operand].append(node.index)
        return found

    def only_consumer(self, node: Node) -> Node | None:
        """The node that reads a node's value, if it is the only one and the model does not look at the value itself."""
        readers = self.consumers[node.index]
        if len(readers) != 1 or node.index == self.output or node.observed:
            return None
        return self.nodes[readers[0]]

    @cached_property
    def reads(self) -> list[frozenset[str]]:
        """For each node the names of the parameters whose numbers it, or what it is computed from, takes."""
        found: list[frozenset[str]] = []
        for node in self.nodes:
            own = {self.parameters[node.index]} if node.index in self.parameters else set()
            parametric = [i for i in node.operands.values() if self.nodes[i].kind == "parametric"]
            found.append(frozenset(own.union(*(found[i] for i in parametric))))
        return found

    @cached_property
    def last_uses(self) -> list[list[int]]:
        """For each node the active nodes whose value no later node reads (x and the logits are kept)."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for index, users in enumerate(self.consumers):
            if users and self.nodes[index].kind == "active" and index not in (self.input, self.output):
                found[users[-1]].append(index)
        return found
