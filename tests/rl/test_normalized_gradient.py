"""Directions: exact expectations, quadratics, closed forms of LQR, and the optimiser against the functions."""

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from dipole.errors import DipoleError
from dipole.rl.control import LQR, CartPole, Pendulum
from dipole.rl.normalized_gradient import (
    PRESETS,
    DirectedOptimizer,
    Track,
    advance,
    hessian_term,
    preset,
    sampling_point,
)
from dipole.rl.policy_search import Problem, search, slope_of
from dipole.systems import gradient_checks as checks


def test_gradient_and_hessian_term_are_unbiased_on_lqr():
    # float64 and exact quadrature: rounding only
    gradient, product = checks.expected()
    slope, curve = checks.closed_form()
    assert torch.allclose(gradient, slope, atol=1e-10)
    assert torch.allclose(product, curve, atol=1e-10)


def test_sampled_correction_is_the_difference_of_gradients():
    """B v from trajectories sampled uniformly between two iterates carries the gradient from one to the other."""
    problem, count = Problem(LQR(), horizon=2, gamma=0.95, bias=False, std=2.0), 50_000  # little noise in B v
    track = Track(torch.tensor([[0.6, 0.8]]).double(), torch.tensor([[-0.6, -0.4]]).double(), torch.zeros(1, 2), 1)
    random = torch.Generator().manual_seed(0)
    q = torch.rand(count, 1, dtype=torch.float64, generator=random)
    between = track.between(q).requires_grad_()
    drawn = problem.sample(between, 1, random)
    level = torch.tensor([[-2.0, -1.0]], dtype=torch.float64).expand(count, 2)
    vector = track.displacement.expand(count, 2)
    found = hessian_term(*problem.phi(between, drawn, level), [between], [vector])[0]
    ends = (LQR().gradient(k, problem.std, problem.horizon, problem.gamma)[0] for k in (track.theta, track.previous))
    wanted = next(ends) - next(ends)
    error = found.std(0) / count**0.5
    # four standard errors; the difference itself is many of them, so that a wrong sign or a missing term shows
    assert ((found.mean(0) - wanted).abs() < 4 * error).all()
    assert (wanted.abs() > 8 * error).any()


def test_the_other_sign_is_far_from_the_hessian():
    turned = checks.expected(sign=-1.0)[1]
    curve = checks.closed_form()[1]
    assert (turned - curve).norm() > 0.5 * curve.norm()


def test_baseline_changes_no_expectation():
    plain, shifted = checks.expected(), checks.expected(torch.tensor([[5.0, -2.0, 1.0]], dtype=torch.float64))
    for one, other in zip(plain, shifted, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


def test_hessian_term_is_the_derivative_of_the_reweighted_gradient():
    claim = checks.finite_difference()
    assert claim.verdict == "passed", claim.ours


@pytest.mark.parametrize("eta", [0.05, 0.5, 1.0, None])
@pytest.mark.parametrize("name", ["npg-igt", "n-harpg", "harpg"])
def test_direction_is_the_gradient_of_a_quadratic(name, eta):
    tracking, length = checks.on_quadratic(preset(name, eta=eta))
    assert tracking < 1e-9
    if PRESETS[name].normalized:
        assert length < 1e-12


def test_plain_momentum_is_not():
    assert checks.on_quadratic(preset("npg", eta=0.3))[0] > 1e-3


@pytest.mark.parametrize("name", ["npg", "npg-igt", "n-harpg", "harpg"])
def test_eta_one_is_policy_gradient(name):
    assert checks.reduces(name).ours.value == 0


def test_extrapolation_is_limited():
    config = preset("npg-igt", eta=0.01, reach=0.5)
    track = Track(torch.ones(3), torch.zeros(3), torch.zeros(3), 4)
    assert torch.linalg.vector_norm(sampling_point(config, track) - track.theta) == pytest.approx(0.5)
    near = Track(torch.full((3,), 1e-4), torch.zeros(3), torch.zeros(3), 4)
    assert torch.allclose(sampling_point(config, near), near.theta * 100)


def test_zero_gradient_takes_no_step():
    track = advance(preset("npg-igt"), Track.start(torch.ones(2)), torch.zeros(2))
    assert torch.equal(track.theta, torch.ones(2))


@pytest.mark.parametrize("name", ["npg-igt", "n-harpg", "pg"])
def test_optimizer_is_the_same_as_the_functions(name):
    config = preset(name, length=0.3)
    torch.manual_seed(0)
    net = nn.Linear(2, 2).double()
    optimizer = DirectedOptimizer(net.parameters(), config)
    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    track = Track.start(flat)
    for step in range(4):
        gradient, correction = torch.randn(2, 6, dtype=torch.float64)
        net.weight.grad, net.bias.grad = -gradient[:4].view(2, 2), -gradient[4:]
        optimizer.step(correction=[correction[:4].view(2, 2), correction[4:]])
        track = advance(config, track, gradient, correction)
        assert torch.equal(torch.cat([p.reshape(-1) for p in optimizer.centre()]), track.theta)
        here = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
        assert torch.equal(here, sampling_point(config, track))
        assert optimizer.track().t == step + 1
    optimizer.move_between(0.25)
    assert torch.equal(net.bias.detach(), track.between(0.25)[4:])
    optimizer.move_back()
    assert torch.equal(net.bias.detach(), sampling_point(config, track)[4:])


def test_unfit_settings_are_refused():
    with pytest.raises(DipoleError, match="eta 2"):
        preset("npg-igt", eta=2.0)
    with pytest.raises(DipoleError, match="length"):
        preset("npg-igt", length=0.0)
    with pytest.raises(DipoleError, match="npg-igt"):
        preset("igt")


def test_closed_gradient_and_optimum_of_lqr():
    lqr, gain = LQR(), torch.tensor([[-0.4, -0.9]], dtype=torch.float64, requires_grad=True)
    (auto,) = torch.autograd.grad(lqr.value(gain, 0.5, 20, 0.95), gain)
    assert torch.allclose(auto, lqr.gradient(gain.detach(), 0.5, 20, 0.95), rtol=1e-12)
    best, value = lqr.optimum(0.5, 20, 0.95)
    assert lqr.gradient(best, 0.5, 20, 0.95).abs().max() < 1e-9
    around = best + 0.01 * torch.tensor([[[1.0, 0]], [[-1, 0]], [[0, 1]], [[0, -1]]], dtype=torch.float64)
    assert (lqr.value(around, 0.5, 20, 0.95) < value).all()


def test_sampled_return_of_lqr_is_its_value():
    problem = Problem(LQR(), 10, 0.95, bias=False)
    theta = torch.tensor([[-0.4, -0.9]], dtype=torch.float64)
    returns = problem.returns(problem.sample(theta, 20_000, torch.Generator().manual_seed(0)))
    exact = LQR().value(theta.view(1, 2), 0.5, 10, 0.95)
    # four standard errors
    assert abs(float(returns.mean() - exact)) < 4 * float(returns.std()) / 20_000**0.5


@pytest.mark.parametrize(("dynamics", "name"), [(CartPole(), "CartPole-v1"), (Pendulum(), "Pendulum-v1")])
def test_dynamics_are_gymnasiums(dynamics, name):
    env = gymnasium.make(name).unwrapped
    env.reset(seed=0)
    state = torch.tensor(np.asarray(env.state, dtype=np.float64))
    rng = np.random.default_rng(0)
    for _ in range(30):
        action = int(rng.integers(2)) if dynamics.discrete else rng.uniform(-2.5, 2.5, 1)
        _, reward, over, *_ = env.step(action)
        given = torch.tensor(action) if dynamics.discrete else torch.from_numpy(action)
        state, ours, ended = dynamics.step(state, given)
        assert np.allclose(state.numpy(), np.asarray(env.state, dtype=np.float64), atol=1e-9)
        assert float(ours) == pytest.approx(float(reward), abs=1e-9)
        assert bool(ended) == bool(over)
        if over:
            break


def test_ended_episodes_earn_and_count_nothing():
    problem = Problem(CartPole(), 60, 1.0)
    batch = problem.sample(problem.start(1), 8, torch.Generator().manual_seed(0))
    lengths = batch.alive.sum(-1)
    assert lengths.min() < batch.alive.shape[-1]
    assert torch.equal(problem.returns(batch), lengths.double())
    assert not problem.log_probs(problem.start(1), batch)[~batch.alive].any()


@pytest.mark.parametrize("name", PRESETS)
def test_search_climbs_lqr(name):
    problem, lqr = Problem(LQR(), 20, 0.95, bias=False), LQR()

    def value(theta):
        return lqr.value(theta.view(-1, 1, 2), 0.5, 20, 0.95)

    length = {"pg": 1e-3, "harpg": 3e-3}.get(name, 0.3)
    found = search(problem, preset(name, length=length), 30, batch=20, ascents=4, evaluate=value)
    before, best = float(value(problem.start(1))), lqr.optimum(0.5, 20, 0.95)[1]
    # with 20 trajectories per step the four seeds close a good part of the gap
    assert found.values[-1].mean() > before + 0.2 * (best - before)
    assert found.used[-1] == (30 * 20 if "harpg" not in name else 59 * 20)


def test_ascents_do_not_mix():
    problem = Problem(Pendulum(), 5, 0.9, hidden=(3,))
    theta = problem.start(3)
    theta = theta + torch.randn(theta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features = torch.randn(3, 4, 3, dtype=torch.float64)
    together = problem.output(theta, features)
    for i in range(3):
        assert torch.allclose(together[i], problem.output(theta[i : i + 1], features[i : i + 1])[0])


def test_slope_of_a_power_law():
    used = [10, 20, 40, 80, 160]
    assert slope_of(used, 3.0 * np.array(used) ** -0.4, 20) == pytest.approx(-0.4)
