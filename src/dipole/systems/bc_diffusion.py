"""Diffusion Policy against behaviour cloning by regression, where the demonstrations go either way.

Source: Chi et al., "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion" (RSS 2023). On `micro/fork2d`
the demonstrations pass a disc on its left or on its right. The mean of two good answers hits the disc: a network that
regresses to the demonstrated chunk crashes, the same network trained to denoise it does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from dipole.data import Episodes, Windows
from dipole.diffusion import DDIM, DDPM, VP, add_noise, sample, to_x0
from dipole.diffusion.oracle import MixtureDenoiser
from dipole.diffusion.tensors import Random
from dipole.envs import collect
from dipole.envs.seeds import COLLECT_SEED
from dipole.evaluation.episode import Rollouts
from dipole.networks import MLPConfig, UNet1DConfig, full_config
from dipole.policies import DiffusionPolicy, SamplerConfig, make_config, make_policy
from dipole.policies.config import ObjectiveConfig, ProcessConfig
from dipole.policies.policy import Observation, State
from dipole.systems.card import Card, Claim, Margin, Measure, Source
from dipole.systems.experiment import listed, number_of_parameters, play, rate, train
from dipole.systems.run import Run
from dipole.training.config import TrainConfig

CARD = Card(
    name="bc-diffusion",
    title="Diffusion Policy: behaviour cloning as denoising",
    source=Source("Diffusion Policy: Visuomotor Policy Learning via Action Diffusion", 2023, "2303.04137"),
    axis="objective",
    summary=(
        "Learns to denoise chunks of demonstrated actions given the last observations, executes the beginning of a "
        "chunk and plans again. The reference for everything else here."
    ),
    claim="Follows multimodal demonstrations that regression averages; +46.9 % average relative success over 15 tasks.",
    spec_section="a1",
)

ENV = "micro/fork2d"
SEEDS = (0, 1, 2)
DEMONSTRATIONS = 200
EPISODES = 200
NETWORK = MLPConfig(width=192, num_blocks=3)
TRAINING: dict[str, Any] = {"steps": 4000, "batch_size": 128, "lr": 1e-3, "ema_decay": 0.995, "precision": "fp32"}


class RegressionPolicy(nn.Module):
    """Behaviour cloning by least squares with the network of a Diffusion Policy, given no sample and level 0."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.policy = policy
        self.config = policy.config
        self.obs_horizon, self.pred_horizon = policy.obs_horizon, policy.pred_horizon
        self.action_horizon, self.action_dim = policy.action_horizon, policy.action_dim

    def predict(self, obs: Observation) -> Tensor:
        """Return the normalised chunk `[B, Tp, Da]`."""
        cond = self.policy.encode(obs)
        batch = next(iter(cond.values())).shape[0]
        nothing = torch.zeros(batch, self.pred_horizon, self.action_dim)
        chunk: Tensor = self.policy.network(nothing, torch.zeros(batch), cond)
        return chunk

    def forward(self, batch: dict[str, Tensor], generator: Generator | None = None) -> Tensor:
        """Return the mean squared error of the normalised chunk."""
        return F.mse_loss(self.predict(batch), self.policy.normalizer.normalize("action", batch["action"]))

    def initial_state(self, batch: int) -> State:
        """Return an empty state."""
        return {}

    def reset(self, state: State, mask: Tensor) -> State:
        """Return an empty state."""
        return {}

    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, Ta, Da], state)`."""
        first = self.obs_horizon - 1
        chunk = self.predict(obs)[:, first : first + self.action_horizon]
        return self.policy.normalizer.denormalize("action", chunk), state


def build(episodes: Episodes, seed: int) -> DiffusionPolicy:
    """Return an untrained policy: 100 levels, squared cosine, noise prediction, ancestral sampling, as in the paper."""
    torch.manual_seed(seed)
    config = make_config(
        episodes,
        network=full_config(NETWORK),
        process=ProcessConfig("vp-cosine", num_steps=100),
        objective=ObjectiveConfig("epsilon", "uniform"),
        sampler=SamplerConfig("ddpm", 100, clip=1.0),
    )
    return make_policy(config, episodes)


def side_share(rollouts: Rollouts) -> float:
    """Return the share of successful episodes that passed the disc on its right; NaN without success."""
    sides = []
    for episode in rollouts.episodes:
        if episode.success and episode.trajectory is not None:
            position = episode.trajectory.observations["observation.state"]
            sides.append(float(position[np.abs(position[:, 1]).argmin(), 0] > 0))
    return float(np.mean(sides)) if sides else float("nan")


def train_and_play(method: str, seed: int, episodes: int = EPISODES, **training: Any) -> dict[str, float]:
    """Train one policy and return its success rate and side share (for diffusion also with DDIM in 16 steps)."""
    demonstrations = collect(ENV, DEMONSTRATIONS, seed=COLLECT_SEED + 1000 * seed)
    policy: Any = build(demonstrations, seed)
    config = policy.config
    windows = Windows(
        demonstrations,
        list(config.observation),
        "action",
        config.obs_horizon,
        config.pred_horizon,
        config.action_horizon,
    )
    if method == "regression":
        policy = RegressionPolicy(policy)
    trained = train(policy, windows, TrainConfig(seed=seed, **{**TRAINING, **training}))
    played = play(trained, ENV, episodes, keep_trajectories=True)
    result = {
        "success": float(played.column("success").mean()),
        "right": side_share(played),
        "parameters": number_of_parameters(trained),
    }
    if method == "diffusion":
        fast = trained.with_sampler(SamplerConfig("ddim", 16, clip=1.0))
        result["success_ddim16"] = float(play(fast, ENV, episodes).column("success").mean())
    return result


def small(run: Run) -> list[Claim]:
    """Train both on three sets of demonstrations and let them drive."""
    settings = {"network": full_config(NETWORK), "training": TRAINING, "episodes": EPISODES}
    parts = run.grid(("diffusion", "regression"), SEEDS, settings, train_and_play)
    diffusion, regression = ([part["success"] for part in parts[name]] for name in parts)
    fast = [part["success_ddim16"] for part in parts["diffusion"]]
    right = [part["right"] for part in parts["diffusion"]]
    with run.plot("success") as axes:
        axes.bar(["regression", "DDPM-100", "DDIM-16"], [np.mean(v) for v in (regression, diffusion, fast)])
        axes.set_ylabel("success")
        axes.set_title(f"{ENV}, {len(SEEDS)} seeds, {EPISODES} episodes each")
    works = Claim(
        "drives round the disc",
        "DP beats regression",
        rate(diffusion),
        rate(regression),
        Margin(low=0.95),
        f"success; {DEMONSTRATIONS} demonstrations, {TRAINING['steps']} steps; {listed(diffusion)}",
    )
    crashes = Claim(
        "regression averages the two sides",
        "<= 0.3 (estimate)",
        rate(regression),
        None,
        Margin(high=0.3),
        f"success of the same network trained by least squares; {listed(regression)}",
    )
    both = Claim(
        "keeps both sides",
        "0.35 to 0.65 (estimate)",
        rate(right),
        None,
        Margin(low=0.35, high=0.65),
        f"share of successes on the right, mean over seeds; {listed(right)}",
    )
    parity = Claim(
        "DDIM in 16 steps is as good as DDPM in 100",
        "within 0.02",
        rate(fast),
        rate(diffusion),
        Margin("difference", low=-0.02),
        listed(fast),
    )
    return [works, crashes, both, parity]


def ci(run: Run) -> list[Claim]:
    """Check the mathematics against closed forms, and the sizes of the published networks."""
    process = VP.cosine(100)
    return [_posterior(process), _true_noise(process), *_mixture(process), _schedule(process), _unet_size()]


def _posterior(process: VP) -> Claim:
    """The DDPM step against Gaussian conditioning on the joint covariance of two neighbouring samples."""
    worst = 0.0
    x, x0 = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[-0.3]], dtype=torch.float64)
    for t in range(1, 100):
        a, s = (float(process.alpha(k)) for k in (t, t - 1))
        va, vs = (float(process.sigma(k)) ** 2 for k in (t, t - 1))
        gain = (a / s) * vs / va
        mean, variance = s * x0 + gain * (x - a * x0), vs - gain * (a / s) * vs
        step = DDPM().step(x, x0, float(t), float(t - 1), process)
        worst = max(worst, float((step.mean - mean).abs()), abs(float(step.std) - variance**0.5))
    return Claim("a DDPM step is the exact posterior", "0", Measure(worst), None, Margin(high=1e-12), "largest error")


def _true_noise(process: VP) -> Claim:
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(64, 16, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    worst = 0.0
    for t in range(100):
        x = add_noise(x0, noise, float(t), process)
        denoised = to_x0(noise, x, float(t), process, "epsilon")
        back = DDIM().step(x, denoised, float(t), process.clean, process).mean
        worst = max(worst, float((back - x0).abs().max()))
    # float64's 1e-16 divided by alpha, which is 5e-4 at the noisiest level
    return Claim("one DDIM step with the true noise gives x0", "0", Measure(worst), None, Margin(high=1e-11))


def _mixture(process: VP) -> list[Claim]:
    """Sampling a two-mode density with its exact denoiser: many steps find the modes, three do not."""
    denoiser = MixtureDenoiser(torch.tensor([0.5, 0.5]), torch.tensor([[-0.6], [0.6]]), torch.tensor(0.05), process)
    rows = []
    cases = (("DDPM", DDPM(), 100, 1.0), ("DDIM", DDIM(), 16, 0.99), ("DDIM", DDIM(), 3, 0.55))
    for name, kernel, steps, paper in cases:
        init = torch.randn(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        levels = process.levels(steps, "leading")
        x = sample(denoiser, process, levels, kernel, init=init, generator=torch.Generator().manual_seed(1))
        share = float(((x.abs() - 0.6).abs() < 0.15).double().mean())
        # 20 000 samples: standard error at most 0.0035; the table is rounded to 0.01
        margin = Margin(low=paper - 0.02, high=paper + 0.02)
        rows.append(Claim(f"{name}-{steps}: share in a mode", f"{paper:.2f}", Measure(share), None, margin))
    return rows


def _schedule(process: VP) -> Claim:
    table = {0: 0.025, 1: 0.042, 2: 0.058, 3: 0.074, 5: 0.105, 10: 0.182, 20: 0.333, 40: 0.606, 66: 0.871, 99: 1.0}
    worst = max(abs(float(process.sigma(t)) - sigma) for t, sigma in table.items())
    return Claim("noise levels of the squared-cosine schedule", "table", Measure(worst), None, Margin(high=5e-4))


def _unet_size() -> Claim:
    network = UNet1DConfig().build(2, 16, {"obs": (2, 20)})
    millions = number_of_parameters(network) / 1e6
    margin = Margin(low=65.75, high=65.85)
    return Claim("size of the PushT state U-Net", "65.8 M", Measure(millions, unit="M"), None, margin)


TIERS = {"ci": ci, "small": small}
