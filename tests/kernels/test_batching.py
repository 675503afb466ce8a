"""The operators under vmap, and replicas of a network on kernels: what each gives alone."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import ibp_triton as ibp
from ibp_triton import ops, replicated_step
from ibp_triton.kernels.launcher import recording
from tests.kernels.support import randn
from tests.kernels.test_ops import NAMES, samples

CASES = [(name, None) for name in NAMES] + [(name, 1) for name in ("linear", "conv2d", "max_pool2d_jvp")]


@pytest.mark.parametrize(("name", "most"), CASES)
def test_an_operator_under_vmap_is_a_loop(name, most):
    """Over all of its floating tensors, strengths in lists among them, or the first alone."""
    operator, (leaves, tree) = getattr(ops, name), tree_flatten(samples()[name])
    leaves = [a.detach() if isinstance(a, torch.Tensor) else a for a in leaves]
    chosen = [i for i, a in enumerate(leaves) if isinstance(a, torch.Tensor) and a.is_floating_point()][:most]
    stacks = [torch.stack([leaves[i], 2 * leaves[i], 0.5 - leaves[i]]) for i in chosen]

    def call(*some):
        whole = list(leaves)
        for i, a in zip(chosen, some, strict=True):
            whole[i] = a
        return operator(*tree_unflatten(whole, tree))

    with recording() as together:
        found = tree_leaves(torch.func.vmap(call)(*stacks))
    for r in range(3):
        with recording() as one:
            expected = tree_leaves(call(*(a[r] for a in stacks)))
        assert all(torch.equal(a[r], b) for a, b in zip(found, expected, strict=True))
    assert len(together) == len(one)


def test_what_follows_operators_outside_vmap_sees_them():
    """Autograd of a vmapped operator, and another vmap around it."""
    x, w = randn(2, 1, 3, 5), randn(2, 4, 5).requires_grad_()

    def loss(x, w):
        return (ops.linear(x, w) ** 2).sum()

    expected = 2 * torch.einsum("rtno,rtni->roi", x @ w.mT[:, None], x)
    (found,) = torch.autograd.grad(torch.func.vmap(loss)(x, w).sum(), w)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    both = torch.func.vmap(lambda x: torch.func.vmap(lambda w: ops.linear(x, w))(w.detach()))(x)
    torch.testing.assert_close(both, torch.einsum("stni,roi->srtno", x, w))


def network():
    body = [nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(8, 3))


METHODS = {
    "bp": [ibp.BP()] * 2,
    "loss_ibp": [ibp.LossIBP(0.1), ibp.LossIBP(0.2)],
    "one beta": [ibp.LossIBP(0.1, 2, "exact")] * 2,
    "fast_at": [ibp.FastAdversarialTraining(0.1), ibp.FastAdversarialTraining(0.2)],
    "fast_tbp": [ibp.FastTangentBP(0.1), ibp.FastTangentBP(0.2)],
}


@pytest.mark.parametrize("key", METHODS)
def test_replicas_on_kernels_are_what_each_is_alone(key, monkeypatch):
    """The step holds both ways against one another, and warns, which is an error here, where they differ."""
    monkeypatch.setattr(replicated_step, "CHECKED", 1)
    methods = METHODS[key]
    models = [network() for _ in methods]
    replicas = ibp.ReplicatedNetwork(models, seeds=[0, 1], backend="triton")
    step = ibp.ReplicatedStep(replicas, methods, [torch.optim.SGD(m.parameters(), lr=0.1) for m in models])
    x, labels = torch.randn(2, 1, 6, 6), torch.tensor([0, 1])
    tangents = torch.randn(2, *x.shape) if methods[0].needs_tangents else None
    for _ in range(2):
        step(x, labels, tangents)
    assert [trial.count for trial in step._trials.values() if trial] == [1]
    assert all(own.native for own in replicas.networks)
