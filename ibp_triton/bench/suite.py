"""The YAML of a suite of benchmarks, as strict types, and the cases and candidates that it stands for."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

import ibp_triton as ibp
from ibp_triton.bench.candidates import COUNTS, METHODS, MORE, NETWORKS, TANGENTS, Case, Entry, word
from ibp_triton.errors import ConfigError
from ibp_triton.harness import loading, models
from ibp_triton.harness.config import Precision
from ibp_triton.harness.rows import MethodRow, kinds, once
from ibp_triton.harness.schedule import Count, Positive, Strict

Layout = Literal["channels_last", "contiguous"]
StepKind = Literal["gradient", "together", "eager", "compiled", "captured"]
Baseline = Literal[
    "eager_bp", "eager_bp_nchw", "by_hand", "by_hand_step", "one_by_one", "one_process", "late_sums", "sums", "floor"
]
AXES = ("batch", "precision", "layout", "backend", "device", *COUNTS)  # of the cells of a network
Family = Literal["convnet", "transformer", "mlp", "paper", "own"]


class NetworkRow(Strict):
    """One of the table's networks with its `options`, or `import: package.module:build` with its input and classes."""

    network: str | None = None
    target: str | None = Field(default=None, alias="import")
    options: dict[str, Any] = Field(default={})
    input_shape: list[Count] = Field(default=[3, 32, 32], min_length=2, max_length=3)
    classes: Count = 10
    family: Family = "own"

    @model_validator(mode="after")
    def _one_of_two(self) -> NetworkRow:
        if (self.target is None) == (self.network is None):
            raise ValueError(f"give either network ({', '.join(NETWORKS)}) or import (package.module:build)")
        if self.network is not None and self.network not in NETWORKS:
            raise ValueError(f"{self.network!r} is no network of the table; choose one of {', '.join(NETWORKS)}")
        return self

    def entry(self) -> Entry:
        """How it is made."""
        if self.network is not None:
            known = NETWORKS[self.network]
            build = functools.partial(known.build, **self.options)
            return replace(known, build=build, options=self.options)
        shape, target = tuple(self.input_shape), self.target or ""
        build = functools.partial(models.imported, target, shape, self.classes, self.options)  # type: ignore[arg-type]
        return Entry(build, shape, self.family, classes=self.classes, options=self.options)


class Suite(Strict):
    """A whole YAML file: every network at every batch, precision, layout, backend, device and count of `tangents`,
    `replicas` and `processes` is a cell.

    In a cell all methods (as gradients or as whole steps: `step`) and all `baselines` run in turn, `rounds` times after
    `warmup`. A key of `targets` names a ratio; its value is an upper bound, or bounds by the words that a cell must
    have: {"convnet fp32": 1.05}. `skip` leaves out what has all words of one of its entries, such as "256 by_hand".
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]
    title: str = ""
    networks: Annotated[dict[str, NetworkRow], Field(min_length=1)]
    methods: Annotated[dict[str, SerializeAsAny[MethodRow]], Field(min_length=1)]
    batch: list[Count] = Field(default=[32], min_length=1)
    precision: list[Precision] = Field(default=["fp32"], min_length=1)
    layout: list[Layout] = Field(default=["channels_last"], min_length=1)
    backend: list[Literal["auto", "torch", "triton"]] = Field(default=["torch"], min_length=1)
    device: list[str] = Field(default=["cpu"], min_length=1)
    tangents: list[Count] = Field(default=[TANGENTS], min_length=1)
    replicas: list[Count] = Field(default=[1], min_length=1)
    processes: list[Count] = Field(default=[1], min_length=1)
    link: Positive | None = None
    step: list[StepKind] = Field(default=["gradient"], min_length=1)
    baselines: list[Baseline] = Field(default=["eager_bp", "by_hand"])
    memory: bool = True
    profile: bool = False
    rounds: Annotated[int, Field(ge=2)] = 15
    warmup: Count = 2
    threads: Count = 1
    targets: dict[str, Positive | dict[str, Positive]] = Field(default={})
    skip: list[str] = Field(default=[])
    output: str | None = None

    @field_validator("networks", mode="before")
    @classmethod
    def _networks(cls, given: Any) -> Any:
        """A list of names of the table, or rows, each called as its network unless it says otherwise."""
        given = {str(name): None for name in given} if isinstance(given, list) else given
        if not isinstance(given, dict):
            return given
        return {label: _network_row(label, row) for label, row in given.items()}

    @field_validator("methods", mode="before")
    @classmethod
    def _methods(cls, given: Any) -> Any:
        """A list of labels of the table, or rows; an empty row is the table's."""
        given = {str(name): None for name in given} if isinstance(given, list) else given
        if not isinstance(given, dict):
            return given
        return {label: _method_row(label, row) for label, row in given.items()}

    @field_validator(*AXES, "step", "baselines")
    @classmethod
    def _each_once(cls, given: list[Any]) -> list[Any]:
        return list(once(given))

    @field_validator("device")
    @classmethod
    def _devices(cls, given: list[str]) -> list[str]:
        for name in given:
            try:
                torch.device(name)
            except RuntimeError as error:
                raise ValueError(f"{name!r} names no device of torch; write cpu or cuda:0") from error
        return given

    @model_validator(mode="after")
    def _one_value_each(self) -> Suite:
        for label, row in self.methods.items():
            if row.axes:
                raise ValueError(f"methods.{label}: a list on {row.axes[0]}; give one row for each value here")
        return self

    @model_validator(mode="after")
    def _replicas_together(self) -> Suite:
        if "together" not in self.step and (self.replicas != [1] or "one_by_one" in self.baselines):
            raise ValueError("replicas, and the baseline one_by_one, are of step: [together]")
        return self

    @model_validator(mode="after")
    def _data_parallel(self) -> Suite:
        shared = {"one_process", "late_sums", "sums"} & set(self.baselines)
        alone = self.processes == [1] and self.link is None
        if alone and shared:
            raise ValueError(f"baseline {shared.pop()} is of several processes (processes: [2]) or of a link")
        if not alone and (self.step != ["eager"] or self.device != ["cpu"]):
            raise ValueError("processes and link are of step: [eager] on device: [cpu]")
        if self.link is not None and self.processes != [1]:
            raise ValueError("a link is pretended by one process: leave processes out")
        return self

    @model_validator(mode="after")
    def _on_the_cpu(self) -> Suite:
        if self.profile and self.device != ["cpu"]:
            raise ValueError("profile: true times operators on device: [cpu]")
        return self

    def cases(self) -> list[Case]:
        """Every cell."""
        axes = (self.networks, self.batch, self.precision, self.layout, self.backend, self.device)
        entries = {label: row.entry() for label, row in self.networks.items()}
        return [
            Case(network, batch, precision, layout == "channels_last", device, backend, entries[network], *counts)
            for network, batch, precision, layout, backend, device, *counts in itertools.product(
                *axes, self.tangents, self.replicas, self.processes
            )
        ]

    def method(self, label: str) -> ibp.Method:
        """The method of a row."""
        return self.methods[label].points[0]

    def skips(self, case: Case, *words: str) -> bool:
        """Whether `skip` leaves out what has these words in this cell."""
        present = {*case_words(case), *words}
        return any(set(entry.split()) <= present for entry in self.skip)

    def bound(self, case_facts: set[str], ratio: str) -> float | None:
        """The target of a ratio in a cell of these words, if it has one."""
        found = self.targets.get(ratio)
        if not isinstance(found, dict):
            return found
        return next((bound for words, bound in found.items() if set(words.split()) <= case_facts), None)


def case_words(case: Case) -> set[str]:
    """What targets and `skip` may ask of a cell."""
    layout = "channels_last" if case.channels_last else "contiguous"
    own = {case.network, case.entry.family, str(case.batch), case.precision, layout, case.backend, case.device}
    return own | {word(key, getattr(case, key)) for key in COUNTS}


def _network_row(label: str, row: Any) -> Any:
    if row is None:
        return {"network": label}
    if isinstance(row, dict) and "import" not in row and "network" not in row:
        return {"network": label, **row}
    return row


def _method_row(label: str, row: Any) -> Any:
    known = {**METHODS, **MORE}
    if row is None and label in known:
        own = known[label]
        return {"method": own.key, **{name: getattr(own, name) for name in kinds(type(own))}}
    if not isinstance(row, dict | None):
        return row
    if row is None:
        raise ValueError(f"{label}: no method of the table; choose among {', '.join(known)}, or give its fields")
    return {**row, "method": row.get("method") or label}


def load(path: Path, overrides: Iterable[str] = ()) -> Suite:
    """Read, override ("a.b=c") and validate; raises ConfigError, which names file, key and cure."""
    tree = loading.read_tree(path)
    loading.apply(tree, overrides)
    return validate(tree, str(path))


def validate(tree: Mapping[str, Any], where: str) -> Suite:
    """The tree as a Suite; raises ConfigError with one line for each fault."""
    try:
        return Suite.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(loading.faults(error, where, Suite)) from error
