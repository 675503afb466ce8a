"""Whole steps: every method beside BP and beside the same gradient by autograd; parity first."""

import pytest

import ibp_triton as ibp
from benchmarks import baselines, cases, timing
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
