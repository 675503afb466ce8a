"""Criteria in closed form: cross-entropy, binary cross-entropy, squares."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibp_triton.checks import check_labels
from ibp_triton.criteria.criterion import (
    Criterion,
    Loss,
    as_tensor,
    class_weights,
    per_sample,
    position_weights,
    share_of,
    shares,
)
from ibp_triton.errors import InputError, InputTypeError
from ibp_triton.head import Head
from ibp_triton.layer import wide


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
        y = as_tensor(y, x)  # class numbers of any integer dtype, in a tensor, an array or a list
        if y.dtype == torch.bool or y.is_complex() or (self.module is None and y.is_floating_point()):
            cure = "" if self.module is None else ", or probabilities of the logits' shape"
            hint = "labels.long(), or pass criterion=nn.CrossEntropyLoss() for probabilities"
            raise InputTypeError(f"labels must be int64 class numbers{cure}, not {y.dtype}; use {hint}")
        if self.module is None and y.shape != x.shape[:1]:
            raise InputError(f"labels must have shape [{x.shape[0]}], one a sample of x, not {list(y.shape)}")
        found = super().targets(y, x)
        return found if found.is_floating_point() else found.long()

    @property
    def ignored(self) -> int | None:
        """The class number that does not count; None where all do."""
        return None if self.module is None else self.module.ignore_index

    def weigh(self, y: Tensor, alone: bool) -> Tensor | None:
        """Σ w_y over the sample's positions that are not ignored."""
        return None if self.module is None or y.is_floating_point() else class_weights(self.module, y, alone)

    def at(self, z: Tensor, y: Tensor, head: Head, weights: Tensor | None = None) -> Loss:
        """By the head's kernel for plain class numbers, else in closed form."""
        m = self.module
        if y.is_floating_point():
            return self._probable(z, y)
        check_labels(y, z, self.ignored)
        if m is None or (z.dim() == 2 and weights is None and m.label_smoothing == 0):
            losses, c, p = head.cross_entropy(z, y)
            return Loss(losses, c, lambda t: head.hessian_product(p, t))
        return self._classes(z, y, weights)

    def _classes(self, z: Tensor, y: Tensor, weights: Tensor | None) -> Loss:
        """Class numbers with weights w, smoothing ε or ignored positions: q = (1 − ε) w_y onehot + (ε/M) w."""
        assert self.module is not None
        w, smoothing, log_p = self._weight(z), self.module.label_smoothing, _log_p(z)
        v, counted = position_weights(self.module, y, log_p.dtype)
        index = torch.where(counted, y, 0)[:, None]
        each = -log_p.gather(1, index)[:, 0] * ((1 - smoothing) * v)
        q = torch.zeros_like(log_p).scatter(1, index, ((1 - smoothing) * v)[:, None])
        if smoothing:
            w = log_p.new_ones(z.shape[1]) if w is None else w
            smoothed = _over_classes(w * (smoothing / z.shape[1]), log_p) * counted[:, None]
            each, q = each - (smoothed * log_p).sum(1), q + smoothed
        share = shares(v, self.reduction, weights is None)
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
        return _closed(z, log_p, each, q, share_of(each, self.reduction), None)

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
        share = share_of(losses, self.reduction)
        return Loss(
            per_sample(losses) * share,
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


def _log_p(z: Tensor) -> Tensor:
    return torch.log_softmax(wide(z), dim=1)


def _over_classes(w: Tensor, z: Tensor) -> Tensor:
    """[M] beside logits [N, M, ...]."""
    return w.reshape(-1, *[1] * (z.dim() - 2))


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
    return Loss(per_sample(each) * share, c.to(z.dtype), hessian, weights)
