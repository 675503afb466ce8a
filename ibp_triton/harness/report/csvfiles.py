"""results.csv and curves.csv: every finished run, every point of a curve."""

from __future__ import annotations

import csv
import io
from typing import Any

from ibp_triton.harness.report.gather import Findings
from ibp_triton.harness.rows import kinds
from ibp_triton.outcomes import csv_cell


def curves_csv(findings: Findings) -> str:
    """One line for each level of each curve of the chosen rows; errors in per cent."""
    buffer, writer = _csv(["curve", "variant", "row", *findings.fields, "seeds", "level", "error", "low", "high"])
    for name, curves in findings.curves.items():
        for row, curve in curves:
            values = map(csv_cell, row.values(findings.fields))
            head = [name, csv_cell(row.variant), csv_cell(row.label), *values, len(findings.outcomes(row, name))]
            columns = zip(curve.levels, curve.mean, curve.low, curve.high, strict=True)
            writer.writerows([*head, *(f"{value:.6g}" for value in line)] for line in columns)
    return buffer.getvalue()


def results_csv(findings: Findings) -> str:
    """One line for each finished run."""
    keys = ["test_error", "validation_error", "final_loss", "diverged", "seconds_per_epoch", "predicted_ratio"]
    keys += ["train_examples", "test_examples", "epochs", "diverged_step", "last_good_epoch"]
    names = list(dict.fromkeys(name for run in findings.runs for name in kinds(type(run.method))))
    heads = ["variant", "row", "method", *names, "seed", "run"]
    buffer, writer = _csv([*heads, *keys, "changed"])
    for run in findings.runs:
        result = findings.results.get(run.name)
        if result:
            method = run.method
            head = [
                csv_cell(run.variant),
                csv_cell(run.row),
                method.key,
                *(csv_cell(v) if isinstance(v := getattr(method, name, ""), str) else v for name in names),
            ]
            changed = " ".join(findings.changed.get(run.name, []))
            writer.writerow([*head, run.seeds.order, run.name, *(result.get(key) for key in keys), changed])
    return buffer.getvalue()


def _csv(columns: list[str]) -> tuple[io.StringIO, Any]:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    return buffer, writer
