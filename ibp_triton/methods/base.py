"""A method is its hyper-parameters and a recipe: a program of sweeps, read for value, gradient and cost alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ibp_triton.attacks import tracked
from ibp_triton.checks import check_batch, check_hyperparameters, check_tangents
from ibp_triton.criteria import criterion_for, sample_weights
from ibp_triton.ledger import MultiplyAdds
from ibp_triton.methods.cost import Program, program
from ibp_triton.methods.passes import Recipe, Step
from ibp_triton.network import Network, network_for
from ibp_triton.objective import objective, unhooked
from ibp_triton.operator import loss_operator, number_of
from ibp_triton.recording.interface import check_extra
from ibp_triton.sweeps import weight_gradients
from ibp_triton.tape import Tape

if TYPE_CHECKING:
    from typing_extensions import Self

    Strength = float | Tensor  # of a penalty or a perturbation: a number, or a 0-d tensor
else:
    Strength = float  # what a file can give, for those that read a method's fields at run time


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
        with torch.no_grad(), network.in_pieces():
            step = self._step(network, x, y, tangents, parameters or {}, extra, own)
            with unhooked(step.own.values()):
                try:
                    value, found = self._gradient(step)
                except RuntimeError as error:
                    step.retreat(error)
                    step = step.again()
                    value, found = self._gradient(step)
        return value, found, step

    def _gradient(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective and the gradients in their parameters' dtypes, both those of all processes."""
        value, terms = self._terms(step)
        if step.network.world is None:
            found = weight_gradients(terms, step.divisor)
            for name, d in found.items():
                dtype = step.parameters.get(name, step.own[name]).dtype
                if d.dtype != dtype:
                    found[name] = d.to(dtype)
        else:
            trained = {n: step.parameters.get(n, p) for n, p in step.own.items() if p.requires_grad}
            sums = step.network.sums(trained, self.program.forward, step.sure)
            found = sums.finish(weight_gradients(terms, step.divisor, sums.take))
            value = step.network.world.sum(value)
        step.used.update(found)
        if any(isinstance(term.trace, Tape) for term in terms):
            step.network.reentrant = bool(step.network.reentrant)
        return value, found

    def _terms(self, step: Step) -> tuple[Tensor, list[Any]]:
        """This process's share of the objective and its terms."""
        if not _takes_part(step):
            return step.zero, []
        recipe = self.recipe(step)
        return next(recipe), list(recipe)

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
        with torch.no_grad(), network.in_pieces():
            step = self._step(network, x, y, tangents, {}, extra, None)
            value: Tensor = next(self.recipe(step)) if _takes_part(step) else step.zero
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
            network, own, criterion, count, weights, tracked(x), targets, tangents, extra, parameters, self.program
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


def _shown(value: Any) -> str:
    """A tensor's numbers are not read: they may lie on a device."""
    return f"<0-d tensor on {value.device}>" if isinstance(value, Tensor) else repr(value)


def _takes_part(step: Step) -> bool:
    """Whether anything is to compute: also without a sample where others wait for this process's share of a mean."""
    return step.x.shape[0] > 0 or step.network.together
