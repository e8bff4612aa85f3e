"""Reactive Diffusion Policy: a slow diffusion policy plans latents, a fast decoder turns them into actions by touch.

Source: Xue et al., "Reactive Diffusion Policy: Slow-Fast Visual-Tactile Policy Learning for Contact-Rich Manipulation"
(RSS 2025). Training has two stages: the codec learns chunks with the force felt along them; then, with the codec fixed,
the slow policy learns to denoise its latents. `begin_latents` goes from the first to the second.

At run time a new latent is planned every `period` ticks and takes over `latency` ticks later; the decoder runs at every
tick. The published code runs it again from the start of the plan each time; here its state is carried, which gives the
same actions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from dipole import networks
from dipole.data.fast_windows import FAST_PREFIX, FastWindows
from dipole.data.normalizer import Normalizer
from dipole.diffusion import NetworkDenoiser, sample
from dipole.diffusion.tensors import Random
from dipole.networks.action_codec import ActionCodec
from dipole.policies.common import Configured, starting_point
from dipole.policies.config import SamplerConfig
from dipole.policies.policy import Observation, State
from dipole.policies.rdp_config import RdpConfig

__all__ = ["RdpConfig", "RdpPolicy", "make_rdp"]

_NO_PLAN = -1


def make_rdp(windows: FastWindows, *, seed: int = 0, **options: Any) -> RdpPolicy:
    """Return an untrained policy for some windows.

    Args:
        windows: What it will be trained on.
        seed: Of the weights.
        **options: Other fields of `RdpConfig`.
    """
    inner, episodes = windows.windows, windows.episodes
    options["network"] = networks.full_config(options.get("network", "mlp"))
    config = RdpConfig(
        observation={key: episodes.feature(key) for key in inner.obs_keys},
        fast=windows.fast,
        action=episodes.feature("action"),
        obs_horizon=inner.obs_horizon,
        pred_horizon=inner.pred_horizon,
        **{"fps": episodes.fps, "period": inner.action_horizon, **options},
    )
    stats = episodes.stats()
    if config.base is not None:
        batch = {key: torch.from_numpy(value) for key, value in windows.batch(np.arange(len(windows))).items()}
        chunks = (batch["action"] - base_pose(config, batch).unsqueeze(1)).flatten(0, 1).double().numpy()
        bounds = {"min": chunks.min(0), "max": chunks.max(0), "mean": chunks.mean(0), "std": chunks.std(0)}
        stats["action"] = {**stats["action"], **bounds}
    modes = {**config.modes(), "action": config.normalization["action"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RdpPolicy(config, Normalizer.fit(stats, modes))


def base_pose(config: RdpConfig, obs: Mapping[str, Tensor]) -> Tensor:
    """Return what actions are relative to, `[B, Da]`: the newest pose of observations `[B, To, ...]`, or zero."""
    if config.base is None:
        first = obs[config.fast[0]]
        return first.new_zeros(len(first), config.action.shape[0])
    return obs[config.base][:, -1, list(config.base_dims)]


class RdpPolicy(Configured, nn.Module):
    """The two-rate policy. One action per call.

    Attributes:
        config: Its configuration.
        normalizer: Statistics of observations and (relative) actions.
        codec: Encoder of chunks and reactive decoder.
        network: The slow policy's denoiser of latents.
        sampler: How it denoises at run time.
        stage: What `loss` trains: the `codec`, or after `begin_latents` the slow policy (`latent`).
    """

    config: RdpConfig
    config_class = RdpConfig
    type_name = "rdp"
    latent_low: Tensor
    latent_high: Tensor

    def __init__(self, config: RdpConfig, normalizer: Normalizer) -> None:
        super().__init__()
        for key in [*config.observation, "action"]:
            normalizer.affine(key)
        self.config, self.normalizer, self.sampler = config, normalizer, config.sampler
        self.codec = ActionCodec(config.codec, self.action_dim, config.pred_horizon, config.fast_dim)
        width = sum(feature.shape[0] for feature in config.observation.values())
        tokens, channels = self.codec.latent_shape
        self.network = networks.build(config.network, channels, tokens, {"obs": (config.obs_horizon, width)})
        self.process = config.process.build()
        self.objective = config.objective.build(config.process)
        self.stage = "codec"
        self.register_buffer("latent_low", torch.full((tokens, channels), -1.0))
        self.register_buffer("latent_high", torch.full((tokens, channels), 1.0))

    @property
    def action_horizon(self) -> int:
        """Return 1: the decoder looks at the fast sensors before every action."""
        return 1

    def with_sampler(self, sampler: SamplerConfig) -> RdpPolicy:
        """Return a policy with the same weights (shared, not copied) and another sampler of latents."""
        other = copy.copy(self)
        other.sampler = sampler
        return other

    def chunks(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the normalised (relative) chunks `[B, T, Da]` of a batch of `FastWindows`."""
        return self.normalizer.normalize("action", batch["action"] - base_pose(self.config, batch).unsqueeze(1))

    def fast(self, values: Mapping[str, Tensor], prefix: str = "") -> Tensor:
        """Return the normalised fast features `[B, n, F]`."""
        return torch.cat([self.normalizer.normalize(key, values[prefix + key]) for key in self.config.fast], dim=-1)

    def encode(self, obs: Observation) -> dict[str, Tensor]:
        """Return the slow policy's conditioning of raw observations `[B, To, ...]`."""
        parts = [self.normalizer.normalize(key, obs[key]) for key in self.config.observation]
        return {"obs": torch.cat(parts, dim=-1)}

    def loss(self, batch: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        """Return the loss of the present stage for a batch of `FastWindows`."""
        chunks = self.chunks(batch)
        if self.stage == "codec":
            return self.codec.loss(chunks, self.fast(batch, FAST_PREFIX), generator)
        with torch.no_grad():
            latent = self._targets(chunks, generator)
        loss: Tensor = self.objective(self.network, latent, self.encode(batch), generator=generator)
        return loss

    # DistributedDataParallel synchronises gradients of what runs through `forward`.
    def forward(self, batch: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        """Return `loss(batch, generator)`."""
        return self.loss(batch, generator)

    def _latent(self, chunks: Tensor, generator: Random) -> Tensor:
        posterior = self.codec.encode(chunks)
        return posterior.sample(generator) if self.config.latent_sample == "sample" else posterior.mean

    def _targets(self, chunks: Tensor, generator: Random) -> Tensor:
        """Return latents in [-1, 1] `[B, L, C]`."""
        latent = self._latent(chunks, generator)
        return 2 * (latent - self.latent_low) / (self.latent_high - self.latent_low) - 1

    @torch.no_grad()
    def begin_latents(self, windows: FastWindows, seed: int = 0) -> RdpPolicy:
        """Fix the codec, measure the range of the demonstrations' latents (one draw each), train the slow policy next.

        Returns:
            The policy itself.
        """
        generator = torch.Generator().manual_seed(seed)
        found = []
        for start in range(0, len(windows), 4096):
            indices = np.arange(start, min(start + 4096, len(windows)))
            batch = {key: torch.from_numpy(value) for key, value in windows.batch(indices).items()}
            found.append(self._latent(self.chunks(batch), generator))
        latents = torch.cat(found)
        self.latent_low.copy_(latents.amin(0))
        self.latent_high.copy_(latents.amax(0).maximum(latents.amin(0) + 1e-6))
        self.codec.requires_grad_(False)
        self.network.requires_grad_(True)
        self.stage = "latent"
        return self

    def plan(self, obs: Observation, noise: Tensor | None = None, generator: Random = None) -> Tensor:
        """Return the slow policy's latents `[B, L, C]` for raw observations; `noise` is standard normal, as shaped."""
        cond = self.encode(obs)
        levels = self.sampler.levels(self.process)
        shape = (len(cond["obs"]), *self.codec.latent_shape)
        init = starting_point(self.process, levels, shape, noise, generator, cond["obs"])
        objective = self.config.objective
        denoiser = NetworkDenoiser(self.network, self.process, objective.prediction_type, objective.sigma_data)
        x0: Tensor = sample(
            denoiser, self.process, levels, self.sampler.build(), cond=cond, init=init, generator=generator
        )
        return self.latent_low + (x0 + 1) / 2 * (self.latent_high - self.latent_low)

    def initial_state(self, batch: int) -> State:
        """Return the state at the start of episodes.

        `tick` `[B]`; the plan in use, `latent` `[B, L, C]`, `base` `[B, Da]`, the decoder's `hidden` `[B, H]`; the same
        of the plan that waits for its latency to pass (`next_*`), and its age in ticks `next_age` `[B]`, -1 for none.
        """
        like = self.latent_low
        plan = {
            "latent": like.new_zeros(batch, *self.codec.latent_shape),
            "base": like.new_zeros(batch, self.action_dim),
            "hidden": self.codec.initial_hidden(batch).detach(),
        }
        count = torch.zeros(batch, dtype=torch.long, device=like.device)
        waiting = {f"next_{key}": value.clone() for key, value in plan.items()}
        return {"tick": count, **plan, **waiting, "next_age": count + _NO_PLAN}

    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, 1, Da] in physical units, state')`; see `Policy.act`.

        `noise` is `[B, L, C]`, used in rows that plan at this tick; only their generators are advanced.
        """
        self.check_observation(obs)
        state, tick = dict(state), state["tick"]
        due = (tick == 0) | (tick % self.config.period == self.config.offset)
        if due.any():
            state = self._replan(obs, state, due, noise, generator)
        now = self.fast({key: obs[key][:, -1:] for key in self.config.fast})
        # Both the plan in use and the one that waits feel every tick.
        action, state["hidden"] = self.codec.decode(state["latent"], now, state["hidden"])
        coming, state["next_hidden"] = self.codec.decode(state["next_latent"], now, state["next_hidden"])
        takes_over = (state["next_age"] == self.config.latency) | ((tick == 0) & (state["next_age"] >= 0))
        for key in ("latent", "base", "hidden"):
            state[key] = _where(takes_over, state[f"next_{key}"], state[key])
        action = _where(takes_over, coming, action)
        waits = (state["next_age"] >= 0) & ~takes_over
        state["next_age"] = torch.where(waits, state["next_age"] + 1, _NO_PLAN)
        state["tick"] = tick + 1
        return self.normalizer.denormalize("action", action) + state["base"].unsqueeze(1), state

    def _replan(self, obs: Observation, state: State, due: Tensor, noise: Tensor | None, random: Random) -> State:
        """Return the state with new waiting plans in the rows that are due; their decoders have felt all ticks so far.

        All rows are computed, so that a row is rounded the same whichever others are due.
        """
        latent = self.plan(obs, noise, for_rows(random, due))
        hidden = self.codec.initial_hidden(len(due))
        if self.obs_horizon > 1:
            _, hidden = self.codec.decode(latent, self.fast(obs)[:, :-1], hidden)
        base = base_pose(self.config, obs).to(latent)
        fresh = {"latent": latent, "base": base, "hidden": hidden, "age": torch.zeros_like(state["tick"])}
        return {**state, **{f"next_{key}": _where(due, new, state[f"next_{key}"]) for key, new in fresh.items()}}


def for_rows(random: Random, rows: Tensor) -> Random:
    """Return generators of which only those of `rows` (`[B]`, bool) are the given ones; the others are thrown away."""
    if not isinstance(random, Sequence):
        return random
    return [g if row else Generator(g.device).manual_seed(0) for g, row in zip(random, rows.tolist(), strict=True)]


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask.reshape(-1, *[1] * (new.dim() - 1)), new, old)
