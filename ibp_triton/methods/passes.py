"""One batch as a recipe sees it: forward passes, the sweeps over them, and which of them are autograd's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ibp_triton import head
from ibp_triton.criteria import Criterion, CrossEntropy, Loss
from ibp_triton.errors import MethodError, ModelError
from ibp_triton.head import Head
from ibp_triton.layer import HALF
from ibp_triton.methods.cost import Program, none
from ibp_triton.network import Network
from ibp_triton.recording.snapshot import Snapshot
from ibp_triton.seeds import Seed
from ibp_triton.sweeps import Linear, Reverse, Term, g
from ibp_triton.tape import UNFORESEEN, Backward, Climb, CurvedTape, Descent, Tape

Recipe = Iterator[Any]  # first the objective, 0-d, mean over the batch, then the terms of its gradient


@dataclass(eq=False)
class Pass:
    """A forward pass, the criterion at its logits, and the sweeps over it.

    Per sample throughout: ``c`` is ∂ℓ/∂z of each, and a seed comes with the weights N κ_n of the samples in it.
    """

    head: Head
    trace: Any  # a Trace, or a Tape where no tangent is asked for
    loss: Loss
    passing: bool = False  # no term reads this pass: its reverse sweep may use it up
    side: ClassVar[None] = None  # as a left side of g: the trace's own activations

    @property
    def logits(self) -> Tensor:
        """[N, M]."""
        return self.trace.logits  # type: ignore[no-any-return]

    @property
    def losses(self) -> Tensor:
        """N κ_n ℓ_n, [N]."""
        return self.counted(self.loss.losses)

    @property
    def c(self) -> Tensor:
        """∂ℓ_n/∂z_n of each sample, in the logits' shape, float32 of float16 ones; zero for one that does not count."""
        return self.loss.c

    def counted(self, u: Tensor, rank: int | None = None) -> Tensor:
        """N κ_n u_n for u [N, ...], or [T, N, ...] beyond ``rank`` axes: u itself where all samples count alike."""
        weights = self._weights(u.dim() if rank is None else rank)
        return u if weights is None else (weights * u).to(u.dtype)

    def _weights(self, rank: int) -> Tensor | None:
        """N κ_n as [N, 1, ...]."""
        weights = self.loss.weights
        return None if weights is None else weights.view(-1, *[1] * (rank - 1))

    @property
    def _tangent_dtype(self) -> torch.dtype:
        return self.trace.input.dtype  # type: ignore[no-any-return]

    def reverse(self, seed: Any, bends: Sequence[tuple[Reverse, Linear]] = (), bent_by: Any = 1) -> Any:
        """δ from δ_K = seed (None: 0), plus ``bent_by`` times the curvature along ``bends``, of (reverse, tangent)."""
        for _, t in bends:
            assert t.at_output is not None  # curvature reads the tangents of all layers
        start = seed.tensor if isinstance(seed, Seed) else seed
        sweep: Any
        if isinstance(self.trace, CurvedTape):
            sweep = Climb(self.trace, start)
        elif isinstance(self.trace, Tape):
            sweep = Backward(self.trace, start)
        else:
            own = start if start is None else start.to(self.logits.dtype)
            sweep = Reverse(self.trace, own, to_input=False, bends=bends, bent_by=bent_by, passing=self.passing)
        sweep.start = start
        return sweep

    def tangent(self, seed: Any) -> Linear:
        """t from t_0 = seed, a ``Seed`` or tangents [N, ...] or [T, N, ...]."""
        if isinstance(self.trace, Tape):
            raise MethodError(UNFORESEEN)
        return Linear(self.trace, seed.to(self._tangent_dtype) if isinstance(seed, Tensor) else seed, to_output=False)

    @property
    def curved(self) -> bool:
        """Whether autograd can differentiate a reverse sweep of it: ``change`` is tangent and curvature in one then."""
        return isinstance(self.trace, CurvedTape)

    def change(self, seed: Any) -> Term:
        """∇_w ⟨δ_0, seed⟩ of the reverse sweep that was read, a penalty's exact gradient along it, of a curved pass."""
        start = seed.tensor if isinstance(seed, Seed) else seed
        return Term(1, self.trace, Descent(self.trace, start))

    def data(self, d: Reverse) -> Term:
        """The criterion's own gradient, d being the reverse sweep from c: one more where samples count differently."""
        return g(self, d if self.loss.weights is None else self.reverse(self.counted(self.c)).run())

    @property
    def adds_up(self) -> bool:
        """Whether one reverse sweep may carry derivatives of the loss and of the penalty.

        Not in half precision, where the sum would round the penalty's away, nor where hooks shall see the loss's.
        """
        return self.logits.dtype not in HALF and not self.trace.graph.watched

    def _slopes(self, d: Any) -> Tensor:
        """d_0 up to a positive factor for each sample, for those that read its signs alone.

        float16 has no number below 6e-8, where most of a sure sample's derivatives are: a sweep of its own starts with
        each sample scaled by a power of two, so that its largest number is between 1/2 and 1.
        """
        if self.logits.dtype != torch.float16 or self.curved:
            return d.at_input  # type: ignore[no-any-return]
        _, exponents = torch.frexp(d.start.abs().flatten(1).amax(1))
        exponents = exponents.clamp(min=-100).view(-1, *[1] * (d.start.dim() - 1))
        start = torch.ldexp(d.start, -exponents)
        if isinstance(self.trace, Tape):
            return self.trace.run(start.to(self.logits.dtype), to_input=True)[0]
        return self.reverse(start).at_input  # type: ignore[no-any-return]

    def input_seed(self, d: Reverse, norm: float) -> tuple[Seed, Any]:
        """ψ(d_0) and ‖d_0‖_r^r / r."""
        d_0 = d.at_input
        weights = self._weights(d_0.dim())
        seed, penalty = self.head.input_seed(d_0, norm, weights)
        if norm == 1 and d_0.dtype == torch.float16:
            seed, _ = self.head.input_seed(self._slopes(d), norm, weights)
        return seed, penalty

    def tangent_seed(self, d: Reverse, tangents: Tensor, norm: float) -> tuple[Seed, Any]:
        """Σ_j ψ(⟨d_0, τ_j⟩) τ_j and Σ_j |⟨d_0, τ_j⟩|^r / r."""
        d_0, tau, weights = d.at_input, tangents.to(self._tangent_dtype), self._weights(1)
        seed, penalty = self.head.tangent_seed(d_0, tau, norm, weights)
        if norm == 1 and d_0.dtype == torch.float16:
            seed, _ = self.head.tangent_seed(self._slopes(d), tau, norm, weights)
        return seed, penalty

    def output_seed(self, t: Linear, norm: float) -> tuple[Seed, Any]:
        """ψ(t_K) and ‖t_K‖_r^r / r."""
        return self.head.seed(t.at_output, norm, self._weights(self.logits.dim()))

    def hessian(self, t: Linear) -> Tensor:
        """H t_K."""
        return self.loss.hessian(t.at_output.to(self.loss.c.dtype)).to(t.at_output.dtype)

    def fgsm(self, x: Tensor, d: Reverse, epsilon: Any) -> Tensor:
        """x + ε sign(d_0)."""
        return self.head.fgsm_step(x, self._slopes(d), epsilon)


@dataclass(eq=False)
class Step:
    """One batch, as a recipe sees it: its tensors and the passes it can run."""

    network: Network
    own: Mapping[str, nn.Parameter]  # the model's parameters
    criterion: Criterion
    count: int  # of samples, those of other processes included
    weights: Tensor | None  # N κ_n [N]; None where all samples count alike
    x: Tensor
    y: Tensor
    tangents: Tensor | None
    extra: Mapping[str, Any]
    parameters: Mapping[str, Tensor]
    program: Program
    used: set[str] = field(default_factory=set)  # the parameters that took part in a forward pass
    first: Pass | None = None
    penalty: Any = None  # the numbers of the objective's penalty, without its coefficient
    _passes: int = 0
    _start: Snapshot | None = None

    @property
    def zero(self) -> Tensor:
        """The objective of no samples."""
        dtype = self.network.dtype or self.x.dtype
        return torch.zeros((), dtype=torch.float32 if dtype in HALF else dtype, device=self.x.device)

    @property
    def divisor(self) -> int:
        """What sums over the samples are divided by."""
        return self.criterion.divisor(self.count)

    def objective(self, a: Pass, *parts: tuple[Any, Any], penalty: tuple[Any, Any] | None = None) -> Tensor:
        """Σ coefficient · Σ numbers over the losses and the penalty, mean over the batch."""
        if penalty is None:
            return a.head.objective(self.divisor, *parts)
        self.penalty = penalty[1]
        return a.head.objective(self.divisor, *parts, penalty)

    def without(self, beta: Any) -> Pass | None:
        """Where β is the number 0 the pass whose gradient ``of_data`` takes; the penalty's is another one."""
        return self.forward() if none(beta) else None

    def of_data(self, a: Pass, penalty: Any) -> Recipe:
        """The recipe of the data's loss alone, beside a penalty that is only reported."""
        yield self.objective(a, (1, a.losses), penalty=(0, penalty))
        yield g(a, a.reverse(a.counted(a.c)))

    def plain_labels(self, method: str) -> None:
        """Refuse a criterion other than cross-entropy on class numbers."""
        if not isinstance(self.criterion, CrossEntropy) or self.criterion.module is not None:
            raise MethodError(f"{method} is defined for plain cross-entropy on class numbers: leave criterion= out")

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
        steep = self.program.steep and self.network.bends_by_autograd()
        if self._passes == 0 and (self.program.passes > 1 or steep or not self.sure):
            self._start = Snapshot.of(self.network.model, self.x)
        first, self._passes = self._passes == 0, self._passes + 1
        x = self.x if x is None else x
        if first or self._start is None:
            return self._forward(x)
        with self._start.again(self.x):
            return self._forward(x)

    def _forward(self, x: Tensor) -> Pass:
        number = self._passes - 1
        plain = number in self.program.plain and self.network.keeps_to_autograd(self.own)
        steep = number in self.program.steep and self.network.keeps_to_autograd(self.own)
        if plain or (steep and self.network.bends_by_autograd()):
            found = self._on_tape(x, number, curved=not plain)
        else:
            found = self._recorded(x, number)
        self.first = self.first or found
        return found

    @property
    def sure(self) -> bool:
        """Whether this step will not be taken back half-way because of a checkpoint."""
        return self.network.reentrant is not None or not self.program.plain

    def again(self) -> Step:
        """The same step before anything of it ran."""
        return replace(self, used=set(), first=None, penalty=None, _passes=0, _start=None)

    def retreat(self, error: RuntimeError) -> None:
        """Back to before a step that autograd could not take, so that sweeps can.

        Because of a reentrant checkpoint at the first step, or without second derivatives of the model's functions.

        Raises:
            RuntimeError: any other.
            ModelError: for a model whose checkpoint comes later than its first batch.
        """
        if self.first is not None and self.first.curved and self._start is not None:
            self._start.restore()
            self.network.bends = False
            return
        if "use_reentrant" not in str(error):
            raise error
        if self._start is None or (
            self.sure and self.network.world is not None
        ):  # sums of gradients may be on their way
            raise ModelError(
                "the model has begun to use reentrant checkpoints, which torch.autograd.grad refuses: pass "
                "use_reentrant=False to torch.utils.checkpoint"
            ) from error
        self._start.restore()
        self.network.reentrant = True

    def _on_tape(self, x: Tensor, number: int, curved: bool) -> Pass:
        plan, trained = self.program, {name: p for name, p in self.own.items() if p.requires_grad}
        given = {name: p.detach().requires_grad_(name in trained) for name, p in self.parameters.items()}
        leaves = {name: given.get(name, p) for name, p in trained.items()}
        x = x.detach().requires_grad_(number in plan.read)
        with sdpa_kernel(SDPBackend.MATH) if curved else nullcontext():  # the attention kernel with second derivatives
            output = self.network.plain_forward(x, self.extra, given)
        if curved:
            loss = self._loss(output.detach(), head)
            return Pass(head, CurvedTape(output, x, leaves, self.divisor, loss), loss)
        again = self.weights is not None or output.dtype == torch.float16  # see Pass.data and Pass._slopes
        runs = plan.runs[number] + (again and number in plan.kept & plan.read)
        trace = Tape(output, x, leaves if number in plan.kept else None, self.divisor, runs)
        return Pass(head, trace, self._loss(trace.logits, head))

    def _loss(self, z: Tensor, head: Head) -> Loss:
        """The criterion at the logits; in float16, which cuts small derivatives off, at their float32 copy."""
        return self.criterion.at(z.float() if z.dtype == torch.float16 else z, self.y, head, self.weights)

    def _recorded(self, x: Tensor, number: int) -> Pass:
        frugal = not self.program.bends
        trace = self.network.forward(x, self.parameters, self.extra, own=self.own, frugal=frugal, keep=False)
        trace.lean = frugal and self.program.forward
        self.used.update(trace.graph.parameters.values())
        loss = self._loss(trace.logits, trace.head)
        return Pass(trace.head, trace, loss, number not in self.program.kept and frugal)
