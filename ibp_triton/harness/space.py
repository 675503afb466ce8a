"""`search:` of an experiment: which numbers, from where to where, and how many trials."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from ibp_triton.harness.schedule import Count, Strict


class Range(Strict):
    """Numbers from `from` to `to`, drawn by their logarithm if `log`, whole ones if `whole`."""

    begin: float = Field(alias="from")
    end: float = Field(alias="to")
    log: bool = False
    whole: bool = False

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if self.begin >= self.end:
            raise ValueError(f"from {self.begin:g} must be less than to {self.end:g}")
        if self.log and self.begin <= 0:
            raise ValueError(f"log: true needs numbers above 0, and from is {self.begin:g}")
        if self.whole and not (self.begin.is_integer() and self.end.is_integer()):
            raise ValueError("whole: true needs whole numbers in from and to")
        return self

    @property
    def ends(self) -> list[float | int]:
        """Both ends, as a trial may have them."""
        return [int(self.begin), int(self.end)] if self.whole else [self.begin, self.end]


Choices = Annotated[list[bool | int | float | str], Field(min_length=2)]


class Search(Strict):
    """Trials of Optuna beside the grid: `space` has a range, or a list to choose from, by a key such as
    `methods.loss_ibp.beta` or `training.learning_rate`. Each row that it names is searched for itself, every row if it
    names none; a trial is a run of the first seed, judged by its validation error.

    `prune` stops a trial whose validation error, every `test_every` epochs, is above the median of the others; not the
    first `startup` ones. `seed` is the sampler's.
    """

    trials: Count
    space: Annotated[dict[str, Range | Choices], Field(min_length=1)]
    prune: bool = True
    startup: Count = 5
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _keys(self) -> Search:
        for key in self.space:
            section, *rest = key.split(".")
            if not ((section == "training" and rest) or (section == "methods" and len(rest) == 2)):
                raise ValueError(f"space: {key}: write methods.ROW.field, as in methods.loss_ibp.beta, or training.key")
        return self

    def rows(self, methods: list[str]) -> dict[str, dict[str, Range | list[Any]]]:
        """The rows that are searched, and the space of each."""
        own = {key: key.split(".")[1] for key in self.space if key.startswith("methods.")}
        named = dict.fromkeys(own.values()) or dict.fromkeys(methods)
        return {row: {key: one for key, one in self.space.items() if own.get(key, row) == row} for row in named}
