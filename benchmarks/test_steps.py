"""Whole steps: every method beside BP and beside the same gradient by autograd; parity first."""

import pytest
import torch

import ibp_triton as ibp
from ibp_triton.bench import by_hand, candidates, measure, parity
from ibp_triton.bench.candidates import METHODS, PRECISIONS, Case

CELLS = [f"{network}-32-{precision}" for network in ("mnist", "cifar10") for precision in PRECISIONS]
CELLS += [f"mnist-256-{precision}" for precision in PRECISIONS]


def placed(cell, device):
    network, batch, precision = cell.split("-")
    return Case(network, int(batch), precision, device=device, backend="auto" if device == "cuda" else "torch")


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("cell", CELLS)
def test_step(measured, benchmark, device, cell, key):
    case = placed(cell, device)
    benchmark.group = f"step {cell} {device}"
    off = parity.parity(case, key)
    assert off < parity.PARITY[case.precision]
    run, bp = candidates.ours(case, key), candidates.ours(case, "bp")
    info = {"method": key, "parity": off, "predicted_ratio": candidates.predicted(case, METHODS[key])}
    if benchmark.enabled:
        info["error_against_float64"] = parity.apart(run()[1], parity.truth(case, key))
        info["peak_memory"] = measure.peak_memory(run)
    if benchmark.enabled and device == "cpu":
        times = measure.interleave({"this": run, "bp": bp}, rounds=7)
        info["interleaved_ratio_to_bp"] = measure.ratio(times["this"], times["bp"])
    loss, _ = measured(run, **case.info(), **info)
    assert loss.isfinite()


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("cell", CELLS)
def test_step_by_autograd(measured, benchmark, device, cell, key):
    case = placed(cell, device)
    benchmark.group = f"step {cell} {device}"
    run = by_hand.autograd(case, key)
    info = {"peak_memory": measure.peak_memory(run)} if benchmark.enabled else {}
    loss, _ = measured(run, **case.info(), method=key, baseline=key == "bp", **info)
    assert loss.isfinite()


@pytest.mark.parametrize("key", ["bp", "loss_ibp"])
def test_captured_step(measured, benchmark, device, key):
    """Method and optimizer as one call: a replayed CUDA graph on CUDA, an eager step on the CPU."""
    case = Case("mnist", 32, "fp32", device=device)
    benchmark.group = f"step and optimizer mnist-32-fp32 {device}"
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
