"""The commands `ibp-triton bench` and `ibp-triton bench-report`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.status import Status

from ibp_triton.allocator import keep_freed_memory
from ibp_triton.bench import bench_json, bench_report, bench_table, cells, suite
from ibp_triton.bench.candidates import Case
from ibp_triton.bench.suite import Suite
from ibp_triton.errors import BenchError, ConfigError
from ibp_triton.harness import shipped, store


def bench(
    config: Annotated[Path, typer.Argument(help="YAML file, or a suite's name: modern, ratios, compiled …")],
    override: Annotated[list[str] | None, typer.Option("--set", help="key.path=value, over the YAML")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="a word of the cells to measure: resnet18, bf16, 256 …")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="folder of the results (runs/bench/NAME)")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write all figures to this file")] = None,
    note: Annotated[str, typer.Option(help="kept with the figures, such as what else ran on the machine")] = "",
    compare: Annotated[Path | None, typer.Option(help="an older file; exit 1 on a regression beyond the noise")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the cells, measure nothing")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print nothing but errors and regressions")] = False,
) -> None:
    """Methods beside baselines, cell by cell: parity first, then the clock. Stopped, the same command goes on."""
    plan = suite.load(find(config), override or [])
    chosen = _chosen(plan, only or [])
    console = Console(emoji=False, markup=False, highlight=False, soft_wrap=True, quiet=quiet and not dry_run)
    if dry_run:
        return _list(plan, chosen, json_file, console)
    old = bench_report.read(compare) if compare else None
    folder = output or Path(plan.output or f"runs/bench/{plan.name}")
    commit = bench_json.commit_info()
    found = _measure(plan, chosen, folder, console)
    written = _write(plan, found, folder, json_file, note, commit)
    console.print(bench_table.markdown(plan, found))
    for path in written:
        console.print(str(path))
    slower = _compared(old, written[0], quiet) if old is not None else False
    wrong = [fault for cell in found for fault in cells.faults(cell)]
    if wrong:
        raise BenchError(
            "some gradients of ours are not what they should be, and were not timed:\n"
            + "\n".join(f"{one['cell']}: {one['candidate']}: {one['reason']}" for one in wrong)
        )
    if slower:
        raise typer.Exit(1)


def _list(plan: Suite, chosen: list[Case], json_file: Path | None, console: Console) -> None:
    """The cells with the methods measured in each, as lines or as JSON."""
    cells_of = {case.name: [label for label in plan.methods if not plan.skips(case, label)] for case in chosen}
    if json_file is None:
        for name, labels in cells_of.items():
            console.print(f"{name}: {', '.join(labels)}")
    elif str(json_file) == "-":
        typer.echo(json.dumps(cells_of, indent=1))
    else:
        store.write_bytes(json_file, (json.dumps(cells_of, indent=1) + "\n").encode())


def find(config: Path) -> Path:
    """A file, or a suite of the package by its name.

    Raises:
        ConfigError: for a name that is neither, with those there are.
    """
    if config.exists() or config.suffix or config.parent != Path():
        return config
    known = shipped.suites()
    if config.name not in known:
        raise ConfigError(f"{config}: no such file, nor one of the package's suites: {', '.join(known)}")
    return known[config.name]


def _chosen(plan: Suite, only: list[str]) -> list[Case]:
    found = [case for case in plan.cases() if set(only) <= suite.case_words(case)]
    if not found:
        known = sorted({word for case in plan.cases() for word in suite.case_words(case)})
        raise ConfigError(f"--only {' '.join(only)}: no cell has all these words; there are: {', '.join(known)}")
    return found


def _measure(plan: Suite, chosen: list[Case], folder: Path, console: Console) -> list[dict[str, Any]]:
    found = []
    keep_freed_memory()  # as the harness does, for every candidate alike
    with _own_cache(plan), _threads(plan.threads), _watched(console) as status:
        for number, case in enumerate(chosen, 1):
            place = f"[{number}/{len(chosen)}] {case.name}"
            try:
                cell, now = cells.run_cell(plan, case, folder / "cells", lambda text, at=place: status(f"{at}: {text}"))  # type: ignore[misc]
            except KeyboardInterrupt:
                console.print(f"stopped in {case.name}; finished cells are stored, the same command goes on")
                raise typer.Exit(130) from None
            found.append(cell)
            took = timedelta(seconds=round(cell["seconds"]))
            console.print(f"{place}: {took if now else f'measured before, in {took}'}")
    return found


def _own_cache(plan: Suite) -> AbstractContextManager[Any]:
    """What a step takes to compile shall not depend on what was compiled before."""
    if "compiled" not in plan.step:
        return nullcontext()
    from torch._inductor.utils import fresh_cache  # takes seconds

    return fresh_cache()


class _Now:
    """Prints what it is told, but not oftener than once a minute."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, time.monotonic()

    def __call__(self, text: str) -> None:
        """At most one line a minute."""
        if time.monotonic() - self._last > 60:
            self._last = time.monotonic()
            self._console.print(f"  {text}")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _watched(console: Console) -> Iterator[Any]:
    """What goes on, on the last line of a terminal; elsewhere a line a minute."""
    if not console.is_terminal:
        yield _Now(console)
        return
    with Status("", console=console) as status:
        yield lambda text: status.update(bench_report.label(text))


def _write(
    plan: Suite, found: list[dict[str, Any]], folder: Path, json_file: Path | None, note: str, commit: dict[str, Any]
) -> list[Path]:
    """JSON, Markdown and CSV in the folder, and the JSON where it is asked for."""
    entries = [entry for cell in found for entry in cell["benchmarks"]]
    refused = [one for cell in found for one in cell["refused"]]
    about = {"name": plan.name, "title": plan.title, "rounds": plan.rounds, "threads": plan.threads, "note": note}
    content = json.dumps(bench_json.document(entries, about, refused, commit), indent=1, ensure_ascii=False) + "\n"
    texts = {
        folder / f"{plan.name}.json": content,
        folder / f"{plan.name}.md": bench_table.markdown(plan, found),
        folder / f"{plan.name}.csv": bench_table.table_csv(found),
    }
    if json_file is not None:
        texts[json_file] = content
    for path, text in texts.items():
        store.write_bytes(path, text.encode())
    return list(texts)


def _compared(old: list[bench_report.BenchRow], new: Path, quiet: bool) -> bool:
    """Print new over old, quietly only what is slower; whether one is, beyond the noise of both."""
    changes = bench_report.compare(bench_report.read(new), old)
    slower = [change for change in changes if change.regression]
    if slower or not quiet:
        Console(emoji=False).print(bench_report.comparison_table(slower if quiet else changes))
    return bool(slower)


def report(
    files: Annotated[list[Path], typer.Argument(help="JSON of ibp-triton bench or of pytest --benchmark-json=FILE")],
    compare: Annotated[Path | None, typer.Option(help="an older file; exit 1 on a regression beyond the noise")] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw the bars to this SVG file")] = None,
    page: Annotated[Path | None, typer.Option(help="write the history of all files to this page, .html")] = None,
) -> None:
    """Ratio tables of a benchmark file, against BP and against the baselines of each group; the history of several."""
    console = Console(emoji=False)
    if page is not None:
        from ibp_triton.bench.bench_history import write_history  # draws: matplotlib

        for written in write_history([bench_report.read_file(path) for path in files], page):
            console.print(bench_report.label(str(written)))
        return
    if len(files) > 1:
        raise BenchError(f"{len(files)} files make a history: say where to write it, --page history.html")
    (file,) = files
    rows = bench_report.read(file)
    for table in bench_report.tables(rows):
        console.print(table)
    if plot:
        console.print(bench_report.label(str(bench_report.plot(rows, plot))))
    if compare and _compared(bench_report.read(compare), file, quiet=False):
        raise typer.Exit(1)
