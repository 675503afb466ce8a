"""The commands on what runs have stored: they log, evaluate, report, compare and keep it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from ibp_triton.errors import ConfigError
from ibp_triton.harness import evaluate as measure
from ibp_triton.harness import foreign, grid, kept, loading, mirror, provenance, store, trials
from ibp_triton.harness.board import Log
from ibp_triton.harness.bucket import shown, url_of
from ibp_triton.harness.config import Evaluate
from ibp_triton.harness.grid import Run
from ibp_triton.harness.launch import Job, check_changes, check_device
from ibp_triton.harness.loading import ExperimentFile
from ibp_triton.harness.progress import curve_table
from ibp_triton.outcomes import Robustness

PLAN = "experiment.yaml"
QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="print nothing but errors")]
BOARD = "tensorboard, wandb, trackio or package.module:Page, then =PLACE: a folder or a project"
ACCEPT = "keep stored runs although their data or imported code have changed since"


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
        root = root_of(plan, folder)
        kept.unpack_all(root)
        runs = provenance.settle(grid.runs(plan), root)
    console = Console(emoji=False, quiet=quiet)
    logging = Log(boards, root, plan.experiment.evaluate if plan else Evaluate(), data_dir, saying(console))
    finished = [each for each in {each.name: each for each in runs}.values() if store.result(root / each.name)]
    for each in finished:
        logging.finished(each, again=True)
    console.print(f"{len(finished)} of {len(runs)} runs are finished and logged", highlight=False)


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
            bucket = mirror.bucket_of(root_of(found[0].plan, directories[0]))
            if bucket:
                bucket.fetch((f"{run.name}/{store.CHECKPOINT}" for run in pictured(found[0])), found[0].root)
            paths = write_report(found[0].plan, found[0].root, folder, data_dir=data_dir)
        _print_paths(mirror.sent(paths, folder, directories[-1]), quiet)


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
    plan = loading.load(plan_in(directory, stack))
    return plan, mirror.brought(root_of(plan, directory), stack)


def plan_in(directory: Path, stack: ExitStack) -> Path:
    """The plan in an experiment's folder, which may lie in a bucket; raises ConfigError where there is none."""
    path = mirror.file_of(directory / PLAN, stack)
    if not path.exists():
        raise ConfigError(
            f"{shown(directory)}: no {PLAN}; give the folder that `ibp-triton run` writes to, like runs/NAME"
        )
    return path


def root_of(plan: ExperimentFile, folder: Path) -> Path:
    """Folder that holds one folder a run, of an experiment whose report is in `folder`."""
    return Path(plan.experiment.runs) if plan.experiment.runs else folder / "runs"


def saying(console: Console) -> Callable[[str], None]:
    """What prints a remark."""
    return lambda text: console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)
