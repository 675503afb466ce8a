"""Steps that several processes of this machine take together, each on its own samples, and what they wait for."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, spawn

import ibp_triton as ibp
from ibp_triton.allocator import keep_freed_memory
from ibp_triton.bench.candidates import Case
from ibp_triton.bench.whole_steps import optimizer_of
from ibp_triton.errors import BenchError
from ibp_triton.world import Sums, World

RATE = 1e-3  # learning rate
Say = Callable[[str], None]
State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Watched(World):
    """Processes that write down how long each waited for the sums of one step; ``late``: all begin at the end."""

    late: bool = False
    waits: list[float] = field(default_factory=list)

    def sums(self, parameters: Any, *, forward: bool = False, early: bool = False) -> Sums:
        """As ever, but for ``late``."""
        self.waits.append(0.0)
        return super().sums(parameters, forward=forward, early=early and not self.late)

    def begin(self, value: Tensor) -> Any:
        """As ever, on a clock."""
        return _OnClock(super().begin(value), self.waits)


@dataclass
class _OnClock:
    work: Any
    waits: list[float]

    def wait(self) -> None:
        begin = time.perf_counter()
        self.work.wait()
        self.waits[-1] += time.perf_counter() - begin


@dataclass(frozen=True, eq=False)
class Link(Watched):
    """One process that adds up nothing, which takes as long as a link of ``speed`` bytes a second."""

    speed: float = 1e9
    free: list[float] = field(default_factory=lambda: [0.0])  # when the link will be

    def total(self, count: int, weights: Tensor | None, device: torch.device) -> tuple[int, Tensor | None]:
        """Its own."""
        return count, weights

    def sum(self, value: Tensor) -> Tensor:
        """Its own."""
        return value

    def begin(self, value: Tensor) -> Any:
        """One after another."""
        self.free[0] = max(self.free[0], time.perf_counter()) + value.nbytes / self.speed
        return _OnClock(_Until(self.free[0]), self.waits)


@dataclass
class _Until:
    moment: float

    def wait(self) -> None:
        time.sleep(max(0.0, self.moment - time.perf_counter()))


@dataclass(frozen=True)
class Member:
    """This process's part in a cell of a suite: ``rank`` of ``case.processes``, or alone on a pretended link."""

    case: Case
    link: float | None = None  # bytes a second

    @property
    def rank(self) -> int:
        """0 where there is one process."""
        return dist.get_rank() if dist.is_initialized() else 0

    def barrier(self) -> None:
        """Until all are here."""
        if dist.is_initialized():
            dist.barrier()

    def world(self, late: bool = False) -> Watched:
        """What a step's gradients are added up in."""
        return Watched(dist.group.WORLD, late) if self.link is None else Link(None, late, speed=self.link)

    def step(self, method: ibp.Method, world: World | None) -> Callable[[], Tensor]:
        """Gradient and SGD with momentum on this process's samples, with all others' in a world."""
        case, model = self.case, self.case.model()
        network = ibp.Network(model, backend=case.backend, dtype=case.dtype, process_group=world)
        step = ibp.EagerStep(network, method, optimizer_of(model, RATE))
        batch = self._batch(method, self.rank)
        return lambda: step(*batch).loss

    def by_hand(self) -> Callable[[], Tensor]:
        """BP as one would write it: DistributedDataParallel."""
        case, model = self.case, self.case.model()
        optimizer, parallel = optimizer_of(model, RATE), torch.nn.parallel.DistributedDataParallel(model)
        x, labels, _ = self.case.data(self.rank)
        context = torch.autocast("cpu", case.dtype, enabled=case.dtype is not None)

        def step() -> Tensor:
            optimizer.zero_grad()
            with context:
                loss = torch.nn.functional.cross_entropy(parallel(x), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def alone(self, method: ibp.Method) -> Callable[[], Tensor | None]:
        """The same step by process 0 for itself, which the others wait for."""
        step = self.step(method, None)
        return step if self.rank == 0 else lambda: None

    def adding_up(self) -> Callable[[], State]:
        """The sum of gradients over the processes, once, apart from any step."""
        parameters = dict(self.case.model().named_parameters())
        own = {name: torch.rand_like(p) for name, p in parameters.items()}
        world = self.world()
        return lambda: world.gradients(own, parameters)

    def gradients(self, method: ibp.Method) -> tuple[State, State]:
        """Of all processes' samples, found together; the mean of those of each, found here one after another."""
        case = self.case
        model, plain = (
            ibp.Network(case.model(), case.backend, case.dtype, process_group=g) for g in (self.world(), None)
        )
        found = method.gradients(model, *self._batch(method, self.rank))[1]
        each = [method.gradients(plain, *self._batch(method, rank))[1] for rank in range(case.processes)]
        return found, {name: torch.stack([g[name] for g in each]).mean(0) for name in each[0]}

    def _batch(self, method: ibp.Method, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
        x, labels, tau = self.case.data(rank)
        return x, labels, tau if method.needs_tangents else None


def in_processes(count: int, threads: int, work: Callable[[Say], Any], say: Say) -> Any:
    """What ``work`` gives in process 0 of so many new ones, a group of gloo; what that one says is said here.

    One is this process.

    Raises:
        BenchError: where one fails, with what it said; the others are ended.
    """
    if count == 1:
        return work(say)
    told = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (count, threads, f"{folder}/store", work, told)
        group = spawn(_member, arguments, count, join=False, daemon=True)
        found = None
        try:
            while not group.join(timeout=0.2):
                found = _heard(told, say, found)
        except ProcessException as error:
            last = str(error).strip().splitlines()[-1]  # of its traceback
            raise BenchError(f"process {error.error_index} of {count}: {last}") from error
    return _heard(told, say, found)


def _member(rank: int, count: int, threads: int, store: str, work: Callable[[Say], Any], told: Any) -> None:
    """One of the processes."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    try:
        found = work(lambda text: told.put((text, None)) if rank == 0 else None)
        if rank == 0:
            told.put(("", found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _heard(told: Any, say: Say, found: Any) -> Any:
    """Say what was told since; the result, if it has come."""
    while not told.empty():
        text, result = told.get()
        if result is None:
            say(text)
        else:
            found = result
    return found
