"""A model in the idiom of einops: axes by their names."""

from __future__ import annotations

import torch
from einops import einsum, rearrange, reduce, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from tests.zoo.own import CLASSES


class AxialAttention(nn.Module):
    """Patches, attention along rows and along columns by turns, a token of its own for each column."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            Rearrange("n c (h p) (w q) -> n h w (p q c)", p=2, q=2), nn.LayerNorm(12), nn.Linear(12, width)
        )
        self.token, self.heads = nn.Parameter(torch.randn(width)), heads
        self.qkv = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(2)])
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        token = repeat(self.token, "d -> n 1 w d", n=x.shape[0], w=x.shape[2])
        x = torch.cat((token, x), dim=1)
        x = x + self._attend(x, 0)
        x = rearrange(x, "n h w d -> n w h d")
        x = x + self._attend(x, 1)
        return self.head(reduce(x, "n w h d -> n d", "mean") + reduce(x, "n w h d -> n d", "max"))

    def _attend(self, x: Tensor, which: int) -> Tensor:
        q, k, v = rearrange(self.qkv[which](x), "n l m (three h d) -> three n l h m d", three=3, h=self.heads)
        weights = (einsum(q, k, "n l h i d, n l h j d -> n l h i j") / q.shape[-1] ** 0.5).softmax(-1)
        return rearrange(einsum(weights, v, "n l h i j, n l h j d -> n l h i d"), "n l h m d -> n l m (h d)")
