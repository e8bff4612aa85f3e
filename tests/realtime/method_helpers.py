"""Small policies with random weights, and a loop that runs them as an environment would."""

import numpy as np
import torch

from dipole.data import Episodes, Feature
from dipole.policies import SamplerConfig, make_config, make_policy
from dipole.policies.streaming import StreamingTraining

STATE, C, D = "observation.state", 3, 2
NETWORK = {"name": "mlp", "width": 24, "num_blocks": 1, "context_width": 8, "step_embed_dim": 8}


def demonstrations(seed=0, episodes=6, length=30):
    rng = np.random.default_rng(seed)
    columns = {
        STATE: rng.normal(size=(episodes * length, C)).cumsum(0) / 5,
        "action": rng.uniform(-3, 5, size=(episodes * length, D)),
    }
    columns = {key: value.astype(np.float32) for key, value in columns.items()}
    features = {STATE: Feature("float32", (C,)), "action": Feature("float32", (D,))}
    return Episodes(features, columns, np.arange(1, episodes + 1) * length, 10.0)


def small_policy(seed=0, process="vp-cosine", sampler=None, streaming=False, horizons=(2, 10, 4), network=None):
    """A policy whose weights are large enough that everything depends on everything."""
    to, tp, ta = horizons
    torch.manual_seed(seed)
    episodes = demonstrations()
    config = make_config(
        episodes,
        network=network or NETWORK,
        process=process,
        sampler=sampler,
        obs_horizon=to,
        pred_horizon=tp,
        action_horizon=ta,
        streaming=StreamingTraining() if streaming else None,
    )
    policy = make_policy(config, episodes).eval()
    for parameter in policy.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.2 / parameter.shape[1] ** 0.5)
    return policy


def ddpm(steps=100):
    return SamplerConfig("ddpm", steps, clip=1.0)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def observations(batch, calls, seed=5, to=2):
    return torch.randn(calls, batch, to, C, generator=torch.Generator().manual_seed(seed))


def run(policy, observed, generator, resets=()):
    """Act `len(observed)` times; `resets`: (call, row) at which a row begins anew. Returns chunks and state."""
    batch = observed.shape[1]
    state, chunks = policy.initial_state(batch), []
    for call, obs in enumerate(observed):
        mask = torch.tensor([(call, row) in resets for row in range(batch)])
        if mask.any():
            state = policy.reset(state, mask)
        chunk, state = policy.act({STATE: obs}, state, generator=generator)
        chunks.append(chunk)
    return torch.stack(chunks), state
