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


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_agree_with_torchattacks(case, norm):
    torchattacks = pytest.importorskip("torchattacks")
    model, x, labels = case
    model, x = model.float(), torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    ours = {"bounds": (0, 1), "norm": norm, "steps": 7, "step_size": 0.05, "random_start": False}
    kind = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
    theirs = kind(model, eps=0.2, alpha=0.05, steps=7, random_start=False)
    assert torch.allclose(ibp.pgd(model, x, labels, 0.2, **ours), theirs(x, labels), atol=1e-6)
    if norm == "linf":
        found = ibp.fgsm(model, x, labels, 0.2, bounds=(0, 1))
        assert torch.allclose(found, torchattacks.FGSM(model, eps=0.2)(x, labels), atol=1e-6)


def test_l2_steps_keep_to_the_ball_and_are_zero_for_a_zero_gradient(case):
    model, x, labels = case
    moved = ibp.pgd(model, x, labels, 0.3, steps=5, norm="l2", generator=torch.Generator().manual_seed(0))
    assert float((moved - x).flatten(1).norm(dim=1).max()) <= 0.3 + 1e-9
    one = ibp.fgsm(model, x, labels, 0.3, norm="l2")
    assert torch.allclose((one - x).flatten(1).norm(dim=1), torch.full((len(x),), 0.3).double())
    flat = ibp.pgd(lambda u: (0 * u).flatten(1)[:, :10], x, labels, 0.3, norm="l2", random_start=False)
    assert torch.equal(flat, x)


def test_random_starts_are_uniform_in_the_l2_ball():
    x, labels = torch.zeros(4000, 3), torch.zeros(4000, dtype=torch.int64)
    start = ibp.pgd(lambda u: 0 * u, x, labels, 1.0, steps=1, norm="l2", generator=torch.Generator().manual_seed(0))
    radii = start.norm(dim=1)
    assert float((radii**3).mean()) == pytest.approx(0.5, abs=0.02)  # the volume inside is uniform
    assert float(start.mean(0).abs().max()) < 0.03


def test_random_signs():
    x = torch.zeros(10_000)
    found = ibp.random_signs(x, 0.25, torch.Generator().manual_seed(0))
    assert set(found.tolist()) == {-0.25, 0.25}
    assert abs(float(found.mean())) < 0.01
