"""The YAML of an experiment, as strict types: unknown keys and wrong types are errors that name file, key and cure."""

from __future__ import annotations

import difflib
import math
import re
from functools import lru_cache
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from ibp_triton.harness import plugins
from ibp_triton.harness.optimizers import Choice
from ibp_triton.harness.optimizers import read as read_optimizer
from ibp_triton.harness.rows import MethodRow, faulty, numbers, once, scheduled
from ibp_triton.harness.schedule import CONSTANT, RATE, Count, NonNegative, Positive, Schedule, Strict
from ibp_triton.harness.space import Search

SourceName = Literal["mnist", "fashion_mnist", "cifar10", "mnist5k", "image_folder", "arrays", "synthetic"]
NetworkName = Literal["paper_mnist", "paper_cifar10"]
Pool = Literal["ceil", "torch-ceil", "floor"]
Init = Literal["normal", "uniform", "uniform-0.01", "torch"]
Precision = Literal["fp32", "bf16"]
Preset = Literal["paper", "toolbox-2015", "toolbox-2016"]
PublishedTable = Literal["table1_mnist", "table1_cifar10"]


def data_sources() -> list[str]:
    """What `data.source` may name: the package's sources and those that installed packages offer."""
    return [*get_args(SourceName), *plugins.offered("sources")]


def networks() -> list[str]:
    """What `network.name` may name: the paper's two and those that installed packages offer."""
    return [*get_args(NetworkName), *plugins.offered("networks")]


def _source(name: str) -> str:
    if name not in get_args(SourceName) and plugins.target_of("sources", name) is None:
        raise ValueError(f"{name!r} is no source; choose one of {', '.join(data_sources())}, or package.module:load")
    return name


def _network(name: str) -> str:
    if name not in networks():
        raise ValueError(f"{name!r} is no network; choose one of {', '.join(networks())}, or import: package.mod:build")
    return name


class Data(Strict):
    """Where the images come from and how they are split; pixels are in [0, 1] before the mean is subtracted.

    `subset` training examples are drawn by the subset seed (all if absent), `validation` further ones from the rest.
    `holdout` examples become the test set, stratified, in sources that have none. `crop` is the side of a centre crop.
    """

    source: Annotated[str, AfterValidator(_source)]
    dir: str | None = None
    path: str | None = None
    subset: Count | None = None
    validation: Annotated[int, Field(ge=0)] = 0
    test: Count | None = None
    holdout: Count = 1000
    holdout_seed: int = 0
    mean: Literal["pixel", "channel", "none"] = "pixel"
    crop: Count | None = None
    size: Count = 32
    channels: Literal[1, 3] = 3
    classes: Count = 10
    examples: Count = 512

    def found_in(self, folder: str | None) -> Data:
        """The same set with its files in `folder`; unchanged if that is None."""
        return self.model_copy(update={"dir": folder}) if folder else self


class NetworkChoice(Strict):
    """A network of the paper with its open choices; `import: package.module:build` or an entry point with `options`."""

    name: Annotated[str, AfterValidator(_network)] | None = None
    pool: Pool = "ceil"
    init: Init = "normal"
    widths: list[Count] | None = None
    kernels: list[Count] | None = None
    pads: list[Annotated[int, Field(ge=0)]] | None = None
    hidden: Count = 256
    target: str | None = Field(default=None, alias="import")
    options: dict[str, Any] = Field(default={})

    @model_validator(mode="after")
    def _one_of_two(self) -> NetworkChoice:
        if (self.name is None) == (self.target is None):
            names = ", ".join(networks())
            raise ValueError(f"give either name ({names}) or import (package.module:build)")
        return self


class Augment(Strict):
    """Random affine maps, drawn anew at every access; shift in pixels, angle in degrees.

    Scale factors per axis: scale**U(-1, 1) if log-uniform, U(1/scale, scale) if uniform.
    """

    shift: NonNegative = 2.0
    scale: Annotated[float, Field(ge=1)] = 1.4
    scaling: Literal["log-uniform", "uniform"] = "log-uniform"
    angle: NonNegative = 18.0


DESCENT = ("learning_rate", "momentum", "dampening", "weight_decay")  # of training: the options of the paper's SGD


class Training(Strict):
    """Stochastic gradient descent as in section 5 of the paper; `learning_rate` decays by `decay` an epoch.

    `optimizer` is another class of torch.optim with its own options, `lr` among them, in the place of `learning_rate`,
    `momentum`, `dampening` and `weight_decay`, which are the options of the paper's descent. `compile` trains by one
    compiled graph a step, on the CPU, after comparing it with the eager step. `replicas` runs of one structure are
    trained side by side, at most; auto: so many that every worker has some.
    """

    epochs: Count = 80
    batch_size: Count = 32
    learning_rate: Positive = 0.1
    decay: Annotated[float, Field(gt=0, le=1)] = 0.98
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    dampening: Annotated[float, Field(ge=0, le=1)] = 0.9
    weight_decay: NonNegative = 0.0
    optimizer: Annotated[Choice, BeforeValidator(read_optimizer, json_schema_input_type=str | Choice)] | None = None
    beta_decay: bool = True
    at_gradient: Literal["mean", "sum"] = "mean"
    augment: Augment | None = None
    precision: Precision = "fp32"
    channels_last: bool = True
    test_every: Annotated[int, Field(ge=0)] = 0
    device: str = "cpu"
    compile: bool = False
    replicas: Count | Literal["auto"] = 1

    @property
    def rate(self) -> float:
        """The learning rate of the first epoch, where no schedule says otherwise."""
        return self.learning_rate if self.optimizer is None else float(next(iter(self.optimizer.values()))["lr"])

    @model_validator(mode="after")
    def _one_optimizer(self) -> Training:
        twice = [name for name in DESCENT if name in self.model_fields_set]
        if self.optimizer and twice:
            (name,) = self.optimizer
            raise ValueError(f"{', '.join(twice)} beside optimizer; give {name}'s own options there, such as lr")
        return self

    @model_serializer(mode="wrap")
    def _plain(self, plainly: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what does not count: runs from before there was `optimizer` keep their names."""
        unused = ("optimizer",) if self.optimizer is None else DESCENT
        found: dict[str, Any] = plainly(self)
        return {name: value for name, value in found.items() if name not in unused}

    @model_validator(mode="after")
    def _device(self) -> Training:
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device: {self.device!r} names no device of torch; write cpu or cuda:0") from error
        return self

    @model_validator(mode="after")
    def _compiles(self) -> Training:
        if self.compile and self.device != "cpu":
            raise ValueError(f"compile: true is for device: cpu, not {self.device}; leave one of the two out")
        if self.compile and self.replicas != 1:
            raise ValueError("compile: true is for runs trained alone; leave it out, or replicas")
        return self


class Tangents(Strict):
    """The five Lie operators of TBP and Fast TBP; `coordinate_scale` in pixels (half the image width if absent)."""

    sigma: Positive = 0.9
    border: Literal["zeros", "replicate"] = "zeros"
    coordinate_scale: Positive | None = None
    normalise: bool = False


class Span(Strict):
    """Numbers from `start` to `stop`, both included, `step` apart."""

    start: float = 0.0
    stop: float
    step: Positive

    @model_validator(mode="after")
    def _countable(self) -> Span:
        if not 0 <= (self.stop - self.start) / self.step <= 10_000:
            raise ValueError("from start up to stop must be 10 000 steps at most; make step larger")
        return self

    def values(self) -> list[float]:
        """The numbers, rounded to nine digits so that 0.005 · 3 is 0.015."""
        count = math.floor((self.stop - self.start) / self.step + 1.5)
        return [round(self.start + k * self.step, 9) for k in range(count)]


Levels = list[NonNegative] | Span


class Evaluate(Strict):
    """Curves of error on the test set: against ε of FGSM and PGD, against σ of noise (pixel units, not clipped).

    `pgd_step_size` is in units of ε; `masking` is the ε of the gradient-masking check; `examples` takes the first ones.
    """

    adversarial: Levels = Field(default=[])
    gaussian: Levels = Field(default=[])
    pgd: Levels = Field(default=[])
    pgd_steps: Count = 10
    pgd_step_size: Positive = 0.25
    masking: NonNegative | None = None
    examples: Count | None = None
    batch_size: Count = 500
    seed: int = 0


class Seeds(Strict):
    """Three independent seeds of one run."""

    subset: int
    weights: int
    order: int

    @staticmethod
    @lru_cache(maxsize=100_000)
    def of(seed: int) -> Seeds:
        """The same number for all three."""
        return Seeds(subset=seed, weights=seed, order=seed)

    def __str__(self) -> str:
        numbers = {self.subset, self.weights, self.order}
        return str(self.order) if len(numbers) == 1 else str(self.model_dump())


_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
MOST_SEEDS = 10_000  # in a range


def _seeds_of(given: Any) -> Any:
    """The list with each "0..9" in it written out, both ends included; raises ValueError."""
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list):
        return given
    return [seed for one in given for seed in (_range(one) if isinstance(one, str) else [one])]


def _range(text: str) -> list[int]:
    found = _RANGE.fullmatch(text.replace(" ", ""))
    if found is None:
        raise ValueError(f"{text!r} is no range of seeds; write its first and its last, such as 0..9")
    first, last = map(int, found.groups())
    if first > last:
        raise ValueError(f"{text!r} holds no seed, for it runs backwards; write {last}..{first}")
    if last - first >= MOST_SEEDS:
        raise ValueError(f"{text!r} holds {last - first + 1} seeds, more than {MOST_SEEDS}; shorten it")
    return list(range(first, last + 1))


SeedList = Annotated[
    list[int | Seeds], BeforeValidator(_seeds_of, json_schema_input_type=str | list[int | str | Seeds])
]


class Experiment(Strict):
    """A whole YAML file, its preset filled in; `variants` maps a label to dotted overrides of this file.

    `runs` is the folder of the run folders (output/runs if absent); experiments that share it share their runs. Either
    may be an s3:// address.
    `compare` names the table of the paper to print beside, `track_cosine` logs both semantics' penalty gradients.
    `schedule` changes the learning rate, and fields of every method that has them, from epoch to epoch. `search` has
    Optuna look for good values beside the grid.
    """

    name: Annotated[str, Field(pattern=r"^\.*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", max_length=200)]
    title: str = ""
    preset: Preset = "toolbox-2015"
    data: Data
    network: NetworkChoice
    training: Training = Training()
    tangents: Tangents = Tangents()
    methods: Annotated[dict[str, SerializeAsAny[MethodRow]], Field(min_length=1)]
    schedule: Schedule = CONSTANT
    search: Search | None = None
    seeds: SeedList = Field(default=[0], min_length=1)
    variants: dict[str, dict[str, Any]] = Field(default={})
    select: Literal["validation", "test"] = "validation"
    evaluate: Evaluate = Evaluate()
    compare: PublishedTable | None = None
    track_cosine: bool = False
    workers: Count = 1
    output: str | None = None
    runs: str | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """A row is called as its method unless it names one."""
        return {label: _labelled(label, row) for label, row in given.items()} if isinstance(given, dict) else given

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int | Seeds]) -> list[int | Seeds]:
        list(once(seed if isinstance(seed, Seeds) else Seeds.of(seed) for seed in seeds))
        return seeds

    @model_validator(mode="after")
    def _scheduled(self) -> Experiment:
        """Each name is of a number, and that number in its range in every epoch."""
        faults = []
        for name in self.schedule.root:
            try:
                self._check_schedule(name)
            except (TypeError, ValueError) as error:
                faults.append(faulty(str(error), "schedule", name))
        if faults:
            raise ValidationError.from_exception_data("Experiment", faults)
        return self

    def _check_schedule(self, name: str) -> None:
        training, own = self.training, [point for row in self.methods.values() for point in row.points]
        if name == RATE:
            rates = [self.schedule.value(name, training.rate, e, training.epochs) for e in range(training.epochs)]
            if min(rates) <= 0:
                raise ValueError(f"{min(rates):g} in epoch {rates.index(min(rates)) + 1}; it must be positive")
            return
        having = {getattr(point, name): point for point in own if name in numbers(point)}
        if not having:
            known = [RATE, *dict.fromkeys(number for point in own for number in numbers(point))]
            close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
            meant = f"did you mean {close[0]}?" if close else f"numbers there are: {', '.join(known)}"
            raise ValueError(f"no number of the training or of one of the methods; {meant}")
        for point in having.values():
            for epoch in range(training.epochs):
                scheduled(point, self.schedule, epoch, training.epochs)

    @model_validator(mode="after")
    def _searched(self) -> Experiment:
        if self.search is None:
            return self
        unknown = [row for row in self.search.rows([]) if row not in self.methods]
        if unknown:
            raise ValueError(f"search.space: {unknown[0]} is no row; there is {', '.join(self.methods)}")
        if not self.data.validation:
            raise ValueError("search judges by the validation error: set data.validation to a number of examples")
        if self.search.prune and not self.training.test_every:
            raise ValueError("search stops bad trials every training.test_every epochs: set it, or search.prune: false")
        if self.variants:
            raise ValueError("search and variants cannot be combined: leave one of the two to another file")
        return self

    @model_validator(mode="after")
    def _choice(self) -> Experiment:
        choices = any(row.axes for row in self.methods.values())
        if choices and self.select == "validation" and not self.data.validation:
            raise ValueError(
                "several values of a method's field need a validation split to choose by: set data.validation to a "
                "number of examples, or select: test"
            )
        return self


def _labelled(label: str, row: Any) -> Any:
    if not isinstance(row, dict | None):
        return row
    own = row or {}
    return {**own, "method": own.get("method") or label}
