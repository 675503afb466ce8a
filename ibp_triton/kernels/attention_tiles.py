"""Attention in tiles: the forward pass, and what its sweeps share with it; P never in memory.

With S = c Q Kᵀ + mask: P = softmax(S) = exp(S − lse), O = P V, for each head of each sample. A program holds a tile of
queries and walks over tiles of keys. Sums are float32; P is rounded to V's dtype before a product.
"""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def offsets(n, h, row, e, count, VIEW: tl.constexpr, WIDTH: tl.constexpr):
    """Where rows of one head lie by VIEW, the strides of sample, head and row; and which of the numbers are there."""
    at = n * VIEW[0] + h * VIEW[1] + row[:, None] * VIEW[2] + e[None, :]
    return at, (row < count)[:, None] & (e < WIDTH)[None, :]


@triton.jit
def tile(x, n, h, row, e, count, VIEW: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of one head, [rows, E], zero where there is nothing."""
    at, ok = offsets(n, h, row, e, count, VIEW, WIDTH)
    return tl.load(x + at, mask=ok, other=0.0)


@triton.jit
def scores(
    q,
    k,
    mask,
    scale,
    n,
    h,
    row,
    col,
    rows,
    keys,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    FLIPPED: tl.constexpr,
):
    """c q kᵀ + mask, −∞ where a key is not seen: [queries, keys] float32; FLIPPED as (k qᵀ)ᵀ."""
    if FLIPPED:
        across = tl.trans(q)
        tl.debug_barrier()
        s = tl.trans(tl.dot(k, across, input_precision=PRECISION)) * scale
    else:
        across = tl.trans(k)
        tl.debug_barrier()
        s = tl.dot(q, across, input_precision=PRECISION) * scale
    seen = (row < rows)[:, None] & (col < keys)[None, :]
    if CAUSAL:
        seen = seen & (col[None, :] <= row[:, None])
    if MASK is not None:
        at = n * MASK[0] + h * MASK[1] + row[:, None] * MASK[2] + col[None, :] * MASK[3]
        s += tl.load(mask + at, mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, s, -float("inf"))


@triton.jit
def weights(
    q,
    k,
    mask,
    lse,
    scale,
    n,
    h,
    row,
    col,
    rows,
    keys,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    FLIPPED: tl.constexpr = False,
):
    """P of a tile, anew: [queries, keys] float32."""
    s = scores(q, k, mask, scale, n, h, row, col, rows, keys, MASK, CAUSAL, PRECISION, FLIPPED)
    return tl.exp(s - lse[:, None])


@triton.jit
def attend(
    q,
    k,
    v,
    mask,
    out,
    lse,
    scale,
    Q: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    MASK: tl.constexpr,
    OUT: tl.constexpr,
    SIZES: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out = softmax(c Q Kᵀ + mask) V, lse = ln Σ exp(S) of each query; grid (samples × heads × tiles of queries).

    Pointers:
        q, out: [samples, heads, L, E] by the strides Q, OUT of sample, head and row; any float type.
        k, v: [samples, heads, S, E] by K, V; of q's type.
        mask: [samples, heads, L, S] by the four strides MASK, any float type, added to the scores; None: there is none.
        lse: [samples, heads, L] float32, contiguous; +∞ for a query that sees no key, whose out is zero.

    SIZES is (heads, L, S, E). With CAUSAL a query sees no key of a higher index.
    """
    HEADS: tl.constexpr = SIZES[0]
    ROWS: tl.constexpr = SIZES[1]
    KEYS: tl.constexpr = SIZES[2]
    WIDTH: tl.constexpr = SIZES[3]
    TILES: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) // TILES
    n = head // HEADS
    h = head % HEADS
    first = tl.program_id(0) % TILES * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    end = KEYS
    if CAUSAL:
        end = tl.minimum(KEYS, first + BLOCK_M)
    queries = tile(q, n, h, row, e, ROWS, Q, WIDTH)
    top = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
    for start in range(0, end, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        some = tile(k, n, h, col, e, KEYS, K, WIDTH)
        s = scores(queries, some, mask, scale, n, h, row, col, ROWS, KEYS, MASK, CAUSAL, PRECISION, False)
        higher = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp(s - finite[:, None])
        shrink = tl.exp(top - finite)
        total = total * shrink + tl.sum(p, 1)
        some = tile(v, n, h, col, e, KEYS, V, WIDTH)
        sums = tl.dot(p.to(some.dtype), some, sums * shrink[:, None], input_precision=PRECISION)
        top = higher
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    at, ok = offsets(n, h, row, e, ROWS, OUT, WIDTH)
    tl.store(out + at, sums / total[:, None], mask=ok)
    tl.store(lse + head * ROWS + row, tl.where(blind, float("inf"), top + tl.log(total)), mask=row < ROWS)
