"""Any other criterion, differentiated by autograd."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ibp_triton.checks import check_labels, readable
from ibp_triton.criteria.criterion import (
    Criterion,
    Loss,
    class_weights,
    per_sample,
    position_weights,
    share_of,
    shares,
)
from ibp_triton.errors import InputError, MethodError
from ibp_triton.head import Head
from ibp_triton.layer import HALF


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

    def at(self, z: Tensor, y: Tensor, head: Head, weights: Tensor | None = None) -> Loss:
        """c = ∇_z Σ ℓ_n, and H t = ∇_z ⟨c, t⟩ when it is asked for."""
        u = z.detach()
        share = self._share(u, y, weights)
        losses, c = self._derived(u, y, share, create_graph=False)[:2]
        self._check_split(u, y, losses)

        def hessian(t: Tensor) -> Tensor:
            if t.dim() > z.dim():
                return torch.stack([hessian(one) for one in t])
            return self._second(u, y, share, t)

        weights = None if weights is None else weights.to(losses.dtype)
        return Loss(losses.detach(), c.to(z.dtype), hessian, weights)

    def _share(self, z: Tensor, y: Tensor, weights: Tensor | None) -> Any:
        """What each number counts in its sample's loss; None: all alike."""
        return None

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
        each = module(z, y.to(z.dtype) if y.is_floating_point() else y)
        if each.dim() == 0 or each.shape[0] != z.shape[0]:
            raise InputError(f"{self.name} does not give losses of single samples: pass a callable (z, y) -> [N]")
        batchmean = self.reduction == "batchmean"
        return per_sample(each) * (1 if batchmean else share_of(each, self.reduction) if share is None else share)

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
        if self.reduction not in ("mean", "sum"):
            return
        whole = self.criterion(z, y.to(z.dtype) if y.is_floating_point() else y)
        split = losses.sum() / self.divisor(z.shape[0])
        if z.dtype in HALF or not readable(whole):
            return
        if not torch.allclose(whole.double(), split.double(), rtol=1e-3, atol=1e-6, equal_nan=True):
            raise MethodError(
                f"{self.name} on the batch is {float(whole):.6g}, and its samples' losses give {float(split):.6g}: it "
                "is no mean over samples. Pass a callable (z, y) -> [N] instead"
            )


class NegativeLogLikelihood(Differentiated):
    """nn.NLLLoss on log-probabilities [N, M] or [N, M, ...]: class numbers with weights, some of them ignored."""

    def targets(self, y: Any, x: Tensor) -> Tensor:
        """Class numbers as int64."""
        return super().targets(y, x).long()

    def weigh(self, y: Tensor, alone: bool) -> Tensor | None:
        """Σ w_y over the sample's positions that are not ignored."""
        return class_weights(self.criterion, y, alone)

    def at(self, z: Tensor, y: Tensor, head: Head, weights: Tensor | None = None) -> Loss:
        """c = −w_y / W_n at the label."""
        check_labels(y, z, self.criterion.ignore_index)
        return super().at(z, y, head, weights)

    def _share(self, z: Tensor, y: Tensor, weights: Tensor | None) -> Any:
        return shares(position_weights(self.criterion, y, z.dtype)[0], self.reduction, weights is None)

    def _check_split(self, z: Tensor, y: Tensor, losses: Tensor) -> None:
        """Its mean is known to be one of samples that count differently."""
