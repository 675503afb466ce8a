"""Models sharded by fully_shard: the same gradients and weights, a block's parameters at a time.

Slow where two cores are busy: each of some thousand gathers waits for the other process.
"""

import gc
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_module

import ibp_triton as ibp
from ibp_triton.shards import Scattered, Shards
from tests.library.comparing import error, example
from tests.library.processes import of_two

WIDTH, BLOCKS = 32, 5
BLOCK = 9 * WIDTH * WIDTH * 8  # bytes of a block's three large matrices
LARGE = 2 * WIDTH * WIDTH * 8  # more than half of one, and than any activation
BUFFER = (10 * WIDTH * WIDTH + 12 * WIDTH) * 8  # in which FSDP gathers a block: gloo lets go of it when it likes
SPLITS = ((4, 3), (7, 0), (1, 6))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.wide, self.narrow = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x):
        a = self.one(x)
        x = x + self.attention(a, a, a, need_weights=False)[0]
        return x + self.narrow(nn.functional.gelu(self.wide(self.two(x))))


class Transformer(nn.Module):
    """[N, 3, 5] → [N, 3]."""

    def __init__(self, blocks=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean(1))


class Twisted(nn.Module):
    """Used twice, computed from parameters, frozen, unused, tied, and left whole; beside a part of parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(15, WIDTH))
        self.twice, self.frozen = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.tied, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(2, 2)
        self.tied.weight = self.twice.weight
        self.conv, self.out = nn.Sequential(nn.Conv1d(4, 5, 3), nn.Tanh()), nn.Linear(30, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        a = self.first(x.flatten(1)).tanh()
        a = self.frozen(self.twice(self.twice(a).tanh()).tanh()).tanh()
        a = self.conv(self.tied(a).tanh().unflatten(1, (4, 8)))
        return self.out(a.flatten(1))


class Copied(Transformer):
    """To be sharded over a mesh of copies and pieces."""


def sharded(model):
    """In place; block by block, and the rest."""
    if isinstance(model, Transformer):
        shape = (2, 1) if isinstance(model, Copied) else (1, 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "piece"))
        mesh = mesh if isinstance(model, Copied) else mesh["piece"]
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    fully_shard([model.twice, model.tied])
    for part in (model.first, model.frozen, model.conv[0], model.conv, model.unused):
        fully_shard(part)
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 3, 5, generator=generator).double()
    return x, torch.arange(7) % 3, x.flip(-1)[None].repeat(2, 1, 1, 1)


def cases():
    for model in (Transformer, Twisted):
        for key in ("bp", "at", "loss_ibp", "prediction_ibp", "tbp", "fast_tbp"):
            method = example(key)
            for mode in ("paper", "exact") if hasattr(method, "semantics") else (None,):
                yield model, method if mode is None else method.at(semantics=mode)
    yield Copied, ibp.LossIBP(0.1, semantics="exact")


def shard(split, rank, x, y, tangents):
    part = slice(0, split[0]) if rank == 0 else slice(split[0], None)
    return x[part], y[part], tangents[:, part]


def _alive(own):
    """Bytes of the large storages that whole parameters have, or tensors younger than gc.freeze()."""
    with torch._C.DisableTorchFunction():
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and type(t).__name__ != "DTensor"]
        storages = [t.untyped_storage() for t in (*tensors, *own)]
        return sum({s.data_ptr(): s.nbytes() for s in storages if s.nbytes() > LARGE and s.nbytes() != BUFFER}.values())


def _gradients(rank):
    found = []
    for number, (kind, method) in enumerate(cases()):
        network = ibp.Network(sharded(kind().double()), process_group=dist.group.WORLD)
        x, y, tangents = shard(SPLITS[number % 3], rank, *batch())
        loss = method(network, x, y, tangents if method.needs_tangents else None)
        loss.backward()
        assert set(network.graph().parameters.values()) <= set(network.parameters())
        own = {n: p.grad for n, p in network.model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in own.items()}))
    return found


def _trained(rank, network, watch=lambda network: nullcontext()):
    """Weights after a few steps, of which the last one is watched."""
    alone, optimizer = network.world is None, torch.optim.AdamW(network.model.parameters(), lr=0.01)
    step = ibp.EagerStep(network, ibp.LossIBP(0.1, semantics="exact"), optimizer, clip_norm=1.0)
    for split in SPLITS:
        x, y, _ = batch() if alone else shard(split, rank, *batch())
        with torch.no_grad():
            network.model(x)  # as for an evaluation: FSDP leaves some parameters whole
        with watch(network) if split == SPLITS[-1] else nullcontext():
            step(x, y)
    return {n: (p if alone else p.full_tensor()).detach() for n, p in network.model.named_parameters()}


@contextmanager
def _watching(network, most):
    """Bytes of whole parameters and their gradients, whenever a block or gradient is made and after the step."""
    gc.collect()
    gc.freeze()
    gather, take = Shards._gather, Scattered.take
    own = list(network.shards.own.values())
    Shards._gather = lambda self, block: (gather(self, block), most.append(_alive(own)))[0]
    Scattered.take = lambda self, name, d: (most.append(_alive(own)), take(self, name, d))[1]
    yield
    most.append(_alive(own))
    Shards._gather, Scattered.take = gather, take
    gc.unfreeze()


def _watched(rank):
    most = []
    network = ibp.Network(sharded(Transformer(BLOCKS).double()), process_group=dist.group.WORLD)
    return _trained(rank, network, lambda network: _watching(network, most)), most


def _refused(rank):
    """What is said of models that can't be followed."""
    mesh, found = init_device_mesh("cpu", (2,)), {}

    def refused(name, model, **options):
        with pytest.raises((TypeError, ValueError)) as caught:
            ibp.Network(model, **options)
        found[name] = str(caught.value)

    group = {"process_group": dist.group.WORLD}
    refused("no group", sharded(Transformer()))
    refused("dtype", sharded(Transformer()), dtype=torch.bfloat16, **group)
    refused("policy", fully_shard(Transformer(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)), **group)
    refused("not fully_shard", distribute_module(nn.Linear(4, 4), mesh), **group)
    refused("first", FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu")), **group)
    network = ibp.Network(sharded(Transformer().double()), **group)
    x, y, _ = batch()
    with pytest.raises(TypeError) as caught:
        ibp.BP().gradients(network, x, y, parameters={"out.bias": torch.zeros(3).double()})
    found["parameters"] = str(caught.value)
    return found


def _work(rank):
    return _gradients(rank), _watched(rank), _refused(rank)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return of_two(_work, tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("rank", [0, 1])
def test_gradients_are_those_of_the_whole_model(results, rank):
    for (kind, method), (loss, gradients) in zip(cases(), results[rank][0], strict=True):
        model = kind().double()
        x, y, tangents = batch()
        expected = method(model, x, y, tangents if method.needs_tangents else None)
        expected.backward()
        own = {n: p for n, p in model.named_parameters() if p.requires_grad}
        whole = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in own.items()}
        assert error(gradients, whole) < 1e-12, (kind, method)
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-12)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_transformer_trains_as_it_does_whole_a_block_at_a_time(results, rank):
    weights, most = results[rank][1]
    expected = _trained(0, ibp.Network(Transformer(BLOCKS).double()))
    assert error(weights, expected) < 1e-10
    assert error(weights, Transformer(BLOCKS).double().state_dict()) > 1e-3
    assert BLOCK <= max(most) <= 1.5 * BLOCK
    assert most[-1] == 0


CURES = {
    "no group": "process_group",
    "dtype": "leave dtype=",
    "policy": "mp_policy",
    "not fully_shard": "fully_shard",
    "first": "fully_shard",
    "parameters": "parameters=",
}


@pytest.mark.parametrize("case", CURES)
def test_what_cannot_be_followed_is_refused_with_its_cure(results, case):
    assert CURES[case] in results[0][2][case]
