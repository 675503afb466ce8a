"""What starts the extra passes: ψ(u) with its value |u|^r / r, the FGSM step, and the collapsed seed of Fast TBP."""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibp_triton.kernels.gates import is_dense, number, same_layout, scalar, there
from ibp_triton.kernels.launcher import Cost, LaunchPlan, launch
from ibp_triton.kernels.plans import Layout, Result, planned
from ibp_triton.kernels.replica_axis import Replicas, in_place, side_by_side, taken_apart
from ibp_triton.kernels.tiles import select

ALONE = Replicas(1, False, (0, 0, 0))


@triton.jit(do_not_specialize=["u_r", "x_r", "epsilon_r"])
def seed(u, x, out, value, epsilon, features, u_r, x_r, epsilon_r, norm, REPLICATED: tl.constexpr,
         ONE: tl.constexpr, TWO: tl.constexpr, STEP: tl.constexpr, SEED: tl.constexpr, READ: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    """out = ψ(u) = sign(u)|u|^(r-1), or x + epsilon * sign(u) if STEP; value = sum |u|^r / r; grid (samples, R).

    Pointers:
        u: [samples, features], any float type.
        x: like u; read when STEP.
        out: like u; written when STEP or SEED.
        value: [samples] float32; written unless STEP.
        epsilon: if READ, the number, float32.

    ONE and TWO say that r = `norm` is 1 or 2. If REPLICATED, which STEP may be, u and x lie u_r and x_r times
    `features` and epsilon epsilon_r elements in front of the next replica's, without gaps in out.
    """
    row = tl.program_id(0) * features
    replica = 0
    if REPLICATED:
        replica = tl.program_id(1).to(tl.int64)
        u += replica * u_r * features
        x += replica * x_r * features
        out += replica * tl.num_programs(0) * features
    if STEP:
        size_of_step = number(epsilon, replica * epsilon_r, READ)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, features, BLOCK):
        i = start + tl.arange(0, BLOCK)
        ok = i < features
        v = tl.load(u + row + i, mask=ok, other=0.0).to(tl.float32)
        size = tl.abs(v)
        sign = (v > 0).to(tl.float32) - (v < 0).to(tl.float32)
        if ONE:
            psi = sign
            total += size
        elif TWO:
            psi = v
            total += v * v
        else:  # |v|^(r-1) as 2^((r-1) log2 |v|); 0 at 0
            safe = tl.where(size > 0, size, 1.0)
            psi = sign * tl.exp2((norm - 1.0) * tl.log2(safe))
            total += psi * v
        if STEP:
            psi = tl.load(x + row + i, mask=ok, other=0.0).to(tl.float32) + size_of_step * sign
        if STEP or SEED:
            tl.store(out + row + i, psi, mask=ok)
    if not STEP:
        tl.store(value + tl.program_id(0), tl.sum(total, 0) / norm)


@triton.jit(do_not_specialize=["tangents"])
def tangent_seed(d, tau, out, value, tangents, features, tau_t, norm, ONE: tl.constexpr, TWO: tl.constexpr,
                 LANES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out = sum_j ψ(s_j) tau_j with s_j = <d, tau_j>, value = sum_j |s_j|^r / r; grid (samples).

    Pointers:
        d: [samples, features], any float type.
        tau: [tangents, samples, features], tau_t elements from one tangent to the next; of d's type.
        out: [samples, features].
        value: [samples] float32.

    LANES is a power of two, at least `tangents`. ONE and TWO say that r = `norm` is 1 or 2.
    """
    row = tl.program_id(0) * features
    j = tl.arange(0, LANES)
    inner = tl.zeros((LANES,), dtype=tl.float32)
    for start in range(0, features, BLOCK):
        i = start + tl.arange(0, BLOCK)
        ok = (j < tangents)[:, None] & (i < features)[None, :]
        left = tl.load(d + row + i, mask=i < features, other=0.0).to(tl.float32)
        right = tl.load(tau + (j * tau_t)[:, None] + (row + i)[None, :], mask=ok, other=0.0).to(tl.float32)
        inner += tl.sum(left[None, :] * right, 1)
    size = tl.abs(inner)
    sign = (inner > 0).to(tl.float32) - (inner < 0).to(tl.float32)
    if ONE:
        psi = sign
    elif TWO:
        psi = inner
    else:
        psi = sign * tl.exp2((norm - 1.0) * tl.log2(tl.where(size > 0, size, 1.0)))
    tl.store(value + tl.program_id(0), tl.sum(psi * inner, 0) / norm)
    for start in range(0, features, BLOCK):
        i = start + tl.arange(0, BLOCK)
        ok = (j < tangents)[:, None] & (i < features)[None, :]
        right = tl.load(tau + (j * tau_t)[:, None] + (row + i)[None, :], mask=ok, other=0.0).to(tl.float32)
        tl.store(out + row + i, tl.sum(psi[:, None] * right, 0), mask=i < features)


def norm_seed(u: Tensor, norm: float = 1.0, *, seed_wanted: bool = True) -> tuple[Tensor | None, Tensor]:
    """ψ(u) = sign(u)|u|^(r−1) and ‖u‖_r^r / r of each sample, in one pass.

    Args:
        u: [N, ...], dense in any order of axes behind the first.
        norm: r ≥ 1.
        seed_wanted: False leaves ψ out (its consumers read the sign on the fly).

    Returns: ψ(u) like u, or None; and the values [N], float32.
    Raises: ValueError for r < 1 or for u with gaps.
    """
    plan = planned(_seed, (float(norm), False, seed_wanted), u)
    out = torch.empty_like(u) if seed_wanted else None
    value = u.new_empty((u.shape[0],), dtype=torch.float32)
    launch(plan, u, u, u if out is None else out, value, 0.0)
    return out, value


def fgsm_step(x: Tensor, d: Tensor, epsilon: float | Tensor, *, replicated: bool = False) -> Tensor:
    """x + ε sign(d), for x and d [N, ...] of one shape, dtype and order of axes; raises ValueError otherwise.

    ε is a number, or a 0-d tensor of one on the device. If `replicated` all tensors have an axis of replicas in front,
    of stride 0 where these share one.
    """
    if replicated:
        x, d, epsilon = side_by_side(x), side_by_side(d), in_place(epsilon)
    epsilon = scalar(epsilon)
    step = planned(_step, (replicated,), x, d, there(epsilon))
    out = step.out.empty(x)
    launch(step.plan, d, x, out, d, epsilon)
    return out


def fast_tbp_seed(d: Tensor, tangents: Tensor, norm: float = 1.0) -> tuple[Tensor, Tensor]:
    """Σ_j ψ(⟨d, τ_j⟩) τ_j and Σ_j |⟨d, τ_j⟩|^r / r of each sample: Fast TBP's one seed, in one launch for all tangents.

    Args:
        d: [N, ...], dense in any order of axes behind the first.
        tangents: [T, N, ...] of d's dtype, each τ_j with d's order of axes; T up to 64.
        norm: r ≥ 1.

    Returns: the seed like d, and the values [N], float32.
    Raises: ValueError for r < 1, for T over 64 and for shapes, dtypes or strides that do not match.
    """
    plan = planned(_tangent_seed, (float(norm),), d, tangents)
    out, value = torch.empty_like(d), d.new_empty((d.shape[0],), dtype=torch.float32)
    launch(plan, d, tangents, out, value)
    return out, value


def _seed(
    norm: float, step: bool, wanted: bool, u: Tensor, epsilon: Tensor | None = None, replicas: Replicas = ALONE
) -> LaunchPlan:
    """`u` and `epsilon` are one replica's; the strides are those of u, x and epsilon."""
    if norm < 1:
        raise ValueError(f"norm must be at least 1, not {norm:g}")
    config, size, features = select("sample", "any", u), u.element_size(), _features(u)
    u_r, x_r, epsilon_r = replicas.strides
    cost = Cost(
        loaded=u.numel() * size * (2 if step else 1) + (0 if epsilon is None else 4 * len(u)),
        stored=(u.numel() * size if step or wanted else 0) + (0 if step else 4 * len(u)),
    )
    return LaunchPlan(
        seed,
        (u.shape[0], replicas.count, 1),
        {
            "features": features, "u_r": u_r // max(features, 1), "x_r": x_r // max(features, 1),
            "epsilon_r": epsilon_r, "norm": norm, "REPLICATED": replicas.several,
            "ONE": norm == 1, "TWO": norm == 2, "STEP": step, "SEED": wanted,
            "READ": epsilon is not None, "BLOCK": config.block_m,
        },
        config,
        cost.times(replicas.count),
        replicas.count,
    )  # fmt: skip


def _step(replicated: bool, x: Tensor, d: Tensor, epsilon: Tensor | None) -> Result:
    replicas, (d, x, epsilon) = taken_apart(replicated, d, x, epsilon)
    if not same_layout(x, d) or x.dtype != d.dtype:
        raise ValueError(f"x {tuple(x.shape)} by {x.stride()} and d {tuple(d.shape)} by {d.stride()} must match")
    out = replicas.layout(Layout.of(torch.empty_like(x, device="meta")))
    return Result(out, _seed(1.0, True, False, d, epsilon, replicas))


def _tangent_seed(norm: float, d: Tensor, tangents: Tensor) -> LaunchPlan:
    count = tangents.shape[0]
    if norm < 1 or count > 64:
        raise ValueError(f"norm {norm:g} must be at least 1, and {count} tangents at most 64")
    if tangents.dtype != d.dtype or (count and not same_layout(tangents[0], d)):
        raise ValueError(
            f"tangents {tuple(tangents.shape)} must be d's shape {tuple(d.shape)}, with its strides and dtype"
        )
    config, lanes, size = select("sample", "any", d), triton.next_power_of_2(max(count, 1)), d.element_size()
    return LaunchPlan(
        tangent_seed,
        (d.shape[0], 1, 1),
        {
            "tangents": count, "features": _features(d), "tau_t": tangents.stride(0), "norm": norm,
            "ONE": norm == 1, "TWO": norm == 2, "LANES": lanes, "BLOCK": max(64, 4 * config.block_m // lanes),
        },
        config,
        Cost((d.numel() + 2 * tangents.numel()) * size, d.numel() * size + 4 * d.shape[0]),
    )  # fmt: skip


def _features(u: Tensor) -> int:
    """Elements of a sample; ValueError where samples are not dense, one behind the other."""
    features = u[0].numel() if len(u) else 0
    if len(u) and not (is_dense(u[0]) and (len(u) == 1 or u.stride(0) == features)):
        raise ValueError(f"samples must be dense, one behind the other; {tuple(u.shape)} has strides {u.stride()}")
    return features
