"""Samplers side by side on the same episodes: success, score and latency against network calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dipole.errors import DipoleError
from dipole.evaluation.evaluate import Evaluation, evaluate
from dipole.policies.config import SamplerConfig
from dipole.serialization import to_dict, write_json

FILE = "samplers.json"


@dataclass(frozen=True)
class SamplerResult:
    """One sampler's row, as in `samplers.json`.

    Attributes:
        sampler: Name.
        num_steps: Steps.
        nfe: Network calls per chunk.
        episodes: Number of episodes.
        success: Success rate.
        low: Lower end of its interval.
        high: Upper end.
        score: Mean score.
        score_low: Lower end of its interval.
        score_high: Upper end.
        latency_ms_p50: Median latency per chunk on one thread; None if not measured.
        latency_ms_p95: 95th percentile.
    """

    sampler: str
    num_steps: int
    nfe: int | None
    episodes: int
    success: float
    low: float
    high: float
    score: float
    score_low: float
    score_high: float
    latency_ms_p50: float | None
    latency_ms_p95: float | None

    @classmethod
    def of(cls, sampler: SamplerConfig, evaluation: Evaluation) -> SamplerResult:
        """Return the row of a sampler's evaluation."""
        success, score = evaluation.success, evaluation.score
        latency = (evaluation.timing["latency"] or [{}])[0]
        return cls(
            sampler.name, sampler.num_steps, evaluation.policy["nfe"], evaluation.num_episodes,
            success.value, success.low, success.high, score.value, score.low, score.high,
            latency.get("p50_ms"), latency.get("p95_ms"),
        )  # fmt: skip


def parse_sampler(text: str, like: SamplerConfig) -> SamplerConfig:
    """Return the sampler written as `name:steps`, e.g. `ddim:10`; `name` alone or `:steps` change only that.

    Args:
        text: The sampler.
        like: Where all other settings (clipping, spacing, noise) come from.

    Raises:
        DipoleError: Another form, or an unknown name.
    """
    name, _, steps = text.partition(":")
    if steps and (not steps.isdigit() or int(steps) < 1):
        raise DipoleError(f"sampler '{text}': write it as name:steps, e.g. ddim:10")
    chosen: Any = name or like.name
    config = replace(like, name=chosen, num_steps=int(steps) if steps else like.num_steps)
    config.build()  # an unknown name is reported here, before any episode
    return config


def sweep(
    policy: Any,
    env: Any,
    samplers: Sequence[SamplerConfig],
    **options: Any,
) -> list[SamplerResult]:
    """Evaluate a policy with each sampler on the same seeds.

    Args:
        policy: A policy with `with_sampler`.
        env: As in `evaluate`.
        samplers: The samplers.
        options: As in `evaluate`.
    """
    return [SamplerResult.of(sampler, evaluate(policy.with_sampler(sampler), env, **options)) for sampler in samplers]


def save_sweep(folder: Path, results: Sequence[SamplerResult]) -> None:
    """Write `samplers.json`."""
    write_json(folder / FILE, [to_dict(result) for result in results])
