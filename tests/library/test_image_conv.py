"""The data gradient of convolutions over images, by shifted sums."""

import pytest
import torch
import torch.nn.functional as F

from ibp_triton import image_conv

CASES = [  # channels, kernel, size, stride, padding, dilation
    (1, (4, 4), (9, 11), 1, 0, 1),
    (1, (3, 3), (8, 8), 2, 1, 1),
    (2, (2, 5), (9, 10), (2, 1), (1, 2), (1, 2)),
    (3, (5, 5), (10, 12), 1, 2, 1),  # a kernel row of 15 numbers: by rows
    (3, (5, 5), (10, 12), (1,), (0, 1), 1),
    (3, (5, 5), (9, 9), 1, 4, 2),
    (3, (1, 1), (4, 5), 3, 0, 1),
]


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize(("channels", "kernel", "size", "stride", "padding", "dilation"), CASES)
def test_all_derivatives_are_autograds(channels, kernel, size, stride, padding, dilation, last):
    x, weight, bias = _batch(channels, kernel, size, last)
    settings = (stride, padding, dilation)
    found, expected = (_gradients(f, x, weight, bias, settings) for f in (image_conv.conv2d, F.conv2d))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_in_pieces_that_fit_a_cache(monkeypatch):
    monkeypatch.setattr(image_conv, "_samples", lambda d, weight: 2)
    x, weight, bias = _batch(3, (5, 5), (10, 12), False)
    found, expected = (_gradients(f, x, weight, bias, (1, 2, 1)) for f in (image_conv.conv2d, F.conv2d))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_its_derivative_has_a_derivative():
    x, weight, bias = _batch(3, (3, 3), (6, 6), False)
    assert torch.autograd.gradgradcheck(lambda *a: image_conv.conv2d(*a, padding=1), (x, weight, bias))


@pytest.mark.parametrize("frozen", ["weight", "bias", "both", "no bias"])
def test_frozen_parameters(frozen):
    x, weight, bias = _batch(1, (3, 3), (6, 6), False)
    weight.requires_grad_(frozen not in ("weight", "both"))
    bias.requires_grad_(frozen not in ("bias", "both"))
    found, expected = (
        f(x, weight, None if frozen == "no bias" else bias).square().sum() for f in (image_conv.conv2d, F.conv2d)
    )
    wanted = [t for t in (x, weight, bias) if t.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, allow_unused=True), torch.autograd.grad(expected, wanted, allow_unused=True)
    )


@pytest.mark.parametrize("case", ["groups", "channels", "no batch", "same", "no derivative"])
def test_what_it_leaves_to_torch(case):
    x, weight, bias = _batch(8 if case == "channels" else 2, (3, 3), (6, 6), False)
    if case == "no batch":
        x = x[0]
    if case == "groups":
        weight = weight[:, :1]
    x = x.detach().requires_grad_(case != "no derivative")
    options = {"groups": 2 if case == "groups" else 1, "padding": "same" if case == "same" else 0}
    y = image_conv.conv2d(x, weight, bias, **options)
    assert torch.equal(y, F.conv2d(x, weight, bias, **options))
    names = {y.grad_fn.name(), *(f.name() for f, _ in y.grad_fn.next_functions if f)}  # a batch axis adds a view
    assert "ConvolutionBackward0" in names


def _batch(channels, kernel, size, last):
    torch.manual_seed(1)
    x = torch.randn(5, channels, *size, dtype=torch.float64)
    weight = torch.randn(6, channels, *kernel, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(6, dtype=torch.float64, requires_grad=True)


def _gradients(function, x, weight, bias, settings):
    y = function(x, weight, bias, *settings)
    torch.manual_seed(2)
    d = torch.randn_like(y)
    return [y, *torch.autograd.grad(y, [x, weight, bias], d)]
