import pytest
import torch
from torch import nn

from dipole.errors import DipoleError
from dipole.networks import UNet1DConfig
from dipole.networks.unet1d import Conv1d


@pytest.mark.parametrize(("levels", "horizon"), [(3, 6), (3, 2), (4, 12), (2, 5)])
def test_horizon_must_divide(levels, horizon):
    config = UNet1DConfig(down_dims=(16,) * levels)
    with pytest.raises(DipoleError, match=f"pred_horizon {horizon} .* multiple of {2 ** (levels - 1)}"):
        config.build(2, horizon, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "odd"),
        ({"down_dims": (12, 24)}, "12 is not a multiple"),
        ({"down_dims": (16, 36), "n_groups": 8}, "36 is not a multiple"),
        ({"down_dims": (12, 24), "n_groups": 4}, "groups of the head"),
        ({"down_dims": ()}, "0 U-Net levels"),
    ],
)
def test_impossible_shapes(options, message):
    with pytest.raises(DipoleError, match=message):
        UNet1DConfig(**options).build(2, 8, {})


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


def test_any_horizon_that_divides():
    for horizon in (4, 12, 20):
        network = UNet1DConfig(down_dims=(8, 16, 32), step_embed_dim=8).build(3, horizon, {})
        x = torch.randn(2, horizon, 3)
        assert network(x, torch.zeros(2)).shape == x.shape
