import numpy as np
import pytest
import torch

from dipole.errors import DipoleError
from dipole.networks.embedding import SinusoidalEmbedding, StepEncoder, flat_width, flatten_cond


def test_sinusoids_are_the_published_formula():
    time, half = np.array([0.0, 1.0, 37.5, 99.0]), 16
    frequency = 10000.0 ** (-np.arange(half) / (half - 1))
    angle = time[:, None] * frequency
    expected = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    ours = SinusoidalEmbedding(2 * half)(torch.tensor(time, dtype=torch.float32))
    # Angles up to 99 in float32 are off by up to 99 x 2^-24 x a few.
    np.testing.assert_allclose(ours.numpy(), expected, atol=3e-5)


def test_sinusoids_have_no_weights_and_leave_no_trace_in_checkpoints():
    assert SinusoidalEmbedding(8).state_dict() == {}


@pytest.mark.parametrize("dim", [2, 7, 0])
def test_impossible_widths(dim):
    with pytest.raises(DipoleError, match=f"width {dim}"):
        SinusoidalEmbedding(dim)


def test_step_encoder_concatenates_positions_in_order():
    encoder = StepEncoder(8, 16, 4, positions=3)
    time = torch.tensor([[1.0, 20.0, 300.0]])
    joined = torch.cat([encoder[0](time[:, i]) for i in range(3)], dim=-1)
    assert torch.equal(encoder(time), encoder[3](encoder[2](encoder[1](joined))))


def test_flatten_cond():
    cond = {"b": torch.arange(6.0).view(1, 2, 3), "a": torch.tensor([[[7.0, 8.0]]])}
    assert flatten_cond(cond, ("a", "b")).tolist() == [[7, 8, 0, 1, 2, 3, 4, 5]]
    assert flatten_cond(cond, ()) is None
    assert flat_width({"a": (1, 2), "b": (2, 3)}) == 8
    with pytest.raises(DipoleError, match="'c' is missing.*got b, a"):
        flatten_cond(cond, ("c",))
    with pytest.raises(DipoleError, match="got nothing"):
        flatten_cond(None, ("c",))
