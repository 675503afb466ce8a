"""Operations that work in place: their functional forms, and the views through which their effect would show."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ibp_triton.tracing import UntraceableError

_IN_PLACE_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
}


def functional_call(node: fx.Node, model: nn.Module) -> tuple[Any, Any, Any, fx.Node | None]:
    """The node as (function, args, kwargs, the node it changes in place or None).

    Raises:
        UntraceableError: for a function without a functional form.
    """
    args, kwargs = node.args, dict(node.kwargs)
    if node.op == "call_method":
        name = str(node.target)
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and not hasattr(torch.Tensor, name[:-1]):
            raise UntraceableError(node.meta.get("where", ""), f"Tensor.{name} works in place")
        function: Any = getattr(torch.Tensor, name[:-1] if in_place else name)
    elif node.op == "call_function":
        function, in_place = _functional(node)
        in_place = in_place or bool(kwargs.pop("inplace", False)) or _in_place_argument(node)
    else:
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        function, in_place = node.target, bool(getattr(module, "inplace", False))
    return function, args, kwargs, _first(args, kwargs) if in_place else None


def _functional(node: fx.Node) -> tuple[Callable[..., Any], bool]:
    """The functional form of a function, and whether the function itself works in place."""
    function: Any = node.target
    if function in _IN_PLACE_OPERATORS:
        return _IN_PLACE_OPERATORS[function], isinstance(node.args[0], fx.Node)
    name = getattr(function, "__name__", "")
    if function is operator.setitem or (name.endswith("_") and not name.endswith("__")):
        plain = getattr(torch, name[:-1], None) or getattr(torch.nn.functional, name[:-1], None)
        if function is operator.setitem or plain is None:
            raise UntraceableError(node.meta.get("where", ""), f"{name} works in place")
        return plain, True
    return function, False


def _in_place_argument(node: fx.Node) -> bool:
    """Whether a positional ``inplace`` argument is True."""
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    position = names.index("inplace") if "inplace" in names else len(node.args)
    return position < len(node.args) and bool(node.args[position])


def _first(args: Any, kwargs: Any) -> fx.Node | None:
    first = args[0] if args else kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


_VIEWS = {
    *("view", "reshape", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "expand", "getitem", "chunk"),
    *("split", "narrow", "select", "unbind", "contiguous", "detach", "ravel", "swapaxes", "movedim", "view_as", "t"),
    *("to", "float", "double", "diagonal", "expand_as", "reshape_as", "unflatten", "tensor_split", "unfold", "getattr"),
}


def _views(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and str(name) in _VIEWS


def check_aliases(node: fx.Node, target: fx.Node) -> None:
    """Refuse an in-place operation whose effect shows through a view that is used later."""
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    relatives = {target}
    grown = True
    while grown:
        grown = False
        for other in node.graph.nodes:
            if other not in relatives and _views(other) and other.args and other.args[0] in relatives:
                relatives.add(other)
                grown = True
        for other in list(relatives):
            if _views(other) and isinstance(other.args[0], fx.Node) and other.args[0] not in relatives:
                relatives.add(other.args[0])
                grown = True
    for other in relatives - {target}:
        if order[other] < order[node] and any(order[user] > order[node] for user in other.users):
            raise UntraceableError(node.meta.get("where", ""), "an in-place operation shows through a view")
