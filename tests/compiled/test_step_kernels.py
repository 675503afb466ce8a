"""Every distinct kernel of real training steps, from an epoch's last batch to large ones, compiled for a chip."""

from functools import cache

import pytest
import torch
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import ibp_triton as ibp
from ibp_triton.bench import modern
from ibp_triton.harness import step_counts
from ibp_triton.kernels import tiles
from ibp_triton.kernels.launcher import recording
from ibp_triton.kernels.workbench import aot
from ibp_triton.kernels.workbench.cases import allowing_tf32

METHODS = (ibp.LossIBP(0.1), ibp.TangentBP(0.1))
MODERN = {"resnet18": modern.resnet18, "vit_tiny": modern.vit}
TAILS = (1, 2, 7, 8, 9, 15, 16, 31)  # last batches of an epoch of batches of 32
KINDS = {"float32": (torch.float32, False), "tf32": (torch.float32, True), "bfloat16": (torch.bfloat16, False)}


@cache
def network(name):
    torch.manual_seed(0)
    if name in MODERN:
        return MODERN[name]().to(memory_format=torch.channels_last), (3, 32, 32)
    build, shape = step_counts.NETWORKS[name]
    return build(shape).to(memory_format=torch.channels_last), shape


@cache
def recorded(name, method, batch, kind="float32", chip="sm_90"):
    """The launches of a step that is not run."""
    (model, shape), (dtype, tf32) = network(name), KINDS[kind]
    x = torch.zeros(batch, *shape).contiguous(memory_format=torch.channels_last)
    tau = torch.zeros(5, batch, shape[1], shape[2], shape[0]).movedim(-1, 2) if method.needs_tangents else None
    wrapped = ibp.Network(model, backend="triton", dtype=dtype)
    with tiles.on_chip(chip), allowing_tf32(tf32), recording(execute=False) as record:
        method.gradients(wrapped, x, torch.zeros(batch, dtype=torch.int64), tau)
    return record


def launches(name, method, batch, kind="float32", chip="sm_90"):
    """One launch for each signature."""
    return {aot.signature(launch): launch for launch in recorded(name, method, batch, kind, chip)}


def test_triton_tells_the_same_kernels_apart():
    """By its own key of a launch, which needs no device: what decides whether it compiles."""
    backend, pairs = make_backend(aot.CHIPS["sm_90"].target), set()
    for batch in (32, *TAILS):
        for launch in recorded("mnist", METHODS[0], batch):
            key = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
            pairs.add((aot.signature(launch), launch.name, str(key(**launch.arguments)[1]), launch.config))
    assert len(pairs) == len({own for own, *_ in pairs}) == len({tuple(key) for _, *key in pairs}) > 25


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_last_batch_finds_most_kernels_made(name, method):
    """All lengths of it together add a third of the first step's kernels at most, one less than a whole batch one.

    Half a batch adds up to five: its products are split to fill the chip, which a whole batch's need not be.
    """
    made = launches(name, method, 32).keys()
    added = {tail: launches(name, method, tail).keys() - made for tail in TAILS}
    assert len(set().union(*added.values())) <= len(made) / 3
    assert len(added[31]) <= 1
    assert max(len(added[tail]) for tail in (15, 16)) <= 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
@pytest.mark.slow
def test_no_kernel_of_a_step_spills(name, kind):
    """Some 60 to 90 kernels at 0.4 s; the compiler's cache makes a second run quick."""
    kernels = {}
    for method in METHODS:
        for batch in (1, 7, 32, 256, 1024):
            kernels |= launches(name, method, batch, kind)
    compile_all(kernels.values())


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODERN)
@pytest.mark.slow
def test_no_kernel_of_a_modern_network_spills(name, kind):
    """A ResNet-18 has some 40 kernels at 0.4 s, and passes between them that run on the CPU."""
    compile_all((launches(name, METHODS[0], 7, kind) | launches(name, METHODS[0], 32, kind)).values())


def compile_all(kernels):
    assert len(kernels) > 20
    for launch in kernels:
        built = aot.compile_launch(launch, "sm_90")
        sizes = f"{launch.arguments.get('C')}→{launch.arguments.get('J')}"
        assert (built.fits, built.spills) == (True, 0), f"{launch.name} {sizes} {launch.config}: {built}"
