import math

import pytest
import torch

from dipole.diffusion import (
    CPS,
    DDIM,
    DDPM,
    EDM,
    VP,
    ConsistencyRenoise,
    ContinuousVP,
    Flow,
    FlowSDE,
    GaussianDenoiser,
    Normal,
    add_noise,
)
from dipole.diffusion.affine import propagate
from dipole.diffusion.kernels import log_prob

F64 = torch.float64
PROCESSES = [VP.cosine(100), ContinuousVP(), ContinuousVP("linear"), EDM(), Flow()]
KERNELS = [
    DDPM(),
    DDPM(clip=0.5),
    DDPM(variance="fixed_large"),
    DDIM(),
    DDIM(eta=0.6, clip=0.5),
    DDIM(eta=1.0, clip=0.5, epsilon_from="clipped"),
    CPS(clip=0.5),
    ConsistencyRenoise(),
    FlowSDE(),
]


def batch(dtype=F64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 2, generator=generator, dtype=dtype), torch.randn(
        4, 3, 2, generator=generator, dtype=dtype
    )


COMBINATIONS = [
    pytest.param(process, kernel, id=f"{process}-{kernel}")
    for process in PROCESSES
    for kernel in KERNELS
    if isinstance(process, Flow) or not isinstance(kernel, FlowSDE)
]


def inner_levels(process):
    levels = process.levels(5).tolist()
    return levels[1], levels[3]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_ddpm_is_the_posterior_of_the_forward_chain(process):
    # joint Gaussian of (x_s, x_t) given x0, conditioned on x_t: covariance algebra, not the library's formula
    (t, s), (x, x0) = inner_levels(process), batch()
    alpha, sigma, alpha_s, sigma_s = (
        float(v) for v in (process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s))
    )
    covariance = alpha / alpha_s * sigma_s**2
    mean = alpha_s * x0 + covariance / sigma**2 * (x - alpha * x0)
    variance = sigma_s**2 - covariance**2 / sigma**2
    dist = DDPM().step(x, x0, t, s, process)
    assert torch.allclose(dist.mean, mean, atol=1e-12)
    assert float(dist.std) == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_ddpm_fixed_small_is_equation_7():
    process, t = VP.cosine(100), 37
    bar, before = process.alpha_bar[t], process.alpha_bar[t - 1]
    beta = 1 - bar / before
    x, x0 = batch()
    dist = DDPM().step(x, x0, float(t), float(t - 1), process)
    mean = before.sqrt() * beta / (1 - bar) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x
    assert torch.allclose(dist.mean, mean, atol=1e-12)
    assert float(dist.std) ** 2 == pytest.approx(float((1 - before) / (1 - bar) * beta), rel=1e-10)
    large = DDPM(variance="fixed_large").step(x, x0, float(t), float(t - 1), process)
    assert float(large.std) ** 2 == pytest.approx(float(beta), rel=1e-10)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_ddim_returns_the_data_in_one_step_from_the_true_noise(process):
    x0, epsilon = batch()
    t = inner_levels(process)[0]
    x = add_noise(x0, epsilon, t, process)
    dist = DDIM().step(x, x0, t, process.clean, process)
    assert dist.deterministic
    assert torch.allclose(dist.mean, x0, atol=1e-12)
    # and on the way there it stays on the line of that noise
    s = inner_levels(process)[1]
    assert torch.allclose(DDIM().step(x, x0, t, s, process).mean, add_noise(x0, epsilon, s, process), atol=1e-12)


def test_ddim_is_euler():
    (t, s), (x, x0) = (0.8, 0.3), batch()
    flow = x + (s - t) * (x - x0) / t
    assert torch.allclose(DDIM().step(x, x0, t, s, Flow()).mean, flow, atol=1e-14)
    assert torch.allclose(DDIM().step(x, x0, t, s, EDM()).mean, s / t * x + (1 - s / t) * x0, atol=1e-14)
    process = ContinuousVP("linear")
    (scale, u), (scale_s, u_s) = process.ode_view(t), process.ode_view(s)
    euler = (scale * x + (u_s - u) * (scale * x - x0) / u) / scale_s
    assert torch.allclose(DDIM().step(x, x0, t, s, process).mean, euler, atol=1e-13)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_ancestral_step_without_noise_is_euler_and_with_all_of_it_is_ddpm(process):
    (t, s), (x, x0) = inner_levels(process), batch()
    assert torch.equal(DDIM(eta=0.0).step(x, x0, t, s, process).mean, DDIM().step(x, x0, t, s, process).mean)
    one, ddpm = DDIM(eta=1.0).step(x, x0, t, s, process), DDPM().step(x, x0, t, s, process)
    assert torch.allclose(one.mean, ddpm.mean, atol=1e-12)
    assert float(one.std) == pytest.approx(float(ddpm.std), rel=1e-12)


def test_edm_ancestral_step_is_euler_ancestral():
    # sigma_up^2 = s^2 (t^2 - s^2) / t^2, sigma_down^2 = s^2 - sigma_up^2
    (t, s), (x, x0) = (2.0, 0.5), batch()
    up = s * math.sqrt(t**2 - s**2) / t
    down = math.sqrt(s**2 - up**2)
    dist = DDIM(eta=1.0).step(x, x0, t, s, EDM())
    assert torch.allclose(dist.mean, x + (down - t) * (x - x0) / t, atol=1e-14)
    assert float(dist.std) == pytest.approx(up)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("process", "kernel"), COMBINATIONS)
def test_numbers_rows_and_positions_agree_bit_for_bit(process, kernel, dtype):
    (t, s), (x, x0) = inner_levels(process), batch(dtype)
    noise = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1), dtype=dtype)
    dists = [
        kernel.step(x, x0, *(torch.full(shape, level, dtype=F64) for level in (t, s)), process)
        for shape in [(4,), (4, 3), (1, 3)]
    ]
    number = kernel.step(x, x0, t, s, process)
    for dist in dists:
        assert torch.equal(dist.mean, number.mean)
        assert torch.equal(dist.sample(noise=noise), number.sample(noise=noise))
        if not number.deterministic:
            value = x0 + noise
            # log(std) of a number is taken once, in the same precision
            assert torch.equal(dist.log_prob(value, "none"), number.log_prob(value, "none"))


@pytest.mark.parametrize(("process", "kernel"), COMBINATIONS)
def test_a_sample_at_its_level_stays(process, kernel):
    x, x0 = batch()
    for t in [process.clean, inner_levels(process)[0], process.noisiest]:
        for level in (float(t), torch.full((4, 3), float(t))):
            dist = kernel.step(x, x0, level, level, process)
            assert dist.deterministic
            assert torch.equal(dist.mean, x)


# FlowSDE's marginals are exact only for small steps: its last step adds noise as well
@pytest.mark.parametrize(("process", "kernel"), [c for c in COMBINATIONS if not isinstance(c.values[1], FlowSDE)])
def test_the_step_to_clean_is_the_denoised_sample(process, kernel):
    x, x0 = batch()
    dist = kernel.step(x, x0, inner_levels(process)[1], process.clean, process)
    assert dist.deterministic
    wanted = x0 if kernel.clip is None else x0.clamp(-kernel.clip, kernel.clip)
    assert torch.allclose(dist.mean, wanted, atol=1e-14)


def test_clip_acts_on_the_pull_and_epsilon_stays_raw_or_not():
    process, (x, x0) = VP.cosine(100), batch()
    x0 = 2 * x0
    t, s, clipped = 60.0, 30.0, (2 * batch()[1]).clamp(-1, 1)
    alpha, sigma, alpha_s, sigma_s = (
        float(v) for v in (process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s))
    )
    for source, used in (("raw", x0), ("clipped", clipped)):
        dist = DDIM(clip=1.0, epsilon_from=source).step(x, x0, t, s, process)
        assert torch.allclose(dist.mean, alpha_s * clipped + sigma_s * (x - alpha * used) / sigma, atol=1e-12)
    ddpm = DDPM(clip=1.0).step(x, x0, t, s, process)
    assert torch.equal(ddpm.mean, DDPM().step(x, clipped, t, s, process).mean)
    # inside the bound nothing changes but rounding
    assert torch.allclose(
        DDIM(clip=9.0).step(x, x0, t, s, process).mean, DDIM().step(x, x0, t, s, process).mean, atol=1e-14
    )


def test_flow_sde_is_flow_grpo_s_update():
    (t, s, eta), (x, x0) = (0.7, 0.6, 0.8), batch()
    velocity = (x - x0) / t
    dt, sigma = s - t, eta * math.sqrt(t / (1 - t))
    mean = x * (1 + sigma**2 / (2 * t) * dt) + velocity * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
    dist = FlowSDE(eta=eta).step(x, x0, t, s, Flow())
    assert torch.allclose(dist.mean, mean, atol=1e-13)
    assert float(dist.std) == pytest.approx(sigma * math.sqrt(-dt))
    # at pure noise the next level stands in the denominator
    first = FlowSDE(eta=eta).step(x, x0, 1.0, 0.9, Flow())
    assert float(first.std) == pytest.approx(eta * math.sqrt(1 / (1 - 0.9)) * math.sqrt(0.1))
    assert float(FlowSDE(eta=0.3, noise="constant").step(x, x0, 1.0, 0.9, Flow()).std) == pytest.approx(0.3 * 0.1**0.5)
    assert torch.allclose(FlowSDE(eta=0.0).step(x, x0, t, s, Flow()).mean, x + dt * velocity, atol=1e-14)


def test_flow_sde_divergence_of_two_policies_is_its_published_form():
    (t, s, eta), (x, x0) = (0.7, 0.6, 0.8), batch()
    other = x0 + 0.1 * batch()[0]
    p, q = (FlowSDE(eta=eta).step(x, guess, t, s, Flow()) for guess in (x0, other))
    sigma, dt = eta * math.sqrt(t / (1 - t)), s - t
    velocity_gap = (x0 - other) / t
    wanted = -dt / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2 * velocity_gap**2
    assert torch.allclose(p.kl(q, "none"), wanted, rtol=1e-10)
    assert torch.allclose(p.kl(q, "sum"), wanted.flatten(1).sum(1), rtol=1e-10)


MEAN, COV = torch.tensor([0.4, -0.3], dtype=F64), torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)


def covariance_error(kernel, num_steps, start=1.0):
    """Return the largest error of the covariance, sampling N(MEAN, COV) down from its exact marginal at `start`."""
    process = Flow()
    levels = start * process.levels(num_steps)
    first = (1 - start) * MEAN, (1 - start) ** 2 * COV + start**2 * torch.eye(2, dtype=F64)
    got = propagate(GaussianDenoiser(MEAN, COV, process), process, levels, kernel, (2,), start=first)
    assert torch.allclose(got[0], MEAN, atol=1e-10)  # the mean is exact at any step size
    return float((got[1] - COV).abs().max())


@pytest.mark.parametrize(
    ("make", "start"),
    [
        (lambda n: FlowSDE(noise="constant", eta=0.7), 1.0),
        (lambda n: FlowSDE(eta=0.7), 0.5),  # below the pole of its noise at t = 1
        (lambda n: DDIM(eta=0.5), 1.0),
        (lambda n: CPS(eta=1.5 / math.sqrt(n)), 1.0),
    ],
)
def test_stochastic_steps_keep_the_marginals_as_steps_shrink(make, start):
    coarse, fine = (covariance_error(make(n), n, start) for n in (100, 200))
    # first order: halving the step halves the error (second-order terms are a few percent of it here)
    assert fine < 0.02
    assert coarse / fine == pytest.approx(2.0, abs=0.15)


def test_flow_sde_from_pure_noise_is_close_but_slow_to_converge():
    # the noise integrates to infinity at t = 1, so the error of the first steps falls slower than any first order
    errors = [covariance_error(FlowSDE(eta=0.7), n) for n in (10, 20, 400)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.005


def test_cps_with_a_fixed_share_of_noise_does_not_converge():
    assert covariance_error(CPS(eta=0.5), 200) > 0.9 * covariance_error(CPS(eta=0.5), 100) > 0.05


def test_cps_keeps_the_noise_coefficient_at_any_step_size_and_flow_sde_does_not():
    # data is one point, so x_t is alpha m + sigma n at every level, exactly
    process, point = Flow(), torch.zeros(2, 2, dtype=F64)
    denoiser, levels = GaussianDenoiser(MEAN, point, process), torch.tensor([1.0, 0.6, 0.25], dtype=F64)
    mean, cov = propagate(denoiser, process, levels, CPS(eta=0.7), (2,))
    assert torch.allclose(mean, 0.75 * MEAN, atol=1e-12)
    assert torch.allclose(cov, 0.25**2 * torch.eye(2, dtype=F64), atol=1e-12)
    off = propagate(denoiser, process, levels, FlowSDE(eta=0.7), (2,))[1]
    assert float((off - 0.25**2 * torch.eye(2)).abs().max()) > 0.05


def test_log_prob_is_that_of_torch():
    (x, x0), value = batch(), torch.randn(4, 3, 2, dtype=F64)
    dist = DDPM().step(
        x, x0, torch.tensor([10.0, 30.0, 50.0, 99.0]), torch.tensor([5.0, 10.0, 40.0, 98.0]), VP.cosine(100)
    )
    wanted = torch.distributions.Normal(dist.mean, dist.std.expand_as(dist.mean)).log_prob(value)
    assert torch.allclose(dist.log_prob(value, "none"), wanted, atol=1e-12)
    assert torch.allclose(dist.log_prob(value, "sum"), wanted.sum((1, 2)), atol=1e-12)
    assert torch.allclose(dist.log_prob(value, "mean"), wanted.mean((1, 2)), atol=1e-12)
    mask = torch.tensor([[True, False, True]]).expand(4, 3)
    assert torch.allclose(dist.log_prob(value, "sum", mask), wanted[:, [0, 2]].sum((1, 2)), atol=1e-12)
    assert torch.allclose(dist.log_prob(value, "mean", mask), wanted[:, [0, 2]].mean((1, 2)), atol=1e-12)
    assert torch.equal(dist.log_prob(value, "none", mask)[:, 1], torch.zeros(4, 2, dtype=F64))
    with pytest.raises(ValueError, match="unknown reduce 'max'"):
        dist.log_prob(value, "max")


def test_kl_is_that_of_torch_and_of_samples():
    mean, other_mean = batch()
    p, q = Normal(mean, 0.7), Normal(other_mean, torch.tensor(1.1, dtype=F64))
    reference = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, 0.7), torch.distributions.Normal(other_mean, 1.1)
    )
    assert torch.allclose(p.kl(q, "none"), reference, atol=1e-12)
    # Monte Carlo over 20 000 draws of one row: three standard errors
    wide = Normal(mean[:1].expand(20000, 3, 2), 0.7), Normal(other_mean[:1].expand(20000, 3, 2), 1.1)
    x = wide[0].sample(torch.Generator().manual_seed(0))
    ratio = wide[0].log_prob(x, "sum") - wide[1].log_prob(x, "sum")
    error = float(ratio.std()) / math.sqrt(20000)
    assert float(ratio.mean()) == pytest.approx(float(p.kl(q, "sum")[0]), abs=3 * error)


@pytest.mark.parametrize("kernel", [DDIM(), CPS(eta=0.0), FlowSDE(eta=0.0), ConsistencyRenoise()], ids=repr)
@pytest.mark.parametrize("per_row", [False, True])
def test_a_deterministic_step_has_no_log_probability(kernel, per_row):
    x, x0 = batch()
    t, s = 0.5, 0.0
    if per_row:
        t, s = torch.full((4,), t), torch.full((4,), s)
    dist = kernel.step(x, x0, t, s, Flow())
    with pytest.raises(ValueError, match="deterministic"):
        dist.log_prob(x, "sum")
    # unless it does not count
    assert torch.equal(dist.log_prob(x, "sum", torch.zeros(4, 3, dtype=torch.bool)), torch.zeros(4, dtype=F64))


def test_one_deterministic_row_is_enough_to_refuse():
    x, x0 = batch()
    dist = DDPM().step(x, x0, torch.tensor([9.0, 9.0, 9.0, 0.0]), torch.tensor([8.0, 8.0, 8.0, -1.0]), VP.cosine(10))
    with pytest.raises(ValueError, match="deterministic"):
        dist.log_prob(x, "sum")
    scores = dist.log_prob(x, "sum", torch.tensor([True, True, True, False]))
    assert float(scores[3]) == 0
    assert bool((scores[:3] != 0).all())


def test_parts_have_their_own_levels_and_processes():
    x, x0 = batch()
    processes = {"action": Flow(), "image": VP.cosine(100)}
    t, s = {"action": 0.8, "image": torch.full((4,), 60.0)}, {"action": 0.4, "image": torch.full((4,), 60.0)}
    dist = DDIM(eta=1.0).step({"action": x, "image": x}, {"action": x0, "image": x0}, t, s, processes)
    assert torch.equal(dist["action"].mean, DDIM(eta=1.0).step(x, x0, 0.8, 0.4, Flow()).mean)
    assert torch.equal(dist["image"].mean, x)
    value = {"action": x0, "image": x}
    nothing = torch.zeros(4, dtype=torch.bool)
    score = log_prob(dist, value, "sum", {"action": None, "image": nothing})
    assert torch.equal(score, dist["action"].log_prob(x0, "sum"))
    with pytest.raises(ValueError, match="deterministic"):
        log_prob(dist, value, "sum")
    with pytest.raises(ValueError, match="no meaning over parts"):
        log_prob(dist, value, "none")


def test_sample_draws_only_where_there_is_something_to_draw():
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert torch.equal(Normal(torch.ones(2, 3), 0.0).sample(generator), torch.ones(2, 3))
    assert torch.equal(generator.get_state(), state)
    rows = [torch.Generator().manual_seed(i) for i in range(2)]
    states = [g.get_state() for g in rows]
    drawn = Normal(torch.ones(2, 3), torch.tensor([[0.0], [1.0]])).sample(rows)
    assert torch.equal(drawn[0], torch.ones(3))
    assert torch.equal(rows[0].get_state(), states[0])
    assert not torch.equal(rows[1].get_state(), states[1])
    assert torch.equal(drawn[1], 1 + torch.randn(3, generator=torch.Generator().manual_seed(1)))


def test_gradients_reach_the_denoised_sample_even_after_inference_mode():
    x, x0 = batch()
    kernel = DDPM(clip=5.0)
    with torch.inference_mode():  # remembers the coefficients of this step
        kernel.step(x, x0, 43.0, 17.0, VP.cosine(100)).log_prob(x, "sum")
    for t, s in ((43.0, 17.0), (torch.full((4,), 43.0), torch.full((4,), 17.0))):
        guess = x0.clone().requires_grad_()
        dist = kernel.step(x, guess, t, s, VP.cosine(100))
        (gradient,) = torch.autograd.grad(dist.log_prob(x, "sum").sum(), guess)
        c_x0 = float(torch.autograd.grad(kernel.step(x, guess, t, s, VP.cosine(100)).mean.sum(), guess)[0].flatten()[0])
        std = torch.as_tensor(dist.std)
        assert torch.allclose(gradient, c_x0 * (x - dist.mean.detach()) / std**2, atol=1e-10)


def test_unusable_kernels_say_so():
    with pytest.raises(ValueError, match="FlowSDE needs a Flow process, not EDM"):
        FlowSDE().step(*batch(), 2.0, 1.0, EDM())


@pytest.mark.parametrize(("process", "kernel"), COMBINATIONS)
def test_coefficients_are_float64_however_levels_are_told(process, kernel):
    t, s = inner_levels(process)
    told = torch.tensor(t, dtype=F64), torch.tensor(s, dtype=F64)
    exact = kernel.coefficients(process, *told)
    # a level rounded to float32 would move coefficients by 1e-8 and more
    for pair in ((t, s), (told[0], s), (t, told[1])):
        for got, wanted in zip(kernel.coefficients(process, *pair), exact, strict=True):
            assert got.dtype == F64
            assert torch.equal(got, wanted)
    x, x0 = batch()
    assert torch.equal(kernel.step(x, x0, told[0].expand(4), s, process).mean, kernel.step(x, x0, t, s, process).mean)
