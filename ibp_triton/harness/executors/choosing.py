"""The executor that a command asks for, by name, with the options that are its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ibp_triton.errors import ConfigError
from ibp_triton.harness.bucket import shown, url_of
from ibp_triton.harness.executors.desk import Executor
from ibp_triton.harness.executors.local import Local, Processes, Serial
from ibp_triton.harness.executors.ray_tasks import Ray
from ibp_triton.harness.executors.slurm_array import Slurm
from ibp_triton.harness.executors.torchrun import Torchrun, started

OPTIONS = {  # of the command, that an executor has for its own
    "serial": (),
    "processes": ("workers",),
    "ray": ("address", "cpus_per_run", "gpus_per_run"),
    "slurm": ("partition", "time", "cpus_per_run", "gpus_per_run"),
    "torchrun": (),
}


def choose(name: str | None, folder: Path, workers: int, given: Mapping[str, Any], apart: bool = False) -> Executor:
    """The executor of that name; None: torchrun's where it has started this, else `workers` local processes at most.

    `given` are the command's options by name, None where they are left out; `folder` is for an executor's own files.
    `apart`: machines need not share the folder in which the command is given. Raises ConfigError for an unknown name,
    an option of another executor, or a package that is not installed.
    """
    if name is not None and name not in OPTIONS:
        raise ConfigError(f"--executor {name}: no executor; choose one of {', '.join(OPTIONS)}")
    name = "torchrun" if name is None and started() else name
    _check(name or "processes", given)
    if name == "torchrun":
        return Torchrun()
    if name == "serial":
        return Serial()
    if name == "ray":
        return Ray(given["address"], given["cpus_per_run"] or 1.0, given["gpus_per_run"] or 0.0, apart)
    if name == "slurm":
        if url_of(folder):
            raise ConfigError(
                f"--executor slurm: its array needs a folder that all nodes share, {shown(folder)} is none; name one "
                "by output, and the bucket by runs"
            )
        cpus, gpus = (_whole(option, given[option] or least) for option, least in _LEAST.items())
        return Slurm(folder / "slurm", given["partition"], given["time"] or 60, cpus, gpus)
    return Local(workers) if name is None else Processes(workers)


_LEAST = {"cpus_per_run": 1.0, "gpus_per_run": 0.0}


def _whole(option: str, value: float) -> int:
    if value != int(value):
        shown = option.replace("_", "-")
        raise ConfigError(
            f"--{shown} {value:g}: Slurm gives whole ones; write {int(value) + 1}, or take --executor ray"
        )
    return int(value)


def _check(name: str, given: Mapping[str, Any]) -> None:
    for option, value in given.items():
        owners = [one for one, own in OPTIONS.items() if option in own]
        if value is not None and name not in owners:
            shown = option.replace("_", "-")
            raise ConfigError(f"--{shown} is of --executor {' or '.join(owners)}, not of {name}; leave one of them out")
