"""The figures of the kernel report: what the issue of launches and bytes asks for, and that they are counts."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import ibp_triton as ibp
from ibp_triton.harness import eager, host_costs, kernel_report, predictions, step_counts
from ibp_triton.harness.cli import app
from ibp_triton.kernels.launcher import recording
from ibp_triton.kernels.workbench import aot, cases


def test_loss_ibp_on_mnist():
    step = step_counts.count("mnist", ibp.LossIBP(0.1), 32)
    assert step.launches == 24
    assert step.fraction_of_operators <= 1 / 3
    assert step.fraction_of_bytes <= 0.4
    assert step.flops < step.eager_flops
    assert step.unique_bytes <= step.bytes


@pytest.mark.parametrize("method", step_counts.all_methods(), ids=repr)
def test_every_method_is_counted(method):
    step = step_counts.count("mnist", method, 2)
    assert 0 < step.fraction_of_operators < 1
    assert step.eager_flops > 0


def test_five_tangents_share_masks_offsets_and_weights():
    """TBP at batch 32: loads of the linear sweep and the reverse sweep of tangents, by pointer."""
    sums = {}
    for tangents in (1, 5):
        launches, others = step_counts.recorded("mnist", ibp.TangentBP(0.1), 32, tangents)
        assert others.count == 0
        extra = [
            r for r in launches if "tangents" in r.arguments and r.name in ("contract", "pool_gather", "pool_scatter")
        ]
        sums[tangents] = {name: sum(r.cost.pointers.get(name, 0) for r in extra) for name in ("w", "mask", "code", "x")}
    assert sums[1]["code"] == sums[5]["code"] > 0
    assert sums[1]["mask"] == sums[5]["mask"] > 0
    assert sums[5]["w"] <= 2 * sums[1]["w"]
    assert sums[5]["x"] > 2 * sums[1]["x"]


def test_a_step_adds_up():
    """BP on one linear layer: forward, head, weight gradient and the value, each with the bytes of its tensors."""
    model = nn.Sequential(nn.Linear(8, 4))
    network = ibp.Network(model, backend="triton")
    with recording(execute=False):
        network.forward(torch.zeros(16, 8), {})
    with recording(execute=False) as launches:
        ibp.BP().gradients(network, torch.zeros(16, 8), torch.zeros(16, dtype=torch.int64))
    x, w, b, z, rows = 16 * 8 * 4, 4 * 8 * 4, 4 * 4, 16 * 4 * 4, 16 * 4
    expected = {
        "contract": x + w + b + z,
        "cross_entropy_head": z + 16 * 8 + rows + z + rows,
        "weighted_sum": rows + 4,
        "wgrad": x + z + w + b,
    }
    assert {r.name: r.unique_bytes for r in launches} == expected
    assert {r.name: r.cost.flops for r in launches if r.cost.flops} == {"contract": 2 * 16 * 32, "wgrad": 2 * 16 * 32}


def test_what_a_launch_does_not_read_and_what_lies_in_another_counts_once():
    """Sums in parts are one workspace under two names; attention in one tile never reads its output."""
    x = torch.zeros(512, 96)
    with recording(execute=False) as launches:
        _, statistics = cases.group_norm(x, 1)
        cases.group_norm_vjp(torch.zeros(1, 512, 96), x, statistics, 1, sums=True)
        cases.attention_cases(cases.zeros(torch.float32))
    sums, short = launches[1], next(one for one in launches if one.name == "push")
    for launch in (sums, short):
        assert launch.cost.loaded + launch.cost.stored == launch.unique_bytes


@pytest.mark.parametrize("method", [m for m in step_counts.all_methods() if m.key != "bp"], ids=repr)
def test_the_eager_baseline_computes_the_same_gradient(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 5)).double()
    x, labels = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 3])
    tau = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64) if method.needs_tangents else None
    found = eager.gradients(copy.deepcopy(model), method, x, labels, tau)
    _, expected = ibp.reference.gradients(model, method, x, labels, tau)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def only(monkeypatch, kept):
    """The report has one group of cases alone."""
    for name in [name for name in vars(cases) if name.endswith("_cases") and name != kept]:
        monkeypatch.setattr(cases, name, lambda make: None)


def test_the_command(monkeypatch, tmp_path):
    """One small table from end to end; the full one is compiled in test_table."""
    only(monkeypatch, "other_cases")
    monkeypatch.setattr(kernel_report, "DTYPES", ("float32",))
    monkeypatch.setattr(kernel_report, "steps", lambda: [step_counts.count("mnist", ibp.BP(), 32)])
    forecast = [predictions.Prediction("H100", "mnist", "loss_ibp", 32, "float32", 231.0, 358.0)]
    cost = host_costs.HostCost("mnist", "loss_ibp", 32, "float32", 27, 12.34, 11.1, 1234.5)
    monkeypatch.setattr(kernel_report, "measured", lambda: [cost])
    monkeypatch.setattr(kernel_report, "predicted", lambda cards: forecast if cards == ["H100"] else [])
    files = {name: tmp_path / f"out.{name}" for name in ("json", "md", "svg")}
    result = CliRunner().invoke(
        app,
        [
            *("kernels", "--target", "sm_90", "--json", str(files["json"])),
            *("--markdown", str(files["md"]), "--figure", str(files["svg"]), "--card", "H100", "--host"),
        ],
    )
    assert result.exit_code == 0, result.output
    content = json.loads(files["json"].read_text())
    assert content["steps"][0]["method"] == "bp"
    assert all(isinstance(row["spills"], int) and row["spills"] == 0 for row in content["kernels"])
    assert {row["kernel"] for row in content["kernels"]} >= {"max_pool", "pool_gather", "pool_scatter", "seed", "gate"}
    assert "max_pool" in result.output
    assert "230–360" in result.output
    assert content["predictions"][0]["low"] == 231.0
    assert "| mnist | loss_ibp | float32 | 32 | 230–360 |" in files["md"].read_text()
    assert content["host"][0]["launch_us"] == 12.34
    assert "| mnist | 32 | loss_ibp | float32 | 27 | 12.3 | 11.1 | 1,234 | 45.7 |" in files["md"].read_text()
    assert files["md"].read_text().count("\n|") > 10
    assert files["svg"].stat().st_size > 1000


def kernels(*arguments):
    return CliRunner().invoke(app, ["kernels", *arguments])


def test_rows_are_filtered_and_sorted(monkeypatch):
    only(monkeypatch, "other_cases")
    methods = [ibp.BP(), ibp.FastAdversarialTraining(0.1)]
    counted = [step_counts.count("mnist", method, 32) for method in methods]
    monkeypatch.setattr(kernel_report, "steps", lambda: counted)
    result = kernels("--only", "pool_", "--only", "float32", "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert {row["kernel"] for row in found["kernels"]} == {"pool_gather", "pool_scatter"}
    assert {row["dtype"] for row in found["kernels"]} == {"float32"}
    assert found["steps"] == []
    table = kernels("--only", "MNIST", "--sort", "launches").output
    assert "Kernels, compiled" not in table
    lines = [line.split("│") for line in table.splitlines() if "mnist" in line]
    assert [line[3].strip() for line in lines] == ["fast_at", "bp"]
    table = kernels("--only", "pool_gather", "--sort", "loaded kB").output
    sizes = [float(line.split("│")[11].replace(",", "")) for line in table.splitlines() if "│ pool_gather" in line]
    assert len(sizes) > 1
    assert sizes == sorted(sizes, reverse=True)


def test_activations_and_attention_have_rows(monkeypatch):
    """Each of their kernels, in words that tell them apart; what attention moves on an H100 is what it must."""
    monkeypatch.setattr(kernel_report, "steps", list)
    result = kernels("--only", "64 tokens, heads of 64", "--only", "bfloat16", "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)["kernels"]
    assert {row["kernel"] for row in found} == {"attend", "push", "pull"}
    assert all((row["spills"], row["loaded"] + row["stored"]) == (0, row["unique_bytes"]) for row in found)
    result = kernels("--only", "784→512", "--only", "float32", "--json", "-")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)["kernels"]
    words = {"784→512, GELU", "784→512, GELU TANH", "784→512, SILU", "784→512, slope", "784→512, sign, slope"}
    assert {row["case"].split(", 7 splits")[0] for row in rows} >= words
    assert all(row["spills"] == 0 for row in rows)


def test_the_page_has_todays_kernels_and_steps():
    """By their words: what the compiler makes of them depends on its version."""
    page = (Path(__file__).parents[2] / "docs" / "kernel_report.md").read_text(encoding="utf-8")
    step = step_counts.count("mnist", ibp.LossIBP(0.1), 32)
    assert f"| {' | '.join(kernel_report.step_cells(step))} |" in page
    for family in aot.CHIPS:
        found = [(one.name, kernel_report.case(one.arguments), dtype) for dtype, one in kernel_report.distinct(family)]
        lines = [line[2:].split(" | ") for line in page.splitlines() if f" | {family} | " in line]
        assert [tuple(line[:3]) for line in lines] == found


def test_a_filter_without_rows_and_an_unknown_column_are_refused(monkeypatch):
    monkeypatch.setattr(kernel_report, "steps", list)
    result = kernels("--only", "nothing")
    assert result.exit_code != 0
    assert "no kernel and no step has nothing" in result.output
    result = kernels("--card", "H1")
    assert "unknown card H1" in result.output
    result = kernels("--sort", "size")
    assert result.exit_code != 0
    assert "is no column; choose from kernel" in result.output


def test_an_unknown_target_is_refused():
    result = CliRunner().invoke(app, ["kernels", "--target", "sm_12"])
    assert result.exit_code != 0
    assert "unknown target" in result.output
