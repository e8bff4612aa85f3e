"""FIND: closed forms of the prior, ratios with their references, calibration, and the policy it leaves."""

import pytest
import torch
from rl_helpers import setting_of, tiny_policy

from dipole.errors import DipoleError
from dipole.policies import SamplerConfig, load_policy, save_policy
from dipole.rl.find import FIND, FINDConfig, PriorSearch
from dipole.rl.prior import NoisePrior, PriorPolicy
from dipole.systems import find as system
from dipole.training.seeding import generator

SMALL = FINDConfig(hidden=(8,), decisions=2, batch_size=8)


def shifted_prior(dim):
    prior = NoisePrior(dim)
    with torch.no_grad():
        prior.mean.copy_(torch.linspace(-1, 1, dim))
        prior.log_std.copy_(torch.linspace(-0.5, 0.5, dim))
    return prior


@pytest.mark.parametrize(
    "part", [system._density, system._first_step, lambda: [system._shift()], lambda: [system._base()]]
)
def test_checks_of_the_system(part):
    for claim in part():
        assert claim.verdict == "passed", (claim.claim, claim.ours)


def test_reductions_of_the_density():
    prior, noise = shifted_prior(6), torch.randn(3, 6)
    each = prior.log_prob(noise, "none")
    assert each.shape == (3, 6)
    assert torch.allclose(prior.log_prob(noise), each.sum(1))
    assert torch.allclose(prior.log_prob(noise, "mean"), each.mean(1))
    exact = torch.distributions.Normal(prior.mean, prior.std).log_prob(noise)
    assert torch.allclose(each, exact, atol=1e-5)  # float32


def test_deviation_has_a_floor():
    prior = NoisePrior(2)
    with torch.no_grad():
        prior.log_std.fill_(-50.0)
    assert prior.std.detach().tolist() == pytest.approx([1e-4, 1e-4])


def test_samples_keep_the_reference_they_were_drawn_with():
    search = PriorSearch(3, 1, 4, FINDConfig(hidden=(4,), history=2, updates=1, lr=0.1), 0)
    rewards = [torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([10.0, 11.0, 12.0, 13.0])]
    drawn = []
    for step, reward in enumerate(rewards):
        drawn.append(search.draw(4, generator(0, step)))
        search.learn(drawn[-1], torch.zeros(4, 1), reward, step)
    kept = search.history.state()
    for step in range(2):
        rows = slice(4 * step, 4 * step + 4)
        assert torch.equal(kept["noise"][rows], drawn[step]["noise"])
        assert torch.equal(kept["log_prob"][rows], drawn[step]["log_prob"])
        assert torch.equal(kept["prior"][rows], drawn[step]["prior"])
        assert torch.equal(kept["reward"][rows], rewards[step])
    # the second reference is the prior after the first step, not the first one
    assert not torch.equal(drawn[0]["prior"], drawn[1]["prior"])


def test_old_samples_go_when_the_history_is_full():
    search = PriorSearch(2, 0, 4, FINDConfig(hidden=(4,), history=2), 0)
    for step in range(3):
        search.learn(search.draw(4, generator(0, step)), torch.zeros(4, 0), torch.full((4,), float(step)), step)
    assert set(search.history.state()["reward"].tolist()) == {1.0, 2.0}


@pytest.mark.parametrize("reward", [0.0, 0.1])
def test_equal_rewards_move_nothing(reward):
    search = PriorSearch(2, 1, 7, FINDConfig(hidden=(4,)), 0)
    for step in range(3):
        search.learn(search.draw(7, generator(0, step)), torch.randn(7, 1), torch.full((7,), reward), step)
    assert not search.prior.mean.any()
    assert not search.prior.log_std.any()


def test_calibration_learns_what_a_prior_is_worth():
    search = PriorSearch(1, 1, 64, FINDConfig(hidden=(32,), lr=0.0, calibration_lr=1e-2, calibration_updates=60), 0)
    features = torch.arange(64.0).remainder(2).view(-1, 1)
    search.learn(search.draw(64, generator(0)), features, 5 + 3 * features[:, 0], 0)
    found = search.value(torch.tensor([[0.0], [1.0]]))
    assert found.tolist() == pytest.approx([5.0, 8.0], abs=0.3)  # 60 steps of regression


@pytest.mark.parametrize("direction", ["adam", "npg", "npg-igt"])
def test_finds_the_rewarded_side(direction):
    search = PriorSearch(4, 0, 64, FINDConfig(hidden=(8,), lr=0.05, direction=direction, length=0.5), 0)
    for step in range(30):
        drawn = search.draw(64, generator(1, step))
        search.learn(drawn, torch.zeros(64, 0), (drawn["noise"][:, 1] > 1).float(), step)
    mean = search.found().mean
    # a step of 0.05, thirty iterations; the other components only drift by noise
    assert mean[1] > 0.5
    assert mean[[0, 2, 3]].abs().max() < mean[1] / 2


def test_returns_bootstrap_through_time_limits_only():
    learner = FIND(setting_of(tiny_policy(), num_envs=2), SMALL)
    rollout = learner.collector.collect(learner.decide, 3)
    rollout.reward.copy_(torch.ones(3, 2))
    rollout.terminated.copy_(torch.tensor([[0, 0], [0, 0], [1, 0]]).bool())
    rollout.truncated.zero_()
    learner.search.calibration.centre.fill_(10.0)  # the network itself starts at 0
    found = learner.returns(rollout)
    g = SMALL.gamma
    assert found[:, 0].tolist() == pytest.approx([1 + g + g**2, 1 + g, 1])
    assert found[:, 1].tolist() == pytest.approx([1 + g + g**2 + 10 * g**3, 1 + g + 10 * g**2, 1 + 10 * g])


def test_stochastic_sampler_is_refused():
    policy = tiny_policy(sampler=SamplerConfig("ddim", 4, eta=1.0))
    with pytest.raises(DipoleError, match="find chooses the initial noise"):
        FIND(setting_of(policy), SMALL)


def test_unfit_settings_are_refused():
    with pytest.raises(DipoleError, match="history is 0"):
        FINDConfig(history=0)
    with pytest.raises(DipoleError, match="clip"):
        FINDConfig(clip=0.0)


def test_policy_shapes_the_noise_it_is_given(tmp_path):
    base = tiny_policy()
    prior = shifted_prior(base.pred_horizon * base.action_dim)
    policy = PriorPolicy.of(base, prior)
    obs = {"observation.state": torch.randn(3, 1, 2)}
    noise = torch.randn(3, base.pred_horizon, base.action_dim)
    ours, _ = policy.act(obs, {}, noise=noise)
    theirs, _ = base.act(obs, {}, noise=prior(noise.flatten(1)).detach().view_as(noise))
    assert torch.equal(ours, theirs)
    plain = PriorPolicy.of(base, NoisePrior(prior.mean.numel()))
    assert torch.equal(plain.act(obs, {}, noise=noise)[0], base.act(obs, {}, noise=noise)[0])
    drawn = policy.act(obs, {}, generator=torch.Generator().manual_seed(0))[0]
    again = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, policy.act(obs, {}, noise=again)[0])
    loaded = load_policy(save_policy(policy, tmp_path / "policy"))
    assert torch.equal(loaded.act(obs, {}, noise=noise)[0], ours)
