"""Models of our own writing, in the idioms that people's code has: no package but torch is needed for them."""

from __future__ import annotations

import copy
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

CLASSES = 5


class VisionTransformer(nn.Module):
    """Patches by reshaping, one product for queries, keys and values, a class token and positions to learn."""

    def __init__(self, width: int = 16, heads: int = 2, patch: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.patch, self.embed = patch, nn.Linear(3 * patch * patch, width)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.ModuleList([TransformerBlock(width, heads) for _ in range(blocks)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        p = self.patch
        x = x.view(n, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * c)
        x = torch.cat((self.token.expand(n, -1, -1), self.embed(x)), dim=1)
        x = x + self.place[:, : x.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.wide = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))
        self.heads, self.scale = heads, (width // heads) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.one(x)).chunk(3, dim=-1)
        )
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.wide(self.two(x))


class RotaryDecoder(nn.Module):
    """Causal attention with rotated halves, RMS norms written out and a gated wide layer; x is embedded already."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up, self.down = nn.Linear(width, 24), nn.Linear(width, 24), nn.Linear(24, width)
        self.scales, self.head = nn.Parameter(torch.ones(2, width)), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self._norm(x, 0)).view(n, length, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        angles = torch.arange(length, dtype=x.dtype)[:, None] * torch.pow(
            10.0, -torch.arange(0, self.size, 2, dtype=x.dtype) / self.size
        )
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        q, k = q * cos + self._rotate_half(q) * sin, k * cos + self._rotate_half(k) * sin
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(z.transpose(1, 2).contiguous().view(n, length, width))
        z = self._norm(x, 1)
        x = x + self.down(F.silu(self.gate(z)) * self.up(z))
        return self.head(x[:, -1])

    def _norm(self, x: Tensor, which: int) -> Tensor:
        return self.scales[which] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    @staticmethod
    def _rotate_half(x: Tensor) -> Tensor:
        a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((-b, a), dim=-1)


class Recurrent(nn.Module):
    """A recurrent layer over a sequence, its last state to the classes."""

    def __init__(self, kind: type[nn.RNNBase], **settings: object) -> None:
        super().__init__()
        self.cells = kind(6, 7, batch_first=True, **settings)
        self.head = nn.Linear(14 if settings.get("bidirectional") else 7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class WaveClassifier(nn.Module):
    """Dilated causal convolutions over a waveform, gated, with skips."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, channels, 3, padding=1)
        self.layers = nn.ModuleList([nn.Conv1d(channels, 2 * channels, 2, dilation=2**i) for i in range(3)])
        self.mix = nn.ModuleList([nn.Conv1d(channels, channels, 1) for _ in range(3)])
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.start(x), 0
        for i, (layer, mix) in enumerate(zip(self.layers, self.mix, strict=True)):
            a, b = layer(F.pad(x, (2**i, 0))).chunk(2, 1)
            z = mix(a.tanh() * b.sigmoid())
            x, skips = x + z, skips + z
        return self.head(F.relu(skips).mean(-1))


class Spectrogram(nn.Module):
    """A short-time Fourier transform in front of two-dimensional convolutions, log power, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ELU(), nn.AvgPool2d(2), nn.Conv2d(4, 6, 3), nn.Tanh()
        )
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.stft(x.squeeze(1), 16, 8, window=self.window, return_complex=True, center=True)
        power = torch.log1p(z.real**2 + z.imag**2)
        return self.head(self.layers(power.unsqueeze(1)).mean((2, 3)))


class Volumes(nn.Module):
    """Convolutions and pools in three dimensions, up again and joined with what went in."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True)
        self.two, self.up = nn.Conv3d(4, 6, 3, padding=1, groups=2), nn.ConvTranspose3d(6, 4, 2, stride=2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(self.norm(self.one(x)), 0.1)
        b = torch.tanh(self.up(self.two(F.max_pool3d(a, 2))))
        return self.head(torch.cat([a, b], 1).mean((-3, -2, -1)))


class SplineNet(nn.Module):
    """A Kolmogorov-Arnold network: each edge a cubic B-spline beside a SiLU, by the recursion of Cox and de Boor."""

    def __init__(self, sizes: tuple[int, ...] = (8, 6, CLASSES), knots: int = 4, order: int = 3) -> None:
        super().__init__()
        self.order = order
        self.register_buffer(
            "grid", torch.linspace(-1, 1, knots + 1)[0] + 0.5 * torch.arange(-order, knots + order + 1)
        )
        pairs = list(itertools.pairwise(sizes))
        self.base = nn.ParameterList([torch.randn(b, a) / math.sqrt(a) for a, b in pairs])
        self.splines = nn.ParameterList([torch.randn(b, a, knots + order) / math.sqrt(a) for a, b in pairs])

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for base, spline in zip(self.base, self.splines, strict=True):
            x = F.linear(F.silu(x), base) + torch.einsum("nik,oik->no", self._bases(x), spline)
        return x

    def _bases(self, x: Tensor) -> Tensor:
        x, g = x.unsqueeze(-1), self.grid.to(x)
        bases = ((x >= g[:-1]) & (x < g[1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            left = (x - g[: -(k + 1)]) / (g[k:-1] - g[: -(k + 1)]) * bases[..., :-1]
            bases = left + (g[k + 1 :] - x) / (g[k + 1 :] - g[1:-k]) * bases[..., 1:]
        return bases


class Experts(nn.Module):
    """Two of four experts for each token: chosen by topk, weighted by a softmax, summed by index_add."""

    def __init__(self, width: int = 6, experts: int = 4) -> None:
        super().__init__()
        self.route = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width)) for _ in range(experts)]
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        flat = x.reshape(-1, width)
        weights, chosen = torch.topk(self.route(flat), 2, dim=-1)
        weights, out = F.softmax(weights, dim=-1), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            if rows.numel():
                out = out.index_add(0, rows, expert(flat[rows]) * weights[rows, slot, None])
        return self.head((x + out.view(n, length, width)).mean(1))


class FakeQuantised(nn.Module):
    """Training for 4-bit weights and 8-bit activations: rounding in front, the identity behind."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3, stride=2), nn.Linear(6, CLASSES)
        self.register_buffer("range", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.one, self.two):
            weight = self._rounded(conv.weight, conv.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 7)
            x = F.silu(F.conv2d(x, weight, conv.bias, conv.stride))
            with torch.no_grad():
                self.range.mul_(0.9).add_(x.abs().max(), alpha=0.1)
            x = self._rounded(x, self.range / 2)
        return self.head(x.mean((2, 3)))

    @staticmethod
    def _rounded(a: Tensor, scale: Tensor) -> Tensor:
        return a + (torch.round(a / scale) * scale - a).detach()


class Variational(nn.Module):
    """A bottleneck with noise: mean and log variance, the reparameterised draw, decoder and classes."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(12, 4), nn.Linear(12, 4)
        self.decode = nn.Sequential(nn.Linear(4, 12), nn.Softplus(), nn.Linear(12, 16))
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encode(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        return self.head(torch.cat([z, torch.sigmoid(self.decode(z)) - x.flatten(1)], dim=1))


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        return self._conv_forward(x, (self.weight - mean) * torch.rsqrt(variance + 1e-6), self.bias)


class WeightStandardised(nn.Module):
    """Convolutions with standardised weights, group norms, a squeeze-and-excite gate and a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = StandardisedConv(3, 8, 3, padding=1), StandardisedConv(8, 8, 3, padding=1)
        self.norm, self.less, self.more = nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        z = self.two(F.mish(self.norm(x)))
        gate = F.hardsigmoid(self.more(F.relu(self.less(F.adaptive_avg_pool2d(z, 1)))))
        x = F.hardswish(x + 1.7 * z * gate)
        return self.head(F.avg_pool2d(x, x.shape[-2:]).flatten(1))


class Equilibrium(nn.Module):
    """The fixed point of a layer, unrolled until it stands still, with spectral normalisation."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter, self.inner = nn.Linear(16, width), parametrizations.spectral_norm(nn.Linear(width, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        u = self.enter(x.flatten(1))
        z, inner = torch.zeros_like(u), self.inner.weight
        for _ in range(8):
            new = torch.tanh(0.6 * F.linear(z, inner, self.inner.bias) + u)
            if (new - z).abs().max().item() < 1e-3:
                break
            z = new
        return self.head(z)


class MessagePassing(nn.Module):
    """A graph network: messages along edges, added at their ends, degrees to divide by, attention over the edges."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 3, 0, 2, 1]]))
        self.message, self.score = nn.Linear(2 * width, width), nn.Linear(2 * width, 1)
        self.update, self.head = nn.GRUCell(width, width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        source, target = self.edges
        for _ in range(2):
            pair = torch.cat([x[:, source], x[:, target]], -1)
            weight = F.leaky_relu(self.score(pair), 0.2).exp()
            total = x.new_zeros(*x.shape[:2], 1).index_add_(1, target, weight)
            sums = torch.zeros_like(x).index_add_(1, target, weight * self.message(pair).tanh()) / (total + 1e-6)
            x = self.update(sums.flatten(0, 1), x.flatten(0, 1)).view_as(x)
        return self.head(x.mean(1))


class LowRank(nn.Module):
    """A frozen layer with a low-rank addition that alone is trained (LoRA), the biases free."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.head = nn.Linear(16, 12), nn.Linear(12, CLASSES)
        self.down, self.up = nn.Parameter(torch.randn(3, 16) / 4), nn.Parameter(torch.randn(12, 3))
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x.flatten(1), 0.1, self.training)
        return self.head(F.selu(self.frozen(x) + 0.5 * (x @ self.down.T @ self.up.T)))


class SpectralConv(nn.Module):
    """A Fourier neural operator: low frequencies times complex weights, a pointwise branch beside them."""

    def __init__(self, width: int = 4, modes: int = 3) -> None:
        super().__init__()
        self.modes, self.lift = modes, nn.Conv2d(1, width, 1)
        self.real, self.imaginary = (nn.Parameter(torch.randn(width, width, modes, modes) / width) for _ in range(2))
        self.point, self.head = nn.Conv2d(width, width, 1), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x, m = self.lift(x), self.modes
        z = torch.fft.rfft2(x)
        out = torch.zeros_like(z)
        weight = torch.complex(self.real, self.imaginary)
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", z[:, :, :m, :m], weight)
        x = F.gelu(torch.fft.irfft2(out, s=x.shape[-2:]) + self.point(x), approximate="tanh")
        return self.head(x.mean((-1, -2)))


class Codebook(nn.Module):
    """Vector quantisation: the nearest code of each vector, with the derivative handed straight through."""

    def __init__(self, width: int = 6, codes: int = 8) -> None:
        super().__init__()
        self.enter, self.codes = nn.Linear(width, width), nn.Embedding(codes, width)
        self.leave = nn.Sequential(nn.Linear(2 * width, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        z = self.enter(x)
        distance = z.pow(2).sum(-1, keepdim=True) - 2 * z @ self.codes.weight.t() + self.codes.weight.pow(2).sum(-1)
        code = self.codes(distance.argmin(-1))
        through = z + (code - z).detach()
        return self.leave(torch.cat([through, code * z], -1).mean(1))


class Rotations(nn.Module):
    """Group convolutions: one filter at four quarter turns, the orientations rolled round in the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Parameter(torch.randn(4, 1, 3, 3) / 3),
            nn.Parameter(torch.randn(5, 4, 4, 3, 3) / 12),
        )
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        lifted = torch.stack([F.conv2d(x, torch.rot90(self.first, r, (2, 3))) for r in range(4)], dim=2)
        lifted = F.relu(lifted).flatten(1, 2)
        turned = [F.conv2d(lifted, torch.rot90(self.second, r, (3, 4)).roll(r, dims=2).flatten(1, 2)) for r in range(4)]
        return self.head(torch.stack(turned, 2).amax(2).mean((2, 3)))


class GatedMixer(nn.Module):
    """Mixing over places and over channels by turns, gates between, scales for each layer, deep copies of a block."""

    def __init__(self, places: int = 4, width: int = 6) -> None:
        super().__init__()
        block = MixerBlock(places, width)
        self.blocks, self.head = nn.ModuleList([copy.deepcopy(block) for _ in range(2)]), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


class MixerBlock(nn.Module):
    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.norm, self.places = nn.LayerNorm(width), nn.Conv1d(places, places, 1)
        self.wide, self.narrow = nn.Linear(width, 16), nn.Linear(8, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.wide(self.norm(x)).split(8, dim=-1)
        return torch.addcmul(x, self.gamma, self.narrow(F.gelu(u) * self.places(v)))


class HyperNetwork(nn.Module):
    """A small network makes, of each sample's mean, the weights that the sample's layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.head = nn.Linear(6, 36), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.tanh(self.maker(x.mean(1))).view(-1, 6, 6)
        return self.head(torch.lerp(x, torch.bmm(x, weights), 0.5).logsumexp(1))


class NeuralField(nn.Module):
    """Fourier features, sine layers, and a sum over places that a Gumbel softmax weighs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("waves", torch.randn(6, 5))
        self.one, self.two, self.score = nn.Linear(10, 8), nn.Linear(8, CLASSES), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        angles = 2 * math.pi * x @ self.waves
        z = torch.sin(3 * self.one(torch.cat([angles.sin(), angles.cos()], -1)))
        weight = F.gumbel_softmax(self.score(z).squeeze(-1), tau=0.8, dim=-1)
        return self.two((weight.unsqueeze(-1) * z).sum(1))


class Capsules(nn.Module):
    """Capsules with routing by agreement: squashed vectors, logits updated from products inside the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 4, CLASSES, 4, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        votes = (self.weight @ x[:, :, None, :, None]).squeeze(-1)
        logits = torch.zeros(*votes.shape[:3], 1, dtype=x.dtype)
        for _ in range(2):
            v = self._squash((logits.softmax(2) * votes).sum(1, keepdim=True))
            logits = logits + (votes * v).sum(-1, keepdim=True)
        return 4 * v.squeeze(1).norm(dim=-1)

    @staticmethod
    def _squash(s: Tensor) -> Tensor:
        square = s.square().sum(-1, keepdim=True)
        return square / (1 + square) * s / torch.sqrt(square + 1e-8)


class StateSpace(nn.Module):
    """A selective state-space layer, one step after the other, in the manner of Mamba."""

    def __init__(self, width: int = 6, states: int = 3) -> None:
        super().__init__()
        self.steps, self.b, self.c = nn.Linear(width, width), nn.Linear(width, states), nn.Linear(width, states)
        self.log_a, self.skip = nn.Parameter(torch.randn(width, states)), nn.Parameter(torch.ones(width))
        self.conv, self.head = nn.Conv1d(width, width, 2, groups=width, padding=1), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        delta, b, c = F.softplus(self.steps(x)), self.b(x), self.c(x)
        decay = torch.exp(delta.unsqueeze(-1) * -torch.exp(self.log_a))
        drive = (delta * x).unsqueeze(-1) * b.unsqueeze(2)
        state, out = torch.zeros_like(drive[:, 0]), []
        for i in range(x.shape[1]):
            state = decay[:, i] * state + drive[:, i]
            out.append((state * c[:, i, None]).sum(-1))
        return self.head((torch.stack(out, 1) + x * self.skip).mean(1))
