"""ResiP's exact checks: nothing changes at the start, queues are per row, the base is asked as rarely as it can be."""

import dataclasses

import pytest
import torch
from rl_helpers import base_of, setting_of, tiny_policy

from dipole.envs import make
from dipole.evaluation.rollout import rollout
from dipole.rl.residual import Queues
from dipole.rl.resip import ResiP, ResiPConfig

SLOT = "micro/slot_peg"
SMALL = ResiPConfig(hidden=(16, 16), steps=8, epochs=2, actor_warmup=0)


def slot_policy():
    return tiny_policy(SLOT, horizon=16)


def learner_of(policy=None, env=SLOT, num_envs=3, **changes):
    return ResiP(setting_of(policy or slot_policy(), env, num_envs), dataclasses.replace(SMALL, **changes))


def test_untrained_policy_acts_as_its_base_bit_for_bit():
    policy = slot_policy()
    env = make(SLOT, 8)
    seeds = list(range(100_000, 100_008))
    ours, base = (
        rollout(p, env, seeds, block=8, keep_trajectories=True) for p in (learner_of(policy).policy(), policy)
    )
    for one, other in zip(ours.episodes, base.episodes, strict=True):
        assert one.trajectory.actions.tolist() == other.trajectory.actions.tolist()
        assert one.return_ == other.return_


def test_scale_zero_never_changes_the_base():
    policy = slot_policy()
    learner = learner_of(policy, scale=0.0)
    learner.iterate(0)
    env, seeds = make(SLOT, 4), list(range(100_000, 100_004))
    ours, base = (rollout(p, env, seeds, block=4, keep_trajectories=True) for p in (learner.policy(), policy))
    for one, other in zip(ours.episodes, base.episodes, strict=True):
        assert one.trajectory.actions.tolist() == other.trajectory.actions.tolist()


def test_density_at_the_start_does_not_depend_on_the_observation():
    learner = learner_of()
    residual = torch.randn(1, 1).expand(10, 1)
    density = learner.dist(torch.randn(10, learner.queues.feature_dim)).log_prob(residual, "sum")
    assert density.unique().numel() == 1


def test_ratio_is_one_before_the_first_update():
    learner = learner_of(minibatches=2)
    figures = learner.iterate(0)
    # float32, and a batch of another size
    assert figures["first_ratio_error"] < 1e-5
    assert figures["ratio_error"] > 0


def test_base_is_asked_once_per_chunk():
    learner = learner_of()
    learner.collector.collect(learner.decide, 64)  # two episodes of 32 steps, chunks of 16
    # two chunks an episode; and the first of the third episode, which was looked at after the last reset
    assert learner.queues.calls == 3 * (2 * 2 + 1)


def test_base_gets_no_gradient():
    learner = learner_of()
    learner.iterate(0)
    assert all(parameter.grad is None for parameter in learner.setting.base.policy.parameters())


def test_a_row_that_begins_forgets_its_chunk_and_no_other():
    base = base_of(slot_policy(), SLOT)
    queues = Queues(base, 3, show_phase=True)
    obs = {key: torch.randn(3, 1, feature.shape[0]) for key, feature in base.spec.observation.items()}
    random = torch.Generator().manual_seed(0)
    queues(obs, [0, 1, 2], True, random)
    chunks = queues.chunk.clone()
    queues(obs, [0, 1, 2], False, random)
    part = {key: value[1:2] for key, value in obs.items()}
    seen = queues(part, [1], True, random)
    assert queues.place.tolist() == [1, 0, 1]
    assert torch.equal(queues.chunk[[0, 2]], chunks[[0, 2]])
    assert not torch.equal(queues.chunk[1], chunks[1])
    assert torch.equal(queues.base_action(seen), queues.chunk[1:2, 0])
    assert seen[0, -1] == 0.0
    assert queues(part, [1], False, random)[0, -1] == pytest.approx(1 / 16)


def test_policy_does_not_leak_between_rows():
    """A batch whose rows are reset at different times acts as each row alone, with its own generator."""
    learner = learner_of(show_phase=True)
    with torch.no_grad():
        learner.residual.head.weight.add_(0.3)
    policy = learner.policy()
    spec = learner.setting.base.spec
    obs = [{k: torch.randn(2, 1, f.shape[0]) for k, f in spec.observation.items()} for _ in range(20)]
    resets = {5: [True, False], 9: [False, True]}

    def play(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        state, actions = policy.initial_state(len(rows)), []
        for t in range(20):
            if t in resets:
                state = policy.reset(state, torch.tensor([resets[t][row] for row in rows]))
            seen = {key: value[rows] for key, value in obs[t].items()}
            action, state = policy.act(seen, state, generator=generators)
            actions.append(action)
        return torch.cat(actions, dim=1)

    both = play([0, 1])
    for row in (0, 1):
        # another batch size may round differently in the last digits
        assert torch.allclose(both[row], play([row])[0], atol=1e-6)


def test_rates_follow_a_cosine():
    learner = learner_of(iterations=10)
    learner.iterate(5)
    assert learner.optimizers["actor"].param_groups[0]["lr"] == pytest.approx(1.5e-4)
    assert learner.optimizers["critic"].param_groups[0]["lr"] == pytest.approx(2.5e-3)
