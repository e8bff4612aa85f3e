"""EXPO's exact checks: the choice, its special cases, the scaled density, and who gets gradients."""

import collections
import dataclasses
import math

import pytest
import torch
from rl_helpers import demonstrations, setting_of, tiny_policy

from dipole.rl.actors import tanh_log_prob
from dipole.rl.edited import values
from dipole.rl.expo import EXPO, EXPOConfig

SMALL = EXPOConfig(
    hidden=(16, 16), warmup=2, decisions=4, batch_size=32, updates=2, samples=3, critics=4, warmup_actions="base"
)


def learner_of(offline=None, **changes):
    return EXPO(setting_of(tiny_policy(), offline=offline), dataclasses.replace(SMALL, **changes))


def test_choice_is_no_worse_than_every_candidate_of_the_base():
    learner = learner_of()
    base, features = learner.setting.base, torch.randn(20, 2)
    _, value = learner.choose(features, torch.Generator().manual_seed(0), acting=True)
    # the same draws again: chunks, edits, then the pair of heads
    random = torch.Generator().manual_seed(0)
    chunk = learner.acting.chunk(features.repeat_interleave(3, 0), generator=random)
    sampled = base.executed(chunk).reshape(20, 3, -1)
    learner.edited(features.repeat_interleave(3, 0), sampled.flatten(0, 1), random)
    heads = learner.heads(random)
    of_base = values(learner.modules["target"], features, sampled, heads)
    assert (value >= of_base.amax(1)).all()
    assert (value > of_base.amax(1)).any()  # some edit won


def test_without_edits_it_is_best_of_n():
    learner = learner_of(edit_scale=0.0)
    features = torch.randn(20, 2)
    chosen, value = learner.choose(features, torch.Generator().manual_seed(0), acting=True)
    random = torch.Generator().manual_seed(0)
    chunk = learner.acting.chunk(features.repeat_interleave(3, 0), generator=random).view(20, 3, 4, 2)
    q = values(learner.modules["target"], features, chunk.reshape(20, 3, -1), learner.heads(random))
    assert torch.equal(chosen, chunk[torch.arange(20), q.argmax(1)])
    assert torch.equal(value, q.amax(1))
    learner.iterate(0)
    assert "alpha" not in learner.iterate(1)


def test_one_sample_without_edits_in_the_target_is_sarsa_on_the_base():
    learner = learner_of(target_samples=1)
    batch = learner.collector.collect(learner.decide, 4).flat()
    random = learner.random("critic")
    chunk = learner.online.chunk(batch["next_features"], generator=random).flatten(1)
    value = learner.modules["target"](batch["next_features"], chunk, learner.heads(random)).amin(0)
    target = batch["reward"] + 0.99 * (~batch["terminated"]).float() * value
    loss = (learner.critics(batch["features"], batch["action"]) - target).square().mean()
    assert learner.update_critics(batch)["critic_loss"] == pytest.approx(float(loss.detach()), rel=1e-6)


def test_density_of_a_scaled_edit():
    """log pi(beta tanh u) = log N(u) - sum log(1 - tanh^2 u) - d log beta: the actor gives all but the last term."""
    mean, log_std = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64) / 3
    u = torch.randn(4, 3, dtype=torch.float64)
    normal = torch.distributions.Normal(mean, log_std.exp())
    change = torch.distributions.TransformedDistribution(
        normal,
        [torch.distributions.TanhTransform(), torch.distributions.AffineTransform(0.0, 0.15)],
    )
    wanted = change.log_prob(0.15 * torch.tanh(u)).sum(-1)
    assert torch.allclose(tanh_log_prob(mean, log_std, u) - 3 * math.log(0.15), wanted, atol=1e-8)


def test_the_entropy_target_can_be_reached_for_every_scale():
    for scale in (0.05, 0.15, 0.7):
        temperature = learner_of(edit_scale=scale).temperature
        assert temperature.target == -4.0  # -d/2 of eight components, below the 8 log 2 of the uniform one
    # with the scaled density the most is d log(2 beta), and -d/2 lies above it for beta < 0.303
    assert 8 * math.log(2 * 0.15) < -4.0 < 8 * math.log(2 * 0.31)


def test_edits_do_not_train_the_base_and_the_given_policy_stays():
    learner = learner_of()
    before = {key: value.clone() for key, value in learner.setting.base.policy.state_dict().items()}
    batch = learner.collector.collect(learner.decide, 4).flat()
    learner.update_edit(batch)
    assert all(parameter.grad is None for parameter in learner.modules["base"].parameters())
    learner.iterate(0)
    learner.iterate(1)
    after = learner.setting.base.policy.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    moved = learner.modules["base"].state_dict()
    assert any(not torch.equal(moved[key], after[f"network.{key}"]) for key in moved)


def test_edits_stay_small():
    learner = learner_of(edit_scale=0.2)
    for parameter in learner.edit.parameters():
        parameter.data.mul_(20)
    edit, _ = learner.edited(torch.randn(100, 2), torch.randn(100, 8), torch.Generator().manual_seed(0))
    assert 0.19 < float(edit.detach().abs().max()) <= 0.2 + 1e-6


def test_pairs_differ_only_if_asked_for():
    features = torch.randn(200, 2)
    same = learner_of().choose(features, torch.Generator().manual_seed(0), acting=False)
    separate = learner_of(separate_pairs=True).choose(features, torch.Generator().manual_seed(0), acting=False)
    assert torch.equal(same[0], separate[0])
    assert not torch.equal(same[1], separate[1])


def test_stored_chunk_holds_what_was_executed():
    learner = learner_of(warmup=0)
    decision = learner.decide(torch.randn(5, 2), torch.Generator().manual_seed(0))
    base = learner.setting.base
    assert torch.equal(base.executed(decision.data["chunk"]).flatten(1), decision.data["action"])
    assert torch.allclose(base.physical(decision.data["action"].view(5, 4, 2)), decision.chunk)


def test_uniform_warm_up_is_within_the_bounds():
    learner = learner_of(warmup_actions="uniform")
    chunk = learner.decide(torch.randn(500, 2), torch.Generator().manual_seed(0)).chunk
    assert chunk.abs().max() <= 1.5 + 1e-5
    assert chunk.abs().max() > 1.45


def test_a_round_is_some_updates_of_the_critics_and_one_of_base_and_edit():
    learner, counts = learner_of(rounds=3), collections.Counter()
    for name, optimizer in learner.optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: counts.update([name]))
    learner.iterate(0)
    learnt = SMALL.decisions - SMALL.warmup + 1  # the last decision of the warm-up fills the buffer enough
    assert counts == {"critics": 3 * 2 * learnt, **dict.fromkeys(("base", "edit", "temperature"), 3 * learnt)}


def test_offline_to_online():
    learner = learner_of(offline=demonstrations())
    figures = learner.iterate(0)
    assert figures["base_loss"] > 0


def test_deployed_policy_chooses_by_the_mean_and_row_by_row():
    learner = learner_of()
    learner.iterate(0)
    policy = learner.policy()
    obs = {"observation.state": torch.randn(4, 1, 2)}
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    together, _ = policy.act(obs, {}, generator=generators)
    alone, _ = policy.act(
        {"observation.state": obs["observation.state"][2:3]}, {}, generator=[torch.Generator().manual_seed(2)]
    )
    assert torch.allclose(together[2:3], alone, atol=1e-5)
