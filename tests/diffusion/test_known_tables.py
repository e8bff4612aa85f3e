"""Numbers printed in the specifications of systems built on this mathematics, reproduced without training anything."""

import pytest
import torch

from dipole.diffusion import (
    DDIM,
    DDPM,
    EDM,
    VP,
    ClassifierFree,
    GaussianDenoiser,
    GradientGuidance,
    Heun,
    LinearLabel,
    MixtureDenoiser,
    sample,
)
from dipole.diffusion.affine import propagate, sampler_map
from dipole.diffusion.guidance import gradient_of

F64 = torch.float64


# BESO: share of samples within three standard deviations of a mode, with a perfect denoiser


def in_mode(process, levels, kernel):
    denoiser = MixtureDenoiser([0.5, 0.5], [[-0.6], [0.6]], 0.05, process)
    x = sample(denoiser, process, levels, kernel, shape=(20000, 1), generator=torch.Generator().manual_seed(0))
    return float(((x.abs() - 0.6).abs() < 0.15).float().mean())


@pytest.mark.parametrize(
    ("process", "spacing", "kernel", "num_steps", "share"),
    [
        (EDM(0.05, 1.0), "exponential", DDIM(), 1, 0.11),
        (EDM(0.05, 1.0), "exponential", DDIM(), 2, 0.41),
        (EDM(0.05, 1.0), "exponential", DDIM(), 3, 0.89),
        (EDM(0.05, 1.0), "exponential", DDIM(), 5, 0.98),
        (EDM(0.05, 1.0), "exponential", DDIM(), 10, 1.00),
        (EDM(0.1, 1.0), "linear", DDIM(), 3, 0.97),
        (EDM(0.005, 1.0), "linear", DDIM(eta=1.0), 3, 0.52),
        (EDM(0.001, 80.0), "exponential", DDIM(), 3, 0.63),
        (EDM(0.001, 80.0), "exponential", DDIM(), 10, 0.94),
        (VP.cosine(100), "leading", DDIM(), 3, 0.55),
        (VP.cosine(100), "leading", DDIM(), 10, 0.97),
        (VP.cosine(100), "leading", DDIM(), 16, 0.99),
        (VP.cosine(100), "leading", DDPM(), 3, 0.47),
        (VP.cosine(100), "leading", DDPM(), 10, 0.97),
        (VP.cosine(100), "leading", DDPM(), 100, 1.00),
    ],
    ids=str,
)
def test_share_of_samples_in_a_mode(process, spacing, kernel, num_steps, share):
    # 20 000 samples here and there: standard error of a difference at most 0.005; and the print is to 0.01
    assert in_mode(process, process.levels(num_steps, spacing), kernel) == pytest.approx(share, abs=0.02)


# RTI-DP: share of an initial offset that is left after noise-free denoising K', .., 0


def residual(std, levels):
    process = VP.cosine(100)
    visited = torch.tensor([*levels, -1], dtype=F64)
    return float(sampler_map(GaussianDenoiser([0.0], std, process), process, visited, DDPM(), (1,)).matrix)


@pytest.mark.parametrize(
    ("std", "printed"),
    [
        (0.02, [0.19, 0.11, 0.07, 0.03, 0.01, 0.00, 0.00]),
        (0.05, [0.59, 0.43, 0.31, 0.18, 0.07, 0.02, 0.01]),
        (0.10, [0.85, 0.75, 0.65, 0.48, 0.23, 0.08, 0.02]),
        (0.30, [0.98, 0.97, 0.95, 0.89, 0.74, 0.44, 0.17]),
    ],
)
def test_residual_of_a_warm_start(std, printed):
    for start, wanted in zip([1, 2, 3, 5, 10, 20, 40], printed, strict=True):
        # to its printed digits; .5 of the last one, and a hair for values that end in a 5 (0.4449 printed as .44)
        assert residual(std, range(start, -1, -1)) == pytest.approx(wanted, abs=0.0051)


def test_skipped_lists_of_the_published_code_step_by_one_and_relabel():
    # [3, 1, 0]: each call makes the step t -> t - 1, whatever the next level on the list is
    relabelled = 1.0
    process = VP.cosine(100)
    for t in (3, 1, 0):
        step = torch.tensor([t, t - 1], dtype=F64)
        relabelled *= float(sampler_map(GaussianDenoiser([0.0], 0.05, process), process, step, DDPM(), (1,)).matrix)
    assert relabelled == pytest.approx(0.43, abs=0.0051)
    # steps that really go to the next level pull harder
    assert residual(0.05, [3, 1, 0]) == pytest.approx(0.315, abs=0.001)


# Policy-guided diffusion: N(0, 1) tilted by the policy N(1.5, 0.5) to the power lambda


@pytest.mark.parametrize(
    ("power", "target", "exact", "chain"),
    [
        (0.5, (0.750, 0.500), (0.743, 0.511), (1.073, 0.369)),
        (1.0, (1.000, 0.333), (0.991, 0.337), (1.598, 0.139)),
        (2.0, (1.200, 0.200), (1.196, 0.205), (1.910, 0.019)),
    ],
)
def test_guidance_by_a_policy(power, target, exact, chain):
    process = EDM()
    denoiser = GaussianDenoiser([0.0], 1.0, process)
    # an action alone, so no observation enters
    policy = LinearLabel.from_policy(torch.zeros(1, 0), [1.5], [[0.5]], power, [[1.0]], torch.zeros(0, 1))
    tilted = denoiser.given(policy)
    assert (float(tilted.mean), float(tilted.cov)) == pytest.approx(target, abs=0.0005)

    def moments(gradient, where):
        guided = GradientGuidance(denoiser, process, gradient, where=where)
        mean, cov = propagate(guided, process, process.levels(64), Heun(), (1,))
        return float(mean), float(cov)

    guided = moments(denoiser.label_score(policy), "x_t")
    through = moments(gradient_of(policy.log_prob), "x0+chain")
    # the exact hook is the tilted density, up to 64 steps of Heun from a finite sigma_max
    assert guided == pytest.approx(target, rel=0.02)
    # printed values are from 20 000 samples: three standard errors are .02 sqrt(var) and .03 var
    for got, printed in ((guided, exact), (through, chain)):
        assert got[0] == pytest.approx(printed[0], abs=0.022 * got[1] ** 0.5)
        assert got[1] == pytest.approx(printed[1], abs=0.03 * got[1])


# Classifier-free guidance is not the tilted density


@pytest.mark.parametrize(
    ("scale", "mean", "variance", "tilted"),
    [
        (0.5, 0.4890, 0.5000, (0.64, 0.4)),
        (2.0, 1.1021, 0.0625, (0.9143, 0.1429)),
        (4.0, 1.2131, 0.0039, (0.9846, 0.0769)),
    ],
)
def test_classifier_free_guidance_has_the_geometric_mean_of_variances(scale, mean, variance, tilted):
    process = EDM(sigma_max=200.0)
    unconditional, conditional = GaussianDenoiser([0.0], 1.0, process), GaussianDenoiser([0.8], 0.5, process)

    def told(x, t, cond):
        return torch.where(cond["goal"] != 0, conditional(x, t), unconditional(x, t))

    got = propagate(
        ClassifierFree(told, scale),
        process,
        process.levels(400),
        Heun(),
        (1,),
        cond={"goal": torch.ones(1, 1, dtype=F64)},
    )
    # 400 second-order steps from sigma 200: 1e-4
    assert float(got[0]) == pytest.approx(mean, abs=2e-4)
    assert float(got[1]) == pytest.approx(variance, abs=2e-4)
    assert variance == pytest.approx(1.0 ** (1 - scale) * 0.25**scale, abs=1e-4)
    # which the harmonic mean of the tilted density is not
    assert abs(float(got[0]) - tilted[0]) > 0.1
    assert abs(float(got[1]) - tilted[1]) > 0.05
