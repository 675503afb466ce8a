"""What is worked out once for a layout, and everything that must make it be worked out anew."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import ibp_triton as ibp
from ibp_triton.kernels import plans, tiles
from ibp_triton.kernels.columns import batch_norm_cross, batch_norm_project
from ibp_triton.kernels.conv import conv2d, conv2d_vjp
from ibp_triton.kernels.gates import relu
from ibp_triton.kernels.gemm import linear, linear_vjp
from ibp_triton.kernels.geometry import ONE, Geometry
from ibp_triton.kernels.launcher import Launch, recording
from ibp_triton.kernels.loss import cross_entropy, hessian_product, objective
from ibp_triton.kernels.norm_seeds import fast_tbp_seed, fgsm_step, norm_seed
from ibp_triton.kernels.norms import (
    group_norm,
    group_norm_cross,
    group_norm_curvature,
    group_norm_jvp,
    group_norm_vjp,
)
from ibp_triton.kernels.pool import max_pool2d, pool2d_jvp, pool2d_vjp
from ibp_triton.kernels.tiles import Config
from ibp_triton.kernels.wgrad import Segment, weight_gradient
from ibp_triton.kernels.workbench.cases import allowing_tf32
from tests.kernels.support import assert_close, last, randn
from tests.kernels.test_methods import TOLERANCE, errors, mnist, setting

GEOMETRY = Geometry.conv((6, 5), (3, 3), (1, 1), (1, 1), (1, 1))
POOL = Geometry.pool((6, 5), (3, 3), (2, 2), (1, 1), True)


@pytest.fixture(autouse=True)
def made(monkeypatch) -> Iterator[list[str]]:
    """The plans of a test by the name of what made them; none is there before it."""
    names: list[str] = []
    make = plans._made
    monkeypatch.setattr(plans, "_made", lambda maker, *rest: names.append(maker.__name__) or make(maker, *rest))
    monkeypatch.setattr(tiles, "tuned", {})
    plans.forget()
    yield names
    plans.forget()


def everything() -> None:
    """Every launcher, the split products among them."""
    for tangents, inputs in ((1, 53), (2, 1100)):
        x, w, d = randn(tangents, 5, inputs), randn(19, inputs), randn(tangents, 5, 19)
        linear(x, w, randn(19), relu=True)
        linear_vjp(d, w, randn(5, inputs))
    image, kernel, right = last(randn(2, 3, 4, 6, 5)), last(randn(7, 4, 3, 3)), last(randn(2, 3, 7, 6, 5))
    conv2d(image, kernel, GEOMETRY, randn(7))
    conv2d_vjp(right, kernel, GEOMETRY, last(randn(3, 4, 6, 5)))
    weight_gradient([Segment(0.5, image[0], right[0], bias=True), Segment(2.0, image[1], right[1])], kernel, GEOMETRY)
    weight_gradient([Segment(1.0, randn(1300, 7), randn(1300, 5), push=randn(1300, 7))], randn(5, 7), ONE, beta=0.5)
    _, code = max_pool2d(image[0], POOL, relu=True)
    pool2d_jvp(image, code, POOL)
    pool2d_vjp(last(randn(2, 3, 4, *POOL.out)), code, POOL)
    relu(image, image[0])
    z = randn(5, 10)
    cross_entropy(z, torch.zeros(5, dtype=torch.int64))
    hessian_product(z, randn(5, 10))
    objective(randn(7), randn(3, 5), 1.0, 0.5)
    norm_seed(image[0])
    fgsm_step(image[0], image[1], 0.1)
    fast_tbp_seed(image[0], image)
    one = torch.ones(4)
    batch_norm_cross(image, image, batch_norm_project(image, image[0], one, one)[1], image[0], one, one)
    _, statistics = group_norm(image[0], 2)
    group_norm_vjp(image, image[0], statistics, 2, sums=True)
    group_norm_jvp(image, image[0], statistics, 2, right=image)
    group_norm_cross(image, image, image[0], statistics, 2)
    group_norm_curvature(image, image, image[0], statistics, 2)


def same(first: Launch, second: Launch) -> bool:
    """Whether two launches differ in their tensors and numbers of the call alone."""
    layouts = [
        {n: (v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for n, v in one.arguments.items()}
        for one in (first, second)
    ]
    rest = [(one.name, one.grid, one.config, one.cost) for one in (first, second)]
    return layouts[0] == layouts[1] and rest[0] == rest[1]


def test_a_second_call_makes_no_plan_and_launches_the_same(made):
    with recording(execute=False) as first:
        everything()
    assert len(made) == len(set(made)) + 8  # linear layers, weight gradients, a pool's byte, the sweeps of norms
    before = len(made)
    with recording(execute=False) as second:
        everything()
    assert len(made) == before
    assert len(first) == len(second) > before  # some are split
    assert all(map(same, first, second))


def call(**change):
    """One product, with one thing changed; its launches and result."""
    given = {"x": randn(2, 6, 40), "w": randn(9, 40), "bias": randn(9), "mask": None, "relu": False, "sign": False}
    given |= change
    with recording() as launches:
        y = linear(given["x"], given["w"], given["bias"], relu=given["relu"], mask=given["mask"], sign=given["sign"])
    x = given["x"].double().sign() if given["sign"] else given["x"].double()
    expected = x @ given["w"].double().T
    if given["bias"] is not None:
        expected += given["bias"].double()
    if given["relu"]:
        expected = expected.relu()
    if given["mask"] is not None:
        expected *= given["mask"] > 0
    assert_close(y, expected, given["x"].dtype)
    return launches


@pytest.mark.parametrize(
    "change",
    [
        {"x": randn(2, 5, 40)},  # the last batch
        {"x": randn(1, 6, 40)},
        {"x": randn(2, 6, 48)[..., :40]},
        {"x": randn(2, 12, 40)[:, ::2]},
        {n: randn(*s, dtype=torch.bfloat16) for n, s in (("x", (2, 6, 40)), ("w", (9, 40)), ("bias", (9,)))},
        {"w": randn(8, 40), "bias": randn(8)},
        {"bias": None},
        {"mask": randn(6, 9)},
        {"relu": True},
        {"sign": True},
    ],
)
def test_another_layout_or_flag_has_a_plan_of_its_own(change, made):
    call()
    call()
    assert len(made) == 1
    call(**change)
    assert len(made) == 2
    call(**change)
    call()
    assert len(made) == 2


def test_devices_are_told_apart(made):
    """Of tensors, and of the numbers that a kernel reads where they lie."""
    with recording(execute=False):
        for device in ("cpu", "meta", "cpu"):
            relu(torch.zeros(3, 5, device=device))
            objective(torch.zeros(3), torch.zeros(3), torch.zeros((), device=device), 1.0)
    assert made == ["_gate", "_objective"] * 2


def test_an_address_is_no_part_of_a_plan(made):
    """It decides which compiled kernel is taken: tests/compiled."""
    call()
    call(x=randn(2 * 6 * 40 + 1)[1:].view(2, 6, 40))
    assert len(made) == 1


def test_torchs_setting_of_products_is_looked_at_each_time(made):
    found = []
    for tf32 in (False, True, False, True):
        with allowing_tf32(tf32), recording(execute=False) as launches:
            linear(randn(1, 6, 40), randn(9, 40))
        found += [launch.arguments["PRECISION"] for launch in launches]
    assert found == ["ieee", "tf32"] * 2
    assert len(made) == 2


def test_the_chip_that_tiles_are_chosen_for_is_part_of_it(made):
    found = []
    for chip in ("sm_90", "gfx1100", "sm_90"):
        with tiles.on_chip(chip):
            found += call()
    assert found[0].config == found[2].config != found[1].config
    assert len(made) == 2


def test_a_tuned_tile_counts_at_once_and_until_it_is_gone(made):
    """By whatever the table of tuned tiles is changed."""
    table, tried = call()[0].config, Config(16, 16, 32)
    seen: set[tiles.Key] = set()
    tiles.watchers.append(seen)
    try:
        call()
    finally:
        tiles.watchers.remove(seen)
    (key,) = seen  # a plan that is there tells of its choice too
    assert len(made) == 1
    tiles.tuned[key] = tried
    assert [call()[0].config for _ in range(2)] == [tried] * 2
    tiles.tuned = {key: Config(32, 16, 32)}
    assert call()[0].config == Config(32, 16, 32)
    tiles.tuned.clear()
    assert call()[0].config == table
    tiles.tuned["contract", "any", "sm_90", "float32", (1,)] = tried  # for other sizes
    assert call()[0].config == table
    assert len(made) == 4


def test_numbers_change_without_a_new_plan(made):
    a, d, weight = randn(6, 7), randn(6, 3), randn(3, 7)
    expected = d.double().T @ a.double()
    for number, scale in ((1.0, 1.0), (0.5, 2.0), (1.0, 0.25)):
        found, _ = weight_gradient([Segment(number, a, d)], weight, ONE, scale=scale)
        assert_close(found, number * scale * expected, torch.float32)
    assert len(made) == 1
    found, _ = weight_gradient([Segment(torch.tensor(0.25), a, d)], weight, ONE)
    assert_close(found, 0.25 * expected, torch.float32)
    assert len(made) == 2


def test_what_is_refused_is_refused_each_time(made):
    for _ in range(2):
        with pytest.raises(ValueError, match="do not meet"):
            linear(randn(1, 3, 5), randn(4, 6))
    assert len(made) == 2
    assert not plans._kept
    assert not tiles.watchers


def test_no_more_than_a_limit_are_kept(monkeypatch, made):
    monkeypatch.setattr(plans, "LIMIT", 3)
    for samples in (1, 2, 3, 4):
        relu(randn(samples, 5))
    assert len(plans._kept) == 3
    relu(randn(2, 5))
    assert len(made) == 4
    relu(randn(1, 5))  # the oldest has gone
    assert len(made) == 5


def test_steps_on_kept_plans_are_right(made):
    """A step on other numbers makes no plan, an epoch's last batch some, and the next step none again."""
    model, x, _, _ = setting(lambda: mnist(8))
    ours, theirs = (ibp.Network(model, backend=backend) for backend in ("triton", "torch"))
    counts, method = [], ibp.LossIBP(0.3)
    for size in (2, 2, 1, 2, 1):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
        pixels, labels = torch.randn_like(x[:size]), torch.randint(10, (size,))
        (value, found), (expected_value, expected) = (
            method.gradients(network, pixels, labels) for network in (ours, theirs)
        )
        torch.testing.assert_close(value, expected_value)
        assert errors(found, expected) < TOLERANCE
        counts.append(len(made))
    assert 0 < counts[0] == counts[1] < counts[2] == counts[3] == counts[4]


def test_layouts():
    for layout, tensor in (
        (plans.Layout.dense((2, 3), torch.bfloat16), torch.empty(2, 3, dtype=torch.bfloat16)),
        (plans.Layout.channels_last((1, 2, 3, 4, 5), torch.float32), last(torch.empty(1, 2, 3, 4, 5))),
    ):
        assert layout == plans.Layout.of(tensor) == plans.Layout.of(layout.empty(tensor))
        assert (layout.numel, layout.bytes) == (tensor.numel(), tensor.numel() * tensor.element_size())
