"""The experiments that come with the package, and `ibp-triton list`: methods, experiments, benchmarks, data sources."""

from __future__ import annotations

import json
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ibp_triton as ibp
from ibp_triton.errors import ConfigError
from ibp_triton.harness import plugins, rows
from ibp_triton.harness.sources import SOURCES


def folder() -> Path:
    """Where the experiments lie: inside an installed package, beside it in a checkout."""
    inside = Path(str(resources.files("ibp_triton"))) / "configs"
    return inside if inside.is_dir() else Path(ibp.__file__).parents[1] / "configs"


def names() -> dict[str, Path]:
    """The experiments by name."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def suites() -> dict[str, Path]:
    """The suites of benchmarks by name."""
    return {path.stem: path for path in sorted((folder() / "bench").glob("*.yaml"))}


def find(config: Path) -> Path:
    """A file, or an experiment of the package by its name.

    Raises:
        ConfigError: for a name that is neither, with those there are.
    """
    if config.exists() or config.suffix or config.parent != Path():
        return config
    found = names().get(config.name)
    if found is None:
        raise ConfigError(f"{config}: no such file, nor one of the package's experiments: {', '.join(names())}")
    return found


def show(as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False) -> None:
    """List the methods with their fields, the experiments and benchmarks that can be run by name, the data sources."""
    found = listing()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console(emoji=False)
    for title, lines in found.items():
        table = Table("name", "", title=title, title_justify="left")
        for name, text in lines.items():
            table.add_row(escape(name), escape(text))
        console.print(table)


def listing() -> dict[str, dict[str, str]]:
    """What `show` prints: {kind: {name: what it is}}."""
    methods = {key: f"{cls.title}({', '.join(rows.kinds(cls))})" for key, cls in ibp.METHODS.items()}
    experiments = {name: _first_comment(path) for name, path in names().items()}
    benchmarks = {name: _first_comment(path) for name, path in suites().items()}
    sources = {name: source.about for name, source in SOURCES.items()}
    named = {str(key): about for key, about in sources.items()}
    found = {"methods": methods, "experiments": experiments, "benchmarks": benchmarks, "data sources": named}
    for kind, group in (("methods", "methods"), ("data sources", "sources")):
        found[kind] |= {n: target for n, target in plugins.offered(group).items() if n not in found[kind]}
    others = {group: plugins.offered(group) for group in ("networks", "optimizers")}
    return {**found, **{group: points for group, points in others.items() if points}}


def _first_comment(path: Path) -> str:
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines)
