"""From a torch.fx graph to nodes: functional, classified, each with its rule."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from ibp_triton.graph import Graph, Node, Ref
from ibp_triton.inplace import check_aliases, functional_call
from ibp_triton.rules import BatchNormTrain, Generic, ModuleCall, candidate, rule_for
from ibp_triton.tracing import InterfaceError, hooked

# active: depends on x; parametric: on parameters but not on x; constant: a tensor that depends on neither;
# static: sizes, dtypes, numbers
_STATIC_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad"}
_STATIC_METHODS = {"size", "dim", "numel", "ndimension", "stride", "is_contiguous", "element_size", "get_device"}
_STOPS = {"detach", "detach_", "data"}


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
            function, args, kwargs, target = functional_call(node, self.model)
            arguments = _refer((args, kwargs), current)
            current[node] = self._add(node, function, *arguments)
            if target is not None:
                check_aliases(node, target)
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
    name = attribute or ("" if isinstance(function, ModuleCall) else getattr(function, "__name__", ""))
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
