"""GAE against brute force, through truncations; the denoising discount; the running scale of rewards."""

import numpy as np
import pytest
import torch

from dipole.rl.advantages import RewardScale, gae, normalise, over_denoising


def brute_force(reward, value, next_value, terminated, truncated, gamma, lam):
    """Sum the lambda-returns of every decision, one by one."""
    steps, rows = reward.shape
    advantage = np.zeros_like(reward)
    for n in range(rows):
        for t in range(steps):
            weight = 1.0
            for s in range(t, steps):
                after = 0.0 if terminated[s, n] else next_value[s, n]
                advantage[t, n] += weight * (reward[s, n] + gamma * after - value[s, n])
                if terminated[s, n] or truncated[s, n]:
                    break
                weight *= gamma * lam
    return advantage


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_gae_equals_brute_force_through_truncations(lam):
    rng = np.random.default_rng(0)
    reward, value, next_value = rng.normal(size=(3, 12, 5))
    terminated, truncated = rng.uniform(size=(2, 12, 5)) < 0.2
    truncated &= ~terminated
    arrays = [torch.from_numpy(a) for a in (reward, value, next_value, terminated, truncated)]
    advantage, target = gae(*arrays, 0.97, lam)
    wanted = brute_force(reward, value, next_value, terminated, truncated, 0.97, lam)
    # float64: a dozen additions
    assert np.abs(advantage.numpy() - wanted).max() < 1e-12
    assert torch.equal(target, advantage + arrays[1])


def test_closed_form_with_constant_reward():
    """With V at its fixed point r / (1 - gamma), an endless (truncated) episode has no advantage anywhere."""
    gamma, value = 0.9, torch.full((6, 2), 10.0, dtype=torch.float64)
    never, last = torch.zeros(6, 2, dtype=torch.bool), torch.zeros(6, 2, dtype=torch.bool)
    last[-1] = True
    advantage, _ = gae(torch.ones(6, 2, dtype=torch.float64), value, value, never, last, gamma, 0.95)
    assert float(advantage.abs().max()) < 1e-12
    # A termination instead loses what was to come: gamma V at the end, discounted on the way back.
    advantage, _ = gae(torch.ones(6, 2, dtype=torch.float64), value, value, last, never, gamma, 0.95)
    lost = -gamma * 10 * (gamma * 0.95) ** torch.arange(5, -1, -1, dtype=torch.float64)
    assert torch.allclose(advantage, lost[:, None].expand(6, 2), atol=1e-12)


def test_denoising_discount():
    advantage = torch.tensor([2.0, -1.0])
    assert torch.allclose(over_denoising(advantage, 3, 0.5), torch.tensor([[0.5, 1.0, 2.0], [-0.25, -0.5, -1.0]]))
    assert torch.equal(over_denoising(advantage, 1, 0.5), advantage[:, None])


def test_normalise():
    values = normalise(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64))
    assert float(values.mean().abs()) < 1e-12
    assert float(values.square().mean()) == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(normalise(torch.ones(4)), torch.zeros(4))


def test_reward_scale_is_the_std_of_the_discounted_return():
    rng = np.random.default_rng(1)
    reward, done = rng.normal(1, 2, size=(50, 3)), rng.uniform(size=(50, 3)) < 0.1
    scale = RewardScale(3, 0.9, bound=1e9)
    scaled = scale(torch.from_numpy(reward), torch.from_numpy(done))
    seen, running = [], np.zeros(3)
    for r, end in zip(reward, done, strict=True):
        running = 0.9 * running + r
        seen.append(running.copy())
        running[end] = 0
    assert np.allclose(scaled.numpy(), reward / np.std(seen), rtol=1e-6)
    # Two halves give the same moments as the whole.
    halves = RewardScale(3, 0.9)
    for part in (slice(0, 20), slice(20, 50)):
        halves(torch.from_numpy(reward[part]), torch.from_numpy(done[part]))
    assert torch.allclose(halves.moments, scale.moments, rtol=1e-12)


def test_rewards_that_are_all_zero_stay_zero():
    assert torch.equal(RewardScale(2, 0.9)(torch.zeros(3, 2), torch.zeros(3, 2).bool()), torch.zeros(3, 2))
