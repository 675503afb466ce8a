"""Networks drawn at random: chains, sums, concatenations, products, shared modules, views; smooth, so no ties."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import ibp_triton as ibp
from tests.library.comparing import error, largest, oracle, ours

WIDTH = 6
POINTWISE = [
    torch.tanh,
    torch.sigmoid,
    nn.functional.softplus,
    nn.functional.silu,
    nn.functional.gelu,
    nn.functional.elu,
]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["linear", "again", "pointwise", "add", "cat", "gate", "norm", "scale", "roll", "matmul"]),
        st.integers(0, 5),
        st.integers(0, 5),
    ),
    min_size=2,
    max_size=6,
)


class Drawn(nn.Module):
    """Each step takes earlier values by number and makes a new one of shape [N, WIDTH]."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in steps)
        self.wides = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in steps)
        self.gains = nn.ParameterList(nn.Parameter(torch.rand(WIDTH) + 0.5) for _ in steps)
        self.norm, self.first, self.head = nn.LayerNorm(WIDTH), nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        values = [self.first(x)]
        for i, (kind, a, b) in enumerate(self.steps):
            u, v = values[a % len(values)], values[b % len(values)]
            values.append(self.step(i, kind, u, v, b))
        return self.head(values[-1])

    def step(self, i, kind, u, v, b):
        if kind == "linear":
            return self.linears[i](u)
        if kind == "again":
            return self.linears[0](torch.tanh(self.linears[0](u)))
        if kind == "pointwise":
            return POINTWISE[b % len(POINTWISE)](u)
        if kind == "add":
            return u + 0.5 * v
        if kind == "cat":
            return self.wides[i](torch.cat([u, v], dim=1))
        if kind == "gate":
            return u * torch.sigmoid(v)
        if kind == "norm":
            return self.norm(u)
        if kind == "scale":
            return u * self.gains[i] + self.gains[i].tanh()
        if kind == "roll":
            return u.view(-1, 2, 3).transpose(1, 2).reshape(-1, WIDTH).roll(1, 1)
        return (u.unsqueeze(2) @ v.unsqueeze(1)).softmax(2).mean(1) + u


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, norm=st.sampled_from([1, 2, 1.5]), semantics=st.sampled_from(["paper", "exact"]))
def test_any_graph_agrees_with_autograd(steps, norm, semantics):
    torch.manual_seed(len(steps))
    model = Drawn(steps).double()
    x, labels = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 3, 1])
    tau, network = torch.randn(2, 3, 5, dtype=torch.float64), ibp.Network(model)
    for kind in (ibp.LossIBP, ibp.PredictionIBP, ibp.TangentBP, ibp.FastTangentBP):
        method = kind(0.5, norm, semantics)
        batch = (x, labels, tau if kind.needs_tangents else None)
        loss, found = ours(method, network, *batch)
        expected_loss, expected = oracle(method, model, *batch)
        assert largest(expected) > 0
        assert abs(float(loss - expected_loss)) < 1e-11 * abs(float(expected_loss))
        assert error(found, expected) < 1e-10, (method, steps)
