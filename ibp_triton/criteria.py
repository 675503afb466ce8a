"""Criteria: the loss of each sample as a function of its logits, two derivatives of it, and how much a sample counts.

The objective of every method is Σ κ_n (ℓ_n + β R_n), where Σ κ_n ℓ_n is the criterion on the batch: κ_n = 1/N for a
plain mean. Here κ_n is held as weights N κ_n, None where all are one, and a divisor, N or (for sums) 1.

For cross-entropy with targets q ≥ 0 (one-hot, soft, smoothed, weighted) and S = Σ q: c = S p − q and
H t = S p∘(t − ⟨p, t⟩). Binary cross-entropy and squares act on each number alone. Any other criterion is differentiated
by autograd: H t = ∇_z ⟨c(z), t⟩.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibp_triton.checks import check_labels, readable
from ibp_triton.errors import InputError, InputTypeError, MethodError
from ibp_triton.head import Head
from ibp_triton.layer import HALF, wide
from ibp_triton.world import World


@dataclass(eq=False)
class Loss:
    """A criterion at the logits z of a batch.

    Attributes:
        losses: ℓ [N].
        c: ∂ℓ/∂z per sample, in z's shape and dtype.
        hessian: t → H t, for tangents of z's shape or [T, *z.shape].
        weights: N κ_n [N]; None where all are one. Zero for a sample that does not count: its ℓ, c and R are zero.
    """

    losses: Tensor
    c: Tensor
    hessian: Callable[[Tensor], Tensor]
    weights: Tensor | None = None


class Criterion:
    """How a batch's logits and targets become a ``Loss``."""

    reduction = "mean"

    def divisor(self, batch: int) -> int:
        """What the sum over samples is divided by."""
        return 1 if self.reduction == "sum" else batch

    def targets(self, y: Any, x: Tensor) -> Tensor:
        """The targets as a tensor on x's device, with one entry a sample.

        Raises:
            InputError, InputTypeError: otherwise.
        """
        found = _tensor(y, x)
        if found.dim() == 0 or found.shape[0] != x.shape[0]:
            shape = list(found.shape)
            raise InputError(f"the targets must have one entry a sample, [{x.shape[0]}, ...], not {shape}")
        if found.device != x.device:
            raise InputError(f"the targets are on {found.device}, x on {x.device}; move them to one device")
        return found

    def weigh(self, y: Tensor, alone: bool) -> Tensor | None:
        """W_n [N], how much a sample counts beside others; None where all count alike, whatever their targets.

        Not ``alone``: samples of other processes must agree, so that what these targets say does not decide.
        """
        return None

    def at(self, z: Tensor, y: Tensor, head: Head, weights: Tensor | None = None) -> Loss:
        """The loss at logits z [N, ...] and targets y, by ``head`` where it has kernels for it; weights N κ_n [N]."""
        raise NotImplementedError


class CrossEntropy(Criterion):
    """nn.CrossEntropyLoss on logits [N, M] or [N, M, ...]; without a module the plain mean over class numbers [N]."""

    def __init__(self, module: nn.CrossEntropyLoss | None = None) -> None:
        self.module = module

    @property
    def reduction(self) -> str:  # type: ignore[override]
        """Read at each step, as all that the module says."""
        return "mean" if self.module is None else self.module.reduction

    def targets(self, y: Any, x: Tensor) -> Tensor:
        """Class numbers as int64, or probabilities."""
        y = _tensor(y, x)  # class numbers of any integer dtype, in a tensor, an array or a list
        if y.dtype == torch.bool or y.is_complex() or (self.module is None and y.is_floating_point()):
            cure = "" if self.module is None else ", or probabilities of the logits' shape"
            hint = "labels.long(), or pass criterion=nn.CrossEntropyLoss() for probabilities"
            raise InputTypeError(f"labels must be int64 class numbers{cure}, not {y.dtype}; use {hint}")
        if self.module is None and y.shape != x.shape[:1]:
            raise InputError(f"labels must have shape [{x.shape[0]}], one a sample of x, not {list(y.shape)}")
        found = super().targets(y, x)
        return found if found.is_floating_point() else found.long()

    def weigh(self, y: Tensor, alone: bool) -> Tensor | None:
        """Σ w_y over the sample's positions that are not ignored."""
        return None if self.module is None or y.is_floating_point() else _class_weights(self.module, y, alone)

    def at(self, z: Tensor, y: Tensor, head: Head, weights: Tensor | None = None) -> Loss:
        """By the head's kernel for plain class numbers, else in closed form."""
        m = self.module
        if y.is_floating_point():
            return self._probable(z, y)
        check_labels(y, z, None if m is None else m.ignore_index)
        if m is None or (z.dim() == 2 and weights is None and m.label_smoothing == 0):
            losses, c, p = head.cross_entropy(z, y)
            return Loss(losses, c, lambda t: head.hessian_product(p, t))
        return self._classes(z, y, weights)

    def _classes(self, z: Tensor, y: Tensor, weights: Tensor | None) -> Loss:
        """Class numbers with weights w, smoothing ε or ignored positions: q = (1 − ε) w_y onehot + (ε/M) w."""
        assert self.module is not None
        w, smoothing, log_p = self._weight(z), self.module.label_smoothing, _log_p(z)
        counted = y != self.module.ignore_index
        index = torch.where(counted, y, 0)[:, None]
        w_all = log_p.new_ones(z.shape[1]) if w is None else w
        v = w_all[index[:, 0]] * counted  # w_y, 0 where ignored
        each = -log_p.gather(1, index)[:, 0] * ((1 - smoothing) * v)
        q = torch.zeros_like(log_p).scatter(1, index, ((1 - smoothing) * v)[:, None])
        if smoothing:
            smoothed = _over_classes(w_all * (smoothing / z.shape[1]), log_p) * counted[:, None]
            each, q = each - (smoothed * log_p).sum(1), q + smoothed
        share = _shares(v, self.reduction, weights is None)
        return _closed(z, log_p, torch.where(counted, each, 0), q, share, weights)

    def _probable(self, z: Tensor, y: Tensor) -> Loss:
        """Probabilities y of z's shape: q = w ((1 − ε) y + ε/M); all samples count alike."""
        assert self.module is not None
        if y.shape != z.shape:
            raise InputError(f"class probabilities must have the logits' shape {list(z.shape)}, not {list(y.shape)}")
        w, smoothing, log_p = self._weight(z), self.module.label_smoothing, _log_p(z)
        q = y.to(log_p.dtype)
        if smoothing:
            q = (1 - smoothing) * q + smoothing / z.shape[1]
        q = q if w is None else q * _over_classes(w, log_p)
        each = -(q * log_p).sum(1)
        return _closed(z, log_p, each, q, _share(each, self.reduction), None)

    def _weight(self, z: Tensor) -> Tensor | None:
        assert self.module is not None
        w = self.module.weight
        if w is None:
            return None
        if w.shape != z.shape[1:2] or w.device != z.device:
            raise InputError(
                f"the criterion's class weights are {list(w.shape)} on {w.device}, the logits have {z.shape[1]} "
                f"classes on {z.device}: give one weight a class, and move the criterion with .to(device)"
            )
        return w.to(_log_p(z[:1]).dtype)


class Elementwise(Criterion):
    """A loss of each logit alone, from l, l' and l'' of a subclass."""

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def reduction(self) -> str:  # type: ignore[override]
        """Read at each step, as all that the module says."""
        return self.module.reduction  # type: ignore[no-any-return]

    def at(self, z: Tensor, y: Tensor, head: Head, weights: Tensor | None = None) -> Loss:
        """c = l'(z), H t = l''(z) t; a sample's loss is the mean of its logits' (for sums: their sum)."""
        if y.shape != z.shape:
            cure = ": use y[:, None]" if z.shape[1:] == (1,) and y.dim() == 1 else ""
            raise InputError(
                f"{type(self.module).__name__} needs targets of the logits' shape {list(z.shape)}, not "
                f"{list(y.shape)}{cure}"
            )
        u = wide(z)
        losses, slopes, curves = self.derivatives(u, y.to(u.dtype))
        share = _share(losses, self.reduction, 0)
        return Loss(
            _per_sample(losses) * share,
            (slopes * share).to(z.dtype),
            lambda t: (curves * share * t.to(u.dtype)).to(t.dtype),
        )

    def derivatives(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """l, l' and l'' in z's shape."""
        raise NotImplementedError


class BinaryCrossEntropy(Elementwise):
    """nn.BCEWithLogitsLoss: l = w ((1 − y) z + a softplus(−z)) with a = 1 + (pos_weight − 1) y."""

    def derivatives(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """l' = w ((1 − y) − a σ(−z)), l'' = w a σ(z) σ(−z)."""
        m = self.module
        a = torch.ones_like(z) if m.pos_weight is None else 1 + (m.pos_weight.to(z.dtype) - 1) * y
        w = torch.ones((), dtype=z.dtype, device=z.device) if m.weight is None else m.weight.to(z.dtype)
        try:
            w, off = w.expand_as(z), torch.sigmoid(-z)
        except RuntimeError as error:
            raise InputError(
                f"the weight {list(w.shape)} of BCEWithLogitsLoss does not fit logits {list(z.shape)}: a weight for "
                "each sample can't be given for batches of other sizes; use a callable criterion"
            ) from error
        return w * ((1 - y) * z + a * F.softplus(-z)), w * ((1 - y) - a * off), w * a * off * (1 - off)


class SquaredError(Elementwise):
    """nn.MSELoss: l = (z − y)²."""

    def derivatives(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """l' = 2 (z − y), l'' = 2."""
        return (z - y).square(), 2 * (z - y), torch.full_like(z, 2)


class Differentiated(Criterion):
    """Any other criterion, by autograd: one of torch's modules with a ``reduction``, or (z, y) → losses [N]."""

    def __init__(self, criterion: Any) -> None:
        self.criterion = criterion
        self.module = criterion if isinstance(criterion, nn.Module) and hasattr(criterion, "reduction") else None

    @property
    def reduction(self) -> str:  # type: ignore[override]
        """Of a module; a callable's losses are averaged."""
        return "none" if self.module is None else str(self.module.reduction)

    @property
    def name(self) -> str:
        """For messages."""
        return getattr(self.criterion, "__name__", type(self.criterion).__name__)

    def weigh(self, y: Tensor, alone: bool) -> Tensor | None:
        """As cross-entropy does, of nn.NLLLoss."""
        m = self.criterion
        return _class_weights(m, y.long(), alone) if isinstance(m, nn.NLLLoss) else None

    def at(self, z: Tensor, y: Tensor, head: Head, weights: Tensor | None = None) -> Loss:
        """c = ∇_z Σ ℓ_n, and H t = ∇_z ⟨c, t⟩ when it is asked for."""
        if isinstance(self.criterion, nn.NLLLoss):
            y = y.long()
            check_labels(y, z, self.criterion.ignore_index)
        u = z.detach()
        share = self._share(u, y, weights)
        losses, c = self._derived(u, y, share, create_graph=False)[:2]
        if self.reduction in ("mean", "sum") and not isinstance(self.criterion, nn.NLLLoss):
            self._check_split(u, y, losses)

        def hessian(t: Tensor) -> Tensor:
            if t.dim() > z.dim():
                return torch.stack([hessian(one) for one in t])
            return self._second(u, y, share, t)

        weights = None if weights is None else weights.to(losses.dtype)
        return Loss(losses.detach(), c.to(z.dtype), hessian, weights)

    def _share(self, z: Tensor, y: Tensor, weights: Tensor | None) -> Any:
        """What each position counts in its sample's loss; None: all alike."""
        m = self.criterion
        if not isinstance(m, nn.NLLLoss):
            return None
        w = torch.ones(z.shape[1], dtype=z.dtype, device=z.device) if m.weight is None else m.weight.to(z.dtype)
        counted = y != m.ignore_index
        return _shares(w[torch.where(counted, y, 0)] * counted, self.reduction, weights is None)

    def _losses(self, z: Tensor, y: Tensor, share: Any) -> Tensor:
        if self.module is None:
            found = self.criterion(z, y)
            if not isinstance(found, Tensor) or found.shape != z.shape[:1]:
                shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise InputError(
                    f"the criterion {self.name} must return one loss a sample, [{z.shape[0]}], not {shape}: use "
                    "reduction='none' inside it, and average over what belongs to one sample"
                )
            return found
        module = copy.copy(self.module)
        vars(module)["reduction"] = "none"
        each = module(z, y if isinstance(module, nn.NLLLoss) or not y.is_floating_point() else y.to(z.dtype))
        if each.dim() == 0 or each.shape[0] != z.shape[0]:
            raise InputError(f"{self.name} does not give losses of single samples: pass a callable (z, y) -> [N]")
        batchmean = self.reduction == "batchmean"
        return _per_sample(each) * (1 if batchmean else _share(each, self.reduction, 0) if share is None else share)

    def _derived(self, z: Tensor, y: Tensor, share: Any, create_graph: bool) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            u = z.clone().requires_grad_()
            losses = self._losses(u, y, share)
            if not losses.requires_grad:
                raise MethodError(f"the criterion {self.name} gives losses that do not depend on the logits")
            (c,) = torch.autograd.grad(losses.sum(), u, create_graph=create_graph)
        return losses, c, u

    def _second(self, z: Tensor, y: Tensor, share: Any, t: Tensor) -> Tensor:
        try:
            _, c, u = self._derived(z, y, share, create_graph=True)
            if not c.requires_grad:
                self._check_linear(z, y, share, c)
                return torch.zeros_like(t)
            with torch.enable_grad():
                (found,) = torch.autograd.grad(c, u, t.to(c.dtype), allow_unused=True)
        except RuntimeError as error:
            raise self._rough(str(error)) from error
        return torch.zeros_like(t) if found is None else found.to(t.dtype)

    def _check_linear(self, z: Tensor, y: Tensor, share: Any, c: Tensor) -> None:
        """That a c without history is the same beside z, but for kinks: autograd may have lost sight of it."""
        beside = self._derived(z + 1e-2 * z.abs().mean(), y, share, create_graph=False)[1]
        if readable(beside) and float((beside != c).double().mean()) > 0.25:
            raise self._rough("its backward is not differentiable itself")

    def _rough(self, reason: str) -> MethodError:
        return MethodError(
            f"the criterion {self.name} has no second derivative ({reason}), which exact semantics needs: use "
            "semantics='paper', or bp, at or fast_at"
        )

    def _check_split(self, z: Tensor, y: Tensor, losses: Tensor) -> None:
        """That the mean or sum of the samples' losses is what the module says of the batch."""
        whole = self.criterion(z, y if isinstance(self.criterion, nn.NLLLoss) else y.to(z.dtype))
        split = losses.sum() / self.divisor(z.shape[0])
        if z.dtype in HALF or not readable(whole):
            return
        if not torch.allclose(whole.double(), split.double(), rtol=1e-3, atol=1e-6, equal_nan=True):
            raise MethodError(
                f"{self.name} on the batch is {float(whole):.6g}, and its samples' losses give {float(split):.6g}: it "
                "is no mean over samples. Pass a callable (z, y) -> [N] instead"
            )


def criterion_for(criterion: Any) -> Criterion:
    """What a method's ``criterion=`` stands for; None is plain cross-entropy on class numbers.

    Raises:
        InputTypeError: for something that can't be called.
    """
    known: dict[Any, Callable[[Any], Criterion]] = {
        nn.CrossEntropyLoss: CrossEntropy,
        nn.BCEWithLogitsLoss: BinaryCrossEntropy,
        nn.MSELoss: SquaredError,
    }
    if criterion is None:
        return CrossEntropy()
    if isinstance(criterion, type) or not callable(criterion):
        raise InputTypeError(
            f"criterion must be a loss such as nn.CrossEntropyLoss() or a function (z, y) -> [N], not {criterion!r}"
        )
    return known.get(type(criterion), Differentiated)(criterion)


def _tensor(y: Any, x: Tensor) -> Tensor:
    if isinstance(y, Tensor):
        return y
    try:
        return torch.as_tensor(np.asarray(y)).to(x.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(f"labels must be a tensor of class numbers, not {type(y).__name__}") from error


def _log_p(z: Tensor) -> Tensor:
    return torch.log_softmax(wide(z), dim=1)


def _over_classes(w: Tensor, z: Tensor) -> Tensor:
    """[M] beside logits [N, M, ...]."""
    return w.reshape(-1, *[1] * (z.dim() - 2))


def _per_sample(each: Tensor) -> Tensor:
    """[N, ...] added up to [N]."""
    return each if each.dim() == 1 else each.flatten(1).sum(1)


def _share(each: Tensor, reduction: str, axis: int = 0) -> float:
    """What each number counts in its sample's loss: all alike, together one; for sums one each."""
    return 1.0 if reduction == "sum" else each.shape[0] / max(each.numel(), 1)


def _shares(v: Tensor, reduction: str, alike: bool) -> Any:
    """1 / W_n [N] for positions that count v [N, ...], W_n being what a sample's add up to; 0 where none counts."""
    if alike:
        return _share(v, reduction)
    total = _per_sample(v)
    counts = (total > 0).to(v.dtype)
    return counts / torch.where(total > 0, total, 1) if reduction == "mean" else _share(v, reduction) * counts


def _class_weights(module: Any, y: Tensor, alone: bool) -> Tensor | None:
    """W_n of class numbers y [N, ...]: Σ w_y over the positions that are not ignored."""
    counted = y != module.ignore_index
    if alone and module.weight is None and readable(y) and bool(counted.all()):
        return None
    w, index = module.weight, torch.where(counted, y, 0)
    if w is None:
        return _per_sample(counted.double())
    if readable(index) and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(w):
        raise InputError(f"labels must lie in 0 … {len(w) - 1} for {len(w)} class weights")
    if w.device != y.device:
        raise InputError(
            f"the criterion's class weights are on {w.device}, labels on {y.device}; use criterion.to(device)"
        )
    return _per_sample(w[index].double() * counted)


def sample_weights(criterion: Criterion, y: Tensor, world: World | None) -> tuple[int, Tensor | None]:
    """The number of samples, over all processes, and N κ_n of these [N]; None where all count alike.

    Raises:
        InputError (a ValueError): where none counts.
    """
    weights, count = criterion.weigh(y, world is None), y.shape[0]
    total = None if weights is None else weights.sum()
    if world is not None:
        count, total = world.total(count, total)
    if count == 0:
        raise InputError("no process has a sample")
    if weights is None or total is None:
        return count, None
    if readable(total) and not float(total) > 0:
        raise InputError("no label of the batch counts: all are ignored, or their classes weigh nothing")
    return count, weights * (count / total) if criterion.reduction == "mean" else (weights > 0).to(weights.dtype)


def _closed(z: Tensor, log_p: Tensor, each: Tensor, q: Tensor, share: Any, weights: Tensor | None) -> Loss:
    """Cross-entropy with targets q, ``each`` position's loss [N, ...], a sample's share [N] of them."""
    p, total = log_p.exp(), q.sum(1, keepdim=True)
    column = share.view(-1, *[1] * (z.dim() - 1)) if isinstance(share, Tensor) else share
    counted, scaled = total > 0, total * p * column  # what does not count is zero, even where the logits are no numbers

    def hessian(t: Tensor) -> Tensor:
        u = t.to(p.dtype)
        axis = u.dim() - p.dim() + 1
        return torch.where(counted, scaled * (u - (p * u).sum(axis, keepdim=True)), 0).to(t.dtype)

    c = torch.where(counted, (total * p - q) * column, 0)
    weights = None if weights is None else weights.to(p.dtype)
    return Loss(_per_sample(each) * share, c.to(z.dtype), hessian, weights)
