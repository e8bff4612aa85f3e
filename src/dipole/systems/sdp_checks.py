"""The exact properties of streaming (spec a 5e), and what it does to a known Gaussian process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipole.data import Episodes, Feature
from dipole.diffusion import DDPM, VP, GaussianDenoiser, Uniform
from dipole.policies import DiffusionPolicy, SamplerConfig, make_config, make_policy
from dipole.policies.config import ObjectiveConfig
from dipole.policies.streaming import StreamingTraining, num_pieces, pieces, rungs
from dipole.realtime.streaming import StreamingConfig, StreamingPolicy
from dipole.systems.card import Claim, Margin, Measure

STATE = "observation.state"
HORIZONS = ((2, 10, 4), (1, 12, 3), (3, 12, 2), (2, 11, 1))


def random_policy(
    horizons: tuple[int, int, int] = (2, 10, 4), streaming: bool = True, num_steps: int = 100, action_dim: int = 2
) -> DiffusionPolicy:
    """Return a small policy with random weights, large enough that everything depends on everything.

    Args:
        horizons: To, Tp, Ta.
        streaming: With a noise level for every position.
        num_steps: Steps of its DDPM sampler, and levels of its process where there are more than 1.
        action_dim: Da.
    """
    rng = np.random.default_rng(0)
    columns = {
        STATE: rng.uniform(-1, 1, (200, 3)).astype(np.float32),
        "action": rng.uniform(-1, 1, (200, action_dim)).astype(np.float32),
    }
    features = {STATE: Feature("float32", (3,)), "action": Feature("float32", (action_dim,))}
    episodes = Episodes(features, columns, np.array([100, 200]), 10.0)
    to, tp, ta = horizons
    torch.manual_seed(0)
    config = make_config(
        episodes,
        network={
            "name": "mlp", "width": 24, "num_blocks": 1, "context_width": 8, "step_embed_dim": 8,
            "per_position_levels": streaming,
        },
        process="vp-cosine",
        sampler=SamplerConfig("ddpm", num_steps, clip=1.0),
        obs_horizon=to,
        pred_horizon=tp,
        action_horizon=ta,
        streaming=StreamingTraining() if streaming else None,
    )  # fmt: skip
    policy = make_policy(config, episodes).eval()
    for parameter in policy.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.2 / parameter.shape[1] ** 0.5)
    return policy


def oracle_policy(covariance: Tensor, horizons: tuple[int, int, int], streaming: bool = True) -> DiffusionPolicy:
    """Return a policy that knows its data, chunks of one number ~ N(0, covariance `[Tp, Tp]`), and sees nothing."""
    policy = random_policy(horizons, streaming, action_dim=1)
    oracle = GaussianDenoiser(torch.zeros(len(covariance)), covariance, policy.process)
    objective = ObjectiveConfig("x0", "uniform")
    object.__setattr__(policy, "config", _replaced(policy.config, objective=objective))
    policy.sampler = SamplerConfig("ddpm", 100)

    def network(x: Tensor, time: Tensor, cond: Any = None) -> Tensor:
        return oracle(x, time[:1] if time.dim() == 2 else float(time[0]))  # all rows are at the same level(s)

    policy.network.forward = network
    return policy


def _replaced(config: Any, **values: Any) -> Any:
    from dataclasses import replace

    return replace(config, **values)


def exact_checks() -> list[Claim]:
    """Return one claim per property."""
    none = Margin(high=0.0)
    return [
        Claim("one piece is DDPM from the same noise", "0, bit for bit", Measure(_one_piece_error()), None, none),
        Claim("a step per position at equal levels is the step", "0", Measure(_step_error()), None, none),
        Claim("a call ends on the next call's ladder", "0", Measure(_ladder_error()), None, none, "4 sets of horizons"),
        Claim(
            "levels met at run time that were not trained",
            "0 where h divides N",
            Measure(_untrained()),
            None,
            none,
            "of 50 vectors; N = 100, h = 2, with DDPM-100 and its 20-step version",
        ),
        Claim(
            "network calls of 6 chunks",
            "6 N / h",
            Measure(float(_network_calls(6))),
            Measure(600.0),
            Margin("ratio", low=0.5, high=0.5),
            "N = 100, h = 2; baseline: DDPM-100",
        ),
        Claim(
            "a batch with resets acts as its rows alone",
            "0",
            Measure(_leak()),
            None,
            Margin(high=1e-9),
            "largest difference, float64, 3 rows, 5 calls, 4 resets",
        ),
    ]


def _one_piece_error() -> float:
    policy = random_policy()
    object.__setattr__(policy, "config", _replaced(policy.config, action_horizon=9))
    noise = torch.randn(3, 10, 2, generator=torch.Generator().manual_seed(0))
    obs = {STATE: torch.zeros(3, 2, 3)}
    streaming = StreamingPolicy(policy, StreamingConfig())
    state = {"buffer": noise, "primed": torch.ones(3, dtype=torch.bool)}
    ours, _ = streaming.act(obs, state, generator=_generators(3))
    reference, _ = policy.act(obs, {}, noise=noise, generator=_generators(3))
    return float((ours - reference).abs().max())


def _step_error() -> float:
    process = VP.cosine(100)
    x, x0 = torch.randn(2, 8, 5, 2, generator=torch.Generator().manual_seed(0))
    worst = 0.0
    for t in range(100):
        one = DDPM(clip=1.0).step(x, x0, float(t), t - 1.0, process)
        each = DDPM(clip=1.0).step(x, x0, torch.full((8, 5), float(t)), torch.full((8, 5), t - 1.0), process)
        worst = max(worst, float((one.mean - each.mean).abs().max()))
    return worst


def _ladder_error() -> float:
    worst = 0.0
    for to, tp, ta in HORIZONS:
        count = num_pieces(to, tp, ta)
        policy = StreamingPolicy(random_policy((to, tp, ta)), StreamingConfig())
        end, ladder = policy.levels[-1, 0], policy.ladder[0]
        kept = to - 1 + (count - 1) * ta
        moved = end[ta : ta + kept].clone()
        moved[: to - 1] = ladder[: to - 1]  # clean, and noised again
        expected = rungs(pieces(to, tp, ta), count, policy.process)
        worst = max(worst, float((moved - expected[:kept]).abs().max()), float((ladder - expected).abs().max()))
    return worst


def _untrained() -> float:
    policy = random_policy()
    scheme = StreamingTraining(constant=0.0)
    drawn = scheme.draw(4000, HORIZONS[0], policy.process, Uniform(), torch.Generator().manual_seed(0))
    trained = {tuple(row) for row in drawn.tolist()}
    met = set()
    for steps in (100, 20):
        running = StreamingPolicy(policy.with_sampler(SamplerConfig("ddpm", steps)), StreamingConfig())
        met |= {tuple(row[0]) for row in running.levels[:-1].tolist()}
    return float(len(met - trained))


def _network_calls(chunks: int) -> int:
    policy, calls = StreamingPolicy(random_policy(), StreamingConfig()), []
    policy.network.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    state = policy.initial_state(1)
    for _ in range(chunks):
        _, state = policy.act({STATE: torch.zeros(1, 2, 3)}, state, generator=_generators(1))
    return len(calls)


def _leak() -> float:
    policy = StreamingPolicy(random_policy(num_steps=20), StreamingConfig()).double()
    return leak(policy, {(1, 2), (2, 0), (4, 0), (4, 1)})


def leak(policy: Any, resets: set[tuple[int, int]], batch: int = 3, calls: int = 5) -> float:
    """Return the largest difference between a batch with resets at (call, row) and its rows run alone."""
    observed = torch.randn(calls, batch, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run(rows: list[int]) -> Tensor:
        state, chunks = policy.initial_state(len(rows)), []
        generators = [torch.Generator().manual_seed(row) for row in rows]
        for call in range(calls):
            state = policy.reset(state, torch.tensor([(call, row) in resets for row in rows]))
            chunk, state = policy.act({STATE: observed[call, rows]}, state, generator=generators)
            chunks.append(chunk)
        return torch.stack(chunks)

    together = run(list(range(batch)))
    return max(float((together[:, row] - run([row])[:, 0]).abs().max()) for row in range(batch))


def _generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(count)]


def seam(overlap_noise: bool, episodes: int = 600, calls: int = 6) -> dict[str, float]:
    """Stream a known Gaussian process with its exact denoiser; return how the seams between chunks come out.

    Args:
        overlap_noise: As in `StreamingConfig`.
        episodes: Rows.
        calls: Chunks each, of which the first half is left out.

    Returns:
        `correlation` of the last action of a chunk with the first of the next, `inside` of neighbours inside a chunk,
        and the standard deviation `std` of actions (1 in the data).
    """
    horizons = (2, 9, 4)
    position = torch.arange(horizons[1], dtype=torch.float64)
    covariance = torch.exp(-(position[:, None] - position).abs() / 4)
    policy = StreamingPolicy(oracle_policy(covariance, horizons), StreamingConfig(overlap_noise=overlap_noise))
    state, rng, chunks = policy.initial_state(episodes), torch.Generator().manual_seed(0), []
    obs = {STATE: torch.zeros(episodes, 2, 3)}
    for _ in range(calls):
        chunk, state = policy.act(obs, state, generator=rng)
        chunks.append(policy.normalizer.normalize("action", chunk)[..., 0])
    late = torch.stack(chunks[calls // 2 :])
    ends, starts = late[:-1, :, -1].flatten(), late[1:, :, 0].flatten()
    return {
        "correlation": float(torch.corrcoef(torch.stack([ends, starts]))[0, 1]),
        "inside": float(torch.corrcoef(torch.stack([late[..., 1].flatten(), late[..., 2].flatten()]))[0, 1]),
        "std": float(late.std()),
    }
