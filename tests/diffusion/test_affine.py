"""Every sampler, process and guidance, through the real `sample`, against closed forms; no Monte-Carlo error."""

import closed_forms
import pytest
import torch

from dipole.diffusion import (
    CPS,
    DDIM,
    DDPM,
    DPM2,
    EDM,
    VP,
    ClassifierFree,
    ConsistencyRenoise,
    ContinuousVP,
    DPMSolverPP2M,
    DPMSolverPP2S,
    Flow,
    FlowSDE,
    GaussianDenoiser,
    GradientGuidance,
    Heun,
    Inpaint,
    Kernel,
    LinearLabel,
    sample,
)
from dipole.diffusion.affine import Affine, affine_map, propagate, sampler_map
from dipole.diffusion.guidance import gradient_of, hold

F64 = torch.float64
MEAN = torch.tensor([0.4, -0.3], dtype=F64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
OTHER_MEAN = torch.tensor([-0.8, 0.5], dtype=F64)
OTHER_COV = torch.tensor([[0.2, -0.1], [-0.1, 0.4]], dtype=F64)
LABEL = LinearLabel([[1.0, -0.5]], [0.7], [[0.3]])

PROCESSES = [VP.cosine(100), VP.linear(1000), ContinuousVP(), ContinuousVP("linear"), EDM(), Flow(), Flow(shift=3.0)]
SAMPLERS = [
    DDPM(),
    DDPM(variance="fixed_large"),
    DDIM(),
    DDIM(eta=0.5),
    DDIM(eta=1.0),
    CPS(),
    ConsistencyRenoise(),
    FlowSDE(),
    FlowSDE(noise="constant", eta=0.3),
    Heun(),
    DPM2(),
    DPMSolverPP2M(),
    DPMSolverPP2S(),
]
# The reference adds up in another order: rounding of float64 amplified by the steps' conditioning (up to 1e3) only.
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def classifier_free(process):
    conditional, unconditional = GaussianDenoiser(MEAN, COV, process), GaussianDenoiser(OTHER_MEAN, OTHER_COV, process)

    def told(x, t, cond):
        return torch.where(cond["goal"] != 0, conditional(x, t), unconditional(x, t))

    def den(t):
        (g_c, h_c), (g_u, h_u) = (
            closed_forms.gaussian(*moments, process)(t) for moments in ((MEAN, COV), (OTHER_MEAN, OTHER_COV))
        )
        return g_u + 2.5 * (g_c - g_u), h_u + 2.5 * (h_c - h_u)

    return ClassifierFree(told, 2.5), den


def exact_label(process):
    """Exact guidance to a label is the posterior's own denoiser."""
    gain = COV @ LABEL.matrix.T @ torch.linalg.inv(LABEL.noise + LABEL.matrix @ COV @ LABEL.matrix.T)
    posterior = MEAN + gain @ (LABEL.value - LABEL.matrix @ MEAN), COV - gain @ LABEL.matrix @ COV
    denoiser = GaussianDenoiser(MEAN, COV, process)
    guided = GradientGuidance(denoiser, process, denoiser.label_score(LABEL), where="x_t")
    den, unguided = closed_forms.gaussian(*posterior, process), closed_forms.gaussian(MEAN, COV, process)
    # without signal (Flow at 1) the shift is left out
    return guided, lambda t: den(t) if float(process.alpha(t)) > 0 else unguided(t)


def shifted_closed_form(process, jacobian_transposed):
    """x0_hat + sigma^2/alpha [J'] G' R^-1 (y - G x0_hat)."""
    den = closed_forms.gaussian(MEAN, COV, process)

    def guided(t):
        gain, offset = den(t)
        alpha, sigma = closed_forms.coefficients(process, t)
        if alpha == 0:
            return gain, offset
        pull = 0.05 * sigma**2 / alpha * LABEL.matrix.T @ torch.linalg.inv(LABEL.noise)
        pull = gain.T @ pull if jacobian_transposed else pull
        return gain - pull @ LABEL.matrix @ gain, offset + pull @ (LABEL.value - LABEL.matrix @ offset)

    return guided


def reconstruction(process):
    denoiser = GaussianDenoiser(MEAN, COV, process)
    guided = GradientGuidance(denoiser, process, gradient_of(LABEL.log_prob), where="x0+chain", scale=0.05)
    return guided, shifted_closed_form(process, jacobian_transposed=True)


def stop_gradient(process):
    denoiser = GaussianDenoiser(MEAN, COV, process)
    guided = GradientGuidance(denoiser, process, gradient_of(LABEL.log_prob), where="x0", scale=0.05)
    return guided, shifted_closed_form(process, jacobian_transposed=False)


def inpainted(process):
    den = closed_forms.gaussian(MEAN, COV, process)
    keep = torch.tensor([1.0, 0.0], dtype=F64)

    def held(t):
        gain, offset = den(t)
        return keep[:, None] * gain, keep * offset + (1 - keep) * 0.9

    known = torch.tensor([0.0, 0.9], dtype=F64)
    return Inpaint(GaussianDenoiser(MEAN, COV, process), known, known != 0), held


def unguided(process):
    return GaussianDenoiser(MEAN, COV, process), closed_forms.gaussian(MEAN, COV, process)


@pytest.mark.parametrize("guidance", [unguided, classifier_free, exact_label, reconstruction, stop_gradient, inpainted])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_sampler_is_its_closed_form(process, sampler, guidance):
    if isinstance(sampler, FlowSDE) and not isinstance(process, Flow):
        with pytest.raises(ValueError, match="Flow"):
            sample(unguided(process)[0], process, process.levels(2), sampler, shape=(1, 2))
        return
    denoiser, den = guidance(process)
    levels = process.levels(5)
    cond = {"goal": torch.ones(1, 1, dtype=F64)} if guidance is classifier_free else None
    run = sampler_map(denoiser, process, levels, sampler, (2,), cond=cond)
    if isinstance(sampler, Kernel):
        matrix, offset, cov = torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64), torch.zeros(2, 2, dtype=F64)
        for a, b, q in closed_forms.kernel_steps(sampler, process, levels, den):
            matrix, offset, cov = a @ matrix, a @ offset + b, a @ cov @ a.T + q
    else:
        matrix, offset = closed_forms.solver_map(sampler, process, levels, den)
        cov = torch.zeros(2, 2, dtype=F64)
    assert torch.allclose(run.matrix, matrix, **EXACT)
    assert torch.allclose(run.offset, offset, **EXACT)
    assert torch.allclose(run.noise @ run.noise.T, cov, **EXACT)
    std = float(process.prior_std(levels[0]))
    mean, total = propagate(denoiser, process, levels, sampler, (2,), cond=cond)
    assert torch.allclose(mean, offset, **EXACT)
    assert torch.allclose(total, std**2 * matrix @ matrix.T + cov, **EXACT)


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(eta=0.5), Heun()], ids=repr)
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_holding_entries_of_the_sample(process, sampler):
    levels = process.levels(4)
    known, mask = torch.tensor([0.0, 0.9], dtype=F64), torch.tensor([False, True])
    keep = torch.diag((~mask).double())
    denoiser, den = unguided(process)
    run = sampler_map(denoiser, process, levels, sampler, (2,), project=hold(known, mask))
    matrix, offset, cov = keep, known, torch.zeros(2, 2, dtype=F64)
    for k in range(4):
        if isinstance(sampler, Kernel):
            ((a, b, q),) = closed_forms.kernel_steps(sampler, process, levels[k : k + 2], den)
        else:
            (a, b), q = closed_forms.solver_map(sampler, process, levels[k : k + 2], den), 0 * cov
        matrix, offset = keep @ a @ matrix, keep @ (a @ offset + b) + known
        cov = keep @ (a @ cov @ a.T + q) @ keep
    assert torch.allclose(run.matrix, matrix, **EXACT)
    assert torch.allclose(run.offset, offset, **EXACT)
    assert torch.allclose(run.noise @ run.noise.T, cov, **EXACT)


@pytest.mark.parametrize("churn", [0.0, 10.0, 80.0])
def test_heun_with_churn(churn):
    process, levels = EDM(0.01, 5.0), EDM(0.01, 5.0).levels(4)
    solver = Heun(churn=churn, churn_min=0.02, churn_max=4.0, churn_noise=1.01, num_steps=4)
    den = closed_forms.gaussian(MEAN, COV, process)
    eye = torch.eye(2, dtype=F64)
    matrix, offset, cov = eye, torch.zeros(2, dtype=F64), torch.zeros(2, 2, dtype=F64)
    for t, s in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        up = t * (1 + min(churn / 4, 2**0.5 - 1)) if 0.02 <= t <= 4.0 else t
        a, b = closed_forms.solver_map(Heun(), process, torch.tensor([up, s], dtype=F64), den)
        added = cov + 1.01**2 * (up**2 - t**2) * eye
        matrix, offset, cov = a @ matrix, a @ offset + b, a @ added @ a.T
    run = sampler_map(GaussianDenoiser(MEAN, COV, process), process, levels, solver, (2,))
    assert torch.allclose(run.matrix, matrix, **EXACT)
    assert torch.allclose(run.offset, offset, **EXACT)
    assert torch.allclose(run.noise @ run.noise.T, cov, **EXACT)


def test_moments_are_those_of_samples():
    process, kernel = VP.cosine(20), DDIM(eta=0.7)
    denoiser, levels = GaussianDenoiser(MEAN, COV, process), process.levels(6)
    mean, cov = propagate(denoiser, process, levels, kernel, (2,))
    x = sample(denoiser, process, levels, kernel, shape=(40000, 2), generator=torch.Generator().manual_seed(0))
    # 40 000 samples of variance about 0.5: standard errors are 0.0035 for means and 0.0035 for variances; four of them
    assert torch.allclose(x.mean(0).double(), mean, atol=0.015)
    assert torch.allclose(torch.cov(x.T).double(), cov, atol=0.015)


def test_affine_map_finds_matrix_offset_and_noise():
    matrix, offset = torch.tensor([[2.0, 1.0], [0.0, -3.0]], dtype=F64), torch.tensor([0.5, 1.0], dtype=F64)
    mix = torch.tensor([[1.0, 0.0], [0.7, 0.2]], dtype=F64)

    def function(x, generators):
        noise = torch.stack([torch.randn(2, generator=g, dtype=F64) for g in generators])
        return x @ matrix.T + offset + noise @ mix.T

    found = affine_map(function, (2,), draws=1)
    assert torch.allclose(found.matrix, matrix, atol=1e-12)
    assert torch.allclose(found.offset, offset, atol=1e-12)
    assert torch.allclose(found.noise, mix, atol=1e-12)
    # a second draw that never happens has no effect
    assert torch.allclose(affine_map(function, (2,), draws=2).noise[:, 2:], torch.zeros(2, 2, dtype=F64), atol=1e-12)


def test_affine_map_refuses_what_is_not_affine():
    with pytest.raises(ValueError, match="not an affine map"):
        affine_map(lambda x, generators: x**2, (2,))


def test_moments():
    step = Affine(2 * torch.eye(2, dtype=F64), MEAN, torch.ones(2, 1, dtype=F64))
    mean, cov = step.moments(OTHER_MEAN, COV)
    assert torch.equal(mean, 2 * OTHER_MEAN + MEAN)
    assert torch.allclose(cov, 4 * COV + 1, atol=1e-15)
