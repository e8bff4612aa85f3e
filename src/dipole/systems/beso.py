"""BESO: three denoising steps are enough, where the levels suit the data; guidance turns play into obedience.

Source: Reuss et al., "Goal-Conditioned Imitation Learning using Score-based Diffusion Policies" (RSS 2023). Tier `ci`
samples a two-mode density with its exact denoiser, so that what differs between samplers is the sampling alone. Tier
`small` trains on 300 episodes of play in `micro/play4` and asks for two of four pads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from dipole.data import Episodes
from dipole.data.hindsight import HindsightWindows
from dipole.diffusion import DDIM, DDPM, EDM, VP, Kernel, Process, sample
from dipole.diffusion.oracle import MixtureDenoiser
from dipole.envs import collect
from dipole.envs.seeds import COLLECT_SEED
from dipole.evaluation.episode import Rollouts
from dipole.networks.gpt import GPTConfig
from dipole.policies import SamplerConfig
from dipole.policies.beso import BesoPolicy, make_beso
from dipole.serialization import to_dict
from dipole.systems.beso_checks import identities
from dipole.systems.card import Card, Claim, Margin, Measure, Source
from dipole.systems.experiment import listed, over_seeds, play, rate, train
from dipole.systems.run import Run
from dipole.training.config import TrainConfig

CARD = Card(
    name="beso",
    title="BESO: goal-conditioned play with a score model in three steps",
    source=Source("Goal-Conditioned Imitation Learning using Score-based Diffusion Policies", 2023, "2304.02532"),
    axis="objective",
    summary=(
        "Preconditioned denoising with noise up to 1 instead of 80, over a short history of observations and actions, "
        "with goals from the future of play data. Guidance scale 0 gives a policy without goals."
    ),
    claim="Three denoising steps instead of thirty; one training run gives a goal policy and a goal-free one.",
    spec_section="a2",
)

ENV = "micro/play4"
STATE, GOAL = "observation.state", "observation.goal"
SEEDS = (0, 1, 2)
DEMONSTRATIONS = 300
# Executed actions are noisy, recorded ones clean. Without noise the way a leg will take can be read off the position
# soon after its start, and imitation learns to do that instead of looking at its goal.
EXECUTION_NOISE = 0.08
EPISODES = 100
SCALES = (0.0, 1.0, 2.0, 3.0)
NFES = (1, 3, 30)
NETWORK = GPTConfig(embed_dim=64, num_layers=4, num_heads=2, attention_dropout=0.0, residual_dropout=0.0)
TRAINING: dict[str, Any] = {"steps": 2200, "batch_size": 64, "lr": 1e-3, "ema_decay": 0.995, "precision": "fp32"}


@lru_cache(maxsize=1)
def demonstrations(seed: int, count: int) -> Episodes:
    """Return play: all four pads in random order."""
    return collect(ENV, count, EXECUTION_NOISE, COLLECT_SEED + 1000 * seed)


def build(episodes: Episodes, seed: int, objective: str) -> BesoPolicy:
    """Return an untrained policy."""
    options = {"goal_horizon": 1, "network": NETWORK, "sigma_min": 0.05, "objective": objective}
    return make_beso(episodes, observation=[STATE], goal=GOAL, seed=seed, **options)


def scores(rollouts: Rollouts) -> dict[str, float]:
    """Return the mean number of asked pads visited (`result`) and of any pads visited (`reward`), as shares of two."""
    ends = [episode.trajectory.observations[STATE][-1] for episode in rollouts.episodes if episode.trajectory]
    visits = [end[2:].sum() for end in ends]
    return {"result": float(rollouts.column("return_").mean()), "reward": float(np.mean(visits)) / 2}


def train_and_play(objective: str, seed: int) -> dict[str, Any]:
    """Train one policy and play with every sampler asked of it; scores by name."""
    episodes = demonstrations(seed, DEMONSTRATIONS)
    policy = build(episodes, seed, objective)
    windows = HindsightWindows(episodes, [STATE], policy.config.window, policy.config.goal_horizon, seed=seed)
    trained = train(policy, windows, TrainConfig(seed=seed, **TRAINING))
    runs: dict[str, tuple[SamplerConfig, float]] = {}
    if objective == "edm":
        runs |= {f"nfe{n}": (SamplerConfig("ddim", n, "exponential"), 1.0) for n in NFES}
        runs |= {f"scale{scale:g}": (SamplerConfig("ddim", 3, "exponential"), scale) for scale in SCALES}
    else:
        runs |= {f"leading{n}": (SamplerConfig("ddim", n, "leading", clip=1.0), 1.0) for n in (3, 10)}
        runs |= {"trailing3": (SamplerConfig("ddim", 3, "trailing", clip=1.0), 1.0)}
    results: dict[str, Any] = {
        name: scores(play(trained.with_sampler(sampler, scale), ENV, EPISODES, keep_trajectories=True))
        for name, (sampler, scale) in runs.items()
    }
    batch = windows.batch(np.random.default_rng(seed).choice(len(windows), 1000))
    few = runs["nfe3" if objective == "edm" else "trailing3"][0]
    return results | {"error": sampling_error(trained, batch, few)}


@torch.no_grad()
def sampling_error(policy: BesoPolicy, batch: Mapping[str, np.ndarray], sampler: SamplerConfig) -> float:
    """Return how far a sampler's actions are from those of 100 steps, from the same noise (RMS, normalised)."""
    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    cond = {"obs": policy.normalizer.normalize(STATE, tensors[STATE])}
    cond["goal"] = policy.normalizer.normalize(STATE, tensors["goal." + STATE])
    noise = torch.randn(tensors["action"].shape, generator=torch.Generator().manual_seed(0))
    actions = []
    for chosen in (sampler, replace(sampler, num_steps=100)):
        levels = chosen.levels(policy.process)
        init = float(policy.process.prior_std(levels[0])) * noise
        actions.append(sample(policy.denoiser, policy.process, levels, chosen.build(), cond=cond, init=init)[:, -1])
    return float((actions[0] - actions[1]).square().mean().sqrt())


def small(run: Run) -> list[Claim]:
    """Train the score model and its discrete-process rival on play, ask for two pads."""
    settings = {
        "network": to_dict(NETWORK),
        "training": TRAINING,
        "episodes": [DEMONSTRATIONS, EXECUTION_NOISE, EPISODES],
        "runs": [NFES, SCALES],
    }
    parts = run.grid(("edm", "ddpm"), SEEDS, settings, train_and_play)

    def values(objective: str, name: str, score: str = "result") -> list[float]:
        return [part[name][score] for part in parts[objective]]

    _plots(run, values)
    return [*_few_steps(values, parts), *_guidance(values)]


def _few_steps(values: Any, parts: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    three, thirty = values("edm", "nfe3"), values("edm", "nfe30")
    leading, trailing = values("ddpm", "leading3"), values("ddpm", "trailing3")
    name, rival = max((("leading", leading), ("trailing", trailing)), key=lambda pair: float(np.mean(pair[1])))
    enough = Claim(
        "three steps are as good as thirty",
        "3 instead of 30+",
        rate(three),
        rate(thirty),
        Margin("ratio", low=0.95),
        f"share of the asked pads visited, guidance 1; at 3: {listed(three)}; at 30: {listed(thirty)}",
    )
    better = Claim(
        "at three steps better than a discrete process",
        "+0.15 (estimate)",
        rate(three),
        rate(rival),
        Margin("difference", low=0.15),
        f"rival: same network, data and budget, noise prediction in 100 levels, DDIM-3, the better spacing ({name}); "
        f"{listed(rival)}",
    )
    error = Claim(
        "error of an action sampled in three steps",
        "",
        over_seeds([part["error"] for part in parts["edm"]], 0.0),
        over_seeds([part["error"] for part in parts["ddpm"]], 0.0),
        None,
        "distance to the same noise denoised in 100 steps (RMS, normalised units); feedback corrects much of it",
    )
    own = Claim(
        "the discrete process with 10 steps, for comparison",
        "",
        rate(three),
        rate(values("ddpm", "leading10")),
        None,
        "ours is still three steps",
    )
    return [enough, better, own, error]


def _guidance(values: Any) -> list[Claim]:
    free, guided = values("edm", "scale0"), values("edm", "scale2")
    results = ", ".join(f"{scale:g}: {np.mean(values('edm', f'scale{scale:g}')):.3f}" for scale in SCALES)
    follows = Claim(
        "guidance makes play follow its goal",
        "raises the result",
        rate(guided),
        rate(free),
        Margin("difference", low=0.1),
        f"share of the asked pads visited, scale 2 against 0; by scale {results}",
    )
    reward = [values("edm", f"scale{scale:g}", "reward") for scale in (0.0, 3.0)]
    keeps = Claim(
        "guidance does not spoil the playing",
        "reward within 10 %",
        over_seeds(reward[1], 0.0),
        over_seeds(reward[0], 0.0),
        Margin("ratio", low=0.9, high=1.1),
        "any pads visited, over two; scale 3 against 0",
    )
    return [follows, keeps]


def _plots(run: Run, values: Any) -> None:
    with run.plot("steps") as axes:
        axes.plot(NFES, [np.mean(values("edm", f"nfe{n}")) for n in NFES], "o-", label="EDM, sigma up to 1")
        axes.plot([3, 10], [np.mean(values("ddpm", f"leading{n}")) for n in (3, 10)], "s--", label="DDPM-100, DDIM")
        axes.set_xscale("log")
        axes.set_xlabel("network calls per action")
        axes.set_ylabel("asked pads visited")
        axes.legend()
    with run.plot("guidance") as axes:
        for score in ("result", "reward"):
            axes.plot(SCALES, [np.mean(values("edm", f"scale{scale:g}", score)) for scale in SCALES], "o-", label=score)
        axes.set_xlabel("guidance scale")
        axes.legend()


def share_in_mode(process: Process, levels: torch.Tensor, kernel: Kernel, count: int = 20_000) -> float:
    """Return the share of samples within three standard deviations of a mode of two, at -0.6 and 0.6, std 0.05."""
    denoiser = MixtureDenoiser(torch.tensor([0.5, 0.5]), torch.tensor([[-0.6], [0.6]]), torch.tensor(0.05), process)
    noise = torch.randn(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = float(process.prior_std(levels[0])) * noise
    x = sample(denoiser, process, levels, kernel, init=start, generator=torch.Generator().manual_seed(1))
    return float(((x.abs() - 0.6).abs() < 0.15).double().mean())


def ci(run: Run) -> list[Claim]:
    """Sample a known density with its exact denoiser, and check the identities of the spec."""
    table = _table()
    three = Measure(table["EDM-DDIM exponential [0.05, 1], 3"][1])
    rival = Measure(table["VP-100 DDIM leading, 3"][1])
    note = "share of 20 000 samples in a mode, exact denoiser: the levels alone make the difference"
    gain = Claim("three steps: EDM up to 1 against VP", "+0.34", three, rival, Margin("difference", low=0.33), note)
    rows = [
        # the table is rounded to 0.01, and the standard error of a share of 20 000 is at most 0.0035
        Claim(name, f"{paper:.2f}", Measure(ours), None, Margin(low=paper - 0.02, high=paper + 0.02))
        for name, (paper, ours) in table.items()
    ]
    with run.plot("shares", 8, 5) as axes:
        axes.barh(list(table), [ours for _, ours in table.values()])
        axes.set_xlabel("share in a mode")
    return [gain, *rows, *identities()]


def _table() -> Mapping[str, tuple[float, float]]:
    """Return the shares in a mode: name -> (closed-form table of the spec, ours)."""
    beso, vp = EDM(0.05, 1.0), VP.cosine(100)
    cases: list[tuple[str, float, Process, int, Any, Kernel]] = [
        ("EDM-DDIM exponential [0.05, 1]", paper, beso, n, "exponential", DDIM())
        for n, paper in ((1, 0.11), (2, 0.41), (3, 0.89), (5, 0.98), (10, 1.0))
    ]
    cases += [
        ("EDM-DDIM linear [0.1, 1]", 0.97, EDM(0.1, 1.0), 3, "linear", DDIM()),
        ("EDM ancestral linear [0.005, 1]", 0.52, EDM(0.005, 1.0), 3, "linear", DDIM(eta=1.0)),
        ("EDM-DDIM exponential [0.001, 80]", 0.63, EDM(0.001, 80.0), 3, "exponential", DDIM()),
        ("EDM-DDIM exponential [0.001, 80]", 0.94, EDM(0.001, 80.0), 10, "exponential", DDIM()),
        ("VP-100 DDIM leading", 0.55, vp, 3, "leading", DDIM()),
        ("VP-100 DDIM leading", 0.97, vp, 10, "leading", DDIM()),
        ("VP-100 DDIM leading", 0.99, vp, 16, "leading", DDIM()),
        ("VP-100 DDPM leading", 0.47, vp, 3, "leading", DDPM()),
        ("VP-100 DDPM leading", 0.97, vp, 10, "leading", DDPM()),
        ("VP-100 DDPM", 1.0, vp, 100, "leading", DDPM()),
    ]
    return {
        f"{name}, {n}": (paper, share_in_mode(process, process.levels(n, spacing), kernel))
        for name, paper, process, n, spacing, kernel in cases
    }


TIERS = {"ci": ci, "small": small}
