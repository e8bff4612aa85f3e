import pytest
import torch
from torch import nn

from dipole.networks.convolution import Conv1d


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 4), (2, 4), (1, 8), (1, 16), (3, 16)])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (5, 1), (3, 2)])
def test_conv1d_is_torchs(batch, length, kernel, stride):
    """On both sides of the number of columns where the matrix product takes over."""
    torch.manual_seed(0)
    conv = Conv1d(6, 10, kernel, stride, padding=kernel // 2).double()
    x = torch.randn(batch, 6, length, dtype=torch.float64)
    torch.testing.assert_close(conv(x), nn.Conv1d.forward(conv, x), atol=1e-13, rtol=1e-13)


def test_conv1d_gradients_are_torchs():
    torch.manual_seed(0)
    conv, x = Conv1d(4, 4, 3, padding=1).double(), torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    tensors = (x, *conv.parameters())
    ours = torch.autograd.grad(conv(x).square().sum(), tensors)
    theirs = torch.autograd.grad(nn.Conv1d.forward(conv, x).square().sum(), tensors)
    torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=1e-13)


def gradients(layer, x, dy, dtype):
    x = x.to(dtype, copy=True).requires_grad_()
    layer.zero_grad()
    layer(x).backward(dy.to(dtype))
    return [x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize(("batch", "length"), [(16, 2), (16, 3), (16, 4), (17, 8), (16, 9), (8, 8), (12, 8), (64, 8)])
@pytest.mark.parametrize(("channels", "kernel"), [((128, 136), 5), ((136, 128), 3), ((130, 128), 1)])
def test_gradients_in_bfloat16_are_as_good_as_torchs(channels, kernel, batch, length):
    """Both against float64, with weights and inputs that bfloat16 can represent."""
    torch.manual_seed(0)
    ours = Conv1d(*channels, kernel, padding=kernel // 2).bfloat16()
    theirs, exact = (nn.Conv1d(*channels, kernel, padding=kernel // 2) for _ in range(2))
    for layer, dtype in ((theirs, torch.bfloat16), (exact, torch.float64)):
        layer.load_state_dict(ours.state_dict())
        layer.to(dtype)
    x, dy = (torch.randn(batch, width, length).bfloat16() for width in channels)
    found = [gradients(ours, x, dy, torch.bfloat16), gradients(theirs, x, dy, torch.bfloat16)]
    true = gradients(exact, x, dy, torch.float64)
    for mine, torchs, value in zip(*found, true, strict=True):
        assert mine.shape == value.shape
        errors = [(gradient.double() - value).norm() / value.norm() for gradient in (mine, torchs)]
        assert errors[0] <= 1.2 * errors[1] + 1e-4
        assert errors[0] < 0.005


def test_gradients_under_autocast_reach_the_float32_weights():
    torch.manual_seed(0)
    ours, x = Conv1d(128, 128, 5, padding=2), torch.randn(16, 128, 4)
    theirs = nn.Conv1d(128, 128, 5, padding=2)
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        out.float().square().mean().backward()
    assert ours.weight.grad.dtype == torch.float32
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, atol=1e-5, rtol=0.02)


def test_gradients_of_gradients():
    torch.manual_seed(0)
    ours, x = Conv1d(128, 128, 3, padding=1).bfloat16(), torch.randn(16, 128, 4).bfloat16()
    theirs = nn.Conv1d(128, 128, 3, padding=1).bfloat16()
    theirs.load_state_dict(ours.state_dict())
    second = []
    for layer in (ours, theirs):
        (first,) = torch.autograd.grad(layer(x).square().mean(), layer.weight, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), layer.weight)[0].float())
    assert (second[0] - second[1]).norm() < 0.02 * second[1].norm()
