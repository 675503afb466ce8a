from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import ibp_triton as ibp
from ibp_triton.errors import ConfigError
from ibp_triton.harness import evaluate, grid, loading, stats, store
from ibp_triton.harness.cli import app
from ibp_triton.harness.launch import Job, launch
from ibp_triton.harness.report import csvfiles, tables, verdict, write_report
from ibp_triton.harness.report.gather import Findings, pairs_in_order
from ibp_triton.harness.report.paper import TABLES
from ibp_triton.harness.summary import ResultRow

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


@pytest.fixture
def stored(tree: Tree, write: Write, tmp_path: Path) -> Findings:
    """A grid with made-up results: no training, so that every figure can be checked."""
    tree["methods"] = {"bp": None, "loss_ibp": {"beta": [0.01, 0.03]}}
    tree["data"] |= {"validation": 8, "subset": 32}
    findings = Findings(loading.load(write({**tree, "compare": "table1_mnist"})), tmp_path / "runs")
    errors = {None: (1.2, 1.3), 0.01: (1.1, 1.3), 0.03: (1.0, 1.1)}
    validation = {None: (1.0, 1.0), 0.01: (0.9, 0.9), 0.03: (1.4, 1.2)}
    for run in findings.runs:
        seed, number = run.seeds.order, getattr(run.method, "beta", None)
        result = {
            "test_error": errors[number][seed],
            "validation_error": validation[number][seed],
            "seconds_per_epoch": 1.0 if number is None else 1.5,
            "predicted_ratio": 1.0 if number is None else 1.33,
        }
        store.write_json(findings.folder(run) / store.RESULT, result)
    return findings


def betas(one: Any) -> float | None:
    return getattr(one.method, "beta", None)


def test_parameter_is_chosen_on_the_split_that_select_names(stored: Findings) -> None:
    assert [betas(row) for row in stored.chosen] == [None, 0.01]
    on_test = Findings(loading.load(Path(stored.plan.where), ["select=test"]), stored.root)
    assert [betas(row) for row in on_test.chosen] == [None, 0.03]
    assert "chosen on the validation split" in tables.state(stored)
    assert "chosen on the test set" in tables.state(on_test)


def test_comparison_beside_the_paper(stored: Findings) -> None:
    table = tables.comparison(stored)
    bp, loss_ibp = table.cells
    assert bp == ["bp", "", "2/2", "1.25 ± 0.07", "1.21 ± 0.08", "+0.04", "", ""]
    assert loss_ibp == ["loss_ibp", "0.01", "2/2", "1.20 ± 0.14", "1.09 ± 0.11", "+0.11", "better (better)", "yes"]
    assert "1 of 1 pairs of methods" in table.note
    assert tables.ratios(stored).cells[1] == ["loss_ibp", "1.50", "1.50", "1.33", "1.49"]


def test_partial_results_and_none(stored: Findings, tmp_path: Path) -> None:
    for run in stored.runs[3:]:
        (stored.folder(run) / store.RESULT).unlink()
    partial = Findings(stored.plan, stored.root)
    assert tables.state(partial).startswith("3 of 6 runs are finished.")
    assert tables.comparison(partial).cells[0][2:4] == ["1/2", "1.20"]
    for folder in (stored.root, tmp_path / "empty"):
        paths = write_report(stored.plan, folder, tmp_path / "report")
        assert {"report.html", "tables.md", "results.csv"} <= {path.name for path in paths}


def test_a_diverged_run_leaves_the_mean_and_the_choice_and_is_named(stored: Findings) -> None:
    for run in stored.runs:
        if betas(run) == 0.01 or (betas(run) == 0.03 and run.seeds.order == 0):
            path = stored.folder(run) / store.RESULT
            result = store.read_json(path) or {}
            store.write_json(path, {**result, "diverged": True, "diverged_step": 17, "last_good_epoch": 3})
    found = Findings(stored.plan, stored.root)
    assert [betas(row) for row in found.chosen] == [None, 0.03], "0.01 has no run left to choose by"
    assert tables.comparison(found).cells[1][2:4] == ["1/2, 1 diverged", "1.10"]
    assert [line[3] for line in tables.every_parameter(found).cells] == ["1.00", "", "1.20"]  # type: ignore[union-attr]
    assert tables.every_parameter(found).cells[1][4] == "diverged"  # type: ignore[union-attr]
    assert [line[2] + line[4] + line[5] for line in tables.diverged(found).cells] == ["0173", "1173", "0173"]
    assert "6 of 6 runs are finished." in tables.state(found)
    assert "3 runs diverged and count in no mean." in tables.state(found)
    lines = list(csv.DictReader(io.StringIO(csvfiles.results_csv(found))))
    assert [line["diverged_step"] for line in lines].count("17") == 3
    assert write_report(stored.plan, stored.root, stored.root.parent / "report")


def test_what_only_diverged_is_reported_too(stored: Findings) -> None:
    for run in stored.runs:
        path = stored.folder(run) / store.RESULT
        store.write_json(path, {**(store.read_json(path) or {}), "diverged": True})
    found = Findings(stored.plan, stored.root)
    assert {line[3] for line in tables.comparison(found).cells} == {"diverged"}
    assert write_report(stored.plan, stored.root, stored.root.parent / "report")


@pytest.mark.parametrize("damage", [b"", b'{"test_error": "1"}', b"\xff", b"[" * 100_000])
def test_damaged_files_never_stop_the_report(tree: Tree, write: Write, tmp_path: Path, damage: bytes) -> None:
    plan = loading.load(write({**tree, "methods": {"bp": None}, "evaluate": {"masking": 0.1}}))
    root, (first, second) = tmp_path / "runs", grid.runs(plan)
    launch(Job([first, second], root, evaluate=plan.experiment.evaluate), 1, lambda _: None)
    for path in (root / first.name).iterdir():
        if path.name != store.RESULT:
            path.write_bytes(damage)
    assert write_report(plan, root, tmp_path / "report")
    found = Findings(plan, root)
    assert tables.state(found).startswith("2 of 2 runs are finished.")
    assert "1 run still to be evaluated." in tables.state(found)
    (root / first.name / store.RESULT).write_bytes(damage)
    assert write_report(plan, root, tmp_path / "report")
    found = Findings(plan, root)
    assert tables.state(found).startswith("1 of 2 runs are finished.")
    assert f"count as not finished: {root / first.name / store.RESULT}." in tables.state(found)


LABELS = [
    "[/x]",
    "[red]x",
    "$\\frac{$",
    "a|b",
    "=1+1",
    "<script>alert(1)</script>",
    "_x",
    "`",
    "*b*",
    ":smile:",
    "-",
]


def test_labels_are_shown_as_they_are(tree: Tree, write: Write, tmp_path: Path) -> None:
    tree |= {"methods": {label: {"method": "bp"} for label in LABELS}, "seeds": [0], "title": "<b>$x$ | [y](z)"}
    tree["evaluate"] = {"gaussian": [0.1, 0.2]}
    path = write({**tree, "output": str(tmp_path / "out")})
    for command in (["run", str(path)], ["run", str(path), "--dry-run"], ["report", str(tmp_path / "out")]):
        result = CliRunner().invoke(app, command, env={"COLUMNS": "300"})
        assert result.exit_code == 0, result.output
        assert command[0] == "report" or [label for label in LABELS if f" {label} " not in result.output] == []
    text = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    assert len({line.replace("\\|", "").count("|") for line in text.split("## ")[1].splitlines() if "|" in line}) == 1
    assert "<" not in text
    assert "| a\\|b |" in text
    assert text.startswith("# &lt;b>\\$x\\$ \\| \\[y\\](z)")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    figure = (tmp_path / "out" / "figures" / "gaussian.svg").read_text(encoding="utf-8")
    assert all(html.escape(label, quote=False) in figure for label in LABELS)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "results.csv").read_text(encoding="utf-8"))))
    assert {line["row"] for line in lines} == {"'" + label if label[0] in "=-" else label for label in LABELS}


def test_results_of_changed_data_are_marked(tree: Tree, write: Write, tmp_path: Path) -> None:
    images, labels = np.random.default_rng(0).random((48, 8, 8)), np.arange(48) % 3
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:9], "y_test": labels[:9]}
    np.savez(tmp_path / "a.npz", **arrays)
    tree |= {"data": {"source": "arrays", "path": str(tmp_path / "a.npz")}, "methods": {"bp": None}, "seeds": [0]}
    tree["network"] = {"name": "paper_mnist", "kernels": [3, 3], "pads": [1, 1], "widths": [2, 2], "hidden": 4}
    plan = loading.load(write(tree))
    launch(Job(grid.runs(plan), tmp_path / "runs"), 1, lambda _: None)
    assert "changed" not in tables.state(Findings(plan, tmp_path / "runs"))
    np.savez(tmp_path / "a.npz", **{**arrays, "x_train": images[::-1]})
    found = Findings(plan, tmp_path / "runs")
    assert "the files at data.path changed since the training of 1 run: bp-" in tables.state(found)
    assert csvfiles.results_csv(found).splitlines()[1].endswith(",data")


def test_columns_without_content_are_left_out() -> None:
    table = tables.Table("t", ["a", "b", "c"], [["1", "", ""], ["2", "", "3"]]).compact()
    assert (table.columns, table.cells) == (["a", "c"], [["1", ""], ["2", "3"]])


def test_order_of_pairs_leaves_the_papers_ties_out() -> None:
    published = TABLES["table1_mnist"]
    means = {"bp": 1.3, "at": 0.9, "fast_at": 1.0, "fast_tbp": 1.2, "loss_ibp": 1.4}
    rows = [(_row(key, mean), published[key]) for key, mean in means.items()]
    assert pairs_in_order(rows) == (6, 8)


def _row(key: str, mean: float) -> ResultRow:
    return ResultRow("", key, ibp.BP(), (), (mean,), (), 1.0, None, 1.0, 1)


def test_report_of_a_trained_grid(tree: Tree, write: Write, tmp_path: Path) -> None:
    tree |= {
        "evaluate": {"adversarial": [0.0, 0.1], "gaussian": [0.1, 0.2], "pgd": [0.1], "masking": 0.1},
        "variants": {"n=32": {"data.subset": 32}, "n=48": {"data.subset": 48}},
        "track_cosine": True,
        "title": "A <tiny> experiment",
    }
    plan = loading.load(write(tree))
    launch(Job(grid.runs(plan), tmp_path / "runs", evaluate=plan.experiment.evaluate), 1, lambda _: None)
    paths = {path.name for path in write_report(plan, tmp_path / "runs", tmp_path / "report")}
    names = {
        "adversarial",
        "gaussian",
        "sizes",
        "errors",
        "tradeoff",
        "cost",
        "samples",
        "tangents",
        "filters",
        "training_loss",
        "semantics_cosine",
        "semantics_norms",
        "ratios",
    }
    drawn = {path for path in paths if path.endswith((".svg", ".png"))}
    assert drawn == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}  # PGD has one size
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == len(names)
    assert "A &lt;tiny&gt; experiment" in page
    assert not re.search(r'(?:src|href)="', re.sub(r'href="(data:|#)', "", page))
    assert page.index("<svg") < page.index("<h2>Figures") < page.index("<table")
    assert "prefers-color-scheme: dark" in page
    assert "crop: null" not in page
    text = (tmp_path / "report" / "tables.md").read_text(encoding="utf-8")
    assert "Gradient-masking check" in text
    assert re.search(r"n=32: loss_ibp \| 0.03 \| 2/2 \|.*p = ", text)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "report" / "results.csv").read_text(encoding="utf-8"))))
    assert len(lines) == 8
    assert {line["variant"] for line in lines} == {"n=32", "n=48"}
    assert all(float(line["test_error"]) <= 100 for line in lines)
    curves = list(csv.DictReader(io.StringIO((tmp_path / "report" / "curves.csv").read_text(encoding="utf-8"))))
    assert len(curves) == 4 * (1 + 2 + 2 + 1)  # four rows: clean, two ε, two σ, one ε of PGD
    for line in curves:
        assert float(line["low"]) <= float(line["error"]) <= float(line["high"])
        if line["curve"] == "clean":
            of_row = [r for r in lines if (r["variant"], r["row"]) == (line["variant"], line["row"])]
            assert float(line["error"]) == pytest.approx(fmean(float(r["test_error"]) for r in of_row))
    at_zero = [line["error"] for line in curves if line["curve"] == "adversarial" and float(line["level"]) == 0]
    assert at_zero == [line["error"] for line in curves if line["curve"] == "clean"]


def test_robustness_tables_have_evenly_spaced_levels(tree: Tree, write: Write, tmp_path: Path) -> None:
    tree |= {"methods": {"bp": None}, "seeds": [0], "evaluate": {"gaussian": {"stop": 0.2, "step": 0.01}}}
    plan = loading.load(write(tree))
    launch(Job(grid.runs(plan), tmp_path / "runs", evaluate=plan.experiment.evaluate), 1, lambda _: None)
    findings = Findings(plan, tmp_path / "runs")
    (table,) = tables.robustness(findings)
    assert table.columns[1:] == [f"σ = {level:g}" for level in (0, 0.04, 0.08, 0.12, 0.16, 0.2)]
    ((_, curve),) = findings.curves["gaussian"]
    assert table.cells[0][1:] == [f"{error:.2f}" for error in curve.mean[::4]]


def test_every_method_is_compared_with_every_other_in_pairs(tree: Tree, write: Write, tmp_path: Path) -> None:
    tree |= {"methods": {"bp": None, "loss_ibp": {"beta": 0.3}, "fast_at": {"epsilon": 0.2}}}
    plan = loading.load(write(tree))
    launch(Job(grid.runs(plan), tmp_path / "runs"), 1, lambda _: None)
    findings = Findings(plan, tmp_path / "runs")
    (table,) = tables.pairs(findings)
    assert table.columns == ["method", "vs bp", "vs fast_at"]
    assert [(line[0], bool(line[1]), bool(line[2])) for line in table.cells] == [
        ("fast_at", True, False),
        ("loss_ibp", True, True),
    ]
    wrong = {row.label: sum(row.errors) * 32 / 100 for row in findings.rows}
    for line in table.cells:
        for base, cell in zip(("bp", "fast_at"), line[1:], strict=True):
            assert not cell or int(cell.split(",")[0]) == round(wrong[base] - wrong[line[0]])


def test_equal_findings_give_equal_bytes(stored: Findings, tmp_path: Path) -> None:
    first, second = (write_report(stored.plan, stored.root, tmp_path / name) for name in ("a", "b"))
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_the_verdict_comes_first_and_says_what_stands(stored: Findings, tmp_path: Path) -> None:
    best, paper, rest = verdict.sentences(stored)
    assert best == "loss_ibp has the lowest error, 1.20 ± 0.14 %, where bp has 1.25 ± 0.07 %."
    assert paper.startswith("1 of the 1 pairs of methods that differ in the paper lie the same way round here; 2 of 2")
    assert rest == "This rests on 6 of 6 runs, 2 seeds a row."
    nothing = Findings(stored.plan, tmp_path / "none")
    assert verdict.sentences(nothing) == ["Nothing can be said yet: no run is finished with an error."]


def test_holm_corrects_each_family_of_tests(tree: Tree, write: Write, tmp_path: Path) -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.6]) == [1.0, 1.0]
    assert stats.holm([]) == []
    plan = loading.load(write({**tree, "methods": {"bp": None, "at": {"epsilon": 0.1}, "fast_at": {"epsilon": 0.3}}}))
    launch(Job(grid.runs(plan), tmp_path / "runs"), 1, lambda _: None)
    found = Findings(plan, tmp_path / "runs")
    raw = [test.p for row in found.chosen if (test := found.against_base(row))]
    assert [p for _, p in found.corrected.values()] == pytest.approx(stats.holm(raw))
    table = tables.comparison(found)
    assert f"p = {stats.holm(raw)[0]:.2g}" in table.cells[0][-1]
    assert "Holm-corrected for the 2 tests" in table.note


def test_a_table_is_data_in_csv_and_latex() -> None:
    table = tables.Table("t", ["method", "β", "diff"], [["a,b_&", "0.03", "-0.10"], ["=x", "1 ± 2", "+3 −1, p = 1"]])
    assert list(csv.reader(io.StringIO(table.csv()))) == [
        ["method", "β", "diff"],
        ["a,b_&", "0.03", "-0.10"],
        ["'=x", "1 ± 2", "'+3 −1, p = 1"],
    ]
    assert r"a,b\_\& & 0.03 & -0.10 \\" in table.latex()
    assert r"method & $\beta$ & diff \\" in table.latex()
    assert r"1 $\pm$ 2 & +3 $-$1" in table.latex()


def test_errors_by_class_add_up(tree: Tree, write: Write, tmp_path: Path) -> None:
    plan = loading.load(write({**tree, "methods": {"bp": None}}))
    launch(Job(grid.runs(plan), tmp_path / "runs", evaluate=plan.experiment.evaluate), 1, lambda _: None)
    found = Findings(plan, tmp_path / "runs")
    (row,) = found.chosen
    summaries = [evaluate.summary_of(found.folder(run), plan.experiment.evaluate) for run in row.runs]
    wrong = sum(sum(one["by_class"]["wrong"]) for one in summaries if one)
    assert 100 * wrong / 64 == pytest.approx(row.mean)
    assert tables.classes(found).columns == ["method", "0", "1", "2", "3"]
    assert len(tables.classes(found).compact().cells) == 1


def test_two_experiments_are_compared_and_many_gathered(tree: Tree, write: Write, tmp_path: Path) -> None:
    folders = []
    for name, more in (("first", {"beta": 0.03}), ("second", {"beta": 0.3})):
        methods = {"bp": None, "loss_ibp": more, f"only_{name}": {"method": "fast_at", "epsilon": 0.1}}
        path = write({**tree, "name": name, "methods": methods, "output": str(tmp_path / name)})
        assert CliRunner().invoke(app, ["run", str(path), "--quiet"]).exit_code == 0
        folders.append(str(tmp_path / name))
    done = CliRunner().invoke(app, ["report", *folders])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "second" / "against_first.md").read_text(encoding="utf-8")
    bp, ibp_line = [line.split(" | ") for line in text.splitlines() if line.startswith(("| bp", "| loss_ibp"))]
    assert bp[1] == bp[1].strip()
    assert bp[4:] == ["+0.00", "+0 −0, p = 1 |"]
    assert ibp_line[1] == "β = 0.03 → β = 0.3"
    assert re.search(r"Of 2 shared rows [01] have a lower error in the second; [01] differ beyond chance", text)
    assert "Only in one of the two: only_first, only_second." in text.replace("\\_", "_")
    page = tmp_path / "board.html"
    done = CliRunner().invoke(app, ["leaderboard", *folders, "--to", str(page)])
    assert done.exit_code == 0, done.output
    lines = [
        line for line in page.with_suffix(".md").read_text(encoding="utf-8").splitlines() if "| paper_mnist |" in line
    ]
    shown = [float(line.split(" | ")[-2].split(" ±")[0]) for line in lines if " ± " in line]
    assert len(lines) == 6
    assert shown == sorted(shown)
    assert "<table" in page.read_text(encoding="utf-8")


def test_folders_that_cannot_be_compared_are_refused(stored: Findings, tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(stored.plan.text(), encoding="utf-8")
    for command in (["report", *[str(tmp_path)] * 3], ["leaderboard", str(tmp_path / "none")]):
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, ConfigError), result.output
