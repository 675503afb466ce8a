"""Models as Lightning Fabric and Accelerate hand them out: unwrapped, or refused with a cure that works.

And the examples that need other people's packages.
"""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.fabric import Fabric
from torch import nn

import ibp_triton as ibp
from examples import huggingface, optuna_beta, peers

X, Y = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
METHOD = ibp.LossIBP(0.1)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def expected(dtype=None):
    return METHOD.gradients(ibp.Network(plain(), dtype=dtype), X, Y)[1]


def agrees(model, gradients):
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())


def fabric(precision):
    one, model = Fabric(accelerator="cpu", precision=precision), plain()
    wrapped, optimizer = one.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return one, model, wrapped, optimizer


def test_fabric_in_full_precision_trains():
    one, model, wrapped, optimizer = fabric("32-true")
    for _ in range(2):
        optimizer.zero_grad()
        gradients = METHOD.gradients(ibp.Network(model), X, Y)[1]
        one.backward(METHOD(ibp.Network(wrapped), X, Y))
        agrees(model, gradients)
        optimizer.step()


def test_fabrics_mixed_precision_is_asked_for_by_dtype():
    one, model, wrapped, _ = fabric("bf16-mixed")
    with pytest.raises(RuntimeError, match=r"Network\(model, dtype=torch.bfloat16\)"):
        ibp.Network(wrapped)
    one.backward(METHOD(ibp.Network(wrapped, dtype=torch.bfloat16), X, Y))
    agrees(model, expected(torch.bfloat16))


def test_fabric_in_true_half_precision_computes_in_it():
    _, model, wrapped, _ = fabric("bf16-true")
    value = METHOD(ibp.Network(wrapped), X.bfloat16(), Y)
    value.backward()
    assert all(p.grad.dtype is torch.bfloat16 for p in model.parameters())


@pytest.fixture
def accelerator():
    yield Accelerator
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_in_full_precision_trains(accelerator):
    one, model = accelerator(cpu=True, mixed_precision="no"), plain()
    prepared = one.prepare(model)
    one.backward(METHOD(ibp.Network(prepared), X, Y))
    agrees(model, expected())


def test_accelerates_mixed_precision_is_asked_for_by_dtype(accelerator):
    one, model = accelerator(cpu=True, mixed_precision="bf16"), plain()
    prepared = one.prepare(model)
    with pytest.raises(RuntimeError, match=r"Network\(model, dtype=torch.bfloat16\)"):
        METHOD(ibp.Network(prepared), X, Y)
    one.backward(METHOD(ibp.Network(prepared, dtype=torch.bfloat16), X, Y))
    agrees(model, expected(torch.bfloat16))


@pytest.mark.filterwarnings("ignore")  # of the packages' own
@pytest.mark.parametrize("name", ["with_fabric", "with_lightning", "with_accelerate"])
def test_the_examples_train(name):
    assert peers.right(getattr(peers, name)()) > 0.85


@pytest.mark.filterwarnings("ignore")
def test_huggingfaces_trainer_trains():
    assert huggingface.main() > 0.9
    AcceleratorState._reset_state(reset_partial_state=True)


def test_optuna_finds_a_beta_that_helps():
    beta, loss = optuna_beta.main()
    x, y = optuna_beta.samples(400, 2)
    plain = float(nn.functional.cross_entropy(optuna_beta.trained(0.0, 100)(x), y).detach())
    assert beta > 0.1
    assert loss < 0.8 * plain
