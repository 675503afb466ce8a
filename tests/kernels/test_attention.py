"""Attention in all directions, against float64."""

import math

import pytest
import torch

from ibp_triton.kernels import tiles
from ibp_triton.kernels.attentions import WIDEST, attention, attention_jvp, attention_vjp, fits
from ibp_triton.kernels.launcher import recording
from ibp_triton.kernels.workbench.cases import allowing_tf32
from tests.kernels.support import ACCUMULATED, DTYPES, randn, unchanged

# queries, keys, numbers of a head, a chip whose tiles are taken: those of gfx1100 are small, so that there are many
SHAPES = [
    (1, 1, 8, "sm_90"),
    (7, 7, 24, "sm_90"),
    (65, 65, 24, "sm_90"),
    (33, 40, 16, "gfx1100"),
    (40, 17, 20, "gfx1100"),
]
CASES = [
    (*SHAPES[1], torch.float32, False, False, 5),
    (*SHAPES[1], torch.bfloat16, True, True, 1),
    (*SHAPES[2], torch.float32, True, False, 1),
    (*SHAPES[2], torch.bfloat16, False, True, 1),
    (*SHAPES[2], torch.float16, False, False, 5),
    *[(*shape, torch.float32, False, False, 1) for shape in (SHAPES[0], SHAPES[3])],
    (*SHAPES[3], torch.float32, True, True, 2),
    (*SHAPES[3], torch.bfloat16, False, True, 2),
    (*SHAPES[4], torch.float32, True, False, 1),
    (*SHAPES[4], torch.float32, False, True, 2),
    (*SHAPES[4], torch.float16, True, False, 1),
]


def packed(queries, keys, width, dtype=torch.float32):
    """q, k and v of two samples and two heads as multi-head attention has them: parts of one projection each."""
    wide, across = randn(2, queries, 3, 2, width, dtype=dtype), randn(keys, 2, 3, 2, width, dtype=dtype)
    return wide[:, :, 0].transpose(1, 2), *(across[:, :, i].permute(1, 2, 0, 3) for i in (1, 2))


def exact(q, k, v, mask, scale, causal):
    """P and O by the definition; zeros for a query that sees nothing."""
    scores = scale * q @ k.mT
    scores = scores if mask is None else scores + mask
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    P = torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0)
    return P, P @ v


def assert_close(actual, expected, dtype, summed):
    """Half an epsilon of the result and, in half precision, of each weight of its sum; and what float32 sums lose.

    `summed` is the sum of the products' magnitudes, of which one side is rounded to the dtype.
    """
    assert actual.shape == expected.shape
    eps = torch.finfo(dtype).eps * 0.51
    bound = eps * expected.abs() + (0 if dtype == torch.float32 else eps) * summed
    excess = ((actual.double() - expected).abs() - bound).max()
    rms = expected.square().mean().sqrt()
    assert excess <= ACCUMULATED * rms + torch.finfo(dtype).tiny, f"error {excess:.3g} over its bound, RMS {rms:.3g}"


@pytest.mark.parametrize(("queries", "keys", "width", "chip", "dtype", "causal", "masked", "tangents"), CASES)
def test_forward_and_sweeps(queries, keys, width, chip, dtype, causal, masked, tangents):
    q, k, v = (x if queries < 9 else x[:, 1:] for x in packed(queries, keys, width, dtype))
    heads = q.shape[1]
    t = [torch.stack([randn(*x.shape, dtype=dtype) for _ in range(tangents)]) for x in (q, k, v)]
    d = randn(tangents, *q.shape, dtype=dtype)
    mask = (
        randn(heads, queries, keys).masked_fill(torch.rand(heads, queries, keys) < 0.2, -torch.inf) if masked else None
    )
    mask = None if mask is None else mask.to(dtype).expand(2, heads, queries, keys)
    settings = {"scale": 0.3, "causal": causal}
    with tiles.on_chip(chip), unchanged(q, k, v, *t, d):
        out, lse = attention(q, k, v, mask, **settings)
        with recording() as launches:
            forth = attention_jvp(t, q, k, v, out, lse, mask, **settings)
        back = attention_vjp(d, q, k, v, out, lse, mask, **settings)
    Q, K, V, D = (x.double() for x in (q, k, v, d))

    def function(q, k, v):
        return exact(q, k, v, None if mask is None else mask.double(), 0.3, causal)

    P, result = function(Q, K, V)
    assert_close(out, result, dtype, P @ V.abs())
    assert out.stride() == torch.empty_like(q).stride()
    assert torch.equal(lse.isinf(), P.sum(-1) == 0)

    for n in range(tangents):
        T = [x[n].double() for x in t]
        moved = torch.func.jvp(function, (Q, K, V), tuple(T))[1][1]
        turn, away = centred(P, 0.3 * (T[0] @ K.mT + Q @ T[1].mT), launches[0].arguments["BLOCK_N"])
        assert_close(forth[n], moved, dtype, turn.abs() @ V.abs() + P @ T[2].abs() + away.abs() * result.abs())

        pulled = torch.func.vjp(lambda *x: function(*x)[1], Q, K, V)[1](D[n])
        turn = P * (D[n] @ V.mT - (D[n] * result).sum(-1, keepdim=True))
        turn = 0.3 * (turn.abs() + P * (D[n] * result).abs().sum(-1, keepdim=True))  # O is rounded, too
        sums = (turn @ K.abs(), turn.mT @ Q.abs(), P.mT @ D[n].abs())
        for found, expected, summed in zip(back, pulled, sums, strict=True):
            assert_close(found[n], expected, dtype, summed)


def centred(P, turn, block):
    """P∘(S' − m) with m the mean of S' over the first tile of keys, and ⟨P, S'⟩ − m, by which O corrects it."""
    first = P[..., :block].sum(-1, keepdim=True).clamp_min(1e-30)
    middle = (P * turn)[..., :block].sum(-1, keepdim=True) / first
    return P * (turn - middle), (P * (turn - middle)).sum(-1, keepdim=True)


@pytest.mark.parametrize("chip", ["sm_90", "gfx1100"])
def test_any_tangents_and_any_derivatives(chip):
    q, k, v = (x[:1, :1] for x in packed(33, 20, 12))
    t, d = [randn(2, *x.shape) for x in (q, k, v)], randn(2, *q.shape)
    with tiles.on_chip(chip):
        out, lse = attention(q, k, v, scale=0.3)
        whole = attention_jvp(t, q, k, v, out, lse, scale=0.3)
        parts = [
            attention_jvp([x if i == j else None for j, x in enumerate(t)], q, k, v, out, lse, scale=0.3)
            for i in range(3)
        ]
        all_three = attention_vjp(d, q, k, v, out, lse, scale=0.3)
        for wanted in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)):
            some = attention_vjp(d, q, k, v, out, lse, scale=0.3, wanted=[bool(w) for w in wanted])
            for one, other, want in zip(some, all_three, wanted, strict=True):
                assert torch.equal(one, other) if want else one is None
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_offset_of_all_scores_tangents_does_no_harm(dtype):
    """t_Q along a direction that all keys share moves all scores alike: S' is centred before it is rounded."""
    q, k, v = packed(9, 50, 16)
    k, t_q = k + 4, torch.full((1, *q.shape), 8.0)
    q, k, v, t_q = (x.to(dtype) for x in (q, k, v, t_q))
    out, lse = attention(q, k, v, scale=0.25)
    found = attention_jvp([t_q, None, None], q, k, v, out, lse, scale=0.25)[0]

    def function(q):
        return exact(q, k.double(), v.double(), None, 0.25, False)

    turn, moved = torch.func.jvp(function, (q.double(),), (t_q[0].double(),))[1]
    assert (0.25 * t_q[0].double() @ k.double().mT).mean() > 100
    assert_close(found, moved, dtype, turn.abs() @ v.double().abs() + 10 * ACCUMULATED * 100)


def test_queries_that_see_nothing_and_large_scores():
    q, k, v = packed(5, 7, 8)
    q = 100 * q
    mask = torch.zeros(2, 2, 5, 7)
    mask[:, :, 2] = -torch.inf
    mask[:, :, 3, 1:] = -torch.inf
    out, lse = attention(q, k, v, mask, scale=10.0)
    assert_close(out, exact(q.double(), k.double(), v.double(), mask.double(), 10.0, False)[1], torch.float32, 0)
    assert torch.equal(out[:, :, 2], torch.zeros(2, 2, 8))
    assert torch.equal(out[:, :, 3], v[:, :, 0])
    assert (lse[:, :, 2] == torch.inf).all()
    d = randn(1, *q.shape)
    d_q, d_k, d_v = attention_vjp(d, q, k, v, out, lse, mask, scale=10.0)
    moved = attention_jvp([q[None], k[None], v[None]], q, k, v, out, lse, mask, scale=10.0)
    for row in (d_q, moved):
        assert torch.equal(row[:, :, :, 2], torch.zeros(1, 2, 2, 8))
    assert d_k.isfinite().all()
    assert d_v.isfinite().all()


def test_without_samples_or_tangents():
    q, k, v = (x[:0] for x in packed(5, 5, 8))
    out, lse = attention(q, k, v, scale=1.0)
    assert (out.shape, lse.shape) == ((0, 2, 5, 8), (0, 2, 5))
    assert attention_jvp([None, None, v[None]], q, k, v, out, lse, scale=1.0).shape == (1, 0, 2, 5, 8)
    q, k, v = packed(5, 5, 8)
    out, lse = attention(q, k, v, scale=1.0)
    none = q.new_empty(0, *q.shape)
    assert attention_jvp([none, None, None], q, k, v, out, lse, scale=1.0).shape == none.shape
    assert [part.shape for part in attention_vjp(none, q, k, v, out, lse, scale=1.0)] == [none.shape] * 3


def test_a_tile_that_holds_all_keys_is_read_once_for_all_tangents(instruments):
    q, k, v = (x.contiguous() for x in packed(33, 60, 24))
    out, lse = attention(q, k, v, scale=0.3)
    for tangents in (1, 5):
        attention_jvp([randn(tangents, *x.shape) for x in (q, k, v)], q, k, v, out, lse, scale=0.3)
        attention_vjp(randn(tangents, *q.shape), q, k, v, out, lse, scale=0.3)
    sweeps = instruments[1:]
    assert [seen.kernel for seen in sweeps] == ["push", "pull"] * 2
    for seen in sweeps:
        through = {name: part.loaded for names, part in seen.traffic.items() for name in names.split("=")}
        assert [through[name] for name in "qkv"] == [4 * x.numel() for x in (q, k, v)]


def sweeps(tokens, width, tangents, dtype, chip="sm_90"):
    """Launches of a layer as in a ViT, none of them run: forward, linear sweep, reverse."""
    x = torch.zeros(4, tokens, 3, 3, width, dtype=dtype)
    q, k, v = (x[:, :, i].transpose(1, 2) for i in range(3))
    t = [torch.zeros(tangents, *side.shape, dtype=dtype) for side in (q, k, v)]
    with tiles.on_chip(chip), recording(execute=False) as launches:
        out, lse = attention(q, k, v, scale=0.1)
        attention_jvp(t, q, k, v, out, lse, scale=0.1)
        attention_vjp(t[0], q, k, v, out, lse, scale=0.1)
    return launches


def ratios(tokens, width, tangents, dtype, chip="sm_90"):
    """Bytes moved over those of Q, K, V, lse, what is swept and what is made, each once (test_cost: as counted)."""
    launches = sweeps(tokens, width, tangents, dtype, chip)
    side = 4 * 3 * tokens * width * dtype.itemsize
    lse = 4 * 4 * 3 * tokens
    needed = {
        "attend": 4 * side + lse,
        "push": (3 + 4 * tangents) * side + lse,
        "pull": (3 + 4 * tangents) * side + lse,
    }
    moved = dict.fromkeys(needed, 0)
    for launch in launches:
        moved[launch.name.removesuffix("_keys")] += launch.cost.loaded + launch.cost.stored
    return {name: moved[name] / needed[name] for name in needed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(49, 32), (64, 64), (50, 24)])
def test_up_to_64_tokens_move_what_is_needed(tokens, width, dtype):
    for tangents in (1, 5):
        assert set(ratios(tokens, width, tangents, dtype).values()) == {1.0}
        assert len(sweeps(tokens, width, tangents, dtype)) == 3


@pytest.mark.parametrize(("tokens", "width"), [(196, 64), (197, 64), (196, 32), (256, 32)])
def test_up_to_256_tokens_move_a_little_more(tokens, width):
    """One tile of queries on matrix units; O is read as well, by each tangent, as K and V are."""
    one, five = (ratios(tokens, width, n, torch.bfloat16) for n in (1, 5))
    assert one["attend"] == five["attend"] == 1
    assert max(one.values()) <= 1.15
    assert max(five.values()) == pytest.approx((3 + 20 + 13) / 23, abs=0.01)
    assert len(sweeps(tokens, width, 1, torch.bfloat16)) == 3


def test_products_follow_torchs_precision():
    q, k, v = packed(5, 5, 8)
    for allowed, precision in ((True, "tf32"), (False, "ieee")):
        with allowing_tf32(allowed), recording() as launches:
            attention(q, k, v, scale=1.0)
        assert launches[0].arguments["PRECISION"] == precision


def test_what_is_rejected():
    q, k, v = packed(5, 7, 8)
    out, lse = attention(q, k, v, scale=1.0)
    with pytest.raises(ValueError, match=r"must be \[N, H, L, E\]"):
        attention(q.double(), k.double(), v.double(), scale=1.0)
    with pytest.raises(ValueError, match="at most 128"):
        attention(*[torch.zeros(1, 1, 2, WIDEST + 1)] * 3, scale=1.0)
    with pytest.raises(ValueError, match=r"must be \[N, H, L, E\]"):
        attention(q, k, v[..., :4], scale=1.0)
    with pytest.raises(ValueError, match="side by side"):
        attention(q, k.mT.contiguous().mT, v, scale=1.0)
    with pytest.raises(ValueError, match="the mask"):
        attention(q, k, v, torch.zeros(5, 7), scale=1.0)
    with pytest.raises(ValueError, match="the mask"):
        attention(q, k, v, torch.ones(2, 2, 5, 7, dtype=torch.bool), scale=1.0)
    with pytest.raises(ValueError, match="lse"):
        attention_vjp(q[None], q, k, v, out, lse[0], scale=1.0)
    with pytest.raises(ValueError, match="derivatives and tangents"):
        attention_vjp(q, q, k, v, out, lse, scale=1.0)
    with pytest.raises(ValueError, match="derivatives and tangents"):
        attention_jvp([q[None], v[None].bfloat16(), None], q, k, v, out, lse, scale=1.0)
    with pytest.raises(ValueError, match=r"as many on all sides: \[1, 2\]"):
        attention_jvp([q[None], torch.stack([k, k]), None], q, k, v, out, lse, scale=1.0)
    with pytest.raises(ValueError, match=r"needs a tangent, .*: \[\]"):
        attention_jvp([None] * 3, q, k, v, out, lse, scale=1.0)
    assert not fits(q, k[:1], v[:1])
    assert not fits(q.double(), k.double(), v.double())
    assert math.isclose(float(lse[0, 0, 0].exp()), float((q[0, 0, 0] @ k[0, 0].mT).exp().sum()), rel_tol=1e-5)
