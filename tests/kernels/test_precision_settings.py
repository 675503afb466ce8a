"""Which products are tf32: torch's settings by either name, each operation's own, on chips that have it."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ibp_triton.kernels import tiles
from ibp_triton.kernels.conv import conv2d
from ibp_triton.kernels.geometry import ONE, Geometry
from ibp_triton.kernels.launcher import recording
from ibp_triton.kernels.wgrad import Segment, weight_gradient
from ibp_triton.kernels.workbench.cases import allowing_tf32
from tests.kernels.support import last, randn

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


def by_kind():
    """The precision of a linear layer and of a convolution."""
    return tiles.precision(torch.zeros(1, 2, 3)), tiles.precision(torch.zeros(1, 2, 3, 4, 4))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("conv", [False, True])
def test_each_operation_follows_its_own_setting(linear, conv):
    MATMUL.fp32_precision, CUDNN.conv.fp32_precision = ("tf32" if on else "ieee" for on in (linear, conv))
    assert by_kind() == ("tf32" if linear else "ieee", "tf32" if conv else "ieee")
    assert tiles.precision(torch.zeros(1, 2, 3, dtype=torch.bfloat16)) == "ieee"


def test_the_old_names_count_too():
    MATMUL.fp32_precision = CUDNN.conv.fp32_precision = "none"  # as in a fresh process
    MATMUL.allow_tf32, CUDNN.allow_tf32 = True, False
    assert by_kind() == ("tf32", "ieee")
    MATMUL.allow_tf32, CUDNN.allow_tf32 = False, True
    assert by_kind() == ("ieee", "tf32")


def test_a_setting_for_all_of_torch_counts_too():
    """It leaves `allow_tf32` unreadable: torch raises there."""
    MATMUL.fp32_precision = CUDNN.conv.fp32_precision = "none"
    before, torch.backends.fp32_precision = torch.backends.fp32_precision, "tf32"
    try:
        assert by_kind() == ("tf32", "tf32")
    finally:
        torch.backends.fp32_precision = before


def test_launches_carry_it():
    geometry = Geometry.conv((4, 4), (3, 3), (1, 1), (0, 0), (1, 1))
    image, kernel = last(randn(1, 2, 3, 4, 4)), last(randn(5, 3, 3, 3))
    a, d, weight = randn(4, 7), randn(4, 3), randn(3, 7)
    CUDNN.conv.fp32_precision = "tf32"
    with recording(execute=False) as launches:
        out = conv2d(image, kernel, geometry)
        weight_gradient([Segment(1.0, image[0], out[0])], kernel, geometry)
        weight_gradient([Segment(1.0, a, d, push=a)], weight, ONE)
    assert [r.arguments["PRECISION"] for r in launches] == ["tf32", "tf32", "ieee"]


# compute capability or architecture: family whose rows serve it, whether it has tf32
CHIPS = {
    (7, 0): ("sm_80", False),
    (8, 0): ("sm_80", True),
    (8, 9): ("sm_80", True),
    (9, 0): ("sm_90", True),
    (10, 0): ("sm_100", True),
    (10, 3): ("sm_100", True),
    (12, 0): ("sm_80", True),
    "gfx90a:sramecc+": ("gfx942", False),
    "gfx942:sramecc+": ("gfx942", True),
    "gfx950": ("gfx942", False),
    "gfx1100": ("gfx1100", False),
}


@pytest.fixture
def real(monkeypatch):
    """A tensor on a device of which torch says what it is told to."""

    def tensor(chip, *shape, multiprocessors=7):
        version = chip if isinstance(chip, tuple) else (9, 4)
        said = SimpleNamespace(
            gcnArchName=chip, major=version[0], minor=version[1], multi_processor_count=multiprocessors
        )
        monkeypatch.setattr(torch.version, "hip", chip if isinstance(chip, str) else None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: said)
        tiles._device.cache_clear()
        with FakeTensorMode():
            return torch.empty(shape, device="cuda:0")

    yield tensor
    tiles._device.cache_clear()


@pytest.mark.parametrize("chip", CHIPS)
def test_tf32_only_where_it_exists(chip, real):
    family, exists = CHIPS[chip]
    x = real(chip, 1, 2, 3)
    assert tiles.chip(x.device) == family
    with allowing_tf32(True):
        assert tiles.precision(x) == ("tf32" if exists else "ieee")
    with allowing_tf32(False):
        assert tiles.precision(x) == "ieee"


def test_convolutions_on_amd_follow_the_setting_that_means_them(real):
    """cuDNN's is on by default, and MIOpen's convolutions are exact."""
    image = real("gfx942", 1, 2, 3, 4, 4)
    CUDNN.conv.fp32_precision = "tf32"
    assert tiles.precision(image) == "ieee"
    MATMUL.fp32_precision = "tf32"
    assert tiles.precision(image) == "tf32"


def test_a_chip_says_how_many_multiprocessors_it_has(real):
    assert tiles.multiprocessors(real((9, 0), 3, multiprocessors=114)) == 114
    with tiles.on_chip("sm_90"):
        assert tiles.multiprocessors(real((9, 0), 3, multiprocessors=114)) == 132
