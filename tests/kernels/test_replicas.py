"""Kernels with an axis of replicas: what a loop over them gives, in as many launches as one takes."""

import pytest
import torch
from torch import Tensor

from ibp_triton.kernels.conv import conv2d, conv2d_vjp
from ibp_triton.kernels.gemm import linear, linear_vjp
from ibp_triton.kernels.geometry import Geometry
from ibp_triton.kernels.launcher import recording
from tests.kernels.support import DTYPES, assert_close, last, randn

GEOMETRY = Geometry.conv((6, 5), (3, 2), (2, 1), (1, 0), (1, 1))
SAME = Geometry.conv((6, 5), (3, 3), (1, 1), (1, 1), (1, 1))


def own(replicas: int, shared: bool, make, *shape: int, **how) -> Tensor:
    """[R, ...], of stride 0 where it is shared."""
    one = make(randn(*shape, **how)) if shared else make(randn(replicas, *shape, **how))
    return one.expand(replicas, *shape) if shared else one


def held(function, tensors, replicas, dtype=torch.float32, **settings):
    """One call on [R, ...] is a loop over it, bit for bit where sums are split alike, in as many launches as one's."""
    tensors = {name: t for name, t in tensors.items() if t is not None}
    with recording() as launches:
        found = function(**tensors, **settings)
    for r in range(replicas):
        with recording() as each:
            expected = function(**{name: t[r] for name, t in tensors.items()}, **settings)
        alike = [launch.arguments.get("splits") for launch in launches] == [a.arguments.get("splits") for a in each]
        if alike:
            assert torch.equal(found[r], expected)
        else:
            assert_close(found[r], expected, dtype)
        assert found[r].stride() == expected.stride()
    assert [launch.name for launch in launches] == [launch.name for launch in each] or not alike
    return launches


SHARING = {"own": (), "x": ("x",), "weight": ("weight", "bias"), "mask": ("mask",), "all": ("x", "weight", "mask")}


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("tangents", [1, 5])
def test_linear_layers_of_replicas(replicas, tangents, sharing):
    shared = SHARING[sharing]

    def some(name, *shape):
        return own(replicas, name in shared, torch.Tensor.contiguous, *shape)

    x, w, b = some("x", tangents, 5, 37), some("weight", 19, 37), some("bias", 19)
    held(linear, {"x": x, "weight": w, "bias": b}, replicas, relu=True)
    held(linear, {"x": x, "weight": w, "mask": some("mask", 5, 19)}, replicas, sign=True)
    d = some("x", tangents, 5, 19)
    held(linear_vjp, {"d": d, "weight": w, "mask": some("mask", 5, 37)}, replicas)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize(("replicas", "tangents", "geometry"), [(2, 1, GEOMETRY), (3, 5, SAME)])
def test_convolutions_of_replicas(replicas, tangents, geometry, sharing, dtype):
    shared = SHARING[sharing]

    def some(name, *shape):
        make = last if len(shape) > 3 else torch.Tensor.contiguous
        return own(replicas, name in shared, make, *shape, dtype=dtype)

    x, w, b = some("x", tangents, 2, 4, 6, 5), some("weight", 7, 4, *geometry.kernel), some("bias", 7)
    held(conv2d, {"x": x, "weight": w, "bias": b}, replicas, dtype, geometry=geometry, relu=True)
    mask = some("mask", 2, 7, *geometry.out)
    held(conv2d, {"x": x, "weight": w, "mask": mask}, replicas, dtype, geometry=geometry, sign=True)
    d, mask = some("x", tangents, 2, 7, *geometry.out), some("mask", 2, 4, 6, 5)
    held(conv2d_vjp, {"d": d, "weight": w, "mask": mask}, replicas, dtype, geometry=geometry)
