import pytest
import torch

from dipole.errors import DipoleError
from dipole.networks import UNet1DConfig


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


def test_any_horizon_that_divides():
    for horizon in (4, 12, 20):
        network = UNet1DConfig(down_dims=(8, 16, 32), step_embed_dim=8).build(3, horizon, {})
        x = torch.randn(2, horizon, 3)
        assert network(x, torch.zeros(2)).shape == x.shape
