"""The trials of a search: Optuna proposes values, each trial is a run, and bad ones are stopped half-way."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ibp_triton.errors import ConfigError, LaunchError
from ibp_triton.harness import grid, provenance, store
from ibp_triton.harness.config import Evaluate
from ibp_triton.harness.executors.desk import Desk, Event, Executor, Listener
from ibp_triton.harness.executors.slurm_array import Slurm
from ibp_triton.harness.executors.torchrun import Torchrun
from ibp_triton.harness.grid import Run
from ibp_triton.harness.launch import Job, conduct
from ibp_triton.harness.loading import COMMON, ExperimentFile
from ibp_triton.harness.space import Range, Search

FOLDER = "search"
WORST = 100.0  # per cent: what a trial that diverged is told to have
KEPT = ("COMPLETE", "PRUNED", "RUNNING")  # states that count as one of `trials`


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError:
        raise ConfigError("search: Optuna is not installed; pip install 'ibp-triton[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass(frozen=True)
class Study:
    """A row's trials: a study of this name in a journal, which processes and commands may share."""

    journal: Path
    name: str
    search: Search

    def open(self) -> Any:
        """Optuna's own object, made where there is none yet."""
        optuna = _optuna()
        store.make_folder(self.journal.parent)
        backend = optuna.storages.journal.JournalFileBackend(str(self.journal))
        storage = optuna.storages.JournalStorage(backend)
        pruner = optuna.pruners.MedianPruner(self.search.startup) if self.search.prune else optuna.pruners.NopPruner()
        study = optuna.create_study(storage=storage, study_name=self.name, load_if_exists=True, pruner=pruner)
        # as many trials on, the sampler draws other numbers than it did from its start
        study.sampler = optuna.samplers.TPESampler(seed=self.search.seed + len(study.trials), constant_liar=True)
        return study

    def is_hopeless(self, run: Run, record: store.Record) -> bool:
        """Note the validation error of a trial's epoch, if it has one; whether the trial is to be stopped."""
        if "validation_error" not in record:
            return False
        study = self.open()
        for one in study.get_trials(deepcopy=False):
            if one.user_attrs.get("run") == run.name and one.state.name == "RUNNING":
                trial = _optuna().trial.Trial(study, one._trial_id)
                if record["epoch"] not in one.intermediate_values:  # as an epoch that is trained again
                    trial.report(record["validation_error"], record["epoch"])
                return bool(trial.should_prune())
        return False


def studies(plan: ExperimentFile, root: Path) -> Iterator[tuple[str, Study, dict[str, Any]]]:
    """Each row that is searched, its study and the distributions of its values."""
    search = plan.experiment.search
    if search is None:
        return
    for row, space in search.rows(list(plan.experiment.methods)).items():
        protocol = {key: value for key, value in plan.tree.items() if key not in COMMON}
        text = json.dumps([protocol, row, {key: str(one) for key, one in space.items()}], sort_keys=True, default=str)
        name = f"{row}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        yield row, Study(root / FOLDER / f"{plan.experiment.name}.journal", name, search), _distributions(space)


def _distributions(space: Mapping[str, Range | list[Any]]) -> dict[str, Any]:
    own = _optuna().distributions
    return {
        key: own.CategoricalDistribution(one)
        if isinstance(one, list)
        else (own.IntDistribution if one.whole else own.FloatDistribution)(*one.ends, log=one.log)
        for key, one in space.items()
    }


class Trials:
    """What a row's search has tried and tries next; its runs lie under `root`."""

    def __init__(self, plan: ExperimentFile, found: tuple[str, Study, dict[str, Any]], root: Path) -> None:
        self.row, study, self._distributions = found
        self._plan, self._most, self._root = plan, study.search.trials, root
        self._study, self._numbers = study.open(), dict[str, int]()
        self._asked: set[str] = set()  # of this command

    def left_behind(self) -> list[Run]:
        """Trials that a command has begun and not ended, or that another one is at; Optuna hears of finished ones."""
        running = [one for one in self._study.get_trials(deepcopy=False) if one.state.name == "RUNNING"]
        runs = [self._run(one.number, one.params) for one in running]
        for run in runs:
            if store.result(self._root / run.name):
                self.tell({"kind": "done", "run": run.name})
        return [run for run in runs if store.result(self._root / run.name) is None]

    def __len__(self) -> int:
        """How many are yet to be asked for; failed ones do not count, unless there are as many as sound ones."""
        states = [one.state.name for one in self._study.get_trials(deepcopy=False)]
        return max(0, min(self._most - sum(state in KEPT for state in states), 2 * self._most - len(states)))

    def ask(self) -> Run | None:
        """The next trial; None if there have been enough."""
        while len(self):
            trial = self._study.ask(self._distributions)
            run = self._run(trial.number, trial.params)
            trial.set_user_attr("run", run.name)
            self._asked.add(run.name)
            if store.result(self._root / run.name) is None:
                return run
            self.tell({"kind": "done", "run": run.name})  # the same values as once before
        return None

    def _run(self, number: int, values: Mapping[str, Any]) -> Run:
        (run,) = provenance.settle(grid.runs(self._plan.trial(self.row, values)), self._root)
        self._numbers[run.name] = number
        return run

    def tell(self, event: Event) -> None:
        """What became of a trial; one that is in other hands is theirs, unless it was asked for here."""
        number, kind = self._numbers.get(event["run"]), event["kind"]
        if number is None or kind not in ("done", "pruned", "failed", "busy"):
            return
        if kind == "done":
            result = store.result(self._root / event["run"]) or {"diverged": True}
            value = WORST if result.get("diverged") else result["validation_error"]
            self._study.tell(number, value, skip_if_finished=True)
        elif kind != "busy" or event["run"] in self._asked:
            state = _optuna().trial.TrialState["PRUNED" if kind == "pruned" else "FAIL"]
            self._study.tell(number, state=state, skip_if_finished=True)

    def line(self, event: Event) -> str:
        """For people: how a trial has ended."""
        one = self.table()[self._numbers[event["run"]]]
        error = "" if one["validation_error"] is None else f", validation error {one['validation_error']:.2f} %"
        told = {"done": "whole", "pruned": "stopped"}.get(event["kind"]) or event.get("message", "")
        return f"{self.row} trial {one['trial']}: {_text(one['values'])}: {told}{error}"

    def best(self) -> str:
        """For people: the values of the sound trial with the least validation error."""
        done = [one for one in self.table() if one["state"] == "complete"]
        if not done:
            return f"search of {self.row}: no trial has come to its end"
        best = min(done, key=lambda one: float(one["validation_error"]))
        result = store.result(self._root / str(best["run"])) or {}
        errors = (best["validation_error"], result.get("test_error", math.nan))
        told = "validation error {:.2f} %, test error {:.2f} %".format(*errors)
        return f"search of {self.row}: best of {len(done)} whole trials: {_text(best['values'])}: {told}"

    def table(self) -> list[store.Record]:
        """A record for each trial: its number, values, state and validation error."""
        return [
            {
                "row": self.row,
                "trial": one.number,
                "values": one.params,
                "state": one.state.name.lower(),
                "validation_error": one.value if one.value is not None else _last(one.intermediate_values),
                "run": one.user_attrs.get("run"),
            }
            for one in self._study.get_trials(deepcopy=False)
        ]


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={grid.shown(value)}" for key, value in values.items())


def _last(values: Mapping[int, float]) -> float | None:
    return values[max(values)] if values else None


class TrialDesk(Desk):
    """Hands out trials as they are asked for: first those that another command has left half-way."""

    eager = False

    def __init__(self, trials: Trials, listen: Listener, failures: dict[str, Event]) -> None:
        super().__init__(trials.left_behind(), listen, failures)
        self._trials = trials

    def __len__(self) -> int:
        return super().__len__() + len(self._trials)

    def next(self) -> Run | None:
        """The next trial; None if there have been enough."""
        run = super().next() or self._trials.ask()
        if run is not None:
            self._runs[run.name] = run
        return run

    def _others(self, run: Run) -> tuple[Run, ...]:
        """None: what is tried next depends on how a trial ends."""
        return ()

    def hear(self, event: Event) -> None:
        """Take in an event, pass it on, and tell Optuna."""
        self._trials.tell(event)
        super().hear(event)


def file_of(root: Path, name: str) -> Path:
    """Where the trials of an experiment are stored as they stand, for its report."""
    return root / FOLDER / f"{name}.json"


def stored(root: Path, name: str) -> list[store.Record]:
    """The records of an experiment's trials, or of kept ones; none where it has no search, or it has not begun."""
    for file in (file_of(root, name), _kept(root)):
        found = (store.find_json(file) or {}).get("trials")
        if isinstance(found, list):
            return found
    return []


def _kept(root: Path) -> Path:
    return root.with_name("trials.json")


def keep(root: Path, to: Path, name: str) -> list[Path]:
    """Write the records of an experiment's trials beside the kept runs `to`; the file, if there are any."""
    found = stored(root, name)
    if not found:
        return []
    store.write_json(_kept(to), {"trials": found})
    return [_kept(to)]


def announced(plan: ExperimentFile, runs: Sequence[Run]) -> str:
    """For a dry run of these runs: what is searched besides; empty if nothing is."""
    found = plan.experiment.search
    rows = _searched(found.rows(list(plan.experiment.methods)), runs) if found is not None else []
    if found is None or not rows:
        return ""
    return f"besides a search: {found.trials} trials of each of {', '.join(rows)}, under the first seed"


def _searched(rows: Iterable[str], runs: Sequence[Run]) -> list[str]:
    """Those rows of which a run is selected."""
    chosen = {run.row for run in runs}
    return [row for row in rows if row in chosen]


def check(plan: ExperimentFile, executor: Executor, is_remote: bool = False) -> None:
    """Raise ConfigError for a search that cannot be made here, or of runs in a bucket."""
    if plan.experiment.search is None:
        return
    if is_remote:
        raise ConfigError("search: its journal is a file that all processes share: take a folder, for the runs too")
    _optuna()
    if isinstance(executor, Slurm | Torchrun):
        raise ConfigError("search: waits for what each trial finds: take --executor serial, processes or ray")


def search(plan: ExperimentFile, job: Job, executor: Executor, say: Callable[[str], None]) -> None:
    """Make the trials of the job's rows that are searched, by the same executor; `say` hears how each ends.

    Raises LaunchError for what stops everything, and where every trial of a row failed.
    """
    file, before = file_of(job.root, plan.experiment.name), list[store.Record]()
    for found in studies(plan, job.root):
        trials = Trials(plan, found, job.root)
        if not _searched([trials.row], job.runs):
            before += trials.table()
            continue
        task = replace(job, evaluate=Evaluate(), is_hopeless=found[1].is_hopeless)
        failures: dict[str, Event] = {}
        conduct(task, executor, TrialDesk(trials, _listener(trials, file, before, say), failures))
        trials.left_behind()
        before += trials.table()
        if failures and all(one["state"] == "fail" for one in trials.table()):
            raise LaunchError(f"search of {trials.row}: every trial failed: {next(iter(failures.values()))['message']}")
        say(trials.best())


def _listener(trials: Trials, file: Path, before: list[store.Record], say: Callable[[str], None]) -> Listener:
    """Tells how each trial ends, and stores all of them as they stand then."""

    def listen(event: Event) -> None:
        if event["kind"] in ("done", "pruned", "failed", "note"):
            say(trials.line(event))
        if event["kind"] in ("done", "pruned", "failed"):
            store.write_json(file, {"trials": [*before, *trials.table()]})

    return listen
