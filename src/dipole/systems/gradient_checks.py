"""What must hold exactly of N-PG-IGT and N-HARPG: expectations by quadrature, finite differences, quadratics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dipole.rl.control import LQR, CartPole
from dipole.rl.normalized_gradient import DirectionConfig, Track, advance, hessian_term, preset, sampling_point
from dipole.rl.policy_search import Problem, Trajectories
from dipole.systems.card import Claim, Margin, Measure

SHORT = Problem(LQR(), horizon=3, gamma=0.95, bias=False, std=0.5)
GAIN = torch.tensor([[-0.3, -0.6]], dtype=torch.float64)
VECTOR = torch.tensor([[0.4, -0.7]], dtype=torch.float64)
START = torch.tensor([1.0, -0.5], dtype=torch.float64)
# Reward from h on is of degree 2 in the noises, a score too: B of degree 6, integrated exactly by 4 nodes per noise.
NODES = 4
ROUNDING = 1e-9


def quadrature() -> tuple[Trajectories, Tensor]:
    """Return all trajectories of the short LQR on a grid of Gauss and Hermite, and their weights (mean 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    noise = np.stack(np.meshgrid(*[nodes] * SHORT.horizon, indexing="ij"), -1).reshape(-1, SHORT.horizon)
    weight = np.stack(np.meshgrid(*[weights / weights.sum()] * SHORT.horizon, indexing="ij"), -1)
    grid = torch.from_numpy(noise)[None]
    state = START.expand(1, len(noise), 2)
    batch = SHORT.play(GAIN, state, lambda mean, h: mean + SHORT.std * grid[..., h, None])
    return batch, len(noise) * torch.from_numpy(weight.reshape(-1, SHORT.horizon).prod(1))


def expected(baseline: Tensor | None = None, sign: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return E[g] and E[B v] of the short LQR, `[2]` each.

    Args:
        baseline: `[1, H]`.
        sign: Of the first term of B; -1 is that of the authors' code.
    """
    batch, weight = quadrature()
    theta = GAIN.clone().requires_grad_()
    phi, log_prob = SHORT.phi(theta, batch, baseline)
    phi = weight * phi
    still = torch.zeros_like(phi) * theta.sum()  # a log p without slope leaves Hess Phi v
    (gradient,) = torch.autograd.grad(phi.mean(), theta, retain_graph=True)
    alone = hessian_term(phi, still, [theta], [VECTOR], keep=True)[0]
    whole = hessian_term(phi, log_prob, [theta], [VECTOR])[0]
    return gradient[0], (alone + sign * (whole - alone))[0]


def closed_form() -> tuple[Tensor, Tensor]:
    """Return grad J and Hess J v of the short LQR, `[2]` each."""
    lqr, moment = LQR(), torch.outer(START, START)

    def value(gain: Tensor) -> Tensor:
        return lqr.value(gain.view(1, 2), SHORT.std, SHORT.horizon, SHORT.gamma, moment)

    hessian = torch.autograd.functional.hessian(value, GAIN[0])  # type: ignore[no-untyped-call]
    return lqr.gradient(GAIN, SHORT.std, SHORT.horizon, SHORT.gamma, moment)[0], hessian @ VECTOR[0]


def unbiased() -> list[Claim]:
    """The gradient and the Hessian's correction on LQR, in expectation."""
    (gradient, product), (slope, curve) = expected(), closed_form()
    moved = expected(torch.tensor([[3.0, -1.0, 2.0]], dtype=torch.float64))
    shifted = max(gap(moved[0], gradient), gap(moved[1], product))
    turned = expected(sign=-1.0)[1]
    return [
        check("E[g] is the gradient of LQR", gap(gradient, slope), "closed form; expectation by quadrature"),
        check("E[B v] is the Hessian of LQR times v", gap(product, curve), "closed form; expectation by quadrature"),
        check("a baseline changes neither", shifted),
        Claim(
            "error of E[B v] with the sign of the authors' code",
            "",
            Measure(gap(turned, curve) / float(curve.norm())),
            None,
            None,
            "relative; what the correction here avoids",
        ),
    ]


def finite_difference() -> Claim:
    """B v of one trajectory each, against the derivative of its reweighted gradient, for a softmax network."""
    problem = Problem(CartPole(), horizon=12, gamma=0.99, hidden=(4,))
    random = torch.Generator().manual_seed(0)
    theta = torch.randn(1, problem.num_parameters, dtype=torch.float64, generator=random)
    vector = torch.randn(theta.shape, dtype=torch.float64, generator=random)
    batch = problem.sample(theta, 3, random)
    at = problem.phi(theta, batch)[1]

    def reweighted(e: float) -> Tensor:
        moved = (theta + e * vector).requires_grad_()
        phi, log_prob = problem.phi(moved, batch)
        ratio = (log_prob - at).exp().detach()
        return torch.autograd.grad((ratio * phi).mean(), moved)[0]

    step = 1e-5
    difference = (reweighted(step) - reweighted(-step)) / (2 * step)
    theta.requires_grad_()
    ours = hessian_term(*problem.phi(theta, batch), [theta], [vector])[0]
    # a central difference at 1e-5 in float64 is good to about 1e-9, relative
    relative = gap(ours, difference) / float(difference.abs().max())
    return check(
        "B v is the derivative of the reweighted gradient", relative, "relative; 3 CartPole trajectories", 1e-7
    )


def on_quadratic(direction: DirectionConfig, steps: int = 30) -> tuple[float, float]:
    """Return how far d_t is from grad J(th_t) and step lengths from gamma_t, at most, on a noise-free quadratic."""
    random = torch.Generator().manual_seed(1)
    root, offset = torch.randn(5, 5, dtype=torch.float64, generator=random), torch.ones(5, dtype=torch.float64)
    hessian = -(root @ root.T) / 5 - 0.1 * torch.eye(5, dtype=torch.float64)

    def slope(theta: Tensor) -> Tensor:
        return hessian @ theta + offset

    track = Track.start(torch.randn(5, dtype=torch.float64, generator=random))
    tracking = length = 0.0
    for t in range(steps):
        correction = hessian @ track.displacement
        after = advance(direction, track, slope(sampling_point(direction, track)), correction)
        tracking = max(tracking, gap(after.direction, slope(track.theta)))
        length = max(length, abs(float(after.displacement.norm()) - direction.step_length(t)))
        track = after
    return tracking, length


def quadratic(names: tuple[str, ...]) -> list[Claim]:
    """Directions track the gradient of a quadratic, and steps are as long as they should be."""
    found = []
    for name in names:
        etas = (0.05, 0.3, 1.0, None)
        errors = [on_quadratic(preset(name, eta=eta)) for eta in etas]
        found.append(check(f"{name}: d is the gradient on a quadratic", max(error for error, _ in errors), "any eta"))
        if preset(name).normalized:
            found.append(check(f"{name}: a step has length gamma", max(length for _, length in errors)))
    return found


def reduces(name: str) -> Claim:
    """With eta = 1 nothing is averaged: the method is policy gradient (normalised, where it is)."""
    ours = preset(name, eta=1.0, decay="constant")
    plain = replace(preset("pg"), normalized=ours.normalized)
    worst, tracks = 0.0, [Track.start(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    random = torch.Generator().manual_seed(2)
    for _ in range(10):
        noise = torch.randn(2, 3, dtype=torch.float64, generator=random)
        for i, config in enumerate((ours, plain)):
            gradient = noise[0] - sampling_point(config, tracks[i])
            tracks[i] = advance(config, tracks[i], gradient, noise[1])
        worst = max(worst, gap(tracks[0].theta, tracks[1].theta))
    return check(f"{name} with eta = 1 is policy gradient", worst)


def gap(a: Tensor, b: Tensor) -> float:
    """Return the largest difference."""
    return float((a - b).detach().abs().max())


def check(claim: str, error: float, note: str = "", most: float = ROUNDING) -> Claim:
    """Return the claim that an error is rounding."""
    return Claim(claim, "0", Measure(error), None, Margin(high=most), note)
