"""Clip schedule, clipped ratios, temperature, and the tanh-Gaussian's density."""

import math

import pytest
import torch

from dipole.errors import DipoleError
from dipole.rl.actors import TanhGaussian, tanh_log_prob
from dipole.rl.critics import Critics, Value, follow
from dipole.rl.objectives import Temperature, clip_schedule, ppo_loss, ratio_figures


def test_clip_schedule_is_the_published_one():
    # The ten values published for the Robomimic runs; the third, 0.001447, was rounded up twice.
    table = [0.0010, 0.0012, 0.0015, 0.0018, 0.0023, 0.0030, 0.0040, 0.0054, 0.0073, 0.0100]
    assert torch.allclose(clip_schedule(10, 0.001, 0.01, 3.0), torch.tensor(table).double(), atol=6e-5)
    ends = clip_schedule(7, 0.002, 0.03, 2.0)
    assert float(ends[0]) == pytest.approx(0.002)
    assert float(ends[-1]) == pytest.approx(0.03)
    assert clip_schedule(1, 0.1, 0.2, 3.0).tolist() == [0.2]
    assert torch.allclose(clip_schedule(3, 0.0, 1.0, 0.0), torch.tensor([0.0, 0.5, 1.0]).double())


def test_gradient_at_ratio_one_is_reinforce():
    torch.manual_seed(0)
    log_prob = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(5, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(ppo_loss(log_prob, log_prob.detach(), advantage, 0.1), log_prob)
    assert torch.allclose(gradient, -advantage / 15, atol=1e-15)


def test_clipping_stops_the_gradient_only_in_the_direction_already_taken():
    old = torch.zeros(2, 1)
    log_prob = torch.full((2, 1), 0.5, requires_grad=True)  # ratio 1.65, beyond 1.2
    ppo_loss(log_prob, old, torch.tensor([[1.0], [-1.0]]), 0.2).backward()
    assert log_prob.grad[0] == 0
    assert log_prob.grad[1] > 0
    figures = ratio_figures(log_prob.detach(), old, torch.tensor([0.2]))
    assert figures["clipped"] == 1
    assert figures["ratio_error"] == pytest.approx(math.exp(0.5) - 1)
    assert figures["kl"] > 0


def test_an_entropy_that_no_action_has_is_refused():
    # The uniform distribution on [-1, 1]^3 has 3 log 2 = 2.08 nats.
    with pytest.raises(DipoleError, match=r"target entropy 2.1 cannot be reached.*at most 2.08"):
        Temperature(2.1, 3)
    Temperature(2.0, 3)


def test_temperature_moves_towards_its_target():
    temperature = Temperature(-1.0, 2)
    for log_prob, sign in ((torch.full((4,), 3.0), 1), (torch.full((4,), -3.0), -1)):  # entropy -3, then 3
        (gradient,) = torch.autograd.grad(temperature.loss(log_prob), temperature.log_alpha)
        assert sign * -float(gradient) > 0  # too little entropy raises the temperature


def test_tanh_density_integrates_to_one_and_matches_its_samples():
    mean, log_std = torch.tensor([0.3], dtype=torch.float64), torch.tensor([-0.4], dtype=torch.float64)
    y = torch.linspace(-1 + 1e-7, 1 - 1e-7, 400_001, dtype=torch.float64)
    density = tanh_log_prob(mean, log_std, torch.atanh(y)[:, None]).exp()
    assert float(torch.trapezoid(density, y)) == pytest.approx(1.0, abs=1e-6)
    # Far out, where 1 - tanh^2 rounds to 0, the density is still a number.
    assert torch.isfinite(tanh_log_prob(mean, log_std, torch.tensor([[50.0]], dtype=torch.float64))).all()


def test_actor_is_bounded_and_reproducible():
    torch.manual_seed(0)
    actor = TanhGaussian(3, 4, (8,))
    features = 100 * torch.randn(50, 3)
    action, log_prob = actor(features, torch.Generator().manual_seed(1))
    assert action.abs().max() <= 1
    assert log_prob.shape == (50,)
    again, _ = actor(features, torch.Generator().manual_seed(1))
    assert torch.equal(action, again)
    assert actor.mode(features).shape == (50, 4)


def test_ensemble_is_its_heads_side_by_side():
    torch.manual_seed(0)
    critics = Critics(3, 2, (8, 8), count=4).double()
    features, action = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    q = critics(features, action)
    assert q.shape == (4, 5)
    assert torch.allclose(critics(features, action, torch.tensor([2, 0])), q[[2, 0]], atol=1e-14)
    x = torch.cat([features, action], 1)
    for i, layer in enumerate(critics.layers):  # head 1 by hand
        x = x @ layer.weight[1] + layer.bias[1]
        if i < 2:
            x = torch.relu((x - x.mean(1, True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt())
    assert torch.allclose(x[:, 0], q[1], atol=1e-12)


def test_target_follows():
    a, b = Value(2, (4,)), Value(2, (4,))
    before = a.net[0].weight.clone()
    follow(a, b, 0.25)
    assert torch.allclose(a.net[0].weight, 0.75 * before + 0.25 * b.net[0].weight)
    assert torch.equal(Value(2, (4,))(torch.randn(3, 2)), torch.zeros(3))
