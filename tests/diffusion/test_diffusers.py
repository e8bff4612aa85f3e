"""Agreement with diffusers' schedulers on the same network outputs, over whole chains.

diffusers keeps its tables in float32, and takes 1 - alpha_bar[t] / alpha_bar[t-1] of them, which leaves three to four
digits. So each scheduler is compared twice: as shipped, in float32, to that accuracy; and with its tables (only those)
replaced by the same numbers in float64, where nothing but the equations is left to differ.
"""

import pytest
import torch

from dipole.diffusion import DDIM, DDPM, EDM, VP, DPMSolverPP2M, Flow, NetworkDenoiser, sample

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: no peer to agree with")

F64 = torch.float64
SCHEDULES = {"squaredcos_cap_v2": VP.cosine, "linear": VP.linear, "scaled_linear": VP.scaled_linear}
TYPES = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
# All of the largest value in the chain's end.
EXACT = 1e-10  # both in float64, over at most 100 steps (measured: 5e-13)
EXACT_IN_SINGLE = 1e-6  # schedulers that compute in float32 whatever they are given (measured: 8e-7)
SHIPPED = 3e-4  # the peer's float32 tables (measured: 1.9e-4)
OURS = 1e-5  # our float32 samples against our float64 ones: rounding over ten steps (measured: 5e-6)


def network(x, time, cond=None):
    """A bounded, smooth function of sample and time that every library is given."""
    time = torch.as_tensor(time, dtype=x.dtype).reshape(-1, 1, 1)
    return 0.8 * torch.sin(2 * x) + 0.1 * torch.cos(time / 50)


def start(dtype):
    return torch.randn(2, 16, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)


def run_peer(scheduler, x, generator=None, **options):
    if generator is not None:
        options["generator"] = generator
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t), t, x, **options).prev_sample
    return x


def compare(peer, ours, exact_to=EXACT, stochastic=False):
    """Check `ours(dtype)` against `peer(dtype)`, whose tables are in float64 for float64; both return a sample."""
    shipped, exact, single, double = peer(torch.float32), peer(F64), ours(torch.float32), ours(F64)
    assert exact.dtype == F64
    scale = float(double.abs().max().clamp(min=1))
    assert float((exact - double).abs().max()) <= exact_to * scale
    assert float((shipped - single).abs().max()) <= SHIPPED * scale
    if not stochastic:  # noise of the two precisions is not the same
        assert float((single - double).abs().max()) <= OURS * scale


def with_double_tables(scheduler, process):
    """Give a scheduler its tables in float64, computed from ours as it computes them."""
    before = torch.cat([torch.ones(1, dtype=F64), process.alpha_bar[:-1]])
    scheduler.alphas_cumprod = process.alpha_bar
    scheduler.alphas = process.alpha_bar / before
    scheduler.betas = 1 - scheduler.alphas
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=F64)


def fresh():
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("num_levels", [100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables(schedule, num_levels):
    scheduler = diffusers.DDPMScheduler(num_levels, beta_schedule=schedule)
    # a cumulative product of up to 1000 float32 numbers
    assert torch.allclose(SCHEDULES[schedule](num_levels).alpha_bar, scheduler.alphas_cumprod.double(), rtol=3e-5)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("num_levels", [100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [10, 50, 100])
def test_ddpm(schedule, num_levels, prediction, variance, clip, num_steps):
    process = SCHEDULES[schedule](num_levels)
    denoiser = NetworkDenoiser(network, process, TYPES[prediction])

    def peer(dtype):
        scheduler = diffusers.DDPMScheduler(
            num_levels, beta_schedule=schedule, variance_type=variance, clip_sample=clip, prediction_type=prediction
        )
        if dtype == F64:
            with_double_tables(scheduler, process)
        scheduler.set_timesteps(num_steps)
        return run_peer(scheduler, start(dtype), generator=fresh())

    def ours(dtype):
        kernel = DDPM(variance=variance, clip=1.0 if clip else None)
        levels = process.levels(num_steps, "leading")
        return sample(denoiser, process, levels, kernel, init=start(dtype), generator=fresh())

    compare(peer, ours, stochastic=True)


@pytest.mark.parametrize(("clip", "source"), [(False, "raw"), (True, "raw"), (True, "clipped")])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("num_levels", [100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim(schedule, num_levels, prediction, eta, spacing, clip, source):
    process = SCHEDULES[schedule](num_levels)
    denoiser = NetworkDenoiser(network, process, TYPES[prediction])

    def peer(dtype):
        scheduler = diffusers.DDIMScheduler(
            num_levels,
            beta_schedule=schedule,
            clip_sample=clip,
            prediction_type=prediction,
            timestep_spacing=spacing,
        )
        if dtype == F64:
            with_double_tables(scheduler, process)
        scheduler.set_timesteps(10)
        assert scheduler.timesteps.tolist() == process.levels(10, spacing)[:-1].tolist()
        options = {"eta": eta, "use_clipped_model_output": source == "clipped", "generator": fresh()}
        return run_peer(scheduler, start(dtype), **options)

    def ours(dtype):
        kernel = DDIM(eta=eta, clip=1.0 if clip else None, epsilon_from=source)
        levels = process.levels(10, spacing)
        return sample(denoiser, process, levels, kernel, init=start(dtype), generator=fresh())

    compare(peer, ours, stochastic=eta > 0)


@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("num_levels", [100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_dpm_solver_pp_2m(spacing, schedule, num_levels, prediction):
    process = SCHEDULES[schedule](num_levels)
    denoiser = NetworkDenoiser(network, process, TYPES[prediction])

    def make():
        scheduler = diffusers.DPMSolverMultistepScheduler(
            num_levels,
            beta_schedule=schedule,
            prediction_type=prediction,
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            timestep_spacing=spacing,
        )
        scheduler.set_timesteps(10)
        return scheduler

    def visited():
        return torch.cat([make().timesteps.double(), torch.tensor([-1.0], dtype=F64)])

    def peer(dtype):
        scheduler = make()
        if dtype == F64:
            scheduler.sigmas = process.sigma(visited()) / process.alpha(visited())
        return run_peer(scheduler, start(dtype))

    def ours(dtype):
        return sample(denoiser, process, visited(), DPMSolverPP2M(), init=start(dtype))

    compare(peer, ours, EXACT_IN_SINGLE)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 4, 10])
def test_flow_match_euler(shift, num_steps):
    process = Flow(shift=shift)
    denoiser = NetworkDenoiser(network, process, "velocity")
    levels = Flow().levels(num_steps)

    def peer(dtype):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        # the grid is given: its own ends at its smallest trained level, not at 0
        scheduler.set_timesteps(sigmas=levels[:-1].tolist())
        if dtype == F64:
            scheduler.sigmas, scheduler.timesteps = process.levels(num_steps), 1000 * process.levels(num_steps)[:-1]
        return run_peer(scheduler, start(dtype))

    def ours(dtype):
        return sample(denoiser, process, process.levels(num_steps), init=start(dtype))

    compare(peer, ours, EXACT_IN_SINGLE)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("solver", ["euler", "dpm"])
@pytest.mark.parametrize("num_steps", [3, 10])
def test_edm(solver, spacing, num_steps):
    process = EDM(0.002, 80.0)

    def edm_network(x, time, cond=None):
        return network(x, time / 1000)

    denoiser = NetworkDenoiser(edm_network, process, "edm", sigma_data=0.5)
    levels = process.levels(num_steps, spacing)

    def peer(dtype):
        make = diffusers.EDMEulerScheduler if solver == "euler" else diffusers.EDMDPMSolverMultistepScheduler
        scheduler = make(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule=spacing)
        scheduler.set_timesteps(num_steps)
        # c_noise = ln(sigma)/4; ours is 1000 times that
        assert torch.allclose(process.network_time(levels[:-1]), 1000 * scheduler.timesteps.double(), atol=2e-3)
        if dtype == F64:
            scheduler.sigmas = levels
        x = 80.0 * start(dtype)
        for k, t in enumerate(scheduler.timesteps):
            told = process.network_time(levels[k]) if dtype == F64 else 1000 * t
            x = scheduler.step(edm_network(scheduler.scale_model_input(x, t), told), t, x).prev_sample
        return x

    def ours(dtype):
        kernel = DDIM() if solver == "euler" else DPMSolverPP2M()
        return sample(denoiser, process, levels, kernel, init=80.0 * start(dtype))

    compare(peer, ours, EXACT_IN_SINGLE)
