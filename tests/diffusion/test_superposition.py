"""Likelihoods along a chain, AND and OR, against closed forms of Gaussians, in float64."""

import math

import pytest
import torch

from dipole.diffusion import DDIM, DDPM, EDM, Flow, GaussianDenoiser, MixtureDenoiser, sample
from dipole.diffusion.guidance import And, Or
from dipole.diffusion.guidance.superposition import with_traces

FLOW = Flow()
DIAGONAL = torch.diag(torch.tensor([0.3, 0.6], dtype=torch.float64))
TILTED = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
M1, M2 = torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([-0.6, 0.4], dtype=torch.float64)
PARENTS = (GaussianDenoiser(M1, TILTED, FLOW), GaussianDenoiser(M2, DIAGONAL, FLOW))


def noise(rows=16):
    return torch.randn(rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def exact(parents, x, t):
    """The log-likelihoods of x relative to pure noise, `[M, B]`."""
    sigma = float(FLOW.sigma(t))
    pure = -0.5 * (x / sigma).square().sum(-1) - 2 * math.log(sigma) - math.log(2 * math.pi)
    return torch.stack([parent.log_prob(x, t) - pure for parent in parents])


def follow(rule, levels, kernel, init):
    """Return the follower of a chain and the sample it last saw, with its level."""
    follower, seen = rule.prepare(levels, None), []
    sample(
        follower, FLOW, levels, kernel, init=init, generator=torch.Generator().manual_seed(1),
        callback=lambda info: seen.append((info.x, float(info.t))),
    )  # fmt: skip
    return follower, *seen[-1]


def error(rule, steps, kernel):
    levels = torch.linspace(1, 0.2, steps + 1, dtype=torch.float64)
    follower, x, t = follow(rule, levels, kernel, noise())
    return float((follower.likelihood - exact(PARENTS, x, t)).abs().mean())


def test_traces_are_those_of_the_posterior_covariance():
    x, t = noise(5), 0.4
    _, traces = with_traces(PARENTS, x, t, None, FLOW)
    expected = torch.stack([p.posterior_cov(x, t).diagonal(dim1=-2, dim2=-1).sum(-1).expand(5) for p in PARENTS])
    assert torch.allclose(traces, expected, atol=1e-12)
    # random signs give the trace of a diagonal matrix exactly, and of any in the mean
    _, guessed = with_traces(PARENTS, x, t, None, FLOW, probes=1)
    assert torch.allclose(guessed[1], expected[1], atol=1e-12)
    _, many = with_traces(PARENTS, x, t, None, FLOW, probes=4000)
    assert torch.allclose(many[0], expected[0], rtol=0.05)  # standard error about 1 %


def test_likelihood_along_the_ode_is_the_closed_form():
    rule = Or(PARENTS, FLOW, probes=0)
    coarse, fine = error(rule, 50, DDIM()), error(rule, 100, DDIM())
    # the trapezoidal rule is of second order; likelihoods here are of order 1 to 10
    assert fine < 0.02
    assert coarse / fine > 3


def test_likelihood_along_a_noisy_chain_is_the_closed_form_by_ito_and_by_the_chain_rule():
    for stochastic in (True, False):
        rule = Or(PARENTS, FLOW, stochastic=stochastic, probes=0)
        coarse, fine = error(rule, 40, DDIM(eta=1.0)), error(rule, 640, DDIM(eta=1.0))
        # strong order 1/2 or better: 16 times the steps, at most about a quarter of the error
        assert fine < 0.15
        assert coarse / fine > 2.5


@pytest.mark.parametrize(("kernel", "stochastic"), [(DDIM(), False), (DDPM(), True)], ids=["ode", "sde"])
def test_or_is_the_mixture(kernel, stochastic):
    """With temperature 1 and bias log pi, kappa is the responsibility of each parent."""
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    rule = Or(PARENTS, FLOW, stochastic, bias=tuple(weights.log().tolist()), probes=0)
    levels = torch.linspace(1, 0.2, 601, dtype=torch.float64)
    follower, x, t = follow(rule, levels, kernel, noise())
    mixture = MixtureDenoiser(weights, torch.stack([M1, M2]), torch.stack([TILTED, DIAGONAL]), FLOW)
    # errors of the likelihoods (see above), through a softmax
    assert torch.allclose(follower.kappa.T, mixture.posterior(x, t).weights, atol=0.03)
    assert float(follower.kappa.std()) > 0.2  # and it is a choice


def test_or_of_equal_parents_shares_equally():
    rule = Or((PARENTS[0],) * 3, FLOW, probes=0)
    follower, _, _ = follow(rule, FLOW.levels(10), DDIM(), noise())
    assert torch.allclose(follower.kappa, torch.full_like(follower.kappa, 1 / 3), atol=1e-15)


def test_or_chooses_by_bias_and_needs_a_chain():
    rule = Or(PARENTS, FLOW, bias=(0.0, -1e6), probes=0)
    runs = [sample(d, FLOW, FLOW.levels(8), init=noise()) for d in (rule, PARENTS[0])]
    assert torch.allclose(*runs, atol=1e-12)
    with pytest.raises(ValueError, match="sample"):
        rule(noise(), 0.5)


def drift(parents, steps):
    """How much differences of log-likelihoods change along the chain of AND."""
    levels = torch.linspace(0.8, 0.1, steps + 1, dtype=torch.float64)
    init = noise()
    final = sample(And(parents, FLOW, probes=0), FLOW, levels, init=init)
    before, after = exact(parents, init, 0.8), exact(parents, final, 0.1)
    plain = sample(parents[0], FLOW, levels, init=init)
    moved = exact(parents, plain, 0.1)
    change = (after - after[0]) - (before - before[0])
    return float(change.abs().mean()), float(((moved - moved[0]) - (before - before[0])).abs().mean())


def test_and_keeps_the_likelihoods_together():
    third = GaussianDenoiser(torch.tensor([0.2, 0.9]), torch.eye(2) * 0.4, FLOW)
    for parents in (PARENTS, (*PARENTS, third)):
        (coarse, without), (fine, _) = drift(parents, 400), drift(parents, 800)
        # Euler steps are of first order; without AND the likelihoods part by tens
        assert fine < 0.05 * without
        assert coarse / fine > 1.6


def test_and_of_two_is_the_formula_of_the_paper():
    x, t = noise(6), 0.5
    (d1, d2), (c1, c2) = with_traces(PARENTS, x, t, None, FLOW)
    kappa = (((d1 - d2) * (d1 - x / 0.5)).sum(-1) + c1 - c2) / (d1 - d2).square().sum(-1)
    expected = d2 + kappa[:, None] * (d1 - d2)
    assert torch.allclose(And(PARENTS, FLOW, probes=0)(x, t), expected, atol=1e-9)


def test_and_of_equal_parents_is_the_parent():
    parent = PARENTS[0]
    assert torch.allclose(And((parent, parent), FLOW)(noise(), 0.5), parent(noise(), 0.5), atol=1e-12)


def test_and_is_bounded_where_asked():
    x, t = noise(6), 0.9
    (d1, d2), _ = with_traces(PARENTS, x, t, None, FLOW)
    answer = And(PARENTS, FLOW, probes=0, limit=0.5)(x, t)
    share = ((answer - d2) * (d1 - d2)).sum(-1) / (d1 - d2).square().sum(-1)
    assert float(share.min()) > -1e-9
    assert float(share.max()) < 1 + 1e-9
    free = And(PARENTS, FLOW, probes=0)(x, t)
    assert float((free - d2).abs().max()) > float((answer - d2).abs().max())


def test_without_signal_the_parents_are_averaged():
    x = noise(4)
    assert torch.allclose(And(PARENTS, FLOW)(x, 1.0), ((M1 + M2) / 2).expand(4, 2), atol=1e-12)


def test_levels_per_row_are_refused():
    process = EDM()
    parents = (GaussianDenoiser(M1, TILTED, process), GaussianDenoiser(M2, DIAGONAL, process))
    with pytest.raises(ValueError, match="one level"):
        And(parents, process)(noise(2), torch.tensor([1.0, 2.0]))
