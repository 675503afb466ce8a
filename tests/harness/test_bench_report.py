"""The benchmark report: ratios, the regression check, the bars, errors."""

import json

import pytest
from typer.testing import CliRunner

from ibp_triton.bench import bench_report
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
