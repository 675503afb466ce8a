"""Attention's sweeps of T tangents in tiles: linear and reverse, P computed anew from lse.

    jvp     S' = c (t_Q Kᵀ + Q t_Kᵀ)        t_O = (P∘(S' − ⟨P, S'⟩)) V + P t_V
    vjp     d_P = d Vᵀ, d_S = P∘(d_P − D), D = ⟨P, d_P⟩ = ⟨d, O⟩
            d_V = Pᵀ d        d_Q = c d_S K        d_K = c d_Sᵀ Q

Where one tile holds all keys, Q, K, V and P are there once for all tangents, else each tangent walks by itself. Sums
are float32; P and what comes of it are rounded to V's dtype before a product. A barrier stands behind the loads of a
step: what its products read from shared memory may then be read where it is used, and need not wait in registers for
the barrier of the next.
"""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import triton
import triton.language as tl

from ibp_triton.kernels.attention_tiles import offsets, tile, weights


@triton.jit(do_not_specialize=["tangents"])
def push(
    q,
    k,
    v,
    mask,
    lse,
    result,
    t_q,
    t_k,
    t_v,
    out,
    scale,
    tangents,
    q_t,
    k_t,
    v_t,
    o_t,
    Q: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    MASK: tl.constexpr,
    RESULT: tl.constexpr,
    T_Q: tl.constexpr,
    T_K: tl.constexpr,
    T_V: tl.constexpr,
    OUT: tl.constexpr,
    SIZES: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out[t] = (P∘(S' − ⟨P, S'⟩)) V + P t_v[t]; grid (samples × heads × tiles of queries).

    Pointers:
        q, k, v, mask, lse: as of `attend`.
        result: O, by RESULT; read where one tile does not hold all keys.
        t_q, t_k, t_v: [tangents, *like q, k, v] by the strides q_t, k_t, v_t of tangents and T_Q, T_K, T_V, of q's
            type; those whose strides are None are zero.
        out: [tangents, *like q] by o_t and OUT.

    S' is centred by its mean over the first tile of keys, which is ⟨P, S'⟩ where that tile holds all: what is rounded
    for the product with V is then as small as it can be. Where there are more tiles, O corrects for the rest.
    FLIPPED: so that P takes no operand in the form in which the sweep's products take it, or both stay in registers.
    """
    HEADS: tl.constexpr = SIZES[0]
    ROWS: tl.constexpr = SIZES[1]
    KEYS: tl.constexpr = SIZES[2]
    WIDTH: tl.constexpr = SIZES[3]
    TILES: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    ONE: tl.constexpr = KEYS <= BLOCK_N
    FLIPPED: tl.constexpr = BLOCK_M <= BLOCK_N
    MOVED: tl.constexpr = T_Q is not None or T_K is not None
    head = tl.program_id(0) // TILES
    n = head // HEADS
    h = head % HEADS
    first = tl.program_id(0) % TILES * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    col = tl.arange(0, BLOCK_N)
    end = KEYS
    if CAUSAL and not ONE:
        end = tl.minimum(KEYS, first + BLOCK_M)
    queries = tile(q, n, h, row, e, ROWS, Q, WIDTH)
    norm = tl.load(lse + head * ROWS + row, mask=row < ROWS, other=float("inf"))
    if ONE:
        keys = tile(k, n, h, col, e, KEYS, K, WIDTH)
        p = weights(queries, keys, mask, norm, scale, n, h, row, col, ROWS, KEYS, MASK, CAUSAL, PRECISION, FLIPPED)
        if MOVED:
            values = tile(v, n, h, col, e, KEYS, V, WIDTH)
    for t in range(tangents):
        sums = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
        if MOVED and not ONE:
            centre = tl.zeros((BLOCK_M,), dtype=tl.float32)
            rest = tl.zeros((BLOCK_M,), dtype=tl.float32)
        if T_Q is not None:
            moved = tile(t_q + t * q_t, n, h, row, e, ROWS, T_Q, WIDTH)
        for start in range(0, end, BLOCK_N):
            if not ONE:
                col = start + tl.arange(0, BLOCK_N)
                keys = tile(k, n, h, col, e, KEYS, K, WIDTH)
                if MOVED:
                    values = tile(v, n, h, col, e, KEYS, V, WIDTH)
            if T_K is not None:
                t_keys = tl.trans(tile(t_k + t * k_t, n, h, col, e, KEYS, T_K, WIDTH))
            if T_V is not None:
                t_values = tile(t_v + t * v_t, n, h, col, e, KEYS, T_V, WIDTH)
            if not ONE:
                p = weights(
                    queries, keys, mask, norm, scale, n, h, row, col, ROWS, KEYS, MASK, CAUSAL, PRECISION, FLIPPED
                )
            else:
                tl.debug_barrier()
            if MOVED:
                turn = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                if T_Q is not None:
                    turn = tl.dot(moved, tl.trans(keys), turn, input_precision=PRECISION)
                if T_K is not None:
                    turn = tl.dot(queries, t_keys, turn, input_precision=PRECISION)
                turn = turn * scale
                own = tl.sum(p * turn, 1) / tl.maximum(tl.sum(p, 1), 1e-30)
                if ONE:
                    turn = p * (turn - own[:, None])
                else:
                    centre = tl.where(start == 0, own, centre)
                    turn = p * (turn - centre[:, None])
                    rest += tl.sum(turn, 1)
                sums = tl.dot(turn.to(values.dtype), values, sums, input_precision=PRECISION)
            if T_V is not None:
                sums = tl.dot(p.to(t_values.dtype), t_values, sums, input_precision=PRECISION)
        if MOVED and not ONE:
            sums -= rest[:, None] * tile(result, n, h, row, e, ROWS, RESULT, WIDTH).to(tl.float32)
        at, ok = offsets(n, h, row, e, ROWS, OUT, WIDTH)
        tl.store(out + t * o_t + at, sums, mask=ok)


@triton.jit(do_not_specialize=["tangents"])
def pull(
    q,
    k,
    v,
    mask,
    lse,
    result,
    d,
    d_q,
    d_k,
    d_v,
    along,
    scale,
    tangents,
    d_t,
    q_t,
    k_t,
    v_t,
    Q: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    MASK: tl.constexpr,
    RESULT: tl.constexpr,
    D: tl.constexpr,
    D_Q: tl.constexpr,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    SIZES: tl.constexpr,
    CAUSAL: tl.constexpr,
    ALONG: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """d_q[t] = c d_S K, and d_k[t] = c d_Sᵀ Q and d_v[t] = Pᵀ d[t]; grid (samples × heads × tiles of queries).

    Pointers:
        q, k, v, mask, lse: as of `attend`.
        result: O, by RESULT; read where one tile does not hold all keys, and where ALONG.
        d: [tangents, *like q] by the strides d_t of tangents and D, of q's type.
        d_q: [tangents, *like q] by q_t and D_Q, as all that follow not written where these are None.
        d_k, d_v: [tangents, *like k] by k_t, D_K and v_t, D_V; only where one tile holds all queries.
        along: D, [tangents, samples, heads, L] float32, contiguous; written where ALONG, for `pull_keys`.
    """
    HEADS: tl.constexpr = SIZES[0]
    ROWS: tl.constexpr = SIZES[1]
    KEYS: tl.constexpr = SIZES[2]
    WIDTH: tl.constexpr = SIZES[3]
    TILES: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    ONE: tl.constexpr = KEYS <= BLOCK_N
    SIDES: tl.constexpr = D_Q is not None or D_K is not None
    head = tl.program_id(0) // TILES
    n = head // HEADS
    h = head % HEADS
    first = tl.program_id(0) % TILES * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    col = tl.arange(0, BLOCK_N)
    end = KEYS
    if CAUSAL and TILES > 1 and not ONE:
        end = tl.minimum(KEYS, first + BLOCK_M)
    queries = tile(q, n, h, row, e, ROWS, Q, WIDTH)
    norm = tl.load(lse + head * ROWS + row, mask=row < ROWS, other=float("inf"))
    if ONE:
        keys = tile(k, n, h, col, e, KEYS, K, WIDTH)
        p = weights(queries, keys, mask, norm, scale, n, h, row, col, ROWS, KEYS, MASK, CAUSAL, PRECISION)
        if SIDES:
            values = tl.trans(tile(v, n, h, col, e, KEYS, V, WIDTH))
    for t in range(tangents):
        one = tile(d + t * d_t, n, h, row, e, ROWS, D, WIDTH)
        if RESULT is not None:
            middle = tl.sum(one.to(tl.float32) * tile(result, n, h, row, e, ROWS, RESULT, WIDTH).to(tl.float32), 1)
        if ALONG:
            place = (t * (tl.num_programs(0) // TILES) + head) * ROWS + row
            tl.store(along + place, middle, mask=row < ROWS)
        if D_Q is not None:
            sums = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
        for start in range(0, end, BLOCK_N):
            if not ONE:
                col = start + tl.arange(0, BLOCK_N)
                keys = tile(k, n, h, col, e, KEYS, K, WIDTH)
                if SIDES:
                    values = tl.trans(tile(v, n, h, col, e, KEYS, V, WIDTH))
                p = weights(queries, keys, mask, norm, scale, n, h, row, col, ROWS, KEYS, MASK, CAUSAL, PRECISION)
            if D_V is not None:
                back = tl.dot(tl.trans(p.to(one.dtype)), one, input_precision=PRECISION)
                at, ok = offsets(n, h, col, e, KEYS, D_V, WIDTH)
                tl.store(d_v + t * v_t + at, back, mask=ok)
            if SIDES:
                turn = tl.dot(one, values, input_precision=PRECISION)
                if RESULT is None:
                    middle = tl.sum(p * turn, 1)
                turn = (p * (turn - middle[:, None]) * scale).to(keys.dtype)
                if D_K is not None:
                    back = tl.dot(tl.trans(turn), queries, input_precision=PRECISION)
                    at, ok = offsets(n, h, col, e, KEYS, D_K, WIDTH)
                    tl.store(d_k + t * k_t + at, back, mask=ok)
                if D_Q is not None:
                    sums = tl.dot(turn, keys, sums, input_precision=PRECISION)
        if D_Q is not None:
            at, ok = offsets(n, h, row, e, ROWS, D_Q, WIDTH)
            tl.store(d_q + t * q_t + at, sums, mask=ok)


@triton.jit(do_not_specialize=["tangents"])
def pull_keys(
    q,
    k,
    v,
    mask,
    lse,
    along,
    d,
    d_k,
    d_v,
    scale,
    tangents,
    d_t,
    k_t,
    v_t,
    Q: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    MASK: tl.constexpr,
    D: tl.constexpr,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    SIZES: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """d_k[t] = c d_Sᵀ Q and d_v[t] = Pᵀ d[t], each over all queries; grid (samples × heads × tiles of BLOCK_M keys).

    Pointers as of `pull`; along is read. A program holds a tile of keys and walks over tiles of BLOCK_N queries.
    """
    HEADS: tl.constexpr = SIZES[0]
    ROWS: tl.constexpr = SIZES[1]
    KEYS: tl.constexpr = SIZES[2]
    WIDTH: tl.constexpr = SIZES[3]
    TILES: tl.constexpr = (KEYS + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) // TILES
    n = head // HEADS
    h = head % HEADS
    first = tl.program_id(0) % TILES * BLOCK_M
    col = first + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    begin = 0
    if CAUSAL:
        begin = first // BLOCK_N * BLOCK_N
    keys = tile(k, n, h, col, e, KEYS, K, WIDTH)
    if D_K is not None:
        values = tile(v, n, h, col, e, KEYS, V, WIDTH)
    for t in range(tangents):
        sums_k = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
        sums_v = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
        for start in range(begin, ROWS, BLOCK_N):
            row = start + tl.arange(0, BLOCK_N)
            queries = tile(q, n, h, row, e, ROWS, Q, WIDTH)
            norm = tl.load(lse + head * ROWS + row, mask=row < ROWS, other=float("inf"))
            p = weights(queries, keys, mask, norm, scale, n, h, row, col, ROWS, KEYS, MASK, CAUSAL, PRECISION)
            one = tile(d + t * d_t, n, h, row, e, ROWS, D, WIDTH)
            if D_V is not None:
                sums_v = tl.dot(tl.trans(p.to(one.dtype)), one, sums_v, input_precision=PRECISION)
            if D_K is not None:
                place = (t * (tl.num_programs(0) // TILES) + head) * ROWS + row
                middle = tl.load(along + place, mask=row < ROWS, other=0.0)
                turn = tl.dot(one, tl.trans(values), input_precision=PRECISION)
                turn = (p * (turn - middle[:, None]) * scale).to(values.dtype)
                sums_k = tl.dot(tl.trans(turn), queries, sums_k, input_precision=PRECISION)
        if D_K is not None:
            at, ok = offsets(n, h, col, e, KEYS, D_K, WIDTH)
            tl.store(d_k + t * k_t + at, sums_k, mask=ok)
        if D_V is not None:
            at, ok = offsets(n, h, col, e, KEYS, D_V, WIDTH)
            tl.store(d_v + t * v_t + at, sums_v, mask=ok)
