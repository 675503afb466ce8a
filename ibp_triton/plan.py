"""Who takes part in which sweep, when some of the parameters are trainable."""

from __future__ import annotations

from functools import cached_property

from ibp_triton.graph import Graph, Node


class Plan:
    """What the sweeps do at each node when these parameter nodes are trainable."""

    def __init__(self, graph: Graph, trainable: frozenset[int]) -> None:
        self.graph, self.trainable = graph, trainable
        nodes = graph.nodes
        self.moves: list[bool] = []  # whether a node depends on a trainable parameter
        for node in nodes:
            self.moves.append(node.index in trainable or any(self.moves[i] for i in node.operands.values()))
        # operands that enter the node's weight gradient, and whether there are any
        self.trains = [self._operands(nodes, node, "parametric", True) for node in nodes]
        self.takes = [bool(names) for names in self.trains]
        self.taken = [any(self.takes[user] for user in users) for users in graph.consumers]  # by one that reads a node
        # active operands that get a derivative: without and with the input's own
        self.wants = {w: [self._operands(nodes, node, "active", not w) for node in nodes] for w in (False, True)}
        # whether a node's tangent reaches a layer that takes it: without and with the output
        self.needs = {to_output: self._needed(nodes, graph.output, to_output) for to_output in (False, True)}

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

    @cached_property
    def last(self) -> dict[bool, list[list[int]]]:
        """For each node the trainable parameters that none after it takes: in reverse order, and in forward order.

        Not those that others are computed from, whose gradients come at the end.
        """
        found: dict[bool, list[list[int]]] = {forward: [[] for _ in self.graph.nodes] for forward in (False, True)}
        for i in sorted(self.trainable):
            users = self.graph.consumers[i]
            if users and all(self.graph.nodes[user].kind == "active" for user in users):
                found[False][users[0]].append(i)
                found[True][users[-1]].append(i)
        return found
