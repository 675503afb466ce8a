"""pytest-benchmark's JSON: what a suite writes, `pytest-benchmark compare` and `ibp-triton bench-report` read."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ibp_triton as ibp
from ibp_triton.bench import measure

Entry = dict[str, Any]


def stats(seconds: list[float]) -> dict[str, Any]:
    """All fields that pytest-benchmark gives a benchmark, and the seconds of each round."""
    data = sorted(seconds)
    q1, median, q3 = _lower_quartile(data), statistics.median(data), -_lower_quartile([-s for s in reversed(data)])
    iqr, mean, spread = q3 - q1, statistics.fmean(data), statistics.stdev(data)
    low = [s for s in data if s >= q1 - 1.5 * iqr]
    high = [s for s in data if s <= q3 + 1.5 * iqr]
    beyond = sum(not q1 - 1.5 * iqr <= s <= q3 + 1.5 * iqr for s in data)
    far = sum(abs(s - mean) > spread for s in data)
    return {
        "min": data[0], "max": data[-1], "mean": mean, "stddev": spread, "rounds": len(data), "median": median,
        "iqr": iqr, "q1": q1, "q3": q3, "iqr_outliers": beyond, "stddev_outliers": far, "outliers": f"{far};{beyond}",
        "ld15iqr": low[0], "hd15iqr": high[-1], "ops": 1 / mean, "total": sum(data), "iterations": 1, "data": seconds,
    }  # fmt: skip


def _lower_quartile(data: list[float]) -> float:
    """The mean of the medians of the lower half without and with the middle, of at least two sorted numbers."""
    n = len(data)
    return (statistics.median(data[: n // 2]) + statistics.median(data[: (n + 1) // 2])) / 2


def entry(suite: str, cell: str, label: str, seconds: list[float], info: dict[str, Any]) -> Entry:
    """One benchmark of a cell."""
    return {
        "group": cell,
        "name": label,
        "fullname": f"{suite}::{cell}[{label}]",
        "params": {key: info[key] for key in ("network", "batch", "precision", "layout", "backend", "device")},
        "param": label,
        "extra_info": info,
        "options": {"disable_gc": False, "timer": info["clock"], "min_rounds": len(seconds), "warmup": True},
        "stats": stats(seconds),
    }


def document(
    entries: Iterable[Entry], suite: dict[str, Any], refused: list[dict[str, str]], commit: dict[str, Any]
) -> dict[str, Any]:
    """The whole file; `commit` is ``commit_info()`` from before the first cell."""
    machine = machine_info()
    machine["ibp_triton"]["threads"] = suite["threads"]
    return {
        "machine_info": machine,
        "commit_info": commit,
        "benchmarks": list(entries),
        "datetime": datetime.now(timezone.utc).isoformat(),
        "version": f"ibp-triton {ibp.__version__}",
        "suite": suite,
        "refused": refused,
    }


def machine_info() -> dict[str, Any]:
    """The machine as pytest-benchmark describes it, but for its name."""
    found = measure.machine()
    return {
        "node": "",
        "processor": platform.processor(),
        "machine": platform.machine(),
        "python_compiler": platform.python_compiler(),
        "python_implementation": platform.python_implementation(),
        "python_implementation_version": platform.python_version(),
        "python_version": platform.python_version(),
        "python_build": list(platform.python_build()),
        "release": platform.release(),
        "system": platform.system(),
        "cpu": {"brand_raw": found["cpu"], "arch": platform.machine()},
        "ibp_triton": found,
    }


def commit_info() -> dict[str, Any]:
    """The commit of the checkout that this package lies in, if it does in one."""
    commit, branch = _git("rev-parse", "HEAD"), _git("rev-parse", "--abbrev-ref", "HEAD")
    return {
        "id": commit or "unversioned",
        "time": _git("show", "-s", "--format=%cI") or None,
        "author_time": _git("show", "-s", "--format=%aI") or None,
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "project": "ibp-triton",
        "branch": branch or "(unknown)",
    }


def _git(*arguments: str) -> str:
    folder = Path(ibp.__file__).parents[1]
    if not (folder / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
