"""The exact properties of warm starts (spec a 6e)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dipole.diffusion import DDPM, VP, GaussianDenoiser
from dipole.policies.policy import State
from dipole.realtime.base import shifted
from dipole.realtime.rti import RTIConfig, RTIPolicy, residual
from dipole.systems.card import Claim, Margin, Measure
from dipole.systems.sdp_checks import STATE, leak, random_policy

TABLE = {
    0.02: (0.19, 0.11, 0.07, 0.03, 0.01, 0.00, 0.00),
    0.05: (0.59, 0.43, 0.31, 0.18, 0.07, 0.02, 0.01),
    0.10: (0.85, 0.75, 0.65, 0.48, 0.23, 0.08, 0.02),
    0.30: (0.98, 0.97, 0.95, 0.89, 0.74, 0.44, 0.17),
}
"""Share of an error left after levels K', ..., 0 (columns: `STARTS`), by standard deviation of the conditional."""
STARTS = (1, 2, 3, 5, 10, 20, 40)
SKIPPED = (15, 13, 11, 9, 7, 5, 3, 2, 1, 0)


def exact_checks() -> list[Claim]:
    """Return one claim per property."""
    none = Margin(high=0.0)
    process = VP.cosine(100)
    worst = max(
        abs(residual(process, _from(start), std) - expected)
        for std, row in TABLE.items()
        for start, expected in zip(STARTS, row, strict=True)
    )
    relabelled = {
        (3, 1, 0): residual(process, (3, 1, 0), 0.05, relabel_skips=True),
        SKIPPED: residual(process, SKIPPED, 0.05, relabel_skips=True),
    }
    return [
        Claim("all levels from noise are DDPM", "0, bit for bit", Measure(_full_list_error()), None, none),
        Claim("no level replays the shifted chunk", "0", Measure(_empty_list_error()), None, none),
        Claim("level 0 alone is the clipped prediction", "0", Measure(_last_level_error()), None, Margin(high=1e-6)),
        # the table is given to two decimals
        Claim("share of an error left: the table", "4 x 7 values", Measure(worst), None, Margin(high=0.005001)),
        Claim(
            "the same with the exact denoiser of a Gaussian, step by step",
            "1e-4",
            Measure(_oracle_error()),
            None,
            Margin(high=1e-4),
            "largest difference from the formula",
        ),
        Claim(
            "levels 3, 1, 0 with the published relabelling leave",
            "0.43",
            Measure(relabelled[(3, 1, 0)]),
            Measure(residual(process, (3, 1, 0), 0.05)),
            Margin(low=0.425, high=0.435),
            "std 0.05; baseline: stepping to the next listed level, which leaves what 3, 2, 1, 0 does: for a Gaussian "
            "posterior means compose, and a skipped level costs nothing",
        ),
        Claim(
            "ten levels from 15 with the published relabelling leave",
            "0.11",
            Measure(relabelled[SKIPPED]),
            Measure(residual(process, SKIPPED, 0.05)),
            Margin(low=0.105, high=0.115),
            "std 0.05",
        ),
        Claim("snapping binary actions twice changes nothing", "0", Measure(_snap_error()), None, none),
        Claim(
            "a reset costs other rows nothing and changes nothing in them",
            "0",
            Measure(_reset_error()),
            None,
            none,
            "largest difference in a row beside one that is reset, block of 3, float32",
        ),
        Claim(
            "a batch with resets acts as its rows alone",
            "0",
            Measure(leak(RTIPolicy(random_policy(streaming=False, num_steps=20), RTIConfig()).double(), _RESETS)),
            None,
            Margin(high=1e-9),
            "largest difference, float64, 3 rows, 5 calls, 4 resets",
        ),
    ]


_RESETS = {(1, 2), (2, 0), (4, 0), (4, 1)}


def _from(start: int) -> tuple[float, ...]:
    return tuple(float(level) for level in range(start, -1, -1))


def _warm(chunk: Tensor) -> State:
    return {"chunk": chunk, "warm": torch.ones(len(chunk), dtype=torch.bool)}


def _chunk(noise: bool = False) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(3, 10, 2, generator=rng) if noise else torch.rand(3, 10, 2, generator=rng) * 2 - 1


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(3)]


def _obs() -> dict[str, Tensor]:
    return {STATE: torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(1))}


def _full_list_error() -> float:
    base, noise = random_policy(streaming=False), _chunk(noise=True)
    policy = RTIPolicy(base, RTIConfig(levels=_from(99), shift=0))
    ours, _ = policy.act(_obs(), _warm(noise), generator=_generators())
    reference, _ = base.act(_obs(), {}, noise=noise, generator=_generators())
    return float((ours - reference).abs().max())


def _empty_list_error() -> float:
    policy = RTIPolicy(random_policy(streaming=False), RTIConfig(levels=()))
    _, state = policy.act(_obs(), _warm(_chunk()), generator=_generators())
    return float((state["chunk"] - shifted(_chunk(), 4)).abs().max())


def _last_level_error() -> float:
    base = random_policy(streaming=False)
    policy = RTIPolicy(base, RTIConfig(levels=(0.0,)))
    _, state = policy.act(_obs(), _warm(_chunk()), generator=_generators())
    with torch.no_grad():
        predicted = base.denoiser(shifted(_chunk(), 4), 0.0, base.encode(_obs())).clamp(-1, 1)
    return float((state["chunk"] - predicted).abs().max())


def _oracle_error() -> float:
    process, worst, kernel = VP.cosine(100), 0.0, DDPM()
    mean, offset = torch.tensor([0.2], dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64)
    for std in TABLE:
        oracle = GaussianDenoiser(mean, torch.eye(1, dtype=torch.float64) * std**2, process)
        for levels in (*(_from(start) for start in STARTS), (10.0, 5.0, 0.0)):
            ends = [mean + offset, mean - offset]  # their middle moves too: a clean guess is no sample at level t
            for t, s in pairwise((*levels, process.clean)):
                ends = [kernel.step(x, oracle(x, t), t, s, process).mean for x in ends]
            left = float((ends[0] - ends[1]) / (2 * offset))
            worst = max(worst, abs(left - residual(process, levels, std)))
    return worst


def _snap_error() -> float:
    policy = RTIPolicy(random_policy(streaming=False), RTIConfig(discrete=(1,), discrete_mode="clip"))
    once, _ = policy._discrete(_chunk())
    return float((policy._discrete(once)[0] - once).abs().max())


def _reset_error() -> float:
    policy = RTIPolicy(random_policy(streaming=False, num_steps=20), RTIConfig())
    chunks = []
    for reset in (False, True):
        state = _warm(_chunk())
        if reset:
            state = policy.reset(state, torch.tensor([True, False, True]))
        chunks.append(policy.act(_obs(), state, generator=_generators())[0][1])
    return float((chunks[0] - chunks[1]).abs().max())
