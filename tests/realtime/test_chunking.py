"""Real-time chunking: guidance against closed forms, the frozen prefix, the delay."""

import math

import pytest
import torch
from method_helpers import STATE, D, generators, observations, run, small_policy

from dipole.diffusion import DDIM, EDM, VP, Flow, GaussianDenoiser, sample
from dipole.errors import DipoleError
from dipole.policies import SamplerConfig
from dipole.realtime import Runtime, apply
from dipole.realtime.chunking import ChunkingConfig, ChunkingPolicy, PrefixGuidance, overlap_weights

TO, TP, TA = 2, 10, 4
KINDS = {"flow": {"process": "flow"}, "diffusion": {"sampler": SamplerConfig("ddim", 6, clip=1.0)}}


def test_weights_of_the_paper():
    # H = 10, d = 2, s = 4: eq. 5 by hand
    weights = overlap_weights(10, 2, 4)
    assert weights[:2].tolist() == [1, 1]
    assert weights[6:].tolist() == [0, 0, 0, 0]
    for i in range(2, 6):
        c = (10 - 4 - i) / (10 - 4 - 2 + 1)
        assert float(weights[i]) == pytest.approx(c * (math.exp(c) - 1) / (math.e - 1), rel=1e-6)
    assert (weights.diff() <= 0).all()


@pytest.mark.parametrize("process", [Flow(), VP.cosine(100), EDM(0.01, 10.0)], ids=["flow", "vp", "edm"])
def test_guidance_of_a_unit_normal_is_exact(process):
    """For data N(0, I) pseudo-inverse guidance is no approximation: known entries are answered, others left alone."""
    denoiser = GaussianDenoiser(torch.zeros(TP * D), torch.eye(TP * D), process)
    mask = torch.zeros(1, TP, 1)
    mask[:, :3] = 1
    known = torch.randn(4, TP, D, generator=torch.Generator().manual_seed(0))
    guided = PrefixGuidance(_double(denoiser), process, known, mask, beta=1e9)
    x = torch.randn(4, TP, D, generator=torch.Generator().manual_seed(1))
    for t in process.levels(5)[1:-1].tolist():
        answer, plain = guided(x, t), denoiser(x, t)
        torch.testing.assert_close(answer[:, :3], known[:, :3], rtol=0, atol=2e-5)
        torch.testing.assert_close(answer[:, 3:], plain[:, 3:], rtol=0, atol=1e-6)
    levels = process.levels(20)
    init = x * float(process.prior_std(levels[0]))
    end = sample(guided, process, levels, DDIM(), init=init)
    torch.testing.assert_close(end[:, :3], known[:, :3], rtol=0, atol=1e-4)


def _double(denoiser):
    """The oracle works in float64 and gives float32 back, through which gradients flow as well."""
    return lambda x, t, cond=None: denoiser(x, t, cond)


def test_the_correction_is_the_papers_for_a_flow():
    """Against the paper's own formula, velocity v(A, tau) with tau = 1 at the data, by explicit Jacobian."""
    policy, beta = small_policy(process="flow"), 5.0
    cond = policy.encode({STATE: observations(1, 1)[0]})
    x, known = torch.randn(2, 1, TP, D, generator=torch.Generator().manual_seed(0))
    weights = overlap_weights(TP, 3, TA)[None, :, None]
    for tau in (0.0, 0.2, 0.5, 0.9):
        t = 1 - tau

        def clean(a, t=t):
            return a - t * policy.network(a, torch.tensor([1000 * t]), cond)

        jacobian = torch.autograd.functional.jacobian(lambda a: clean(a).flatten(), x).reshape(TP * D, TP * D)
        error = (weights * (known - clean(x))).flatten()
        variance = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        weight = min(beta, (1 - tau) / (tau * variance) if tau > 0 else math.inf)
        velocity = -policy.network(x, torch.tensor([1000 * t]), cond) + weight * (error @ jacobian).reshape(x.shape)
        expected = x + (1 - tau) * velocity
        ours = PrefixGuidance(policy.denoiser, policy.process, known, weights, beta)(x, t, cond)
        torch.testing.assert_close(ours, expected.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", ["pseudo-inverse", "replace", "none"])
def test_the_delay_executes_what_was_decided(kind, guidance):
    policy = apply(small_policy(**KINDS[kind]), Runtime("chunking", {"delay": 2, "guidance": guidance}))
    _, state = run(policy, observations(2, 1), generators(1, 2))
    before = policy.normalizer.denormalize("action", state["chunk"])
    chunk, after = policy.act({STATE: observations(2, 1, seed=8)[0]}, state, generator=generators(3, 4))
    assert torch.equal(chunk[:, :2], before[:, TO - 1 + TA : TO - 1 + TA + 2])
    assert not torch.equal(chunk[:, 2:], before[:, TO - 1 + TA + 2 : TO - 1 + 2 * TA])
    # the past is what was executed, too
    assert torch.equal(after["chunk"][:, : TO + 1], state["chunk"][:, TA : TA + TO + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_call_is_the_policys_own(kind):
    base = small_policy(**KINDS[kind])
    policy = ChunkingPolicy(base, ChunkingConfig(delay=2))
    obs = {STATE: observations(2, 1)[0]}
    ours, _ = policy.act(obs, policy.initial_state(2), generator=generators(1, 2))
    assert torch.equal(ours, base.act(obs, {}, generator=generators(1, 2))[0])
    # and a new row beside a warm one: guidance adds exactly nothing to it
    _, state = run(policy, observations(2, 1), generators(5, 6))
    state = policy.reset(state, torch.tensor([True, False]))
    mixed, _ = policy.act(obs, state, generator=generators(1, 2))
    assert torch.equal(mixed[0], ours[0])
    assert not torch.equal(mixed[1], ours[1])


@pytest.mark.parametrize("process", [Flow(), VP.cosine(100)], ids=["flow", "vp"])
def test_guidance_draws_a_smooth_chunk_to_the_old_one(process):
    """Smooth Gaussian chunks, their exact denoiser: the prefix is met, and the overlap follows; the tail is free."""
    position = torch.arange(TP, dtype=torch.float64)
    smooth = torch.exp(-0.5 * ((position[:, None] - position) / 4) ** 2) + 1e-3 * torch.eye(TP, dtype=torch.float64)
    denoiser = _double(GaussianDenoiser(torch.zeros(TP), smooth, process))
    rng = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(smooth)
    known = (torch.randn(64, TP, generator=rng, dtype=torch.float64) @ root.T).float().unsqueeze(-1)
    init = torch.randn(64, TP, 1, generator=rng)
    weights = overlap_weights(TP, 3, TA)[:, None]
    levels = process.levels(10)
    free = sample(denoiser, process, levels, DDIM(), init=init)
    guided = sample(PrefixGuidance(denoiser, process, known, weights), process, levels, DDIM(), init=init)

    def distance(x, part):
        return float((x - known)[:, part].square().mean())

    prefix, overlap = slice(0, 3), slice(3, TP - TA)
    assert distance(free, prefix) > 1  # two independent chunks: 2 on average
    assert distance(guided, prefix) < 0.05
    assert distance(guided, overlap) < 0.2 * distance(free, overlap)
    assert guided[:, -1].std() > 0.5 * free[:, -1].std()


def test_works_where_the_caller_is_in_inference_mode():
    policy = ChunkingPolicy(small_policy(process="flow"), ChunkingConfig(delay=1))
    with torch.inference_mode():
        chunks, _ = run(policy, observations(1, 2), generators(1))
    outside, _ = run(policy, observations(1, 2), generators(1))
    assert torch.equal(chunks, outside)


def test_impossible_delays():
    with pytest.raises(DipoleError, match="for 0 to 4 steps after"):
        ChunkingPolicy(small_policy(), ChunkingConfig(delay=5))
    with pytest.raises(DipoleError, match="for 0 to 1 steps after"):
        ChunkingPolicy(small_policy(horizons=(2, 10, 8)), ChunkingConfig(delay=2))
    with pytest.raises(DipoleError, match="beta"):
        ChunkingPolicy(small_policy(), ChunkingConfig(beta=0.0))
