"""Attention in tiles: forward pass, linear sweep and reverse sweep of T tangents, P never in memory.

With S = c Q Kᵀ + mask, P = softmax(S) = exp(S − lse), O = P V, for each head of each sample:

    jvp     S' = c (t_Q Kᵀ + Q t_Kᵀ)        t_O = (P∘(S' − ⟨P, S'⟩)) V + P t_V
    vjp     d_P = d Vᵀ, d_S = P∘(d_P − D), D = ⟨P, d_P⟩ = ⟨d, O⟩
            d_V = Pᵀ d        d_Q = c d_S K        d_K = c d_Sᵀ Q

A program holds a tile of queries and walks over tiles of keys, of which P is computed anew from lse, for GROUP tangents
at a time. Q is read once for all of them, K and V once for a group. Sums are float32; P and what comes of it are
rounded to V's dtype before a product.
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
):
    """c q kᵀ + mask, −∞ where a key is not seen: [queries, keys] float32."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    seen = (row < rows)[:, None] & (col < keys)[None, :]
    if CAUSAL:
        seen = seen & (col[None, :] <= row[:, None])
    if MASK is not None:
        at = n * MASK[0] + h * MASK[1] + row[:, None] * MASK[2] + col[None, :] * MASK[3]
        s += tl.load(mask + at, mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, s, -float("inf"))


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
        s = scores(queries, some, mask, scale, n, h, row, col, ROWS, KEYS, MASK, CAUSAL, PRECISION)
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


@triton.jit(do_not_specialize=["tangents"])
def push(
    q,
    k,
    v,
    mask,
    lse,
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
    T_Q: tl.constexpr,
    T_K: tl.constexpr,
    T_V: tl.constexpr,
    OUT: tl.constexpr,
    SIZES: tl.constexpr,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out[t] = (P∘(S' − ⟨P, S'⟩)) V + P t_v[t]; grid (samples × heads × tiles of queries).

    Pointers:
        q, k, v, mask, lse: as of `attend`.
        t_q, t_k, t_v: [tangents, *like q, k, v] by the strides q_t, k_t, v_t of tangents and T_Q, T_K, T_V, of q's
            type; those whose strides are None are zero.
        out: [tangents, *like q] by o_t and OUT.

    S' is centred by its mean over the first tile of keys, which is ⟨P, S'⟩ where that tile holds all: what is rounded
    for the product with V is then as small as it can be. Where there are more tiles, P V corrects for the rest.
    """
    HEADS: tl.constexpr = SIZES[0]
    ROWS: tl.constexpr = SIZES[1]
    KEYS: tl.constexpr = SIZES[2]
    WIDTH: tl.constexpr = SIZES[3]
    TILES: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    MOVED: tl.constexpr = T_Q is not None or T_K is not None
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
    norm = tl.load(lse + head * ROWS + row, mask=row < ROWS, other=float("inf"))
    for begin in range(0, tangents, GROUP):
        sums = ()
        moved = ()
        centres = ()
        rests = ()
        for t in tl.static_range(GROUP):
            sums = sums + (tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32),)  # noqa: RUF005 - Triton has no unpacking
            centres = centres + (tl.zeros((BLOCK_M,), dtype=tl.float32),)  # noqa: RUF005
            rests = rests + (tl.zeros((BLOCK_M,), dtype=tl.float32),)  # noqa: RUF005
            if T_Q is not None:
                there = tl.where(begin + t < tangents, ROWS, 0)
                moved = moved + (tile(t_q + (begin + t) * q_t, n, h, row, e, there, T_Q, WIDTH),)  # noqa: RUF005
        if MOVED and KEYS > BLOCK_N:
            plain = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
        for start in range(0, end, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)
            some_k = tile(k, n, h, col, e, KEYS, K, WIDTH)
            s = scores(queries, some_k, mask, scale, n, h, row, col, ROWS, KEYS, MASK, CAUSAL, PRECISION)
            p = tl.exp(s - norm[:, None])
            if MOVED:
                some_v = tile(v, n, h, col, e, KEYS, V, WIDTH)
                if KEYS > BLOCK_N:
                    plain = tl.dot(p.to(some_v.dtype), some_v, plain, input_precision=PRECISION)
                mass = tl.maximum(tl.sum(p, 1), 1e-30)
            grown = ()
            middles = ()
            lefts = ()
            for t in tl.static_range(GROUP):
                part = sums[t]
                centre = centres[t]
                rest = rests[t]
                there = tl.where(begin + t < tangents, KEYS, 0)
                if MOVED:
                    turn = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                    if T_Q is not None:
                        turn = tl.dot(moved[t], tl.trans(some_k), turn, input_precision=PRECISION)
                    if T_K is not None:
                        some = tile(t_k + (begin + t) * k_t, n, h, col, e, there, T_K, WIDTH)
                        turn = tl.dot(queries, tl.trans(some), turn, input_precision=PRECISION)
                    turn = turn * scale
                    centre = tl.where(start == 0, tl.sum(p * turn, 1) / mass, centre)
                    turn = p * (turn - centre[:, None])
                    if KEYS > BLOCK_N:
                        rest += tl.sum(turn, 1)
                    part = tl.dot(turn.to(some_v.dtype), some_v, part, input_precision=PRECISION)
                if T_V is not None:
                    some = tile(t_v + (begin + t) * v_t, n, h, col, e, there, T_V, WIDTH)
                    part = tl.dot(p.to(some.dtype), some, part, input_precision=PRECISION)
                grown = grown + (part,)  # noqa: RUF005
                middles = middles + (centre,)  # noqa: RUF005
                lefts = lefts + (rest,)  # noqa: RUF005
            sums = grown
            centres = middles
            rests = lefts
        for t in tl.static_range(GROUP):
            y = sums[t]
            if MOVED and KEYS > BLOCK_N:
                y -= rests[t][:, None] * plain
            at, ok = offsets(n, h, row, e, tl.where(begin + t < tangents, ROWS, 0), OUT, WIDTH)
            tl.store(out + (begin + t) * o_t + at, y, mask=ok)


@triton.jit(do_not_specialize=["tangents"])
def pull(
    q,
    k,
    v,
    mask,
    lse,
    o,
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
    O: tl.constexpr,
    D: tl.constexpr,
    D_Q: tl.constexpr,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    SIZES: tl.constexpr,
    CAUSAL: tl.constexpr,
    ALONG: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """d_q[t] = c d_S K, and d_k[t] = c d_Sᵀ Q and d_v[t] = Pᵀ d[t]; grid (samples × heads × tiles of queries).

    Pointers:
        q, k, v, mask, lse: as of `attend`.
        o: O, by O; read where one tile does not hold all keys.
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
    SIDES: tl.constexpr = D_Q is not None or D_K is not None
    head = tl.program_id(0) // TILES
    n = head // HEADS
    h = head % HEADS
    first = tl.program_id(0) % TILES * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    end = KEYS
    if CAUSAL and D_K is None and D_V is None:
        end = tl.minimum(KEYS, first + BLOCK_M)
    queries = tile(q, n, h, row, e, ROWS, Q, WIDTH)
    norm = tl.load(lse + head * ROWS + row, mask=row < ROWS, other=float("inf"))
    if O is not None:
        result = tile(o, n, h, row, e, ROWS, O, WIDTH).to(tl.float32)
    for begin in range(0, tangents, GROUP):
        sums = ()
        given = ()
        middles = ()
        for t in tl.static_range(GROUP):
            there = tl.where(begin + t < tangents, ROWS, 0)
            one = tile(d + (begin + t) * d_t, n, h, row, e, there, D, WIDTH)
            given = given + (one,)  # noqa: RUF005 - Triton has no unpacking
            middle = tl.zeros((BLOCK_M,), dtype=tl.float32)
            if O is not None:
                middle = tl.sum(one.to(tl.float32) * result, 1)
            middles = middles + (middle,)  # noqa: RUF005
            if D_Q is not None:
                sums = sums + (tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32),)  # noqa: RUF005
            if ALONG:
                place = ((begin + t) * (tl.num_programs(0) // TILES) + head) * ROWS + row
                tl.store(along + place, middle, mask=row < there)
        for start in range(0, end, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)
            some_k = tile(k, n, h, col, e, KEYS, K, WIDTH)
            s = scores(queries, some_k, mask, scale, n, h, row, col, ROWS, KEYS, MASK, CAUSAL, PRECISION)
            p = tl.exp(s - norm[:, None])
            if SIDES:
                some_v = tile(v, n, h, col, e, KEYS, V, WIDTH)
            grown = ()
            for t in tl.static_range(GROUP):
                there = tl.where(begin + t < tangents, KEYS, 0)
                if D_V is not None:
                    back = tl.dot(tl.trans(p.to(given[t].dtype)), given[t], input_precision=PRECISION)
                    at, ok = offsets(n, h, col, e, there, D_V, WIDTH)
                    tl.store(d_v + (begin + t) * v_t + at, back, mask=ok)
                if SIDES:
                    turn = tl.dot(given[t], tl.trans(some_v), input_precision=PRECISION)
                    middle = middles[t]
                    if O is None:
                        middle = tl.sum(p * turn, 1)
                    turn = (p * (turn - middle[:, None]) * scale).to(some_v.dtype)
                    if D_K is not None:
                        back = tl.dot(tl.trans(turn), queries, input_precision=PRECISION)
                        at, ok = offsets(n, h, col, e, there, D_K, WIDTH)
                        tl.store(d_k + (begin + t) * k_t + at, back, mask=ok)
                    if D_Q is not None:
                        grown = grown + (tl.dot(turn, some_k, sums[t], input_precision=PRECISION),)  # noqa: RUF005
            sums = grown
        if D_Q is not None:
            for t in tl.static_range(GROUP):
                at, ok = offsets(n, h, row, e, tl.where(begin + t < tangents, ROWS, 0), D_Q, WIDTH)
                tl.store(d_q + (begin + t) * q_t + at, sums[t], mask=ok)


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
    some_k = tile(k, n, h, col, e, KEYS, K, WIDTH)
    some_v = tile(v, n, h, col, e, KEYS, V, WIDTH)
    for t in range(tangents):
        sums_k = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
        sums_v = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
        for start in range(begin, ROWS, BLOCK_N):
            row = start + tl.arange(0, BLOCK_N)
            queries = tile(q, n, h, row, e, ROWS, Q, WIDTH)
            norm = tl.load(lse + head * ROWS + row, mask=row < ROWS, other=float("inf"))
            s = scores(queries, some_k, mask, scale, n, h, row, col, ROWS, KEYS, MASK, CAUSAL, PRECISION)
            p = tl.exp(s - norm[:, None])
            one = tile(d + t * d_t, n, h, row, e, ROWS, D, WIDTH)
            if D_V is not None:
                sums_v = tl.dot(tl.trans(p.to(one.dtype)), one, sums_v, input_precision=PRECISION)
            if D_K is not None:
                place = (t * (tl.num_programs(0) // TILES) + head) * ROWS + row
                middle = tl.load(along + place, mask=row < ROWS, other=0.0)
                turn = tl.dot(one, tl.trans(some_v), input_precision=PRECISION)
                turn = (p * (turn - middle[:, None]) * scale).to(some_v.dtype)
                sums_k = tl.dot(tl.trans(turn), queries, sums_k, input_precision=PRECISION)
        if D_K is not None:
            at, ok = offsets(n, h, col, e, KEYS, D_K, WIDTH)
            tl.store(d_k + t * k_t + at, sums_k, mask=ok)
        if D_V is not None:
            at, ok = offsets(n, h, col, e, KEYS, D_V, WIDTH)
            tl.store(d_v + t * v_t + at, sums_v, mask=ok)
