"""A method is its hyper-parameters and a recipe: a program of sweeps, read for value, gradient and cost alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ibp_triton.checks import check_batch, check_hyperparameters, check_labels, check_tangents
from ibp_triton.errors import InputTypeError, MethodError
from ibp_triton.forward import Trace
from ibp_triton.ledger import MultiplyAdds
from ibp_triton.methods.cost import Program, program
from ibp_triton.network import Network
from ibp_triton.objective import objective
from ibp_triton.recording.interface import check_extra
from ibp_triton.recording.snapshot import Snapshot
from ibp_triton.seeds import Seed
from ibp_triton.sweeps import Linear, Reverse, Term, weight_gradients

Recipe = Iterator[Any]  # first the objective, 0-d, mean over the batch, then the terms of its gradient


@dataclass(eq=False)
class Pass:
    """A forward pass, what the loss head gave, and the sweeps over it.

    ``losses`` [N], ``c`` [N, M] the loss's derivative with respect to the logits, ``p`` what H is made of.
    """

    head: Any
    trace: Trace
    losses: Tensor
    c: Tensor
    p: Tensor
    passing: bool = False  # no term reads this pass: its reverse sweep may use it up
    side: ClassVar[None] = None  # as a left side of g: the trace's own activations

    @property
    def logits(self) -> Tensor:
        """[N, M]."""
        return self.trace.logits

    @property
    def directions(self) -> torch.dtype:
        """The dtype of tangents."""
        return self.trace.input.dtype

    def reverse(self, seed: Any, bends: Sequence[tuple[Reverse, Linear]] = ()) -> Reverse:
        """δ from δ_K = seed (None: 0), plus the curvature along each of ``bends``, pairs (reverse, tangent)."""
        for _, t in bends:
            assert t.at_output is not None  # curvature reads the tangents of all layers
        start = seed.tensor if isinstance(seed, Seed) else seed
        return Reverse(self.trace, start, to_input=False, bends=bends, passing=self.passing)

    def tangent(self, seed: Any) -> Linear:
        """t from t_0 = seed, a ``Seed`` or tangents [N, ...] or [T, N, ...]."""
        return Linear(self.trace, seed.to(self.directions) if isinstance(seed, Tensor) else seed, to_output=False)

    def input_seed(self, d: Reverse, norm: float) -> tuple[Seed, Any]:
        """ψ(d_0) and ‖d_0‖_r^r / r."""
        return self.head.input_seed(d.at_input, norm)  # type: ignore[no-any-return]

    def tangent_seed(self, d: Reverse, tangents: Tensor, norm: float) -> tuple[Seed, Any]:
        """Σ_j ψ(⟨d_0, τ_j⟩) τ_j and Σ_j |⟨d_0, τ_j⟩|^r / r."""
        return self.head.tangent_seed(d.at_input, tangents.to(self.directions), norm)  # type: ignore[no-any-return]

    def output_seed(self, t: Linear, norm: float) -> tuple[Seed, Any]:
        """ψ(t_K) and ‖t_K‖_r^r / r."""
        return self.head.seed(t.at_output, norm)  # type: ignore[no-any-return]

    def hessian(self, t: Linear) -> Tensor:
        """H t_K."""
        return self.head.hessian_product(self.p, t.at_output)  # type: ignore[no-any-return]

    def fgsm(self, x: Tensor, d: Reverse, epsilon: Any) -> Tensor:
        """x + ε sign(d_0)."""
        return self.head.fgsm_step(x, d.at_input, epsilon)  # type: ignore[no-any-return]


def g(left: Pass | Linear, right: Reverse) -> Term:
    """The weight gradient of a reverse sweep with the activations of its pass, or with a linear sweep over it."""
    return Term(1, right.trace, right, left.side)


@dataclass(eq=False)
class Step:
    """One batch, as a recipe sees it: its tensors and the passes it can run."""

    network: Network
    x: Tensor
    labels: Tensor
    tangents: Tensor | None
    extra: Mapping[str, Any]
    parameters: Mapping[str, Tensor]
    program: Program
    used: set[str] = field(default_factory=set)  # the parameters that took part in a forward pass
    _passes: int = 0
    _start: Snapshot | None = None

    def objective(self, a: Pass, *parts: tuple[Any, Any]) -> Tensor:
        """Σ coefficient · Σ numbers, mean over the batch."""
        return a.head.objective(self.x.shape[0], *parts)  # type: ignore[no-any-return]

    def normal(self, *shape: int) -> Tensor:
        """A method's own standard normal numbers; drawn before the first forward pass."""
        return self._own(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        """A method's own numbers from [0, 1); drawn before the first forward pass."""
        return self._own(torch.rand, shape)

    def _own(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        if self._passes:
            raise MethodError("a recipe draws its own numbers before its first forward pass")
        return draw(shape, dtype=self.x.dtype, device=self.x.device)

    def classes(self) -> int:
        """The number of logits."""
        return self.network.classes(self.x, self.extra)

    def forward(self, x: Tensor | None = None) -> Pass:
        """At x, by default the batch's; later passes see the first one's random numbers, and buffers move only once."""
        if self._passes == 0 and self.program.passes > 1:
            self._start = Snapshot.of(self.network.model, self.x)
        first, self._passes = self._passes == 0, self._passes + 1
        x = self.x if x is None else x
        if first or self._start is None:
            return self._forward(x)
        with self._start.again(self.x):
            return self._forward(x)

    def _forward(self, x: Tensor) -> Pass:
        trace = self.network.forward(x, self.parameters, self.extra, frugal=not self.program.bends, keep=False)
        self.used.update(trace.graph.parameters.values())
        check_labels(self.labels, trace.logits)
        head = self.network.head(trace)
        passing = self._passes - 1 not in self.program.kept and not self.program.bends
        losses, c, p = head.cross_entropy(trace.logits, self.labels)
        return Pass(head, trace, losses, c, p, passing)


def _check_wrapped(network: Any) -> None:
    if not isinstance(network, Network):
        raise InputTypeError(
            f"the first argument is the wrapped model, not {type(network).__name__}: network = ibp.Network(model), "
            "once, then method(network, x, labels)"
        )


@dataclass(frozen=True)
class Method:
    """A training objective with its gradient. Call it as a loss: ``method(network, x, labels).backward()``."""

    key: ClassVar[str]
    title: ClassVar[str]
    parameter: ClassVar[str | None] = None
    needs_tangents: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def recipe(self, s: Step) -> Recipe:
        """The objective, mean over the batch, and then the terms of its gradient."""
        raise NotImplementedError

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
            labels: [N], integers from 0 to M − 1, in a tensor, an array or a list.
            tangents: [T, N, ...] tangent vectors, for tangent methods only (``lie_tangents``).
            extra: the other inputs of the model's forward by name, such as {"attention_mask": mask}: constants.

        Raises:
            TypeError, ValueError: for a wrong dtype, shape or value; the message names cause and cure.
        """
        _check_wrapped(network)
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
        value, found, _ = self.step(network, x, labels, tangents, parameters, extra)
        own = network.parameters()
        trainable = {name: (parameters or {}).get(name, p) for name, p in own.items() if p.requires_grad}
        return value, {n: found[n] if n in found else torch.zeros_like(p) for n, p in trainable.items()}

    def step(
        self, network: Network, x: Tensor, labels: Any, tangents: Any, parameters: Any, extra: Any
    ) -> tuple[Tensor, dict[str, Tensor], set[str]]:
        """The objective, the gradients of the parameters that it depends on, and those that took part in a pass."""
        with torch.no_grad():
            step = self._step(network, x, labels, tangents, parameters or {}, extra)
            recipe = self.recipe(step)
            value, terms = next(recipe), list(recipe)
            found = weight_gradients(terms, x.shape[0], self.program.bends)
        own = network.parameters()
        return value, {n: d.to((parameters or {}).get(n, own[n]).dtype) for n, d in found.items()}, step.used

    def value(
        self,
        network: Network,
        x: Tensor,
        labels: Tensor,
        tangents: Tensor | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The objective alone, 0-d, without the passes that only its gradient needs."""
        with torch.no_grad():
            step = self._step(network, x, labels, tangents, {}, extra)
            return next(self.recipe(step))  # type: ignore[no-any-return]

    def _step(self, network: Network, x: Tensor, labels: Any, tangents: Any, parameters: Any, extra: Any) -> Step:
        _check_wrapped(network)
        check_tangents(self.key, self.needs_tangents, x, tangents)
        numbers = check_batch(network.parameters(), network.dtype, x, labels, parameters)
        return Step(network, x.detach(), numbers, tangents, check_extra(extra), parameters, self.program)

    @cached_property
    def program(self) -> Program:
        """What the recipe does, read without a network."""
        return program(self.recipe, 5 if self.needs_tangents else 0)

    def cost(self, network: Network, input_shape: Sequence[int], tangents: int = 5) -> int:
        """Multiply-adds of one step on inputs [N, ...] of this shape."""
        return self.multiply_adds(network.multiply_adds(input_shape), tangents)

    def predicted_ratio(self, network: Network, input_shape: Sequence[int], tangents: int = 5) -> float:
        """Cost of one step over that of BP, in multiply-adds; BP skips its first layer's vjp."""
        work = network.multiply_adds(input_shape)
        return self.multiply_adds(work, tangents) / (work.forward + work.vjp_inner + work.weights)

    def multiply_adds(self, work: MultiplyAdds, tangents: int = 5) -> int:
        """Of the recipe's passes, added up; curved layers cost exact semantics up to a reverse sweep more."""
        found = self.program if tangents == 5 else program(self.recipe, tangents if self.needs_tangents else 0)
        return found.multiply_adds(work)

    @property
    def sweeps(self) -> int:
        """Cost in sweeps over the network (BP: 3), for five tangents where there are tangents."""
        return self.multiply_adds(MultiplyAdds(1, 1, 1, 1, 1, 1))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields(self))})"
