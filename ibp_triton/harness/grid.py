"""The runs of an experiment: variants × rows × their values × seeds, each with a resolved config and a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from pydantic import BaseModel

import ibp_triton as ibp
from ibp_triton.errors import ConfigError
from ibp_triton.harness.config import Data, Experiment, NetworkChoice, Seeds, Tangents, Training
from ibp_triton.harness.loading import ExperimentFile
from ibp_triton.harness.rows import MethodRow, from_stored, kinds, numbers, scheduled, stored
from ibp_triton.harness.schedule import CONSTANT, RATE, Schedule
from ibp_triton.vmapped import structure

PLACE = ("device", "replicas")  # of the training: where and beside whom, which decides no result
FILTERS = ("method", "row", "variant", "seed", "parameter")


@dataclass(frozen=True)
class Run:
    """One training run, resolved; `variant`, `row` and `axes` only label it and are no part of its identity.

    `beside` are the runs that are trained side by side with it; they have none.

    `axes` are the fields of the method that have several values in its row.
    `folder` is the name of the run's folder where that is not the one its config gives, as `provenance.settle` finds.
    """

    variant: str
    row: str
    data: Data
    network: NetworkChoice
    training: Training
    tangents: Tangents
    method: ibp.Method
    seeds: Seeds
    track_cosine: bool = False
    schedule: Schedule = CONSTANT  # of the numbers that this run has
    folder: str = ""
    axes: tuple[str, ...] = ()
    beside: tuple[Run, ...] = ()

    @property
    def together(self) -> tuple[Run, ...]:
        """It and the runs beside it, each as if alone."""
        return (replace(self, beside=()), *self.beside) if self.beside else (self,)

    @cached_property
    def structure(self) -> tuple[Any, ...]:
        """What runs must share to be trained side by side: all but their seeds and strengths."""
        sections = (self.data, self.network, self.training, self.tangents)
        return *map(_text, sections), self.track_cosine, self.schedule.plain(), structure(self.method)

    def config(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values (no folders of data sets, no device)."""
        return {name: json.loads(text) for name, text in self._sections().items()}

    def _sections(self) -> dict[str, str]:
        """JSON of each part; those of a section that many runs share are made once."""
        return {
            "data": _text(self.data, "dir"),
            "network": _text(self.network),
            # an option younger than stored runs counts only where it is set: they keep their names
            "training": _text(self.training, *PLACE, *(() if self.training.compile else ("compile",))),
            "method": _method_text(self.method),
            "tangents": _text(self.tangents) if self.method.needs_tangents else "null",
            "seeds": _text(self.seeds),
            "track_cosine": json.dumps(self.track_cosine),
            **({"schedule": json.dumps(self.schedule.plain(), sort_keys=True)} if self.schedule else {}),  # as young
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Run:
        """The run that a run folder's config.json describes."""
        method = from_stored(config["method"])
        return cls(
            variant="",
            row=method.key,
            data=Data.model_validate(config["data"]),
            network=NetworkChoice.model_validate(config["network"]),
            training=Training.model_validate(config["training"]),
            tangents=Tangents.model_validate(config["tangents"] or {}),
            method=method,
            seeds=Seeds.model_validate(config["seeds"]),
            track_cosine=config["track_cosine"],
            schedule=Schedule.model_validate(config.get("schedule", {})),
        )

    def method_in(self, epoch: int) -> ibp.Method:
        """The method with its numbers of an epoch (from 0): β decays, unless it has a schedule."""
        method = scheduled(self.method, self.schedule, epoch, self.training.epochs)
        if self.training.beta_decay and method.parameter == "beta" and "beta" not in self.schedule.root:
            return method.at(beta=method.beta * self.training.decay**epoch)  # type: ignore[attr-defined]
        return method

    def rate_in(self, epoch: int) -> float:
        """The learning rate of an epoch (from 0): it decays, unless it has a schedule."""
        training = self.training
        if RATE in self.schedule.root:
            return self.schedule.value(RATE, training.rate, epoch, training.epochs)
        return training.rate * training.decay**epoch

    def on(self, device: str) -> Run:
        """The same run on another device."""
        return replace(self, training=self.training.model_copy(update={"device": device}))

    @cached_property
    def name(self) -> str:
        """Folder name: method key and 12 hex digits of the SHA-256 of the resolved config, data.path left out."""
        return self.folder or self._hashed({**self._sections(), "data": _text(self._without_path, "dir")})

    @property
    def _without_path(self) -> Data:
        return self.data if self.data.path is None else self.data.model_copy(update={"path": None})

    @property
    def name_with_path(self) -> str:
        """The name that runs had when data.path was a part of it."""
        return self._hashed(self._sections())

    def _hashed(self, sections: dict[str, str]) -> str:
        text = "{" + ", ".join(f'"{name}": {sections[name]}' for name in sorted(sections)) + "}"
        return f"{self.method.key}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def label(self) -> str:
        """A line for people: variant, row, the method's strength, the other axes of its row, and seed."""
        strength = self.method.parameter
        axes = [f"{name}={shown(getattr(self.method, name))}" for name in self.axes if name != strength]
        parts = [self.variant, self.row, self.strength, *axes, f"seed {self.seeds.order}"]
        return " ".join(part for part in parts if part)

    @property
    def strength(self) -> str:
        """The method's β, ε or λ as text; empty for bp."""
        return shown(getattr(self.method, self.method.parameter)) if self.method.parameter else ""


_TEXTS: dict[tuple[int, tuple[str, ...]], tuple[BaseModel, str]] = {}  # by id, beside the section that has it


def _text(section: BaseModel, *without: str) -> str:
    key = (id(section), without)
    if key not in _TEXTS:
        if len(_TEXTS) > 100_000:
            _TEXTS.clear()
        plain = section.model_dump(by_alias=True, exclude=set(without))
        _TEXTS[key] = section, json.dumps(plain, sort_keys=True)
    return _TEXTS[key][1]


@lru_cache(maxsize=10_000)
def _method_text(method: ibp.Method) -> str:
    return json.dumps(stored(method), sort_keys=True)


def shown(value: Any) -> str:
    """The value of a method's field as a reader writes it, and `--only`."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def runs(plan: ExperimentFile) -> list[Run]:
    """All runs in the order they are trained: seed by seed, so that partial results compare every method."""
    every = [run for label, variant in plan.variants() for run in _runs_of(label, variant)]
    position = {seed: number for number, seed in enumerate(_seeds(plan.experiment))}
    return sorted(every, key=lambda run: position.get(run.seeds, len(position)))


def select(every: Iterable[Run], only: Iterable[str]) -> list[Run]:
    """Runs that match all of "method=loss_ibp", "row=…", "variant=…", "seed=0", "beta=0.03" (any field of a method)."""
    chosen = list(every)
    names = (*FILTERS, *dict.fromkeys(name for run in chosen for name in kinds(type(run.method))))
    for text in only:
        name, _, value = text.partition("=")
        if name not in names:
            raise ConfigError(f"--only {text}: write one of {', '.join(names)}, then = and a value")
        kept = [run for run in chosen if _matches(run, name, value)]
        if not kept:
            raise ConfigError(f"--only {text}: no such run; there is {_known(chosen, name)}")
        chosen = kept
    return chosen


def _matches(run: Run, name: str, value: str) -> bool:
    """As text, or as numbers where the name is of a method's field."""
    found = _field(run, name)
    if found == value or name in FILTERS[:-1]:
        return found == value
    try:
        return float(found) == float(value)
    except ValueError:
        return False


def _field(run: Run, name: str) -> str:
    labels = {"method": run.method.key, "row": run.row, "variant": run.variant, "seed": str(run.seeds.order)}
    if name in labels:
        return labels[name]
    if name == "parameter":
        return run.strength
    return shown(getattr(run.method, name)) if name in kinds(type(run.method)) else ""


def _known(chosen: list[Run], name: str) -> str:
    return ", ".join(dict.fromkeys(_field(run, name) or "none" for run in chosen))


def _seeds(experiment: Experiment) -> list[Seeds]:
    return [s if isinstance(s, Seeds) else Seeds.of(s) for s in experiment.seeds]


def _scheduled(experiment: Experiment, row: MethodRow) -> list[Schedule]:
    """What the schedule says of each of the row's methods; one object for all of which it says the same."""
    found: dict[tuple[str, ...], Schedule] = {}
    every = [tuple(name for name in experiment.schedule.root if name == RATE or name in numbers(p)) for p in row.points]
    return [found.setdefault(names, experiment.schedule.of(names.__contains__)) for names in every]


def _runs_of(variant: str, experiment: Experiment) -> Iterator[Run]:
    schedules = {label: _scheduled(experiment, row) for label, row in experiment.methods.items()}
    for seeds in _seeds(experiment):
        for label, row in experiment.methods.items():
            for method, own in zip(row.points, schedules[label], strict=True):
                yield Run(
                    variant=variant,
                    row=label,
                    data=experiment.data,
                    network=experiment.network,
                    training=experiment.training,
                    tangents=experiment.tangents,
                    method=method,
                    seeds=seeds,
                    track_cosine=experiment.track_cosine,
                    schedule=own,
                    axes=row.axes,
                )
