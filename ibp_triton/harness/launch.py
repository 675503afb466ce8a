"""Runs of a grid, by whichever executor: whoever holds a run's lock trains it, finished runs are skipped."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ibp_triton.errors import DamageError, DataError, LaunchError, NetworkError, OvertakenError, PrunedError
from ibp_triton.harness import evaluate, mirror, provenance, sources, store
from ibp_triton.harness.bucket import Bucket
from ibp_triton.harness.config import Evaluate
from ibp_triton.harness.executors.desk import Desk, Event, Executor, Listener
from ibp_triton.harness.executors.local import Local
from ibp_triton.harness.grid import Run
from ibp_triton.harness.team import ALONE, Team
from ibp_triton.harness.threads import one_thread
from ibp_triton.harness.train import Shared, course
from ibp_triton.harness.turns import Course, SideBySide, alone

ERROR = "error.txt"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Job:
    """Runs to train and evaluate under `root`, one folder each; `data_dir` overrides data.dir.

    `accept_changed` takes stored runs as they are although their data or code have changed since. `is_hopeless` may
    stop a run after an epoch, which is then neither finished nor failed. Of runs in a `bucket`, `root` has the small
    files, as they were when the launch began.
    """

    runs: Sequence[Run]
    root: Path
    data_dir: str | None = None
    evaluate: Evaluate = field(default_factory=Evaluate)
    accept_changed: bool = False
    is_hopeless: Callable[[Run, store.Record], bool] | None = None
    bucket: Bucket | None = None

    @property
    def place(self) -> str:
        """Where the runs are, as a user names it."""
        return self.bucket.url if self.bucket else str(self.root)

    def hold(self, name: str) -> AbstractContextManager[mirror.Held | None]:
        """The folder of a run and its lock; None if another process holds that."""
        return mirror.held(self.root, name, self.bucket)


def launch(job: Job, executor: Executor | int, listen: Listener) -> list[str]:
    """Train what is not finished yet, by an executor or so many local processes; the messages of runs that failed.

    `listen` gets events {"kind": "start", "epoch", "evaluate", "done", "busy", "failed" or "note", "run": name, ...}
    in this process. Raises LaunchError for data and models that no run can use, for stored runs whose data or code have
    changed, for a device that is not there, for a full disk and if workers die before they train anything.
    """
    job = replace(job, runs=provenance.settle(job.runs, job.root))
    check_changes(job)
    pending = list({run.name: run for run in job.runs if not finished(job, run)}.values())
    failures: dict[str, Event] = {}
    execute = Local(executor) if isinstance(executor, int) else executor
    width = execute.width if any(run.training.replicas == "auto" for run in pending) else 1
    if job.bucket and pending:
        job.bucket.check()
    leased: list[Run] = []
    conduct(job, execute, Desk(pending, _sparing(leased, pending, listen), failures, width))
    if job.bucket and leased:  # by processes that may have died
        text = f"{len(leased)} runs are locked by other processes; waits to see which of these live"
        listen({"kind": "note", "run": "", "message": text})
        patient = replace(job, bucket=replace(job.bucket, patient=True))
        conduct(patient, execute, Desk(leased, listen, failures, width))
    unfit = {event["message"] for event in failures.values() if event.get("unfit")}
    if len(unfit) == 1 and len(failures) == len(pending):
        raise LaunchError(unfit.pop())
    return [f"{name}: {event['message']}" for name, event in failures.items()]


def _sparing(leased: list[Run], runs: Sequence[Run], listen: Listener) -> Listener:
    """Listens for the runs whose lock in a bucket another process holds; of the rest `listen` hears."""
    known = {run.name: run for run in runs}

    def hear(event: Event) -> None:
        if event["kind"] == "busy" and event.get("leased"):
            leased.append(known[event["run"]])
        else:
            listen(event)

    return hear


def conduct(job: Job, executor: Executor, desk: Desk) -> None:
    """Train and evaluate whatever the desk hands out, as `job` says."""
    executor(partial(_one, replace(job, runs=())), desk)


def check_changes(job: Job) -> None:
    """Raise LaunchError where stored runs were trained on other data or by other code, unless that is accepted."""
    changed = [(run, found) for run in job.runs if (found := provenance.changes(run, job.root / run.name))]
    if job.accept_changed:
        for run, _ in changed:
            with job.hold(run.name) as held:
                if held:
                    provenance.accept(run, held.folder)
                    held.commit()
                    if job.bucket:
                        job.bucket.fetch([f"{run.name}/{store.CONFIG}"], job.root)
        return
    if changed:
        kinds = dict.fromkeys(kind for _, found in changed for kind in found)
        what = " and ".join(f"{provenance.KEYS[kind]} ({_named(changed[0][0], kind)})" for kind in kinds)
        raise LaunchError(
            f"{what} changed since {len(changed)} of these runs were trained, such as "
            f"{job.place}/{changed[0][0].name}: restore what they were trained with, or move their folders away to "
            "train them anew, or keep them as they are with --accept-changed"
        )


def _named(run: Run, kind: str) -> str:
    return str(run.data.path if kind == "data" else provenance.targets(run)[kind])


def download(job: Job) -> None:
    """Fetch the files of public sets that unfinished runs lack, once and before any worker; raises DataError."""
    needed = {(run.data.source, run.data.dir): run.data for run in job.runs if not finished(job, run)}
    for data in needed.values():
        sources.public_files(data.found_in(job.data_dir))


def check_device(name: str, key: str) -> None:
    """Raise LaunchError unless torch can compute on the device that the setting `key` names."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        reason = str(error).partition("\n")[0]
        raise LaunchError(f"{key}: {name} cannot be used here ({reason}); take cpu, or another machine") from None


def finished(job: Job, run: Run) -> bool:
    """Whether the run's result and its evaluation are stored and sound."""
    return _is_finished(job.root / run.name, job)


def _is_finished(folder: Path, job: Job) -> bool:
    return store.result(folder) is not None and evaluate.done(folder, job.evaluate)


def remaining(job: Job) -> dict[str, float]:
    """The share of its training that each unfinished run still needs; 0 where only its evaluation is missing."""
    stored = {entry.name for entry in os.scandir(job.root)} if job.root.is_dir() else set()
    left = {}
    for run in provenance.settle(job.runs, job.root):
        if run.name not in stored:
            left[run.name] = 1.0
        elif not finished(job, run):
            left[run.name] = _remaining(job.root / run.name, run)
    return left


def _remaining(folder: Path, run: Run) -> float:
    if store.result(folder):
        return 0.0
    return 1.0 - min(1.0, store.count_epochs(folder) / run.training.epochs)


def _one(job: Job, run: Run, listen: Listener, *, team: Team = ALONE) -> None:
    """Train and evaluate one run, or one and those beside it."""
    if run.beside:
        _row(job, run.together, listen)
    else:
        alone(_course(job, run, listen, team), team)


def _row(job: Job, runs: Sequence[Run], listen: Listener) -> None:
    """Runs side by side; where a step of theirs fails each goes on alone, so that the one at fault fails alone."""
    shared: Shared = {}
    with one_thread():
        left, error = SideBySide([_course(job, run, listen, ALONE, shared) for run in runs]).run()
    if error is not None:
        message = f"side by side: {_reason(error)['message']}; each of these runs goes on alone"
        listen({"kind": "note", "run": runs[left[0]].name, "message": message})
    for number in left:
        _one(job, runs[number], listen)


def _course(job: Job, run: Run, listen: Listener, team: Team, shared: Shared | None = None) -> Course[None]:
    """Train and evaluate one run; whatever its files, model or data raise, the other runs go on."""
    try:
        check_device(run.training.device, "training.device")
        with one_thread(), job.hold(run.name) as held:
            if held is None:
                return listen(_busy(job, run))
            if not _is_finished(held.folder, job):
                listen({"kind": "start", "run": run.name})
                result = yield from _trained(run, held, job, listen, team, shared)
                listen({"kind": "done", "run": run.name, **result})
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except PrunedError:
        listen({"kind": "pruned", "run": run.name})
    except OvertakenError as error:
        listen({"kind": "note", "run": run.name, "message": f"{error}, and goes on with this run"})
        listen(_busy(job, run))
    except LaunchError as error:
        listen({"kind": "fatal", "run": run.name, "message": str(error)})
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in FULL:
            listen({"kind": "fatal", "run": run.name, "message": _full(error)})
        _note(job, run)
        listen({"kind": "failed", "run": run.name, **_reason(error)})


def _busy(job: Job, run: Run) -> Event:
    return {"kind": "busy", "run": run.name, **({"leased": True} if job.bucket else {})}


def _note(job: Job, run: Run) -> None:
    """Write down the error that is being handled."""
    text = traceback.format_exc().encode(errors="replace")
    with suppress(OSError, LaunchError):
        if job.bucket:
            job.bucket.replace(f"{run.name}/{ERROR}", text)
        else:
            store.write_bytes(job.root / run.name / ERROR, text)


def _trained(
    run: Run, held: mirror.Held, job: Job, listen: Listener, team: Team, shared: Shared | None
) -> Course[store.Record]:
    folder = held.folder

    def report(record: store.Record) -> None:
        held.commit()
        listen({"kind": "epoch", "run": run.name, **record})
        if job.is_hopeless and job.is_hopeless(run, record):
            raise PrunedError

    def say(message: str) -> None:
        listen({"kind": "note", "run": run.name, "message": held.told(message)})

    def tell(share: float) -> None:
        listen({"kind": "evaluate", "run": run.name, "share": share})

    store.sweep(folder)
    (folder / ERROR).unlink(missing_ok=True)
    result = store.result(folder)
    if result is None and (folder / store.RESULT).exists():
        say(f"{folder / store.RESULT}: damaged, or of another run; the run counts as not finished")
    result = result or (yield from course(run, folder, report, job.data_dir, say, team, shared))
    held.commit()
    if not evaluate.done(folder, job.evaluate):
        tell(0.0)
        evaluate.evaluate(run, folder, job.evaluate, job.data_dir, tell)
        held.commit()
    return result


def _reason(error: BaseException) -> Event:
    """What a failed run says; `unfit`: which part of its config no run can use."""
    if isinstance(error, DataError | NetworkError):
        return {"message": str(error), "unfit": "data" if isinstance(error, DataError) else "network"}
    if isinstance(error, DamageError):
        return {"message": str(error)}
    return {"message": f"{type(error).__name__}: {error}"}


def _full(error: OSError) -> str:
    return f"{error}; is there space, and may this user write there? Finished runs and epochs are stored"
