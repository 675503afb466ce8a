"""What is asked of each model: the methods agree with the oracle, and the oracle with the objective's own slope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.stateless import _reparametrize_module

import ibp_triton as ibp
from ibp_triton.backends.torch.generic import Generic
from ibp_triton.recording.choice import has_rule
from ibp_triton.recording.interface import Interface
from ibp_triton.reference_modes import Unrounded
from tests.library.comparing import error
from tests.zoo.models import Case

EXACT = ibp.LossIBP(0.3, 2, "exact")
STEPS = (1e-4, 1e-5, 1e-6, 1e-7)


def methods() -> list[ibp.Method]:
    """BP, both semantics of Loss IBP and of Tangent BP, and Fast AT."""
    return [
        *(ibp.BP(), ibp.LossIBP(0.3), EXACT, ibp.TangentBP(0.3, 2), ibp.TangentBP(0.3, 2, "exact")),
        ibp.FastAdversarialTraining(0.1),
    ]


class Judged:
    """A model with one batch, the state that every evaluation starts from, and the ways to evaluate it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model, self.x, self.labels, self.tau = case.build()
        self.network, self.extra = case.wrapped(self.model), case.extra()
        with torch.no_grad():
            self._logits(self.x)  # some make their buffers when they first see a size
        self.buffers = {name: b.clone() for name, b in self.model.named_buffers()}

    def reset(self) -> None:
        """Buffers and random numbers as at the start."""
        for name, b in self.model.named_buffers():
            b.copy_(self.buffers[name])
        torch.manual_seed(5)

    def ours(self, method: ibp.Method) -> tuple[Tensor, dict[str, Tensor]]:
        """The sweeps' loss and gradient."""
        self.reset()
        return method.gradients(self.network, self.x, self.labels, self._tangents(method), extra=self.extra)

    def oracle(self, method: ibp.Method) -> tuple[Tensor, dict[str, Tensor]]:
        """The oracle's."""
        self.reset()
        return ibp.reference.gradients(
            self.model, method, self.x, self.labels, self._tangents(method), self.extra, self.network.interface
        )

    def _tangents(self, method: ibp.Method) -> Tensor | None:
        return self.tau if method.needs_tangents else None

    def left_behind(self, method: ibp.Method | None) -> tuple[dict[str, Tensor], Tensor]:
        """Buffers and random state after one step, or after a plain forward pass."""
        if method is None:
            self.reset()
            with torch.no_grad():
                self._logits(self.x)
        else:
            self.ours(method)
        return {name: b.clone() for name, b in self.model.named_buffers()}, torch.get_rng_state()

    def _logits(self, x: Tensor) -> Tensor:
        interface: Interface = self.network.interface
        return interface.pick(interface.call(self.model, x, self.extra))

    def objective(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """L + β/2 ‖∇ₓL‖², as one writes it by hand: differentiable in the parameters."""
        self.reset()
        x = self.x.clone().requires_grad_()
        with (
            _reparametrize_module(self.model, dict(parameters), tie_weights=True),
            Unrounded(),  # torch has no second derivative of hardsigmoid
            sdpa_kernel(SDPBackend.MATH),
        ):
            loss = F.cross_entropy(self._logits(x), self.labels, reduction="sum")
            (d_0,) = torch.autograd.grad(loss, x, create_graph=True)
        total: Tensor = (loss + EXACT.beta * d_0.square().sum() / 2) / len(x)
        return total

    def by_hand(self) -> dict[str, Tensor]:
        """∇ of the objective by differentiating twice."""
        leaves = {n: p.detach().clone().requires_grad_() for n, p in trainable(self.model).items()}
        with sdpa_kernel(SDPBackend.MATH):
            value = self.objective(leaves)
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    def slope_error(self, gradient: Mapping[str, Tensor]) -> float:
        """The gradient against finite differences of the objective along one direction, at the best of the steps."""
        start = {name: p.detach() for name, p in trainable(self.model).items()}
        generator = torch.Generator().manual_seed(3)
        way = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in start.items()}
        length = sum(float(part.square().sum()) for part in way.values()) ** 0.5
        way = {name: part / length for name, part in way.items()}
        slope = sum(float((gradient[name] * way[name]).sum()) for name in way)
        best = float("inf")
        for h in STEPS:
            up, down = (float(self.objective({n: start[n] + s * h * way[n] for n in start}).detach()) for s in (1, -1))
            best = min(best, abs((up - down) / (2 * h) - slope) / abs(slope))
            if best < 1e-7:
                break
        return best


def judge(case: Case) -> None:
    """Everything that is asked of a model."""
    judged = Judged(case)
    for method in methods():
        loss, found = judged.ours(method)
        expected_loss, expected = judged.oracle(method)
        assert abs(float(loss / expected_loss) - 1) < case.tolerance, method
        assert error(found, expected) < case.tolerance, method
    exact = judged.oracle(EXACT)[1]
    assert error(exact, judged.by_hand()) < case.tolerance
    if not case.sloped and not case.single:
        assert judged.slope_error(exact) < 1e-5
    _same_traces(judged)
    assert "multiply-adds" in judged.network.summary()
    assert avoidable(judged.network) == []


def _same_traces(judged: Judged) -> None:
    """A step leaves the buffers and the random numbers as a plain forward pass does; Fast AT runs a second pass."""
    buffers, state = judged.left_behind(None)
    for method in (EXACT, ibp.FastAdversarialTraining(0.1)):
        found, after = judged.left_behind(method)
        assert torch.equal(state, after), method
        for name, b in buffers.items():
            torch.testing.assert_close(found[name], b, rtol=1e-9, atol=1e-12)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take part."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def generic(network: ibp.Network) -> dict[str, int]:
    """{function: calls} of what had no rule of its own in the last forward pass."""
    graph: Any = network.graph()
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.rule is not None and issubclass(node.rule, Generic):
            found[node.label] = found.get(node.label, 0) + 1
    return found


def avoidable(network: ibp.Network) -> list[str]:
    """Activations' functions that went through the generic rule though a rule of their own covers such calls."""
    graph: Any = network.graph()
    return [
        node.label
        for node in graph.nodes
        if node.rule is Generic and node.kind == "active" and has_rule(node.function)
        if not node.call[3]  # complex numbers have no rules of their own
    ]
