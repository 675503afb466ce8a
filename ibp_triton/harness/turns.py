"""Whose turn it is: a run is a course of steps that it waits for, made alone or beside those of other runs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

import ibp_triton as ibp
from ibp_triton.alike import in_short
from ibp_triton.harness import models, optimizers
from ibp_triton.harness.batches import Batch
from ibp_triton.harness.grid import Run
from ibp_triton.harness.team import ALONE, Team
from ibp_triton.randomness import RandomState
from ibp_triton.replicas import seeded

T = TypeVar("T")


class Watch:
    """Seconds of work: on the CPU those of the process, which a busy machine does not stretch; and on the wall."""

    def __init__(self, device: str) -> None:
        self._clock = time.process_time if device == "cpu" else time.perf_counter
        self.seconds = self.wall = 0.0
        self.go()

    def go(self) -> None:
        """Go on."""
        self._begin = self._clock(), time.perf_counter()

    def stop(self) -> None:
        """Until the next `go`."""
        self.seconds += self._clock() - self._begin[0]
        self.wall += time.perf_counter() - self._begin[1]

    def add(self, answer: Answer) -> None:
        """The share of a step that others made."""
        self.seconds += answer.seconds
        self.wall += answer.wall

    def record(self) -> dict[str, float]:
        """What it shows."""
        return {"seconds": self.seconds, "wall_seconds": self.wall}


@dataclass(frozen=True, eq=False)
class Turn:
    """A step of a run on a batch; with a `seed` the begin of an epoch, whose random numbers go on from it.

    The latter comes with a batch of the epoch's size, on which nothing is trained. Turns with equal `data` have equal
    batches.
    """

    run: Run
    model: nn.Module
    optimizer: torch.optim.Optimizer
    method: ibp.Method
    batch: Batch
    data: Hashable
    seed: int | None = None

    @property
    def reduce(self) -> Any:
        """What becomes of the gradients."""
        return _twice if self.run.method.key == "at" and self.run.training.at_gradient == "sum" else None

    @property
    def dtype(self) -> torch.dtype | None:
        """That the network computes in."""
        return models.PRECISIONS[self.run.training.precision]


class Answer(NamedTuple):
    """The loss of a step, 0-d, and the run's share of the seconds that it took."""

    loss: Tensor
    seconds: float
    wall: float


Course: TypeAlias = Generator[Turn, Answer | None, T]


def _twice(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum of AT's two gradients instead of their mean."""
    return {name: 2.0 * g for name, g in gradients.items()}


class _Steps:
    """The step of a batch, and that of an epoch's smaller last one, never compiled: a resumed run would differ."""

    def __init__(self, turn: Turn, team: Team) -> None:
        group = team.group
        self._network = ibp.Network(turn.model, dtype=turn.dtype, process_group=group, sync_batchnorm=group is not None)
        self._whole, self._rest = (
            kind(self._network, turn.method, turn.optimizer, reduce=turn.reduce)
            for kind in (_kind(turn, team), ibp.EagerStep)
        )
        self._size = turn.batch.size

    def __call__(self, turn: Turn) -> Answer | None:
        batch = turn.batch
        if turn.seed is not None:
            torch.manual_seed(turn.seed)
            self._whole.method = self._rest.method = turn.method
            # before the first batch, so that a resumed run goes the same ways as one that was never stopped
            if turn.method.program.steep:
                self._network.classes(batch.x)  # which records the model
            if isinstance(self._whole, ibp.CompiledStep):
                self._whole.prepare(batch.x, batch.labels, batch.tangents)
            return None
        watch = Watch(turn.run.training.device)
        step = self._rest if batch.size < self._size else self._whole
        try:
            loss = step(batch.x, batch.labels, batch.tangents).loss
        except RuntimeError as error:  # a model that looks at numbers on the device can't be captured
            if not isinstance(step, ibp.CapturedStep) or step.captures:
                raise
            warnings.warn(f"trained without a CUDA graph: {in_short(error)}", stacklevel=2)
            self._rest.method, self._whole = step.method, self._rest
            loss = self._rest(batch.x, batch.labels, batch.tangents).loss
        watch.stop()
        return Answer(loss, watch.seconds, watch.wall)


def _kind(turn: Turn, team: Team) -> type[ibp.EagerStep]:
    """What a batch of the epoch's size is trained by: on CUDA one graph, if the optimizer keeps its state there."""
    if turn.run.training.compile:
        return ibp.CompiledStep
    alone = team.group is None and optimizers.on_cuda(turn.run.training.device)
    return ibp.CapturedStep if alone and optimizers.is_capturable(turn.optimizer) else ibp.EagerStep


def alone(course: Course[T], team: Team = ALONE) -> T:
    """What becomes of a run whose steps are its own."""
    steps: _Steps | None = None
    try:
        turn = next(course)
        while True:
            try:
                steps = steps or _Steps(turn, team)
                answer = steps(turn)
            except BaseException as error:
                turn = course.throw(error)  # which raises it, with what the run does about it
            else:
                turn = course.send(answer)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


class SideBySide:
    """Courses side by side: a step is made for all that wait for one, by one `ibp.ReplicatedStep`."""

    def __init__(self, courses: Sequence[Course[None]]) -> None:
        self._turns: dict[int, Turn] = {}  # by the course's position
        self._courses = courses
        self._states: dict[int, RandomState] = {}
        self._members: tuple[int, ...] = ()
        self._step: ibp.ReplicatedStep | None = None

    def run(self) -> tuple[list[int], Exception | None]:
        """To the end of all; or, where a step fails, the positions of those that have not ended, and the error."""
        for number in range(len(self._courses)):
            self._advance(number, None)
        while self._turns:
            beginning = {number: turn for number, turn in self._turns.items() if turn.seed is not None}
            for number, turn in beginning.items():
                assert turn.seed is not None
                self._states[number] = seeded(turn.seed, turn.batch.x.device)
                self._advance(number, None)
            if not beginning:
                try:
                    answers = self._answers()
                except Exception as error:
                    return self._close(), error
                for number, answer in answers.items():
                    self._advance(number, answer)
        return [], None

    def _advance(self, number: int, answer: Answer | None) -> None:
        """To the next turn of a course, if it has one."""
        try:
            self._turns[number] = self._courses[number].send(answer)
        except StopIteration:
            self._turns.pop(number, None)

    def _close(self) -> list[int]:
        for number in self._turns:
            self._courses[number].close()
        return list(self._turns)

    def _answers(self) -> dict[int, Answer]:
        """Of those whose batches are of one size; the others wait."""
        size = next(iter(self._turns.values())).batch.x.shape
        turns = {number: turn for number, turn in self._turns.items() if turn.batch.x.shape == size}
        step, every = self._step_of(turns), list(turns.values())
        watch = Watch(every[0].run.training.device)
        step.methods = [turn.method for turn in every]
        losses = _joint(step, every)
        watch.stop()
        self._states |= dict(zip(turns, step.network.states, strict=True))
        share = Answer(losses, watch.seconds / len(every), watch.wall / len(every))
        return {number: share._replace(loss=loss) for number, loss in zip(turns, losses, strict=True)}

    def _step_of(self, turns: dict[int, Turn]) -> ibp.ReplicatedStep:
        if self._step is None or self._members != tuple(turns):
            every = list(turns.values())
            network = ibp.ReplicatedNetwork([t.model for t in every], [0] * len(every), dtype=every[0].dtype)
            methods, optimizers = [t.method for t in every], [t.optimizer for t in every]
            self._step = ibp.ReplicatedStep(network, methods, optimizers, reduce=every[0].reduce)
            self._members = tuple(turns)
        self._step.network.states = [self._states[number] for number in turns]
        return self._step


def _joint(step: ibp.ReplicatedStep, turns: Sequence[Turn]) -> Tensor:
    """The losses [R]; a batch that is the same for all is given once."""
    batches = [turn.batch for turn in turns]
    if len({turn.data for turn in turns}) == 1:
        return step(batches[0].x, batches[0].labels, batches[0].tangents).loss
    x, labels = torch.stack([b.x for b in batches]), torch.stack([b.labels for b in batches])
    tangents = [b.tangents for b in batches if b.tangents is not None]
    return step(x, labels, torch.stack(tangents) if tangents else None, each=True).loss
