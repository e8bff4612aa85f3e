"""Success against delay: the same episodes with several latencies and modes of execution, as a table and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from dipole.errors import DipoleError
from dipole.evaluation.evaluate import Evaluation, evaluate
from dipole.realtime.delayed import Delay
from dipole.realtime.execution import MODES, execution_mode
from dipole.serialization import to_dict, write_json

FILE = "delays.json"


@dataclass(frozen=True)
class DelayResult:
    """One mode at one latency, as in `delays.json`.

    Attributes:
        mode: How chunks were executed.
        latency_ms: Mean delay from observation to chunk.
        jitter_ms: Half-width of its distribution.
        drop: Fraction of requests lost.
        episodes: Number of episodes.
        success: Success rate.
        low: Lower end of its interval.
        high: Upper end.
        score: Mean score.
        score_low: Lower end of its interval.
        score_high: Upper end.
        length: Mean number of environment steps.
        fallback: Fraction of those without a planned action.
        requests: Mean number of chunks asked for per episode.
        lost: Mean number of them lost.
    """

    mode: str
    latency_ms: float
    jitter_ms: float
    drop: float
    episodes: int
    success: float
    low: float
    high: float
    score: float
    score_low: float
    score_high: float
    length: float
    fallback: float
    requests: float
    lost: float

    @classmethod
    def of(cls, delay: Delay, evaluation: Evaluation) -> DelayResult:
        """Return the row of an evaluation with this delay."""
        link, success, score = delay.link, evaluation.success, evaluation.score
        total = float(evaluation.column("length").sum())
        fallback, requests, lost = (evaluation.column(f"execution.{name}") for name in ("fallback", "requests", "lost"))
        return cls(
            delay.mode, link.latency_ms, link.jitter_ms, link.drop, evaluation.num_episodes,
            success.value, success.low, success.high, score.value, score.low, score.high,
            evaluation.length.value, float(fallback.sum()) / total, float(requests.mean()), float(lost.mean()),
        )  # fmt: skip


def parse_latencies(text: str) -> tuple[float, ...]:
    """Return latencies written as `0,40,80`.

    Raises:
        DipoleError: They are no numbers, or negative.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DipoleError(f"latency '{text}': write milliseconds, several with commas, e.g. 0,40,80") from None
    if not all(0 <= value < float("inf") for value in values):
        raise DipoleError(f"latency '{text}': milliseconds must not be negative")
    return values


def parse_modes(text: str) -> tuple[str, ...]:
    """Return modes of execution written as `sync,async-drop`, or `all`.

    Raises:
        DipoleError: A mode is unknown.
    """
    names = tuple(MODES) if text == "all" else tuple(text.split(","))
    for name in names:
        execution_mode(name)
    return names


def sweep_delays(
    policy: Any, env: Any, modes: Sequence[str], latencies_ms: Sequence[float], like: Delay, **options: Any
) -> Iterator[DelayResult]:
    """Evaluate a policy in each mode at each latency, on the same seeds and with the same draws of jitter and loss.

    Args:
        policy: The policy.
        env: As in `evaluate`.
        modes: Names of modes.
        latencies_ms: Mean delays.
        like: Everything else about the delay.
        options: As in `evaluate`.

    Yields:
        A row as soon as it is there.
    """
    for mode, latency in product(modes, latencies_ms):
        delay = replace(like, mode=mode, link=replace(like.link, latency_ms=latency))
        yield DelayResult.of(delay, evaluate(policy, env, delay=delay, latency_calls=0, **options))


def save_delays(folder: Path, env: str, results: Sequence[DelayResult]) -> None:
    """Write `delays.json`."""
    write_json(folder / FILE, {"env": env, "results": [to_dict(result) for result in results]})
