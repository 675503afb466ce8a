"""Write the report of an experiment into its folder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment

from ibp_triton.harness import store, yamltext
from ibp_triton.harness.loading import ExperimentFile
from ibp_triton.harness.report import compare, csvfiles, figures, tables, verdict
from ibp_triton.harness.report.gather import Findings
from ibp_triton.harness.report.samples import samples
from ibp_triton.harness.report.sketch import INK, Sketch
from ibp_triton.harness.report.tables import Table

PROTOCOLS = 50
LABELS_ONLY = ("name", "title", "output", "runs", "workers")


def write_report(
    plan: ExperimentFile, root: Path, folder: Path, png: bool = True, data_dir: str | None = None
) -> list[Path]:
    """report.html, tables.md, results.csv, curves.csv and figures/* in `folder`, from the runs under `root`.

    Pictures of examples are drawn where `root` has checkpoints and their data are there, in `data_dir` if given.
    """
    findings = Findings(plan, root)
    first = list(figures.errors(findings))
    others = [*figures.sketches(findings), *samples(findings, data_dir)]
    contents: dict[str, bytes] = {
        "report.html": _experiment_page(findings, first, others).encode(),
        "tables.md": tables.markdown(findings).encode(),
        "results.csv": csvfiles.results_csv(findings).encode(),
        "curves.csv": csvfiles.curves_csv(findings).encode(),
    }
    for sketch in [*first, *others]:
        contents[f"figures/{sketch.name}.svg"] = sketch.svg().replace(INK, "#000000").encode()
        if png:
            contents[f"figures/{sketch.name}.png"] = sketch.png()
    for name, content in contents.items():
        store.write_bytes(folder / name, content)
    return [folder / name for name in contents]


def write_comparison(first: Findings, second: Findings, folder: Path) -> list[Path]:
    """against_NAME.html and .md in `folder`, NAME the first experiment's."""
    found, told = compare.against(first, second)
    names = " and ".join(findings.experiment.title or findings.experiment.name for findings in (first, second))
    return write_page(folder / f"against_{first.experiment.name}.html", names, [told], [found.compact()])


def write_leaderboard(experiments: list[Findings], file: Path) -> list[Path]:
    """The page `file`, and the same as Markdown beside it."""
    found = compare.leaderboard(experiments)
    count = sum(len(table.cells) for table in found)
    sentence = f"{count} rows of {len(experiments)} experiments, the lowest error first."
    return write_page(file, "Leaderboard", [sentence], found)


def write_page(
    file: Path, heading: str, sentences: list[str], shown: list[Table], figures: Sequence[Sketch] = ()
) -> list[Path]:
    """A page of sentences, figures and tables, and the same without figures as Markdown beside it."""
    text = f"# {tables.plain(heading)}\n\n{tables.plain(' '.join(sentences))}\n\n"
    text += "\n".join(table.markdown() for table in shown)
    store.write_bytes(
        file, page(heading, sentences, [table for table in shown if table.cells], figures=figures).encode()
    )
    store.write_bytes(file.with_suffix(".md"), text.encode())
    return [file, file.with_suffix(".md")]


def _experiment_page(findings: Findings, first: list[Sketch], others: list[Sketch]) -> str:
    return page(
        findings.experiment.title or findings.experiment.name,
        verdict.sentences(findings),
        tables.tables(findings),
        first=first,
        figures=others,
        state=tables.state(findings),
        protocols=protocols(findings),
        environments=[_yaml(environment) for environment in findings.environments()],
    )


def page(heading: str, sentences: list[str], shown: list[Table], **more: object) -> str:
    """An HTML page with its script inside, which loads nothing: the verdict, figures, tables."""
    files = resources.files("ibp_triton.harness.report")
    template = files.joinpath("page.html.j2").read_text(encoding="utf-8")
    script = files.joinpath("page.js").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(template)
        .render(heading=heading, verdict=sentences, tables=shown, script=script, **more)
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
