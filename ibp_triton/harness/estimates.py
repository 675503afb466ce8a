"""What runs will cost: multiply-adds relative to BP, and seconds from a few timed steps on random images."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch.nn import functional as F

import ibp_triton as ibp
from ibp_triton.errors import NetworkError
from ibp_triton.harness import data, evaluate, models, sources
from ibp_triton.harness.config import Evaluate, NetworkChoice, Precision
from ibp_triton.harness.grid import Run
from ibp_triton.harness.models import PRECISIONS, Shape
from ibp_triton.harness.threads import one_thread
from ibp_triton.ledger import MultiplyAdds

T = TypeVar("T")
LARGEST = 1024


def shape_of(run: Run) -> tuple[Shape, int]:
    """Image shape and classes; a stand-in of 28×28 greys where only the files would tell."""
    return data.shape_of(run.data) or ((1, 28, 28), 10)


def examples(run: Run) -> int | None:
    """Training examples of a run; None where only the files would tell."""
    if run.data.subset:
        return run.data.subset
    total = sources.examples_of(run.data)
    return None if total is None else total - run.data.validation


def batch(run: Run) -> int:
    """Examples of a timed step: those of a batch, but no more than there are to train on, nor than fit anywhere."""
    return min(run.training.batch_size, examples(run) or LARGEST, LARGEST)


def ratio(run: Run) -> float:
    """Multiply-adds of one step of `run` relative to BP; in sweeps alone where only files tell the image shape."""
    if data.shape_of(run.data) is None:
        return _sweeps(run)
    try:
        work = _work(run.network.model_dump_json(by_alias=True), batch(run), *shape_of(run))
        return run.method.multiply_adds(work) / ibp.BP().multiply_adds(work)
    except NetworkError:
        raise
    except Exception:  # too large for this machine, or a model that cannot be counted: its run will say so
        return _sweeps(run)


def _sweeps(run: Run) -> float:
    return run.method.sweeps / ibp.BP().sweeps


@lru_cache
def _work(network: str, batch: int, shape: Shape, classes: int) -> MultiplyAdds:
    """Multiply-adds of each kind of sweep."""
    model = models.build(NetworkChoice.model_validate_json(network), shape, classes, 0)
    return ibp.Network(model).multiply_adds((batch, *shape))


def weight(run: Run) -> float:
    """Work of a run in example-passes of BP; a thousand examples where their number is not known yet."""
    return _of_runs(_weight, run)


def seconds(run: Run) -> float | None:
    """Estimated seconds of a run on this machine; None where its examples are not counted yet, or it is too large."""
    return _of_runs(_seconds, run)


def evaluation(run: Run, choice: Evaluate) -> float:
    """Work of a run's evaluation, as `weight` has it; a thousand examples where their number is not known yet."""
    examples = sources.tests_of(run.data) or 1000
    return min(examples, choice.examples or examples) * _once(_passes_over_bp, choice, choice)


def evaluation_seconds(run: Run, choice: Evaluate) -> float:
    """Estimated seconds of a run's evaluation on this machine; 0 where it can't be estimated."""
    try:
        return evaluation(run, choice) * example_seconds(run)
    except (NetworkError, RuntimeError, MemoryError):
        return 0.0


def _weight(run: Run) -> float:
    try:
        relative = ratio(run)
    except NetworkError:  # one network that cannot be built leaves the other runs alone
        relative = _sweeps(run)
    return relative * (examples(run) or 1000) * run.training.epochs


def _seconds(run: Run) -> float | None:
    try:
        return None if examples(run) is None else weight(run) * example_seconds(run)
    except (RuntimeError, MemoryError):
        return None


def _passes_over_bp(choice: Evaluate) -> float:
    return sum(evaluate.passes(choice).values()) / ibp.BP().sweeps


@lru_cache(4096)
def _program(method: ibp.Method) -> Any:
    """The method's passes, of equal methods once: each run of a grid has an object of its own."""
    return method.program


_KNOWN: dict[tuple[Any, ...], tuple[Any, Any]] = {}  # by what a grid's runs share, beside one that keeps it alive


def _of_runs(function: Callable[[Run], T], run: Run) -> T:
    """The cost of a run, worked out once for all that differ from it in seeds, or in values that change no pass."""
    return _once(function, run, run.data, run.network, run.training, _program(run.method))


def _once(function: Callable[[Any], T], argument: Any, *shared: Any) -> T:
    """What the function finds, worked out once for these very objects."""
    key = (function, *map(id, shared))
    if key not in _KNOWN:
        if len(_KNOWN) > 100_000:
            _KNOWN.clear()
        _KNOWN[key] = (argument, shared), function(argument)
    found: T = _KNOWN[key][1]
    return found


def slowness(run: Run) -> float:
    """How many times longer than in float32 a step of BP takes in the run's precision on this machine's CPU, or 1."""
    in_full = replace(run, training=run.training.model_copy(update={"precision": "fp32"}))
    try:
        return example_seconds(run) / example_seconds(in_full)
    except (NetworkError, RuntimeError, MemoryError):  # its run will say why
        return 1.0


def clock(seconds: float) -> str:
    """As days and h:mm:ss; what is longer than any clock tells is the longest."""
    return str(timedelta(seconds=min(round(seconds), 10**12)))


def makespan(work: Collection[float], workers: int) -> float:
    """The least time of `workers` for runs of these times, each of which one worker trains."""
    return max(sum(work) / workers, max(work, default=0.0))


@lru_cache
def _time_bp(network: str, precision: Precision, batch: int, shape: Shape, classes: int) -> float:
    model = models.build(NetworkChoice.model_validate_json(network), shape, classes, 0)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    wrapped, method = ibp.Network(model, dtype=PRECISIONS[precision]), ibp.BP()
    x = torch.rand(batch, *shape).contiguous(memory_format=torch.channels_last)
    labels = F.one_hot(torch.arange(batch) % classes, classes).argmax(1)
    best = float("inf")
    with one_thread():  # as runs are: several threads on a busy machine wait for each other, a hundred times a step
        for _ in range(5):
            begin = time.perf_counter()
            method(wrapped, x, labels).backward()
            best = min(best, time.perf_counter() - begin)
    return best / batch


def example_seconds(run: Run) -> float:
    """Seconds of BP an example on this machine: the best of five steps on random images, CPU, one thread."""
    shape, classes = shape_of(run)
    network = run.network.model_dump_json(by_alias=True)
    return _time_bp(network, run.training.precision, batch(run), shape, classes)
