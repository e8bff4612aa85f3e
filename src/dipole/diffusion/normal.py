"""The distribution of a denoising step: a Normal, with log-density and divergence for policy gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dipole.diffusion.tensors import Random, constant, expand, randn, scaled

Reduce = Literal["sum", "mean", "none"]


@dataclass(frozen=True)
class Normal:
    """The distribution of the next sample: independent normals.

    Attributes:
        mean: `[B, ...]`.
        std: A number, or a tensor that broadcasts against `mean`; 0 where the step is deterministic.
    """

    mean: Tensor
    std: Tensor | float

    @property
    def deterministic(self) -> bool:
        """Whether the standard deviation is 0 everywhere."""
        if isinstance(self.std, Tensor):
            return not bool((self.std > 0).any())
        return self.std <= 0

    def sample(self, generator: Random = None, noise: Tensor | None = None) -> Tensor:
        """Return mean + std * noise, shaped as `mean`.

        No noise is drawn when the step is deterministic; with one generator per row, none for the rows where it is.
        """
        if self.deterministic:
            return self.mean
        if noise is None:
            noise = self._draw(generator)
        return self.mean + scaled(noise, self.std)

    def _draw(self, generator: Random) -> Tensor:
        drawing = None
        if isinstance(self.std, Tensor) and isinstance(generator, Sequence):
            drawing = (self.std > 0).expand_as(self.mean).flatten(1).any(1).tolist()
        return randn(tuple(self.mean.shape), generator, like=self.mean, drawing=drawing)

    def log_prob(self, value: Tensor, reduce: Reduce, mask: Tensor | None = None) -> Tensor:
        """Return the log-density of `value`.

        Args:
            value: `[B, ...]`, shaped as `mean`.
            reduce: `sum` or `mean` over everything but the batch (`[B]`), or `none` (shaped as `mean`). There is no
                default: clip ranges of policy-gradient objectives differ by the number of dimensions between the two.
            mask: Entries that count, `[B]`, `[B, T]` or broadcastable to `mean`; the others (pinned parts, finished
                positions) give 0.

        Raises:
            ValueError: The step is deterministic at an entry that counts, so that it has no density.
        """
        counts = self._counts(mask)
        std = self._positive_std(counts)
        error = -0.5 * ((value - self.mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return _reduced(error, counts, reduce)

    def kl(self, other: Normal, reduce: Reduce, mask: Tensor | None = None) -> Tensor:
        """Return the Kullback-Leibler divergence KL(self || other); arguments and errors as in `log_prob`."""
        counts = self._counts(mask)
        std, other_std = self._positive_std(counts), other._positive_std(counts)
        distance = ((self.mean - other.mean) ** 2 + std**2) / (2 * other_std**2)
        return _reduced(torch.log(other_std / std) + distance - 0.5, counts, reduce)

    def _counts(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else expand(mask, self.mean).expand_as(self.mean).bool()

    def _positive_std(self, counts: Tensor | None) -> Tensor:
        """Return the standard deviation, 1 at entries that do not count."""
        if not isinstance(self.std, Tensor) and self.std > 0:
            return constant(self.std, self.mean.dtype)
        std = torch.as_tensor(self.std, dtype=self.mean.dtype, device=self.mean.device)
        if counts is not None:
            std = torch.where(counts, std, torch.ones_like(std))
        if bool((std <= 0).any()):
            raise ValueError(
                "this denoising step is deterministic (std 0), it has no log-probability: sample with a stochastic "
                "kernel (DDPM, DDIM with eta > 0, FlowSDE, CPS), or leave the last step out of the score"
            )
        return std


def _reduced(value: Tensor, counts: Tensor | None, reduce: Reduce) -> Tensor:
    if counts is not None:
        value = torch.where(counts, value, torch.zeros_like(value))
    if reduce == "none":
        return value
    if reduce not in ("sum", "mean"):
        raise ValueError(f"unknown reduce '{reduce}': sum, mean or none")
    total = value.flatten(1).sum(1)
    if reduce == "sum":
        return total
    return total / (value[0].numel() if counts is None else counts.flatten(1).sum(1).clamp(min=1))


def log_prob(dist: Normal | Mapping[str, Normal], value: Any, reduce: Reduce, mask: Any = None) -> Tensor:
    """Return the log-density of a step: that of a Normal, or the sum over the parts of each one's.

    Args:
        dist: From `Kernel.step`.
        value: The next sample.
        reduce: As in `Normal.log_prob`, within a part.
        mask: As in `Normal.log_prob`, or one per part.
    """
    if isinstance(dist, Normal):
        return dist.log_prob(value, reduce, mask)
    if reduce == "none":
        raise ValueError("reduce='none' has no meaning over parts of different shapes: use sum or mean")
    masks = mask if isinstance(mask, Mapping) else dict.fromkeys(dist, mask)
    return torch.stack([part.log_prob(value[key], reduce, masks[key]) for key, part in dist.items()]).sum(0)
