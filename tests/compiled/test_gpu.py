"""The interpreted cases on a real device, and CUDA graphs; without one every test here skips."""

import copy
from collections.abc import Iterator

import pytest
import torch

import ibp_triton as ibp
from ibp_triton.kernels.workbench.cases import allowing_tf32
from tests.kernels import (
    test_columns,
    test_conv,
    test_linear,
    test_methods,
    test_norm_rules,
    test_norms,
    test_pool,
    test_seeds_and_loss,
    test_wgrad,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Exact float32, every new tensor on the GPU, fresh memory filled with NaN."""
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with allowing_tf32(False):
            yield
    finally:
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def instruments() -> list[object]:
    """The interpreter's counts, which a device does not give."""
    pytest.skip("counts bytes: an interpreter's test")


class TestLinear:
    test_forward_reverse_and_linear_sweep = staticmethod(test_linear.test_forward_reverse_and_linear_sweep)
    test_nan_passes_the_relu = staticmethod(test_linear.test_nan_passes_the_relu)
    test_tf32_follows_torch = staticmethod(test_linear.test_tf32_follows_torch)


class TestConvolution:
    test_forward_reverse_and_linear_sweep = staticmethod(test_conv.test_forward_reverse_and_linear_sweep)
    test_any_strides = staticmethod(test_conv.test_any_strides_of_the_image_and_of_the_weight)


class TestWeightGradient:
    test_segments = staticmethod(test_wgrad.test_segments)
    test_the_penalty_survives_low_precision = staticmethod(test_wgrad.test_the_penalty_survives_low_precision)


class TestPool:
    test_max_pool = staticmethod(test_pool.test_max_pool)
    test_mean_pool = staticmethod(test_pool.test_mean_pool)


class TestNorms:
    test_forward_sweeps_and_sums = staticmethod(test_norms.test_forward_sweeps_and_sums)
    test_curvature = staticmethod(test_norms.test_curvature)
    test_a_large_offset_is_no_worse_than_torchs = staticmethod(test_norms.test_a_large_offset_is_no_worse_than_torchs)
    test_networks = staticmethod(test_norm_rules.test_networks_have_the_gradients_of_torchs_rules)
    test_sweep_sums_and_tangent_term = staticmethod(test_columns.test_sweep_sums_and_tangent_term)


class TestHead:
    test_loss_head = staticmethod(test_seeds_and_loss.test_loss_head)
    test_norm_seed = staticmethod(test_seeds_and_loss.test_norm_seed)
    test_fgsm = staticmethod(test_seeds_and_loss.test_fgsm)
    test_fast_tbp_seed = staticmethod(test_seeds_and_loss.test_fast_tbp_seed)


class TestMethods:
    test_against_the_oracle = staticmethod(test_methods.test_against_the_oracle)
    test_beta_zero_is_bp_bit_for_bit = staticmethod(test_methods.test_beta_zero_is_bp_bit_for_bit)


@pytest.mark.parametrize("method", [ibp.LossIBP(0.1), ibp.TangentBP(0.1)], ids=repr)
def test_a_replayed_graph_trains_as_eager_steps_do(method):
    model, _, _, _ = test_methods.setting(test_methods.mnist)
    twin, count = copy.deepcopy(model), 5 if method.needs_tangents else 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, dampening=0.9)
    step = ibp.CapturedStep(ibp.Network(model), method, optimizer)
    assert step.network.native
    plain = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, dampening=0.9)
    network = ibp.Network(twin)
    for _ in range(8):
        x, labels = torch.randn(4, 1, 12, 12), torch.randint(10, (4,))
        tau = torch.randn(count, 4, 1, 12, 12) if count else None
        found = step(x, labels, tau)
        expected = method(network, x, labels, tau)
        plain.zero_grad()
        expected.backward()
        plain.step()
        torch.testing.assert_close(found.loss, expected.detach())
    assert step.captures == 1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    step.method = type(method)(0.05)
    step(x, labels, tau)
    assert step.captures == 2


def test_an_optimizer_that_counts_on_the_cpu_is_refused():
    model, _, _, _ = test_methods.setting(test_methods.mnist)
    with pytest.raises(ValueError, match="capturable=True"):
        ibp.CapturedStep(ibp.Network(model), ibp.BP(), torch.optim.Adam(model.parameters()))
