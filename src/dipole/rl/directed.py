"""On-policy methods that follow a direction of `normalized_gradient`: one step per iteration, no ratios, no clipping.

The surrogate is the plain policy gradient's, sum_h A_h log p(chain_h), with the density of the whole tuned chain. A
trajectory is a row's stretch of decisions up to the end of an episode or of the rollout.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dipole.errors import DipoleError
from dipole.rl.experience import Rollout
from dipole.rl.learner import descend
from dipole.rl.normalized_gradient import DirectedOptimizer, hessian_term, preset
from dipole.training.seeding import generator

if TYPE_CHECKING:
    from dipole.rl.dppo import DPPO, DPPOConfig


def directed_optimizer(parameters: Iterable[nn.Parameter], config: DPPOConfig) -> DirectedOptimizer:
    """Return the optimiser of `config.direction`.

    Raises:
        DipoleError: Another setting does not go with a direction.
    """
    for name in ("kl_weight", "entropy_weight"):
        if getattr(config, name, 0):
            raise DipoleError(f"{name} is for direction=adam: with direction={config.direction} set {name}=0")
    return DirectedOptimizer(parameters, preset(config.direction, length=config.length))


def centred(module: nn.Module, optimizer: Any) -> nn.Module:
    """Return `module`; of one that a direction trains, a copy with the weights to deploy."""
    if not isinstance(optimizer, DirectedOptimizer):
        return module
    centre = {id(p): value for p, value in zip(optimizer.parameters, optimizer.centre(), strict=True)}
    other = copy.deepcopy(module)
    with torch.no_grad():
        for own, p in zip(module.parameters(), other.parameters(), strict=True):
            p.copy_(centre.get(id(own), own))
    return other


def follow(learner: DPPO, iteration: int) -> dict[str, float]:
    """Collect, take one step, and train the critic for `epochs`."""
    config, optimizer = learner.config, learner.optimizers["actor"]
    assert isinstance(optimizer, DirectedOptimizer)
    if not learner.chains.steps:
        return {}
    rollout = learner.collector.collect(learner.decide, config.decisions)
    advantage, target = learner.advantages(rollout)
    mean, unit = advantage.mean(), unit_of(advantage)
    figures = {}
    if iteration >= config.critic_warmup:
        figures["grad_norm"] = _gradient(learner, rollout, unit * (advantage - mean))
        gradients = [p.grad for p in optimizer.parameters]
        correction = None
        if optimizer.config.transport == "hessian" and optimizer.track().t:
            correction = _correction(learner, iteration, mean, unit)
            figures["correction_norm"] = float(nn.utils.get_total_norm(correction))
        for p, gradient in zip(optimizer.parameters, gradients, strict=True):
            p.grad = gradient
        optimizer.step(correction=correction)
        track = optimizer.track()
        figures |= {"direction_norm": float(track.direction.norm()), "step_length": float(track.displacement.norm())}
    if "critic" in learner.optimizers:
        figures["value_error"] = _train_critic(learner, rollout.features, target, iteration)
    return figures


def unit_of(advantage: Tensor) -> float:
    """Return 1 / standard deviation; 0 where advantages differ by rounding only: a normalised step would follow it."""
    std = float(advantage.std())
    return 1 / std if std > 1e-5 * float(advantage.abs().max()) else 0.0


def surrogates(learner: DPPO, rollout: Rollout, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """Return Phi and log p of every trajectory `[M]`; the mean of Phi is a mean over the rollout's decisions.

    Args:
        learner: Whose network is differentiated.
        rollout: Decisions `[T, N]`.
        advantage: `[T, N]`.
    """
    over = rollout.terminated | rollout.truncated
    stretch = over.long().cumsum(0) - over.long()  # ends before this decision
    label = stretch + (len(over) + 1) * torch.arange(over.shape[1])
    count, place = torch.unique(label.flatten(), return_inverse=True)
    phi, log_prob = _terms(learner, rollout.data["chain"].flatten(0, 1), rollout.features.flatten(0, 1))
    weighted = phi * advantage.flatten() * (len(count) / advantage.numel())
    empty = phi.new_zeros(len(count))
    return empty.index_add(0, place, weighted), empty.index_add(0, place, log_prob)


def _terms(learner: DPPO, chain: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p of chains `[n]`, its steps discounted over denoising time as the advantage is, and plain."""
    steps = learner.chains.log_prob(chain, features, "sum")
    discount = learner.config.gamma_denoising ** torch.arange(learner.chains.steps - 1, -1, -1)
    return (steps * discount.to(steps.dtype)).sum(1), steps.sum(1)


def _gradient(learner: DPPO, rollout: Rollout, advantage: Tensor) -> float:
    """Put the gradient of the mean loss into the parameters, some decisions at a time, and return its norm."""
    optimizer: Any = learner.optimizers["actor"]
    optimizer.zero_grad(set_to_none=True)
    chain, features, size = rollout.data["chain"].flatten(0, 1), rollout.features.flatten(0, 1), advantage.numel()
    for chosen in torch.split(torch.arange(size), learner.config.batch_size):
        phi, _ = _terms(learner, chain[chosen], features[chosen])
        torch.autograd.backward(-(advantage.flatten()[chosen] * phi).sum() / size)
    found = [p.grad for p in optimizer.parameters if p.grad is not None]
    return float(nn.utils.get_total_norm(found))


def _correction(learner: DPPO, iteration: int, mean: Tensor, unit: float) -> list[Tensor]:
    """Return B v, of a second rollout between the last two parameters; advantages in the first one's units."""
    optimizer: Any = learner.optimizers["actor"]
    q = float(torch.rand((), generator=generator(learner.setting.seed, "between", iteration)))
    vector = optimizer.displacement()
    optimizer.move_between(q)
    rollout = learner.collector.collect(learner.decide, learner.config.decisions)
    advantage, _ = learner.advantages(rollout)
    phi, log_prob = surrogates(learner, rollout, unit * (advantage - mean))
    correction = hessian_term(phi, log_prob, optimizer.parameters, vector)
    optimizer.move_back()
    return list(correction)


def _train_critic(learner: DPPO, features: Tensor, target: Tensor, iteration: int) -> float:
    """Return the mean squared error while training."""
    config, critic = learner.config, learner.modules["critic"]
    features, target, errors = features.flatten(0, 1), target.flatten(), []
    random = generator(learner.setting.seed, "minibatches", iteration)
    for _ in range(config.epochs):
        for chosen in torch.split(torch.randperm(len(target), generator=random), config.batch_size):
            error = (critic(features[chosen]) - target[chosen]).square().mean()
            descend(0.5 * error, learner.optimizers["critic"], config.grad_clip)
            errors.append(float(error.detach()))
    return sum(errors) / len(errors)
