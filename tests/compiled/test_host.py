"""Launches with a driver that launches nothing: what a compiled kernel is given, and what the host does until then."""

import sys
from contextlib import contextmanager

import pytest
import torch

import ibp_triton as ibp
from ibp_triton.harness import host_costs
from ibp_triton.kernels import (
    columns,
    combine,
    contract,
    conv,
    gates,
    launcher,
    loss,
    norm_seeds,
    norms,
    plans,
    pool,
    pooled_conv,
    tiles,
    wgrad,
)
from ibp_triton.kernels.conv import conv2d
from ibp_triton.kernels.gemm import linear
from ibp_triton.kernels.geometry import Geometry
from ibp_triton.kernels.launcher import Launch, recording, relaunch
from ibp_triton.kernels.workbench import cases, host
from ibp_triton.kernels.workbench.cases import allowing_tf32
from tests.compiled.test_step_kernels import KINDS, METHODS, network


@pytest.fixture
def launched():
    """What Triton's launcher would be called with, launch by launch."""
    seen = []
    with host.empty_driver("sm_90", lambda *given: seen.append(given)), tiles.on_chip("sm_90"), allowing_tf32(False):
        yield seen


def step(name, method, kind="float32", batch=32):
    """One of the paper's steps, its gradients rubbish."""
    (model, shape), (dtype, tf32) = network(name), KINDS[kind]
    x = torch.zeros(batch, *shape).contiguous(memory_format=torch.channels_last)
    tau = torch.zeros(5, batch, shape[1], shape[2], shape[0]).movedim(-1, 2) if method.needs_tangents else None
    wrapped = ibp.Network(model, backend="triton", dtype=dtype)
    with allowing_tf32(tf32):
        method.gradients(wrapped, x, torch.zeros(batch, dtype=torch.int64), tau)


def alike(one, other):
    """Whether two arguments of a launcher are one object, or equal values that are no tensors."""
    if hasattr(one, "get") and not isinstance(one, dict):  # what a profiler is told
        one, other = one.get(), other.get()
    return one is other or (not isinstance(one, torch.Tensor) and type(one) is type(other) and one == other)


@contextmanager
def twice(launched, monkeypatch):
    """Launch all of a block a second time, by Triton's own path; the number of launches that were alike."""
    straight, found = launcher.launch, []

    def both(plan, *changing):
        if 0 in plan.grid:
            return
        launched.clear()
        straight(plan, *changing)
        relaunch(Launch(plan.kernel, plan.grid, plan.arguments(changing), plan.config, plan.cost))
        (ours, tritons), names = launched, [plan.kernel.__name__, *plan.kernel.arg_names]
        assert len(ours) == len(tritons) == 9 + len(plan.kernel.arg_names)
        wrong = [i for i, pair in enumerate(zip(ours, tritons, strict=True)) if not alike(*pair)]
        assert not wrong, (names, wrong)
        found.append(plan.kernel.__name__)

    def anew(plan, *_):
        raise AssertionError(f"{plan.kernel.__name__} was compiled in the first step")

    with monkeypatch.context() as patch:
        for module in (combine, contract, conv, gates, columns, loss, norm_seeds, norms, pool, pooled_conv, wgrad):
            patch.setattr(module, "launch", both)
        patch.setattr(launcher, "_launch_anew", anew)
        yield found


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_compiled_kernels_get_what_triton_gives_them(name, method, launched, monkeypatch):
    """Count, order and values of all arguments, the compiled function among them, in every launch of a step."""
    step(name, method)
    assert not launched or len(launched) > 20
    with twice(launched, monkeypatch) as found:
        step(name, method)
    assert len(found) > 20


@pytest.mark.parametrize("kind", ["tf32", "bfloat16"])
def test_in_other_precisions_too(kind, launched, monkeypatch):
    step("mnist", METHODS[0], kind)
    with twice(launched, monkeypatch) as found:
        step("mnist", METHODS[0], kind)
    assert len(found) > 20


def test_every_kernel(launched, monkeypatch):
    """The case list, which has those that no paper's step launches."""
    make = cases.zeros(torch.float32)

    def everything():
        for some in (cases.matrix_cases, cases.merged_cases, cases.other_cases, cases.norm_cases):
            some(make)

    everything()
    with twice(launched, monkeypatch) as found:
        everything()
    assert set(found) == {
        "contract", "combine", "combine_several", "fold", "wgrad", "max_pool", "pool_gather", "pool_scatter", "gate",
        "cross_entropy_head", "softmax_hessian", "weighted_sum", "seed", "tangent_seed", "pooled_conv",
        "normalise", "project", "bend", "column_sums", "column_sweep",
    }  # fmt: skip


def test_an_address_off_16_bytes_takes_another_kernel(launched):
    aligned, w = torch.zeros(1, 33, 48), torch.zeros(16, 48)
    off = torch.zeros(33 * 48 + 1)[1:].view(1, 33, 48)
    for x in (aligned, off, aligned, off):
        with recording(execute=False) as asked:
            linear(x, w)
        linear(x, w)
        relaunch(asked[0])
    functions = [given[4] for given in launched]
    assert functions == [functions[0]] * 2 + [functions[2]] * 2 + [functions[0]] * 2 + [functions[2]] * 2
    assert functions[0] != functions[2]
    assert [given[9].data_ptr() % 16 for given in launched[::2]] == [0, 4, 0, 4]


def test_a_plan_of_another_device_is_launched_there(launched, monkeypatch):
    x, w = torch.zeros(1, 33, 48), torch.zeros(16, 48)
    linear(x, w)
    entered = []

    @contextmanager
    def device(index):
        entered.append(index)
        yield

    (kept,) = plans._kept.values()
    kept.plan.first.device = 1
    monkeypatch.setattr(torch.cuda, "device", device)
    for current in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        linear(x, w)
    assert entered == [1]
    assert len(launched) == 3


def test_profilers_are_told_of_each_launch(launched):
    """By Triton's hooks, with the launch's metadata."""
    x, w, told = torch.zeros(1, 33, 48), torch.zeros(16, 48), []
    linear(x, w)
    linear(x, w)
    for given in launched:
        given[7](given[6])
        told.append(given[6].get()["name"])
    assert told == ["contract"] * 2


def test_the_door_is_shut_again():
    x, w = torch.zeros(1, 33, 48), torch.zeros(16, 48)
    with host.empty_driver("sm_90"):
        linear(x, w)
        linear(x, w)
    with pytest.raises(RuntimeError, match="need a CUDA device"):
        linear(x, w)


def test_the_figures_of_a_step():
    (row,) = host_costs.measured(("mnist",), steps=3)
    assert (row.network, row.method, row.launches) == ("mnist", "loss_ibp", 24)
    assert 0 < row.fastest_us <= row.launch_us < row.step_us_a_launch
    assert host_costs.cells(row)[4] == "24"


def test_a_launch_takes_few_calls(launched):
    """Calls of Python and of C from a kernel's function to its launch, 41: times would be noise."""
    geometry = Geometry.conv((13, 13), (5, 5), (1, 1), (2, 2), (1, 1))
    make = cases.zeros(torch.float32)
    image, kernel, bias = make(1, 32, 32, 13, 13), make(64, 32, 5, 5), make(64)
    conv2d(image, kernel, geometry, bias, relu=True)
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event in ("call", "c_call") else None)
    try:
        conv2d(image, kernel, geometry, bias, relu=True)
    finally:
        sys.setprofile(None)
    assert len(launched) == 2
    assert len(calls) <= 45, calls
