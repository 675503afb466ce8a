"""The runs of an experiment: variants × rows × parameters × seeds, each with a resolved config and a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from pydantic import BaseModel

from ibp_triton.harness.config import Data, Experiment, Method, Network, Seeds, Tangents, Training, key_of, parameters
from ibp_triton.harness.loading import ConfigError, Plan

FILTERS = ("method", "row", "variant", "seed", "parameter")


@dataclass(frozen=True)
class MethodChoice:
    """One method with its number: key of ibp.METHODS, β or ε (None for bp), norm and semantics where they apply."""

    key: str
    parameter: float | None
    norm: float | None
    semantics: str | None


@dataclass(frozen=True)
class Run:
    """One training run, resolved; `variant` and `row` only label it and are no part of its identity.

    `folder` is the name of the run's folder where that is not the one its config gives, as `provenance.settle` finds.
    """

    variant: str
    row: str
    data: Data
    network: Network
    training: Training
    tangents: Tangents
    method: MethodChoice
    seeds: Seeds
    track_cosine: bool = False
    folder: str = ""

    def config(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values (no folders of data sets, no device)."""
        return {name: json.loads(text) for name, text in self._sections().items()}

    def _sections(self) -> dict[str, str]:
        """JSON of each part; those of a section that many runs share are made once."""
        return {
            "data": _text(self.data, "dir"),
            "network": _text(self.network),
            # an option younger than stored runs counts only where it is set: they keep their names
            "training": _text(self.training, "device", *(() if self.training.compile else ("compile",))),
            "method": _method_text(self.method),
            "tangents": _text(self.tangents) if self.method.key in ("tbp", "fast_tbp") else "null",
            "seeds": _text(self.seeds),
            "track_cosine": json.dumps(self.track_cosine),
        }

    @classmethod
    def from_config(cls, stored: dict[str, Any]) -> Run:
        """The run that a run folder's config.json describes."""
        method = MethodChoice(**stored["method"])
        return cls(
            variant="",
            row=method.key,
            data=Data.model_validate(stored["data"]),
            network=Network.model_validate(stored["network"]),
            training=Training.model_validate(stored["training"]),
            tangents=Tangents.model_validate(stored["tangents"] or {}),
            method=method,
            seeds=Seeds.model_validate(stored["seeds"]),
            track_cosine=stored["track_cosine"],
        )

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
        """A line for people: variant, row, parameter and seed."""
        parts = [self.variant, self.row]
        if self.method.parameter is not None:
            parts.append(f"{self.method.parameter:g}")
        return " ".join([part for part in parts if part] + [f"seed {self.seeds.order}"])


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
def _method_text(method: MethodChoice) -> str:
    return json.dumps(vars(method), sort_keys=True)


def runs(plan: Plan) -> list[Run]:
    """All runs in the order they are trained: seed by seed, so that partial results compare every method."""
    every = [run for label, variant in plan.variants() for run in _runs_of(label, variant)]
    position = {seed: number for number, seed in enumerate(_seeds(plan.experiment))}
    return sorted(every, key=lambda run: position.get(run.seeds, len(position)))


def select(every: Iterable[Run], only: Iterable[str]) -> list[Run]:
    """Runs that match all of "method=loss_ibp", "row=…", "variant=…", "seed=0", "parameter=0.03"."""
    chosen = list(every)
    for text in only:
        name, _, value = text.partition("=")
        if name not in FILTERS:
            raise ConfigError(f"--only {text}: write one of {', '.join(FILTERS)}, then = and a value")
        kept = [run for run in chosen if _field(run, name) == value]
        if not kept:
            raise ConfigError(f"--only {text}: no such run; there is {_known(chosen, name)}")
        chosen = kept
    return chosen


def _field(run: Run, name: str) -> str:
    if name == "parameter":
        return "" if run.method.parameter is None else f"{run.method.parameter:g}"
    return str({"method": run.method.key, "row": run.row, "variant": run.variant, "seed": run.seeds.order}[name])


def _known(chosen: list[Run], name: str) -> str:
    return ", ".join(dict.fromkeys(_field(run, name) or "none" for run in chosen))


def _seeds(experiment: Experiment) -> list[Seeds]:
    return [s if isinstance(s, Seeds) else Seeds.of(s) for s in experiment.seeds]


def _runs_of(label: str, experiment: Experiment) -> Iterator[Run]:
    for seeds in _seeds(experiment):
        for row, optional in experiment.methods.items():
            method = optional or Method()
            for value in parameters(row, method):
                yield Run(
                    variant=label,
                    row=row,
                    data=experiment.data,
                    network=experiment.network,
                    training=experiment.training,
                    tangents=experiment.tangents,
                    method=_choice(key_of(row, method), method, value),
                    seeds=seeds,
                    track_cosine=experiment.track_cosine,
                )


def _choice(key: str, method: Method, value: float | None) -> MethodChoice:
    if method.beta is None:
        return MethodChoice(key, value, None, None)
    return MethodChoice(key, value, method.norm or 1.0, method.semantics or "paper")
