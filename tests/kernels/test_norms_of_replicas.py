"""Norms with an axis of replicas: bit for bit what a loop over them gives, in the launches of one."""

from functools import partial

import pytest
import torch

import ibp_triton as ibp
from ibp_triton.kernels.columns import batch_norm_cross, batch_norm_project
from ibp_triton.kernels.launcher import recording
from ibp_triton.kernels.norms import (
    group_norm,
    group_norm_cross,
    group_norm_curvature,
    group_norm_jvp,
    group_norm_vjp,
    whole,
)
from ibp_triton.kernels.workbench.cases import replicated_norm_cases, zeros
from ibp_triton.ops import norm_operators as ops
from ibp_triton.vmapped import Inputs, Vmapped
from tests.kernels.support import DTYPES, assert_close, last, randn
from tests.kernels.test_columns import network
from tests.kernels.test_methods import TOLERANCE, errors
from tests.kernels.test_norm_rules import NETWORKS, setting
from tests.kernels.test_norms import required

# [N, C, ...], groups, channels last; sums in parts, and rows over a tile
SHAPES = [((70, 9), 1, False), ((3, 6, 5, 7), 2, True), ((3, 6, 5, 7), 3, False), ((1, 6, 53, 61), 2, True)]
SHARED = {"none": (), "x": ("x",), "parameters": ("weight",), "sides": ("v", "right"), "all but sides": ("x", "weight")}


# replicas, tangents, dtype, what they share
CASES = [
    (1, 1, DTYPES[0], "none"),
    (3, 2, DTYPES[0], "none"),
    (2, 2, DTYPES[2], "x"),
    (2, 1, DTYPES[1], "parameters"),
    (3, 1, DTYPES[0], "sides"),
    (2, 2, DTYPES[0], "all but sides"),
]


def sides(shape, channels_last, shared, replicas, tangents, dtype):
    """x, γ and what is swept, [R, ...] each, of stride 0 where it is shared."""

    def some(name, *size):
        one = randn(*(() if name in shared else (replicas,)), *size)
        one = (last(one) if channels_last and len(size) > 2 else one).to(dtype)
        return one.expand(replicas, *size) if name in shared else one

    v, right = (some(name, tangents, *shape) for name in ("v", "right"))
    return some("x", *shape), some("weight", shape[1]), v, right


def alike(function, replicas, **tensors):
    """One call on [R, ...] gives what a loop over it does, by the same kernels; what it gives."""
    with recording() as together:
        found = function(**tensors, replicated=True)
    for r in range(replicas):
        with recording() as one:
            expected = function(**{name: None if t is None else t[r] for name, t in tensors.items()})
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        for some, alone in pairs:
            assert some is alone is None or torch.equal(some[r], alone)
            assert some is None or some[r].stride() == alone.stride()
    assert [launch.name for launch in together] == [launch.name for launch in one]
    return found


@pytest.mark.parametrize(("replicas", "tangents", "dtype", "sharing"), CASES)
@pytest.mark.parametrize(("shape", "groups", "channels_last"), SHAPES)
def test_sweeps_are_a_loop(shape, groups, channels_last, replicas, tangents, dtype, sharing):
    x, weight, v, right = sides(shape, channels_last, SHARED[sharing], replicas, tangents, dtype)
    for centred in (True, False):
        forward = partial(group_norm, groups=groups, centred=centred)
        _, statistics = alike(forward, replicas, x=x, weight=weight, bias=weight)
        given = {"x": x, "statistics": statistics}
        if sharing == "x" and replicas > 1:  # as where what is swept alone differs
            given["statistics"] = statistics[:1].expand_as(statistics)
        alike(partial(group_norm_vjp, groups=groups, sums=True), replicas, d=v, weight=weight, **given)
        alike(partial(group_norm_vjp, groups=groups), replicas, d=v, **given)
        alike(partial(group_norm_jvp, groups=groups), replicas, t=v, weight=weight, right=right, **given)
        alike(partial(group_norm_cross, groups=groups), replicas, t=v, right=right, **given)
        if whole(x[0], groups):
            alike(partial(group_norm_curvature, groups=groups), replicas, d=v, t=right, weight=weight, **given)


@pytest.mark.parametrize(("replicas", "tangents", "dtype", "sharing"), CASES)
@pytest.mark.parametrize(("shape", "channels_last"), [((70, 9), False), ((5, 70, 3, 5), True), ((7, 6, 5, 7), False)])
def test_columns_are_a_loop(shape, channels_last, replicas, tangents, dtype, sharing):
    x, weight, v, right = sides(shape, channels_last, SHARED[sharing], replicas, tangents, dtype)
    statistics = {"mean": torch.rand(replicas, shape[1]), "rstd": torch.rand(1, shape[1]).expand(replicas, -1) + 1}
    _, sums = alike(batch_norm_project, replicas, v=v, x=x, weight=weight, **statistics)
    alike(batch_norm_project, replicas, v=v, x=x, **statistics)
    alike(batch_norm_cross, replicas, v=v, right=right, sums=sums, x=x, **statistics)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_replicas_that_lie_apart_in_memory(axis):
    """Their axis anywhere: what kernels want side by side is copied; a shared side stays one."""
    x, weight, v = randn(2, 5, 9), randn(2, 9), randn(1, 5, 9)
    apart, own = x.movedim(0, axis).contiguous(), weight.T.contiguous()

    def every(x, weight):
        y, statistics = ops.group_norm(x, 1, weight)
        return y, *ops.group_norm_vjp(v, x, statistics, 1, weight, True)

    with torch.no_grad(), recording() as launches:
        found = torch.func.vmap(every, (axis, 1))(apart, own)
    assert [launch.name for launch in launches] == ["normalise", "project"]
    assert launches[1].arguments["v"].stride(0) == 0
    for r in range(2):
        for some, alone in zip(found, every(x[r], weight[r]), strict=True):
            assert_close(some[r], alone, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_within_a_third_of_what_is_needed(dtype, monkeypatch):
    """Where x is read once; no launch is run, their costs are the interpreter's counts."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with recording(execute=False) as launches:
        replicated_norm_cases(zeros(dtype))
    moved, needed = {}, {}
    for index, launch in enumerate(launches):
        key = index - (launch.name == "combine")  # a launch and its second stage
        moved[key] = moved.get(key, 0) + launch.cost.loaded + launch.cost.stored
        if launch.name.startswith("column"):
            moved.pop(key)  # by themselves, without the parts of sums
            assert launch.cost.loaded + launch.cost.stored <= 1.3 * launch.unique_bytes
        elif launch.name != "combine":
            needed[key] = required(launch)
    held = {key: moved[key] / bytes_ for key, bytes_ in needed.items() if not long(launches[key])}
    assert len(held) > 20
    assert max(held.values()) <= 1.3


def long(launch):
    """Whether rows are over a tile, and read twice."""
    return launch.arguments["BLOCK_P"] < launch.arguments["VIEW"][2]


METHODS = (ibp.LossIBP(0.3), ibp.TangentBP(0.3), ibp.LossIBP(0.3, semantics="exact"))
PAIRS = [(name, method) for name in ("layer norm", "batch norm") for method in METHODS]
PAIRS += [("RMS norm", METHODS[0]), ("group norm", METHODS[1]), ("instance norm", METHODS[0])]
BUILDS = {name: partial(setting, NETWORKS[name]) for name in ("layer norm", "RMS norm", "group norm", "instance norm")}


def batch_norms():
    """Of a model in train mode."""
    model = network().train()
    return model, torch.randn(6, 2, 7, 7), torch.arange(6), torch.randn(2, 6, 2, 7, 7)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_networks_of_replicas_are_what_each_is_alone(name, method):
    """Gradients up to float32's rounding, since products are split for all; as many launches as of one."""
    build = BUILDS.get(name, batch_norms)
    model, x, labels, tau = build()
    twin, *_ = build()
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    tau, counts = tau[:2] if method.needs_tangents else None, []
    for models in ([model], [model, twin]):
        replicas = ibp.ReplicatedNetwork(models, seeds=range(len(models)), backend="triton")
        with recording() as launches:
            found = Vmapped(replicas)([method] * len(models), Inputs(x, labels, tau, {}))
        counts.append([launch.name for launch in launches])
    assert counts[0] == counts[1]
    for r, one in enumerate((model, twin)):
        with recording() as launches:
            _, expected = method.gradients(ibp.Network(one, backend="triton"), x, labels, tau)
        assert errors({key: g[r] for key, g in found.gradients.items()}, expected) < TOLERANCE
    own = [launch.name for launch in launches]
    kernels = {"normalise", "project", "bend", "column_sweep"} & set(own)
    assert kernels
    assert all(counts[1].count(kernel) == own.count(kernel) for kernel in kernels)
