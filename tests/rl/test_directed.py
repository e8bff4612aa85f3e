"""DPPO along a direction: gradients and corrections of rollouts, resumption to the bit, what is deployed."""

import dataclasses

import pytest
import torch
from rl_helpers import ENV, setting_of, tiny_policy

from dipole.errors import DipoleError
from dipole.policies import load_policy
from dipole.rl import finetune as loop
from dipole.rl.directed import _correction, _gradient, surrogates, unit_of
from dipole.rl.dppo import DPPO, DPPOConfig
from dipole.rl.finetune import finetune
from dipole.rl.normalized_gradient import hessian_term
from dipole.rl.reinflow import ReinFlowConfig
from dipole.rl.reinflow import make as make_reinflow
from dipole.rl.settings import FinetuneConfig

CONFIG = DPPOConfig(decisions=3, batch_size=4, epochs=1, critic_hidden=(8,), tuned_steps=2, direction="npg-igt")
# Untrained policies meet no goal: time costs something, so that decisions differ.
PENALTY = 0.1
RUN = FinetuneConfig(env_steps=200, num_envs=3, eval_episodes=0, save_seconds=0.0, step_penalty=PENALTY)


def learner_of(**changes):
    return DPPO(setting_of(tiny_policy(), step_penalty=PENALTY), dataclasses.replace(CONFIG, **changes))


def collected(learner):
    rollout = learner.collector.collect(learner.decide, learner.config.decisions)
    return rollout, torch.randn(rollout.reward.shape, generator=torch.Generator().manual_seed(0))


def test_surrogate_has_the_gradient_that_is_followed():
    learner = learner_of()
    rollout, advantage = collected(learner)
    _gradient(learner, rollout, advantage)
    parameters = learner.optimizers["actor"].parameters
    phi, _ = surrogates(learner, rollout, advantage)
    whole = torch.autograd.grad(phi.mean(), parameters)
    for p, gradient in zip(parameters, whole, strict=True):
        # float32, and sums in another order
        assert torch.allclose(p.grad, -gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max() + 1e-6))


def test_trajectories_end_where_episodes_end():
    learner = learner_of()
    rollout, advantage = collected(learner)
    rollout.truncated.zero_()
    rollout.terminated.zero_()
    assert len(surrogates(learner, rollout, advantage)[0]) == 3
    rollout.terminated[0, 1] = True
    phi, log_prob = surrogates(learner, rollout, advantage)
    assert len(phi) == 4
    steps = learner.chains.log_prob(rollout.data["chain"].flatten(0, 1), rollout.features.flatten(0, 1), "sum").sum(1)
    steps = steps.view(3, 3)
    expected = [steps[:, 0].sum(), steps[0, 1], steps[1:, 1].sum(), steps[:, 2].sum()]
    assert torch.allclose(log_prob, torch.stack(expected), rtol=1e-4)


def test_hessian_term_of_a_network_is_a_derivative():
    learner = learner_of(tuned_steps=1)
    learner.modules["tuned"].double()
    rollout, advantage = collected_double(learner)
    parameters = learner.optimizers["actor"].parameters
    vector = [torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for p in parameters]
    at = surrogates(learner, rollout, advantage)[1].detach()

    def reweighted(e):
        with torch.no_grad():
            for p, v in zip(parameters, vector, strict=True):
                p.add_(e * v)
        phi, log_prob = surrogates(learner, rollout, advantage)
        value = torch.autograd.grad(((log_prob - at).exp().detach() * phi).mean(), parameters)
        with torch.no_grad():
            for p, v in zip(parameters, vector, strict=True):
                p.sub_(e * v)
        return value

    ours = hessian_term(*surrogates(learner, rollout, advantage), parameters, vector)
    ahead, behind = reweighted(1e-6), reweighted(-1e-6)
    for term, a, b in zip(ours, ahead, behind, strict=True):
        difference = (a - b) / 2e-6
        # a central difference at 1e-6 in float64
        assert torch.allclose(term, difference, rtol=1e-3, atol=1e-3 * float(difference.abs().max() + 1e-9))


def collected_double(learner):
    """Return a rollout in float64, made by hand: the collector's is float32."""
    from dipole.rl.experience import Rollout

    random = torch.Generator().manual_seed(0)
    features = torch.randn(2, 2, learner.setting.base.feature_dim, dtype=torch.float64, generator=random)
    chain = torch.randn(2, 2, 2, 4, 2, dtype=torch.float64, generator=random) * 0.3
    over = torch.zeros(2, 2, dtype=torch.bool)
    advantage = torch.randn(2, 2, dtype=torch.float64, generator=random)
    return Rollout(features, features, advantage, over, over, {"chain": chain}), advantage


@pytest.mark.parametrize("direction", ["npg-igt", "n-harpg"])
def test_steps_have_their_length(direction):
    learner = learner_of(direction=direction, length=0.2)
    for iteration in range(3):
        figures = learner.iterate(iteration)
        # float32 over some hundred parameters
        assert figures["step_length"] == pytest.approx(0.2 * 2 / (iteration + 2), rel=1e-3)
    assert ("correction_norm" in figures) == (direction == "n-harpg")


def test_hessian_directions_collect_between_and_return():
    learner = learner_of(direction="harpg", length=1e-3)
    learner.iterate(0)
    before = [p.detach().clone() for p in learner.optimizers["actor"].parameters]
    correction = _correction(learner, 1, torch.tensor(0.0), 1.0)
    assert all(torch.isfinite(part).all() for part in correction)
    assert all(torch.equal(a, p) for a, p in zip(before, learner.optimizers["actor"].parameters, strict=True))


def test_the_ascent_is_deployed_not_where_it_samples():
    learner = learner_of(tuned_steps=None)
    for iteration in range(3):
        learner.iterate(iteration)
    optimizer = learner.optimizers["actor"]
    network = learner.policy().network
    assert all(torch.equal(p, c) for p, c in zip(network.parameters(), optimizer.centre(), strict=True))
    assert not all(torch.equal(p, c) for p, c in zip(optimizer.parameters, optimizer.centre(), strict=True))


def test_equal_rewards_move_nothing():
    learner = DPPO(setting_of(tiny_policy()), CONFIG)  # none is reached
    assert learner.iterate(0)["step_length"] == 0
    # rounding in the mean of equal advantages is not taken for a difference
    assert unit_of(torch.full((7, 3), 0.1)) == 0
    assert unit_of(torch.tensor([[0.0, 2.0]])) == pytest.approx(0.5**0.5)


def test_terms_that_have_no_place_are_refused():
    with pytest.raises(DipoleError, match="kl_weight is for direction=adam"):
        learner_of(kl_weight=0.1)
    with pytest.raises(DipoleError, match="entropy_weight"):
        make_reinflow(setting_of(tiny_policy()), ReinFlowConfig(direction="npg-igt", entropy_weight=0.1))


def test_reinflow_follows_directions_too():
    learner = make_reinflow(
        setting_of(tiny_policy(), step_penalty=PENALTY), ReinFlowConfig(decisions=2, direction="npg-igt", length=0.1)
    )
    assert learner.iterate(0)["step_length"] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("direction", ["npg-igt", "n-harpg"])
def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(direction, tmp_path, monkeypatch):
    settings = dataclasses.replace(CONFIG, direction=direction)
    finetune(tiny_policy(), ENV, "dppo", settings, RUN, tmp_path / "whole")
    made = loop.make_learner

    def stopping(*arguments):
        learner = made(*arguments)
        iterate = learner.iterate

        def stop(iteration):
            if iteration == 2:
                raise KeyboardInterrupt
            return iterate(iteration)

        learner.iterate = stop
        return learner

    monkeypatch.setattr(loop, "make_learner", stopping)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_policy(), ENV, "dppo", settings, RUN, tmp_path / "cut")
    monkeypatch.setattr(loop, "make_learner", made)
    finetune(tiny_policy(), ENV, "dppo", settings, RUN, tmp_path / "cut", resume=True)
    first, second = (load_policy(tmp_path / name / "checkpoints" / "last").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(first[key], second[key]) for key in first)
