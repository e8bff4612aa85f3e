"""The action codec: shapes, the two decoders, the divergence, and that it learns to react."""

import pytest
import torch

from dipole.errors import DipoleError
from dipole.networks.action_codec import ActionCodec, CodecConfig, Posterior


@pytest.mark.parametrize(("horizon", "tokens"), [(32, 8), (16, 4), (18, 5)])
def test_a_token_stands_for_four_ticks(horizon, tokens):
    codec = ActionCodec(CodecConfig(), 3, horizon, 6)
    assert codec.latent_shape == (tokens, 16)
    chunk, fast = torch.randn(2, horizon, 3), torch.randn(2, horizon, 6)
    posterior = codec.encode(chunk)
    assert posterior.mean.shape == (2, tokens, 16)
    decoded, hidden = codec.decode(posterior.mean, fast)
    assert decoded.shape == chunk.shape
    assert hidden.shape == (2, 32)


def test_divergence_from_the_standard_normal():
    zero = torch.zeros(2, 3, 4)
    assert Posterior(zero, zero).kl().tolist() == [0, 0]
    g = torch.Generator().manual_seed(0)
    p = Posterior(torch.randn(5, 3, 4, generator=g), torch.randn(5, 3, 4, generator=g))
    own = torch.distributions.Normal(p.mean, (0.5 * p.log_variance).exp())
    expected = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0)).sum((1, 2))
    torch.testing.assert_close(p.kl(), expected)


def test_samples_have_the_posterior_moments():
    p = Posterior(torch.full((20_000, 1, 1), 2.0), torch.full((20_000, 1, 1), 1.0))
    drawn = p.sample(torch.Generator().manual_seed(0))
    # standard deviation e^0.5 = 1.65; five standard errors of 20,000 draws
    assert drawn.mean().item() == pytest.approx(2.0, abs=0.06)
    assert drawn.std().item() == pytest.approx(1.6487, abs=0.05)


def test_the_symmetric_decoder_feels_nothing():
    for decoder, feels in (("asymmetric", True), ("symmetric", False)):
        torch.manual_seed(0)
        codec = ActionCodec(CodecConfig(decoder=decoder), 2, 16, 3)
        latent, fast = torch.randn(2, 4, 16), torch.randn(2, 16, 3)
        assert torch.equal(codec.decode(latent, fast)[0], codec.decode(latent, fast + 1)[0]) != feels


def test_only_a_decoder_that_feels_can_learn_to_react():
    """Actions that follow the force are not in the latent of other chunks: an asymmetric decoder finds them anyway."""
    errors = {}
    for decoder in ("asymmetric", "symmetric"):
        torch.manual_seed(0)
        codec = ActionCodec(CodecConfig(decoder=decoder, width=1, channels=1), 1, 16, 1)
        optimizer = torch.optim.Adam(codec.parameters(), 1e-2)
        for _ in range(150):
            fast = torch.randn(64, 16, 1)
            loss = codec.loss(fast, fast)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors[decoder] = loss.item()
    # four numbers cannot hold sixteen independent ones; mean |N(0,1)| is 0.8
    assert errors["symmetric"] > 0.5
    assert errors["asymmetric"] < 0.3


def test_even_kernels_are_answered():
    with pytest.raises(DipoleError, match="must be odd"):
        ActionCodec(CodecConfig(kernel_size=4), 2, 16, 1)
