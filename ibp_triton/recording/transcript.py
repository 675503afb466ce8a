"""What a recording has so far: its nodes in order, with what they computed, along the last recording."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ibp_triton.graph import Graph, Node
from ibp_triton.layer import Layer
from ibp_triton.recording.settings import Diverged


class Transcript:
    """Nodes, values and layers by position.

    Args:
        last: the last recording, whose nodes are used again as long as the calls are the same ones.
        keep: whether the values of activations are kept.
        strict: whether a call that is not the last recording's is refused.
    """

    def __init__(self, last: Graph | None, keep: bool, strict: bool) -> None:
        self.nodes: list[Node] = []
        self.values: list[Any] = []
        self.layers: list[Layer | None] = []
        self.passed: list[Any] = []  # calls that gave an argument back
        self.parameters: dict[str, int] = {}  # the position of each
        self.complex: set[int] = set()  # nodes whose numbers are
        self.following = last is not None
        self._last, self._keep, self._strict = last, keep, strict
        self._ahead = last.nodes if last is not None else []

    def followed(self, call: Any, passing: bool = False) -> Node | None:
        """The last recording's node at this place, if this is the same call; from the first difference on, none is.

        ``passing``: the call may turn out to give an argument back, and to be no node.

        Raises:
            Diverged: for another call than the last recording's, if that is strictly to be followed.
        """
        if not self.following:
            return None
        place = len(self.nodes)
        if place < len(self._ahead) and (node := self._ahead[place]).call == call:
            return node
        if self._strict and not (passing and self._last is not None and call in self._last.passed):
            raise Diverged
        self.following = False
        return None

    def append(self, node: Node, value: Any, layer: Layer | None) -> None:
        """The next node."""
        if isinstance(value, Tensor) and value.is_complex():
            self.complex.add(len(self.nodes))
        self.nodes.append(node)
        self.values.append(value if layer is None or self._keep or node.kind == "parametric" else None)
        self.layers.append(layer)

    def take_back(self, count: int, following: bool) -> None:
        """Let there be so many nodes again, and the last recording be followed if it was."""
        del self.nodes[count:], self.values[count:], self.layers[count:]
        self.following = following

    def kind(self, operands: Any) -> str:
        """Of what is computed from these nodes."""
        return "active" if any(self.nodes[i].kind == "active" for i in operands) else "parametric"

    def graph(self, output: int) -> Graph:
        """The last recording's graph where this one is the same, else a new one."""
        last = self._last
        if self.following and last is not None and len(self.nodes) == len(last.nodes) and output == last.output:
            return last
        return Graph(self.nodes, 0, output, {i: name for name, i in self.parameters.items()}, self.passed)
