"""Every rule of its own against torch.func, over a table of settings."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ibp_triton as ibp
from ibp_triton.backends.torch.generic import Generic
from ibp_triton.backends.torch.rules import _RULES

MAP, ROW, LINE = (2, 4, 7, 6), (3, 5), (2, 4, 9)
SETTINGS = {
    "linear": (nn.Linear(5, 4), ROW),
    "linear without bias, more axes": (nn.Linear(9, 4, bias=False), LINE),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), LINE),
    "conv1d same, even kernel": (nn.Conv1d(4, 6, 4, padding="same"), LINE),
    "conv2d": (nn.Conv2d(4, 6, 3), MAP),
    "conv2d stride, padding, dilation": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)), MAP),
    "conv2d groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), MAP),
    "conv2d depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), MAP),
    "conv2d same, even kernel": (nn.Conv2d(4, 6, (4, 3), padding="same"), MAP),
    "conv2d valid": (nn.Conv2d(4, 6, 3, padding="valid"), MAP),
    "conv2d one channel": (nn.Conv2d(1, 6, 4), (2, 1, 7, 6)),
    "conv2d three channels, padded": (nn.Conv2d(3, 6, (3, 5), padding=(2, 1)), (2, 3, 9, 8)),
    "conv2d three channels, strided": (nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=2), (2, 3, 9, 8)),
    "conv2d many channels": (nn.Conv2d(8, 6, 3, stride=2), (2, 8, 7, 6)),
    "conv2d reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), MAP),
    "conv2d circular": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), MAP),
    "conv2d replicate": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"), MAP),
    "max-pool": (nn.MaxPool2d(2), MAP),
    "max-pool overlapping, ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), MAP),
    "max-pool padded, dilated": (nn.MaxPool2d(2, 1, padding=1, dilation=2), MAP),
    "max-pool 1d": (nn.MaxPool1d(3, 2, ceil_mode=True), LINE),
    "avg-pool": (nn.AvgPool2d(3, 2, ceil_mode=True), MAP),
    "avg-pool 1d": (nn.AvgPool1d(3, 2), LINE),
    "adaptive avg-pool": (nn.AdaptiveAvgPool2d((3, 2)), MAP),
    "relu": (nn.ReLU(), MAP),
    "leaky relu": (nn.LeakyReLU(0.2), MAP),
    "leaky relu, falling": (nn.LeakyReLU(-0.2), MAP),
    "sigmoid": (nn.Sigmoid(), MAP),
    "tanh": (nn.Tanh(), ROW),
    "softplus": (nn.Softplus(2, 1), MAP),
    "silu": (nn.SiLU(), MAP),
    "gelu": (nn.GELU(), MAP),
    "gelu, tanh": (nn.GELU("tanh"), MAP),
    "batch norm, eval": (nn.BatchNorm2d(4).eval(), MAP),
    "batch norm 1d, eval, plain": (nn.BatchNorm1d(5, affine=False).eval(), ROW),
    "pad with −∞": (nn.ConstantPad2d((0, 1, 2, 0), -torch.inf), MAP),
    "pad with ones": (nn.ConstantPad2d((0, 1, 2, -1), 1.0), MAP),
    "pad, reflected": (nn.ReflectionPad2d(2), MAP),
    "flatten": (nn.Flatten(2), MAP),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_rule_of_its_own_agrees_with_torch(name):
    module, shape = SETTINGS[name]
    torch.manual_seed(1)
    module.double()
    for buffer in module.buffers():
        if buffer.dtype == torch.float64:
            buffer.uniform_(0.5, 1.5)
    x = torch.randn(shape, dtype=torch.float64)
    trace = traced(module, x)
    layers = [(n, trace.layers[n.index]) for n in trace.graph.nodes if n.kind == "active" and n.rule]
    assert not any(isinstance(layer, Generic) for _, layer in layers)
    node, layer = layers[-1]
    names = list(node.operands)
    values = [trace.values[node.operands[n]] for n in names]
    first = names.index("input")

    output = trace.values[node.index]
    torch.testing.assert_close(trace.logits, module(x), rtol=1e-12, atol=1e-12)
    for lead in ((), (3,)):
        t = torch.randn(*lead, *values[first].shape, dtype=x.dtype)
        d = torch.randn(*lead, *output.shape, dtype=x.dtype)
        batched = torch.func.vmap if lead else (lambda f: f)

        def plain(a):
            return reference_function(module, node, names, values, first)(a)

        expected = batched(lambda t: torch.func.jvp(plain, (values[first],), (t,))[1])(t)
        torch.testing.assert_close(layer.jvp({"input": t}), expected, rtol=1e-10, atol=1e-12)
        pull = torch.func.vjp(plain, values[first])[1]
        torch.testing.assert_close(
            layer.vjp(d, ["input"])["input"], batched(lambda d, pull=pull: pull(d)[0])(d), rtol=1e-10, atol=1e-12
        )

        def bend(t, d):
            return torch.func.jvp(lambda a: torch.func.vjp(plain, a)[1](d)[0], (values[first],), (t,))[1]

        bent = batched(bend)(t, d)
        found = layer.curvature(d, {"input": t}, ["input"]).get("input", torch.zeros_like(values[first]))
        torch.testing.assert_close(found, bent.sum(0) if lead else bent, rtol=1e-9, atol=1e-11)


def reference_function(module, node, names, values, first):
    """The torch function of a node at its own settings, as a function of its input alone."""
    if node.function is F.conv2d or node.function is F.conv1d:
        keys = ("stride", "padding", "dilation", "groups")
        zero = module.padding_mode == "zeros"
        settings = {k: getattr(module, k) if zero or k != "padding" else 0 for k in keys}
        weights = [values[names.index(n)] for n in ("weight", "bias") if n in names]
        return lambda a: node.function(a, *weights, **settings)
    return module


def traced(module, x):
    holder = nn.Sequential(module)
    holder.register_parameter("unused", nn.Parameter(torch.ones((), dtype=x.dtype)))
    return ibp.Network(holder).forward(x, {})


def test_pooling_keeps_the_first_maximum_of_a_tie_and_relu_is_flat_at_zero():
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    trace = traced(nn.Sequential(nn.MaxPool2d(3, 1), nn.ReLU()), x)
    pool = next(layer for layer in trace.layers if layer is not None and layer.label == "max_pool2d")
    assert pool.index.flatten().tolist() == [0, 1, 4, 5]
    relu = trace.layers[-1]
    assert not relu.jvp({"input": torch.ones(1, 1, 2, 2, dtype=torch.float64)}).any()


def defaults(function):
    """Of a function's arguments."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def torchs_defaults(function):
    """All that a torch function has for each of its arguments, in Python or in the overloads of its operator."""
    name = function.__name__
    try:
        return {n: [value] for n, value in defaults(vars(F).get(f"_{name}", function)).items()}
    except ValueError:
        operator, found = getattr(torch.ops.aten, name, None), {}
    schemas = [getattr(operator, key)._schema for key in operator.overloads()] if operator else []
    for argument in (argument for schema in schemas for argument in schema.arguments if argument.has_default_value()):
        found.setdefault(argument.name, []).append(argument.default_value)
    return found


def single(value):
    """The number given for each axis; no axis is none."""
    return (value[0] if value else None) if isinstance(value, (list, tuple)) else value


def test_what_a_call_leaves_out_is_torchs_default():
    compared = 0
    for function, rules in _RULES.items():
        torchs = torchs_defaults(function) if hasattr(function, "__name__") else {}
        for rule in rules:
            for name, value in defaults(rule.forward).items():
                known = [single(one) for one in torchs.get(name, [])]
                compared += len(known)
                assert not known or single(value) in known, (function, name)
    assert compared > 100
