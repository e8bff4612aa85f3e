import math

import pytest
import torch

from dipole.diffusion import (
    DDIM,
    DDPM,
    EDM,
    VP,
    ContinuousVP,
    Flow,
    GaussianDenoiser,
    LinearLabel,
    MixtureDenoiser,
    add_noise,
    sample,
)

F64 = torch.float64
PROCESSES = [VP.cosine(100), ContinuousVP(), EDM(), Flow()]
MEAN = torch.tensor([0.4, -0.3, 0.1, 0.2, 0.0, -0.5], dtype=F64)
ROOT = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=F64) / 2
COV = ROOT @ ROOT.T
LABEL = LinearLabel(ROOT[:2], [0.7, -0.2], [[0.3, 0.1], [0.1, 0.2]])


def gaussian(process):
    return GaussianDenoiser(MEAN, COV, process)


def mixture(process):
    return MixtureDenoiser([1.0, 3.0], torch.stack([MEAN, -MEAN]), torch.stack([COV, 0.5 * COV + 0.1]), process)


def levels_of(process, kind):
    grid = process.levels(8)[1:-1]
    pick = torch.randint(0, 6, (4, 3), generator=torch.Generator().manual_seed(1))
    return {"number": float(grid[3]), "row": grid[pick[:, 0]], "position": grid[pick]}[kind]


def noisy(dtype=F64):
    return torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(2), dtype=dtype)


@pytest.mark.parametrize("kind", ["number", "row", "position"])
@pytest.mark.parametrize("make", [gaussian, mixture])
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_tweedie(process, make, kind):
    # x0_hat = (x + sigma^2 grad log p(x)) / alpha, entry by entry, whatever each entry's level
    denoiser, t, x = make(process), levels_of(process, kind), noisy().requires_grad_()
    (score,) = torch.autograd.grad(denoiser.log_prob(x, t).sum(), x)
    t = torch.as_tensor(t, dtype=F64)
    alpha, sigma = (f(t).reshape(t.shape + (1,) * (3 - t.dim())) for f in (process.alpha, process.sigma))
    # a large sigma multiplies a small score: twelve of sixteen digits are left
    assert torch.allclose(denoiser(x, t), (x + sigma**2 * score) / alpha, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [gaussian, mixture])
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_posterior_covariance_is_the_jacobian(process, make):
    # Cov[x0 | x] = sigma^2 / alpha dx0_hat/dx
    denoiser, t, x = make(process), levels_of(process, "number"), noisy()
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda row: denoiser(row, t), x[i : i + 1]).reshape(6, 6) for i in range(4)]
    )
    factor = process.sigma(t) ** 2 / process.alpha(t)
    assert torch.allclose(denoiser.posterior_cov(x, t), factor * jacobian, rtol=1e-8, atol=1e-10)


def test_mixture_agrees_with_numerical_integration():
    process, t = Flow(), 0.6
    denoiser = MixtureDenoiser([0.3, 0.7], [[-0.8], [0.5]], torch.tensor([0.2, 0.4]), process)
    x = torch.linspace(-2, 2, 9, dtype=F64).reshape(9, 1)
    grid = torch.linspace(-5, 5, 20001, dtype=F64)
    prior = sum(w * torch.exp(-0.5 * ((grid - m) / s) ** 2) / s for w, m, s in ((0.3, -0.8, 0.2), (0.7, 0.5, 0.4)))
    joint = prior * torch.exp(-0.5 * ((x - 0.4 * grid) / 0.6) ** 2)
    total = joint.sum(1)
    mean = (joint * grid).sum(1) / total
    variance = (joint * grid**2).sum(1) / total - mean**2
    # the trapezoidal rule is exact to rounding for smooth, decaying integrands
    assert torch.allclose(denoiser(x, t).flatten(), mean, atol=1e-12)
    assert torch.allclose(denoiser.posterior_cov(x, t).flatten(), variance, atol=1e-12)
    density = total * (grid[1] - grid[0]) / (2 * math.pi * 0.6)
    assert torch.allclose(denoiser.log_prob(x, t), density.log(), atol=1e-10)


@pytest.mark.parametrize("make", [gaussian, mixture])
def test_labelled_posterior_is_bayes_rule(make):
    # p(x0 | y) p(y) = p(x0) p(y | x0): the difference of the logs is the same everywhere
    denoiser = make(EDM())
    given, x = denoiser.given(LABEL), noisy()
    gap = denoiser.log_prob(x, 0.0) + LABEL.log_prob(x) - given.log_prob(x, 0.0)
    assert torch.allclose(gap, gap[:1].expand(4), atol=1e-9)


@pytest.mark.parametrize("kind", ["number", "row", "position"])
@pytest.mark.parametrize("make", [gaussian, mixture])
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_label_score_leads_to_the_labelled_posterior(process, make, kind):
    denoiser, t, x = make(process), levels_of(process, kind), noisy()
    pull = denoiser.label_score(LABEL)(x, t, None)
    t = torch.as_tensor(t, dtype=F64)
    alpha, sigma = (f(t).reshape(t.shape + (1,) * (3 - t.dim())) for f in (process.alpha, process.sigma))
    wanted = denoiser.given(LABEL)(x, t)
    assert torch.allclose(denoiser(x, t) + sigma**2 / alpha * pull, wanted, rtol=1e-9, atol=1e-9)


def test_label_score_is_its_formula():
    process, t, x = VP.cosine(100), 30.0, noisy()
    denoiser = gaussian(process)
    alpha, sigma = process.alpha(t), process.sigma(t)
    jacobian = alpha * COV @ torch.linalg.inv(alpha**2 * COV + sigma**2 * torch.eye(6, dtype=F64))
    spread = LABEL.matrix @ (COV - alpha * jacobian @ COV) @ LABEL.matrix.T
    error = LABEL.value - denoiser(x, t).reshape(4, 6) @ LABEL.matrix.T
    wanted = error @ torch.linalg.inv(LABEL.noise + spread) @ LABEL.matrix @ jacobian
    assert torch.allclose(denoiser.label_score(LABEL)(x, t, None).reshape(4, 6), wanted, atol=1e-11)


def test_a_policy_is_a_label():
    # tilting N(m, S) over (observation, action) by N(action; K o + k, P)^power, done by completing squares
    gain, offset, cov = torch.tensor([[0.5, -1.0]], dtype=F64), torch.tensor([0.3], dtype=F64), torch.tensor([[0.4]])
    eye = torch.eye(6, dtype=F64)
    action, observation, power = eye[2:3], eye[:2], 1.7
    denoiser = GaussianDenoiser(MEAN, COV + eye, EDM())
    tilted = denoiser.given(LinearLabel.from_policy(gain, offset, cov, power, action, observation))
    residual = action - gain @ observation
    precision = torch.linalg.inv(COV + eye) + power * residual.T @ residual / 0.4
    linear = torch.linalg.solve(COV + eye, MEAN) + power * residual.T @ offset / 0.4
    assert torch.allclose(tilted.cov, torch.linalg.inv(precision), atol=1e-7)  # 0.4 was given in float32
    assert torch.allclose(tilted.mean, torch.linalg.solve(precision, linear), atol=1e-7)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_data_on_a_subspace_stays_there(process):
    direction = torch.tensor([[0.6, 0.8, 0.0, 0.0, 0.0, 0.0]], dtype=F64)
    denoiser = GaussianDenoiser(torch.zeros(6), 0.5 * direction.T @ direction, process)
    # in one dimension along the direction it is the scalar denoiser
    along = GaussianDenoiser([0.0], 0.5**0.5, process)
    x, t = noisy(), levels_of(process, "row")
    wanted = along(x.reshape(4, 6) @ direction.T, t) * direction
    assert torch.allclose(denoiser(x, t).reshape(4, 6), wanted, atol=1e-11)
    end = sample(denoiser, process, process.levels(6), DDPM(), init=x, generator=torch.Generator().manual_seed(0))
    rest = end.reshape(4, 6) - end.reshape(4, 6) @ direction.T * direction
    assert float(rest.abs().max()) < 1e-12


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_at_the_clean_level_x_is_the_answer(process):
    x = noisy()
    assert torch.allclose(gaussian(process)(x, process.clean), x, atol=1e-8)  # two inversions of a covariance
    pinned = torch.full((4, 3), float(process.levels(8)[3]), dtype=F64)
    pinned[:, 1] = process.clean
    assert torch.allclose(gaussian(process)(x, pinned)[:, 1], x[:, 1], atol=1e-8)


def test_levels_alike_give_the_same_however_they_are_told():
    process, x = Flow(), noisy(torch.float32)
    by_number = mixture(process)(x, 0.4)
    assert by_number.dtype == torch.float32
    for shape in ((4,), (4, 3), (1, 3), ()):
        # matrices are multiplied in another order: float32's rounding of float64 results
        assert torch.allclose(mixture(process)(x, torch.full(shape, 0.4, dtype=F64)), by_number, atol=1e-7)


def test_drawn_data_has_the_right_moments():
    denoiser = mixture(Flow())
    data = denoiser.draw(40000, torch.Generator().manual_seed(0))
    mean = 0.25 * MEAN - 0.75 * MEAN
    second = 0.25 * (COV + torch.outer(MEAN, MEAN)) + 0.75 * (0.5 * COV + 0.1 + torch.outer(MEAN, MEAN))
    # standard errors of 40 000 draws with variances below 3.5: 0.009 for means, 0.025 for covariances; three of them
    assert torch.allclose(data.mean(0), mean, atol=0.028)
    assert torch.allclose(torch.cov(data.T), second - torch.outer(mean, mean), atol=0.075)


def test_the_oracle_minimises_the_squared_error_over_its_own_data():
    process, t = VP.cosine(100), 25.0
    denoiser = mixture(process)
    generator = torch.Generator().manual_seed(0)
    x0 = denoiser.draw(20000, generator)
    x = add_noise(x0, torch.randn(x0.shape, generator=generator, dtype=F64), t, process)
    error = denoiser(x, t) - x0
    # orthogonality: the error is uncorrelated with any function of x (standard error 1/sqrt(20 000) of the product)
    for function in (x, x**2, torch.tanh(3 * x)):
        product = error * function
        assert float((product.mean(0) / (product.std(0) / 20000**0.5)).abs().max()) < 4.5


def test_samples_follow_the_mixture():
    process = EDM(0.01, 10.0)
    denoiser = MixtureDenoiser([0.25, 0.75], [[-1.0], [1.0]], 0.1, process)
    x = sample(
        denoiser, process, process.levels(40), DDIM(), shape=(8000, 1), generator=torch.Generator().manual_seed(0)
    )
    # share of the smaller mode: standard error 0.005; starting at sigma 10, not infinity, shifts it by about as much
    assert float((x < 0).float().mean()) == pytest.approx(0.25, abs=0.025)
    # 40 first-order steps shrink a mode's spread by a few percent
    assert float(x[x > 0].std()) == pytest.approx(0.1, rel=0.1)
