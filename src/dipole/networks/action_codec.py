"""Action codec of Reactive Diffusion Policy: chunks to a few latent tokens, and back tick by tick with fast sensors.

Source: Xue et al., "Reactive Diffusion Policy: Slow-Fast Visual-Tactile Policy Learning for Contact-Rich Manipulation"
(RSS 2025). The encoder sees actions only: two strided convolutions and a Gaussian per token. The decoder is a causal
GRU that reads the whole latent and the fast sensors (force, touch) at every tick: what a latent means is a plan *and*
how to react. Trained as an autoencoder with L1 and a very small KL term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipole.diffusion.tensors import Random, randn
from dipole.errors import DipoleError

_STRIDE = 2  # of each of the two convolutions


@dataclass(frozen=True)
class CodecConfig:
    """The codec's shape; defaults are the paper's.

    Attributes:
        hidden: Channels of the first convolution.
        kernel_size: Of the convolutions (odd).
        width: n, channels of a token before and after the latent: this is what compresses (4 or 8).
        channels: Channels of the latent.
        gru: Width of the decoder.
        kl_weight: Weight of the KL divergence, summed over the latent.
        decoder: `asymmetric`: it sees the fast sensors; `symmetric`: it does not (ablation).
    """

    hidden: int = 32
    kernel_size: int = 5
    width: int = 4
    channels: int = 16
    gru: int = 32
    kl_weight: float = 1e-6
    decoder: Literal["asymmetric", "symmetric"] = "asymmetric"


class Posterior(NamedTuple):
    """A Gaussian per latent number, each `[B, L, C]`."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: Random = None) -> Tensor:
        """Return mean + std * noise."""
        noise = randn(tuple(self.mean.shape), generator, like=self.mean)
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        """Return the divergence from N(0, 1) of each row, summed over the latent: `[B]`."""
        per = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * per.sum((1, 2))


class ActionCodec(nn.Module):
    """Chunks `[B, T, Da]` to latents `[B, L, C]`, L = ceil(T / 4), and back.

    Args:
        config: Its shape.
        action_dim: Da.
        horizon: T.
        fast_dim: Width F of the fast sensors.
    """

    def __init__(self, config: CodecConfig, action_dim: int, horizon: int, fast_dim: int) -> None:
        super().__init__()
        if config.kernel_size % 2 == 0:
            raise DipoleError(f"kernel_size {config.kernel_size} of the action codec: it must be odd")
        self.config = config
        pad = config.kernel_size // 2
        self.encoder = nn.Sequential(
            nn.Conv1d(action_dim, config.hidden, config.kernel_size, _STRIDE, pad),
            nn.ReLU(),
            nn.Conv1d(config.hidden, config.width, config.kernel_size, _STRIDE, pad),
        )
        self.tokens = -(-horizon // _STRIDE**2)
        self.moments = nn.Conv1d(config.width, 2 * config.channels, 1)
        self.widths = nn.Conv1d(config.channels, config.width, 1)
        self.fast_dim = fast_dim if config.decoder == "asymmetric" else 0
        self.gru = nn.GRU(self.tokens * config.width + self.fast_dim, config.gru, batch_first=True)
        self.head = nn.Linear(config.gru, action_dim)

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Return (L, C)."""
        return self.tokens, self.config.channels

    def encode(self, actions: Tensor) -> Posterior:
        """Return the posterior of the latent of a chunk `[B, T, Da]`."""
        mean, log_variance = self.moments(self.encoder(actions.transpose(1, 2))).transpose(1, 2).chunk(2, dim=-1)
        return Posterior(mean, log_variance)

    def initial_hidden(self, batch: int) -> Tensor:
        """Return the decoder's state before the first tick, `[B, gru]`."""
        weight = self.head.weight
        return weight.new_zeros(batch, self.config.gru)

    def decode(self, latent: Tensor, fast: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the actions of some ticks and the decoder's state after them.

        Args:
            latent: `[B, L, C]`.
            fast: `[B, n, F]` fast sensors of n consecutive ticks.
            hidden: State after the tick before; None for the first tick of a chunk.

        Returns:
            `[B, n, Da]` and `[B, gru]`.
        """
        plan = self.widths(latent.transpose(1, 2)).flatten(1)
        inputs = plan.unsqueeze(1).expand(-1, fast.shape[1], -1)
        if self.fast_dim:
            inputs = torch.cat([inputs, fast], dim=-1)
        hidden = self.initial_hidden(len(latent)) if hidden is None else hidden
        out, last = self.gru(inputs, hidden.unsqueeze(0).contiguous())
        return self.head(out), last[0]

    def loss(self, actions: Tensor, fast: Tensor, generator: Random = None) -> Tensor:
        """Return L1 + kl_weight KL of chunks `[B, T, Da]` with the fast sensors `[B, T, F]` of the same ticks."""
        posterior = self.encode(actions)
        decoded, _ = self.decode(posterior.sample(generator), fast)
        return F.l1_loss(decoded, actions) + self.config.kl_weight * posterior.kl().mean()
