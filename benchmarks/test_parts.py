"""Parts of a step: the rules of the heavy layers against torch's own backward, the seeds, an epoch with its data."""

import pytest
import torch
from torch import nn

import ibp_triton as ibp
from ibp_triton.bench.candidates import METHODS, PRECISIONS, Case
from ibp_triton.head import seed, tangent_seed

LAYERS = {
    "conv 1→32 4×4": (lambda: nn.Conv2d(1, 32, 4), (32, 1, 28, 28)),
    "conv 32→64 5×5": (lambda: nn.Conv2d(32, 64, 5, padding=2), (32, 32, 12, 12)),
    "conv 3→64 5×5": (lambda: nn.Conv2d(3, 64, 5), (32, 3, 32, 32)),
    "max-pool 3/2": (lambda: nn.MaxPool2d(3, 2, ceil_mode=True), (32, 32, 25, 25)),
    "relu": (nn.ReLU, (32, 32, 12, 12)),
    "linear 2304→256": (lambda: nn.Linear(2304, 256), (32, 2304)),
}


def layer(name, precision, device):
    """The layer after its first pass, a tangent and a derivative."""
    make, shape = LAYERS[name]
    dtype = PRECISIONS[precision] or torch.float32
    torch.manual_seed(0)
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    model = nn.Sequential(make())
    model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    model = model.to(device=device, dtype=dtype, memory_format=layout)
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
    trace = ibp.Network(model, backend="torch").forward(x, {})
    found = next(part for part in trace.layers if part is not None)
    return model, x, found, torch.randn_like(x), torch.randn_like(trace.logits)


@pytest.mark.parametrize("what", ["vjp", "jvp", "autograd vjp"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_rule(measured, benchmark, device, name, precision, what):
    model, x, found, t, d = layer(name, precision, device)
    benchmark.group = f"rule {name} {precision} {device}"
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    expected = torch.autograd.grad(output, leaf, d, retain_graph=True)[0]
    with torch.no_grad():
        close = (found.vjp(d, ["input"])["input"] - expected).abs().max() / expected.abs().max()
        assert float(close) < (1e-5 if precision == "fp32" else 0.02)
        runs = {
            "vjp": lambda: found.vjp(d, ["input"]),
            "jvp": lambda: found.jvp({"input": t}),
            "autograd vjp": lambda: torch.autograd.grad(output, leaf, d, retain_graph=True),
        }
        measured(runs[what], shape=list(x.shape), precision=precision, rule=name, baseline=what == "autograd vjp")


@pytest.mark.parametrize("what", ["sign", "power", "collapsed"])
def test_seed(measured, benchmark, device, what):
    x, _, tau = Case("cifar10", 256, "fp32", device=device).data()
    benchmark.group = f"seed {device}"
    runs = {"sign": lambda: seed(x, 1), "power": lambda: seed(x, 1.5), "collapsed": lambda: tangent_seed(x, tau, 1)}
    found, _ = measured(runs[what], shape=list(x.shape), seed=what)
    assert found.tensor.shape == x.shape


@pytest.mark.parametrize("key", ["bp", "loss_ibp", "tbp"])
def test_epoch(measured, benchmark, device, key):
    """Ten batches with shuffling, mean subtraction and tangents, as the harness trains them."""
    if device != "cpu":
        pytest.skip("the data side is measured on the CPU")
    case = Case("mnist", 32, "bf16")
    benchmark.group = "epoch of 320 examples, cpu"
    model, method = case.model(), METHODS[key]
    network, optimizer = ibp.Network(model, dtype=torch.bfloat16), torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = torch.rand(320, 1, 28, 28), torch.randint(0, 10, (320,))
    mean = images.mean(0)

    def epoch():
        for rows in torch.randperm(320).split(32):
            batch = images[rows]
            tangents = ibp.lie_tangents(batch) if method.needs_tangents else None
            optimizer.zero_grad()
            loss = method(network, batch - mean, labels[rows], tangents)
            loss.backward()
            optimizer.step()
        return loss.detach()

    assert measured(epoch, **case.info(), method=key, baseline=key == "bp").isfinite()
