"""Data parallelism: two processes with their own samples are one process with all of them.

Slow where two cores are busy: each of some two hundred sums waits for the other process.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ibp_triton as ibp
from tests.library.comparing import error, example
from tests.library.processes import of_two

WEIGHT = torch.tensor([0.3, 2.0, 1.1]).double()
CRITERIA = {
    "plain": None,
    "weighted": nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1),
    "ignored": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "squares": nn.MSELoss(),
}
SPLITS = ((5, 2), (7, 0), (0, 7), (1, 6))
STEPS = ("EagerStep", "CompiledStep", "CapturedStep")
KINDS = ("asked for", "its own")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)).double()


def normalised(kind):
    """Normalised thrice: with γ and b, without, and before a linear layer."""
    torch.manual_seed(0)
    one, two = (nn.SyncBatchNorm, nn.SyncBatchNorm) if kind == "its own" else (nn.BatchNorm2d, nn.BatchNorm1d)
    layers = [nn.Conv2d(1, 3, 3), one(3), nn.Tanh(), one(3, affine=False, momentum=None), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(27, 4), two(4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(name):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(7, 1, 8, 8, generator=generator).double(), torch.tensor([0, 2, 1, 2, 0, 1, 1])
    if name == "ignored":
        y[2:4] = -100
    return x, torch.softmax(x.flatten(1)[:, :3], 1) if name == "squares" else y, x.flip(-1)[None].repeat(2, 1, 1, 1, 1)


def cases():
    for name, criterion in CRITERIA.items():
        for key in ibp.METHODS:
            if key == "trades":  # it draws numbers, each process its own
                continue
            if name not in ("plain", "weighted") and key not in ("loss_ibp", "tbp"):
                continue
            method = example(key).at(criterion=criterion)
            method = method.at(projections="all") if key == "jacobian" else method
            modes = ("paper", "exact") if hasattr(method, "semantics") else (None,)
            for mode in modes:
                yield name, method if mode is None else method.at(semantics=mode)


def plain_cases():
    return [(name, method) for name, method in cases() if name == "plain"]


def here(of):
    """A model, a criterion or a tensor on this process's device."""
    return copy.deepcopy(of).to("cuda") if dist.get_backend() == "nccl" and hasattr(of, "to") else of


def shard(split, rank, *tensors):
    start, stop = sum(split[:rank]), sum(split[: rank + 1])
    return [here(t[start:stop] if t.dim() < 5 else t[:, start:stop]) for t in tensors]


def _work(rank):
    wrapped, found = ibp.Network(here(network()), process_group=dist.group.WORLD), []
    for number, (name, method) in enumerate(cases()):
        method = method.at(criterion=here(method.criterion))
        x, y, tangents = shard(SPLITS[number % 4], rank, *batch(name))
        parts = method.parts(wrapped, x, y, tangents if method.needs_tangents else None)
        wrapped.model.zero_grad()
        parts.loss.backward()
        gradients = {n: p.grad.clone() for n, p in wrapped.model.named_parameters()}
        found.append((parts.loss.detach(), parts.data_loss, parts.penalty, gradients))
    steps = {kind: _steps(rank, kind) for kind in STEPS}
    return found, steps, [_synchronised(rank, kind) for kind in KINDS]


def _steps(rank, kind):
    model = here(network())
    step = getattr(ibp, kind)(
        ibp.Network(model, process_group=dist.group.WORLD), ibp.LossIBP(0.3), _sgd(model), clip_norm=0.1
    )
    for split in SPLITS:
        x, y, _ = shard(split, rank, *batch("plain"))
        step(x, y)
    return model.state_dict()


def _synchronised(rank, kind):
    found = []
    for number, (name, method) in enumerate(plain_cases()):
        model = here(normalised(kind))
        wrapped = ibp.Network(model, process_group=dist.group.WORLD, sync_batchnorm=kind != "its own")
        x, y, tangents = shard(SPLITS[number % 4], rank, *batch(name))
        loss, gradients = method.gradients(wrapped, x, y, tangents if method.needs_tangents else None)
        found.append((loss, gradients, dict(model.named_buffers())))
    return found


def _sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


TWO_GPUS = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="NCCL needs a CUDA device for each of two processes"
)


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, TWO_GPUS])])
def results(request, tmp_path_factory):
    """What two processes find: gradients of every case and split, and a model after a few steps."""
    # many buckets, the first of which are sent while gradients are made
    return of_two(_work, tmp_path_factory.mktemp("world"), smallest=1, backend=request.param)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_method_and_criterion_agrees_with_one_process(results, rank):
    found = iter(results[rank][0])
    for name, method in cases():
        model = network()
        x, y, tangents = batch(name)
        expected = method.parts(model, x, y, tangents if method.needs_tangents else None)
        expected.loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        loss, data_loss, penalty, own = next(found)
        assert error(own, gradients) < 1e-12, (name, method)
        assert torch.allclose(loss, expected.loss.detach(), rtol=1e-12, atol=0)
        assert torch.allclose(data_loss, expected.data_loss, rtol=1e-12, atol=0)
        assert (penalty is None) == (expected.penalty is None)
        assert penalty is None or torch.allclose(penalty, expected.penalty, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_synchronised_batch_norms_are_those_of_one_process(results, kind, rank):
    for (name, method), (loss, gradients, buffers) in zip(
        plain_cases(), results[rank][2][KINDS.index(kind)], strict=True
    ):
        model = normalised("asked for")
        x, y, tangents = batch(name)
        expected = method.gradients(model, x, y, tangents if method.needs_tangents else None)
        assert float(loss) == pytest.approx(float(expected[0]), rel=1e-12)
        assert error(gradients, expected[1]) < 1e-12, method
        assert error(buffers, dict(model.named_buffers())) < 1e-12


def test_one_process_has_nobody_to_share_statistics_with():
    with pytest.raises(ValueError, match="process_group"):
        ibp.Network(network(), sync_batchnorm=True)


@pytest.mark.parametrize("kind", STEPS)
def test_steps_keep_the_processes_together(results, kind):
    model, x, y = network(), *batch("plain")[:2]
    step = ibp.EagerStep(model, ibp.LossIBP(0.3), _sgd(model), clip_norm=0.1)
    for _ in SPLITS:
        step(x, y)
    for name, value in model.state_dict().items():
        assert torch.equal(results[0][1][kind][name], results[1][1][kind][name])
        assert torch.allclose(results[0][1][kind][name], value, rtol=1e-11, atol=1e-14)


def test_one_process_takes_no_empty_batch():
    with pytest.raises(ValueError, match="N >= 1"):
        ibp.BP()(network(), torch.zeros(0, 1, 8, 8).double(), torch.zeros(0, dtype=torch.int64))
    assert copy.deepcopy(ibp.Network(network())).world is None
