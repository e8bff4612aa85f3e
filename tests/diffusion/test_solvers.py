import math

import pytest
import torch

from dipole.diffusion import (
    DDIM,
    DPM2,
    EDM,
    VP,
    ContinuousVP,
    DPMSolverPP2M,
    DPMSolverPP2S,
    Flow,
    GaussianDenoiser,
    Heun,
    MixtureDenoiser,
    sample,
)
from dipole.diffusion.affine import sampler_map

F64 = torch.float64
CONTINUOUS = [ContinuousVP(), ContinuousVP("linear"), EDM(0.002, 5.0), Flow()]
SOLVERS = [Heun(), DPM2(), DPMSolverPP2M(), DPMSolverPP2S()]
NOISE = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=F64)


def mixture(process):
    return MixtureDenoiser([0.4, 0.6], [[0.5] * 4, [-0.6] * 4], 0.2, process)


class Counting:
    def __init__(self, denoiser):
        self.denoiser, self.levels = denoiser, []

    def __call__(self, x, t, cond=None):
        self.levels.append(t)
        return self.denoiser(x, t, cond)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("process", [*CONTINUOUS, VP.cosine(100)], ids=repr)
def test_one_step_is_euler(process, solver):
    levels = process.levels(1)
    runs = [sample(mixture(process), process, levels, kernel, init=NOISE) for kernel in (solver, DDIM())]
    assert torch.allclose(*runs, atol=1e-13)


@pytest.mark.parametrize("process", CONTINUOUS, ids=repr)
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_number_of_network_calls(process, num_steps):
    for solver in SOLVERS:
        counting = Counting(mixture(process))
        sample(counting, process, process.levels(num_steps), solver, init=NOISE)
        pure_noise = isinstance(solver, DPMSolverPP2S) and isinstance(process, Flow)
        midpoints = 0 if isinstance(solver, DPMSolverPP2M) else num_steps - 1 - (pure_noise and num_steps > 1)
        assert len(counting.levels) == num_steps + midpoints
        assert process.clean not in counting.levels


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("process", [*CONTINUOUS, VP.cosine(100)], ids=repr)
def test_the_last_step_ends_on_the_denoised_sample(process, solver):
    seen = []
    end = sample(mixture(process), process, process.levels(3), solver, init=NOISE, callback=seen.append)
    assert torch.allclose(end, seen[-1].x0_hat, atol=1e-13)


def exact_map(process, t, s, cov):
    """The probability flow of N(0, cov): x_s = sqrt(M_s / M_t) x_t."""
    power = [float(process.alpha(level)) ** 2 * cov + float(process.sigma(level)) ** 2 for level in (t, s)]
    return math.sqrt(power[1] / power[0])


def order(solver, process, cov=0.3):
    """Return the order of convergence of the map between two inner levels, both solved in n and in 2n steps."""
    high, low = (float(process.level_at(ratio)) for ratio in (2.0, 0.1))
    errors = []
    for num_steps in (64, 128):
        ratios = torch.exp(torch.linspace(math.log(2.0), math.log(0.1), num_steps + 1, dtype=F64))
        levels = process.level_at(ratios)
        run = sampler_map(GaussianDenoiser([0.0], math.sqrt(cov), process), process, levels, solver, (1,))
        errors.append(abs(float(run.matrix) - exact_map(process, high, low, cov)))
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("process", CONTINUOUS, ids=repr)
@pytest.mark.parametrize(("solver", "wanted"), [(DDIM(), 1), *((s, 2) for s in SOLVERS)], ids=repr)
def test_order_of_convergence_to_the_probability_flow(process, solver, wanted):
    # the next order still shows at 64 steps: a tenth of an order is left for it
    assert order(solver, process) == pytest.approx(wanted, abs=0.1)


@pytest.mark.parametrize("solver", [DPM2(), DPMSolverPP2S()], ids=repr)
def test_midpoints_between_neighbouring_trained_levels(solver):
    # no trained level lies between neighbours: the rounded midpoint is one of them
    process = VP.cosine(20)
    x = sample(mixture(process), process, process.levels(20), solver, init=NOISE)
    euler = sample(mixture(process), process, process.levels(20), DDIM(), init=NOISE)
    assert bool(torch.isfinite(x).all())
    # both sit on a mode of std 0.2 at the end; solvers differ by far less than the modes' distance of 1.1
    assert float((x - euler).abs().max()) < 0.5


def test_dpm_solver_pp_2m_starts_from_pure_noise_with_first_order_steps():
    # Flow's t = 1 has no finite log-SNR to extrapolate from; from the third step on there are two that have
    process, levels = Flow(), torch.tensor([1.0, 0.5, 0.2, 0.05], dtype=F64)
    seen, euler = [], []
    sample(mixture(process), process, levels, DPMSolverPP2M(), init=NOISE, callback=seen.append)
    sample(mixture(process), process, levels, DDIM(), init=NOISE, callback=euler.append)
    assert torch.allclose(seen[0].x_next, euler[0].x_next, atol=1e-14)
    assert torch.allclose(seen[1].x_next, euler[1].x_next, atol=1e-14)
    assert not torch.allclose(seen[2].x_next, euler[2].x_next, atol=1e-3)


def test_churn_needs_its_number_of_steps_and_edm():
    with pytest.raises(ValueError, match="num_steps"):
        sample(mixture(EDM()), EDM(), EDM().levels(2), Heun(churn=10.0), init=NOISE)
    with pytest.raises(ValueError, match="EDM"):
        sample(mixture(Flow()), Flow(), Flow().levels(2), Heun(churn=10.0, num_steps=2), init=NOISE)


def test_churn_zero_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    sample(mixture(EDM()), EDM(), EDM().levels(3), Heun(num_steps=3), init=NOISE, generator=generator)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    ("levels", "init", "message"),
    [
        (torch.tensor([[1.0] * 5, [0.0] * 5]), NOISE, "shared by all rows"),
        ({"a": torch.tensor([1.0, 0.0])}, {"a": NOISE}, "no parts"),
        (torch.tensor([1.0, 0.0]), {"a": NOISE}, "no parts"),
        (torch.tensor([1.0, 0.5, 0.5, 0.0]), NOISE, "levels that decrease"),
    ],
)
def test_solvers_refuse_levels_they_cannot_follow(levels, init, message):
    with pytest.raises(ValueError, match=message):
        sample(mixture(Flow()), Flow(), levels, Heun(), init=init)
