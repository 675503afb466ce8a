"""The command `ibp-triton`."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ibp_triton as ibp
from ibp_triton.bench import bench_command
from ibp_triton.errors import ConfigError, IBPError, LaunchError
from ibp_triton.evaluation import Robustness
from ibp_triton.harness import (
    estimates,
    foreign,
    grid,
    kept,
    loading,
    mirror,
    plugins,
    provenance,
    schema,
    shipped,
    store,
    summary,
    trials,
)
from ibp_triton.harness import evaluate as measure
from ibp_triton.harness.board import Log
from ibp_triton.harness.bucket import shown, url_of
from ibp_triton.harness.config import Evaluate
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
    check_device,
    download,
    launch,
    remaining,
)
from ibp_triton.harness.loading import ExperimentFile
from ibp_triton.harness.progress import Progress, curve_table, result_table

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
PLAN = "experiment.yaml"
ONLY = "method=…, row=…, variant=…, seed=… or a field of a method, such as beta=…"
SHOWN = 200  # runs of a dry run
QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="print nothing but errors")]
BOARD = "tensorboard, wandb, trackio or package.module:Page, then =PLACE: a folder or a project"
ACCEPT = "keep stored runs although their data or imported code have changed since"


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


def _root_of(plan: ExperimentFile, folder: Path) -> Path:
    """Folder that holds one folder a run, of an experiment whose report is in `folder`."""
    return Path(plan.experiment.runs) if plan.experiment.runs else folder / "runs"


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
        plan = loading.load(_plan_in(config, stack) if is_stored else shipped.find(config), override or [])
        folder = config if is_stored else output_of(plan)
        count = workers or plan.experiment.workers
        room = {"address": address, "cpus_per_run": cpus_per_run, "gpus_per_run": gpus_per_run}
        options = {"workers": workers, **room, "partition": partition, "time": time}
        bucket = mirror.bucket_of(_root_of(plan, folder))
        execute = choose(executor, folder, count, options, apart=bucket is not None)
        if bucket and executor == "slurm":  # nobody else looks whether the owner of a lock has died
            bucket = replace(bucket, patient=True)
        root = mirror.brought(_root_of(plan, folder), stack)

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


def _check_bucket(job: Job, boards: list[str]) -> None:
    if job.bucket and boards:
        raise ConfigError(f"--log {boards[0]}: boards read a run's folder, which lies in {job.place}; leave it out")


def _train(plan: ExperimentFile, job: Job, execute: Executor, folder: Path, boards: list[str], quiet: bool) -> None:
    console = Console(emoji=False, quiet=quiet)
    log = Log(boards, job.root, job.evaluate, job.data_dir, _saying(console))
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
        trials.search(plan, job, execute, _saying(console))
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


def _saying(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def log(
    directory: Annotated[Path, typer.Argument(help="folder of an experiment, as in runs/NAME, or of one of its runs")],
    boards: Annotated[list[str], typer.Argument(help=BOARD)],
    data_dir: Annotated[str | None, typer.Option(help="folder of the data files, for sample images")] = None,
    quiet: QUIET = False,
) -> None:
    """Log finished runs: every epoch, errors and robustness, sample images."""
    if url_of(directory):
        raise ConfigError(f"{shown(directory)}: boards read folders of a machine; copy it to one, and log that")
    is_run = not (directory / PLAN).exists()
    folder = directory.resolve().parent.parent if is_run else directory
    plan = loading.load(folder / PLAN) if (folder / PLAN).exists() else None
    if is_run:
        runs, root = [_run_in(directory, directory)], directory.resolve().parent
    else:
        assert plan is not None
        root = _root_of(plan, folder)
        kept.unpack_all(root)
        runs = provenance.settle(grid.runs(plan), root)
    console = Console(emoji=False, quiet=quiet)
    logging = Log(boards, root, plan.experiment.evaluate if plan else Evaluate(), data_dir, _saying(console))
    finished = [each for each in {each.name: each for each in runs}.values() if store.result(root / each.name)]
    for each in finished:
        logging.finished(each, again=True)
    console.print(f"{len(finished)} of {len(runs)} runs are finished and logged", highlight=False)


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
        shown = "unknown" if seconds is None else str(timedelta(seconds=round(seconds)))
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
    needed = timedelta(seconds=round(estimates.makespan(work, workers)))
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


@app.command()
def evaluate(
    run_dir: Annotated[str, typer.Argument(help="folder of a finished run, or package.module:build of any model")],
    config: Annotated[Path | None, typer.Option(help="YAML whose evaluate: section to use")] = None,
    override: Annotated[list[str] | None, typer.Option("--set", help="key=value of evaluate:")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="any model: its weights, a state dict's file")] = None,
    examples: Annotated[str | None, typer.Option("--data", help="any model: a source, an .npz or a folder")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="any model: the first so many examples")] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="any model: such as fgsm=2/255 or torchattacks.PGD=2/255,8/255")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="any model: what it subtracts, a number or one a channel")] = None,
    std: Annotated[str | None, typer.Option(help="any model: what it divides by")] = None,
    norm: Annotated[str, typer.Option(help="any model: linf or l2")] = "linf",
    csv: Annotated[Path | None, typer.Option(help="any model: also write the table to this file")] = None,
    data_dir: Annotated[str | None, typer.Option(help="folder of the data files")] = None,
    device: Annotated[str, typer.Option(help="device to compute on, as torch names it: cpu, cuda:0")] = "cpu",
    accept_changed: Annotated[bool, typer.Option("--accept-changed", help=ACCEPT)] = False,
    quiet: QUIET = False,
) -> None:
    """Measure the robustness of a finished run's checkpoint, as its experiment or --config says, or of any model.

    Any model: package.module:build is called with the images' shape and the number of classes, --checkpoint and --data
    say which weights and images. Sizes are in pixels from 0 to 1, to which perturbed images are clipped.
    """
    if ":" in run_dir and not Path(run_dir).exists() and not url_of(run_dir):
        if checkpoint is None or examples is None:
            raise ConfigError(f"evaluate {run_dir}: give --checkpoint FILE and --data SOURCE")
        check_device(device, "--device")
        options = {"mean": mean, "std": std, "norm": norm, "device": device}
        table = foreign.evaluate(
            run_dir,
            checkpoint,
            examples,
            folder=data_dir,
            count=count,
            attacks=attack,
            progress=not quiet,
            **options,  # type: ignore[arg-type]
        )
        _show_robustness(table, csv, Console(emoji=False, quiet=quiet))
        return
    found = _evaluate_run(Path(run_dir), config, override or [], data_dir, device, accept_changed)
    if not quiet:
        _show_curves(Path(run_dir), *found)


def _show_robustness(found: Robustness, csv: Path | None, console: Console) -> None:
    table = Table("attack", "size", "error %", "95 %", title=f"{found.rows[0].examples} examples")
    for row in found.rows:
        table.add_row(row.attack, f"{row.size:.4g}", f"{row.error:.2f}", "{:.2f} – {:.2f}".format(*row.interval))
    console.print(table)
    for sign in found.masking():
        console.print(f"gradient masking? {sign}", highlight=False, markup=False)
    if csv is not None:
        found.to_csv(csv)
        console.print(f"written to {csv}", highlight=False, markup=False)


def _evaluate_run(
    run_dir: Path, config: Path | None, override: list[str], data_dir: str | None, device: str, accept_changed: bool
) -> tuple[store.Record, str]:
    """The summary of an evaluation, and the stem of the files that have it."""
    with ExitStack() as stack:
        above = run_dir.parent if url_of(run_dir) else run_dir.resolve().parent
        choice = loading.evaluation(config or mirror.file_of(above.parent / PLAN, stack), override)
        check_device(device, "--device")
        root = mirror.brought(above, stack, run_dir.name)
        trained = _run_in(root / run_dir.name if url_of(run_dir) else run_dir, run_dir)
        job = Job([trained], root, accept_changed=accept_changed, bucket=mirror.bucket_of(above))
        check_changes(job)
        with job.hold(trained.name) as held:
            if held is None:
                raise ConfigError(f"{shown(run_dir)}: another process is working on this run; wait for it")
            found = measure.evaluate(trained.on(device), held.folder, choice, data_dir)
            held.commit()
    return found, measure.file_stem(choice)


def _show_curves(folder: Path, found: store.Record, stem: str) -> None:
    Console(emoji=False).print(curve_table(found))
    text = f"written to {shown(folder / stem)}.json and .safetensors"
    Console(emoji=False, markup=False).print(text, highlight=False)


def _run_in(folder: Path, given: Path) -> Run:
    """The run whose folder this is; raises ConfigError, which names it as `given`, for any other folder.

    Nothing is touched in it.
    """
    stored = store.read_json(folder / store.CONFIG)
    cure = "give the folder of a run, like runs/NAME/runs/bp-0123456789ab"
    if stored is None:
        raise ConfigError(f"{shown(given)}: no {store.CONFIG}; {cure}")
    try:
        return replace(Run.from_config(stored), folder=folder.resolve().name)
    except (ValueError, KeyError, TypeError) as error:
        told = error.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(error, ValidationError) else error
        reason = str(told).partition("\n")[0]
        path = shown(given / store.CONFIG)
        raise ConfigError(f"{path}: not the {store.CONFIG} of a run ({reason}); {cure}") from error


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="folder of an experiment, as in runs/NAME, or two folders")],
    data_dir: Annotated[str | None, typer.Option(help="folder of the data files, for pictures")] = None,
    quiet: QUIET = False,
) -> None:
    """Write report.html, tables.md, results.csv, curves.csv and figures from what is finished so far.

    Of two experiments: against_FIRST.html and .md in the folder of the second, which compare them row by row.
    """
    from ibp_triton.harness.report import (  # matplotlib doubles the time to start
        Findings,
        pictured,
        write_comparison,
        write_report,
    )

    if len(directories) > 2:
        raise ConfigError(f"{len(directories)} folders; give one, or two to compare, or see ibp-triton leaderboard")
    with ExitStack() as stack:
        found = [Findings(*_stored(directory, stack)) for directory in directories]
        folder = mirror.scratch(stack) if url_of(directories[-1]) else directories[-1]
        if len(found) == 2:
            paths = write_comparison(found[0], found[1], folder)
        else:
            bucket = mirror.bucket_of(_root_of(found[0].plan, directories[0]))
            if bucket:
                bucket.fetch((f"{run.name}/{store.CHECKPOINT}" for run in pictured(found[0])), found[0].root)
            paths = write_report(found[0].plan, found[0].root, folder, data_dir=data_dir)
        _print_paths(mirror.sent(paths, folder, directories[-1]), quiet)


@app.command()
def leaderboard(
    directories: Annotated[list[Path], typer.Argument(help="folders of experiments, as in runs/NAME")],
    to: Annotated[Path, typer.Option(help="the page to write; Markdown beside it")] = Path("leaderboard.html"),
    quiet: QUIET = False,
) -> None:
    """Gather the rows of many experiments in one page, the lowest error first, apart for each data set and size."""
    from ibp_triton.harness.report import Findings, write_leaderboard

    with ExitStack() as stack:
        found = [Findings(*_stored(directory, stack)) for directory in directories]
        _print_paths(write_leaderboard(found, to), quiet)


@app.command()
def claims(
    directory: Annotated[Path, typer.Argument(help="folder of experiments' folders, such as results")],
    quiet: QUIET = False,
) -> None:
    """Write claims.md there: each statement of the paper beside what its experiments have found."""
    from ibp_triton.harness.report import Findings, claims_text, experiments_in

    with ExitStack() as stack:
        found = experiments_in(directory, lambda folder: Findings(*_stored(folder, stack)))
        if not found:
            raise ConfigError(f"{directory}: no folder in it has an {PLAN}; give the folder above those of experiments")
        store.write_bytes(directory / "claims.md", claims_text(found).encode())
    _print_paths([directory / "claims.md"], quiet)


@app.command()
def keep(
    directory: Annotated[Path, typer.Argument(help="folder of an experiment, as in runs/NAME")],
    to: Annotated[Path, typer.Argument(help="where to keep it, as in results/NAME; may be the same")],
    quiet: QUIET = False,
) -> None:
    """Keep an experiment small: its YAML, its report, and finished runs in one runs.jsonl, without checkpoints.

    `report` and `run` read runs.jsonl as they do the folders, which may be deleted then. Runs of an experiment that
    names a folder in `runs:` are kept with the experiment that has that folder.
    """
    from ibp_triton.harness.report import write_report

    with ExitStack() as stack:
        plan, root = _stored(directory, stack)
        written = [to / PLAN]
        if plan.experiment.runs is None:
            file = kept.file_of(to / "runs")
            if not kept.keep(root, file):
                raise ConfigError(f"{shown(directory)}: no run is finished; train some with ibp-triton run")
            written += [file, *trials.keep(root, to / "runs", plan.experiment.name)]
        store.write_bytes(to / PLAN, plan.text().encode())
        again, place = _stored(to, stack)
        _print_paths([*written, *write_report(again, place, to, png=False)], quiet)


def _print_paths(paths: Sequence[Path | str], quiet: bool) -> None:
    console = Console(emoji=False, markup=False, quiet=quiet)
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)


def _stored(directory: Path, stack: ExitStack) -> tuple[ExperimentFile, Path]:
    """The plan in an experiment's folder, and the folder of its runs; raises ConfigError for any other folder.

    Of runs in a bucket it is one with their small files, until the stack is closed.
    """
    plan = loading.load(_plan_in(directory, stack))
    return plan, mirror.brought(_root_of(plan, directory), stack)


def _plan_in(directory: Path, stack: ExitStack) -> Path:
    path = mirror.file_of(directory / PLAN, stack)
    if not path.exists():
        raise ConfigError(
            f"{shown(directory)}: no {PLAN}; give the folder that `ibp-triton run` writes to, like runs/NAME"
        )
    return path


def main() -> None:
    """Entry point: errors a user can cure are one message, without a traceback."""
    _search_here_last()
    try:
        with ended_alike():
            app()
    except IBPError as error:
        _fail(str(error))
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
