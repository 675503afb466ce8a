"""The oracle itself, against finite differences: torch is silently wrong on some routes through these layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ibp_triton as ibp
from ibp_triton.errors import ModelError
from tests.library.networks import build


def chain(kind):
    """A sequential model whose layers can be taken one by one, with the layer that torch's shortcuts get wrong."""
    torch.manual_seed(3)
    middle = {
        "batch_norm": lambda: [nn.Unflatten(1, (4, 3)), nn.BatchNorm1d(4), nn.Flatten()],
        "layer_norm": lambda: [nn.LayerNorm(12)],
        "attention": lambda: [nn.Unflatten(1, (3, 4)), SelfAttention(), nn.Flatten()],
    }[kind]()
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.Tanh(), *middle, nn.Linear(12, 5))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model.double()


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attend(x, x, x, need_weights=False)[0]


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(4, 1, 3, 3, generator=generator, dtype=torch.float64)
    tau = torch.randn(2, 4, 1, 3, 3, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 4, 2, 2]), tau


METHODS = [
    (ibp.LossIBP, 2),
    (ibp.LossIBP, 1.5),
    (ibp.PredictionIBP, 2),
    (ibp.TangentBP, 2),
    (ibp.TangentBP, 1.5),
    (ibp.FastTangentBP, 2),
]


@pytest.mark.parametrize("kind", ["batch_norm", "layer_norm", "attention"])
@pytest.mark.parametrize(("make", "norm"), METHODS)
def test_exact_semantics_are_the_objectives_slope(kind, make, norm):
    model, (x, labels, tau) = chain(kind), batch()
    method = make(0.8, norm, "exact")
    tangents = tau if method.needs_tangents else None
    _, gradient = ibp.reference.gradients(model, method, x, labels, tangents)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    slope, step = sum(float((gradient[k] * direction[k]).sum()) for k in gradient), 1e-5
    values = []
    for sign in (1, -2, 1):  # up, down, back
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(direction[name], alpha=sign * step)
        values.append(float(ibp.reference.gradients(model, method, x, labels, tangents)[0]))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=2e-6)


@pytest.mark.parametrize("kind", ["batch_norm", "layer_norm", "attention"])
def test_paper_semantics_move_only_each_layers_own_derivative(kind):
    """Algorithm 1 by finite differences: the weights move, every activation stays where the first pass left it."""
    model, (x, labels, _) = chain(kind), batch()
    beta = 0.8
    plain = ibp.reference.gradients(model, ibp.BP(), x, labels)[1]
    full = ibp.reference.gradients(model, ibp.LossIBP(beta, 1), x, labels)[1]
    copies = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(copies), labels, reduction="sum")
    seed = torch.autograd.grad(loss, copies)[0].sign()
    with torch.no_grad():
        activations = [x]
        for layer in model:
            activations.append(layer(activations[-1]))
        c = activations[-1].softmax(1) - nn.functional.one_hot(labels, 5)

        def penalty():
            t, small = seed, 1e-5
            for layer, a in zip(model, activations[:-1], strict=True):
                t = (layer(a + small * t) - layer(a - small * t)) / (2 * small)
            return float((c * t).sum()) / len(x)

        for name, p in model.named_parameters():
            direction, step, before = torch.randn_like(p), 1e-4, p.clone()
            p.copy_(before + step * direction)
            up = penalty()
            p.copy_(before - step * direction)
            down = penalty()
            p.copy_(before)
            expected = float(((full[name] - plain[name]) / beta * direction).sum())
            assert (up - down) / (2 * step) == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_reference_leaves_buffers_and_random_numbers_alone():
    model, x, labels, _ = build("vgg_train")
    before = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    ibp.reference.gradients(model, ibp.LossIBP(0.1), x, labels)
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())
    assert torch.equal(state, torch.get_rng_state())


class SolvedBy(nn.Module):
    """The solution of Λ u = x for a trained matrix Λ, whose factors torch's forward mode takes for constants."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(9, 9) + 9 * torch.eye(9))

    def forward(self, x):
        return torch.linalg.solve(self.matrix, x.flatten(1).unsqueeze(-1)).squeeze(-1)


class Mapped(nn.Module):
    """A layer under one of torch.func's transformations."""

    def __init__(self, transformed):
        super().__init__()
        self.linear, self.transformed = nn.Linear(9, 9), transformed

    def forward(self, x):
        return self.transformed(lambda u: self.linear(u).tanh(), x.flatten(1))


UNJUDGED = {
    "solves by a parameter's matrix": SolvedBy,
    "torch.func.jvp or vmap itself": lambda: Mapped(lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]),
    "torch.func.jvp or vmap": lambda: Mapped(lambda f, x: torch.func.vmap(f)(x)),
}


@pytest.mark.parametrize("message", UNJUDGED)
def test_models_of_which_the_paper_s_semantics_cannot_be_judged_are_refused(message):
    """Each of the first two gave wrong numbers; of the exact semantics they are right."""
    torch.manual_seed(0)
    model, (x, labels, tau) = nn.Sequential(UNJUDGED[message](), nn.Linear(9, 5)).double(), batch()
    for method in (ibp.LossIBP(0.3), ibp.TangentBP(0.3)):
        with pytest.raises(ModelError, match=message):
            ibp.reference.gradients(model, method, x, labels, tau if method.needs_tangents else None)
    exact = ibp.LossIBP(0.3, semantics="exact")
    expected = ibp.reference.gradients(model, exact, x, labels)[1]
    found = exact.gradients(model, x, labels)[1]
    assert all(torch.allclose(found[name], expected[name], rtol=1e-10, atol=1e-12) for name in expected)


def test_a_model_that_takes_gradients_itself_is_judged():
    torch.manual_seed(0)
    inner = Mapped(lambda f, x: torch.func.grad(lambda u: f(u).sum())(x))
    model, (x, labels, _) = nn.Sequential(inner, nn.Linear(9, 5)).double(), batch()
    expected = ibp.reference.gradients(model, ibp.LossIBP(0.3), x, labels)[1]
    found = ibp.LossIBP(0.3).gradients(model, x, labels)[1]
    assert all(torch.allclose(found[name], expected[name], rtol=1e-10, atol=1e-12) for name in expected)


class Warped(nn.Module):
    def forward(self, x):
        grid = F.affine_grid(torch.eye(2, 3, dtype=x.dtype).expand(len(x), 2, 3), x.shape, align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)


class Checkpointed(nn.Linear):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("layer", [Warped(), Checkpointed(3, 3)])
def test_what_torchs_transforms_do_not_take_is_no_fault_of_the_models(layer):
    model, (x, labels, tau) = nn.Sequential(layer, nn.Flatten(), nn.Linear(9, 5)).double(), batch()
    method = ibp.TangentBP(0.3)
    with pytest.raises(ModelError, match=r"cannot judge this method .* says nothing of the method's own gradient"):
        ibp.reference.gradients(model, method, x, labels, tau)
    method.gradients(model, x, labels, tau)
