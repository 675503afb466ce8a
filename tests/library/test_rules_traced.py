"""Rules as static programs: recorded by make_fx on real and on fake tensors, they give the same numbers."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from tests.library import test_rules_attention as attention
from tests.library import test_rules_normalisation as normalisation
from tests.library import test_rules_pointwise as pointwise
from tests.library import test_rules_structural as structural
from tests.library.layers import Call, floating, pieces, random_like

CASES = {**normalisation.CASES, **attention.CASES, **attention.HEADS, **pointwise.CASES}
CASES |= {**structural.CONVS, **structural.MOVES}
SOME = [
    *("batch norm, channels last", "layer norm", "group norm", "instance norm", "rms norm", "softmax", "attention"),
    *("attention, masked", "self", "masked", "matmul by a parameter", "addmm", "mish", "gelu", "divide", "prelu"),
    *("conv_transpose2d", "mean", "std", "max along an axis", "chunk", "item of slices", "avg_pool2d", "normalize"),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize("name", SOME)
def test_all_derivatives_can_be_recorded(name, mode):
    torch.manual_seed(3)
    call = CASES[name]()
    x, *others = call.args
    _, value = call.layer()
    d, single = pieces(random_like(floating(value), (2,))), pieces(random_like(floating(value), ()))
    t = random_like(x, (2,))

    def derivatives(x, t):
        again = Call(
            call.function, tuple(x if arg is call.args[0] else arg for arg in (x, *others)), call.kwargs, call.kinds
        )
        along, rest = again.names("active"), again.names("parametric")
        layer, _ = again.layer()
        own = {n: t if again.operands[n] is x else torch.stack([again.operands[n]] * 2) for n in along}
        found = [layer.vjp(d, along), layer.jvp(own), layer.curvature(d, own, along)]
        found += [layer.vjp(single, rest), layer.tangent_param_vjp(own, d, rest)] if rest else []
        return tree_leaves([dict(part) if isinstance(part, dict) else part for part in found])

    recorded = make_fx(derivatives, tracing_mode=mode, _allow_non_fake_inputs=True)(x, t)
    for found, expected in zip(recorded(x, t), derivatives(x, t), strict=True):
        torch.testing.assert_close(found, expected)
