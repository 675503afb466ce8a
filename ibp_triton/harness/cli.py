"""The command `ibp-triton`."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ibp_triton as ibp
from ibp_triton.bench import bench_command
from ibp_triton.errors import ConfigError, IBPError, LaunchError
from ibp_triton.harness import (
    estimates,
    grid,
    kept,
    loading,
    mirror,
    plugins,
    provenance,
    schema,
    shipped,
    store,
    stored,
    summary,
    trials,
)
from ibp_triton.harness.board import Log
from ibp_triton.harness.bucket import shown, url_of
from ibp_triton.harness.doctor import doctor
from ibp_triton.harness.executors import torchrun
from ibp_triton.harness.executors.choosing import OPTIONS, choose
from ibp_triton.harness.executors.desk import Executor, beside
from ibp_triton.harness.grid import Run
from ibp_triton.harness.interrupts import ended_alike
from ibp_triton.harness.kernel_report import kernels
from ibp_triton.harness.launch import (
    ERROR,
    Job,
    check_changes,
    download,
    launch,
    remaining,
)
from ibp_triton.harness.loading import ExperimentFile
from ibp_triton.harness.progress import Progress, result_table
from ibp_triton.harness.stored import ACCEPT, BOARD, PLAN, QUIET, plan_in, root_of, saying

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
ONLY = "method=…, row=…, variant=…, seed=… or a field of a method, such as beta=…"
SHOWN = 200  # runs of a dry run


app.command()(kernels)
app.command()(doctor)
app.command("list")(shipped.show)
app.command("schema")(schema.show)
app.command()(bench_command.bench)
app.command("bench-report")(bench_command.report)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ibp-triton {ibp.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    """Invariant Backpropagation and its rivals: train, evaluate and report experiments from YAML."""


def output_of(plan: ExperimentFile) -> Path:
    """Folder of the experiment's report."""
    return Path(plan.experiment.output or f"runs/{plan.experiment.name}")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file, an experiment's name (ibp-triton list) or its folder")],
    workers: Annotated[int | None, typer.Option(min=1, help="local processes, one CPU thread each")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the runs and their time, train nothing")] = False,
    override: Annotated[list[str] | None, typer.Option("--set", help="key.path=value, over the YAML")] = None,
    only: Annotated[list[str] | None, typer.Option(help=ONLY)] = None,
    executor: Annotated[str | None, typer.Option(help=f"who trains the runs: {', '.join(OPTIONS)}")] = None,
    address: Annotated[str | None, typer.Option(help="ray: its cluster, such as auto or ray://head:10001")] = None,
    cpus_per_run: Annotated[float | None, typer.Option(min=0, help="ray, slurm: CPUs that a run reserves, 1")] = None,
    gpus_per_run: Annotated[float | None, typer.Option(min=0, help="ray, slurm: GPUs that a run reserves, 0")] = None,
    partition: Annotated[str | None, typer.Option(help="slurm: its partition")] = None,
    time: Annotated[int | None, typer.Option(min=1, help="slurm: minutes of a job, 60; it goes on in another")] = None,
    data_dir: Annotated[str | None, typer.Option(help="folder of the data files")] = None,
    log: Annotated[list[str] | None, typer.Option(help=f"also log to {BOARD}")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="the same as --log tensorboard")] = False,
    accept_changed: Annotated[bool, typer.Option("--accept-changed", help=ACCEPT)] = False,
    quiet: QUIET = False,
    as_json: Annotated[bool, typer.Option("--json", help="a dry run's list for programs")] = False,
) -> None:
    """Train every run of an experiment that is not finished yet, then print the comparison."""
    if torchrun.follows(executor):
        return None if dry_run else torchrun.follow()
    with ExitStack() as stack:
        is_stored = config.is_dir() or url_of(config) is not None
        plan = loading.load(plan_in(config, stack) if is_stored else shipped.find(config), override or [])
        folder = config if is_stored else output_of(plan)
        count = workers or plan.experiment.workers
        room = {"address": address, "cpus_per_run": cpus_per_run, "gpus_per_run": gpus_per_run}
        options = {"workers": workers, **room, "partition": partition, "time": time}
        bucket = mirror.bucket_of(root_of(plan, folder))
        execute = choose(executor, folder, count, options, apart=bucket is not None)
        if bucket and executor == "slurm":  # nobody else looks whether the owner of a lock has died
            bucket = replace(bucket, patient=True)
        root = mirror.brought(root_of(plan, folder), stack)

        def job_in(place: Path) -> Job:
            chosen = provenance.settle(grid.select(grid.runs(plan), only or []), place)
            return Job(chosen, place, data_dir, plan.experiment.evaluate, accept_changed, bucket=bucket)

        if dry_run:
            with kept.opened(root) as (place, _):
                job = job_in(place)
                return _list(job, execute.width, as_json, trials.announced(plan, job.runs))
        if as_json:
            raise ConfigError(
                "--json is of a dry run's list; add --dry-run, or read the results with ibp-triton report"
            )
        kept.unpack_all(root)
        job = job_in(root)
        boards = [*(log or []), *(["tensorboard"] if tensorboard else [])]
        _check_bucket(job, boards)
        trials.check(plan, execute, bucket is not None)
        mirror.write(folder / PLAN, plan.text().encode())
        _train(plan, job, execute, folder, boards, quiet)


for command in (stored.log, stored.evaluate, stored.report, stored.leaderboard, stored.claims, stored.keep):
    app.command()(command)


def _check_bucket(job: Job, boards: list[str]) -> None:
    if job.bucket and boards:
        raise ConfigError(f"--log {boards[0]}: boards read a run's folder, which lies in {job.place}; leave it out")


def _train(plan: ExperimentFile, job: Job, execute: Executor, folder: Path, boards: list[str], quiet: bool) -> None:
    console = Console(emoji=False, quiet=quiet)
    log = Log(boards, job.root, job.evaluate, job.data_dir, saying(console))
    left = remaining(job)
    untested = sum(share == 0.0 for share in left.values())
    done = f"{len(job.runs) - len(left) + untested} finished before"
    more = f", {untested} of them to evaluate" if untested else ""
    console.print(f"{len(job.runs)} runs, {done}{more}, in {job.place}", highlight=False, markup=False)
    check_changes(job)
    if left:
        _warn_of_precision(job, console)
    try:
        download(job)
        width = execute.width * max((beside(run, len(left), execute.width) for run in job.runs[:1]), default=1)
        with Progress(console, job.runs, left, width, job.evaluate) as progress:
            failures = launch(job, execute, log.listening(job.runs, progress))
        for each in job.runs if boards else ():
            log.finished(each)
        trials.search(plan, job, execute, saying(console))
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; finished runs and epochs are stored, the same command goes on")
        raise typer.Exit(130) from None
    finally:
        log.close()
    if job.bucket:
        mirror.fetch_small(job.bucket, job.root)
    console.print(result_table(summary.rows(job.runs, job.root)))
    others = len(remaining(job)) - len(failures)
    if others:
        console.print(f"{others} runs are in the hands of another process", highlight=False)
    console.print(f"report: ibp-triton report {shown(folder)}", highlight=False, soft_wrap=True, markup=False)
    if failures:
        listed = [*failures[:10], *([f"… and {len(failures) - 10} more"] if len(failures) > 10 else [])]
        raise LaunchError(f"some runs failed; their folders in {job.place} hold {ERROR}:\n" + "\n".join(listed))


def _warn_of_precision(job: Job, console: Console) -> None:
    """Say so where this processor has no bfloat16 of its own, and emulates it."""
    runs = (each for each in job.runs if each.training.precision == "bf16" and each.training.device == "cpu")
    slowness = next(map(estimates.slowness, runs), 1.0)
    if slowness > 1.5:
        text = f"bf16 takes {slowness:.1f} times as long as fp32 on this processor: --set training.precision=fp32"
        console.print(text, highlight=False, soft_wrap=True)


def _state(left: float | None) -> str:
    if left is None:
        return "finished"
    return {0.0: "to evaluate", 1.0: "to do"}.get(left, f"{1 - left:.0%} done")


def _list(job: Job, workers: int, as_json: bool, searched: str) -> None:
    """The first runs with their cost, and the time that all of them need; all of them as JSON."""
    console, left = Console(emoji=False), remaining(job)
    if as_json:
        return typer.echo(json.dumps([_facts(each, left.get(each.name), job) for each in job.runs], indent=2))
    table = Table("run", "epochs", "examples", "× BP", "estimate", "state")
    for each in job.runs[:SHOWN]:
        seconds = _seconds(each, job)
        size = str(estimates.examples(each) or "all")
        shown = "unknown" if seconds is None else estimates.clock(seconds)
        epochs, ratio = str(each.training.epochs), f"{estimates.ratio(each):.2f}"
        table.add_row(escape(each.label), epochs, size, ratio, shown, _state(left.get(each.name)))
    console.print(table)
    if len(job.runs) > SHOWN:
        console.print(f"… and {len(job.runs) - SHOWN} more; --only shows others", highlight=False)
    states = Counter(_state(left.get(each.name)) for each in job.runs)
    if len(states) > 1:
        console.print(", ".join(f"{count} {state}" for state, count in states.items()), highlight=False)
    for module, file in plugins.imported().items():
        console.print(f"imported {module} ({file}) for these figures", highlight=False, markup=False, soft_wrap=True)
    work = [_work_left(each, left[each.name], job) for each in job.runs if each.name in left]
    _warn_of_precision(job, console)
    needed = estimates.clock(estimates.makespan(work, workers))
    console.print(
        f"{len(job.runs)} runs, about {needed} left with {workers} worker(s) on this machine", highlight=False
    )
    if searched:
        console.print(searched, highlight=False, markup=False)


def _seconds(run: Run, job: Job) -> float | None:
    """Of training and evaluation."""
    training = estimates.seconds(run)
    return None if training is None else training + estimates.evaluation_seconds(run, job.evaluate)


def _work_left(run: Run, share: float, job: Job) -> float:
    """Seconds of a run that has this share of its training, and its evaluation, before it."""
    training = estimates.seconds(run)
    return 0.0 if training is None else share * training + estimates.evaluation_seconds(run, job.evaluate)


def _facts(run: Run, left: float | None, job: Job) -> store.Record:
    """A run of a dry run, for programs."""
    about = {"run": run.name, "label": run.label, "method": run.method.key, "seed": run.seeds.order}
    cost = {"examples": estimates.examples(run), "ratio": estimates.ratio(run), "seconds": _seconds(run, job)}
    return {**about, "epochs": run.training.epochs, **cost, "state": _state(left)}


def main() -> None:
    """Entry point: errors a user can cure are one message, without a traceback."""
    _search_here_last()
    try:
        with ended_alike():
            app()
    except IBPError as error:
        _fail(str(error))
    except (FileExistsError, NotADirectoryError) as error:
        _fail(f"{error}; a folder is needed there: move the file away, or name another folder")
    except OSError as error:
        _fail(f"{error}; is there space, and may this user write there? Finished runs and epochs are stored")


def _search_here_last() -> None:
    """Users' modules may lie in the current folder, which hides no module of Python or of a package."""
    here = os.getcwd()
    if sys.path and sys.path[0] in ("", here) and not (Path(here) / "ibp_triton").is_dir():
        del sys.path[0]
    sys.path.append(here)


def _fail(message: str) -> None:
    Console(stderr=True).print(f"error: {message}", style="red", markup=False, highlight=False)
    sys.exit(1)


if __name__ == "__main__":
    main()
