"""A recipe read for what it costs: its passes are counted on a network of one number, none is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ibp_triton import head
from ibp_triton.ledger import MultiplyAdds
from ibp_triton.seeds import Seed
from ibp_triton.sweeps import Term, g


@dataclass(frozen=True)
class Program:
    """How often a recipe runs each kind of pass, and what of them it reads.

    Counts are in sweeps of one batch; T tangents count T times.
    """

    passes: int  # forward
    vjp: int  # reverse, down to the input
    vjp_inner: int  # … without the first layer's
    jvp: int  # linear, up to the output
    jvp_inner: int  # … without the last layer's
    weights: int  # weight gradients with different right sides
    kept: frozenset[int]  # the forward passes that terms read
    read: frozenset[int]  # those whose reverse sweeps are read at the input
    plain: frozenset[int]  # those that no tangent travels over
    steep: frozenset[int]  # those whose tangents autograd's second derivatives could stand for
    runs: tuple[int, ...]  # for each, how often autograd would run over it
    bends: bool  # whether the curvature of layers is asked for, so that nothing may be let go of
    forward: bool  # whether weight gradients come along with a linear sweep, those of the first layers first

    def multiply_adds(self, work: MultiplyAdds) -> int:
        """The sum over the passes of this network's work."""
        reverse = self.vjp * work.vjp + self.vjp_inner * work.vjp_inner
        linear = self.jvp * work.jvp + self.jvp_inner * work.jvp_inner
        return self.passes * work.forward + reverse + linear + self.weights * work.weights


def program(recipe: Callable[[Any], Iterable[Any]], tangents: int) -> Program:
    """The recipe of a method, for that many tangents."""
    with _disable_current_modes(), torch.no_grad():  # whoever records a step records none of this
        tally = _Tally(tangents)
        _, *terms = recipe(tally)
    rights = {id(term.right): term.right for term in terms if term.right.starts}
    waiting = {right.trace for right in rights.values() if not right.read}
    return Program(
        passes=tally.passes,
        vjp=sum(s.copies for s in tally.reverses if s.read),
        vjp_inner=sum(s.copies for s in tally.reverses if not s.read),
        jvp=sum(s.copies for s in tally.linears if s.read),
        jvp_inner=sum(s.copies for s in tally.linears if not s.read),
        weights=sum(right.copies for right in rights.values()),
        kept=frozenset(term.trace for term in terms),
        read=frozenset(s.trace for s in tally.reverses if s.read),
        plain=frozenset(range(tally.passes)) - {s.trace for s in tally.linears},
        steep=frozenset(tally.steep),
        runs=tuple(sum(s.trace == i for s in tally.reverses if s.read) + (i in waiting) for i in range(tally.passes)),
        bends=tally.bends,
        forward=any(term.tangents is not None and not term.tangents.read for term in terms),
    )


@dataclass(eq=False)
class _Sweep:
    """A sweep that was asked for: from how many tangents, and whether its other end is read."""

    trace: int  # the number of its forward pass
    end: Tensor
    copies: int
    starts: bool = True
    read: bool = False

    def run(self) -> _Sweep:
        return self

    @property
    def side(self) -> _Sweep:
        return self

    @property
    def at_input(self) -> Tensor:
        self.read = True
        return self.end

    at_output = at_input


@dataclass(eq=False)
class _Pass:
    """A forward pass of one input and two logits."""

    tally: _Tally
    number: int
    side: ClassVar[None] = None
    logits: Tensor = field(default_factory=lambda: torch.zeros(1, 2))

    def __post_init__(self) -> None:
        self.losses, self.c, _ = head.cross_entropy(self.logits, torch.zeros(1, dtype=torch.int64))

    def counted(self, u: Tensor, rank: int | None = None) -> Tensor:
        return u

    @property
    def curved(self) -> bool:
        self.tally.steep.add(self.number)
        return False

    @property
    def adds_up(self) -> bool:
        return True

    def data(self, d: _Sweep) -> Term:
        return g(self, d)

    def reverse(self, seed: Any, bends: Any = (), bent_by: Any = 1) -> _Sweep:
        start = seed.tensor if isinstance(seed, Seed) else seed
        self.tally.bends = self.tally.bends or bool(bends)
        for _, t in bends:
            t.read = True
        copies = 0 if start is None else _copies(start)
        sweep = _Sweep(self.number, torch.zeros(*_lead(start), 1, 1), copies, starts=start is not None)
        self.tally.reverses.append(sweep)
        return sweep

    def tangent(self, seed: Any) -> _Sweep:
        start = seed.tensor if isinstance(seed, Seed) else seed
        sweep = _Sweep(self.number, torch.zeros(*_lead(start), 1, 2), _copies(start))
        self.tally.linears.append(sweep)
        return sweep

    def input_seed(self, d: _Sweep, norm: float) -> Any:
        return head.input_seed(d.at_input, 1)

    def tangent_seed(self, d: _Sweep, tangents: Tensor, norm: float) -> Any:
        return head.tangent_seed(d.at_input, tangents, 1)

    def output_seed(self, t: _Sweep, norm: float) -> Any:
        return head.seed(t.at_output, 1)

    def hessian(self, t: _Sweep) -> Tensor:
        return t.at_output

    def fgsm(self, x: Tensor, d: _Sweep, epsilon: Any) -> Tensor:
        return d.at_input


class _Tally:
    """Stands for a ``Step``."""

    def __init__(self, tangents: int) -> None:
        self.x, self.labels = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
        self.tangents = torch.zeros(tangents, 1, 1) if tangents else None
        self.passes, self.bends = 0, False
        self.reverses: list[_Sweep] = []
        self.linears: list[_Sweep] = []
        self.steep: set[int] = set()

    def forward(self, x: Tensor | None = None) -> _Pass:
        self.passes += 1
        return _Pass(self, self.passes - 1)

    def objective(self, a: _Pass, *parts: Any, penalty: Any = None) -> Tensor:
        return torch.zeros(())

    def without(self, beta: Any) -> _Pass | None:
        return self.forward() if none(beta) else None

    def of_data(self, a: _Pass, penalty: Any) -> Iterable[Any]:
        yield self.objective(a)
        yield g(a, a.reverse(a.c))

    def plain_labels(self, method: str) -> None:
        pass

    def normal(self, *shape: int) -> Tensor:
        return torch.ones(shape)

    uniform = normal

    def classes(self) -> int:
        return 2


def none(strength: Any) -> bool:
    """Whether it is the number 0; a tensor's number may lie on a device, and is not read."""
    return isinstance(strength, (int, float)) and strength == 0


def _copies(start: Tensor) -> int:
    return start.shape[0] if start.dim() > 2 else 1


def _lead(start: Tensor | None) -> tuple[int, ...]:
    return () if start is None else tuple(start.shape[:-2])
