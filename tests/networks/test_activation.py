"""Mish with one exponential is Mish."""

import pytest
import torch
from torch.nn import functional as F

from dipole.networks.activation import Mish, _OneExponential, mish


@pytest.fixture
def values():
    generator = torch.Generator().manual_seed(0)
    spread = 8 * torch.randn(500, generator=generator, dtype=torch.float64)
    return torch.cat((spread, torch.tensor([-100.0, -40.0, 0.0, 19.9, 20.1, 40.0, 100.0], dtype=torch.float64)))


def test_values_and_slopes_in_float64(values):
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    out, expected = _OneExponential.apply(ours), F.mish(theirs)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-15)
    weights = torch.linspace(-1, 1, len(values), dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_values_in_lower_precision(values, dtype, tolerance):
    x = values.to(dtype)
    out = _OneExponential.apply(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), F.mish(x.double()), rtol=tolerance, atol=tolerance)


def test_where_nothing_is_compiled_it_is_torchs_own(values):
    assert torch.equal(mish(values), F.mish(values))
    assert torch.equal(Mish()(values), F.mish(values))
