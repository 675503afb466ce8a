"""Whole training steps, gradient and SGD with momentum: eager, compiled, captured, and whether they train alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import ibp_triton as ibp
from ibp_triton.alike import rounded
from ibp_triton.bench.by_hand import autograd
from ibp_triton.bench.candidates import METHODS, Case, network_of
from ibp_triton.bench.parity import apart
from ibp_triton.errors import BenchError

CHECKED = 4  # steps
State = dict[str, Tensor]
BY_HAND = ("eager", "compiled")
STEPS: dict[str, type[ibp.EagerStep]] = {
    "eager": ibp.EagerStep,
    "compiled": ibp.CompiledStep,
    "captured": ibp.CapturedStep,
}


@dataclass(frozen=True)
class Trainee:
    """A step that updates ``parameters`` and ``momenta`` in place and returns the objective, 0-d."""

    step: Callable[[], Tensor]
    parameters: State
    momenta: State


def momenta(model: torch.nn.Module, optimizer: torch.optim.SGD) -> State:
    """The optimizer's buffers by parameter name."""
    return {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}


def optimizer_of(model: torch.nn.Module, rate: float = 0.1) -> torch.optim.SGD:
    """As the harness trains, momenta from 0."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, dampening=0.9, foreach=False)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def ours(case: Case, method: str | ibp.Method, kind: str, rate: float = 0.1, moved: int | None = None) -> Trainee:
    """The library's step of a kind of ``STEPS``; with ``moved``, a seed, from parameters a few last bits away.

    Raises:
        BenchError: for a compiled step that would not be used.
    """
    chosen = METHODS[method] if isinstance(method, str) else method
    model, (x, labels, tau) = case.model(), case.data()
    if moved is not None:
        _move(model, 4 * torch.finfo(case.dtype or torch.float32).eps, moved)
    batch = (x, labels, tau if chosen.needs_tangents else None)
    optimizer = optimizer_of(model, rate)
    step = STEPS[kind](network_of(case, model), chosen, optimizer)
    if isinstance(step, ibp.CompiledStep) and not step.prepare(*batch):
        raise BenchError(f"{case.name}: the compiled step of {chosen} is not used; its warning says why")
    return Trainee(lambda: step(*batch).loss, dict(model.named_parameters()), momenta(model, optimizer))


def by_hand_step(case: Case, method: str | ibp.Method, kind: str, rate: float = 0.1) -> Trainee:
    """The same step as one would write it, of a kind of ``BY_HAND``; compiled as one function without a graph break.

    Compiled, it switches torch's ``trace_autograd_ops`` on and its threads of compilers off, for this whole process.
    """
    model = case.model()
    optimizer, gradients = optimizer_of(model, rate), autograd(case, method, model)
    parameters: State = dict(model.named_parameters())
    buffers = momenta(model, optimizer)

    def eager() -> Tensor:
        value, found = gradients()
        for name, parameter in parameters.items():
            parameter.grad = found[name]
        optimizer.step()
        return value

    def whole() -> Tensor:
        value, found = gradients()
        with torch.no_grad():
            for name, parameter in parameters.items():  # the product stands alone: inductor would lose an alpha
                parameter.sub_(rate * buffers[name].mul_(0.9).add_(found[name] * (1 - 0.9)))
        return value

    if kind == "eager":
        return Trainee(eager, parameters, buffers)
    import torch._dynamo as dynamo  # takes seconds
    import torch._inductor.config as inductor

    dynamo.config.trace_autograd_ops = True  # asked anew at every call
    inductor.compile_threads = 1  # children of this process, so that their time counts
    return Trainee(torch.compile(whole, fullgraph=True, dynamic=False), parameters, buffers)


def _move(model: torch.nn.Module, by: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(rounded(p, by, generator))


def off_twin(found: Trainee, expected: Trainee) -> float:
    """How far parameters and momenta are apart after each of a few steps, relative to the largest entry of each."""
    worst = 0.0
    for _ in range(CHECKED):
        found.step()
        expected.step()
        for a, b in ((found.parameters, expected.parameters), (found.momenta, expected.momenta)):
            worst = max(worst, *(apart({n: a[n].detach()}, {n: b[n].detach()}) for n in b if b[n].any()))
    return worst
