"""Which rule a recorded call gets, and under which names its operands enter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch.utils._pytree import tree_flatten

from ibp_triton.backends.torch.generic import Generic
from ibp_triton.backends.torch.rules import candidate, rule_for
from ibp_triton.graph import Constant, Node, Ref


def choose(node: Node, nodes: list[Node], generic: bool = False) -> None:
    """Give the node a rule and its operands: a rule of its own where one covers the call, else the generic one."""
    if generic or not _own_rule(node, nodes):
        leaves = tree_flatten((node.args, node.kwargs))[0]
        node.rule, node.slots = Generic, [i for i, leaf in enumerate(leaves) if isinstance(leaf, Ref)]
        node.operands = {str(k): leaves[slot].index for k, slot in enumerate(node.slots)}


def has_rule(function: Any) -> bool:
    """Whether some calls of the function have a rule of their own."""
    return candidate(function) is not None


def _own_rule(node: Node, nodes: list[Node]) -> bool:
    rule = candidate(node.function)
    if rule is None:
        return False
    try:
        bound = _signature(rule.forward).bind(None, *node.args, **node.kwargs)
    except TypeError:
        return False
    bound.apply_defaults()
    arguments = dict(list(bound.arguments.items())[1:])
    tensors = dict(_named_tensors(arguments))
    operands = {name: ref.index for name, ref in tensors.items() if isinstance(ref, Ref)}
    if any(name.startswith(("args.", "kwargs.")) for name in operands) or _references(node) - {*operands.values()}:
        return False  # the rule would take for a constant what has a derivative
    kinds = {name: nodes[operands[name]].kind if name in operands else "constant" for name in tensors}
    node.rule = rule_for(node.function, kinds, arguments | arguments.get("kwargs", {}))
    node.operands = operands
    return node.rule is not None


@cache
def _signature(forward: Any) -> inspect.Signature:
    return inspect.signature(forward)


def _references(node: Node) -> set[int]:
    return {leaf.index for leaf in tree_flatten((node.args, node.kwargs))[0] if isinstance(leaf, Ref)}


def _named_tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Ref | Constant]]:
    for name, value in arguments.items():
        if isinstance(value, (Ref, Constant)):
            yield name, value
        elif isinstance(value, (tuple, list, dict)):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{name}.{i}", part) for i, part in parts if isinstance(part, (Ref, Constant)))
