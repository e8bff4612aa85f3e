"""The rival of DiffusionDrive: a U-Net that denoises plans from N(0, I), with the same view encoder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from dipole.diffusion import NetworkDenoiser, sample
from dipole.diffusion.tensors import Random
from dipole.networks.cascade import Scene, SceneEncoder
from dipole.networks.unet1d import UNet1DConfig
from dipole.policies.config import ObjectiveConfig, ProcessConfig, SamplerConfig
from dipole.policies.diffusion_drive import POINTS, DiffusionDrivePolicy
from dipole.policies.policy import Observation

UNET = UNet1DConfig(down_dims=(32, 64, 128), kernel_size=3, step_embed_dim=64)
_POOLED = 4  # the view enters as this many cells along x and y
_JOINED = 256  # width of the whole conditioning


class UNetPlanner(nn.Module):
    """Noise prediction in 100 levels (squared cosine) of normalised waypoints, conditioned on the encoded scene.

    Args:
        like: The planner it is compared with: observations, encoder and normalisation are as there.
        seed: Of the weights.
    """

    def __init__(self, like: DiffusionDrivePolicy, seed: int) -> None:
        super().__init__()
        self.config, self.normalizer = like.config, like.normalizer
        shape = self.config.observation[self.config.view].shape
        state_dim = sum(self.config.observation[key].shape[0] for key in self.config.state_keys)
        width, agents = self.config.network.width, self.config.network.agent_queries
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = SceneEncoder(self.config.network, shape, state_dim)
            self.join = nn.Sequential(nn.Linear((agents + 1 + _POOLED**2) * width, _JOINED), nn.ReLU())
            self.network = UNET.build(2, self.config.pred_horizon, {"obs": (1, _JOINED)})
        process, objective = ProcessConfig("vp-cosine"), ObjectiveConfig("epsilon", "uniform")
        self.process, self.objective = process.build(), objective.build(process)

    def _cond(self, obs: Observation) -> dict[str, Tensor]:
        state = torch.cat([self.normalizer.normalize(key, obs[key][:, -1]) for key in self.config.state_keys], dim=-1)
        scene: Scene = self.encoder(obs[self.config.view][:, -1], state)
        view = F.adaptive_avg_pool2d(scene.view, _POOLED).flatten(2).transpose(1, 2)
        tokens = torch.cat([scene.agents, scene.ego, view], dim=1)
        return {"obs": self.join(tokens.flatten(1)).unsqueeze(1)}

    def loss(self, batch: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        """Return the denoising loss of a batch of windows."""
        x0 = self.normalizer.normalize(POINTS, batch["action"])
        loss: Tensor = self.objective(self.network, x0, self._cond(batch), generator=generator)
        return loss

    def forward(self, batch: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        """Return `loss(batch, generator)`."""
        return self.loss(batch, generator)

    @torch.no_grad()
    def propose(self, obs: Observation, count: int, sampler: SamplerConfig, generator: Random = None) -> Tensor:
        """Return `count` sampled plans per scene, `[B, count, T, 2]` in metres."""
        cond = self._cond(obs)["obs"]
        batch, points = len(cond), self.config.pred_horizon
        x0 = sample(
            NetworkDenoiser(self.network, self.process, "epsilon"),
            self.process,
            sampler.levels(self.process),
            sampler.build(),
            cond={"obs": cond.repeat_interleave(count, dim=0)},
            shape=(batch * count, points, 2),
            generator=generator,
            like=cond,
        )
        return self.normalizer.denormalize(POINTS, x0).view(batch, count, points, 2)
