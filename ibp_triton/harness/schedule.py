"""How a number changes over the epochs: phases one after another, each linear, a cosine, or in steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel, model_validator


class Strict(BaseModel):
    """Base of every section: no unknown keys, no silent conversion, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
RATE = "learning_rate"  # the one scheduled number that is no field of a method


class Ramp(Strict):
    """From one number to another: the first epoch has `from`, the one after `epochs` has `to`.

    Left out, `from` is where the phase before ended, `to` the number's own value, `epochs` what is left of training.
    """

    begin: float | None = Field(default=None, alias="from")
    to: float | None = None
    epochs: Count | None = None

    def ends(self, before: float, own: float) -> tuple[float, float]:
        """Where it begins and ends."""
        return before if self.begin is None else self.begin, own if self.to is None else self.to

    def __str__(self) -> str:
        ends = [f"{word} {end:g}" for word, end in (("from", self.begin), ("to", self.to)) if end is not None]
        return " ".join([*ends, *_lasting(self.epochs)])


class Drops(Strict):
    """Times `factor` after `every` so many epochs."""

    every: Count
    factor: Positive
    epochs: Count | None = None

    def __str__(self) -> str:
        return " ".join([f"times {self.factor:g} every {self.every} epochs", *_lasting(self.epochs)])


class Stairs(Strict):
    """The number `to[k]` from epoch `at[k]` of the phase on (from 0); before that, where the phase before ended."""

    at: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    to: list[float]
    epochs: Count | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Stairs:
        if len(self.at) != len(self.to) or any(a >= b for a, b in zip(self.at, self.at[1:], strict=False)):
            raise ValueError("give at as growing epochs and to with one number for each")
        return self

    def __str__(self) -> str:
        told = ", ".join(f"{to:g} from epoch {at + 1}" for at, to in zip(self.at, self.to, strict=True))
        return " ".join([told, *_lasting(self.epochs)])


def _lasting(epochs: int | None) -> list[str]:
    return [] if epochs is None else [f"in {epochs} epoch{'s' if epochs > 1 else ''}"]


class Phase(Strict):
    """One of: `linear` or `cosine` between two numbers, `step` by a factor every so many epochs, `steps` to numbers."""

    linear: Ramp | None = None
    cosine: Ramp | None = None
    step: Drops | None = None
    steps: Stairs | None = None

    @model_validator(mode="after")
    def _one(self) -> Phase:
        if sum(getattr(self, name) is not None for name in type(self).model_fields) != 1:
            raise ValueError("give one of linear, cosine, step, steps; a list of phases for several, one after another")
        return self

    @property
    def _shape(self) -> Ramp | Drops | Stairs:
        found = self.linear or self.cosine or self.step or self.steps
        assert found is not None
        return found

    @property
    def epochs(self) -> int | None:
        """How long it lasts; None: to the end of the training."""
        return self._shape.epochs

    @property
    def is_idle(self) -> bool:
        """Whether it names neither of a ramp's two numbers."""
        ramp = self.linear or self.cosine
        return ramp is not None and ramp.begin is None and ramp.to is None

    def value(self, before: float, own: float, epoch: int, epochs: int) -> float:
        """The number in an epoch of this phase (from 0), which lasts `epochs`; `before` it had another."""
        if self.step is not None:
            return before * self.step.factor ** (epoch // self.step.every)
        if self.steps is not None:
            return [before, *self.steps.to][sum(at <= epoch for at in self.steps.at)]
        ramp = self.linear or self.cosine
        assert ramp is not None
        (begin, end), share = ramp.ends(before, own), min(1.0, epoch / epochs)
        if share in (0.0, 1.0):  # the very numbers of the file
            return end if share else begin
        return begin + (end - begin) * (share if self.linear else (1 - math.cos(math.pi * share)) / 2)

    def __str__(self) -> str:
        name = next(name for name in type(self).model_fields if getattr(self, name) is not None)
        return f"{'' if name == 'steps' else 'steps ' if name == 'step' else f'{name} '}{self._shape}"


def _listed(given: Any) -> Any:
    return given if isinstance(given, list) else [given]


Phases = Annotated[
    list[Phase], Field(min_length=1), BeforeValidator(_listed, json_schema_input_type=Phase | list[Phase])
]


class Schedule(RootModel[dict[str, Phases]]):
    """By name, `learning_rate` or a numeric field of a method: what becomes of it, a phase or a list of phases."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="after")
    def _endless_last(self) -> Schedule:
        for name, phases in self.root.items():
            if any(phase.epochs is None for phase in phases[:-1]):
                raise ValueError(f"{name}: every phase but the last needs epochs")
            if phases[0].is_idle:
                raise ValueError(f"{name}: its first phase stays where it is; give from, or to, or both")
        return self

    def __bool__(self) -> bool:
        return bool(self.root)

    def of(self, names: Callable[[str], bool]) -> Schedule:
        """What it says of some of the numbers."""
        return Schedule({name: phases for name, phases in self.root.items() if names(name)})

    def value(self, name: str, own: float, epoch: int, epochs: int) -> float:
        """The number in an epoch (from 0) of a training of `epochs`; `own` is what it is without a schedule."""
        before, phases = own, self.root[name]
        for phase in phases:
            length = phase.epochs or max(1, epochs)
            if epoch < length or phase is phases[-1]:
                return phase.value(before, own, min(epoch, length), length)
            before = phase.value(before, own, length, length)
            epoch, epochs = epoch - length, epochs - length
        return before

    def plain(self) -> dict[str, Any]:
        """What was given, as plain values."""
        found: dict[str, Any] = self.model_dump(by_alias=True, exclude_none=True)
        return found

    def text(self, name: str) -> str:
        """For people: what becomes of one of the numbers."""
        return ", then ".join(map(str, self.root[name]))


CONSTANT = Schedule({})
