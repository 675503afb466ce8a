"""The loss head: softmax cross-entropy with its derivative and hits, the Hessian's product H·t, the objective."""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibp_triton.kernels.gates import is_dense, number, scalar, there
from ibp_triton.kernels.launcher import Cost, LaunchPlan, cdiv, launch
from ibp_triton.kernels.plans import planned
from ibp_triton.kernels.replica_axis import in_place, side_by_side, taken_apart
from ibp_triton.kernels.tiles import Config, select

MAX_CLASSES = 8192  # one row of logits must fit a program


@triton.jit(do_not_specialize=["samples"])
def cross_entropy_head(
    z, labels, loss, c, correct, samples, z_n, M: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr
):
    """loss = logsumexp(z) - z[l], c = softmax(z) - onehot(l), correct = [l is the first maximum]; grid (row blocks).

    Pointers:
        z: [samples, M], z_n elements from row to row; any float type.
        labels: [samples] int64.
        loss: [samples] float32.
        c: [samples, M], dense, of z's type.
        correct: [samples] int32.

    WIDE is a power of two, at least M.
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, WIDE)
    ok = n < samples
    full = ok[:, None] & (m < M)[None, :]
    v = tl.load(z + n[:, None] * z_n + m[None, :], mask=full, other=float("-inf")).to(tl.float32)
    label = tl.load(labels + n, mask=ok, other=0)
    top = tl.where(ok, tl.max(v, 1), 0.0)  # rows beyond the batch hold -inf
    e = tl.exp(v - top[:, None])
    total = tl.where(ok, tl.sum(e, 1), 1.0)
    hit = m[None, :] == label[:, None]
    chosen = tl.sum(tl.where(hit, v, 0.0), 1)
    at = tl.min(tl.where(v == top[:, None], m[None, :], WIDE), 1)
    tl.store(loss + n, tl.log(total) + top - chosen, mask=ok)
    tl.store(c + n[:, None] * M + m[None, :], e / total[:, None] - hit.to(tl.float32), mask=full)
    tl.store(correct + n, (at == label).to(tl.int32), mask=ok)


@triton.jit(do_not_specialize=["samples", "tangents"])
def softmax_hessian(z, t, out, samples, tangents, z_n, M: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """out[s] = p * (t[s] - <p, t[s]>) with p = softmax(z); grid (row blocks).

    Pointers:
        z: [samples, M], z_n elements from row to row; read once for all tangents.
        t, out: [tangents, samples, M], dense, of z's type.

    WIDE is a power of two, at least M.
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, WIDE)
    ok = n < samples
    full = ok[:, None] & (m < M)[None, :]
    v = tl.load(z + n[:, None] * z_n + m[None, :], mask=full, other=float("-inf")).to(tl.float32)
    e = tl.exp(v - tl.where(ok, tl.max(v, 1), 0.0)[:, None])
    p = e / tl.where(ok, tl.sum(e, 1), 1.0)[:, None]
    for s in range(tangents):
        at = s * samples * M + n[:, None] * M + m[None, :]
        u = tl.load(t + at, mask=full, other=0.0).to(tl.float32)
        tl.store(out + at, p * (u - tl.sum(p * u, 1)[:, None]), mask=full)


@triton.jit(do_not_specialize=["u_size", "u_r", "v_r", "a_r", "b_r"])
def weighted_sum(
    u, v, out, a, b, scale, u_size, v_size, u_r, v_r, a_r, b_r,
    REPLICATED: tl.constexpr, ABSOLUTE: tl.constexpr, READ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = scale * (a * sum u + b * sum v (of |v| if ABSOLUTE)), in a fixed order; grid (replicas).

    Pointers:
        u: [u_size], v: [v_size], any float type.
        out: [] float32.
        a if bit 0 of READ is set, b if bit 1 is: the number, float32.
    If REPLICATED these lie u_r, v_r, 1, a_r and b_r elements in front of the next replica's.
    """
    replica = 0
    if REPLICATED:
        replica = tl.program_id(0).to(tl.int64)
        u += replica * u_r
        v += replica * v_r
        out += replica
    first = scale * number(a, replica * a_r, READ % 2)
    second = scale * number(b, replica * b_r, READ // 2 % 2)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, u_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += first * tl.load(u + i, mask=i < u_size, other=0.0).to(tl.float32)
    for start in range(0, v_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        w = tl.load(v + i, mask=i < v_size, other=0.0).to(tl.float32)
        if ABSOLUTE:
            w = tl.abs(w)
        total += second * w
    tl.store(out, tl.sum(total, 0))


def objective(
    u: Tensor,
    v: Tensor,
    a: float | Tensor,
    b: float | Tensor,
    *,
    scale: float = 1.0,
    absolute: bool = False,
    replicated: bool = False,
) -> Tensor:
    """scale · (a Σ u + b Σ v), 0-d float32: the objective's value from per-sample losses and penalties, in one launch.

    a and b are numbers, or 0-d tensors of one on the device.
    With `absolute` Σ |v|: the penalty of norm 1 straight from d_0, for tensors that one program walks in no time.
    If `replicated` all tensors have an axis of replicas in front, of stride 0 where these share one; the result has it.
    Raises: ValueError where u or v has gaps.
    """
    if replicated:
        u, v, a, b = side_by_side(u), side_by_side(v), in_place(a), in_place(b)
    a, b = scalar(a), scalar(b)
    plan = planned(_objective, (absolute, replicated), u, v, there(a), there(b))
    out = u.new_empty(u.shape[: int(replicated)], dtype=torch.float32)
    launch(plan, u, v, out, a, b, float(scale))
    return out


def cross_entropy(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, c = softmax(z) − onehot(l) and hits of each sample, in one launch.

    Args:
        z: [N, M] logits, rows dense, M up to 8192; float32, bfloat16 or float16.
        labels: [N], int64, each in [0, M) (not checked on the device).

    Returns: losses [N] float32, c [N, M] of z's dtype (not divided by N), hits [N] int32 (0 or 1; the first of equal
        maxima is the prediction, as in torch.argmax).
    Raises: ValueError for other shapes, dtypes or strides.
    """
    plan = planned(_head, (), z, labels)
    samples = z.shape[0]
    loss, c = z.new_empty((samples,), dtype=torch.float32), z.new_empty(z.shape)
    correct = z.new_empty((samples,), dtype=torch.int32)
    launch(plan, z, labels, loss, c, correct)
    return loss, c, correct


def hessian_product(z: Tensor, t: Tensor) -> Tensor:
    """H t = p ⊙ t − p ⟨p, t⟩, p = softmax(z): what the exact semantics put at the top of the second reverse sweep.

    Args:
        z: [N, M] logits, rows dense, M up to 8192.
        t: [N, M] or [T, N, M], contiguous, of z's dtype.

    Returns: a tensor like t.
    Raises: ValueError for other shapes, dtypes or strides.
    """
    plan = planned(_hessian, (), z, t)
    out = torch.empty_like(t)
    launch(plan, z, t, out)
    return out


def _objective(
    absolute: bool, replicated: bool, u: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None
) -> LaunchPlan:
    replicas, (u, v, a, b) = taken_apart(replicated, u, v, a, b)
    read = (a is not None, b is not None)
    cost = Cost(u.numel() * u.element_size() + v.numel() * v.element_size() + 4 * sum(read), 4)
    if not (is_dense(u) and is_dense(v)):
        raise ValueError("losses and penalties must be dense")
    config = select("objective", "any", u)
    return LaunchPlan(
        weighted_sum,
        (replicas.count, 1, 1),
        {
            "u_size": u.numel(), "v_size": v.numel(),
            **dict(zip(("u_r", "v_r", "a_r", "b_r"), replicas.strides, strict=True)), "REPLICATED": replicas.several,
            "ABSOLUTE": absolute, "READ": read[0] + 2 * read[1], "BLOCK": config.block_m,
        },
        config,
        cost.times(replicas.count),
        replicas.count,
    )  # fmt: skip


def _head(z: Tensor, labels: Tensor) -> LaunchPlan:
    samples, classes = _check(z)
    if labels.shape != (samples,) or labels.dtype != torch.int64 or not labels.is_contiguous():
        raise ValueError(f"labels must be [{samples}] int64, contiguous, not {tuple(labels.shape)} {labels.dtype}")
    config, wide, rows = _tile(z)
    return LaunchPlan(
        cross_entropy_head,
        (cdiv(samples, rows), 1, 1),
        {"samples": samples, "z_n": z.stride(0), "M": classes, "WIDE": wide, "ROWS": rows},
        config,
        Cost(z.numel() * z.element_size() + 8 * samples, z.numel() * z.element_size() + 8 * samples),
    )


def _hessian(z: Tensor, t: Tensor) -> LaunchPlan:
    samples, classes = _check(z)
    if t.shape[-2:] != z.shape or t.dim() not in (2, 3) or t.dtype != z.dtype or not t.is_contiguous():
        raise ValueError(
            f"t must be [N, M] or [T, N, M] over {tuple(z.shape)} in {z.dtype}, not {tuple(t.shape)} {t.dtype}"
        )
    config, wide, rows = _tile(z)
    tangents, size = t.shape[0] if t.dim() == 3 else 1, z.element_size()
    return LaunchPlan(
        softmax_hessian,
        (cdiv(samples, rows), 1, 1),
        {"samples": samples, "tangents": tangents, "z_n": z.stride(0), "M": classes, "WIDE": wide, "ROWS": rows},
        config,
        Cost((z.numel() + t.numel()) * size, t.numel() * size),
    )


def _check(z: Tensor) -> tuple[int, int]:
    if z.dim() != 2 or z.shape[1] > MAX_CLASSES or z.shape[1] == 0 or (z.numel() and z.stride(1) != 1):
        raise ValueError(f"logits must be [N, M] with dense rows and 1 to {MAX_CLASSES} classes, not {tuple(z.shape)}")
    return z.shape[0], z.shape[1]


def _tile(z: Tensor) -> tuple[Config, int, int]:
    config = select("loss", "any", z)
    wide = triton.next_power_of_2(z.shape[1])
    return config, wide, max(1, config.block_m // wide)
