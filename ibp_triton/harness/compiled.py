"""`training.compile`: a training step as one graph of inductor's, used only where it trains as the eager step does."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import ibp_triton as ibp
from ibp_triton.harness.batches import Batch

CHECKED = 3  # steps
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # of parameters, momenta and buffers, relative to the largest entry of each

State = dict[str, Tensor]


class EagerStep:
    """``step(method, batch)`` trains on one batch and returns the objective, 0-d, as it was before the update."""

    def __init__(self, network: ibp.Network, optimizer: torch.optim.SGD, factor: float = 1.0) -> None:
        self.network, self.optimizer, self.factor = network, optimizer, factor

    def __call__(self, method: Any, batch: Batch) -> Tensor:
        """One step."""
        self.optimizer.zero_grad()
        loss: Tensor = method(self.network, batch.x, batch.labels, tangents=batch.tangents)
        (loss if self.factor == 1.0 else loss * self.factor).backward()
        self.optimizer.step()
        return loss.detach()


class CompiledStep(EagerStep):
    """The same step as one compiled graph; batches of another shape than the recorded one, such as an epoch's last,
    run eagerly. β, ε and the learning rate may change, momentum and weight decay may not."""

    def __init__(self, eager: EagerStep, method: Any, batch: Batch, run: Any = None) -> None:
        super().__init__(eager.network, eager.optimizer, eager.factor)
        self._shape = batch.x.shape
        named = self.network.model.named_parameters()
        self._parameters = {name: p.detach() for name, p in named if p.requires_grad}
        self._momenta = momenta(self.network.model, self.optimizer)
        if run is None:
            graph = self._record(method, batch)
            run = torch.compile(graph, fullgraph=True, dynamic=False, options={"compile_threads": 1})
        self._run = run

    def on(self, eager: EagerStep, method: Any, batch: Batch) -> CompiledStep:
        """The same graph for another model and optimizer of the same kind."""
        return CompiledStep(eager, method, batch, self._run)

    def __call__(self, method: Any, batch: Batch) -> Tensor:
        """One step."""
        if batch.x.shape != self._shape:
            return super().__call__(method, batch)
        with torch.no_grad():
            loss: Tensor = self._run(self._parameters, self._momenta, *self._numbers(method), *_tensors(batch))
            return loss

    def _numbers(self, method: Any) -> tuple[Tensor, Tensor]:
        """What changes from epoch to epoch, as tensors, for numbers would be part of the graph."""
        strength = getattr(method, method.parameter) if method.parameter else 0.0
        return torch.tensor(strength), torch.tensor(self.optimizer.param_groups[0]["lr"])

    def _record(self, method: Any, batch: Batch) -> fx.GraphModule:
        """The step's tensor operations; the model is left as it was."""

        def step(parameters: State, buffers: State, strength: Tensor, rate: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
            chosen = replace(method, **{method.parameter: strength}) if method.parameter else method
            loss: Tensor
            loss, gradients = chosen.gradients(self.network, x, *rest, parameters=parameters)
            self._update(parameters, buffers, gradients, rate)
            return loss

        before = {name: value.clone() for name, value in self.network.model.named_buffers()}
        copies = [{name: value.clone() for name, value in state.items()} for state in (self._parameters, self._momenta)]
        with torch.no_grad():
            graph = make_fx(step)(*copies, *self._numbers(method), *_tensors(batch))
            for name, value in self.network.model.named_buffers():
                value.copy_(before[name])  # recording has run the step once
        return opaque(graph)

    def _update(self, parameters: State, buffers: State, gradients: State, rate: Tensor) -> None:
        """As torch.optim.SGD. Products stand alone: inductor loses alpha in ``v.mul(m).add(a @ b, alpha=…)``."""
        group = self.optimizer.param_groups[0]
        for name, parameter in parameters.items():
            change = gradients[name] * self.factor if self.factor != 1.0 else gradients[name]
            if group["weight_decay"]:
                change = change + group["weight_decay"] * parameter
            if name in buffers:
                change = buffers[name].mul_(group["momentum"]).add_(change * (1 - group["dampening"]))
            parameter.sub_(rate * change)


def momenta(model: nn.Module, optimizer: torch.optim.SGD) -> State:
    """The optimizer's buffers by parameter name."""
    found = {name: optimizer.state.get(p, {}).get("momentum_buffer") for name, p in model.named_parameters()}
    return {name: buffer for name, buffer in found.items() if buffer is not None}


def _tensors(batch: Batch) -> list[Tensor]:
    return [batch.x, batch.labels, *([] if batch.tangents is None else [batch.tangents])]


def compiled(eager: EagerStep, method: Any, batch: Batch, precision: str) -> EagerStep:
    """The compiled step, if copies of the model stay together over a few steps of either kind; else ``eager``.

    The model and its optimizer are left as they are; a warning says why the eager step stays.
    """
    try:
        trial = CompiledStep(_copy(eager), method, batch)
        off = _parity(_copy(eager), trial, method, batch)
        if off <= TOLERANCE[precision]:
            return trial.on(eager, method, batch)
        reason = f"the compiled step is off by {off:.2g} after {CHECKED} steps, more than {TOLERANCE[precision]:g}"
    except Exception as error:  # of torch's compilers or of the C++ compiler, whatever its type: training goes on
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    warnings.warn(f"training.compile: the run is trained by the eager step; {reason}", stacklevel=2)
    return eager


def _parity(plain: EagerStep, fast: CompiledStep, method: Any, batch: Batch) -> float:
    """How far parameters, buffers and momenta are apart after the same steps, eager and compiled."""
    worst = 0.0
    for number in range(CHECKED):
        for step in (plain, fast):
            torch.manual_seed(number)
            step(method, batch)
        found, expected = _state(fast), _state(plain)
        worst = max(worst, *(_distance(found[name], value) for name, value in expected.items()))
    return worst


def _copy(step: EagerStep) -> EagerStep:
    network, optimizer = step.network, step.optimizer
    model = copy.deepcopy(network.model)
    twin = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return EagerStep(ibp.Network(model, network.backend, network.dtype), twin, step.factor)


def _state(step: EagerStep) -> State:
    buffers = {f"momentum of {name}": buffer for name, buffer in momenta(step.network.model, step.optimizer).items()}
    return {name: value.detach() for name, value in step.network.model.state_dict().items()} | buffers


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest entry; infinite where a number is not finite."""
    off = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    return float(off.nan_to_num(nan=math.inf))


def opaque(graph: fx.GraphModule) -> fx.GraphModule:
    """Max-pools and sums added in place to slices stay operations of torch's.

    Inductor's own max-pools take 4.2 ms of a float32 step where torch's take 1.3 (MNIST network, batch 32), and it
    nests one select for each in-place sum: the sixteen of an image layer's data gradient become 29 MB of C++.
    """
    for node in list(graph.graph.nodes):
        if node.target in _kept():
            node.target = _kept()[node.target]
        elif node.target is torch.ops.aten.add_.Tensor and _is_slice(node.args[0]) and not node.kwargs:
            with graph.graph.inserting_before(node):
                graph.graph.call_function(torch.ops.ibp_triton.add_to.default, node.args)
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target is torch.ops.aten.copy_.default and _same(*node.args[:2]):
            node.replace_all_uses_with(node.args[0])  # what `a[rows] += b` ends with, of a slice to itself
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _is_slice(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is torch.ops.aten.slice.Tensor


def _same(a: Any, b: Any) -> bool:
    """Whether two views are equal slices of one tensor."""
    if a is b or not (_is_slice(a) and _is_slice(b)):
        return a is b
    return _same(a.args[0], b.args[0]) and a.args[1:] == b.args[1:]


_library = torch.library.Library("ibp_triton", "FRAGMENT")


@cache
def _kept() -> dict[Any, Any]:
    """Max-pools of torch's under names that inductor has no lowering for; their strides are those of the recording."""
    kept = {}
    for name in ("max_pool2d_with_indices", "max_pool2d_with_indices_backward"):
        operation = getattr(torch.ops.aten, name).default
        schema = str(operation._schema).removeprefix("aten::")
        _library.define(schema, tags=(torch.Tag.needs_exact_strides,))
        for key in ("CPU", "Meta"):
            _library.impl(name, operation, key)
        kept[operation] = getattr(torch.ops.ibp_triton, name).default
    _library.define("add_to(Tensor(a!) x, Tensor y) -> ()", tags=(torch.Tag.needs_exact_strides,))
    for key in ("CPU", "Meta"):
        _library.impl("add_to", _add_to, key)
    return kept


def _add_to(x: Tensor, y: Tensor) -> None:
    x.add_(y)
