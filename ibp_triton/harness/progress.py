"""What the user sees while runs train: a live table on a terminal, one line an event elsewhere; errors and ETA."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from ibp_triton.harness import estimates
from ibp_triton.harness.config import Evaluate
from ibp_triton.harness.grid import Run
from ibp_triton.harness.summary import ResultRow, columns, divergence_text, error_text, headings

SILENCE = 10  # seconds of an evaluation after which a line says how far it is, where there is no terminal


class Progress:
    """Listener of a launch; use as a context manager.

    `left` is the share of its training that each run still needs, `choice` the evaluation that each of them needs then.
    """

    def __init__(
        self,
        console: Console,
        runs: Sequence[Run],
        left: Mapping[str, float],
        workers: int,
        choice: Evaluate | None = None,
    ) -> None:
        self._console, self._runs, self._workers = console, {run.name: run for run in runs}, workers
        self._closed = set(self._runs) - set(left)
        self._evaluation = {n: estimates.evaluation(self._runs[n], choice) if choice else 0.0 for n in left}
        work = {name: share * estimates.weight(self._runs[name]) for name, share in left.items()}
        self._left = {name: own + self._evaluation[name] for name, own in work.items()}
        # work done by this command, the seconds it took the workers, and when each run was last heard of
        self._trained, self._spent, self._since = 0.0, 0.0, dict[str, float]()
        self._records: dict[str, dict[str, Any]] = {}
        self._live = Live(self._table(), console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Take in one event of `launch`."""
        if event["kind"] == "note":
            return self._note(event)
        if event["run"] not in self._runs:
            return
        run = self._runs[event["run"]]
        if event["kind"] == "start":
            self._since[run.name] = time.monotonic()
        elif event["kind"] == "epoch":
            work = estimates.weight(run) / run.training.epochs
            self._clock(run, work)
            after = self._evaluation.get(run.name, 0.0)
            self._left[run.name] = work * (run.training.epochs - event["epoch"]) + after
            self._records[run.name] = {**self._records.get(run.name, {}), **event}
        elif event["kind"] == "evaluate":
            self._evaluating(run, event["share"])
        elif event["kind"] == "busy" and run.name not in self._since:  # a process of another command trains it
            self._left.pop(run.name, None)
        elif event["kind"] in ("done", "failed"):
            left = self._left.pop(run.name, 0.0)
            self._closed.add(run.name)
            if self._records.pop(run.name, None):  # it was trained or evaluated here
                self._clock(run, left if event["kind"] == "done" else 0.0)
            self._console.print(self._closing(run, event), highlight=False, soft_wrap=True)
        if self._live:
            self._live.update(self._table())
        elif event["kind"] == "epoch" and self._is_milestone(run, event["epoch"]):
            self._console.print(self._line(run, event), highlight=False, soft_wrap=True)

    def _note(self, event: dict[str, Any]) -> None:
        """Of one run, or of all where it names none."""
        about = f"{self._runs[event['run']].label}: " if event["run"] in self._runs else ""
        self._console.print(escape(f"  {about}{event['message']}"), highlight=False, soft_wrap=True)

    def _evaluating(self, run: Run, share: float) -> None:
        """A share of the run's evaluation is done; a line where nothing was said for a while."""
        total, record = self._evaluation.get(run.name, 0.0), self._records.setdefault(run.name, {})
        self._clock(run, total * (share - record.get("share", 0.0)))
        self._left[run.name] = total * (1 - share)
        record["share"] = share
        if self._live is None and time.monotonic() - record.setdefault("said", time.monotonic()) > SILENCE:
            record["said"] = time.monotonic()
            text = f"  {run.label}: {share:.0%} evaluated, ETA {self._eta()}"
            self._console.print(escape(text), highlight=False, soft_wrap=True)

    def _clock(self, run: Run, work: float) -> None:
        now = time.monotonic()
        self._spent += now - self._since.get(run.name, now)
        self._trained += work
        self._since[run.name] = now

    def _eta(self) -> str:
        """Time left at the pace of a worker so far."""
        if not self._trained:
            return "…"
        left = estimates.makespan(self._left.values(), self._workers)
        return estimates.clock(left * self._spent / self._trained)

    def _is_milestone(self, run: Run, epoch: int) -> bool:
        return epoch % max(1, run.training.epochs // 4) == 0

    def _line(self, run: Run, event: dict[str, Any]) -> str:
        loss = _loss(event, "loss ")
        tested = f", error {event['test_error']:.2f} %" if "test_error" in event else ""
        text = f"  {run.label}: epoch {event['epoch']}/{run.training.epochs}, {loss}{tested}, ETA {self._eta()}"
        return escape(text)

    def _closing(self, run: Run, event: dict[str, Any]) -> str:
        position = f"[{len(self._closed)}/{len(self._runs)}]"
        if event["kind"] == "failed":
            return escape(f"{position} {run.label}: failed: {event['message']}")
        error = divergence_text(event) if event.get("diverged") else f"error {event['test_error']:.2f} %"
        text = f"{position} {run.label}: {error}, {event['seconds_per_epoch']:.2f} s/epoch"
        return escape(f"{text}, ETA {self._eta()}")

    def _table(self) -> Table:
        table = Table("run", "epoch", "loss", "error %", "s/epoch", title=f"ETA {self._eta()}")
        for name, record in self._records.items():
            run = self._runs[name]
            loss = _loss(record) if "loss" in record else ""
            tested = f"{record['test_error']:.2f}" if "test_error" in record else ""
            epoch = (
                f"{record['share']:.0%} evaluated" if "share" in record else f"{record['epoch']}/{run.training.epochs}"
            )
            seconds = f"{record['seconds']:.2f}" if "seconds" in record else ""
            table.add_row(escape(run.label), epoch, loss, tested, seconds)
        return table


def _loss(record: dict[str, Any], name: str = "") -> str:
    if record["loss"] is None or "diverged_step" in record:
        step = record.get("diverged_step")
        return f"diverged at step {step}" if step else "diverged"
    return f"{name}{record['loss']:.4f}"


def result_table(rows: Sequence[ResultRow]) -> Table:
    """The comparison: error mean ± sd, seconds an epoch, ratio to BP measured and predicted."""
    named, names = any(row.variant for row in rows), columns(rows)
    table = Table(caption="× bp: cost relative to bp, measured in seconds; predicted from multiply-adds")
    for heading in (["variant"] if named else []) + ["method", *headings(names), "seeds", "error %", "s/epoch"]:
        table.add_column(heading, no_wrap=heading != "variant")
    for heading in ("× bp", "predicted"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        cells = [escape(row.label), *map(escape, row.values(names)), row.seeds, error_text(row.mean, row.sd)]
        ratios = [f"{row.seconds:.2f}", "" if row.measured is None else f"{row.measured:.2f}", f"{row.predicted:.2f}"]
        table.add_row(*([escape(row.variant)] if named else []), *cells, *ratios)
    return table


def curve_table(summary: dict[str, Any]) -> Table:
    """Errors of one run's evaluation, a line for each level of each curve."""
    table = Table("curve", "level", "error %", title=f"{escape(summary['run'])}, {summary['examples']} test examples")
    for name, curve in summary.items():
        if isinstance(curve, dict) and "levels" in curve:
            for level, error in zip(curve["levels"], curve["error"], strict=True):
                table.add_row(name, f"{level:g}", f"{error:.2f}")
    for key, value in summary.get("masking", {}).items():
        table.add_row("masking", key, f"{value:g}")
    return table
