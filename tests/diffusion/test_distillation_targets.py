import itertools

import pytest
import torch

from dipole.diffusion import (
    DDIM,
    EDM,
    VP,
    ContinuousVP,
    DenoisingObjective,
    Flow,
    GaussianDenoiser,
    NetworkDenoiser,
    add_noise,
)
from dipole.diffusion.distillation import (
    clean_of_step,
    consistency_target,
    jump,
    many_step_target,
    ode_step,
    output_error,
    pseudo_huber,
)
from dipole.diffusion.prediction import PREDICTION_TYPES, to_output
from dipole.diffusion.tensors import expand

# VP at 1000 levels, so that its neighbours are close: as a discrete process it has no others.
PROCESSES = {"flow": Flow(), "vp": VP.cosine(1000), "continuous": ContinuousVP(), "edm": EDM(0.01, 10.0)}
MEAN, STD = torch.tensor([0.3, -0.7, 0.1], dtype=torch.float64), torch.tensor([0.4, 0.05, 1.3], dtype=torch.float64)


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]


def gaussian(process):
    return GaussianDenoiser(MEAN, torch.diag(STD**2), process)


def spread(process, t, x):
    return (expand(process.alpha(t), x) ** 2 * STD**2 + expand(process.sigma(t), x) ** 2).sqrt()


def exact_jump(process):
    """The consistency function of a Gaussian: the ODE carries it as a scaled whole."""

    def function(x, t, cond=None):
        return MEAN + STD * (x - expand(process.alpha(t), x) * MEAN) / spread(process, t, x)

    return function


def exact_flow(process, x, t, s):
    mean_t, mean_s = (expand(process.alpha(level), x) * MEAN for level in (t, s))
    return mean_s + spread(process, s, x) / spread(process, t, x) * (x - mean_t)


def noisy(process, t, rows=64):
    generator = torch.Generator().manual_seed(0)
    x0 = MEAN + STD * torch.randn(rows, 3, dtype=torch.float64, generator=generator)
    noise = torch.randn(rows, 3, dtype=torch.float64, generator=generator)
    return add_noise(x0, noise, t, process)


def at(level, rows=64):
    return torch.full((rows,), float(level), dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_at_the_boundary_the_jump_stays(process, prediction):
    denoiser = NetworkDenoiser(lambda x, time, cond: torch.full_like(x, 3.0), process, prediction)
    x, clean = noisy(process, at(process.levels(4)[1])), at(process.clean)
    assert torch.equal(jump(denoiser, x, clean, process), x)
    # and for all but x0 the parametrisation alone sees to it
    assert torch.allclose(denoiser(x, clean), x, rtol=0, atol=1e-12) == (prediction != "x0")


def test_only_rows_at_the_boundary_stay():
    process = Flow()
    denoiser = NetworkDenoiser(lambda x, time, cond: torch.ones_like(x), process, "x0")
    x = noisy(process, at(0.5, 2), 2)
    assert torch.equal(jump(denoiser, x, torch.tensor([0.0, 0.5]), process), torch.stack([x[0], torch.ones(3)]))


def test_the_exact_jump_is_consistent_along_the_exact_path(process):
    levels, student = process.levels(8), exact_jump(process)
    for t, s in itertools.pairwise(levels.tolist()):
        x = noisy(process, at(t))
        target = consistency_target(student, exact_flow(process, x, at(t), at(s)), at(s), process)
        # float64; dividing by the spread at the noisiest level costs a few digits
        assert torch.allclose(target, jump(student, x, at(t), process), rtol=0, atol=1e-10)


def test_with_steps_of_the_teacher_the_exact_jump_is_consistent_to_second_order():
    # One Euler step of length h is wrong by h^2: half the length, a quarter of the error.
    process = Flow()
    errors = []
    for steps in (32, 64):
        levels = process.levels(steps)
        worst = 0.0
        # away from the ends: at level 1 the first step's error is of another order, and at 0 nothing is left of it
        for t, s in itertools.pairwise(levels[steps // 4 : 3 * steps // 4].tolist()):
            x = noisy(process, at(t))
            moved = ode_step(gaussian(process), x, at(t), at(s), process)
            target = consistency_target(exact_jump(process), moved, at(s), process)
            worst = max(worst, float((target - exact_jump(process)(x, at(t))).abs().max()))
        errors.append(worst)
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_the_jump_of_the_discretised_path_has_no_loss_at_all(process):
    # What the student is asked for is the end of the teacher's own steps, and that is exactly consistent with them.
    levels, denoiser = process.levels(8), gaussian(process)

    def composed(x, t, cond=None):
        start = int((levels - t[0]).abs().argmin())
        for a, b in itertools.pairwise(levels[start:].tolist()):
            x = ode_step(denoiser, x, at(a), at(b), process)
        return x

    for t, s in itertools.pairwise(levels.tolist()):
        x = noisy(process, at(t))
        moved = ode_step(denoiser, x, at(t), at(s), process)
        loss = pseudo_huber(jump(composed, x, at(t), process) - consistency_target(composed, moved, at(s), process))
        assert float(loss.max()) == 0.0


def test_one_step_lands_where_two_did(process):
    levels, denoiser = process.levels(8).tolist(), gaussian(process)
    for t, middle, s in zip(levels, levels[1:], levels[2:], strict=False):
        x = noisy(process, at(t))
        x0 = many_step_target(denoiser, x, (at(t), at(middle), at(s)), process)
        two = ode_step(denoiser, ode_step(denoiser, x, at(t), at(middle), process), at(middle), at(s), process)
        one = ode_step(lambda x, t, cond, x0=x0: x0, x, at(t), at(s), process)
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-10)
        assert torch.allclose(clean_of_step(x, two, at(t), at(s), process), x0, rtol=1e-12, atol=1e-10)


def test_in_a_flow_the_target_is_the_mean_velocity():
    # Frans et al. 2024, eq. 4
    process, denoiser = Flow(), gaussian(Flow())
    t, middle, s = at(0.75), at(0.5), at(0.25)
    x = noisy(process, t)
    half = ode_step(denoiser, x, t, middle, process)
    velocities = [(y - denoiser(y, level)) / level[:, None] for y, level in ((x, t), (half, middle))]
    x0 = many_step_target(denoiser, x, (t, middle, s), process)
    assert torch.allclose((x - x0) / 0.75, sum(velocities) / 2, rtol=0, atol=1e-12)


def test_two_exact_steps_make_an_exact_one(process):
    # The denoiser whose single steps follow the exact path needs no more than one of them.
    levels = process.levels(4).tolist()

    def towards(s):
        return lambda x, t, cond=None: clean_of_step(x, exact_flow(process, x, t, s), t, s, process)

    t, middle, s = (at(level) for level in levels[1:4])
    x = noisy(process, t)
    half = ode_step(towards(middle), x, t, middle, process)
    end = ode_step(towards(s), half, middle, s, process)
    target = clean_of_step(x, end, t, s, process)
    assert torch.allclose(target, towards(s)(x, t), rtol=0, atol=1e-10)


def test_a_teachers_clipping_is_part_of_its_path():
    process, denoiser = Flow(), gaussian(Flow())
    t, s = at(0.5), at(0.25)
    x = 4 * noisy(process, t)
    plain, clipped = (ode_step(denoiser, x, t, s, process, kernel=DDIM(clip=clip)) for clip in (None, 0.2))
    assert not torch.allclose(plain, clipped)
    assert torch.equal(clipped, DDIM(clip=0.2).step(x, denoiser(x, t), t, s, process).mean)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_the_error_of_the_output_is_the_error_that_training_measures(process, prediction):
    t = at(process.levels(4)[2])
    x, generator = noisy(process, t), torch.Generator().manual_seed(1)
    a, b = (torch.randn(64, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    outputs = [to_output(x0, x, t, process, prediction) for x0 in (a, b)]
    error = output_error(a, b, t, process, prediction)
    assert torch.allclose(error, outputs[0] - outputs[1], rtol=1e-9, atol=1e-9)


def test_an_objective_with_the_same_target_has_the_same_loss():
    process, t = Flow(), at(0.5)
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(64, 3, dtype=torch.float64, generator=generator) for _ in range(3))
    objective = DenoisingObjective(process, "velocity")
    expected = objective(lambda x, time, cond: output, x0, t=t, noise=noise)
    x = add_noise(x0, noise, t, process)
    predicted = NetworkDenoiser(lambda x, time, cond: output, process, "velocity")(x, t)
    error = output_error(predicted, x0, t, process, "velocity")
    assert float(error.square().mean()) == pytest.approx(float(expected), rel=1e-12)


def test_pseudo_huber_is_between_square_and_absolute():
    error = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-6, 0.0]], dtype=torch.float64)
    loss = pseudo_huber(error, 1e-3)
    assert float(loss[0]) == pytest.approx(5 - 1e-3, abs=1e-6)
    assert float(loss[1]) == 0.0
    assert float(loss[2]) == pytest.approx(1e-12 / 2e-3, rel=1e-3)
    assert float(pseudo_huber(error)[0]) == pytest.approx(5 - 0.00054 * 2**0.5, abs=1e-6)
