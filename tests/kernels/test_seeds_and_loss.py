"""The loss head, the seeds and the ReLU alone, against float64."""

import pytest
import torch
from torch.nn import functional as F

from ibp_triton.kernels.gates import relu
from ibp_triton.kernels.loss import cross_entropy, hessian_product, objective
from ibp_triton.kernels.norm_seeds import fast_tbp_seed, fgsm_step, norm_seed
from tests.kernels.support import DTYPES, assert_close, last, randn, unchanged


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("samples", "classes"), [(37, 10), (1, 53), (600, 10), (3, 1)])
def test_loss_head(samples, classes, dtype):
    z = (4 * randn(samples, classes)).to(dtype)
    z[0] = 1.0  # all equal: the first is the prediction
    labels, t = torch.randint(classes, (samples,)), randn(3, samples, classes, dtype=dtype)
    with unchanged(z, labels, t):
        loss, c, correct = cross_entropy(z, labels)
        product, single = hessian_product(z, t), hessian_product(z, t[0])
    Z, p = z.double(), z.double().softmax(1)
    assert_close(loss, F.cross_entropy(Z, labels, reduction="none"), torch.float32)
    assert_close(c, p - F.one_hot(labels, classes), dtype)
    assert torch.equal(correct, (Z.argmax(1) == labels).int())
    T = t.double()
    assert_close(product, p * T - p * (p * T).sum(-1, keepdim=True), dtype)
    assert torch.equal(single, product[0])


def test_the_objective_is_one_launch(instruments):
    u, v = randn(2053), randn(3, 37)
    value = objective(u, v, 0.5, 0.25)
    assert_close(value, 0.5 * u.double().sum() + 0.25 * v.double().sum(), torch.float32)
    assert (value.shape, len(instruments)) == ((), 1)
    assert_close(objective(u, u[:0], 1.0, 1.0), u.double().sum(), torch.float32)
    exact = u.double().sum() + v.double().abs().sum()
    assert_close(objective(u, v, 1.0, 1.0, absolute=True), exact, torch.float32)


def test_large_logits_do_not_overflow():
    loss, c, _ = cross_entropy(torch.tensor([[1e4, -1e4]]), torch.tensor([1]))
    assert (loss.item(), c.tolist()) == (2e4, [[1.0, -1.0]])


@pytest.mark.parametrize("norm", [1, 1.5, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_seed(dtype, norm):
    u = last(randn(3, 5, 11, 23, dtype=dtype, zeros=True))
    with unchanged(u):
        seed, value = norm_seed(u, norm)
        none, same = norm_seed(u, norm, seed_wanted=False)
    U = u.double()
    assert_close(seed, U.sign() * U.abs() ** (norm - 1), dtype)
    assert_close(value, (U.abs() ** norm).sum((1, 2, 3)) / norm, torch.float32)
    assert none is None
    assert torch.equal(same, value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fgsm(dtype):
    x, d = randn(2, 37, dtype=dtype), randn(2, 37, dtype=dtype, zeros=True)
    with unchanged(x, d):
        step = fgsm_step(x, d, 0.03)
    assert_close(step, x.double() + 0.03 * d.double().sign(), dtype)


@pytest.mark.parametrize("norm", [1, 1.5, 2])
@pytest.mark.parametrize("tangents", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fast_tbp_seed(dtype, tangents, norm):
    d, tau = randn(3, 1, 27, 29, dtype=dtype), randn(tangents, 3, 1, 27, 29, dtype=dtype)
    with unchanged(d, tau):
        seed, value = fast_tbp_seed(d, tau, norm)
    inner = (d.double() * tau.double()).sum((2, 3, 4))
    psi = inner.sign() * inner.abs() ** (norm - 1)
    assert_close(seed, (psi[..., None, None, None] * tau.double()).sum(0), dtype)
    assert_close(value, (inner.abs() ** norm).sum(0) / norm, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_and_its_mask(dtype, instruments):
    x, a = last(randn(3, 5, 7, 9, dtype=dtype, zeros=True)), last(randn(3, 5, 7, 9, dtype=dtype, zeros=True))
    t = last(randn(4, 3, 5, 7, 9, dtype=dtype))
    with unchanged(x, a, t):
        assert torch.equal(relu(x), F.relu(x))
        assert torch.equal(relu(x, a), x * (a > 0))
        assert torch.equal(relu(t, a), t * (a > 0))
    assert instruments[-1].traffic["mask"].loaded == instruments[-2].traffic["mask"].loaded
    assert relu(torch.tensor([float("nan")])).isnan()


def test_what_is_rejected():
    with pytest.raises(ValueError, match="logits"):
        cross_entropy(randn(3, 4).T, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="int64"):
        cross_entropy(randn(3, 4), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="t must be"):
        hessian_product(randn(3, 4), randn(3, 5))
    with pytest.raises(ValueError, match="at least 1"):
        norm_seed(randn(3, 4), 0.5)
    with pytest.raises(ValueError, match="dense"):
        norm_seed(randn(3, 8)[:, ::2])
    with pytest.raises(ValueError, match="must match"):
        fgsm_step(randn(3, 4), randn(4, 3).T, 0.1)
    with pytest.raises(ValueError, match="at most 64"):
        fast_tbp_seed(randn(3, 4), randn(65, 3, 4))
    with pytest.raises(ValueError, match="its strides"):
        fast_tbp_seed(randn(3, 4), randn(2, 4, 3).mT)
    with pytest.raises(ValueError, match="dense"):
        relu(randn(3, 8)[:, ::2])
    with pytest.raises(ValueError, match="dense"):
        relu(randn(3, 8), randn(8, 3).T)
