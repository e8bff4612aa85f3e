"""Agreement with diffusers' schedulers on the same network outputs.

Twice: each step (each whole chain, of schedulers that remember their last step) with the scheduler as shipped, in
float32; and whole chains with the scheduler's tables, and nothing else of it, in float64, where the network is called
on what both have come to, and only the equations are left to differ.

diffusers keeps alpha_bar in float32 and takes 1 - alpha_bar[t] / alpha_bar[t-1] of it, which leaves three to four
digits: a process with its table in float32 rounds as it does.
"""

import pytest
import torch

from dipole.diffusion import DDIM, DDPM, EDM, VP, DPMSolverPP2M, Flow, NetworkDenoiser, sample

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: no peer to agree with")

F64 = torch.float64
SCHEDULES = {"squaredcos_cap_v2": VP.cosine, "linear": VP.linear, "scaled_linear": VP.scaled_linear}
TYPES = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
# All of the largest value, or of 1.
SHIPPED = 1e-6  # float32, schedulers as shipped (measured: 5e-7 a step, 8e-7 over ten steps)
EXACT = 1e-10  # both in float64, over at most 100 steps (measured: 5e-13)
EXACT_IN_SINGLE = 1e-6  # schedulers that compute in float32 whatever they are given (measured: 8e-7)


def network(x, time, cond=None):
    """A bounded, smooth function of sample and time that every library is given."""
    time = torch.as_tensor(time, dtype=x.dtype).reshape(-1, 1, 1)
    return 0.8 * torch.sin(2 * x) + 0.1 * torch.cos(time / 50)


def start(dtype):
    return torch.randn(2, 16, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)


def run_peer(scheduler, x, generator=None, net=network, **options):
    if generator is not None:
        options["generator"] = generator
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(net(scaled, t), t, x, **options).prev_sample
    return x


def assert_agree(theirs, ours, tolerance, of=None):
    assert theirs.dtype == ours.dtype
    scale = (theirs if of is None else of).abs().max().clamp(min=1)
    assert float((theirs - ours).abs().max()) <= tolerance * float(scale)


def assert_steps_agree(scheduler, process, prediction, levels, kernel, **options):
    """Check every step of a chain of the scheduler's, as shipped, from the same sample and network output."""
    assert torch.equal(process.alpha_bar, scheduler.alphas_cumprod)
    assert scheduler.timesteps.tolist() == levels[:-1].tolist()
    x = start(torch.float32)
    for t, pair in zip(scheduler.timesteps, levels.unfold(0, 2, 1), strict=True):
        output = network(x, t)
        denoiser = NetworkDenoiser(lambda *_, output=output: output, process, TYPES[prediction])
        ours = sample(denoiser, process, pair, kernel, init=x, generator=fresh())
        x = scheduler.step(output, t, x, generator=fresh(), **options).prev_sample
        assert_agree(x, ours, SHIPPED)


class Tape:
    """A network's outputs in the peer's chain, to be given to ours."""

    def __init__(self, net=network):
        self.net, self.outputs, self.played = net, [], 0

    def record(self, x, time):
        self.outputs.append(self.net(x, time))
        return self.outputs[-1]

    def play(self, x, time, cond=None):
        self.played += 1
        return self.outputs[self.played - 1]


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
    theirs = diffusers.DDPMScheduler(num_levels, beta_schedule=schedule).alphas_cumprod
    assert torch.equal(SCHEDULES[schedule](num_levels, dtype=torch.float32).alpha_bar, theirs)
    # a cumulative product of up to 1000 float32 numbers
    assert torch.allclose(SCHEDULES[schedule](num_levels).alpha_bar, theirs.double(), rtol=3e-5)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("num_levels", [100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [10, 50, 100])
def test_ddpm(schedule, num_levels, prediction, variance, clip, num_steps):
    kernel = DDPM(variance=variance, clip=1.0 if clip else None)

    def peer():
        scheduler = diffusers.DDPMScheduler(
            num_levels, beta_schedule=schedule, variance_type=variance, clip_sample=clip, prediction_type=prediction
        )
        scheduler.set_timesteps(num_steps)
        return scheduler

    single = SCHEDULES[schedule](num_levels, dtype=torch.float32)
    assert_steps_agree(peer(), single, prediction, single.levels(num_steps, "leading"), kernel)

    process, scheduler = SCHEDULES[schedule](num_levels), peer()
    with_double_tables(scheduler, process)
    theirs = run_peer(scheduler, start(F64), generator=fresh())
    denoiser, levels = NetworkDenoiser(network, process, TYPES[prediction]), process.levels(num_steps, "leading")
    assert_agree(theirs, sample(denoiser, process, levels, kernel, init=start(F64), generator=fresh()), EXACT)


@pytest.mark.parametrize(("clip", "source"), [(False, "raw"), (True, "raw"), (True, "clipped")])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("num_levels", [100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim(schedule, num_levels, prediction, eta, spacing, clip, source):
    kernel = DDIM(eta=eta, clip=1.0 if clip else None, epsilon_from=source)
    options = {"eta": eta, "use_clipped_model_output": source == "clipped"}

    def peer():
        scheduler = diffusers.DDIMScheduler(
            num_levels,
            beta_schedule=schedule,
            clip_sample=clip,
            prediction_type=prediction,
            timestep_spacing=spacing,
        )
        scheduler.set_timesteps(10)
        return scheduler

    single = SCHEDULES[schedule](num_levels, dtype=torch.float32)
    assert_steps_agree(peer(), single, prediction, single.levels(10, spacing), kernel, **options)

    process, scheduler = SCHEDULES[schedule](num_levels), peer()
    with_double_tables(scheduler, process)
    theirs = run_peer(scheduler, start(F64), generator=fresh(), **options)
    denoiser, levels = NetworkDenoiser(network, process, TYPES[prediction]), process.levels(10, spacing)
    assert_agree(theirs, sample(denoiser, process, levels, kernel, init=start(F64), generator=fresh()), EXACT)


@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("num_levels", [100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_dpm_solver_pp_2m(spacing, schedule, num_levels, prediction):
    def peer():
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

    levels = torch.cat([peer().timesteps.double(), torch.tensor([-1.0], dtype=F64)])

    single, tape = SCHEDULES[schedule](num_levels, dtype=torch.float32), Tape()
    theirs = run_peer(peer(), start(torch.float32), net=tape.record)
    denoiser = NetworkDenoiser(tape.play, single, TYPES[prediction])
    assert_agree(theirs, sample(denoiser, single, levels, DPMSolverPP2M(), init=start(torch.float32)), SHIPPED)

    process, scheduler = SCHEDULES[schedule](num_levels), peer()
    scheduler.sigmas = process.sigma(levels) / process.alpha(levels)
    theirs = run_peer(scheduler, start(F64))
    denoiser = NetworkDenoiser(network, process, TYPES[prediction])
    assert_agree(theirs, sample(denoiser, process, levels, DPMSolverPP2M(), init=start(F64)), EXACT_IN_SINGLE)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 4, 10])
def test_flow_match_euler(shift, num_steps):
    process = Flow(shift=shift)
    levels = process.levels(num_steps)

    def peer():
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        # the grid is given: its own ends at its smallest trained level, not at 0
        scheduler.set_timesteps(sigmas=Flow().levels(num_steps)[:-1].tolist())
        return scheduler

    tape = Tape()
    theirs = run_peer(peer(), start(torch.float32), net=tape.record)
    denoiser = NetworkDenoiser(tape.play, process, "velocity")
    assert_agree(theirs, sample(denoiser, process, levels, init=start(torch.float32)), SHIPPED)

    scheduler = peer()
    scheduler.sigmas, scheduler.timesteps = levels, 1000 * levels[:-1]
    theirs = run_peer(scheduler, start(F64))
    denoiser = NetworkDenoiser(network, process, "velocity")
    assert_agree(theirs, sample(denoiser, process, levels, init=start(F64)), EXACT_IN_SINGLE)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("solver", ["euler", "dpm"])
@pytest.mark.parametrize("num_steps", [3, 10])
def test_edm(solver, spacing, num_steps):
    process = EDM(0.002, 80.0)
    levels = process.levels(num_steps, spacing)
    kernel = DDIM() if solver == "euler" else DPMSolverPP2M()

    def edm_network(x, time, cond=None):
        return network(x, time / 1000)

    def peer():
        make = diffusers.EDMEulerScheduler if solver == "euler" else diffusers.EDMDPMSolverMultistepScheduler
        scheduler = make(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule=spacing)
        scheduler.set_timesteps(num_steps)
        return scheduler

    # c_noise = ln(sigma)/4; ours is 1000 times that
    assert torch.allclose(process.network_time(levels[:-1]), 1000 * peer().timesteps.double(), atol=2e-3)

    if solver == "euler":
        scheduler, x = peer(), 80.0 * start(torch.float32)
        for t, pair in zip(scheduler.timesteps, levels.unfold(0, 2, 1), strict=True):
            output = edm_network(scheduler.scale_model_input(x, t), 1000 * t)
            denoiser = NetworkDenoiser(lambda *_, output=output: output, process, "edm", sigma_data=0.5)
            ours, theirs = sample(denoiser, process, pair, kernel, init=x), scheduler.step(output, t, x).prev_sample
            # Theirs adds a difference to x, which may be 300 times what is left: its rounding is that of x.
            assert_agree(theirs, ours, SHIPPED, of=torch.stack((x, theirs)))
            x = theirs
    else:
        tape = Tape(lambda x, t: edm_network(x, 1000 * t))
        theirs = run_peer(peer(), 80.0 * start(torch.float32), net=tape.record)
        denoiser = NetworkDenoiser(tape.play, process, "edm", sigma_data=0.5)
        assert_agree(theirs, sample(denoiser, process, levels, kernel, init=80.0 * start(torch.float32)), SHIPPED)

    scheduler = peer()
    scheduler.sigmas, told = levels, iter(process.network_time(levels[:-1]))
    theirs = run_peer(scheduler, 80.0 * start(F64), net=lambda x, t: edm_network(x, next(told)))
    denoiser = NetworkDenoiser(edm_network, process, "edm", sigma_data=0.5)
    assert_agree(theirs, sample(denoiser, process, levels, kernel, init=80.0 * start(F64)), EXACT_IN_SINGLE)
