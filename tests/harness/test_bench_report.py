"""The benchmark report: ratios, the regression check, the bars, errors."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ibp_triton.bench import bench_history, bench_report
from ibp_triton.harness.cli import app


def entry(name, median, info=None, noise=0.01, group="step"):
    stats = {"median": median, "q1": median * (1 - noise), "q3": median * (1 + noise)}
    return {"group": group, "name": name, "stats": stats, "extra_info": info or {}}


def written(path, *entries):
    path.write_text(json.dumps({"benchmarks": list(entries)}))
    return path


@pytest.fixture
def file(tmp_path):
    return written(
        tmp_path / "new.json",
        entry("eager bp", 0.020, {"method": "bp", "baseline": True}),
        entry("bp", 0.016, {"method": "bp"}),
        entry("loss_ibp", 0.024, {"method": "loss_ibp", "predicted_ratio": 1.35, "interleaved_ratio_to_bp": 1.47}),
    )


def test_ratios_against_the_baseline_and_our_bp(file):
    result = CliRunner().invoke(app, ["bench-report", str(file)], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    line = next(line for line in result.output.splitlines() if "loss_ibp" in line)
    assert [cell.strip() for cell in line.split("│")[2:8]] == ["24.000", "1", "1.20", "1.50", "1.47", "1.35"]


@pytest.mark.parametrize(("factor", "noise", "code"), [(1.2, 0.01, 1), (1.2, 0.1, 0), (1.01, 0.01, 0), (0.5, 0.01, 0)])
def test_a_regression_beyond_the_files_own_noise_exits_1(tmp_path, factor, noise, code):
    old = written(tmp_path / "old.json", entry("bp", 1.0, noise=noise))
    new = written(tmp_path / "new.json", entry("bp", factor, noise=noise), entry("another", 1.0))
    result = CliRunner().invoke(app, ["bench-report", str(new), "--compare", str(old)])
    assert result.exit_code == code
    assert ("slower" in result.output) == bool(code)


def test_a_name_in_brackets_is_no_markup(tmp_path):
    path = written(tmp_path / "a.json", entry("step[cpu-mnist-bp]", 1.0, group="[/x]"))
    result = CliRunner().invoke(app, ["bench-report", str(path), "--compare", str(path)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert result.output.count("step[cpu-mnist-bp]") == 2
    assert "[/x]" in result.output


def test_bars(file, tmp_path):
    path = bench_report.plot(bench_report.read(file), tmp_path / "bars.svg")
    text = path.read_text()
    assert text.lstrip().startswith("<?xml")
    assert "median and quartiles" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "not a file of pytest-benchmark"),
        ("[]", "not a file"),
        ("[" * 100_000, "not a file"),
    ],
)
def test_files_that_are_none(tmp_path, text, message):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(bench_report.BenchError, match=message):
        bench_report.read(path)


def test_what_json_has_no_form_for_is_shown_as_it_is(tmp_path):
    odd = "test_step[UNSERIALIZABLE[Case(network='mnist', shape=[1, 28])]-bp]"
    path = written(tmp_path / "a.json", entry(odd, 1.0))
    result = CliRunner().invoke(app, ["bench-report", str(path)], env={"COLUMNS": "160"})
    assert "test_step[Case(network='mnist', shape=[1, 28])-bp]" in result.output


def test_a_long_name_is_folded_not_cut(tmp_path):
    name = "[cpu-mnist-" + "x" * 60 + "-end]"
    path = written(tmp_path / "a.json", entry(name, 1.0))
    result = CliRunner().invoke(app, ["bench-report", str(path)], env={"COLUMNS": "70"})
    shown = "".join(line.split("│")[1].strip() for line in result.output.splitlines() if line.startswith("│"))
    assert shown == name


def dated(path, when, commit, machine, *entries):
    about = {"datetime": when, "commit_info": {"id": commit}, "machine_info": {"cpu": {"brand_raw": machine}}}
    path.write_text(json.dumps({**about, "benchmarks": list(entries)}))
    return path


def test_a_history_of_several_files(tmp_path):
    """Ratios to the baseline in order of time; the last column compares files of one machine alone."""
    base = {"method": "bp", "baseline": True}
    inside = {"ratios": {"loss_ibp / eager_bp": {"median_of_ratios": 1.44}}}
    files = [
        dated(
            tmp_path / "b.json",
            "2026-02-01T10:00",
            "b" * 40,
            "one",
            entry("eager_bp", 0.1, base),
            entry("loss_ibp", 0.2),
        ),
        dated(
            tmp_path / "a.json",
            "2026-01-01T10:00",
            "a" * 40,
            "one",
            entry("eager_bp", 0.1, base),
            entry("loss_ibp", 0.15, inside),
        ),
        dated(
            tmp_path / "c.json",
            "2026-03-01T10:00",
            "c" * 40,
            "other",
            entry("eager_bp", 0.4, base),
            entry("at", 0.8),
            entry("x", 0.003, group="alone"),
        ),
    ]
    result = CliRunner().invoke(
        app, ["bench-report", *map(str, files), "--page", str(tmp_path / "out" / "history.html")]
    )
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "history.md").read_text()
    assert "3 files from 2026-01-01 to 2026-03-01." in text
    assert "Of 1 benchmark that was measured before on the same machine, 1 took longer" in text
    assert "They are of 2 machines" in text
    assert "| benchmark | 2026-01-01 aaaaaaa | 2026-02-01 bbbbbbb | 2026-03-01 ccccccc | newest / before |" in text
    assert "| loss_ibp | 1.44 | 2.00 |  | 1.33 slower |" in text
    assert "| eager_bp | 1.00 | 1.00 | 1.00 |  |" in text
    assert "| at |  |  | 2.00 |  |" in text
    assert "## alone, ms\n\n| benchmark | 2026-03-01 ccccccc |\n| --- | --- |\n| x | 3.00 |" in text
    page = (tmp_path / "out" / "history.html").read_text()
    assert page.count('role="img"') == 1
    assert "loss_ibp: 0 → 1.44" in page


def test_several_files_need_a_page_and_a_file_must_be_one(tmp_path, file):
    result = CliRunner().invoke(app, ["bench-report", str(file), str(file)])
    assert "2 files make a history: say where to write it, --page history.html" in str(result.exception)
    (tmp_path / "list.json").write_text("[]")
    result = CliRunner().invoke(app, ["bench-report", str(tmp_path / "list.json"), "--page", str(tmp_path / "p.html")])
    assert "list.json: not a file of pytest-benchmark" in str(result.exception)
    assert not (tmp_path / "p.html").exists()


def test_what_the_suites_of_this_project_wrote_makes_a_history(tmp_path):
    folder = Path(__file__).parents[2] / "benchmarks"
    files = [bench_report.read_file(path) for path in sorted(folder.glob("modern_64*.json"))]
    bench_history.write_history(files, tmp_path / "history.html")
    text = (tmp_path / "history.md").read_text()
    assert "## resnet18_32-64-fp32" in text
    assert " that were measured before on the same machine, " in text
