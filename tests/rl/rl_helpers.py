"""Tiny policies for the tests of `dipole.rl`: untrained networks, whose statistics come from a few demonstrations."""

from functools import lru_cache, partial

import torch

from dipole.envs import collect, make
from dipole.policies import SamplerConfig, make_config, make_policy
from dipole.rl.base import Base
from dipole.rl.learner import Setting

ENV = "micro/two_goal"
NETWORK = {"name": "mlp", "width": 16, "num_blocks": 1, "context_width": 8, "step_embed_dim": 8}


@lru_cache(maxsize=8)
def demonstrations(env=ENV, count=6):
    return collect(env, count)


def tiny_policy(env=ENV, process="flow", horizon=4, obs_horizon=1, sampler=None, network=NETWORK, **options):
    """Return an untrained policy; its output layer is not small, so that chunks differ."""
    torch.manual_seed(0)
    config = make_config(
        demonstrations(env),
        network=network,
        process=process,
        obs_horizon=obs_horizon,
        pred_horizon=obs_horizon - 1 + horizon,
        action_horizon=horizon,
        sampler=sampler or SamplerConfig("euler", 4),
        **options,
    )
    policy = make_policy(config, demonstrations(env)).eval()
    if network["name"] == "mlp":
        with torch.no_grad():
            policy.network.head.weight.mul_(10)
    return policy


def base_of(policy, env=ENV, **options):
    return Base(policy, make(env, 1, **options))


def setting_of(policy, env=ENV, num_envs=3, seed=0, offline=None, **options):
    make_env = partial(make, env, num_envs)
    return Setting(base_of(policy, env), make_env, num_envs, seed, offline=offline, **options)
