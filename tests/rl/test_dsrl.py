"""DSRL's exact checks: the noise path is the policy's own, distillation, boxes, and the plain SAC inside."""

import dataclasses
import math

import pytest
import torch
from rl_helpers import ENV, base_of, demonstrations, setting_of, tiny_policy

from dipole.envs import make
from dipole.errors import DipoleError
from dipole.policies import SamplerConfig
from dipole.rl.base import Base
from dipole.rl.dsrl import DSRL, DSRLConfig
from dipole.rl.noise_env import NoiseEnv
from dipole.rl.steered import spread

SMALL = DSRLConfig(hidden=(16, 16), warmup=2, decisions=4, batch_size=32, updates=2, distill_updates=2)


def learner_of(policy=None, **changes):
    return DSRL(setting_of(policy or tiny_policy()), dataclasses.replace(SMALL, **changes))


def test_normal_noise_through_the_learner_is_base_sampling_bit_for_bit():
    learner = learner_of()
    features = torch.randn(5, learner.setting.base.feature_dim)
    warm = learner.decide(features, torch.Generator().manual_seed(4))
    base = learner.setting.base
    # The same generator, drawing `[5, Tp, Da]` as the sampler does.
    plain = base.physical(base.executed(base.chunk(features, generator=torch.Generator().manual_seed(4))))
    assert torch.equal(warm.chunk, plain)


def test_equal_noise_gives_equal_chunks():
    learner = learner_of()
    features, noise = torch.randn(5, learner.setting.base.feature_dim), torch.randn(5, learner.noise_dim)
    one = learner._denoise(features, noise, torch.Generator().manual_seed(1))
    assert torch.equal(one, learner._denoise(features, noise, torch.Generator().manual_seed(2)))


def test_noise_stays_in_its_box():
    learner = learner_of(noise_bound=0.7, warmup=0)
    for parameter in learner.actor.parameters():
        parameter.data.mul_(30)
    decision = learner.decide(torch.randn(200, learner.setting.base.feature_dim), torch.Generator().manual_seed(0))
    assert decision.data["noise"].abs().max() <= 0.7
    assert decision.data["noise"].abs().max() > 0.69


def test_tiling():
    noise = torch.arange(4.0)[None]  # two steps of two components
    assert spread(noise, 5, 2)[0].tolist() == [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]
    learner = learner_of(noise_steps=2)
    assert learner.noise_dim == 4
    with pytest.raises(DipoleError, match="noise_steps 9"):
        learner_of(noise_steps=9)


class Identity:
    """A black box with pi(s, w) = w (linear in w with `matrix`); one action per decision."""

    obs_horizon, pred_horizon, action_horizon, action_dim = 1, 1, 1, 2

    def __init__(self, matrix=None, stochastic=False):
        self.matrix, self.stochastic = torch.eye(2) if matrix is None else matrix, stochastic

    def initial_state(self, batch):
        return {}

    def reset(self, state, mask):
        return {}

    def act(self, obs, state, noise=None, generator=None):
        action = noise @ self.matrix
        return (action + torch.randn(action.shape)) * 1.5 if self.stochastic else action * 1.5, {}


def black_box(policy, **changes):
    setting = dataclasses.replace(setting_of(tiny_policy()), base=Base(policy, make(ENV, 1)))
    return DSRL(setting, dataclasses.replace(SMALL, **changes))


def test_distilled_critic_equals_the_action_critic_at_the_policys_action():
    """With a linear policy and a quadratic Q_A fixed by hand, Q_W converges to Q_A(s, pi(s, w)) within its box."""
    matrix = torch.tensor([[0.5, 0.2], [-0.3, 0.8]])
    learner = black_box(Identity(matrix), critics=1, hidden=(), lr=0.02)

    # Both critics linear (no hidden layer): Q_A = c . a, so Q_W must become c . (w matrix) exactly.
    main, noise = learner.modules["main"].layers[0], learner.modules["noise"].layers[0]
    with torch.no_grad():
        main.weight.copy_(torch.tensor([0.0, 0.0, 1.5, -0.5])[None, :, None])
        main.bias.fill_(0.25)
    batch = {"features": torch.randn(64, 2)}
    for step in range(600):
        learner.values["updates"] = step
        learner.distil(batch)
        if step == 400:
            for group in learner.optimizers["noise"].param_groups:
                group["lr"] = 2e-4
    w = torch.randn(50, 2)
    wanted = learner.modules["main"](batch["features"][:50], w @ matrix)
    # 1e-3 is Adam's last step size times a few; the exact minimiser is within the model
    assert torch.allclose(learner.modules["noise"](batch["features"][:50], w), wanted, atol=5e-3)
    assert noise.weight.shape == main.weight.shape


def test_identity_policy_makes_both_variants_plain_sac():
    """pi(s, w) = w: the action critic's target is SAC's, and for `sac` the update is SAC's to the bit."""
    batch = {
        "features": torch.randn(32, 2),
        "next_features": torch.randn(32, 2),
        "reward": torch.randn(32),
        "terminated": torch.rand(32) < 0.3,
        "action": torch.rand(32, 2),
    }
    batch["noise"] = batch["action"].clone()
    losses = []
    for variant in ("na", "sac"):
        learner = black_box(Identity(), variant=variant)
        target, actor = learner.modules["target"], learner.actor
        with torch.no_grad():
            unit, log_prob = actor(batch["next_features"], learner.random("critic"))
            soft = target(batch["next_features"], 1.5 * unit).amin(0) - log_prob  # alpha is 1 at the start
            wanted = batch["reward"] + 0.99 * (~batch["terminated"]).float() * soft
            q = learner.modules["main"](batch["features"], batch["action"])
            loss = float(0.5 * (q - wanted).square().sum(0).mean())
        assert learner.update_critic(batch)["critic_loss"] == pytest.approx(loss, rel=1e-6)
        losses.append(loss)
    assert losses[0] == pytest.approx(losses[1])  # the same networks, as both start from the seed


def test_action_critic_needs_no_noise_in_the_data():
    learner = learner_of()
    batch = learner.collector.collect(learner.decide, 4).flat()
    batch.pop("noise")
    figures = learner.update_critic(batch) | learner.distil(batch)
    assert all(math.isfinite(value) for value in figures.values())


def test_no_gradient_reaches_the_policy():
    learner = learner_of()
    learner.iterate(0)
    assert all(parameter.grad is None for parameter in learner.setting.base.policy.parameters())


def test_offline_data_are_mixed_in():
    policy = tiny_policy()
    setting = setting_of(policy, offline=demonstrations())
    learner = DSRL(setting, SMALL)
    learner.buffers["online"].add(learner.collector.collect(learner.decide, 4).flat())
    assert len(learner.batch()["reward"]) == 32
    with pytest.raises(DipoleError, match="variant=sac learns from noise"):
        DSRL(setting, dataclasses.replace(SMALL, variant="sac"))


def test_stochastic_samplers_are_refused():
    policy = tiny_policy(process="vp-cosine", sampler=SamplerConfig("ddpm", 10))
    with pytest.raises(DipoleError, match="dsrl chooses the initial noise, and the sampler 'ddpm' adds more"):
        learner_of(policy)
    learner = black_box(Identity(stochastic=True))
    with pytest.raises(DipoleError, match="answers equal noise with different actions"):
        learner.iterate(0)


def test_steered_policy_acts_as_the_learner_would():
    learner = learner_of()
    learner.iterate(0)
    policy = learner.policy()
    obs = {"observation.state": torch.randn(3, 1, 2)}
    base = learner.setting.base
    features = base.features(obs)
    noise = 1.5 * learner.actor.mode(features)
    wanted = base.physical(base.executed(learner._denoise(features, noise)))
    assert torch.equal(policy.act(obs, {})[0], wanted)
    given = torch.randn(3, 4, 2)
    assert torch.equal(policy.act(obs, {}, noise=given)[0], base.policy.act(obs, {}, noise=given)[0])


# gymnasium advises against boxes other than [-1, 1], and against unbounded observations
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_gym_environment_of_noise():
    import gymnasium
    from gymnasium.utils.env_checker import check_env

    policy = tiny_policy()
    env = NoiseEnv(policy, ENV, noise_bound=1.5, seed=3)
    assert isinstance(env, gymnasium.Env)
    check_env(env, skip_render_check=True)
    obs, _ = env.reset(seed=5)
    assert obs.shape == (2,)
    # Noise of the base's own distribution, through the wrapper and past its box, gives the base's chunk.
    noise = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(0))
    base = base_of(policy)
    chunk = base.physical(base.executed(base.chunk(torch.from_numpy(obs)[None], noise)))[0]
    assert torch.allclose(torch.from_numpy(env.chunk(noise.numpy().reshape(-1))), chunk)
    total, over = 0, False
    while not over:
        obs, _, terminated, truncated, info = env.step(env.action_space.sample())
        total += info["env_steps"]
        over = terminated or truncated
    assert total <= 32
    env.close()
