"""Gradient guidance: push samples along the gradient of a log-density, reward or constraint.

To sample p(x0) exp(f(x0)), the score is to grow by g = grad log E[exp f(x0) | x_t]; in terms of the denoiser

    x0_hat  ->  x0_hat + sigma^2 / alpha * g.

That g is rarely known. What is used in its place, by `where`:

| where      | g                                          | source                                                |
|------------|--------------------------------------------|-------------------------------------------------------|
| `x_t`      | gradient at the noisy sample               | classifier guidance (Dhariwal & Nichol 2021), PGD     |
| `x0`       | gradient at x0_hat, as if dx0_hat/dx = 1   | PGD's denoised guidance                               |
| `x0+chain` | gradient at x0_hat, through the denoiser   | reconstruction guidance, DPS (Chung et al. 2023)      |

These are three different distributions. With `x_t` and an exact time-dependent gradient (`oracle.label_score`) the
result is the tilted density; the other two are not, even for Gaussians.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dipole.diffusion.denoiser import Denoiser, Processes, prepare
from dipole.diffusion.tensors import Level, expand, map_parts

Gradient = Callable[[Any, Any, Any], Any]
Where = Literal["x_t", "x0", "x0+chain"]


def gradient_of(objective: Callable[[Any, Any, Any], Tensor]) -> Gradient:
    """Return `gradient(x, t, cond)` of an `objective(x, t, cond) -> [B]` (summed over rows, so rows stay apart)."""

    def gradient(x: Any, t: Any, cond: Any = None) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            start = map_parts(_leaf, x)
            value = objective(start, t, _ordinary(cond)).sum()
            return _backward(value, start)

    return gradient


def by_step(levels: Tensor, scale: Callable[[int, int], float]) -> Callable[[Any], float]:
    """Return a schedule over levels from one over steps: `scale(k, num_steps)` at the k-th visited level, 0 elsewhere.

    Solvers also call the denoiser between the visited levels (midpoints, churn): there the schedule is 0.
    """
    visited = levels.tolist()[:-1]
    values = {level: scale(k, len(visited)) for k, level in enumerate(visited)}
    return lambda t: values.get(float(t), 0.0)


@dataclass(frozen=True)
class GradientGuidance:
    """A denoiser whose output is shifted by sigma^2 / alpha times a gradient.

    At a level without signal (alpha = 0: `Flow` at 1) the shift is left out: nothing is known about x0 there, and the
    factor is infinite. Start just below it where that first step matters.

    Attributes:
        denoiser: The denoiser to guide.
        process: Its process, or one per part.
        gradient: `gradient(x, t, cond)`, shaped as `x`, evaluated at x_t or x0_hat (see `where`); with parts it may
            leave parts out. From an objective: `gradient_of`.
        where: See the table above.
        scale: A number, or a function of the level (a number or a tensor) that returns the scale there.
        mask: Entries that are pushed, broadcastable to `x`, or parts; default all.
        normalize: Divide each row's gradient by its norm (over everything but the batch, after the mask).
    """

    denoiser: Denoiser
    process: Processes
    gradient: Gradient
    where: Where = "x0"
    scale: float | Callable[[Any], Any] = 1.0
    mask: Any = None
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.where not in ("x_t", "x0", "x0+chain"):
            raise ValueError(f"unknown where '{self.where}': x_t, x0 or x0+chain")

    def __call__(self, x: Any, t: Any, cond: Any = None) -> Any:
        """Return the shifted x0_hat, shaped as `x`."""
        if self.where == "x0+chain":
            x0_hat, push = self._through_denoiser(x, t, cond)
        else:
            x0_hat = self.denoiser(x, t, cond)
            push = self.gradient(x if self.where == "x_t" else x0_hat, t, cond)
        if not isinstance(x0_hat, Mapping):
            return self._shifted(x0_hat, push, t, self.process, self.mask)
        return {
            key: self._shifted(part, push[key], *(_part(value, key) for value in (t, self.process, self.mask)))
            if key in push
            else part
            for key, part in x0_hat.items()
        }

    def prepare(self, levels: Level, cond: Any) -> Denoiser:
        """Prepare the denoiser."""
        return replace(self, denoiser=prepare(self.denoiser, levels, cond))

    def _through_denoiser(self, x: Any, t: Any, cond: Any) -> tuple[Any, Any]:
        with torch.inference_mode(False), torch.enable_grad():
            start = map_parts(_leaf, x)
            x0_hat = self.denoiser(start, t, _ordinary(cond))
            found = map_parts(Tensor.detach, x0_hat)
            at_x0 = self.gradient(found, t, cond)
            if isinstance(x0_hat, Mapping):
                value = torch.stack([(x0_hat[key] * part.detach()).sum() for key, part in at_x0.items()]).sum()
            else:
                value = (x0_hat * at_x0.detach()).sum()
            return found, _backward(value, start)

    def _shifted(self, x0_hat: Tensor, push: Tensor, t: Any, process: Any, mask: Tensor | None) -> Tensor:
        alpha, sigma = process.alpha(t), process.sigma(t)
        factor = torch.where(alpha > 0, sigma**2 / alpha, torch.zeros_like(alpha))
        scale = self.scale(t) if callable(self.scale) else self.scale
        if mask is not None:
            push = push * mask
        if self.normalize:
            norm = push.flatten(1).norm(dim=1)
            push = push / expand(torch.where(norm > 0, norm, torch.ones_like(norm)), push)
        return x0_hat + expand(factor * scale, push).to(push) * push


def _part(value: Any, key: str) -> Any:
    return value[key] if isinstance(value, Mapping) else value


def _leaf(x: Tensor) -> Tensor:
    """Return a copy that gradients can be taken of, even inside inference mode."""
    return x.detach().clone().requires_grad_()


def _ordinary(cond: Any) -> Any:
    """Return conditioning that autograd may keep: tensors made in inference mode are copied."""
    if isinstance(cond, Mapping):
        return {key: _ordinary(value) for key, value in cond.items()}
    return cond.clone() if isinstance(cond, Tensor) and cond.is_inference() else cond


def _backward(value: Tensor, start: Any) -> Any:
    """Return the gradient of a scalar, shaped as `start`; 0 for parts it does not depend on."""
    if not isinstance(start, Mapping):
        (gradient,) = torch.autograd.grad(value, start, allow_unused=True)
        return torch.zeros_like(start) if gradient is None else gradient
    gradients = torch.autograd.grad(value, list(start.values()), allow_unused=True)
    return {
        key: torch.zeros_like(part) if gradient is None else gradient
        for (key, part), gradient in zip(start.items(), gradients, strict=True)
    }
