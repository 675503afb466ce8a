"""Layer, RMS, group and instance normalisation: forward pass, both sweeps of T tangents, γ's terms, the curvature.

One view serves all: [N, C, pixels] in groups of channels; layer and RMS norm are one group of one pixel. A group of one
sample is a row. A program takes some rows of one group, so that γ is read once for them, and x̂ once for all tangents.
With P(v) = v − mean(v) − x̂ mean(x̂ v), u = γ d, b = mean(x̂ u) and c = mean(x̂ t):

    vjp P(γ d)/s        jvp γ P(t)/s        γ's gradient Σ d x̂        its tangent term Σ r P(t)/s
    curvature −(P(b t + c u) + x̂ (mean(u t) − b c − mean(u) mean(t)))/s²

RMS norm has neither μ nor mean(v). Pixels of a row that is longer than a tile are walked in blocks, twice. Statistics
and sums are float32.

If REPLICATED the second axis of the grid is that of replicas: each tensor has it in front, without gaps, or is shared
where the number in its name's `_r` is 0 instead of 1.
"""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def row_sum(v):
    """[rows, pixels, channels] → [rows, 1, 1]."""
    return tl.sum(tl.sum(v, 2), 1)[:, None, None]


@triton.jit
def moments(v, ok, count, CENTRED: tl.constexpr):
    """The mean of each row where ok, 0 unless CENTRED, and the sum of squared deviations from it."""
    mean = tl.zeros((v.shape[0], 1, 1), dtype=tl.float32)
    if CENTRED:
        mean = row_sum(v) / count
    away = tl.where(ok, v - mean, 0.0)
    return mean, row_sum(away * away)


@triton.jit
def normal(x, at, ok, mean, rstd):
    """x̂; rubbish that is finite where not ok."""
    return (tl.load(x + at, mask=ok, other=0.0).to(tl.float32) - mean) * rstd


@triton.jit
def means(u, unit, count, CENTRED: tl.constexpr):
    """mean(u) of each row, 0 unless CENTRED, and mean(x̂ u)."""
    along = row_sum(unit * u) / count
    mean = tl.zeros_like(along)
    if CENTRED:
        mean = row_sum(u) / count
    return mean, along


@triton.jit
def parameter(pointer, channel, inside, READ: tl.constexpr):
    """γ or b of the channels as [1, 1, channels]; 1 if it is not read."""
    value = tl.full((1, 1, 1), 1.0, dtype=tl.float32)
    if READ:
        value = tl.load(pointer + channel, mask=inside, other=0.0).to(tl.float32)[None, None, :]
    return value


@triton.jit(do_not_specialize=["samples", "x_r", "weight_r", "bias_r"])
def normalise(
    x,
    weight,
    bias,
    out,
    statistics,
    samples,
    eps,
    x_r,
    weight_r,
    bias_r,
    VIEW: tl.constexpr,
    REPLICATED: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = γ (x − μ)/s + b with s² = mean((x − μ)²) + eps over each row, μ = 0 unless CENTRED.

    Grid (groups × parts, replicas).

    Pointers:
        x, out: [samples, C, pixels] by VIEW's strides; any float type.
        weight, bias: [C], any float type; read when WEIGHT, BIAS.
        statistics: [1 or 2, samples, groups] float32: 1/s, and μ when CENTRED.

    VIEW is (groups, channels of a group, pixels, strides of sample, channel and pixel). Means of blocks are merged with
    their squared deviations, so that an offset does no harm.
    """
    GROUPS: tl.constexpr = VIEW[0]
    WIDTH: tl.constexpr = VIEW[1]
    PIXELS: tl.constexpr = VIEW[2]
    group = tl.program_id(0) % GROUPS
    part = tl.program_id(0) // GROUPS
    parts = tl.num_programs(0) // GROUPS
    if REPLICATED:
        replica = tl.program_id(1).to(tl.int64)
        x += replica * x_r * samples * VIEW[3]
        out += replica * samples * VIEW[3]
        statistics += replica * samples * (GROUPS * (2 if CENTRED else 1))
        weight += replica * weight_r * (GROUPS * WIDTH)
        bias += replica * bias_r * (GROUPS * WIDTH)
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)[None, :, None]
    channel = group * WIDTH + c
    gain = parameter(weight, channel, c < WIDTH, WEIGHT)
    shift = parameter(bias, channel, c < WIDTH, BIAS)
    for start in range(part * ROWS, samples, parts * ROWS):
        n = start + tl.arange(0, ROWS)
        inside = (n < samples)[:, None, None] & (c < WIDTH)[None, None, :]
        base = n[:, None, None] * VIEW[3] + channel[None, None, :] * VIEW[4]
        if PIXELS <= BLOCK_P:
            at = base + p * VIEW[5]
            ok = inside & (p < PIXELS)
            v = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
            mean, square = moments(v, ok, WIDTH * PIXELS, CENTRED)
            rstd = tl.rsqrt(square / (WIDTH * PIXELS) + eps)
            y = (v - mean) * rstd
            if WEIGHT:
                y *= gain
            if BIAS:
                y += shift
            tl.store(out + at, y, mask=ok)
        else:
            mean = tl.zeros((ROWS, 1, 1), dtype=tl.float32)
            square = tl.zeros((ROWS, 1, 1), dtype=tl.float32)
            for first in range(0, PIXELS, BLOCK_P):
                ok = inside & (first + p < PIXELS)
                v = tl.load(x + base + (first + p) * VIEW[5], mask=ok, other=0.0).to(tl.float32)
                more = tl.minimum(PIXELS - first, BLOCK_P)
                own, deviation = moments(v, ok, more * WIDTH, CENTRED)
                share = more / (first + more).to(tl.float32)
                away = own - mean
                square += deviation
                if CENTRED:
                    square += away * away * share * first * WIDTH
                    mean += away * share
            rstd = tl.rsqrt(square / (WIDTH * PIXELS) + eps)
            for first in range(0, PIXELS, BLOCK_P):
                at = base + (first + p) * VIEW[5]
                ok = inside & (first + p < PIXELS)
                y = normal(x, at, ok, mean, rstd)
                if WEIGHT:
                    y *= gain
                if BIAS:
                    y += shift
                tl.store(out + at, y, mask=ok)
        row = (n * GROUPS + group)[:, None, None]
        live = (n < samples)[:, None, None]
        tl.store(statistics + row, rstd, mask=live)
        if CENTRED:
            tl.store(statistics + samples * GROUPS + row, mean, mask=live)


@triton.jit(do_not_specialize=["samples", "tangents", "v_r", "r_r", "x_r", "statistics_r", "weight_r"])
def project(
    v,
    r,
    x,
    statistics,
    weight,
    out,
    total,
    shift,
    samples,
    tangents,
    beyond,
    v_r,
    r_r,
    x_r,
    statistics_r,
    weight_r,
    VIEW: tl.constexpr,
    REPLICATED: tl.constexpr,
    CENTRED: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    STORE: tl.constexpr,
    SUMS: tl.constexpr,
    CROSS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[t] = P(γ v[t])/s if INNER, γ P(v[t])/s if OUTER, and sums of each part for γ and b.

    Grid (groups × parts, replicas).

    Pointers:
        v, out: [tangents, samples, C, pixels], dense in a tangent by VIEW's strides, any float type; out when STORE.
        r: like v; read when CROSS.
        x: [samples, C, pixels] by VIEW's strides; read once for all tangents (twice where a row is over a tile).
        statistics: as of `normalise`.
        weight: [C], any float type; read when INNER or OUTER.
        total: [C], `beyond` elements from part to part (and from the last to the next replica's first), float32: Σ v x̂
            if SUMS, Σ r P(v)/s if CROSS.
        shift: likewise Σ v; written when SUMS.

    VIEW as of `normalise`. LANES is a power of two, at least `tangents`, where a row is over a tile.
    """
    GROUPS: tl.constexpr = VIEW[0]
    WIDTH: tl.constexpr = VIEW[1]
    PIXELS: tl.constexpr = VIEW[2]
    COUNT: tl.constexpr = WIDTH * PIXELS
    group = tl.program_id(0) % GROUPS
    part = tl.program_id(0) // GROUPS
    parts = tl.num_programs(0) // GROUPS
    size = samples * GROUPS * COUNT
    if REPLICATED:
        replica = tl.program_id(1).to(tl.int64)
        v += replica * v_r * tangents * size
        r += replica * r_r * tangents * size
        x += replica * x_r * size
        statistics += replica * statistics_r * samples * (GROUPS * (2 if CENTRED else 1))
        weight += replica * weight_r * (GROUPS * WIDTH)
        out += replica * tangents * size
        total += replica * parts * beyond
        shift += replica * parts * beyond
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)[None, :, None]
    lanes = tl.arange(0, LANES)[None, None, :]
    channel = group * WIDTH + c
    gain = parameter(weight, channel, c < WIDTH, INNER or OUTER)
    if SUMS or CROSS:
        first_sum = tl.zeros((ROWS, BLOCK_P, BLOCK_C), dtype=tl.float32)
        second_sum = tl.zeros((ROWS, BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in range(part * ROWS, samples, parts * ROWS):
        n = start + tl.arange(0, ROWS)
        live = (n < samples)[:, None, None]
        inside = live & (c < WIDTH)[None, None, :]
        base = n[:, None, None] * VIEW[3] + channel[None, None, :] * VIEW[4]
        row = (n * GROUPS + group)[:, None, None]
        rstd = tl.load(statistics + row, mask=live, other=0.0)
        mean = tl.zeros((ROWS, 1, 1), dtype=tl.float32)
        if CENTRED:
            mean = tl.load(statistics + samples * GROUPS + row, mask=live, other=0.0)
        if PIXELS <= BLOCK_P:
            at = base + p * VIEW[5]
            ok = inside & (p < PIXELS)
            unit = normal(x, at, ok, mean, rstd)
            for t in range(tangents):
                u = tl.load(v + t * size + at, mask=ok, other=0.0).to(tl.float32)
                if SUMS:
                    first_sum += u * unit
                    second_sum += u
                if STORE or CROSS:
                    if INNER:
                        u *= gain
                    middle, along = means(u, unit, COUNT, CENTRED)
                    y = (u - middle - unit * along) * rstd
                    if CROSS:
                        first_sum += tl.load(r + t * size + at, mask=ok, other=0.0).to(tl.float32) * y
                    if OUTER:
                        y *= gain
                    if STORE:
                        tl.store(out + t * size + at, y, mask=ok)
        else:
            middles = tl.zeros((ROWS, 1, LANES), dtype=tl.float32)
            alongs = tl.zeros((ROWS, 1, LANES), dtype=tl.float32)
            for first in range(0, PIXELS, BLOCK_P):
                at = base + (first + p) * VIEW[5]
                ok = inside & (first + p < PIXELS)
                unit = normal(x, at, ok, mean, rstd)
                for t in range(tangents):
                    u = tl.load(v + t * size + at, mask=ok, other=0.0).to(tl.float32)
                    if SUMS:
                        first_sum += u * unit
                        second_sum += u
                    if INNER:
                        u *= gain
                    middle, along = means(u, unit, COUNT, CENTRED)
                    middles += tl.where(lanes == t, middle, 0.0)
                    alongs += tl.where(lanes == t, along, 0.0)
            if STORE or CROSS:
                for first in range(0, PIXELS, BLOCK_P):
                    at = base + (first + p) * VIEW[5]
                    ok = inside & (first + p < PIXELS)
                    unit = normal(x, at, ok, mean, rstd)
                    for t in range(tangents):
                        u = tl.load(v + t * size + at, mask=ok, other=0.0).to(tl.float32)
                        if INNER:
                            u *= gain
                        middle = tl.sum(tl.where(lanes == t, middles, 0.0), 2)[:, :, None]
                        along = tl.sum(tl.where(lanes == t, alongs, 0.0), 2)[:, :, None]
                        y = (u - middle - unit * along) * rstd
                        if CROSS:
                            first_sum += tl.load(r + t * size + at, mask=ok, other=0.0).to(tl.float32) * y
                        if OUTER:
                            y *= gain
                        if STORE:
                            tl.store(out + t * size + at, y, mask=ok)
    if SUMS or CROSS:
        place = part * beyond + channel
        tl.store(total + place, tl.sum(tl.sum(first_sum, 1), 0), mask=c < WIDTH)
        if SUMS:
            tl.store(shift + place, tl.sum(tl.sum(second_sum, 1), 0), mask=c < WIDTH)


@triton.jit(do_not_specialize=["samples", "tangents", "d_r", "v_r", "x_r", "statistics_r", "weight_r"])
def bend(
    d,
    v,
    x,
    statistics,
    weight,
    out,
    samples,
    tangents,
    d_r,
    v_r,
    x_r,
    statistics_r,
    weight_r,
    VIEW: tl.constexpr,
    REPLICATED: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = the curvature of d[t] along v[t], summed over t: grid (groups × parts, replicas).

    Pointers:
        d, v: [tangents, samples, C, pixels], dense in a tangent by VIEW's strides, any float type.
        x, out: [samples, C, pixels] by VIEW's strides; x is read once.
        statistics, weight: as of `project`; weight is read when WEIGHT.

    VIEW as of `normalise`; a row fits a tile.
    """
    GROUPS: tl.constexpr = VIEW[0]
    WIDTH: tl.constexpr = VIEW[1]
    PIXELS: tl.constexpr = VIEW[2]
    COUNT: tl.constexpr = WIDTH * PIXELS
    group = tl.program_id(0) % GROUPS
    part = tl.program_id(0) // GROUPS
    parts = tl.num_programs(0) // GROUPS
    size = samples * GROUPS * COUNT
    if REPLICATED:
        replica = tl.program_id(1).to(tl.int64)
        d += replica * d_r * tangents * size
        v += replica * v_r * tangents * size
        x += replica * x_r * size
        statistics += replica * statistics_r * samples * (GROUPS * (2 if CENTRED else 1))
        weight += replica * weight_r * (GROUPS * WIDTH)
        out += replica * size
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)[None, :, None]
    channel = group * WIDTH + c
    gain = parameter(weight, channel, c < WIDTH, WEIGHT)
    for start in range(part * ROWS, samples, parts * ROWS):
        n = start + tl.arange(0, ROWS)
        live = (n < samples)[:, None, None]
        at = n[:, None, None] * VIEW[3] + channel[None, None, :] * VIEW[4] + p * VIEW[5]
        ok = live & (c < WIDTH)[None, None, :] & (p < PIXELS)
        row = (n * GROUPS + group)[:, None, None]
        rstd = tl.load(statistics + row, mask=live, other=0.0)
        mean = tl.zeros((ROWS, 1, 1), dtype=tl.float32)
        if CENTRED:
            mean = tl.load(statistics + samples * GROUPS + row, mask=live, other=0.0)
        unit = normal(x, at, ok, mean, rstd)
        moved = tl.zeros((ROWS, BLOCK_P, BLOCK_C), dtype=tl.float32)
        curved = tl.zeros((ROWS, 1, 1), dtype=tl.float32)
        for t in range(tangents):
            u = tl.load(d + t * size + at, mask=ok, other=0.0).to(tl.float32)
            w = tl.load(v + t * size + at, mask=ok, other=0.0).to(tl.float32)
            if WEIGHT:
                u *= gain
            u_mean, b = means(u, unit, COUNT, CENTRED)
            w_mean, e = means(w, unit, COUNT, CENTRED)
            curved += row_sum(u * w) / COUNT - b * e - u_mean * w_mean
            moved += b * w + e * u
        middle, along = means(moved, unit, COUNT, CENTRED)
        tl.store(out + at, (unit * (along - curved) + middle - moved) * rstd * rstd, mask=ok)
