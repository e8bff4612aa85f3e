"""Exact checks of DiffusionDrive: what must hold for any weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dipole.data.features import Feature
from dipole.data.normalizer import Normalizer
from dipole.evaluation.driving import diversity
from dipole.networks.cascade import CascadeConfig, sample_view
from dipole.policies.diffusion_drive import DiffusionDriveConfig, DiffusionDrivePolicy
from dipole.systems.card import Claim, Margin, Measure

_TINY = CascadeConfig(width=16, num_heads=2, feedforward=32, point_embed=8, agent_queries=3, bev_hidden=(8, 8))
# The published normalisation of waypoints: x -> 2 (x + 1.2) / 56.9 - 1, y -> 2 (y + 20) / 46 - 1.
_PUBLISHED = (torch.tensor([2 / 56.9, 2 / 46]), torch.tensor([2.4 / 56.9 - 1, 40 / 46 - 1]))


def tiny_policy(seed: int = 0, **options: object) -> DiffusionDrivePolicy:
    """Return a small planner with random weights and anchors, and the published normalisation."""
    config = DiffusionDriveConfig(
        observation={
            "observation.state": Feature("float32", (3,)),
            "observation.scene": Feature("float32", (16, 16, 2)),
        },
        action=Feature("float32", (2,)),
        view_low=(-4.0, -12.0),
        view_cell=(4.0, 1.5),
        network=_TINY,
        **{"num_anchors": 5, **options},  # type: ignore[arg-type]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        affine = {"observation.state": (torch.ones(3), torch.zeros(3)), "points": _PUBLISHED}
        policy = DiffusionDrivePolicy(config, Normalizer(affine)).eval()
        way = torch.rand(config.num_anchors, config.pred_horizon, 2) * torch.tensor([5.0, 1.0])
        policy.anchors.copy_((way - torch.tensor([0.0, 0.5])).cumsum(1))
    return policy


def tiny_scene(batch: int = 3, seed: int = 1) -> dict[str, Tensor]:
    """Return random observations for `tiny_policy`."""
    g = torch.Generator().manual_seed(seed)
    view = (torch.rand(batch, 1, 16, 16, 2, generator=g) > 0.7).float()
    return {"observation.state": torch.randn(batch, 1, 3, generator=g), "observation.scene": view}


@torch.no_grad()
def anchors_come_back() -> float:
    """Return how far the plans are from the anchors without noise and with heads that move nothing, in metres."""
    policy, obs = tiny_policy(), tiny_scene()
    stages: Any = policy.network.stages
    for stage in stages:
        stage.move[-1].weight.zero_()
        stage.move[-1].bias.zero_()
    clean = policy.normalizer.normalize("points", policy.anchors)
    # No noise: at level 0 (sigma 0.01) paths shrink by alpha, so the clean anchors are decoded directly.
    found = policy.decode(clean.expand(3, -1, -1, -1), torch.zeros(3), policy.encode(obs))[-1].poses[..., :2]
    return float((found - policy.anchors).abs().max())


@torch.no_grad()
def permutation_error() -> float:
    """Return by how much the candidates of permuted anchors differ from the permuted candidates."""
    policy, obs = tiny_policy(), tiny_scene()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(3, 5, 8, 2, generator=torch.Generator().manual_seed(3))
    before = policy.propose(obs, noise)
    policy.anchors.copy_(policy.anchors[order])
    after = policy.propose(obs, noise[:, order])
    return max(float((a - b[:, order]).abs().max()) for a, b in zip(after, before, strict=True))


@torch.no_grad()
def last_step_matters() -> float:
    """Return how much the answer changes when the last DDIM step goes elsewhere: its result is never decoded."""
    policy, obs = tiny_policy(), tiny_scene()
    noise = torch.randn(3, 5, 8, 2, generator=torch.Generator().manual_seed(3))
    x = policy._noised(torch.full((3,), 8), 3, None, noise)
    scene = policy.encode(obs)
    first = policy.decode(x, torch.full((3,), 10), scene)[-1].poses[..., :2]
    x0 = policy.normalizer.normalize("points", first)
    a, b = (policy.process.alpha(10), policy.process.sigma(10))
    eps = (x.clamp(-1, 1) - a * x0) / b
    x = (policy.process.alpha(9) * x0 + policy.process.sigma(9) * eps).float()
    last = policy.decode(x, torch.zeros(3), scene)[-1].poses
    return float((last - policy.propose(obs, noise).poses).abs().max())


def view_error() -> float:
    """Return by how much sampling at the cells' centres misses the cells."""
    features = torch.randn(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    low, size = torch.tensor([-4.0, -12.0]), torch.tensor([10.0, 10.5])  # cells of 2 m x 1.5 m
    x, y = torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij")
    centres = low + torch.stack([(x + 0.5) * 2.0, (y + 0.5) * 1.5], dim=-1)
    found = sample_view(features, centres[None], low, size)
    return float((found - features.permute(0, 2, 3, 1)).abs().max())


def exact_checks() -> list[Claim]:
    """Return the claims of tier `ci`."""
    policy = tiny_policy()
    metres = torch.randn(100, 8, 2, generator=torch.Generator().manual_seed(0)) * 20
    back = policy.normalizer.denormalize("points", policy.normalizer.normalize("points", metres))
    path = torch.stack([torch.arange(1.0, 9), torch.zeros(8)], dim=-1)
    same, apart = path.expand(4, -1, -1).numpy(), torch.stack([path + torch.tensor([0.0, 10.0 * k]) for k in range(4)])
    disjoint, small = diversity(apart.numpy()), Margin(high=1e-4)
    table = {8: (0.90, 0.73), 10: (1.01, 0.81), 49: (2.68, 2.17)}
    stds = [
        Claim(
            f"noise at level {level} along {axis} in metres",
            f"{wanted}",
            Measure(float(policy.noise_in_metres(level)[k]), unit="m"),
            None,
            Margin(low=wanted - 0.015, high=wanted + 0.015),
            "the table is rounded to 0.01, and its normalised values to 0.001",
        )
        for level, row in table.items()
        for k, (axis, wanted) in enumerate(zip("xy", row, strict=True))
    ]
    return [
        Claim("no noise, heads at zero: the anchors come back", "0", Measure(anchors_come_back()), None, small),
        Claim("permuted anchors give permuted plans", "0", Measure(permutation_error()), None, small),
        Claim("the last DDIM step is thrown away", "0", Measure(last_step_matters()), None, small),
        Claim("normalisation round trip", "0", Measure(float((back - metres).abs().max())), None, small),
        Claim("sampling the view at a cell's centre gives the cell", "0", Measure(view_error()), None, small),
        Claim("diversity of equal paths", "0", Measure(diversity(same)), None, Margin(low=0, high=1e-12)),
        Claim(
            "diversity of 4 disjoint paths",
            "0.75",
            Measure(disjoint),
            None,
            Margin(low=0.74, high=0.76),
        ),
        *stds,
    ]
