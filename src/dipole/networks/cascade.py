"""Cascade decoder over candidate paths: the network of DiffusionDrive.

Source: Liao et al., "DiffusionDrive: Truncated Diffusion Model for End-to-End Autonomous Driving" (CVPR 2025). K noisy
paths of T points are queries. A stage looks at the bird's-eye view where the points are now, at other agents and at the
ego vehicle, and returns every path moved (x0-prediction) with a score. The next stage looks where the path is then.
Stages have their own weights; denoising steps share them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipole.networks.embedding import StepEncoder

# Wavelengths of the points' embedding, in metres.
_LONGEST, _SHORTEST = 200.0, 2.0
# Agents are looked for in the view at a quarter of its resolution.
_COARSE = 4


@dataclass(frozen=True)
class CascadeConfig:
    """The decoder's shape; defaults are the paper's.

    Attributes:
        width: Of the queries and of the bird's-eye features.
        stages: Of the cascade.
        num_heads: Of the attentions.
        feedforward: Hidden width of the feed-forward layers.
        point_embed: Width of the embedding of one point; a multiple of 4.
        agent_queries: Learned queries that look for other agents in the bird's-eye view.
        bev_hidden: Channels of the view encoder's layers before the last.
        bev_sampling: Look at the view along the path (False: ablation).
        agent_attention: Look at the agents (False: ablation).
        features: What the next stage's queries are: the `same` as the first's, only the points cascade (the published
            code), or `chained`, the output of the stage before (the paper's text).
    """

    width: int = 256
    stages: int = 2
    num_heads: int = 8
    feedforward: int = 1024
    point_embed: int = 64
    agent_queries: int = 30
    bev_hidden: tuple[int, ...] = (64, 128)
    bev_sampling: bool = True
    agent_attention: bool = True
    features: Literal["same", "chained"] = "same"


class Scene(NamedTuple):
    """What the paths are decoded in: features of the view `[B, C, X, Y]`, agents `[B, M, C]` and ego `[B, 1, C]`."""

    view: Tensor
    agents: Tensor
    ego: Tensor


class Candidates(NamedTuple):
    """What a stage returns: poses `[B, K, T, 3]` (metres, radians) and the logit of every path `[B, K]`."""

    poses: Tensor
    logits: Tensor


def sample_view(features: Tensor, points: Tensor, low: Tensor, size: Tensor) -> Tensor:
    """Return the features at `points`, bilinear; zero outside.

    Args:
        features: `[B, C, X, Y]`, cells along x and y.
        points: `[B, K, T, 2]` in metres.
        low: `[2]` the view's corner of smallest x and y.
        size: `[2]` its extent in metres.

    Returns:
        `[B, K, T, C]`.
    """
    place = (points - low) / size * 2 - 1
    # grid_sample wants (column, row), that is (y, x).
    found = F.grid_sample(features, place.flip(-1), align_corners=False, padding_mode="zeros")
    return found.permute(0, 2, 3, 1)


class ViewEncoder(nn.Sequential):
    """Convolutions over a bird's-eye view `[B, C, X, Y]`, the first with stride 2: `[B, width, X/2, Y/2]`."""

    def __init__(self, channels: int, config: CascadeConfig) -> None:
        widths = (channels, *config.bev_hidden, config.width)
        layers: list[nn.Module] = []
        for k, (narrow, wide) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(narrow, wide, 3, 2 if k == 0 else 1, padding=1), nn.ReLU()]
        super().__init__(*layers)


class SceneEncoder(nn.Module):
    """Bird's-eye view `[B, X, Y, C]` and state `[B, S]` to a `Scene`.

    Agents are found by learned queries that attend to the view; the published system trains its own with a detection
    loss, for which most data have no labels.
    """

    def __init__(self, config: CascadeConfig, view_shape: tuple[int, ...], state_dim: int) -> None:
        super().__init__()
        rows, columns, channels = view_shape
        self.encoder = ViewEncoder(channels, config)
        places = -(-rows // _COARSE) * -(-columns // _COARSE)
        self.place = nn.Parameter(0.1 * torch.randn(places, config.width))
        self.queries = nn.Parameter(0.1 * torch.randn(config.agent_queries, config.width))
        self.attention = nn.MultiheadAttention(config.width, config.num_heads, batch_first=True)
        self.norm = nn.LayerNorm(config.width)
        self.ego = nn.Sequential(nn.Linear(state_dim, config.width), nn.ReLU(), nn.Linear(config.width, config.width))

    def forward(self, view: Tensor, state: Tensor) -> Scene:
        """Encode."""
        features = self.encoder(view.permute(0, 3, 1, 2))
        coarse = F.avg_pool2d(features, _COARSE // 2, ceil_mode=True)
        tokens = coarse.flatten(2).transpose(1, 2) + self.place
        queries = self.queries.expand(len(view), -1, -1)
        agents = self.norm(queries + self.attention(queries, tokens, tokens, need_weights=False)[0])
        return Scene(features, agents, self.ego(state).unsqueeze(1))


class PointEmbedding(nn.Module):
    """Sinusoids of points in metres: `[..., 2]` -> `[..., dim]`."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        lengths = torch.logspace(math.log10(_LONGEST), math.log10(_SHORTEST), dim // 4)
        self.register_buffer("frequencies", 2 * math.pi / lengths, persistent=False)

    def forward(self, points: Tensor) -> Tensor:
        """Embed."""
        angle = (points.unsqueeze(-1) * self.frequencies).flatten(-2)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class CascadeStage(nn.Module):
    """One stage: look at view, agents and ego; modulate by the level; score the path and move its points."""

    def __init__(self, config: CascadeConfig, num_points: int) -> None:
        super().__init__()
        width = config.width
        self.bev_sampling, self.agent_attention = config.bev_sampling, config.agent_attention
        self.point_weights = nn.Linear(width, num_points)
        self.view_out = nn.Linear(width, width)
        self.agents = nn.MultiheadAttention(width, config.num_heads, batch_first=True)
        self.ego = nn.MultiheadAttention(width, config.num_heads, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.feedforward = nn.Sequential(
            nn.Linear(width, config.feedforward), nn.ReLU(), nn.Linear(config.feedforward, width)
        )
        self.film = nn.Sequential(nn.Mish(), nn.Linear(width, 2 * width))
        self.score = _head(width, 1)
        self.move = _head(width, 3 * num_points)

    def forward(
        self, x: Tensor, points: Tensor, seen: Tensor, scene: Scene, level: Tensor
    ) -> tuple[Tensor, Candidates]:
        """Return the new queries and the candidates.

        Args:
            x: `[B, K, C]` queries.
            points: `[B, K, T, 2]` where the paths are, in metres.
            seen: `[B, K, T, C]` the view at the points.
            scene: The scene.
            level: `[B, C]` encoding of the noise level.
        """
        if self.bev_sampling:
            weights = self.point_weights(x).softmax(-1).unsqueeze(-1)
            x = x + self.view_out((weights * seen).sum(2))
        if self.agent_attention:
            x = self.norms[0](x + self.agents(x, scene.agents, scene.agents, need_weights=False)[0])
        x = self.norms[1](x + self.ego(x, scene.ego, scene.ego, need_weights=False)[0])
        x = self.norms[2](self.feedforward(x))  # no skip, as published
        scale, shift = self.film(level).unsqueeze(1).chunk(2, dim=-1)
        x = x * (1 + scale) + shift
        moved = self.move(x).view(*points.shape[:-1], 3)
        poses = torch.cat([points + moved[..., :2], math.pi * moved[..., 2:].tanh()], dim=-1)
        return x, Candidates(poses, self.score(x).squeeze(-1))


def _head(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


class CascadeDecoder(nn.Module):
    """Noisy paths to candidates, stage by stage.

    Args:
        config: Its shape.
        num_points: T.
        view_low: The view's corner of smallest x and y, in metres.
        view_size: Its extent along x and y, in metres.
    """

    low: Tensor
    size: Tensor

    def __init__(
        self, config: CascadeConfig, num_points: int, view_low: tuple[float, float], view_size: tuple[float, float]
    ) -> None:
        super().__init__()
        self.features = config.features
        self.register_buffer("low", torch.tensor(view_low), persistent=False)
        self.register_buffer("size", torch.tensor(view_size), persistent=False)
        self.embed = PointEmbedding(config.point_embed)
        self.query = nn.Sequential(
            nn.Linear(num_points * config.point_embed, config.width), nn.ReLU(), nn.Linear(config.width, config.width)
        )
        self.level = StepEncoder(config.width, 4 * config.width, config.width)
        self.stages = nn.ModuleList(CascadeStage(config, num_points) for _ in range(config.stages))

    def forward(self, points: Tensor, time: Tensor, scene: Scene) -> list[Candidates]:
        """Return the candidates of every stage, the last one being the answer.

        Args:
            points: `[B, K, T, 2]` noisy paths, in metres.
            time: `[B]` noise levels, 0..1000.
            scene: The scene.
        """
        level = self.level(time)
        x = self.query(self.embed(points).flatten(2))
        found: list[Candidates] = []
        for stage in self.stages:
            seen = sample_view(scene.view, points, self.low, self.size)
            out, candidates = stage(x, points, seen, scene, level)
            found.append(candidates)
            points = candidates.poses[..., :2].detach()
            x = out if self.features == "chained" else x
        return found
