"""Attacks and noise: sizes, directions, effect, reproducibility."""

import pytest
import torch
import torch.nn.functional as F

import ibp_triton as ibp
from tests.library.networks import build


@pytest.fixture
def case():
    model, x, labels, _ = build("paper_mnist", batch=6)
    return model, x, labels


def loss(model, x, labels):
    return float(F.cross_entropy(model(x), labels).detach())


def test_fgsm_steps_by_epsilon_along_the_sign_of_the_gradient(case):
    model, x, labels = case
    moved = ibp.fgsm(model, x, labels, 0.1)
    leaf = x.clone().requires_grad_()
    F.cross_entropy(model(leaf), labels).backward()
    assert torch.equal(moved, x + 0.1 * leaf.grad.sign())
    assert loss(model, moved, labels) > loss(model, x, labels)
    assert not moved.requires_grad


def test_fgsm_takes_a_list_of_sizes_at_one_gradient(case):
    model, x, labels = case
    many = ibp.fgsm(model, x, labels, [0.0, 0.1, 0.2])
    assert many.shape == (3, *x.shape)
    assert torch.equal(many[0], x)
    assert torch.equal(many[2], ibp.fgsm(model, x, labels, 0.2))


def test_fgsm_leaves_the_parameters_gradients_alone(case):
    model, x, labels = case
    ibp.fgsm(model, x, labels, 0.1)
    assert all(p.grad is None for p in model.parameters())


def test_pgd_stays_in_the_box_and_is_at_least_as_strong_as_fgsm(case):
    model, x, labels = case
    generator = torch.Generator().manual_seed(0)
    moved = ibp.pgd(model, x, labels, 0.1, steps=20, generator=generator)
    assert float((moved - x).abs().max()) <= 0.1 + 1e-12
    assert loss(model, moved, labels) >= 0.999 * loss(model, ibp.fgsm(model, x, labels, 0.1), labels)
    again = ibp.pgd(model, x, labels, 0.1, steps=20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(moved, again)
    one = ibp.pgd(model, x, labels, 0.1, steps=1, step_size=0.1, random_start=False)
    assert torch.allclose(one, ibp.fgsm(model, x, labels, 0.1))


def test_pgd_refuses_nonsense(case):
    model, x, labels = case
    with pytest.raises(ValueError, match="steps >= 1"):
        ibp.pgd(model, x, labels, 0.1, steps=0)
    with pytest.raises(ValueError, match="epsilon >= 0"):
        ibp.pgd(model, x, labels, -0.1)


def test_gaussian_noise_has_its_size_and_follows_its_generator():
    x = torch.zeros(200_000)
    noisy = ibp.gaussian_noise(x, 0.3, torch.Generator().manual_seed(1))
    assert float(noisy.std()) == pytest.approx(0.3, rel=0.01)
    assert torch.equal(noisy, ibp.gaussian_noise(x, 0.3, torch.Generator().manual_seed(1)))
    assert torch.equal(ibp.gaussian_noise(x, 0.0), x)
