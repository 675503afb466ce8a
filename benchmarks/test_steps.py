"""Whole steps: every method beside BP and beside the same gradient by autograd; parity first."""

import pytest
import torch

import ibp_triton as ibp
from benchmarks import baselines, cases, ledger, timing
from benchmarks.cases import METHODS, PRECISIONS, Case

CELLS = [Case(network, batch, precision) for network in cases.NETWORKS for batch in (32,) for precision in PRECISIONS]
CELLS += [Case("mnist", 256, precision) for precision in PRECISIONS]


def name(case):
    return f"{case.network}-{case.batch}-{case.precision}"


def placed(case, device):
    return Case(case.network, case.batch, case.precision, case.channels_last, device)


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("case", CELLS, ids=name)
def test_step(measured, benchmark, device, case, key):
    case = placed(case, device)
    benchmark.group = f"step {name(case)} {device}"
    backend = "auto" if device == "cuda" else "torch"
    off = baselines.parity(case, key, backend)
    assert off < baselines.PARITY[case.precision]
    run, bp = cases.ours(case, key, backend=backend), cases.ours(case, "bp", backend=backend)
    info = {"method": key, "parity": off, "predicted_ratio": predicted(case, key)}
    if benchmark.enabled:
        exact = baselines.truth(case, key)
        info["error_against_float64"] = baselines.largest(baselines.minus(run()[1], exact)) / baselines.largest(exact)
        info["peak_memory"] = timing.peak_memory(run)
    if benchmark.enabled and device == "cpu":
        times = timing.interleave({"this": run, "bp": bp}, rounds=7)
        info["interleaved_ratio_to_bp"] = timing.ratio(times["this"], times["bp"])
    loss, _ = measured(run, **case.info(), **info)
    assert loss.isfinite()


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("case", CELLS, ids=name)
def test_step_by_autograd(measured, benchmark, device, case, key):
    case = placed(case, device)
    benchmark.group = f"step {name(case)} {device}"
    run = baselines.autograd(case, key)
    info = {"peak_memory": timing.peak_memory(run)} if benchmark.enabled else {}
    loss, _ = measured(run, **case.info(), method=key, baseline=key == "bp", **info)
    assert loss.isfinite()


def predicted(case, key):
    return METHODS[key].predicted_ratio(ibp.Network(case.model()), case.shape, cases.TANGENTS)


@pytest.mark.parametrize("key", ["bp", "loss_ibp"])
def test_captured_step(measured, benchmark, device, key):
    """Method and optimizer as one call: a replayed CUDA graph on CUDA, an eager step on the CPU."""
    case = Case("mnist", 32, "fp32", device=device)
    benchmark.group = f"step and optimizer {name(case)} {device}"
    (x, labels, _), models = case.data(), [case.model(), case.model()]
    networks = [ibp.Network(model) for model in models]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in models]
    step = ibp.CapturedStep(networks[0], METHODS[key], optimizers[0])
    for _ in range(5):  # on CUDA: three eager ones, the capture, a replay
        step(x, labels)
        optimizers[1].zero_grad()
        METHODS[key](networks[1], x, labels).backward()
        optimizers[1].step()
    for found, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert measured(lambda: step(x, labels).loss, **case.info(), method=key, captures=step.captures).isfinite()


def test_the_ledger_adds_up():
    found = ledger.measure(Case("mnist", 2, "fp32"), rounds=1)
    for row in found.values():
        assert sum(row[kind] for kind in (*ledger.KINDS, "Python")) == pytest.approx(row["step"])
        assert row["products"] > row["image vjp"] >= 0
    assert found["bp"]["image vjp"] == 0 < found["loss_ibp"]["image vjp"]
    assert "| 1.00 | 1.00 | +0.00 |" in ledger.table(Case("mnist", 2, "fp32"), found)
