"""Losses of policy gradients: clipped ratios per denoising step, entropy temperature, distance to a reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dipole.errors import DipoleError


def clip_schedule(steps: int, first: float, last: float, rho: float) -> Tensor:
    """Return the clip range of each tuned denoising step, `[K']`, rising from `first` (noisiest) to `last`.

        eps_i = first + (last - first) (e^{rho i/(K'-1)} - 1) / (e^rho - 1)        (DPPO, Ren et al. 2024)

    With one step it is `last` (the formula would divide 0 by 0); with rho = 0 it is linear.
    """
    if steps == 1:
        return torch.tensor([last], dtype=torch.float64)
    x = torch.linspace(0, 1, steps, dtype=torch.float64)
    return first + (last - first) * (x if rho == 0 else torch.expm1(rho * x) / math.expm1(rho))


def ppo_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: Tensor | float) -> Tensor:
    """Return the clipped surrogate, to be minimised (Schulman et al. 2017, eq. 7), as a mean over all entries.

    Args:
        log_prob: `[..., K']` under the present policy.
        old_log_prob: Of the policy that collected.
        advantage: Shaped as those.
        clip: A number or `[K']`.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = torch.maximum(torch.minimum(ratio, torch.as_tensor(1 + clip)), torch.as_tensor(1 - clip))
    return torch.maximum(-advantage * ratio, -advantage * clipped).mean()


@torch.no_grad()
def ratio_figures(log_prob: Tensor, old_log_prob: Tensor, clip: Tensor | float) -> dict[str, float]:
    """Return `kl` (estimate of KL(old || new), Schulman's k3), `clipped` (share outside the range), `ratio_error`."""
    gap = log_prob - old_log_prob
    ratio = gap.exp()
    return {
        "kl": float((ratio - 1 - gap).mean()),
        "clipped": float(((ratio - 1).abs() > clip).double().mean()),
        "ratio_error": float((ratio - 1).abs().max()),
    }


class Temperature(nn.Module):
    """The weight of the entropy in soft actor-critic, adjusted towards a target entropy (Haarnoja et al. 2018).

    Args:
        target: Wanted entropy of the action in [-1, 1]^d, in nats.
        dim: d.
        start: First temperature.

    Raises:
        DipoleError: No distribution on [-1, 1]^d has that entropy (the uniform one has d log 2, the most): the
            temperature would grow without bound.
    """

    def __init__(self, target: float, dim: int, start: float = 1.0) -> None:
        super().__init__()
        most = dim * math.log(2)
        if not target < most:
            raise DipoleError(
                f"target entropy {target:.3g} cannot be reached: an action of {dim} components in [-1, 1] has at most "
                f"{most:.3g} nats; choose a smaller one, such as {-dim / 2:g}"
            )
        self.target = target
        self.log_alpha = nn.Parameter(torch.tensor(math.log(start)))

    @property
    def alpha(self) -> Tensor:
        """Return the temperature, without gradient."""
        return self.log_alpha.detach().exp()

    def loss(self, log_prob: Tensor) -> Tensor:
        """Return the loss of the temperature for actions of log-probability `log_prob` `[B]`."""
        return -self.log_alpha.exp() * (log_prob.detach().mean() + self.target)
