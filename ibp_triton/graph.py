"""Nodes in order of evaluation: each torch function of a model with its operands, their kinds and its rule."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from ibp_triton.rules import BatchNormTrain, Generic, Layer, ModuleCall, candidate, rule_for
from ibp_triton.tracing import InterfaceError, UntraceableError, hooked

# active: depends on x; parametric: on parameters but not on x; constant: a tensor that depends on neither;
# static: sizes, dtypes, numbers
_STATIC_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad"}
_STATIC_METHODS = {"size", "dim", "numel", "ndimension", "stride", "is_contiguous", "element_size", "get_device"}
_STOPS = {"detach", "detach_", "data"}


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
        if isinstance(function, ModuleCall):
            return type(function.module).__name__
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


class Builder:
    """Turns an fx graph into nodes: functional, classified, each with its rule."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.nodes = model, list[Node]()
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.by_parameter: dict[str, int] = {}
        self.parameters: dict[int, str] = {}
        self.input = -1

    def build(self, fx_graph: fx.Graph, model: nn.Module) -> Graph:
        """The whole graph; in-place operations become functional ones whose result replaces their target."""
        current: dict[fx.Node, Any] = {}
        for node in fx_graph.nodes:
            if node.op == "output":
                return self._finish(
                    tree_map(lambda a: current.get(a, a) if isinstance(a, fx.Node) else a, node.args[0])
                )
            function, args, kwargs, target = self._call(node)
            arguments = _refer((args, kwargs), current)
            current[node] = self._add(node, function, *arguments)
            if target is not None:
                _check_aliases(node, target)
                current[target] = current[node]
        raise AssertionError("an fx graph ends in its output")

    def whole(self) -> Graph:
        """The graph of a model that can't be traced: one node."""
        self._input()
        call = ModuleCall(self.model, "")
        self._append("", call, ({n: self.parameter(n) for n in self.names.values()}, Ref(self.input)), {})
        return self._finish(Ref(len(self.nodes) - 1))

    def _finish(self, output: Any) -> Graph:
        if not isinstance(output, Ref):
            raise InterfaceError(
                f"the model must return one tensor of logits [N, M], not {type(output).__name__}; "
                "wrap it in a module that picks the logits"
            )
        for node in self.nodes:
            for operand in dict.fromkeys(node.operands.values()):
                self.nodes[operand].consumers.append(node.index)
        for node in self.nodes:
            node.shares = any(len(self.nodes[operand].consumers) > 1 for operand in node.operands.values())
        return Graph(self.nodes, self.input, output.index, self.parameters)

    def _call(self, node: fx.Node) -> tuple[Any, Any, Any, fx.Node | None]:
        """The node as (function, args, kwargs, the node it changes in place or None)."""
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
            module = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
            function, in_place = node.target, bool(getattr(module, "inplace", False))
        return function, args, kwargs, _first(args, kwargs) if in_place else None

    def _add(self, node: fx.Node, function: Any, args: Any, kwargs: Any) -> Any:
        where = node.meta.get("where", "")
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return self._attribute(str(function), where)
        if node.op == "call_module":
            module = self.model.get_submodule(str(function))
            if _fixed_batch_norm(module):
                return self._batch_norm(module, str(function), args)
            held = {n: self._parameter_of(p) for n, p in module.named_parameters()}
            return self._append(str(function), ModuleCall(module, str(function)), (held, *args), kwargs)
        return self._append(where, function, args, kwargs)

    def _batch_norm(self, module: Any, path: str, args: Any) -> Ref:
        """Batch normalisation by running statistics, as the torch function it calls."""
        own = [self._attribute(f"{path}.{name}", path) for name in ("running_mean", "running_var")]
        affine = [self._parameter_of(p) if p is not None else None for p in (module.weight, module.bias)]
        return self._append(path, F.batch_norm, (*args, *own, *affine, False, 0.0, module.eps), {})

    def _placeholder(self, node: fx.Node) -> Any:
        if self.input >= 0:
            if node.args:
                return node.args[0]
            raise InterfaceError(f"the model's forward needs a second argument '{node.target}'; Network calls model(x)")
        return self._input()

    def _input(self) -> Ref:
        self.input = len(self.nodes)
        self.nodes.append(Node(self.input, "", "active"))
        return Ref(self.input)

    def _attribute(self, path: str, where: str) -> Ref:
        value = operator.attrgetter(path)(self.model)
        if isinstance(value, nn.Parameter):
            return self._parameter_of(value)
        self.nodes.append(Node(len(self.nodes), where, "constant", function=path))
        return Ref(len(self.nodes) - 1)

    def _parameter_of(self, parameter: nn.Parameter) -> Ref:
        return self.parameter(self.names[id(parameter)])

    def parameter(self, name: str) -> Ref:
        """The node of a parameter, one for all its uses."""
        if name not in self.by_parameter:
            index = self.by_parameter[name] = len(self.nodes)
            self.parameters[index] = name
            self.nodes.append(Node(index, name, "parametric"))
        return Ref(self.by_parameter[name])

    def _append(self, where: str, function: Any, args: Any, kwargs: Any) -> Ref:
        refs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Ref)]
        kind = _kind(function, args, [self.nodes[ref.index].kind for ref in refs])
        node = Node(len(self.nodes), where, kind, function, tuple(args), dict(kwargs))
        if kind in ("active", "parametric"):
            self._rule(node)
        self.nodes.append(node)
        return Ref(node.index)

    def _rule(self, node: Node) -> None:
        if not self._own_rule(node):
            node.rule = BatchNormTrain if _batch_norm(node.function) else Generic
            leaves = tree_flatten((node.args, node.kwargs))[0]
            node.slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Ref) and not self._static(leaf)]
            node.operands = {str(k): leaves[slot].index for k, slot in enumerate(node.slots)}

    def _own_rule(self, node: Node) -> bool:
        rule = candidate(node.function)
        if rule is None or isinstance(node.function, ModuleCall):
            return False
        try:
            bound = inspect.signature(rule.forward).bind(None, *node.args, **node.kwargs)
        except TypeError:
            return False
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        operands = {name: ref.index for name, ref in _named_refs(arguments) if not self._static(ref)}
        kinds = {name: self.nodes[index].kind for name, index in operands.items()}
        node.rule = rule_for(node.function, kinds, arguments | arguments.get("kwargs", {}))
        node.operands = operands
        return node.rule is not None

    def _static(self, ref: Ref) -> bool:
        return self.nodes[ref.index].kind == "static"


def _named_refs(arguments: dict[str, Any]) -> Iterator[tuple[str, Ref]]:
    for name, value in arguments.items():
        if isinstance(value, Ref):
            yield name, value
        elif isinstance(value, (tuple, list)):
            yield from ((f"{name}.{i}", part) for i, part in enumerate(value) if isinstance(part, Ref))


def _refer(arguments: Any, current: dict[fx.Node, Any]) -> Any:
    """The arguments with fx nodes replaced by references, fx's immutable containers by plain ones."""
    if isinstance(arguments, fx.Node):
        return current[arguments]
    if isinstance(arguments, slice):
        return slice(*(_refer(part, current) for part in (arguments.start, arguments.stop, arguments.step)))
    if isinstance(arguments, dict):
        return {key: _refer(value, current) for key, value in arguments.items()}
    if isinstance(arguments, (tuple, list)):
        parts = [_refer(part, current) for part in arguments]
        return parts if isinstance(arguments, list) else tuple(parts)
    return arguments


def _kind(function: Any, args: Any, kinds: list[str]) -> str:
    attribute = args[1] if function is getattr and len(args) > 1 else None
    name = attribute or getattr(function, "__name__", "")
    if attribute in _STATIC_ATTRIBUTES or name in _STATIC_METHODS:
        return "static"
    if name in _STOPS:
        return "constant"
    for kind in ("active", "parametric", "constant"):
        if kind in kinds:
            return kind
    return "static" if kinds and not isinstance(function, ModuleCall) else "constant"


def _batch_norm(function: Any) -> bool:
    """Whether this is a plain BatchNorm that uses the batch's own statistics."""
    return isinstance(function, ModuleCall) and _plain_batch_norm(function.module) and not _fixed(function.module)


def _fixed_batch_norm(module: nn.Module) -> bool:
    """Whether this is a plain BatchNorm, without hooks, that uses running statistics."""
    return _plain_batch_norm(module) and _fixed(module) and not hooked(module)


def _plain_batch_norm(module: nn.Module) -> bool:
    return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _fixed(module: Any) -> bool:
    return not module.training and module.running_mean is not None


_IN_PLACE_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
}


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


def _check_aliases(node: fx.Node, target: fx.Node) -> None:
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
