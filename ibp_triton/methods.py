"""The seven methods, each a short recipe over the sweeps. Equations: arXiv 1502.04434v3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ibp_triton.checks import check_batch, check_hyperparameters, check_labels, check_tangents
from ibp_triton.errors import InputTypeError
from ibp_triton.interface import check_extra
from ibp_triton.ledger import MultiplyAdds
from ibp_triton.network import Network
from ibp_triton.objective import objective
from ibp_triton.snapshot import Snapshot
from ibp_triton.sweeps import Linear, Reverse, Sweep, Term, linear_sweep, reverse, weight_gradients
from ibp_triton.trace import Trace


@dataclass(eq=False)
class Pass:
    """A forward pass and what the loss head gave: per-sample losses [N], c [N, M], and p for H (softmax [N, M])."""

    head: Any
    trace: Trace
    losses: Tensor
    c: Tensor
    p: Tensor


@dataclass(eq=False)
class Step:
    """One batch, as a recipe sees it: its tensors and the passes it can run."""

    network: Network
    x: Tensor
    labels: Tensor
    tangents: Tensor | None
    extra: Mapping[str, Any]
    parameters: Mapping[str, Tensor]
    start: Snapshot | None = None  # the state before the first pass, for recipes with several forward passes
    value_only: bool = False
    frugal: bool = False  # whether sweeps may let go of what only exact semantics would read again
    used: set[str] = field(default_factory=set)  # the parameters that took part in a forward pass

    def objective(self, run: Pass, *parts: tuple[Any, Tensor]) -> Tensor:
        """Σ coefficient · Σ numbers, mean over the batch."""
        return run.head.objective(self.x.shape[0], *parts)  # type: ignore[no-any-return]

    def first_pass(self) -> Pass:
        """Forward at x."""
        return self._forward(self.x)

    def second_forward(self, x: Tensor) -> Pass:
        """Forward at another x, with the first pass's random numbers; buffers move only once."""
        assert self.start is not None
        with self.start.again(self.x):
            return self._forward(x)

    def _forward(self, x: Tensor) -> Pass:
        trace = self.network.forward(x, self.parameters, self.extra, frugal=self.frugal, keep=False)
        self.used.update(trace.graph.parameters.values())
        check_labels(self.labels, trace.logits)
        head = self.network.head(trace)
        return Pass(head, trace, *head.cross_entropy(trace.logits, self.labels))

    def second_pass(self, run: Pass, *, to_input: bool) -> Sweep:
        """The reverse sweep from c; one that stops short of the input runs along with the weight gradient it is for."""
        sweep = Reverse(run.trace, run.c, to_input=to_input)
        return sweep.run() if to_input else sweep


Recipe = tuple[Tensor, Sequence[Term]]  # the objective [], mean over the batch, and the terms of its gradient


@dataclass(frozen=True)
class Method:
    """A training objective with its gradient. Call it as a loss: ``method(network, x, labels).backward()``."""

    key: ClassVar[str]
    title: ClassVar[str]
    parameter: ClassVar[str | None] = None
    needs_tangents: ClassVar[bool] = False
    forward_passes: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def __call__(
        self,
        network: Network,
        x: Tensor,
        labels: Tensor,
        tangents: Tensor | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The objective, mean over the batch, as a 0-d tensor whose ``backward()`` adds the method's gradient to .grad.

        Args:
            network: the model, wrapped once.
            x: [N, ...] in the parameters' dtype (any dtype if the network has one of its own).
            labels: [N], integers from 0 to M − 1.
            tangents: [T, N, ...] tangent vectors, for tangent methods only (``lie_tangents``).
            extra: the other inputs of the model's forward by name, such as {"attention_mask": mask}: constants.

        Raises:
            TypeError, ValueError: for a wrong dtype, shape or value; the message names cause and cure.
        """
        return objective(self, network, x, labels, tangents, extra)

    def gradients(
        self,
        network: Network,
        x: Tensor,
        labels: Tensor,
        tangents: Tensor | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective and {parameter name: gradient}, without touching ``.grad``; arguments as in ``__call__``.

        A pure function of tensors (but for the running statistics of BatchNorm in train mode): it runs under
        torch.func.vmap over stacked ``parameters`` ({name: tensor}, the rest is the model's own), x, β and ε.
        """
        value, found, _ = self._gradients(network, x, labels, tangents, parameters, extra)
        own = network.parameters()
        trainable = {name: (parameters or {}).get(name, p) for name, p in own.items() if p.requires_grad}
        return value, {n: found[n] if n in found else torch.zeros_like(p) for n, p in trainable.items()}

    def _gradients(
        self, network: Network, x: Tensor, labels: Any, tangents: Any, parameters: Any, extra: Any
    ) -> tuple[Tensor, dict[str, Tensor], set[str]]:
        """The objective, the gradients of the parameters that it depends on, and those that took part in a pass."""
        labels = self._check(network, x, labels, tangents, parameters)
        with torch.no_grad():
            exact = getattr(self, "semantics", "paper") == "exact"
            start = Snapshot.of(network.model, x) if self.forward_passes > 1 else None
            step = Step(
                network, x.detach(), labels, tangents, check_extra(extra), parameters or {}, start, frugal=not exact
            )
            value, terms = self.recipe(step)
            found = weight_gradients(terms, x.shape[0], exact)
            own = network.parameters()
            return value, {n: g.to((parameters or {}).get(n, own[n]).dtype) for n, g in found.items()}, step.used

    def value(
        self,
        network: Network,
        x: Tensor,
        labels: Tensor,
        tangents: Tensor | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The objective alone, 0-d, without the passes that only its gradient needs."""
        labels = self._check(network, x, labels, tangents, None)
        with torch.no_grad():
            start = Snapshot.of(network.model, x) if self.forward_passes > 1 else None
            step = Step(network, x.detach(), labels, tangents, check_extra(extra), {}, start, value_only=True)
            return self.recipe(step)[0]

    def recipe(self, step: Step) -> Recipe:
        """The objective, mean over the batch, and the terms of its gradient."""
        raise NotImplementedError

    def cost(self, network: Network, input_shape: Sequence[int], tangents: int = 5) -> int:
        """Multiply-adds of one step on inputs [N, ...] of this shape."""
        return self.multiply_adds(network.multiply_adds(input_shape), tangents)

    def predicted_ratio(self, network: Network, input_shape: Sequence[int], tangents: int = 5) -> float:
        """Cost of one step over that of BP, in multiply-adds; BP skips its first layer's vjp."""
        work = network.multiply_adds(input_shape)
        return self.multiply_adds(work, tangents) / BP().multiply_adds(work, tangents)

    def multiply_adds(self, work: MultiplyAdds, tangents: int) -> int:
        """The method's passes, added up."""
        raise NotImplementedError

    @property
    def sweeps(self) -> float:
        """Cost in sweeps over the network (BP: 3), for five tangents where there are tangents."""
        return self.multiply_adds(MultiplyAdds(1, 1, 1, 1, 1, 1), 5)

    def _check(self, network: Network, x: Tensor, labels: Any, tangents: Any, parameters: Any) -> Tensor:
        """The labels as a tensor, if everything fits the network."""
        if not isinstance(network, Network):
            raise InputTypeError(
                f"the first argument is the wrapped model, not {type(network).__name__}: network = ibp.Network(model), "
                "once, then method(network, x, labels)"
            )
        check_tangents(self.key, self.needs_tangents, x, tangents)
        return check_batch(network.parameters(), network.dtype, x, labels, parameters or {})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields(self))})"


@dataclass(frozen=True, repr=False)
class BP(Method):
    """Standard backpropagation: minimises L."""

    key, title = "bp", "BP"

    def recipe(self, step: Step) -> Recipe:
        """g(a, d)."""
        run = step.first_pass()
        terms = [] if step.value_only else [Term(1, run.trace, step.second_pass(run, to_input=False))]
        return step.objective(run, (1, run.losses)), terms

    def multiply_adds(self, work: MultiplyAdds, tangents: int) -> int:
        """F + V + W, without the first layer's vjp."""
        return work.forward + work.vjp_inner + work.weights


@dataclass(frozen=True, repr=False)
class LossIBP(Method):
    """Loss IBP: minimises L + β ‖∇_x L‖_r^r / r (Eq. 8 of the paper and Algorithm 1)."""

    key, title, parameter = "loss_ibp", "Loss IBP", "beta"
    beta: float
    norm: float = 1
    semantics: str = "paper"

    def recipe(self, step: Step) -> Recipe:
        """g(a + βt, d) with t_0 = ψ(d_0); exact: and g(a, δ) with δ_K = H t_K."""
        run = step.first_pass()
        d = step.second_pass(run, to_input=True)
        seed, penalty = run.head.input_seed(_input(run, d), self.norm, not step.value_only)
        value = step.objective(run, (1, run.losses), (self.beta, penalty))
        return value, [] if step.value_only else _along_seed(run, d, seed, self.beta, self.semantics)

    def multiply_adds(self, work: MultiplyAdds, tangents: int) -> int:
        """F + V + J + W; exact: and a reverse sweep and another weight gradient."""
        if self.semantics == "exact":
            return work.forward + work.vjp + work.jvp + work.vjp_inner + 2 * work.weights
        return work.forward + work.vjp + work.jvp_inner + work.weights


@dataclass(frozen=True, repr=False)
class PredictionIBP(Method):
    """Prediction IBP: minimises L + β ‖J ∇_x L‖_r^r / r, J the Jacobian of the logits (Section 4 of the paper)."""

    key, title, parameter = "prediction_ibp", "Prediction IBP", "beta"
    beta: float
    norm: float = 1
    semantics: str = "paper"

    def recipe(self, step: Step) -> Recipe:
        """g(a, d) + β g(t, e) with t_0 = d_0, e_K = ψ(t_K); exact: and Loss IBP's exact term with seed e_0."""
        run = step.first_pass()
        d = step.second_pass(run, to_input=True)
        t = linear_sweep(run.trace, _input(run, d), to_output=True)
        e_K, penalty = run.head.seed(_output(run, t), self.norm, not step.value_only)
        value = step.objective(run, (1, run.losses), (self.beta, penalty))
        if step.value_only:
            return value, []
        exact = self.semantics == "exact"
        e = reverse(run.trace, e_K, to_input=True) if exact else Reverse(run.trace, e_K, to_input=False)
        terms = [Term(1, run.trace, d), Term(self.beta, run.trace, e, t)]
        if exact:
            s = linear_sweep(run.trace, _input(run, e), to_output=True)
            delta = run.head.hessian_product(run.p, _output(run, s))
            back = Reverse(run.trace, delta, to_input=False, bends=[(d, s), (e, t)])
            terms += [Term(self.beta, run.trace, d, s), Term(self.beta, run.trace, back)]
        return value, terms

    def multiply_adds(self, work: MultiplyAdds, tangents: int) -> int:
        """F + V + J + V + 2 W; exact: and another J, V and W (the fourth weight gradient merges)."""
        paper = work.forward + work.vjp + work.jvp + work.vjp_inner + 2 * work.weights
        if self.semantics == "exact":
            return paper + (work.vjp - work.vjp_inner) + work.jvp + work.vjp_inner + work.weights
        return paper


@dataclass(frozen=True, repr=False)
class AdversarialTraining(Method):
    """Adversarial Training: minimises (L(x) + L(x*)) / 2 at x* = x + ε sign(∇_x L), x* a constant."""

    key, title, parameter, forward_passes = "at", "Adversarial Training", "epsilon", 2
    epsilon: float

    def recipe(self, step: Step) -> Recipe:
        """½ g(a, d) + ½ g(a*, d*)."""
        run = step.first_pass()
        d = step.second_pass(run, to_input=True)
        other = step.second_forward(run.head.fgsm_step(step.x, _input(run, d), self.epsilon))
        value = step.objective(run, (0.5, run.losses), (0.5, other.losses))
        if step.value_only:
            return value, []
        d_star = step.second_pass(other, to_input=False)
        return value, [Term(0.5, run.trace, d), Term(0.5, other.trace, d_star)]

    def multiply_adds(self, work: MultiplyAdds, tangents: int) -> int:
        """Twice F + V + W; the second V without the first layer's."""
        return 2 * work.forward + work.vjp + work.vjp_inner + 2 * work.weights


@dataclass(frozen=True, repr=False)
class FastAdversarialTraining(Method):
    """Fast Adversarial Training: minimises L(x*) at x* = x + ε sign(∇_x L), x* a constant."""

    key, title, parameter, forward_passes = "fast_at", "Fast AT", "epsilon", 2
    epsilon: float

    def recipe(self, step: Step) -> Recipe:
        """g(a*, d*)."""
        run = step.first_pass()
        d = step.second_pass(run, to_input=True)
        other = step.second_forward(run.head.fgsm_step(step.x, _input(run, d), self.epsilon))
        terms = [] if step.value_only else [Term(1, other.trace, step.second_pass(other, to_input=False))]
        return step.objective(run, (1, other.losses)), terms

    def multiply_adds(self, work: MultiplyAdds, tangents: int) -> int:
        """F + V, then F + V + W."""
        return 2 * work.forward + work.vjp + work.vjp_inner + work.weights


@dataclass(frozen=True, repr=False)
class TangentBP(Method):
    """Tangent BP (Simard et al. 1992): minimises L + β Σ_j ‖J τ_j‖_r^r / r."""

    key, title, parameter, needs_tangents = "tbp", "Tangent BP", "beta", True
    beta: float
    norm: float = 1
    semantics: str = "paper"

    def recipe(self, step: Step) -> Recipe:
        """g(a, d) + β Σ_j g(t^j, e^j) with t^j_0 = τ_j, e^j_K = ψ(t^j_K); exact: and g(a, η) of curved layers."""
        run = step.first_pass()
        t = linear_sweep(run.trace, _seed(run, step.tangents), to_output=True)
        e_K, penalty = run.head.seed(_output(run, t), self.norm, not step.value_only)
        value = step.objective(run, (1, run.losses), (self.beta, penalty))
        if step.value_only:
            return value, []
        d = step.second_pass(run, to_input=False)
        e = Reverse(run.trace, e_K, to_input=False)
        terms = [Term(1, run.trace, d), Term(self.beta, run.trace, e, t)]
        if self.semantics == "exact":
            terms.append(Term(self.beta, run.trace, Reverse(run.trace, None, to_input=False, bends=[(e, t)])))
        return value, terms

    def multiply_adds(self, work: MultiplyAdds, tangents: int) -> int:
        """F + V + W and J + V + W for each tangent (curved layers in exact semantics: up to V + W more)."""
        return work.forward + work.vjp_inner + work.weights + tangents * (work.jvp + work.vjp_inner + work.weights)


@dataclass(frozen=True, repr=False)
class FastTangentBP(Method):
    """Fast Tangent BP: minimises L + β Σ_j |⟨∇_x L, τ_j⟩|^r / r, all tangents in one collapsed seed."""

    key, title, parameter, needs_tangents = "fast_tbp", "Fast Tangent BP", "beta", True
    beta: float
    norm: float = 1
    semantics: str = "paper"

    def recipe(self, step: Step) -> Recipe:
        """g(a + βt, d) with t_0 = Σ_j ψ(⟨d_0, τ_j⟩) τ_j; exact: and g(a, δ) with δ_K = H t_K."""
        run = step.first_pass()
        d = step.second_pass(run, to_input=True)
        tau = _seed(run, step.tangents)
        seed, penalty = run.head.tangent_seed(_input(run, d), tau, self.norm, not step.value_only)
        value = step.objective(run, (1, run.losses), (self.beta, penalty))
        return value, [] if step.value_only else _along_seed(run, d, seed, self.beta, self.semantics)

    def multiply_adds(self, work: MultiplyAdds, tangents: int) -> int:
        """As Loss IBP: one pass for all tangents."""
        return LossIBP(0.0, semantics=self.semantics).multiply_adds(work, tangents)


def _along_seed(run: Pass, d: Sweep, seed: Tensor, beta: Any, semantics: str) -> list[Term]:
    """Terms of L + β ⟨d_0, seed⟩: paper g(a + βt, d); exact also g(a, δ), the change of d along the seed."""
    exact = semantics == "exact"
    t = linear_sweep(run.trace, seed, to_output=True) if exact else Linear(run.trace, seed, to_output=False)
    terms = [Term(1, run.trace, d), Term(beta, run.trace, d, t)]
    if exact:
        delta = run.head.hessian_product(run.p, _output(run, t))
        terms.append(Term(beta, run.trace, Reverse(run.trace, delta, to_input=False, bends=[(d, t)])))
    return terms


def _seed(run: Pass, tangents: Tensor | None) -> Tensor:
    assert tangents is not None  # checked before the step began
    return tangents.to(run.trace.input.dtype)


def _input(run: Pass, sweep: Sweep) -> Tensor:
    """The derivative with respect to x, zero where the logits do not depend on it."""
    d_0 = sweep[run.trace.graph.input]
    return torch.zeros_like(run.trace.input) if d_0 is None else d_0


def _output(run: Pass, sweep: Sweep) -> Tensor:
    """The tangent of the logits."""
    t_K = sweep[run.trace.graph.output]
    return torch.zeros_like(run.trace.logits) if t_K is None else t_K


METHODS: dict[str, type[Method]] = {
    method.key: method
    for method in (BP, LossIBP, PredictionIBP, AdversarialTraining, FastAdversarialTraining, TangentBP, FastTangentBP)
}
