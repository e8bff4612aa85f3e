"""AdamW and the learning rate: linear warm-up, then a cosine to the end of the run."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from dipole.training.config import TrainConfig


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Return the learning rate of update `step` of `total`, a function of the step alone: there is no state to resume.

    The first update already learns (lr / warm-up), the last one is just above `min_lr`.
    """
    warmup = config.warmup if config.warmup >= 1 else config.warmup * total
    warmup = min(int(warmup), total - 1)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (total - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(module: nn.Module, config: TrainConfig) -> AdamW:
    """Return AdamW over the trainable parameters; weight decay only where there are two axes or more.

    The fused implementation is five times faster on CPU too.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in trainable)
    return AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas, fused=fused)


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Set the learning rate of every group, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def clip(parameters: list[nn.Parameter], limit: float | None) -> torch.Tensor:
    """Scale the gradients to a norm of at most `limit` and return the norm before (a scalar tensor, no host sync)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    # Short ones are left alone (torch multiplies them by 1, as it has to on a GPU, which is not waited for).
    if limit is not None and (norm.device.type != "cpu" or not norm + 1e-6 <= limit):
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
