"""A forward pass on autograd's tape: for what needs no tangent, and so nothing that plain autograd does not have.

The model runs as in any training loop, and a reverse sweep is ``torch.autograd.grad``: BP, adversarial and PGD training
and TRADES cost what they cost without this library, whatever the model. Tangents and curvature need recorded layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_triton import image_conv
from ibp_triton.checks import refuse_mixed
from ibp_triton.criteria import Loss
from ibp_triton.errors import MethodError
from ibp_triton.layer import is_one, plus
from ibp_triton.steady import Steady

if TYPE_CHECKING:
    from typing_extensions import Self

    from ibp_triton.sweeps import Term


Earlier = Sequence[tuple[Any, dict[str, Tensor]]]  # coefficients, and gradients by name
UNFORESEEN = "a recipe runs other sweeps, or gives other terms, than when it was read for its cost, on one sample"


class Unmixed(Steady):
    """Refuses a model that computes under torch.autocast by itself, or in a wrapper of its forward.

    The data gradient of a convolution over an image is that of the recorded layers.
    """

    own = {**Steady.own, F.conv2d: image_conv.conv2d}  # noqa: RUF012

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._is_any_autocast_enabled():
            refuse_mixed()
        return super().__torch_function__(func, types, args, kwargs)


class Tape:
    """One forward pass as autograd recorded it.

    Args:
        output: the logits, with their history.
        x: the input, of which derivatives can be taken where it requires a gradient.
        parameters: those by name that terms take gradients of; None where no term reads this pass.
        divisor: what gradients are divided by, the number of samples.
        runs: how many reverse sweeps will run over it.
    """

    def __init__(
        self, output: Tensor, x: Tensor, parameters: Mapping[str, Tensor] | None, divisor: int, runs: int
    ) -> None:
        self.logits, self.input, self.parameters, self.divisor = output.detach(), x, parameters, divisor
        self._output, self._runs = output, runs

    def run(self, d: Tensor, *, to_input: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The derivatives of ⟨d, logits⟩ for d [N, M] or [T, N, M]: by x, [N, ...] or [T, N, ...], and by parameters.

        Those by parameters are summed over the T, and absent where the logits do not depend on one.
        """
        if self._runs < 1:
            raise MethodError("a recipe reads a sweep after it was used up: read it before its terms are")
        if to_input and not self.input.requires_grad:
            raise MethodError(UNFORESEEN)
        self._runs -= 1
        if d.dim() == self.logits.dim():
            return self._once(d, keep=self._runs > 0)
        last = len(d) - 1
        found = [self._once(one, keep=self._runs > 0 or i < last) for i, one in enumerate(d)]
        return torch.stack([by_x for by_x, _ in found]), added([parts for _, parts in found])

    def _once(self, d: Tensor, keep: bool) -> tuple[Tensor, dict[str, Tensor]]:
        own, reached = self.parameters or {}, self.input.requires_grad
        sources = [*own.values(), *([self.input] if reached else [])]  # also unasked: see Steady on group norms
        found: Sequence[Tensor | None] = [None] * len(sources)
        if sources and self._output.requires_grad:
            found = torch.autograd.grad(self._output, sources, d, retain_graph=keep, allow_unused=True)
        by_x = found[-1] if reached else None
        parts = {name: part for name, part in zip(own, found, strict=False) if part is not None}
        return torch.zeros_like(self.input) if by_x is None else by_x, parts

    def gradients(self, terms: Sequence[Term], made: Callable[[str, Tensor], None] | None = None) -> dict[str, Tensor]:
        """The sum of the terms, divided; the sweeps among them that have not run do so together.

        ``made`` gets each gradient as soon as it is whole; the result lacks these.
        """
        if self.parameters is None:
            raise MethodError(UNFORESEEN)
        seeds = [_times(term.coefficient, term.right.seed) for term in terms if term.right.parts is None]
        earlier = [(term.coefficient, term.right.parts) for term in terms if term.right.parts is not None]
        total: dict[str, Tensor] = {}
        gone: set[str] = set()
        if seeds:
            flat = [seed.sum(0) if seed.dim() > self.logits.dim() else seed for seed in seeds]
            with self._told(made, earlier, gone):
                total = self.run(sum(flat[1:], flat[0]), to_input=False)[1]
        self._runs = 0
        whole: dict[str, Tensor] = {}
        for name in dict.fromkeys([*total, *(name for _, parts in earlier for name in parts)]):
            if name not in gone:
                whole[name] = _more(total.pop(name, None), name, earlier)
            for _, parts in earlier:  # each is let go of once it is added: they are as large as the model
                parts.pop(name, None)
        for term in terms:
            term.right.parts = None
        return whole

    @contextmanager
    def _told(self, made: Callable[[str, Tensor], None] | None, earlier: Earlier, gone: set[str]) -> Iterator[None]:
        """While autograd runs inside, ``made`` gets each gradient, with ``earlier`` ones; ``gone`` gets their names."""
        if made is None:
            yield
            return

        def tell(name: str, d: Tensor) -> None:
            made(name, _more(d, name, earlier))
            gone.add(name)

        handles = [p.register_hook(partial(tell, name)) for name, p in (self.parameters or {}).items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Backward:
    """A reverse sweep over a tape from δ_K = ``d`` [N, M] or [T, N, M]; it runs when it is read."""

    def __init__(self, trace: Tape, d: Tensor) -> None:
        self.trace, self.seed, self.start = trace, (d / trace.divisor).to(trace.logits.dtype), d
        self.parts: dict[str, Tensor] | None = None  # the parameters' derivatives, divided; None before it has run
        self._by_x: Tensor | None = None

    @property
    def at_input(self) -> Tensor:
        """The derivative with respect to x, per sample."""
        if self._by_x is None:
            found, self.parts = self.trace.run(self.seed, to_input=True)
            self._by_x = found * self.trace.divisor
        return self._by_x

    def run(self) -> Self:
        """The sweep itself."""
        return self


class CurvedTape(Tape):
    """A tape whose ∇_x L can be differentiated once more, as by ``create_graph=True``: for a penalty's exact gradient.

    For models where recorded layers save nothing: see ``Network.bends_by_autograd``.
    """

    def __init__(
        self, output: Tensor, x: Tensor, parameters: Mapping[str, Tensor] | None, divisor: int, loss: Loss
    ) -> None:
        super().__init__(output, x, parameters, divisor, runs=1)
        self.loss = loss
        self.slope: Tensor | None = None  # what a climb found, with its history

    def climb(self, d: Tensor) -> Tensor:
        """∇_x ⟨d, z⟩ of each sample, [N, ...], or [T, N, ...] for d [T, N, M]: for the loss's own c that of its loss.

        Every other d is a constant.

        Raises:
            MethodError: for a second one, of which nobody could tell whose change is asked for.
        """
        if self.slope is not None:
            raise MethodError("of a curved pass one reverse sweep can be read: ask for .curved, or read two, not both")
        with torch.enable_grad():
            if d is self.loss.c:
                self.slope = self._climbed(_Slope.apply(self._output, self.loss))  # type: ignore[no-untyped-call]
            else:
                alone = d.dim() == self.logits.dim()
                self.slope = self._climbed(d) if alone else torch.stack([self._climbed(one) for one in d])
        return self.slope.detach()

    def _climbed(self, d: Tensor) -> Tensor:
        found = torch.autograd.grad(self._output, self.input, d, create_graph=True, allow_unused=True)[0]
        return torch.zeros_like(self.input) if found is None else found

    def gradients(self, terms: Sequence[Term], made: Callable[[str, Tensor], None] | None = None) -> dict[str, Tensor]:
        """The sum of the terms, divided, in one walk back, which may fail half-way: ``made`` gets none early."""
        sides = [(self.slope if isinstance(term.right, Descent) else self._output, term) for term in terms]
        pairs = [
            (y, _times(term.coefficient, term.right.seed)) for y, term in sides if y is not None and y.requires_grad
        ]
        own = self.parameters or {}
        if not pairs:
            return {}
        outputs, seeds = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, [*own.values(), self.input], seeds, allow_unused=True)  # x: see Steady
        return {name: part for name, part in zip(own, found, strict=False) if part is not None}


class _Slope(torch.autograd.Function):
    """c = ∂ℓ/∂z as a function of z, whose derivative along v is H v."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, loss: Loss) -> Tensor:
        ctx.loss = loss
        return loss.c.to(z.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        return ctx.loss.hessian(v.to(ctx.loss.c.dtype)).to(v.dtype), None


class Climb(Backward):
    """A reverse sweep over a curved tape, whose end can be differentiated where it is read."""

    trace: CurvedTape

    @property
    def at_input(self) -> Tensor:
        """The derivative with respect to x, per sample."""
        if self._by_x is None:
            self._by_x = self.trace.climb(self.start)
        return self._by_x


class Descent:
    """What ∇_w ⟨∇_x ℓ, seed⟩ starts from: the second side of its term."""

    def __init__(self, trace: CurvedTape, seed: Tensor) -> None:
        self.trace, self.seed = trace, seed / trace.divisor


def _more(total: Tensor | None, name: str, earlier: Earlier) -> Tensor:
    """total + Σ coefficient · part of the parameter of this name; one of them at least is there."""
    for coefficient, parts in earlier:
        if name in parts:
            total = _plus(total, coefficient, parts[name])
    assert total is not None
    return total


def _times(coefficient: Any, d: Tensor) -> Tensor:
    return d if is_one(coefficient) else coefficient * d


def _plus(total: Tensor | None, coefficient: Any, d: Tensor) -> Tensor:
    """total + coefficient · d, without a copy of d where the coefficient is a number."""
    return _times(coefficient, d) if total is None else plus(total, d, coefficient)


def added(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sums by name; what is added is taken out of the parts."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name in list(part):
            total[name] = total[name] + part.pop(name) if name in total else part.pop(name)
    return total
