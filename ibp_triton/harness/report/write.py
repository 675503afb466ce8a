"""Write the report of an experiment into its folder."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from jinja2 import Environment

from ibp_triton.harness import store, yamltext
from ibp_triton.harness.loading import ExperimentFile
from ibp_triton.harness.report import csvfiles, figures, tables
from ibp_triton.harness.report.figures import Sketch
from ibp_triton.harness.report.gather import Findings

PROTOCOLS = 50
LABELS_ONLY = ("name", "title", "output", "runs", "workers")


def write_report(plan: ExperimentFile, root: Path, folder: Path) -> list[Path]:
    """report.html, tables.md, results.csv, curves.csv and figures/* in `folder`, from the runs under `root`."""
    findings = Findings(plan, root)
    sketches = list(figures.sketches(findings))
    contents: dict[str, bytes] = {
        "report.html": page(findings, sketches).encode(),
        "tables.md": tables.markdown(findings).encode(),
        "results.csv": csvfiles.results_csv(findings).encode(),
        "curves.csv": csvfiles.curves_csv(findings).encode(),
    }
    for sketch in sketches:
        contents[f"figures/{sketch.name}.svg"] = sketch.svg().replace(figures.INK, "#000000").encode()
        contents[f"figures/{sketch.name}.png"] = sketch.png()
    for name, content in contents.items():
        store.write_bytes(folder / name, content)
    return [folder / name for name in contents]


def page(findings: Findings, sketches: list[Sketch]) -> str:
    """The HTML page: no scripts, nothing loaded from elsewhere."""
    template = resources.files("ibp_triton.harness.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(template)
        .render(
            heading=findings.experiment.title or findings.experiment.name,
            state=tables.state(findings),
            tables=tables.tables(findings),
            figures=[{"svg": sketch.inline(), "caption": sketch.caption} for sketch in sketches],
            protocols=protocols(findings),
            environments=[_yaml(environment) for environment in findings.environments()],
        )
    )


def protocols(findings: Findings) -> list[tuple[str, str]]:
    """The protocol of each of the first variants, its preset filled in, as YAML; what the others change."""
    hidden, variants = {*LABELS_ONLY, "variants"}, findings.plan.variants()
    found = [
        (label or "Resolved configuration", _yaml(variant.model_dump(by_alias=True, exclude=hidden, exclude_none=True)))
        for label, variant in variants[:PROTOCOLS]
    ]
    others = {label: findings.experiment.variants[label] for label, _ in variants[PROTOCOLS:]}
    return [*found, *([("What the other variants change", _yaml(others))] if others else [])]


def _yaml(value: object) -> str:
    return yamltext.dump(value)
