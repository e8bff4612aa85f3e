"""Textbook formulas in matrix form, written apart from the library: what samplers must do to a Gaussian.

A denoiser is `den(t) -> (G, h)`, meaning x0_hat = G x + h; a step is `(A, b, Q)`, meaning x' = A x + b + N(0, Q).
"""

import math

import torch

from dipole.diffusion import CPS, DDIM, DDPM, DPM2, ConsistencyRenoise, DPMSolverPP2M, DPMSolverPP2S, FlowSDE, Heun


def coefficients(process, t):
    return float(process.alpha(t)), float(process.sigma(t))


def gaussian(mean, cov, process):
    """Return the closed-form denoiser of N(mean, cov)."""

    def den(t):
        alpha, sigma = coefficients(process, t)
        marginal = alpha**2 * cov + sigma**2 * torch.eye(len(mean), dtype=torch.float64)
        gain = alpha * cov @ torch.linalg.inv(marginal)
        return gain, mean - alpha * gain @ mean

    return den


def bayes_step(process, t, s):
    """Return (weight of x, weight of x0, variance) of q(x_s | x_t, x0), by multiplying two Gaussians in x_s."""
    alpha, sigma = coefficients(process, t)
    alpha_s, sigma_s = coefficients(process, s)
    if sigma_s == 0:
        return 0.0, alpha_s, 0.0
    ratio = alpha / alpha_s
    forward = sigma**2 - ratio**2 * sigma_s**2
    precision = 1 / sigma_s**2 + ratio**2 / forward
    return ratio / forward / precision, alpha_s / sigma_s**2 / precision, 1 / precision


def scalar_step(kernel, process, t, s):
    """Return (weight of x, weight of x0, variance) of a kernel's step, from the equations of its paper."""
    alpha, sigma = coefficients(process, t)
    alpha_s, sigma_s = coefficients(process, s)
    if isinstance(kernel, DDPM):
        x, x0, variance = bayes_step(process, t, s)
        if kernel.variance == "fixed_large" and sigma_s > 0:
            variance = sigma**2 - (alpha / alpha_s) ** 2 * sigma_s**2
        return x, x0, variance
    if isinstance(kernel, DDIM):
        variance = kernel.eta**2 * bayes_step(process, t, s)[2]
        noise = math.sqrt(sigma_s**2 - variance)
        return noise / sigma, alpha_s - noise * alpha / sigma, variance
    if isinstance(kernel, CPS):
        std = sigma_s * math.sin(kernel.eta * math.pi / 2)
        noise = sigma_s * math.cos(kernel.eta * math.pi / 2)
        return noise / sigma, alpha_s - noise * alpha / sigma, std**2
    if isinstance(kernel, ConsistencyRenoise):
        return 0.0, alpha_s, sigma_s**2
    if isinstance(kernel, FlowSDE):
        dt = s - t
        diffusion = kernel.eta * math.sqrt(t / (1 - (t if t < 1 else s))) if kernel.noise == "sqrt" else kernel.eta
        # x + (v - diffusion^2 score / 2) dt with v = (x - x0)/t and score = ((1 - t) x0 - x)/t^2
        x = 1 + dt * (1 / t + diffusion**2 / (2 * t**2))
        x0 = -dt * (1 / t + diffusion**2 * (1 - t) / (2 * t**2))
        return x, x0, -(diffusion**2) * dt
    raise TypeError(kernel)


def kernel_steps(kernel, process, levels, den):
    """Yield (A, b, Q) of every step of a kernel."""
    for t, s in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        gain, offset = den(t)
        eye = torch.eye(len(gain), dtype=torch.float64)
        x, x0, variance = scalar_step(kernel, process, t, s)
        yield x * eye + x0 * gain, x0 * offset, variance * eye


class Line:
    """An affine function of the start, `[A, b]`, with the arithmetic that Runge-Kutta methods need."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def __add__(self, other):
        return Line(self.a + other.a, self.b + other.b)

    def __sub__(self, other):
        return Line(self.a - other.a, self.b - other.b)

    def __rmul__(self, factor):
        return Line(factor * self.a, factor * self.b)


def solver_map(solver, process, levels, den):
    """Return (A, b) of a whole run of an ODE solver."""

    def denoised(x, t):
        gain, offset = den(t)
        return Line(gain @ x.a, gain @ x.b + offset)

    size = len(den(levels[0])[0])
    x = Line(torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64))
    before = None
    for t, s in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        if isinstance(solver, Heun | DPM2):
            x = _runge_kutta(solver, process, t, s, x, denoised)
        else:
            x, before = _dpm_solver(solver, process, t, s, x, denoised, before)
    return x.a, x.b


def _runge_kutta(solver, process, t, s, x, denoised):
    """One step of y' = (y - D) / u, y = scale x."""
    (scale, u), (scale_s, u_s) = ([float(v) for v in process.ode_view(level)] for level in (t, s))

    def slope(y, level):
        scale, u = (float(v) for v in process.ode_view(level))
        return (1 / u) * (y - denoised((1 / scale) * y, level))

    y = scale * x
    first = slope(y, t)
    if u_s == 0:
        return (1 / scale_s) * (y + (u_s - u) * first)
    if isinstance(solver, Heun):
        second = slope(y + (u_s - u) * first, s)
        return (1 / scale_s) * (y + ((u_s - u) / 2) * (first + second))
    middle = float(process.level_at_ode_time(math.sqrt(u * u_s)))
    u_middle = float(process.ode_view(middle)[1])
    return (1 / scale_s) * (y + (u_s - u) * slope(y + (u_middle - u) * first, middle))


def _dpm_solver(solver, process, t, s, x, denoised, before):
    """One step of DPM-Solver++ in its paper's form, phi = exp(-h) - 1."""
    (alpha, sigma), (alpha_s, sigma_s) = coefficients(process, t), coefficients(process, s)
    x0 = denoised(x, t)
    if sigma_s == 0 or alpha == 0:
        return (sigma_s / sigma) * x + alpha_s * x0 if sigma_s else alpha_s * x0, (x0, None)
    lam, lam_s = math.log(alpha / sigma), math.log(alpha_s / sigma_s)
    h = lam_s - lam
    step = alpha_s * (math.exp(-h) - 1)
    if isinstance(solver, DPMSolverPP2M):
        pulled = x0
        if before is not None and before[1] is not None:
            r = (lam - before[1]) / h
            pulled = (1 + 1 / (2 * r)) * x0 - (1 / (2 * r)) * before[0]
        return (sigma_s / sigma) * x - step * pulled, (x0, lam)
    assert isinstance(solver, DPMSolverPP2S)
    level = float(process.level_at(math.exp(-(lam + lam_s) / 2)))
    alpha_m, sigma_m = coefficients(process, level)
    lam_m = math.log(alpha_m / sigma_m)
    r = (lam_m - lam) / h
    if r == 0:
        return (sigma_s / sigma) * x - step * x0, None
    u = (sigma_m / sigma) * x - (alpha_m * (math.exp(-r * h) - 1)) * x0
    pulled = (1 - 1 / (2 * r)) * x0 + (1 / (2 * r)) * denoised(u, level)
    return (sigma_s / sigma) * x - step * pulled, None
