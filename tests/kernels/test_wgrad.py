"""Weight gradients, merged and segmented, against float64; the penalty's gradient alone, never only the sum."""

import pytest
import torch

from ibp_triton.kernels.combine import MOST, PartSums
from ibp_triton.kernels.geometry import ONE, Geometry
from ibp_triton.kernels.launcher import recording
from ibp_triton.kernels.wgrad import Segment, weight_gradient
from ibp_triton.kernels.workbench.cases import allowing_tf32
from tests.kernels.support import DTYPES, assert_close, last, randn, unchanged

BETA = 0.003  # the paper's on CIFAR-10: bfloat16 would lose a fifth of it in a + βt


def g(left, right, weight, geometry):
    """The weight gradient in float64, by autograd through the layer."""
    w = weight.double().requires_grad_()
    if left.dim() == 2:
        out = left.double() @ w.T
    else:
        options = {"stride": geometry.stride, "padding": geometry.padding, "dilation": geometry.dilation}
        out = torch.nn.functional.conv2d(left.double(), w, **options)
    return torch.autograd.grad(out, w, right.double())[0]


CONVS = [
    ((9, 8), (4, 4), (1, 1), (0, 0), (1, 1), 1, 5),
    ((5, 5), (5, 5), (1, 1), (2, 2), (1, 1), 37, 3),
    ((9, 7), (3, 2), (2, 3), (1, 0), (2, 1), 6, 37),
]


def linear_case(samples, inputs, outputs, dtype):
    sides = [randn(samples, n, dtype=dtype, zeros=True) for n in (inputs, inputs, outputs, outputs)]
    return randn(outputs, inputs, dtype=dtype), ONE, *sides


def conv_case(image, kernel, stride, padding, dilation, channels, outputs, dtype):
    geometry = Geometry.conv(image, kernel, stride, padding, dilation)
    lefts = [last(randn(3, channels, *image, dtype=dtype, zeros=True)) for _ in range(2)]
    rights = [last(randn(3, outputs, *geometry.out, dtype=dtype, zeros=True)) for _ in range(2)]
    return last(randn(outputs, channels, *kernel, dtype=dtype)), geometry, *lefts, *rights


def cases(dtype):
    yield from (linear_case(*shape, dtype) for shape in [(37, 53, 19), (1, 1, 1), (1300, 5, 3)])
    yield from (conv_case(*conv, dtype) for conv in CONVS)


@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments(case, dtype):
    weight, geometry, a, t, d, e = list(cases(dtype))[case]
    with unchanged(weight, a, t, d, e):
        segments = [
            Segment(1.0, a, d, bias=True),
            Segment(BETA, t, d, sign=True),
            Segment(-2.0, t, e),
            Segment(1.0, a, e),
        ]
        total, bias = weight_gradient(segments, weight, geometry, scale=1 / 32, dtype=torch.float32)
    exact = g(a, d, weight, geometry) + BETA * g(t.double().sign(), d, weight, geometry)
    exact = exact - 2 * g(t, e, weight, geometry) + g(a, e, weight, geometry)
    assert_close(total, exact / 32, torch.float32)
    assert_close(bias, d.double().sum([i for i in range(d.dim()) if i != 1]) / 32, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_has_the_dtype_and_the_strides_of_the_weight(dtype):
    weight, geometry, a, _, d, _ = conv_case(*CONVS[0], dtype)
    gradient, bias = weight_gradient([Segment(1.0, a, d)], weight, geometry)
    assert (gradient.dtype, gradient.stride(), bias) == (dtype, weight.stride(), None)
    assert_close(gradient, g(a, d, weight, geometry), dtype)
    plain, _ = weight_gradient([Segment(1.0, a, d)], weight.contiguous(), geometry)
    assert torch.equal(plain, gradient)


@pytest.mark.parametrize("samples", [3, 200])  # in one part, and split
def test_the_gradient_of_a_weight_with_gaps_has_none(samples):
    geometry = Geometry.conv((6, 6), (3, 3), (1, 1), (0, 0), (1, 1))
    weight, a, d = randn(3, 2, 5, 5)[:, :, :3, :3], last(randn(samples, 2, 6, 6)), last(randn(samples, 3, 4, 4))
    with recording() as launches:
        gradient, bias = weight_gradient([Segment(1.0, a, d, bias=True)], weight, geometry)
    assert (len(launches) > 1) == (samples > 3)
    assert gradient.is_contiguous()
    assert_close(gradient, g(a, d, weight, geometry), torch.float32)
    assert_close(bias, d.double().sum((0, 2, 3)), torch.float32)
    rows = randn(5, 14)[:, ::2]
    a, d = randn(4, 7), randn(4, 5)
    assert_close(weight_gradient([Segment(1.0, a, d)], rows, ONE)[0], g(a, d, rows, ONE), torch.float32)


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("case", range(6))
def test_axpy_reads_the_right_side_once(case, sign, instruments):
    weight, geometry, a, t, d, _ = list(cases(torch.float32))[case]
    with unchanged(weight, a, t, d):
        merged, bias = weight_gradient([Segment(1.0, a, d, bias=True, push=t, sign=sign)], weight, geometry, beta=BETA)
        plain, _ = weight_gradient([Segment(1.0, a, d, bias=True)], weight, geometry)
    seed = t.double().sign() if sign else t
    assert_close(merged, g(a, d, weight, geometry) + BETA * g(seed, d, weight, geometry), torch.float32)
    assert_close(bias, d.double().sum([i for i in range(d.dim()) if i != 1]), torch.float32)
    first, second = (seen for seen in instruments if seen.kernel == "wgrad")
    assert first.traffic["d0=d1=d2=d3"].loaded == second.traffic["d0=d1=d2=d3"].loaded
    assert merged.dtype == torch.float32
    assert not plain.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "tf32"])
def test_the_penalty_survives_low_precision(dtype):
    tf32 = dtype == "tf32"
    dtype = torch.float32 if tf32 else dtype
    weight, geometry, a, t, d, _ = linear_case(256, 37, 19, dtype)
    with allowing_tf32(tf32):
        total, _ = weight_gradient([Segment(1.0, a, d), Segment(BETA, t, d)], weight, geometry, dtype=torch.float32)
        base, _ = weight_gradient([Segment(1.0, a, d)], weight, geometry, dtype=torch.float32)
        with pytest.raises(ValueError, match="rounded"):
            weight_gradient([Segment(1.0, a, d, push=t)], weight, geometry)
    exact = g(t, d, weight, geometry)
    error = ((total.double() - base.double()) / BETA - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    # two float32 sums of size 1/β stand behind the difference; tf32 also truncates t and d, ten bits each
    assert error < (3e-3 if tf32 else 2e-4)


def test_tangents_lie_behind_one_another_as_rows():
    t, e, weight = randn(5, 4, 7), randn(5, 4, 3), randn(3, 7)
    a, d = randn(4, 7), randn(4, 3)
    segments = [Segment(1.0, a, d, bias=True), Segment(0.5, t.flatten(0, 1), e.flatten(0, 1))]
    total, _ = weight_gradient(segments, weight, ONE)
    exact = d.double().T @ a.double() + 0.5 * sum(u.double().T @ v.double() for u, v in zip(e, t, strict=True))
    assert_close(total, exact, torch.float32)


def test_one_sample_beside_several_and_none_at_all():
    weight, a, d = randn(3, 7), randn(4, 7), randn(4, 3)
    one = torch.as_strided(a, (1, 7), (1, 1))  # its stride to the next sample says nothing
    total, _ = weight_gradient([Segment(1.0, one, d[:1]), Segment(1.0, a, d)], weight, ONE)
    assert_close(total, g(a, d, weight, ONE) + g(a[:1], d[:1], weight, ONE), torch.float32)
    total, bias = weight_gradient([Segment(1.0, a[:0], d[:0], bias=True)], weight, ONE)
    assert not total.any()
    assert not bias.any()


def test_what_is_rejected():
    a, d, weight = randn(4, 7), randn(4, 3), randn(3, 7)
    with pytest.raises(ValueError, match="1 to 4"):
        weight_gradient([], weight, ONE)
    with pytest.raises(ValueError, match="do not give"):
        weight_gradient([Segment(1.0, a, randn(5, 3))], weight, ONE)
    with pytest.raises(ValueError, match="dtype"):
        weight_gradient([Segment(1.0, a, d.half())], weight, ONE)
    with pytest.raises(ValueError, match="same strides"):
        weight_gradient([Segment(1.0, a, d), Segment(1.0, randn(7, 4).T, d)], weight, ONE)
    with pytest.raises(ValueError, match="dense"):
        weight_gradient([Segment(1.0, a, randn(3, 4).T)], weight, ONE)


# samples, inputs, outputs, bias: all are split, the last one's parts begin where no 128-bit load may
SPLIT = [(600, 8, 4, False), (1300, 6, 32, True), (700, 16, 16, True), (520, 8, 8, False), (600, 5, 3, True)]


@pytest.mark.parametrize("count", [1, 3, MOST, MOST + 1])
def test_sums_that_wait_share_a_launch(count, instruments):
    sums, made = PartSums(), []
    with recording() as launches:
        for samples, inputs, outputs, bias in [*SPLIT[:MOST], SPLIT[0]][:count]:
            weight, _, a, _, d, _ = linear_case(samples, inputs, outputs, torch.float32)
            found = weight_gradient([Segment(1.0, a, d, bias=bias)], weight, ONE, scale=0.5, later=sums)
            made.append((found, weight, a, d))
        assert made[-1][0][0].isnan().all() or count == MOST  # as fresh memory is here
        sums.now()
        sums.now()
    names = [launch.name for launch in launches]
    assert names.count("combine_several") == -(-count // MOST)
    assert "combine" not in names
    for (gradient, shift), weight, a, d in made:
        assert_close(gradient, g(a, d, weight, ONE) / 2, torch.float32)
        if shift is not None:
            assert_close(shift, d.double().sum(0) / 2, torch.float32)
    for launch, seen in zip(launches, instruments, strict=True):
        traffic = seen.traffic.values()
        moved = sum(t.loaded for t in traffic), sum(t.stored for t in traffic)
        assert launch.name == "wgrad" or (launch.cost.loaded, launch.cost.stored) == moved


def test_sums_of_another_scale_or_width_do_not_wait():
    sums = PartSums()
    with recording() as launches:
        for (samples, inputs, outputs, bias), scale in [(SPLIT[0], 1.0), (SPLIT[4], 1.0), (SPLIT[3], 0.5)]:
            weight, _, a, _, d, _ = linear_case(samples, inputs, outputs, torch.float32)
            weight_gradient([Segment(1.0, a, d, bias=bias)], weight, ONE, scale=scale, later=sums)
        sums.now()
    names = [launch.name for launch in launches]
    assert names == ["wgrad", "wgrad", "combine", "wgrad", "combine_several", "combine_several"]
