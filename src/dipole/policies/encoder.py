"""Observation encoder: raw observations to the conditioning a network reads.

Features of one time step are concatenated as LeRobot does: state, image features (camera by camera), environment state,
then any others; the result is one token per observed step, `{"obs": [B, To, C]}`.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from dipole import networks
from dipole.data.normalizer import Normalizer
from dipole.errors import DipoleError
from dipole.policies.config import PolicyConfig
from dipole.policies.policy import Observation


def image_to_float(image: Tensor) -> Tensor:
    """Return images as float `[..., C, H, W]` in [0, 1]; uint8 is taken as `[..., H, W, C]`, float is kept."""
    if image.dtype == torch.uint8:
        return image.movedim(-1, -3).float() / 255
    return image


class ObservationEncoder(nn.Module):
    """Encodes the features of a `PolicyConfig`.

    Attributes:
        cond_dims: Shapes of the conditioning, `{"obs": (To, C)}`.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.images = config.images
        vectors = [key for key in config.observation if key not in self.images]
        roles = {key: config.roles.get(key, key) for key in vectors}
        self.before = [key for key in vectors if roles[key] == "observation.state"]
        rest = (key for key in vectors if key not in self.before)
        self.after = sorted(rest, key=lambda key: _after_order(roles[key]))
        for key in vectors:
            if len(config.observation[key].shape) != 1:
                raise DipoleError(f"feature '{key}' is neither a vector nor an image: {config.observation[key]}")
        width = sum(config.observation[key].shape[0] for key in vectors)
        self.vision: nn.Module | None = None
        if self.images:
            if config.vision is None:
                raise DipoleError(
                    f"the observation has images ({', '.join(self.images)}) but no image encoder is configured"
                )
            shapes = {key: config.observation[key].shape for key in self.images}
            self.vision = networks.build_vision(config.vision, shapes)
            width += self.vision.out_dim
        self.cond_dims = {"obs": (config.obs_horizon, width)}

    def forward(
        self, obs: Observation, normalizer: Normalizer, generator: Generator | None = None
    ) -> dict[str, Tensor]:
        """Return `{"obs": [B, To, C]}`.

        Args:
            obs: Raw observations `[B, To, ...]`.
            normalizer: Statistics.
            generator: For random crops in training mode.
        """
        parts = [normalizer.normalize(key, obs[key]) for key in self.before]
        if self.vision is not None:
            images = {key: normalizer.normalize(key, image_to_float(obs[key])) for key in self.images}
            parts.append(self.vision(images, generator=generator))
        parts += [normalizer.normalize(key, obs[key]) for key in self.after]
        return {"obs": torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]}


def _after_order(role: str) -> tuple[bool, str]:
    return role != "observation.environment_state", role
