"""What `dipole accelerate` decides by: rounds, ranks, who goes on, who is chosen, and by how much it differs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dipole.errors import DipoleError
from dipole.evaluation.statistics import Estimate, bootstrap, mcnemar, paired_difference, sign_flip, wilson
from dipole.realtime.candidates import Candidate
from dipole.serialization import to_dict

BLOCK = 16
FINALISTS = 4


@dataclass(frozen=True)
class SearchConfig:
    """What is searched for.

    Attributes:
        episodes: Episodes of the last round, and of the confirmation.
        seed: Which seeds; see `dipole.evaluation.seeds`.
        target_ms: Choose the best score among candidates whose 95th percentile is within this; None for `max_drop`.
        max_drop: Choose the fastest candidate whose score is at most this much below the reference's (success rates
            and rewards up to 1; for returns a share of the reference's).
        samplers: `name:steps`; None for the usual ones.
        distilled: Folders of distilled checkpoints.
        backends: Back ends to try besides eager; None for all.
        max_steps: Longest episode.
        calls: Timed chunks per candidate, fewer where they are slow.
        confirm: Whether the choice plays against the reference on fresh seeds.
    """

    episodes: int = 96
    seed: int = 0
    target_ms: float | None = None
    max_drop: float = 0.02
    samplers: tuple[str, ...] | None = None
    distilled: tuple[str, ...] = ()
    backends: tuple[str, ...] | None = None
    max_steps: int | None = None
    calls: int = 40
    confirm: bool = True

    def __post_init__(self) -> None:
        if self.episodes < BLOCK:
            raise DipoleError(f"--episodes {self.episodes}: at least {BLOCK}, or nothing can be told apart")
        if self.target_ms is not None and self.target_ms <= 0:
            raise DipoleError(f"--target-ms {self.target_ms:g}: it must be positive")
        if self.max_drop < 0:
            raise DipoleError(f"--max-drop {self.max_drop:g}: it must not be negative")


@dataclass
class Entry:
    """What is known about a candidate.

    Attributes:
        candidate: The candidate.
        key: Digest of everything its episodes depend on.
        scores: Score of each episode played so far.
        successes: Success of each.
        lengths: Env steps of each.
        p50_ms: Median milliseconds per chunk at batch 1, one thread.
        p95_ms: 95th percentile.
        nfe: Network calls per chunk.
        actions: Ta.
        dropped: Round after which it was left out; None for a finalist.
        problem: Why it could not be run, in words.
    """

    candidate: Candidate
    key: str
    scores: list[float] = field(default_factory=list)
    successes: list[bool] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    p50_ms: float | None = None
    p95_ms: float | None = None
    nfe: int | None = None
    actions: int = 0
    dropped: int | None = None
    problem: str = ""

    @property
    def score(self) -> float:
        """Return the mean score so far."""
        return float(np.mean(self.scores)) if self.scores else math.nan

    def row(self, on_success: bool) -> dict[str, Any]:
        """Return what the table shows."""
        estimate = self.estimate(on_success)
        return {
            "name": self.candidate.name,
            "run": self.candidate.run,
            "runtime": to_dict(self.candidate.runtime),
            "episodes": len(self.scores),
            "score": None if estimate is None else asdict(estimate),
            "success": sum(self.successes) / len(self.successes) if self.successes else None,
            "p50_ms": self.p50_ms,
            "p95_ms": self.p95_ms,
            "ms_per_action": None if self.p50_ms is None else self.p50_ms / max(1, self.actions),
            "nfe": self.nfe,
            "dropped": self.dropped,
            "problem": self.problem,
        }

    def estimate(self, on_success: bool) -> Estimate | None:
        """Return the mean score with its interval; None before the first episode."""
        if not self.scores:
            return None
        return wilson(sum(self.successes), len(self.successes)) if on_success else bootstrap(np.array(self.scores))


def rungs(episodes: int) -> list[int]:
    """Return the episodes each candidate has played after each round: 16, 32, 64, ... and `episodes`."""
    sizes, size = [], BLOCK
    while size < episodes:
        sizes.append(size)
        size *= 2
    return [*sizes, episodes]


def planned(count: int, episodes: int) -> int:
    """Return how many episodes a search over `count` candidates plays, without those of other back ends."""
    total, before = 0, 0
    for size in rungs(episodes):
        total += count * (size - before)
        before, count = size, survivors(count)
    return total


def survivors(count: int) -> int:
    """Return how many of `count` candidates go on to the next round."""
    return max(min(count, FINALISTS), math.ceil(count / 2))


def domination_ranks(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return each point's rank among (score, latency): 0 on the Pareto front, 1 on that of the rest, ..."""
    ranks: dict[int, int] = {}
    rank = 0
    while len(ranks) < len(points):
        left = [i for i in range(len(points)) if i not in ranks]
        front = [i for i in left if not any(_dominates(points[j], points[i]) for j in left)]
        ranks.update(dict.fromkeys(front, rank))
        rank += 1
    return [ranks[i] for i in range(len(points))]


def _dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Return whether `a` scores no less in no more time, and is better in one of them."""
    return a[0] >= b[0] and a[1] <= b[1] and a != b


def halve(entries: Sequence[Entry], reference: Entry, config: SearchConfig) -> list[Entry]:
    """Return the entries that go on: the reference, and the better half by rank, then score, then latency."""
    able = [entry for entry in entries if not entry.problem and entry.p50_ms is not None]
    ranks = domination_ranks([(entry.score, entry.p50_ms or 0.0) for entry in able])
    order = sorted(range(len(able)), key=lambda i: (ranks[i], -able[i].score, able[i].p50_ms))
    hopeless = [entry for entry in able if entry is not reference and _surely_too_low(entry, reference, config)]
    kept = [able[i] for i in order if able[i] not in hopeless][: survivors(len(able))]
    if reference not in kept:
        kept = [reference, *kept[: max(0, survivors(len(able)) - 1)]]
    return [entry for entry in entries if entry in kept]


def _surely_too_low(entry: Entry, reference: Entry, config: SearchConfig) -> bool:
    """Return whether a drop beyond what is allowed is certain: then its episodes can be spared."""
    if config.target_ms is not None:
        return False
    allowed = _allowed(reference, config)
    differences = np.array(entry.scores) - np.array(reference.scores[: len(entry.scores)])
    return bool(bootstrap(differences, 0.99).high < -allowed)


def _allowed(reference: Entry, config: SearchConfig) -> float:
    return config.max_drop * max(1.0, abs(reference.score))


def choose(finalists: Sequence[Entry], reference: Entry, config: SearchConfig) -> Entry | None:
    """Return the finalist asked for; None if none is fast enough."""
    able = [entry for entry in finalists if not entry.problem and entry.p50_ms is not None and entry.p95_ms is not None]
    if config.target_ms is not None:
        fast = [entry for entry in able if entry.p95_ms is not None and entry.p95_ms <= config.target_ms]
        return max(fast, key=lambda entry: (entry.score, -(entry.p50_ms or 0.0)), default=None)
    enough = reference.score - _allowed(reference, config) - 1e-12
    return min((entry for entry in able if entry.score >= enough), key=lambda entry: entry.p50_ms or 0.0)


def paired(reference: Entry, chosen: Entry, on_success: bool) -> dict[str, Any]:
    """Return the difference chosen - reference on the episodes both played, with interval and test."""
    count = min(len(reference.scores), len(chosen.scores))
    if count == 0:
        return {"episodes": 0}
    a, b = np.array(reference.scores[:count]), np.array(chosen.scores[:count])
    if on_success:
        wins, losses = int(((b > 0) & (a == 0)).sum()), int(((a > 0) & (b == 0)).sum())
        both, neither = int(((a > 0) & (b > 0)).sum()), int(((a == 0) & (b == 0)).sum())
        difference, p = paired_difference(both, losses, wins, neither), mcnemar(losses, wins)
    else:
        difference, p = bootstrap(b - a), sign_flip(b - a)
    return {
        "episodes": count,
        "reference": float(a.mean()),
        "chosen": float(b.mean()),
        "difference": asdict(difference),
        "p": p,
    }
