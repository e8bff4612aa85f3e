"""Temporal ensembling against its definition, all chunks kept."""

import pytest
import torch
from method_helpers import STATE, generators, observations, run, small_policy

from dipole.realtime.ensemble import EnsembleConfig, EnsemblePolicy

TO, TP = 2, 10


@pytest.mark.parametrize("decay", [0.01, 0.0, -0.5, 2.0])
@pytest.mark.parametrize("action_horizon", [1, 2, 4])
def test_against_all_chunks_kept(decay, action_horizon):
    base = small_policy(process="flow", horizons=(TO, TP, action_horizon))
    policy, observed = EnsemblePolicy(base, EnsembleConfig(decay)), observations(2, 12)
    ours, _ = run(policy, observed, generators(1, 2))
    rng, kept = generators(1, 2), []
    for call, obs in enumerate(observed):
        whole = base.denoise(base.encode({STATE: obs}), None, rng)
        kept.append((call * action_horizon, whole[:, TO - 1 :].detach()))
        for step in range(action_horizon):
            now = call * action_horizon + step
            covering = [chunk[:, now - start] for start, chunk in kept if 0 <= now - start < TP - TO + 1]
            weights = torch.exp(-decay * torch.arange(len(covering), dtype=torch.float32))
            mean = (torch.stack(covering) * weights[:, None, None]).sum(0) / weights.sum()
            expected = base.normalizer.denormalize("action", mean)
            # a running average in float32, of numbers about 8 wide
            torch.testing.assert_close(ours[call, :, step], expected, rtol=0, atol=2e-5)


def test_the_first_chunk_is_the_policys_own():
    base = small_policy(process="flow")
    policy, obs = EnsemblePolicy(base, EnsembleConfig()), {STATE: observations(2, 1)[0]}
    chunk, _ = policy.act(obs, policy.initial_state(2), generator=generators(1, 2))
    assert torch.equal(chunk, base.act(obs, {}, generator=generators(1, 2))[0])


def test_a_large_decay_trusts_the_oldest():
    base = small_policy(process="flow", horizons=(TO, TP, 1))
    policy, observed = EnsemblePolicy(base, EnsembleConfig(30.0)), observations(1, 3)
    ours, _ = run(policy, observed, generators(1))
    first = base.denoise(base.encode({STATE: observed[0]}), None, generators(1))
    expected = base.normalizer.denormalize("action", first[:, TO - 1 : TO + 2])
    torch.testing.assert_close(ours[:, 0], expected[0].unsqueeze(1), rtol=0, atol=1e-5)
