"""Convolutions, pools, moves, reductions and tuples against torch.func."""

import operator

import pytest
import torch
import torch.nn.functional as F

from ibp_triton.backends.torch.written import Written, geometry, seen
from ibp_triton.graph import Node
from tests.library.layers import Call, agree, check, each_vector, half_agrees

T = torch.Tensor
PLACES = torch.tensor([[0, 1, 2, 0], [0, 0, 2, 1]])
PARAMETRIC = {"weight": "parametric", "bias": "parametric"}


def numbers(*shape, seed=0, cast=lambda x: x):
    generator = torch.Generator().manual_seed(seed)
    return cast(torch.randn(shape, generator=generator, dtype=torch.float64))


def conv(function, x, w, bias=True, layout=None, cast=lambda x: x, **kwargs):
    x, weight = numbers(*x, cast=cast), numbers(*w, seed=1, cast=cast)
    x = x.contiguous(memory_format=layout) if layout else x
    groups = kwargs.get("groups", 1)
    out = w[1] * groups if "transpose" in function.__name__ else w[0]
    own = (numbers(out, seed=2, cast=cast),) if bias else ()
    return Call(function, (x, weight, *own), kwargs, PARAMETRIC)


def one(function, *args, shape=(3, 4, 5), layout=None, reference=None, **kwargs):
    x = numbers(*shape)
    return Call(function, (x.contiguous(memory_format=layout) if layout else x, *args), kwargs, {}, reference)


CONVS = {
    "conv3d": lambda **k: conv(F.conv3d, (2, 4, 5, 4, 3), (6, 2, 3, 2, 2), groups=2, stride=(2, 1, 1), padding=1, **k),
    "conv3d, same": lambda **k: conv(F.conv3d, (1, 2, 5, 4, 3), (3, 2, 2, 3, 3), padding="same", **k),
    "conv3d, channels last": lambda **k: conv(
        F.conv3d, (2, 4, 3, 4, 3), (6, 4, 2, 2, 2), layout=torch.channels_last_3d, **k
    ),
    "conv_transpose1d": lambda **k: conv(
        F.conv_transpose1d, (2, 4, 6), (4, 3, 3), stride=2, padding=1, output_padding=1, **k
    ),
    "conv_transpose2d": lambda **k: conv(
        F.conv_transpose2d, (2, 4, 5, 6), (4, 3, 3, 2), stride=(2, 1), dilation=(1, 2), **k
    ),
    "conv_transpose2d, groups": lambda **k: conv(
        F.conv_transpose2d, (1, 4, 5, 6), (4, 3, 3, 3), bias=False, groups=2, stride=3, output_padding=2, **k
    ),
    "conv_transpose2d, channels last": lambda **k: conv(
        F.conv_transpose2d, (2, 4, 5, 6), (4, 3, 2, 2), stride=2, layout=torch.channels_last, **k
    ),
    "conv_transpose3d": lambda **k: conv(F.conv_transpose3d, (2, 2, 3, 4, 3), (2, 3, 2, 2, 2), stride=2, **k),
}
MAP = (2, 4, 6, 7)
LAST = {"shape": MAP, "layout": torch.channels_last}
MOVES = {
    "add": lambda: Call(operator.add, (numbers(3, 4), numbers(4, seed=1))),
    "add a multiple": lambda: Call(torch.add, (numbers(4), numbers(3, 1, seed=1)), {"alpha": 0.3}),
    "add a parameter": lambda: Call(T.add, (numbers(3, 4), numbers(4, seed=1)), {}, {"other": "parametric"}),
    "subtract": lambda: Call(operator.sub, (numbers(3, 4), numbers(4, seed=1))),
    "subtract a multiple": lambda: Call(T.sub, (numbers(4), numbers(3, 1, seed=1)), {"alpha": 0.3}),
    "subtract a number": lambda: one(torch.sub, 2),
    "subtract from": lambda: Call(torch.rsub, (numbers(3, 4), numbers(4, seed=1)), {"alpha": 0.3}),
    "permute": lambda: one(T.permute, 2, 0, 1),
    "permute by a list": lambda: one(torch.permute, (0, -1, 1)),
    "permute, named": lambda: one(T.permute, dims=(2, 1, 0)),
    "transpose": lambda: one(T.transpose, 1, -1),
    "transpose, named": lambda: one(torch.transpose, dim0=0, dim1=2),
    "t": lambda: one(T.t, shape=(3, 4)),
    "mT": lambda: one(T.mT.__get__),
    "T": lambda: one(T.T.__get__, shape=(3, 4)),
    "movedim": lambda: one(torch.movedim, 0, -1),
    "movedim of two": lambda: one(T.movedim, (0, 3), (2, 0), shape=MAP),
    "flip": lambda: one(T.flip, 0, 2),
    "flip by a list": lambda: one(torch.flip, [1]),
    "roll": lambda: one(torch.roll, (1, -2), (0, 2)),
    "roll, flat": lambda: one(torch.roll, 2),
    "expand": lambda: one(T.expand, 2, -1, 4, 5, shape=(3, 1, 5)),
    "expand_as": lambda: Call(T.expand_as, (numbers(4, 1), torch.empty(2, 4, 3)), {}, {"args.0": "constant"}),
    "broadcast_to": lambda: one(torch.broadcast_to, (3, 4, 5), shape=(1, 5)),
    "repeat": lambda: one(T.repeat, 2, 1, 3),
    "negative": lambda: one(operator.neg),
    "clone": lambda: one(torch.clone),
    "contiguous": lambda: one(T.contiguous),
    "to float32": lambda: one(T.to, torch.float64),
    "cumsum": lambda: one(torch.cumsum, 1),
    "index_select": lambda: one(torch.index_select, 1, torch.tensor([3, 0, 0])),
    "gather": lambda: one(torch.gather, 1, torch.randint(4, (3, 2, 5), generator=torch.Generator().manual_seed(0))),
    "masked_fill": lambda: one(T.masked_fill, numbers(4, 1, seed=3) > 0, -torch.inf, reference=masked),
    "tril": lambda: one(torch.tril, 1),
    "item": lambda: one(operator.getitem, 1),
    "item of slices": lambda: one(T.__getitem__, (slice(None), 0, slice(1, None, 2))),
    "item with a new axis": lambda: one(operator.getitem, (..., None, slice(2))),
    "item, channels last": lambda: one(operator.getitem, (slice(None), slice(1, 3), slice(0, 5, 2)), **LAST),
    "item by a list": lambda: one(operator.getitem, (slice(None), [0, 2, 2])),
    "sum": lambda: one(torch.sum),
    "sum over axes": lambda: one(T.sum, (0, -1)),
    "sum over axes, kept": lambda: one(T.sum, 1, True),
    "mean": lambda: one(T.mean, dim=(2, 3), shape=MAP),
    "mean, kept": lambda: one(torch.mean, -1, keepdim=True),
    "mean of two axes": lambda: one(T.mean, (-2, -1), **LAST),
    "mean of a number": lambda: one(torch.mean, shape=()),
    "var": lambda: one(torch.var),
    "var over axes": lambda: one(T.var, (0, 2), correction=0),
    "var, biased": lambda: one(T.var, 1, False, True),
    "std": lambda: one(torch.std, -1),
    "std, kept": lambda: one(T.std, dim=(1, 2), keepdim=True),
    "norm": lambda: one(T.norm, dim=-1),
    "norm of all": lambda: one(torch.norm),
    "vector norm": lambda: one(torch.linalg.vector_norm, dim=(0, 2), keepdim=True),
    "normalize": lambda: one(F.normalize),
    "normalize the last": lambda: one(F.normalize, dim=-1),
    "amax": lambda: one(torch.amax, (1, 2)),
    "amin, kept": lambda: one(T.amin, 1, True),
    "max along an axis": lambda: one(torch.max, 1),
    "min, kept": lambda: one(T.min, dim=-1, keepdim=True),
    "max of all": lambda: one(torch.max),
    "min of all": lambda: one(T.min),
    "max of two": lambda: Call(torch.max, (numbers(3, 4), numbers(4, seed=1))),
    "min of two": lambda: Call(T.min, (numbers(3, 1), numbers(3, 4, seed=1))),
    "logsumexp": lambda: one(torch.logsumexp, 1),
    "logsumexp, kept": lambda: one(T.logsumexp, (0, -1), keepdim=True),
    "addcmul": lambda: Call(torch.addcmul, (numbers(3, 4), numbers(4, seed=1), numbers(3, 1, seed=2)), {"value": 0.3}),
    "addcmul onto fewer": lambda: Call(T.addcmul, (numbers(4), numbers(3, 4, seed=1), numbers(3, 1, seed=2))),
    "lerp": lambda: Call(torch.lerp, (numbers(3, 4), numbers(4, seed=1), numbers(3, 1, seed=2))),
    "lerp by a number": lambda: Call(T.lerp, (numbers(3, 4), numbers(3, 4, seed=1), 0.3)),
    "index_add": lambda: Call(
        torch.index_add, (numbers(3, 4), 1, torch.tensor([2, 0, 2]), numbers(3, 3, seed=1)), {"alpha": 0.7}
    ),
    "scatter_add": lambda: Call(T.scatter_add, (numbers(3, 4), 0, PLACES, numbers(2, 4, seed=1))),
    "scatter_add of a part": lambda: Call(
        T.scatter_add, (numbers(3, 4), 1, PLACES[:, :3], numbers(3, 5, seed=1)), reference=added_in_part
    ),
    "max_pool2d, channels last": lambda: one(F.max_pool2d, 3, 2, **LAST),
    "max_pool2d, channels last, one channel": lambda: one(
        F.max_pool2d, 2, shape=(2, 1, 6, 7), layout=torch.channels_last
    ),
    "max_pool2d, channels last, two channels": lambda: one(
        F.max_pool2d, (3, 2), shape=(2, 2, 4, 4), layout=torch.channels_last
    ),
    "max_pool3d": lambda: one(F.max_pool3d, 2, 1, shape=(2, 2, 3, 4, 3)),
    "repeat_interleave": lambda: one(torch.repeat_interleave, 3, dim=1),
    "repeat_interleave, flat": lambda: one(T.repeat_interleave, 2),
    "tile": lambda: one(torch.tile, (2, 1)),
    "flipud": lambda: one(torch.flipud),
    "diag_embed": lambda: one(torch.diag_embed),
    "diff": lambda: one(torch.diff, dim=1),
    "rot90": lambda: one(torch.rot90, 1, (1, 2)),
    "topk": lambda: one(torch.topk, 2, 1),
    "sort": lambda: one(torch.sort, -1, descending=True),
    "chunk": lambda: one(torch.chunk, 3, dim=-1),
    "split": lambda: one(T.split, [1, 3], 1),
    "split evenly": lambda: one(torch.split, 2),
    "tensor_split": lambda: one(torch.tensor_split, 2, -1),
    "unbind": lambda: one(T.unbind, 1),
    "concatenate with an empty vector": lambda: Call(
        torch.cat, ([numbers(3, 4), numbers(0), numbers(3, 2, seed=1)],), {"dim": 1}
    ),
    "stack": lambda: Call(torch.stack, ([numbers(3, 4), numbers(3, 4, seed=1)],), {"dim": -1}),
    "stack in front": lambda: Call(torch.stack, ([numbers(3, 4), numbers(3, 4, seed=1)],)),
    "avg_pool2d": lambda: one(F.avg_pool2d, 3, 2, 1, True, False, **LAST),
    "avg_pool2d, divisor": lambda: one(F.avg_pool2d, (2, 3), divisor_override=4, shape=MAP),
    "avg_pool3d": lambda: one(F.avg_pool3d, 2, shape=(2, 2, 4, 4, 3)),
    "adaptive_avg_pool2d": lambda: one(F.adaptive_avg_pool2d, (3, 2), **LAST),
    "adaptive_avg_pool2d to one": lambda: one(F.adaptive_avg_pool2d, 1, shape=MAP),
    "adaptive_avg_pool2d to a row": lambda: one(F.adaptive_avg_pool2d, (1, 2), shape=MAP),
    "adaptive_avg_pool2d to a column": lambda: one(F.adaptive_avg_pool2d, (2, 1), **LAST),
    "adaptive_avg_pool3d": lambda: one(F.adaptive_avg_pool3d, 2, shape=(2, 2, 4, 4, 3)),
    "interpolate": lambda: one(F.interpolate, scale_factor=2, shape=MAP),
    "interpolate, bilinear": lambda: one(F.interpolate, size=(5, 9), mode="bilinear", align_corners=True, shape=MAP),
    "interpolate, bicubic": lambda: one(F.interpolate, scale_factor=1.5, mode="bicubic", shape=MAP),
    "pixel_shuffle": lambda: one(F.pixel_shuffle, 2, shape=(2, 4, 3, 5)),
    "pixel_unshuffle": lambda: one(F.pixel_unshuffle, 2, shape=(2, 3, 4, 6)),
    "unfold": lambda: one(F.unfold, 2, shape=MAP),
}


def added_in_part(x, dim, index, more):
    """torch's own backward refuses an index that leaves numbers out."""
    return x.scatter_add(dim, index, more[:2, :3])


def masked(x, mask, _):
    return x.masked_fill(mask, 0)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVS)
def test_convolutions_agree_with_torch(name):
    torch.manual_seed(3)
    check(CONVS[name]())


@pytest.mark.parametrize("name", [name for name in CONVS if "same" not in name])
def test_convolutions_in_half_precision(name):
    torch.manual_seed(5)
    half_agrees(lambda cast: CONVS[name](cast=cast), torch.bfloat16, 0.05)


@pytest.mark.parametrize("name", MOVES)
def test_moves_and_reductions_agree_with_torch(name):
    torch.manual_seed(3)
    call = MOVES[name]()
    check(call, output=call.reference is None)


@pytest.mark.parametrize(("function", "args"), [(torch.amax, (1,)), (T.amin, ((0, 1),)), (torch.max, ()), (T.min, ())])
def test_an_extreme_that_is_reached_twice_is_shared_as_in_torch(function, args):
    torch.manual_seed(3)
    check(Call(function, (torch.tensor([[1.0, 3, 3, -1, -1], [2, 2, 2, 2, 3]], dtype=torch.float64), *args)))


def test_casts_return_to_the_dtype_they_came_from():
    layer, value = Call(T.float, (numbers(3),)).layer()
    assert value.dtype == torch.float32
    assert layer.vjp(value, ["input"])["input"].dtype == torch.float64
    assert layer.jvp({"input": numbers(3)}).dtype == torch.float32


@pytest.mark.parametrize("name", ["mean", "item of slices", "max along an axis", "avg_pool2d", "var", "chunk"])
def test_they_run_under_vmap(name):
    call = MOVES[name]()
    x = call.args[0]

    def both(x):
        layer, _ = Call(call.function, (x, *call.args[1:]), call.kwargs).layer()
        d = layer.jvp({"input": torch.ones_like(x)})
        return (dict(d) if isinstance(d, dict) else d), layer.vjp(d, ["input"])["input"]

    xs = torch.stack([x, 2 * x])
    found, expected = torch.func.vmap(both)(xs), [both(one) for one in xs]
    flat = [torch.utils._pytree.tree_leaves(e) for e in (found, *expected)]
    for both_of_them, first, second in zip(*flat, strict=True):
        torch.testing.assert_close(both_of_them, torch.stack([first, second]))


@pytest.mark.parametrize("lead", [(), (5,)])
@pytest.mark.parametrize("view", [lambda a: a, lambda a: a[:, 2], lambda a: a[1:3, 1:], lambda a: a[1].expand(2, 3)])
def test_a_view_of_a_write_shows_the_new_numbers_and_the_old_ones(view, lead):
    """``whole[1] = row``, seen through other views of the same memory."""
    whole, row = numbers(4, 3), numbers(3, seed=1)
    layer, old = Written(Node(0, "here", "active", Written, rule=Written)), view(whole).clone()

    def written(old, row):
        rows = torch.arange(4)[:, None] == 1
        return torch.where(view(rows.expand(4, 3)), view(row.expand(4, 3)), old)

    positions = torch.from_numpy(seen(geometry(view(whole)), geometry(whole[1])))
    layer.forward(written(old, row), positions, (3,))
    t = {"old": numbers(*lead, *old.shape, seed=2), "new": numbers(*lead, 3, seed=3)}
    d = numbers(*lead, *old.shape, seed=4)
    for names in (("old", "new"), ("new", "old"), ("old",), ("new",)):
        moved = {n: t[n] if n in names else torch.zeros_like(t[n]) for n in ("old", "new")}
        agree(layer.jvp({n: t[n] for n in names}), each_vector(written, lead, moved["old"], moved["new"]))
        pulled = dict(zip(("old", "new"), each_vector(torch.func.vjp(written, old, row)[1], lead, d), strict=True))
        found = layer.vjp(d, list(names))
        assert set(found) == set(names)
        for name in names:
            agree(found[name], pulled[name])
