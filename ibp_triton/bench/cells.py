"""A suite at work, cell by cell: parity first, then all candidates in turn; what is finished is not measured again."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import ibp_triton as ibp
from ibp_triton.alike import in_short
from ibp_triton.bench import bench_json, by_hand, candidates, measure, parity, pass_ledger, whole_steps
from ibp_triton.bench.candidates import Case
from ibp_triton.bench.data_parallel import Member, in_processes
from ibp_triton.bench.replicated_gradients import ReplicatedGradients
from ibp_triton.bench.suite import AXES, Suite
from ibp_triton.errors import BenchError, IBPError
from ibp_triton.harness import store

TWIN_RATE = 1e-3  # learning rate at which steps of two kinds are held against each other
Say = Callable[[str], None]


@dataclass
class Candidate:
    """What is timed: its name in a cell, the call, the method that it is or stands for, its kind."""

    label: str
    run: Callable[[], Any]
    kind: str  # gradient; together, of several networks; eager, compiled or captured step; sums of gradients
    method: str
    ours: bool = True
    off: float | None = None  # parity
    making: float | None = None  # CPU seconds that a step took to compile or capture, with its first calls
    waits: list[float] = field(default_factory=list)  # seconds that each call waited for sums over processes


@dataclass
class Cell:
    """A case with its candidates; `refused` says why what is missing is."""

    case: Case
    suite: Suite
    members: dict[str, Candidate] = field(default_factory=dict)
    refused: list[dict[str, str]] = field(default_factory=list)

    def add(self, label: str, make: Callable[[], Any], method: str, ours: bool, off: float | None = None) -> None:
        """A gradient; one that can't be made is refused."""
        try:
            self.members[label] = Candidate(label, make(), "gradient", method, ours, off)
        except (IBPError, RuntimeError) as error:
            self.refuse(label, f"{type(error).__name__}: {error}", fault=ours)

    def refuse(self, label: str, reason: str, fault: bool = True) -> None:
        """A candidate that is not timed; a fault is one of ours."""
        self.refused.append(
            {"cell": self.case.name, "candidate": label, "reason": reason, "fault": "ours" if fault else "baseline"}
        )


def prepare(suite: Suite, case: Case, say: Say) -> Cell:
    """All candidates of a cell whose gradient has been found right."""
    cell = Cell(case, suite)
    if _data_parallel(suite, case):
        for label in suite.methods:
            if not suite.skips(case, label):
                _add_data_parallel(cell, label, suite.method(label))
        return cell
    if "eager_bp" in suite.baselines:
        cell.add("eager_bp", lambda: by_hand.autograd(case, ibp.BP()), "bp", ours=False)
    if "eager_bp_nchw" in suite.baselines:
        cell.add("eager_bp_nchw", lambda: by_hand.eager_bp_nchw(case), "bp", ours=False)
    for label in suite.methods:
        if not suite.skips(case, label):
            say(f"parity of {label}")
            _add_method(cell, label)
    return cell


def _add_method(cell: Cell, label: str) -> None:
    case, method = cell.case, cell.suite.method(label)
    try:
        verdict = parity.check(case, method)
    except Exception as error:  # whatever it is, what else there is to measure is measured
        cell.refuse(label, f"{type(error).__name__}: {error}")
        return
    if verdict.ours is not None:
        cell.refuse(label, verdict.ours)
        return
    hand = by_hand.applies(case, method) and not cell.suite.skips(case, label, "by_hand")
    wanted = {name for name in ("by_hand", "by_hand_step") if hand and name in cell.suite.baselines}
    if wanted and verdict.by_hand is not None:
        cell.refuse(f"{label} by_hand", verdict.by_hand, fault=False)
        wanted.clear()
    if "by_hand" in wanted and method.key != "bp":
        cell.add(f"{label} by_hand", lambda: by_hand.autograd(case, method), label, ours=False)
    for kind in cell.suite.step:
        if kind == "gradient":
            cell.add(label, lambda: candidates.ours(case, method), label, ours=True, off=verdict.off)
        elif cell.suite.skips(case, label, kind):
            continue
        elif kind == "together":
            _add_replicas(cell, label, method)
        else:
            if "by_hand_step" in wanted and kind in whole_steps.BY_HAND:
                _add_step(cell, label, method, kind, ours=False)
            _add_step(cell, label, method, kind, ours=True)


def _data_parallel(suite: Suite, case: Case) -> bool:
    """Whether what is timed are steps of several processes, or of one that pretends a link to others."""
    return case.processes > 1 or suite.link is not None


def _add_data_parallel(cell: Cell, label: str, method: ibp.Method) -> None:
    """A step of all processes, in each of them, beside what the suite asks for."""
    suite, member = cell.suite, _member(cell)
    found, expected = member.gradients(method)
    off, limit = parity.apart(found, expected), parity.PARITY[cell.case.precision]
    if off > limit:
        cell.refuse(label, f"off the mean of each process's gradients by {off:.2g}, more than {limit:g}")
        return
    world, late = member.world(), member.world(late=True)
    steps: dict[str, tuple[Callable[[], Any], list[float]]] = {"eager step": (member.step(method, world), world.waits)}
    if "late_sums" in suite.baselines:
        steps["late_sums eager step"] = (member.step(method, late), late.waits)
    if "one_process" in suite.baselines:
        steps["one_process eager step"] = (member.alone(method), [])
    if "by_hand_step" in suite.baselines and method.key == "bp" and suite.link is None:
        steps["by_hand eager step"] = (member.by_hand(), [])
    for name, (run, waits) in steps.items():
        whole, ours = f"{label} {name}", name == "eager step"
        cell.members[whole] = Candidate(whole, run, "eager", label, ours, off if ours else None, waits=waits)
    if "sums" in suite.baselines:
        cell.members[f"{label} sums"] = Candidate(f"{label} sums", member.adding_up(), "sums", label)


def _member(cell: Cell) -> Member:
    return Member(cell.case, None if cell.suite.link is None else 1e9 * cell.suite.link)


def _add_replicas(cell: Cell, label: str, method: ibp.Method) -> None:
    """The gradients of all replicas in one call, and one after another."""
    try:
        both = ReplicatedGradients(cell.case, method)
        off, allowed = both.off()
    except Exception as error:  # of torch's transforms, whatever its type
        cell.refuse(f"{label} together", in_short(error), fault=False)
        return
    if not off <= allowed:
        cell.refuse(f"{label} together", f"off one by one by {off:.2g}, more than {allowed:g}", fault=False)
        return
    runs = {"together": both.together} | (
        {"one_by_one": both.one_by_one} if "one_by_one" in cell.suite.baselines else {}
    )
    for name, run in runs.items():
        cell.members[f"{label} {name}"] = Candidate(f"{label} {name}", run, "together", label, True, off)


def _add_step(cell: Cell, label: str, method: ibp.Method, kind: str, ours: bool) -> None:
    """A whole step, after a few of them beside eager ones."""
    case, make = cell.case, whole_steps.ours if ours else whole_steps.by_hand_step
    name, off, begin = f"{label} {kind} step" if ours else f"{label} by_hand {kind} step", 0.0, measure.cpu_seconds()
    try:
        step = make(case, method, kind, TWIN_RATE)
        step.step()
        making = measure.cpu_seconds() - begin
        if kind != "eager":
            twin = make(case, method, "eager", TWIN_RATE)
            twin.step()
            off = whole_steps.off_twin(step, twin)
    except Exception as error:  # whatever a compiler raises
        cell.refuse(name, in_short(error), fault=False)
        return
    if off > parity.LARGEST[case.precision] and off > (allowed := parity.NOISE * _rounding(case, method)):
        cell.refuse(name, f"off its eager twin by {off:.2g}, more than {allowed:.2g}", fault=ours)
        return
    cell.members[name] = Candidate(name, step.step, kind, label, ours, off, making)


def _rounding(case: Case, method: ibp.Method) -> float:
    """How far eager steps from parameters a few last bits away are off the eager twin: one ReLU of many turns."""
    near = [whole_steps.ours(case, method, "eager", TWIN_RATE, moved=seed) for seed in range(2)]
    return max(whole_steps.off_twin(one, whole_steps.ours(case, method, "eager", TWIN_RATE)) for one in near)


def measured(cell: Cell, say: Say) -> dict[str, Any]:
    """Times and memory of every candidate, and what they are to each other, as the JSON of one cell."""
    suite, runs = cell.suite, {label: one.run for label, one in cell.members.items()}
    rounds = iter(range(1, suite.warmup + suite.rounds + 1))
    cuda = torch.device(cell.case.device).type == "cuda"
    shared = _data_parallel(suite, cell.case)

    def tick() -> None:
        say(f"round {next(rounds)} of {suite.warmup + suite.rounds}")

    before = _load()
    clock: measure.Clock = "device" if cuda else "wall" if shared else "cpu"
    before_each = _member(cell).barrier if shared else lambda: None
    times = measure.interleave(runs, suite.rounds, suite.warmup, clock, tick, before_each)
    seen = [one for one in cell.members.values() if cuda or one.kind != "compiled"]  # which no dispatch mode enters
    memory = {one.label: peak(one.run, cuda) for one in seen} if suite.memory else {}
    kinds = pass_ledger.spent({one.label: one.run for one in seen}, suite.rounds) if suite.profile else {}
    if _member(cell).rank != 0:
        return {}  # process 0 tells
    around = {"load_average": [before, _load()]}
    facts = {label: _facts(cell, one, times, memory) | around for label, one in cell.members.items()}
    for label, spent in kinds.items():
        left = times[label].median - sum(spent.values())
        facts[label]["spent_seconds"] = {**spent, "Python": left}
    entries = [
        bench_json.entry(suite.name, cell.case.name, label, times[label].seconds, facts[label]) for label in runs
    ]
    return {"cell": cell.case.name, "benchmarks": entries, "refused": cell.refused}


def _load() -> float | None:
    """Processes that want a CPU, the last minute's mean, this one among them."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def peak(run: Callable[[], Any], cuda: bool) -> int:
    """Bytes at the most, of what a call makes."""
    if not cuda:
        return measure.peak_memory(run)
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - start


def _facts(cell: Cell, one: Candidate, times: dict[str, measure.Times], memory: dict[str, int]) -> dict[str, Any]:
    case, mine = cell.case, times[one.label]
    found = case.info() | {
        "batch": case.batch, "backend": case.backend, "device": case.device, "family": case.entry.family,
        "candidate": one.label, "method": one.method, "step": one.kind, "baseline": one.label == "eager_bp",
        "ours": one.ours,
        "clock": mine.clock, "cpu_seconds": mine.cpu, "wall_seconds": mine.wall,
        "wall_median": statistics.median(mine.wall), "parity": one.off,
    }  # fmt: skip
    if one.label in memory:
        found["peak_memory"] = memory[one.label]
    if one.waits:
        first = cell.suite.warmup
        found["waiting_seconds"] = statistics.median(one.waits[first : first + cell.suite.rounds])
    if one.making is not None:
        found["making_seconds"] = one.making
    if one.ours:
        found["predicted_ratio"] = _predicted(case, cell.suite.method(one.method))
    elif "by_hand" in one.label:
        found["by_hand"] = by_hand.title(cell.suite.method(one.method))
    ratios = dict(_ratios(cell, one, times, memory))
    found["ratios"], over_bp = ratios, ratios.get(f"{one.label} / bp")
    return found | ({"interleaved_ratio_to_bp": over_bp["median_of_ratios"]} if over_bp else {})


_BESIDE = {"gradient": ("by_hand",), "together": ("one_by_one",), "sums": ("eager step",)}
_STEPS = (
    "eager step", "by_hand eager step", "by_hand compiled step", "one_process eager step", "late_sums eager step"
)  # fmt: skip


def _ratios(
    cell: Cell, one: Candidate, times: dict[str, measure.Times], memory: dict[str, int]
) -> Iterator[tuple[str, dict[str, float]]]:
    """This candidate over others, by the names that targets use."""
    step = one.kind != "gradient"
    if not (one.ours or step):
        return
    names = _BESIDE.get(one.kind, _STEPS if one.ours else ("by_hand eager step",) if one.kind == "compiled" else ())
    others = {name: f"{one.method} {name}" for name in names}
    if not step:
        others |= {name: name for name in ("bp", "eager_bp", "eager_bp_nchw")}
    for name, label in others.items():
        if label == one.label or label not in times:
            continue
        over = {
            "median_of_ratios": measure.ratio(times[one.label], times[label]),
            "ratio_of_medians": times[one.label].median / times[label].median,
        }
        if name in ("bp", "eager_bp"):
            over["predicted"] = _predicted(cell.case, cell.suite.method(one.method))
        yield f"{one.label} / {name}", over
        if one.label in memory and label in memory:
            yield f"memory {one.label} / {name}", {"ratio_of_medians": memory[one.label] / memory[label]}
    if one.label == "bp" and "floor" in cell.suite.baselines:
        yield "bp / floor", {"ratio_of_medians": times[one.label].median / floor(cell.case)}


def floor(case: Case) -> float:
    """Seconds of BP's multiply-adds at the machine's best rate."""
    work = ibp.Network(case.model(), backend="torch").multiply_adds(case.shape)
    return ibp.BP().multiply_adds(work, case.tangents) / _best_rate(case.dtype or torch.float32)


_best_rate = cache(measure.best_rate)
_predicted = cache(candidates.predicted)


def run_cell(suite: Suite, case: Case, folder: Path, say: Say) -> tuple[dict[str, Any], bool]:
    """The cell's JSON, and whether it was measured now: not if `folder` holds it, finished, of this very code."""
    path, seal = folder / f"{case.name.replace('/', '_').replace(':', '_')}.json", signature(suite, case)
    stored = store.find_json(path)
    if stored is not None and stored.get("signature") == seal and not faults(stored):
        return stored, False
    start = time.perf_counter()
    try:
        found = in_processes(case.processes, suite.threads, partial(_measured, suite, case), say)
    except BenchError as error:
        fault = {"cell": case.name, "candidate": "all", "reason": str(error), "fault": "ours"}
        found = {"cell": case.name, "benchmarks": [], "refused": [fault]}
    found |= {"signature": seal, "seconds": time.perf_counter() - start}
    store.write_json(path, found)
    return found, True


def _measured(suite: Suite, case: Case, say: Say) -> dict[str, Any]:
    return measured(prepare(suite, case, say), say)


def faults(cell: dict[str, Any]) -> list[dict[str, str]]:
    """What was refused for a gradient of ours."""
    return [one for one in cell["refused"] if one["fault"] == "ours"]


def signature(suite: Suite, case: Case) -> str:
    """Of all that a cell's figures come from: its settings, this package's code, the machine."""
    settings = suite.model_dump(
        mode="json", exclude={"name", "title", "targets", "output", "networks", *AXES}, by_alias=True
    )
    own = suite.networks[case.network].model_dump(mode="json", by_alias=True)
    told = [case.name, own, settings, code_digest(), measure.machine()]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@cache
def code_digest() -> str:
    """SHA-256 of this package's source."""
    root, found = Path(ibp.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()
