"""The U-Net with the batch as the last axis is the same function, with the same gradients."""

import pytest
import torch

from dipole.networks import unet1d_batch_last
from dipole.networks.unet1d import UNet1DConfig

SHAPES = {
    "paper's": {},
    "shift only": {"film_scale": False},
    "kernel of 3, 4 groups": {"kernel_size": 3, "n_groups": 4},
    "kernel of 7": {"kernel_size": 7},
    "one level": {"down_dims": (16,)},
    "levels per position": {"per_position_levels": True},
}
ROWS = 16


def make(**options):
    torch.manual_seed(0)
    return UNet1DConfig(**{"down_dims": (16, 32, 64), **options}).build(3, 8, {"obs": (2, 5)})


def call(network, dtype):
    """Return the output and all gradients for one batch."""
    draws = torch.Generator().manual_seed(1)
    x, obs = torch.randn(ROWS, 8, 3, generator=draws), torch.randn(ROWS, 2, 5, generator=draws)
    time = 999 * torch.rand(ROWS, generator=draws)
    x.requires_grad_()
    out = network(x.to(dtype), time.to(dtype), {"obs": obs.to(dtype)})
    gradients = torch.autograd.grad(out.double().square().sum(), [x, *network.parameters()])
    return [out.detach(), *gradients]


def distance(found, true):
    """Return the relative error of some tensors, as one vector."""
    error = [(mine - value).double().norm() for mine, value in zip(found, true, strict=True)]
    return float(torch.stack(error).norm() / torch.stack([value.norm() for value in true]).norm())


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_function(name, monkeypatch):
    network = make(**SHAPES[name]).double()
    expected = call(network, torch.float64)
    monkeypatch.setattr(unet1d_batch_last, "applies", lambda x: True)
    for theirs, ours in zip(expected, call(network, torch.float64), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))


def test_no_further_from_float64_under_autocast(monkeypatch):
    network, exact = make(), call(make().double(), torch.float64)

    def errors():
        with torch.autocast("cpu", torch.bfloat16):
            found = call(network, torch.float32)
        assert all(gradient.dtype == torch.float32 for gradient in found[1:])
        return distance(found[:1], exact[:1]), distance(found[1:], exact[1:])

    plain = errors()
    monkeypatch.setattr(unet1d_batch_last, "applies", lambda x: True)
    for ours, theirs in zip(errors(), plain, strict=True):
        assert ours < 1.2 * theirs


def test_a_compiled_network_takes_it_when_it_trains_in_bfloat16(monkeypatch):
    taken = []
    ours = unet1d_batch_last.unet1d
    monkeypatch.setattr(unet1d_batch_last, "unet1d", lambda *args: taken.append(True) or ours(*args))
    compiled = make(down_dims=(16,))
    compiled.compile(backend="aot_eager", dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(compiled, torch.float32)
    assert len(taken) == 1
    assert distance(found, call(make(down_dims=(16,)).double(), torch.float64)) < 0.03  # measured: 0.011
    call(compiled, torch.float32)  # in float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # not training
        compiled(torch.zeros(ROWS, 8, 3), torch.zeros(ROWS), {"obs": torch.zeros(ROWS, 2, 5)})
    assert len(taken) == 1
