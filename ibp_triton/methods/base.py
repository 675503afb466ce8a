"""A method is its hyper-parameters and a recipe: a program of sweeps, read for value, gradient and cost alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ibp_triton import head
from ibp_triton.checks import check_batch, check_hyperparameters, check_tangents
from ibp_triton.criteria import Criterion, CrossEntropy, Loss, criterion_for, sample_weights
from ibp_triton.errors import MethodError, ModelError
from ibp_triton.head import Head
from ibp_triton.layer import HALF
from ibp_triton.ledger import MultiplyAdds
from ibp_triton.methods.cost import Program, program
from ibp_triton.network import Network, network_for
from ibp_triton.objective import objective
from ibp_triton.operator import loss_operator, number_of
from ibp_triton.recording.interface import check_extra
from ibp_triton.recording.snapshot import Snapshot
from ibp_triton.seeds import Seed
from ibp_triton.sweeps import Linear, Reverse, Term, g, weight_gradients
from ibp_triton.tape import UNFORESEEN, Backward, Tape

if TYPE_CHECKING:
    from typing_extensions import Self

    Strength = float | Tensor  # of a penalty or a perturbation: a number, or a 0-d tensor
else:
    Strength = float  # what a file can give, for those that read a method's fields at run time

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

    def reverse(self, seed: Any, bends: Sequence[tuple[Reverse, Linear]] = ()) -> Any:
        """δ from δ_K = seed (None: 0), plus the curvature along each of ``bends``, pairs (reverse, tangent)."""
        for _, t in bends:
            assert t.at_output is not None  # curvature reads the tangents of all layers
        start = seed.tensor if isinstance(seed, Seed) else seed
        own = start if start is None else start.to(self.logits.dtype)
        sweep: Any
        if isinstance(self.trace, Tape):
            sweep = Backward(self.trace, start)
        else:
            sweep = Reverse(self.trace, own, to_input=False, bends=bends, passing=self.passing)
        sweep.start = start
        return sweep

    def tangent(self, seed: Any) -> Linear:
        """t from t_0 = seed, a ``Seed`` or tangents [N, ...] or [T, N, ...]."""
        if isinstance(self.trace, Tape):
            raise MethodError(UNFORESEEN)
        return Linear(self.trace, seed.to(self._tangent_dtype) if isinstance(seed, Tensor) else seed, to_output=False)

    def data(self, d: Reverse) -> Term:
        """The criterion's own gradient, d being the reverse sweep from c: one more where samples count differently."""
        return g(self, d if self.loss.weights is None else self.reverse(self.counted(self.c)).run())

    def _slopes(self, d: Any) -> Tensor:
        """d_0 up to a positive factor for each sample, for those that read its signs alone.

        float16 has no number below 6e-8, where most of a sure sample's derivatives are: a sweep of its own starts with
        each sample scaled by a power of two, so that its largest number is between 1/2 and 1.
        """
        if self.logits.dtype != torch.float16:
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
        if self._passes == 0 and (self.program.passes > 1 or self.network.reentrant is None):
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
        found = self._on_tape(x, number) if plain else self._recorded(x, number)
        self.first = self.first or found
        return found

    def retreat(self, error: RuntimeError) -> None:
        """Before a first step that a reentrant checkpoint has stopped, so that sweeps can take it.

        Raises:
            RuntimeError: any other.
            ModelError: for a model whose checkpoint comes later than its first batch.
        """
        if "use_reentrant" not in str(error):
            raise error
        if self._start is None:
            raise ModelError(
                "the model has begun to use reentrant checkpoints, which torch.autograd.grad refuses: pass "
                "use_reentrant=False to torch.utils.checkpoint"
            ) from error
        self._start.restore()
        self.network.reentrant = True

    def _on_tape(self, x: Tensor, number: int) -> Pass:
        plan, trained = self.program, {name: p for name, p in self.own.items() if p.requires_grad}
        given = {name: p.detach().requires_grad_(name in trained) for name, p in self.parameters.items()}
        leaves = {name: given.get(name, p) for name, p in trained.items()}
        x = x.detach().requires_grad_(number in plan.read)
        output = self.network.plain_forward(x, self.extra, given)
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
        self.used.update(trace.graph.parameters.values())
        loss = self._loss(trace.logits, trace.head)
        return Pass(trace.head, trace, loss, number not in self.program.kept and frugal)


class Parts(NamedTuple):
    """A loss, and detached what it is made of.

    Attributes:
        loss: 0-d, as ``method(network, x, y)`` returns it.
        data_loss: 0-d: the criterion at the first forward pass's logits.
        penalty: 0-d, without its coefficient; None for a method that has none.
        logits: [N, M], of the first forward pass.
    """

    loss: Tensor
    data_loss: Tensor
    penalty: Tensor | None
    logits: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Method:
    """A training objective with its gradient. Call it as a loss: ``method(network, x, y).backward()``.

    Two methods are equal if they are of one class and their hyper-parameters are equal numbers or the same objects;
    neither ==, hash nor repr looks into a tensor.

    Args:
        criterion: the loss of the data: one of torch's modules, such as nn.CrossEntropyLoss(label_smoothing=0.1),
            nn.BCEWithLogitsLoss() or nn.MSELoss(), or a function (z, y) → [N] of per-sample losses, twice
            differentiable for exact semantics. None is cross-entropy on class numbers.
    """

    key: ClassVar[str]
    title: ClassVar[str]
    parameter: ClassVar[str | None] = None
    needs_tangents: ClassVar[bool] = False
    criterion: Any = field(default=None, kw_only=True)
    number: ClassVar[int]  # of each object, for operators; no field

    def __post_init__(self) -> None:
        check_hyperparameters(self)
        criterion_for(self.criterion)
        object.__setattr__(self, "number", number_of(self))

    def recipe(self, s: Step) -> Recipe:
        """The objective, mean over the batch, and then the terms of its gradient."""
        raise NotImplementedError

    def at(self, **changes: Any) -> Self:
        """The same method with other hyper-parameters.

        Args:
            changes: fields of the method's class, such as ``method.at(beta=0.01)``.

        Raises:
            MethodError, InputTypeError: for a value out of range, or no number.
        """
        return replace(self, **changes)

    def __call__(
        self,
        network: Network | nn.Module,
        x: Tensor,
        y: Any,
        tangents: Tensor | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The objective, mean over the batch, as a 0-d tensor whose ``backward()`` adds the method's gradient to .grad.

        Args:
            network: the model, wrapped as ``ibp.Network(model)`` or as it is.
            x: [N, ...] in the parameters' dtype (any dtype if the network has one of its own).
            y: the targets: [N] integers from 0 to M − 1 in a tensor, an array or a list, or what the criterion takes.
            tangents: [T, N, ...] tangent vectors, for tangent methods only (``lie_tangents``).
            extra: the other inputs of the model's forward by name, such as {"attention_mask": mask}: constants.

        Raises:
            TypeError, ValueError: for a wrong dtype, shape or value; the message names cause and cure.
        """
        if torch.compiler.is_compiling():
            return loss_operator(self, network_for(network), x, y, tangents, dict(extra or {}))
        return objective(self, network_for(network), x, y, tangents, extra)[0]

    def parts(
        self,
        network: Network | nn.Module,
        x: Tensor,
        y: Any,
        tangents: Tensor | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Parts:
        """The same loss, and detached what it is made of; arguments as of the call ``method(network, x, y)``."""
        loss, step = objective(self, network_for(network), x, y, tangents, extra)
        return self.parts_of(loss, step)

    def parts_of(self, loss: Tensor, step: Step) -> Parts:
        """The parts of a step whose objective is ``loss``."""
        first, data_loss = step.first, step.zero
        penalty = step.zero if self.parameter in ("beta", "lam") else None
        logits = step.zero.new_zeros((0, 0)) if first is None else first.logits.detach()
        with torch.no_grad():
            if first is not None:
                data_loss = first.head.objective(step.divisor, (1, first.losses))
                penalty = None if penalty is None else first.head.objective(step.divisor, (1, step.penalty)).detach()
            if step.network.world is not None:
                both = step.network.world.sum(torch.stack([data_loss, data_loss if penalty is None else penalty]))
                data_loss, penalty = both[0], None if penalty is None else both[1]
        return Parts(loss, data_loss, penalty, logits)

    def gradients(
        self,
        network: Network | nn.Module,
        x: Tensor,
        y: Any,
        tangents: Tensor | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective and {parameter name: gradient}, without touching ``.grad``.

        A pure function of tensors (but for the running statistics of BatchNorm in train mode): it runs under
        torch.func.vmap over stacked ``parameters``, x, β and ε. Other arguments as of ``method(network, x, y)``.

        Args:
            parameters: {name: tensor} in place of the model's own; those that are left out stay its own.
        """
        value, found, step = self.step(network_for(network), x, y, tangents, parameters, extra)
        trainable = {name: (parameters or {}).get(name, p) for name, p in step.own.items() if p.requires_grad}
        return value, {n: found[n] if n in found else torch.zeros_like(p) for n, p in trainable.items()}

    def step(
        self,
        network: Network,
        x: Tensor,
        y: Any,
        tangents: Any = None,
        parameters: Any = None,
        extra: Any = None,
        own: Mapping[str, nn.Parameter] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Step]:
        """The objective, the gradients of the parameters that it depends on, and the step that gave them.

        Arguments as of ``gradients``; ``own``: the model's parameters by name, where the caller has them.
        """
        with torch.no_grad():
            step = self._step(network, x, y, tangents, parameters or {}, extra, own)
            try:
                value, found = self._gradient(step)
            except RuntimeError as error:
                step.retreat(error)
                step = self._step(network, x, y, tangents, parameters or {}, extra, own)
                value, found = self._gradient(step)
            for name, d in found.items():
                dtype = (parameters or {}).get(name, step.own[name]).dtype
                if d.dtype != dtype:
                    found[name] = d.to(dtype)
            if network.world is not None:
                trained = {name: p for name, p in step.own.items() if p.requires_grad}
                value, found = network.world.sum(value), network.world.gradients(found, trained)
                step.used.update(trained)
        return value, found, step

    def _gradient(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        if step.x.shape[0] == 0:  # the batch is another process's
            return step.zero, {}
        recipe = self.recipe(step)
        value, terms = next(recipe), list(recipe)
        found = weight_gradients(terms, step.divisor)
        step.used.update(found)
        step.network.reentrant = bool(step.network.reentrant)
        return value, found

    def value(
        self,
        network: Network | nn.Module,
        x: Tensor,
        y: Any,
        tangents: Tensor | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The objective alone, 0-d, without the passes that only its gradient needs.

        Arguments as of the call ``method(network, x, y)``.
        """
        return self.value_step(network_for(network), x, y, tangents, extra)[0]

    def value_step(self, network: Network, x: Tensor, y: Any, tangents: Any, extra: Any) -> tuple[Tensor, Step]:
        """The objective alone, and the step that gave it; arguments as of the call ``method(network, x, y)``."""
        with torch.no_grad():
            step = self._step(network, x, y, tangents, {}, extra, None)
            value: Tensor = next(self.recipe(step)) if step.x.shape[0] else step.zero
            return value if network.world is None else network.world.sum(value), step

    def _step(self, network: Network, x: Tensor, y: Any, tangents: Any, parameters: Any, extra: Any, own: Any) -> Step:
        check_tangents(self.key, self.needs_tangents, x, tangents)
        own = network.parameters() if own is None else own
        check_batch(own, network.dtype, x, parameters, least=1 if network.world is None else 0)
        criterion = criterion_for(self.criterion)
        targets = criterion.targets(y, x)
        extra = check_extra(extra)
        count, weights = sample_weights(criterion, targets, network.world)
        return Step(
            network, own, criterion, count, weights, x.detach(), targets, tangents, extra, parameters, self.program
        )

    @cached_property
    def program(self) -> Program:
        """What the recipe does, read without a network."""
        return program(self.recipe, 5 if self.needs_tangents else 0)

    def cost(self, network: Network, input_shape: Sequence[int], tangents: int = 5) -> int:
        """Multiply-adds of one step.

        Args:
            network: the wrapped model.
            input_shape: [N, ...].
            tangents: T, for tangent methods.
        """
        return self.multiply_adds(network.multiply_adds(input_shape), tangents)

    def predicted_ratio(self, network: Network, input_shape: Sequence[int], tangents: int = 5) -> float:
        """Multiply-adds of one step over those of BP, which skips its first layer's vjp; arguments as of ``cost``."""
        work = network.multiply_adds(input_shape)
        return self.multiply_adds(work, tangents) / (work.forward + work.vjp_inner + work.weights)

    def multiply_adds(self, work: MultiplyAdds, tangents: int = 5) -> int:
        """Of the recipe's passes, added up; curved layers cost exact semantics up to a reverse sweep more.

        Args:
            work: multiply-adds of each sweep, ``network.multiply_adds(input_shape)``.
            tangents: T, for tangent methods.
        """
        found = self.program if tangents == 5 else program(self.recipe, tangents if self.needs_tangents else 0)
        return found.multiply_adds(work)

    @property
    def sweeps(self) -> int:
        """Cost in sweeps over the network (BP: 3), for five tangents where there are tangents."""
        return self.multiply_adds(MultiplyAdds(1, 1, 1, 1, 1, 1))

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the hyper-parameters."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The copy is an object of its own to operators."""
        self.__dict__.update(state, number=number_of(self))

    def _values(self) -> tuple[Any, ...]:
        """The class and its hyper-parameters; of a tensor which one it is."""
        found = ((f.name, getattr(self, f.name)) for f in fields(self))
        return type(self), *((name, id(v) if isinstance(v, (Tensor, nn.Module)) else v) for name, v in found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Method) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        shown = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "criterion" or self.criterion)
        return f"{type(self).__name__}({', '.join(f'{name}={_shown(value)}' for name, value in shown)})"


def none(strength: Any) -> bool:
    """Whether it is the number 0; a tensor's number may lie on a device, and is not read."""
    return isinstance(strength, (int, float)) and strength == 0


def _shown(value: Any) -> str:
    """A tensor's numbers are not read: they may lie on a device."""
    return f"<0-d tensor on {value.device}>" if isinstance(value, Tensor) else repr(value)
