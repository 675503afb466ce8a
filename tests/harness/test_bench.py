"""Suites of benchmarks: a tiny one end to end, parity, what is measured twice, files that others read, faults."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import ibp_triton as ibp
from benchmarks import scaling
from ibp_triton.bench import (
    bench_json,
    bench_table,
    by_hand,
    candidates,
    cells,
    parity,
    pass_ledger,
    replicated_gradients,
    suite,
    whole_steps,
)
from ibp_triton.bench.candidates import METHODS, MORE, NETWORKS, Case
from ibp_triton.errors import BenchError, ConfigError
from ibp_triton.harness import shipped
from ibp_triton.harness.cli import app

TINY = {
    "name": "tiny",
    "networks": {"mlp": {"options": {"hidden": 16}}},
    "methods": ["bp", "loss_ibp", "at"],
    "batch": [4],
    "rounds": 2,
    "warmup": 1,
    "targets": {"bp / eager_bp": 1e-6, "loss_ibp / by_hand": {"mlp fp32": 1e6}, "at / bp": {"bf16": 1}},
}
SHIPPED = sorted((Path(__file__).parents[2] / "configs/bench").glob("*.yaml"))
CELL = "mlp-4-fp32-channels_last-torch-cpu"


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False), encoding="utf-8")
    return path


def bench(path: Path, *more: str) -> Any:
    return CliRunner().invoke(app, ["bench", str(path), "--output", str(path.parent / "out"), *more])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the tiny suite."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bench")
    result = bench(written(folder), "--note", "a [note]", "--json", str(folder / "copy.json"))
    assert result.exit_code == 0, result.output
    assert CELL in result.output
    return folder / "out"


def test_the_json_holds_every_candidate_with_its_figures(out: Path) -> None:
    found = json.loads((out / "tiny.json").read_text())
    assert found == json.loads((out.parent / "copy.json").read_text())
    assert found["suite"] == {"name": "tiny", "title": "", "rounds": 2, "threads": 1, "note": "a [note]"}
    assert found["machine_info"]["ibp_triton"]["threads"] == 1
    rows = {row["name"]: row for row in found["benchmarks"]}
    assert list(rows) == ["eager_bp", "bp", "loss_ibp by_hand", "loss_ibp", "at by_hand", "at"]
    info = rows["loss_ibp"]["extra_info"]
    assert info["parity"] < 1e-5
    assert info["peak_memory"] > 0
    assert len(info["cpu_seconds"]) == len(info["wall_seconds"]) == rows["loss_ibp"]["stats"]["rounds"] == 2
    over = info["ratios"]["loss_ibp / eager_bp"]
    assert over.keys() == {"median_of_ratios", "ratio_of_medians", "predicted"}
    assert info["ratios"].keys() >= {"loss_ibp / by_hand", "loss_ibp / bp", "memory loss_ibp / eager_bp"}
    assert rows["eager_bp"]["extra_info"]["baseline"]
    assert found["refused"] == []


def test_the_table_is_bold_over_its_targets_alone(out: Path) -> None:
    lines = (out / "tiny.md").read_text().splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:]}
    assert list(rows) == ["bp / eager_bp", "loss_ibp / by_hand", "at / bp"]
    assert "≤ 1e-06 | **" in rows["bp / eager_bp"]
    assert "**" not in rows["loss_ibp / by_hand"] + rows["at / bp"]
    with (out / "tiny.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["candidate"] for row in table][:2] == ["eager_bp", "bp"]
    assert float(table[1]["/ eager_bp"]) > 0


def test_pytest_benchmark_and_bench_report_read_it(out: Path) -> None:
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(out / "tiny.json"), "--columns=median,iqr,ops"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out)
    assert run.returncode == 0, run.stderr
    assert "loss_ibp by_hand" in run.stdout
    assert "6 tests" in run.stdout
    shown = CliRunner().invoke(app, ["bench-report", str(out / "tiny.json")], env={"COLUMNS": "160"})
    assert shown.exit_code == 0
    assert "loss_ibp by_hand" in shown.output


def test_finished_cells_are_not_measured_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, times = out.parent / "tiny.yaml", []
    original = cells.measured
    monkeypatch.setattr(cells, "measured", lambda *a: times.append(a) or original(*a))
    before = json.loads((out / "tiny.json").read_text())["benchmarks"]
    again = bench(path)
    assert again.exit_code == 0
    assert "measured before" in again.output
    assert json.loads((out / "tiny.json").read_text())["benchmarks"] == before
    assert not times
    assert bench(path, "--set", "batch=[4,5]").exit_code == 0  # the new cell alone
    assert len(times) == 1
    assert bench(path, "--set", "rounds=3").exit_code == 0  # other settings
    assert len(times) == 2
    assert bench(path).exit_code == 0  # as it was for the tests below


@pytest.mark.parametrize(("factor", "code"), [(1e-6, 1), (1e6, 0)])
def test_compare_exits_1_beyond_the_noise(out: Path, tmp_path: Path, factor: float, code: int) -> None:
    old = json.loads((out / "tiny.json").read_text())
    for row in old["benchmarks"]:
        row["stats"] = bench_json.stats([factor * s for s in (1.0, 1.01, 1.02)])
    (tmp_path / "old.json").write_text(json.dumps(old))
    result = bench(out.parent / "tiny.yaml", "--compare", str(tmp_path / "old.json"))
    assert result.exit_code == code, result.output
    assert ("slower" in result.output) == bool(code)
    quiet = bench(out.parent / "tiny.yaml", "--compare", str(tmp_path / "old.json"), "--quiet")
    assert quiet.exit_code == code
    assert ("slower" in quiet.output) == bool(quiet.output) == bool(code)


def test_a_wrong_gradient_is_never_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ibp.AdversarialTraining.recipe

    def wrong(self: Any, s: Any) -> Any:
        for number, part in enumerate(right(self, s)):
            yield 1.1 * part if number == 1 else part

    monkeypatch.setattr(ibp.AdversarialTraining, "recipe", wrong)
    result = bench(written(tmp_path))
    assert result.exit_code == 1
    assert "at: off autograd's gradient by" in str(result.exception)
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert [row["name"] for row in found["benchmarks"]] == ["eager_bp", "bp", "loss_ibp by_hand", "loss_ibp"]
    assert "not timed: at in mlp" in (tmp_path / "out" / "tiny.md").read_text()
    monkeypatch.undo()
    assert bench(tmp_path / "tiny.yaml").exit_code == 0  # measured again, though the cell was stored


def test_a_method_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise KeyError("a fault")

    monkeypatch.setattr(ibp.AdversarialTraining, "recipe", fails)
    result = bench(written(tmp_path))
    assert result.exit_code == 1
    assert "at: KeyError: 'a fault'" in str(result.exception)
    assert "loss_ibp" in (tmp_path / "out" / "tiny.csv").read_text()


def test_a_baseline_that_torch_cannot_run_is_told_and_ours_is_held_against_the_oracle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no derivative [/x]")

    monkeypatch.setitem(by_hand.BY_HAND, "at", by_hand.ByHand("FGSM by hand", fails))
    result = bench(written(tmp_path))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert found["refused"] == [
        {"cell": CELL, "candidate": "at by_hand", "reason": "RuntimeError: no derivative [/x]", "fault": "baseline"}
    ]
    assert [row["name"] for row in found["benchmarks"]][-1] == "at"
    assert "no derivative \\[/x\\]" in (tmp_path / "out" / "tiny.md").read_text()


def test_a_baseline_of_another_gradient_is_not_timed() -> None:
    """torch's forward mode of BatchNorm in train mode, differentiated once more, is wrong: the oracle is not."""
    case = Case("resnet18", 3, "fp32", own=suite.NetworkRow(network="resnet18", options={"width": 8}).entry())
    verdict = parity.check(case, ibp.TangentBP(0.1, semantics="exact"))
    assert verdict.ours is None
    assert "by hand it is off float64" in str(verdict.by_hand)


@pytest.mark.parametrize("method", [ibp.BP(), ibp.LossIBP(0.1, semantics="exact")], ids=repr)
def test_bfloat16_of_a_network_that_magnifies_rounding(method: ibp.Method) -> None:
    case = Case("resnet18", 4, "bf16", own=suite.NetworkRow(network="resnet18", options={"width": 8}).entry())
    assert parity.check(case, method) == parity.Verdict(parity.check(case, method).off)


def test_a_penalty_that_is_lost_beside_the_loss_is_named() -> None:
    with pytest.raises(BenchError, match=r"the gradient of LossIBP.*'s penalty is lost"):
        parity._strong(ibp.LossIBP(0.1), lambda _: {"weight": torch.ones(2)})


def test_whole_steps_and_the_floor(tmp_path: Path) -> None:
    path = written(tmp_path, methods=["bp"], step=["gradient", "eager", "captured"], baselines=["floor"], targets={})
    assert bench(path).exit_code == 0
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())["benchmarks"]
    assert [row["name"] for row in found] == ["bp", "bp eager step", "bp captured step"]
    assert found[0]["extra_info"]["ratios"].keys() == {"bp / floor"}
    assert "bp captured step / eager step" in found[2]["extra_info"]["ratios"]


def test_whole_steps_by_hand_beside_ours(tmp_path: Path) -> None:
    given: dict[str, Any] = {"methods": ["bp", "loss_ibp"], "baselines": ["by_hand_step"], "targets": {}}
    assert bench(written(tmp_path, step=["eager"], **given)).exit_code == 0
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())["benchmarks"]
    by_name = {row["name"]: row["extra_info"] for row in found}
    assert list(by_name) == [f"{m}{w} eager step" for m in ("bp", "loss_ibp") for w in (" by_hand", "")]
    assert by_name["loss_ibp eager step"]["ratios"].keys() >= {"loss_ibp eager step / by_hand eager step"}
    assert not by_name["loss_ibp by_hand eager step"]["ratios"]
    assert all("making_seconds" in info for info in by_name.values())


@pytest.mark.parametrize("key", ["bp", "at", "loss_ibp", "tbp"])
def test_a_step_by_hand_trains_as_ours(key: str) -> None:
    case = Case("mlp", 3, "fp32", own=suite.NetworkRow(network="mlp", options={"hidden": 8}).entry())
    found, expected = whole_steps.by_hand_step(case, key, "eager"), whole_steps.ours(case, key, "eager")
    assert whole_steps.off_twin(found, expected) < 1e-5


def test_tangents_are_an_axis(tmp_path: Path) -> None:
    plan = suite.load(written(tmp_path, tangents=[2, 5, 7], skip=["T=7 at"]))
    cases = plan.cases()
    assert [case.name.rpartition("-")[2] for case in cases] == ["T=2", "cpu", "T=7"]
    assert [len(case.data()[2]) for case in cases] == [2, 5, 7]
    assert cases[2].data()[2][5].equal(cases[1].data()[2][0])
    assert [plan.skips(case, "at") for case in cases] == [False, False, True]
    ratios = [candidates.predicted(case, ibp.TangentBP(0.1)) for case in cases]
    assert ratios[0] < ratios[1] < ratios[2]


def test_several_networks_in_one_call_beside_one_by_one(tmp_path: Path) -> None:
    given: dict[str, Any] = {"replicas": [1, 3], "step": ["together"], "baselines": ["one_by_one"], "targets": {}}
    path = written(tmp_path, methods=["loss_ibp", "tbp"], **given)
    assert bench(path).exit_code == 0
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())["benchmarks"]
    names = [f"{m} {w}" for m in ("loss_ibp", "tbp") for w in ("together", "one_by_one")]
    assert [row["name"] for row in found] == names * 2
    assert [row["extra_info"]["replicas"] for row in found] == [1] * 4 + [3] * 4
    ratios = found[6]["extra_info"]["ratios"]
    assert ratios.keys() == {"tbp together / one_by_one", "memory tbp together / one_by_one"}
    assert all(row["extra_info"]["parity"] < 1e-5 for row in found)
    assert "mlp R=1 | mlp R=3" in (tmp_path / "out" / "tiny.md").read_text()
    with pytest.raises(ConfigError, match=r"replicas, and the baseline one_by_one, are of step: \[together\]"):
        suite.load(path, ["step=[gradient]"])


def test_what_differs_in_one_call_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = replicated_gradients.ReplicatedGradients.one_by_one

    def of_another_seed(both: replicated_gradients.ReplicatedGradients) -> Any:
        return right(both)[::-1]

    monkeypatch.setattr(replicated_gradients.ReplicatedGradients, "one_by_one", of_another_seed)
    given: dict[str, Any] = {"replicas": [2], "step": ["together"], "baselines": ["one_by_one"], "targets": {}}
    result = bench(written(tmp_path, methods=["loss_ibp"], **given))
    assert "not timed: loss_ibp together in mlp" in result.output
    assert "off one by one by" in result.output
    assert not json.loads((tmp_path / "out" / "tiny.json").read_text())["benchmarks"]


def test_a_profile_adds_up_to_the_time_of_the_gradient(tmp_path: Path) -> None:
    path = written(tmp_path, networks=["mnist"], batch=[2], baselines=["eager_bp"], profile=True, targets={})
    assert bench(path).exit_code == 0
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())["benchmarks"]
    for row in found:
        spent = row["extra_info"]["spent_seconds"]
        assert list(spent) == [*pass_ledger.KINDS, "Python"]
        assert sum(spent.values()) == pytest.approx(row["stats"]["median"])
        assert spent["products"] > spent["norms"] == 0 < spent["pools"]
    lines = (tmp_path / "out" / "tiny.md").read_text().splitlines()
    (own,) = [line for line in lines if line.startswith("| bp |")]
    assert "| 1.00 | 1.00 | +0.00 | +0.00 |" in own
    assert {"eager_bp", "loss_ibp", "at"} <= {line.split(" | ")[0].removeprefix("| ") for line in lines}
    with pytest.raises(ConfigError, match=r"profile: true times operators on device: \[cpu\]"):
        suite.load(path, ["device=[cuda]"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("convolution_backward", "products"),
        ("addmm", "products"),
        ("_scaled_dot_product_flash_attention_for_cpu", "products"),
        ("native_batch_norm_backward", "norms"),
        ("_softmax_backward_data", "softmax"),
        ("max_pool2d_with_indices", "pools"),
        ("_to_copy", "copies"),
        ("cat", "copies"),
        ("mul", "elementwise"),
        ("sum", "elementwise"),
    ],
)
def test_kinds_of_operators(name: str, kind: str) -> None:
    assert pass_ledger.kind(name) == kind


def test_growth_is_fitted_along_the_axis_that_cells_differ_in() -> None:
    def entry(name: str, width: int, seconds: float) -> dict[str, Any]:
        info = {"batch": 32, "tangents": 5, "options": {"width": width}}
        return {"name": name, "extra_info": info, "stats": {"median": seconds}}

    entries = [entry(name, w, w**power) for w in (8, 2, 4) for name, power in (("bp", 2), ("tbp", 3))]
    axis, found = scaling.curves({"suite": {"name": "own"}, "benchmarks": entries})
    assert axis == "width"
    assert list(found["tbp"].items()) == [(2, 8000), (4, 64000), (8, 512000)]
    assert "| bp | 2.00 (2.00) |\n| tbp | 3.00 (3.00) |" in scaling.table({axis: found})
    with pytest.raises(SystemExit, match="own: cells must differ in one of batch, width"):
        scaling.curves({"suite": {"name": "own"}, "benchmarks": entries[:1]})


def test_labels_are_data_in_every_output(tmp_path: Path) -> None:
    rows = {
        "networks": {"a|[/x]": {"network": "mlp", "options": {"hidden": 8}}},
        "methods": {"[bold]": {"method": "bp"}},
    }
    path = written(tmp_path, **rows, targets={})
    result = bench(path)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "tiny.md").read_text()
    assert "a\\|\\[/x\\]" in text
    assert "\\[bold\\] / eager" in text
    shown = CliRunner().invoke(app, ["bench-report", str(tmp_path / "out" / "tiny.json")], env={"COLUMNS": "160"})
    assert "[bold]" in shown.output
    assert "a|[/x]" in shown.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"round": 3}, "round: unknown key; did you mean rounds?"),
        ({"networks": ["mlq"]}, "networks.mlq: 'mlq' is no network of the table; choose one of mnist"),
        ({"networks": {"x": {"network": "mlp", "import": "a:b"}}}, "networks.x: give either network"),
        ({"networks": {"mlp": {"option": {}}}}, "networks.mlp.option: unknown key; did you mean options?"),
        ({"methods": ["bq"]}, "methods: bq: no method of the table"),
        ({"methods": {"loss_ibp": {"betta": 1.0}}}, "did you mean beta?"),
        ({"methods": {"loss_ibp": {"beta": [1.0, 2.0]}}}, "a list on beta; give one row for each value"),
        ({"precision": ["fp16"]}, "precision.0: Input should be 'fp32' or 'bf16'"),
        ({"batch": [4, 4]}, "batch: 4 is given twice"),
        ({"device": ["gpu"]}, "device: 'gpu' names no device of torch"),
        ({"step": ["jit"]}, "step.0: Input should be 'gradient', 'together', 'eager', 'compiled' or 'captured'"),
        ({"targets": {"bp / eager_bp": -1}}, "targets.bp / eager_bp"),
    ],
)
def test_a_fault_names_file_key_and_cure(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        suite.load(written(tmp_path, **changes))
    assert str(caught.value).startswith(str(tmp_path / "tiny.yaml"))
    assert message in str(caught.value)


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    row = {"import": "ibp_triton.harness.models:paper_mnist", "input_shape": [1, 16, 16], "options": {"widths": [4, 4]}}
    plan = suite.load(written(tmp_path, networks={"mine": row}))
    (case,) = plan.cases()
    assert parity.check(case, ibp.LossIBP(0.1)).ours is None
    assert case.shape == [4, 1, 16, 16]


def test_a_dry_run_lists_cells_for_programs(tmp_path: Path) -> None:
    path = written(tmp_path, skip=["5 at"], batch=[4, 5])
    shown = bench(path, "--dry-run", "--json", "-", "--quiet")
    cells_of = {CELL: ["bp", "loss_ibp", "at"], CELL.replace("-4-", "-5-"): ["bp", "loss_ibp"]}
    assert json.loads(shown.output) == cells_of
    assert bench(path, "--dry-run", "--json", str(tmp_path / "cells.json")).output == ""
    assert json.loads((tmp_path / "cells.json").read_text(encoding="utf-8")) == cells_of


def test_names_of_suites_and_cells(tmp_path: Path) -> None:
    assert shipped.listing()["benchmarks"].keys() == {path.stem for path in SHIPPED}
    shown = CliRunner().invoke(app, ["bench", "modern", "--dry-run", "--only", "vit_96"])
    assert shown.output.startswith("vit_96-16-fp32")
    wrong = CliRunner().invoke(app, ["bench", "moderm"])
    assert "modern_full, ratios, replicas" in str(wrong.exception)
    none = bench(written(tmp_path), "--only", "bf16")
    assert "no cell has all these words; there are: 4, P=1, R=1, T=5, channels_last" in str(none.exception)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_suites_can_be_read_and_their_targets_can_be_met(path: Path) -> None:
    plan = suite.load(path)
    assert plan.name == path.stem
    labels = {*plan.methods, *(f"{label} {kind} step" for label in plan.methods for kind in whole_steps.STEPS)}
    for name, bounds in plan.targets.items():
        assert name.removeprefix("memory ").split(" / ")[0] in labels
        if isinstance(bounds, dict):
            assert any(plan.bound(suite.case_words(case), name) for case in plan.cases())


@pytest.mark.parametrize("key", [*METHODS, *MORE])
def test_baselines_by_hand_are_the_methods(key: str) -> None:
    """On a network where both semantics can be had by hand."""
    case = Case("mlp", 3, "fp32")
    verdict = parity.check(case, {**METHODS, **MORE}[key])
    assert verdict.ours is None
    assert verdict.by_hand is None
    assert by_hand.applies(case, {**METHODS, **MORE}[key]) == (key not in ("pgd_training", "trades"))


@pytest.mark.parametrize("norm", [1.5, 2])
def test_baselines_by_hand_take_any_norm(norm: float) -> None:
    case = Case("mlp", 3, "fp32")
    for kind in (ibp.LossIBP, ibp.FastTangentBP, ibp.PredictionIBP, ibp.TangentBP):
        assert parity.parity(case, kind(0.1, norm)) < 1e-4


# Width 4 would make strided 1×1 convolutions of four channels, whose weight gradient (float32, channels last) ends
# the process on AVX2: a fault of torch's, in eager code too.
SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {"width": 8}, "wide_resnet": {"depth": 10, "widen": 1}, "vgg_bn": {"width": 4},
    "mobilenet_v2": {"width": 0.25}, "densenet_bc": {"depth": 10, "growth": 4},
    "convnext": {"widths": [8, 8], "depths": [1, 1]}, "vit": {"dim": 12, "depth": 1, "patch": 8},
    "mixer": {"dim": 16, "depth": 1, "patch": 8}, "text_transformer": {"depth": 1}, "mlp": {},
    "stack": {"width": 4, "depth": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_modern_networks_train_alike_here_and_by_hand(name: str) -> None:
    case = Case(name, 3, "fp32", own=suite.NetworkRow(network=name, options=SMALL[name]).entry())
    for method in (ibp.BP(), ibp.LossIBP(0.1), ibp.LossIBP(0.1, semantics="exact")):
        assert parity.check(case, method).ours is None
    assert candidates.predicted(case, ibp.LossIBP(0.1)) > 1
    assert set(NETWORKS) - set(SMALL) == {"mnist", "cifar10"}


@pytest.mark.parametrize("data", [[2.0, 1.0], [3.0, 1.0, 2.0, 2.5, 9.0], [1.0, 4.0, 2.0], [5.0, 1.0, 3.0, 2.0]])
def test_stats_are_those_of_pytest_benchmark(data: list[float]) -> None:
    from pytest_benchmark.stats import Stats

    theirs = Stats()
    for seconds in data:
        theirs.update(seconds)
    own = bench_json.stats(data)
    assert own.keys() - {"data", "iterations"} == set(theirs.fields)
    for name in ("min", "max", "mean", "stddev", "rounds", "median", "q1", "q3", "iqr", "outliers", "ops"):
        expected = getattr(theirs, name)
        assert own[name] == (expected if isinstance(expected, str) else pytest.approx(expected)), name


def test_targets_ask_for_words_of_a_cell() -> None:
    plan = suite.validate({**TINY, "targets": {"a / b": {"convnet fp32": 1.5, "fp32": 1.7}}}, "here")
    assert plan.bound({"convnet", "fp32"}, "a / b") == 1.5
    assert plan.bound({"mlp", "fp32"}, "a / b") == 1.7
    assert plan.bound({"mlp", "bf16"}, "a / b") is None
    assert bench_table.figure({"ratio_of_medians": 2.0}) == 2.0
