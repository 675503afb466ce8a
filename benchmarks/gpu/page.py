"""The results as a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

STEPS = ("ours", "captured", "eager", "eager in a graph", "torch.compile")


def markdown(results: dict[str, Any]) -> str:
    """Environment, what fell short, steps and kernels; every time is measured on this card."""
    environment = results["environment"]
    parts = [
        f"# {environment['gpu']}\n",
        " · ".join(f"{name} {value}" for name, value in environment.items()) + "\n",
        "## What fell short\n",
        "\n".join(f"- {line}" for line in results["short"] or ["nothing"]) + "\n",
        "## Proof\n",
        _table(("part", "result", "seconds"), (_part(name, results) for name in results["seconds"])),
        "## Steps before the optimizer, µs\n",
        _table(
            ("method", "network", "batch", "precision", "off", *STEPS, "captured / best"), map(_step, results["steps"])
        ),
        _reasons(results["steps"]),
        "## Kernels of a Loss IBP step\n",
        _table(
            ("kernel", "sizes", "batch", "precision", "µs", "share of the card", "predicted µs", "bound"),
            map(_kernel, results["kernels"]),
        ),
        "Share: the larger of unique bytes at the measured bandwidth and FLOPs at the measured peak, over the time.\n"
        "Each step is measured with the cache emptied; predictions are those of `kernels.workbench.model`.\n",
    ]
    return "\n".join(parts)


def _part(name: str, results: dict[str, Any]) -> list[str]:
    found = results["failed"].get(name) or results[name]
    if isinstance(found, dict):
        found = ", ".join(f"{key} {value}" for key, value in found.items()) or "left out"
    if isinstance(found, list):
        failed = sum("failed" in row for row in found)
        found = f"{len(found)} rows, {failed} failed"
    return [name, str(found), f"{results['seconds'][name]:.0f}"]


def _step(row: dict[str, Any]) -> list[str]:
    times = row.get("us", {})
    others = [times[name] for name in STEPS[2:] if name in times]
    ratio = f"{times['captured'] / min(others):.2f}" if others and "captured" in times else "–"
    off = f"{row['off']:.1e}" if "off" in row else "–"
    cells = [f"{times[name]:.0f}" if name in times else "–" for name in STEPS]
    return [row["method"], row["network"], str(row["batch"]), row["precision"], off, *cells, ratio]


def _reasons(rows: Iterable[dict[str, Any]]) -> str:
    """Why a cell is empty, each reason once."""
    found: dict[str, None] = {}
    for row in rows:
        what = f"{row['method']} {row['precision']}"
        for name, reason in row.get("without", {}).items():
            found[f"- {what}, {name}: {reason}"] = None
        for key in ("failed", "left"):
            if key in row:
                found[f"- {what}, {row['network']} {row['batch']}: {row[key]}"] = None
    return "\n".join(found) + "\n"


def _kernel(row: dict[str, Any]) -> list[str]:
    sizes = f"{row['channels']}→{row['columns']}" if row["columns"] else "–"
    predicted = "–".join(f"{end:.1f}" for end in row["predicted"]) if "predicted" in row else "–"
    head = [row["kernel"], sizes, str(row["batch"]), row["precision"]]
    return [*head, f"{row['us']:.1f}", f"{row['share']:.2f}", predicted, row.get("bound", "–")]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"
