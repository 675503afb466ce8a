"""Kernels with an axis of replicas: what a loop over them gives, in as many launches as one takes."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import ibp_triton as ibp
from ibp_triton import ops
from ibp_triton.kernels.conv import conv2d, conv2d_vjp
from ibp_triton.kernels.gemm import linear, linear_activation, linear_vjp
from ibp_triton.kernels.geometry import ONE, Geometry
from ibp_triton.kernels.launcher import recording
from ibp_triton.kernels.smooth import Activation
from ibp_triton.kernels.wgrad import Segment, weight_gradient
from ibp_triton.vmapped import Inputs, Vmapped
from tests.kernels.support import DTYPES, assert_close, last, randn
from tests.kernels.test_methods import TOLERANCE, errors, mnist

CONV = ([1, 1], [1, 0], [1, 1])
GEOMETRY = Geometry.conv((6, 5), (3, 2), (2, 1), (1, 0), (1, 1))
SAME = Geometry.conv((6, 5), (3, 3), (1, 1), (1, 1), (1, 1))


def own(replicas: int, shared: bool, make, *shape: int, **how) -> Tensor:
    """[R, ...], of stride 0 where it is shared."""
    one = make(randn(*shape, **how)) if shared else make(randn(replicas, *shape, **how))
    return one.expand(replicas, *shape) if shared else one


def held(function, tensors, replicas, dtype=torch.float32, **settings):
    """One call on [R, ...] is a loop over it, bit for bit where sums are split alike, in as many launches as one's."""
    tensors = {name: t for name, t in tensors.items() if t is not None}
    with recording() as launches:
        found = function(**tensors, **settings)
    for r in range(replicas):
        with recording() as each:
            expected = function(**{name: t[r] for name, t in tensors.items()}, **settings)
        alike = [launch.arguments.get("splits") for launch in launches] == [a.arguments.get("splits") for a in each]
        if alike:
            assert torch.equal(found[r], expected)
        else:
            assert_close(found[r], expected, dtype)
        assert found[r].stride() == expected.stride()
    assert [launch.name for launch in launches] == [launch.name for launch in each] or not alike
    return launches


SHARING = {"own": (), "x": ("x",), "weight": ("weight", "bias"), "mask": ("mask",), "all": ("x", "weight", "mask")}


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("tangents", [1, 5])
def test_linear_layers_of_replicas(replicas, tangents, sharing):
    shared = SHARING[sharing]

    def some(name, *shape):
        return own(replicas, name in shared, torch.Tensor.contiguous, *shape)

    x, w, b = some("x", tangents, 5, 37), some("weight", 19, 37), some("bias", 19)
    held(linear, {"x": x, "weight": w, "bias": b}, replicas, relu=True)
    held(linear, {"x": x, "weight": w, "mask": some("mask", 5, 19)}, replicas, sign=True)
    held(linear, {"x": x, "weight": w, "slope": some("mask", 5, 19)}, replicas)
    d = some("x", tangents, 5, 19)
    held(linear_vjp, {"d": d, "weight": w, "mask": some("mask", 5, 37)}, replicas)
    held(linear_vjp, {"d": d, "weight": w, "slope": some("mask", 5, 37)}, replicas)
    for part in (0, 1):  # the activation and its slope
        held(lambda part=part, **given: linear_activation(**given)[part], {"x": x, "weight": w, "bias": b}, replicas,
             activation=Activation.GELU)  # fmt: skip


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize(
    ("replicas", "tangents", "geometry", "dtype"),
    [(1, 1, SAME, DTYPES[0]), (2, 1, GEOMETRY, DTYPES[1]), (2, 2, SAME, DTYPES[2]), (3, 5, GEOMETRY, DTYPES[0])],
)
def test_convolutions_of_replicas(replicas, tangents, geometry, sharing, dtype):
    shared = SHARING[sharing]

    def some(name, *shape):
        make = last if len(shape) > 3 else torch.Tensor.contiguous
        return own(replicas, name in shared, make, *shape, dtype=dtype)

    x, w, b = some("x", tangents, 2, 4, 6, 5), some("weight", 7, 4, *geometry.kernel), some("bias", 7)
    held(conv2d, {"x": x, "weight": w, "bias": b}, replicas, dtype, geometry=geometry, relu=True)
    mask = some("mask", 2, 7, *geometry.out)
    held(conv2d, {"x": x, "weight": w, "mask": mask}, replicas, dtype, geometry=geometry, sign=True)
    d, mask = some("x", tangents, 2, 7, *geometry.out), some("mask", 2, 4, 6, 5)
    held(conv2d_vjp, {"d": d, "weight": w, "mask": mask}, replicas, dtype, geometry=geometry)


@pytest.mark.parametrize(("replicas", "dtype"), [(1, DTYPES[0]), (3, DTYPES[0]), (2, DTYPES[1]), (2, DTYPES[2])])
def test_weight_gradients_of_replicas(replicas, dtype):
    """Sides, strengths and β shared or own, a sign, sums of another length, split ones among them."""

    def some(shared, *shape):
        return own(replicas, shared, last if len(shape) > 3 else torch.Tensor.contiguous, *shape, dtype=dtype)

    strengths = torch.rand(replicas)
    for rows in (5, 350):
        sides = [(some(True, rows, 7), some(False, rows, 6)), (some(False, 2 * rows, 7), some(True, 2 * rows, 6))]
        gradients(replicas, sides, strengths, some(False, 6, 7), ONE, dtype)
    images = [(some(shared, 3, 4, 6, 5), some(False, 3, 7, *GEOMETRY.out)) for shared in (True, False)]
    gradients(replicas, images, 0.5, some(False, 7, 4, 3, 2), GEOMETRY, dtype)


def gradients(replicas, sides, strength, weight, geometry, dtype):
    """A gradient of two terms, the second times the strength, is what a loop gives, and so is one of a + βt."""

    def segments(r=slice(None)):
        first, second = (Segment(1.0, x[r], d[r]) for x, d in sides)
        number = strength if isinstance(strength, float) else strength[r]
        return [replace(first, bias=True), replace(second, coefficient=number, sign=True)], number

    def push(r=slice(None)):
        (x, d), number = sides[0], segments(r)[1]
        return [Segment(2.0, x[r], d[r], push=sides[1][0][r, : x.shape[1]])], number

    for terms in (segments, push) if dtype == torch.float32 else (segments,):
        some, beta = terms()
        with recording() as launches:
            found = weight_gradient(some, weight, geometry, beta=beta, scale=0.5, dtype=torch.float32)
        for r in range(replicas):
            some, beta = terms(r)
            expected = weight_gradient(some, weight[r], geometry, beta=beta, scale=0.5, dtype=torch.float32)
            assert_close(found[0][r], expected[0], torch.float32)
            assert found[0][r].stride() == expected[0].stride()
            if terms is segments:
                assert_close(found[1][r], expected[1], torch.float32)
        assert [launch.name for launch in launches] in (["wgrad"], ["wgrad", "combine"])


@pytest.mark.parametrize("sharing", ["own", "x", "weight"])
@pytest.mark.parametrize(
    ("replicas", "tangents", "dtype"),
    [(1, 1, DTYPES[0]), (2, 5, DTYPES[1]), (3, 1, DTYPES[2]), (3, 2, DTYPES[0])],
)
def test_convolutions_with_their_pools_of_replicas(replicas, tangents, sharing, dtype):
    """As one kernel, and where there is too much to compute anew as two."""
    shared = SHARING[sharing]
    for channels, names in ((1, ["pooled_conv"]), (6, ["contract", "max_pool"])):
        w, b = (own(replicas, "weight" in shared, torch.clone, *s, dtype=dtype) for s in ((5, channels, 3, 2), (5,)))
        x = own(replicas, "x" in shared, last, 2, channels, 8, 7, dtype=dtype)
        t = own(replicas, "x" in shared, last, tangents, 2, channels, 8, 7, dtype=dtype)
        window = ([3, 3], [2, 2], [1, 1], [0, 0], False)
        axes = tuple(None if a.stride(0) == 0 else 0 for a in (x, w, b, t))
        parts = [a[0] if axis is None else a for a, axis in zip((x, w, b, t), axes, strict=True)]

        def both(x, w, b, t, window=window):
            y, code = ops.conv2d_max_pool2d(x, w, *CONV, b, *window, True, channels_first=True)
            return y, code, ops.conv2d_max_pool2d_jvp(t, w, code, *CONV, *window, sign=True)

        with torch.no_grad(), recording() as launches:
            found = torch.func.vmap(both, axes)(*parts)
        assert [launch.name for launch in launches][: len(names)] == names
        assert len(launches) == 2 * len(names)
        for r in range(replicas):
            for a, e in zip(found, both(x[r], w[r], b[r], t[r]), strict=True):
                assert torch.equal(a[r], e)


def test_replicas_that_lie_apart_in_memory():
    """Their axis is the last but one: read where it is, or copied where kernels want it in front."""
    x, d, weight, bias, strengths = randn(2, 5, 3, 7), randn(5, 3, 6), randn(3, 6, 7), randn(6, 3), torch.rand(3, 2)

    def gradient(x, d, w, strength):
        rest = ([1.0], [True], [False], [strength, None], w, [1, 1], [0, 0], [1, 1])
        return ops.weight_gradient([x], [d], *rest)

    with torch.no_grad(), recording() as launches:
        y = torch.func.vmap(ops.linear, (2, 0, 1))(x, weight, bias)
        found, shift = torch.func.vmap(gradient, (1, 1, 0, 0))(x[0], d, weight, strengths[:, 1])
    assert [launch.name for launch in launches] == ["contract", "wgrad"]
    assert launches[0].arguments["x"].data_ptr() == x.data_ptr()
    assert_close(y, torch.einsum("tnri,roi->rtno", x.double(), weight.double()) + bias.T[:, None, None], x.dtype)
    expected = torch.einsum("r,nro,nri->roi", strengths[:, 1].double(), d.double(), x[0].double())
    assert_close(found, expected, x.dtype)
    assert_close(shift, strengths[:, 1:].double() * d.double().sum(0), x.dtype)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_small_operators_of_replicas(replicas):
    """Objectives, adversarial steps and ReLUs, with tensors and strengths shared or own."""

    def numbers(shared):
        return torch.rand(()) if shared else torch.rand(replicas)

    for shared in (True, False):
        losses, penalties = own(replicas, False, torch.clone, 7), own(replicas, shared, torch.clone, 7, 5)
        x, d = own(replicas, shared, last, 3, 4, 5, 2), own(replicas, False, last, 3, 4, 5, 2)
        mask, tangents = own(replicas, shared, torch.clone, 4, 5), own(replicas, not shared, torch.clone, 2, 4, 5)
        some = (losses, penalties, x, d, mask, tangents)
        axes = [None if t.stride(0) == 0 else 0 for t in some]
        strengths = (numbers(shared), numbers(False), numbers(shared))

        def every(losses, penalties, x, d, mask, tangents, a, b, epsilon):
            objective = ops.objective(losses, penalties, float("nan"), 0.0, [a, b], 0.5, True)
            return objective, ops.fgsm_step(x, d, 0.0, epsilon), ops.relu(tangents, mask), ops.relu(d)

        one = [t[0] if axis is None else t for t, axis in zip(some, axes, strict=True)]
        axes += [0 if t.dim() else None for t in strengths]
        with torch.no_grad(), recording() as launches:
            found = torch.func.vmap(every, tuple(axes))(*one, *strengths)
        assert [launch.name for launch in launches] == ["weighted_sum", "seed", "gate", "gate"]
        for r in range(replicas):
            expected = every(*(t[r] for t in some), *(t[r] if t.dim() else t for t in strengths))
            for a, e in zip(found, expected, strict=True):
                assert torch.equal(a[r], e)


def test_offsets_reach_within_a_replica():
    """Not from one to the next: those of two, 2³¹ elements apart, are taken; a replica of so many is refused."""
    w = randn(2, 3, 4)
    far = torch.empty_strided((2, 1, 5, 4), (2**31, 20, 4, 1), device="meta")
    with recording(execute=False) as launches:
        linear(far, w.to("meta"))
    assert [launch.name for launch in launches] == ["contract"]
    wide = torch.empty_strided((2, 2, 5, 4), (20, 2**31, 4, 1), device="meta")
    with recording(execute=False), pytest.raises(ValueError, match="spans more than"):
        linear(wide, w.to("meta"))


def test_what_is_refused():
    x, w = randn(2, 1, 5, 4), randn(2, 3, 4)
    with pytest.raises(ValueError, match="one length"):
        linear(x, w[:1])
    with pytest.raises(ValueError, match="lie 16 elements apart"):
        linear(x, w, mask=randn(2, 16)[:, :15].view(2, 5, 3))
    with pytest.raises(ValueError, match="do not meet"):
        linear(x[..., :3], w)


@pytest.mark.parametrize("key", ["loss_ibp", "at"])
def test_a_step_of_replicas_launches_as_many_kernels_as_that_of_one(key):
    """And its gradients are those of the oracle in float64."""
    torch.manual_seed(1)
    models = [mnist(8)[0] for _ in range(2)]
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 7])
    methods = [ibp.METHODS[key](strength) for strength in (0.1, 0.2)]
    counts = []
    for count in (1, 2):
        network = ibp.ReplicatedNetwork(models[:count], seeds=range(count), backend="triton")
        with recording(execute=count == 2) as launches:
            found = Vmapped(network)(methods[:count], Inputs(x, labels, None, {}))
        counts.append([launch.name for launch in launches])
    assert counts[0] == counts[1]
    assert len(counts[1]) > 15
    for r, model in enumerate(models):
        oracle = copy.deepcopy(model).double()
        value, expected = ibp.reference.gradients(oracle, methods[r], x.double(), labels)
        assert errors({name: g[r] for name, g in found.gradients.items()}, expected) < TOLERANCE
        assert float(found.parts["loss"][r]) == pytest.approx(float(value), rel=TOLERANCE)
