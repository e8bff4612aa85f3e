"""Statistics of evaluations: intervals for one policy, tests for two on the same seeds, and how many episodes it takes.

Sources: Wilson (1927) and Clopper and Pearson (1934) for a proportion; Efron (1987) for the bootstrap (BCa); McNemar
(1947), exact form, for paired successes; Newcombe (1998b), method 10, for the difference of paired proportions; Connor
(1987) for the number of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

_NORMAL = NormalDist()
_MAX_CELLS = 4_000_000  # resampled values held at once: 32 MB


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
        confidence: Coverage of the interval.
        method: How the interval was found.
    """

    value: float
    low: float
    high: float
    confidence: float = 0.95
    method: str = ""


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return _NORMAL.inv_cdf(0.5 + confidence / 2)


def _check_counts(successes: int, episodes: int) -> None:
    if not 0 <= successes <= episodes or episodes < 1:
        raise ValueError(f"{successes} successes of {episodes} episodes")


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> Estimate:
    """Return a success rate with Wilson's score interval."""
    _check_counts(successes, episodes)
    low, high = _wilson(successes / episodes, episodes, _quantile(confidence))
    low, high = (0.0 if successes == 0 else low), (1.0 if successes == episodes else high)
    return Estimate(successes / episodes, low, high, confidence, "wilson")


def _wilson(rate: float, episodes: float, z: float) -> tuple[float, float]:
    shrink = 1 + z**2 / episodes
    centre = (rate + z**2 / (2 * episodes)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / episodes + z**2 / (4 * episodes**2)) / shrink
    return centre - half, centre + half


def clopper_pearson(successes: int, episodes: int, confidence: float = 0.95) -> Estimate:
    """Return a success rate with the exact interval, which covers at least `confidence` whatever the true rate."""
    _check_counts(successes, episodes)
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else _bisect(lambda p: 1 - _binomial_cdf(successes - 1, episodes, p), tail)
    high = 1.0 if successes == episodes else _bisect(lambda p: -_binomial_cdf(successes, episodes, p), -tail)
    return Estimate(successes / episodes, low, high, confidence, "clopper-pearson")


def _bisect(rising: Callable[[float], float], target: float) -> float:
    """Return where a function that rises on [0, 1] reaches the target."""
    low, high = 0.0, 1.0
    for _ in range(60):  # 2^-60: below the spacing of floats near 1
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return (low + high) / 2


def _binomial_cdf(successes: int, episodes: int, rate: float) -> float:
    if rate in (0.0, 1.0):
        return float(rate == 0.0 or successes >= episodes)
    log_odds, total = math.log(rate) - math.log1p(-rate), math.lgamma(episodes + 1) + episodes * math.log1p(-rate)
    terms = (total - math.lgamma(k + 1) - math.lgamma(episodes - k + 1) + k * log_odds for k in range(successes + 1))
    return math.fsum(math.exp(term) for term in terms)


def bootstrap(
    values: np.ndarray,
    confidence: float = 0.95,
    method: Literal["bca", "percentile"] = "bca",
    resamples: int = 9999,
    seed: int = 0,
) -> Estimate:
    """Return a mean with its bootstrap interval.

    Args:
        values: `[E]`.
        confidence: Coverage.
        method: `percentile`, or `bca` (bias-corrected and accelerated, better for skewed values).
        resamples: Number of resampled means.
        seed: Of the resampling, so that the interval is reproducible.

    Raises:
        ValueError: No values, or some not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError("bootstrap needs a non-empty vector of finite values")
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean, confidence, method)
    means = _resampled_means(values, resamples, seed)
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    if method == "bca":
        tails = _bca_tails(values, means, tails)
    low, high = np.quantile(means, tails)
    return Estimate(mean, float(low), float(high), confidence, f"bootstrap-{method}")


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = max(1, _MAX_CELLS // len(values))
    parts = []
    for start in range(0, resamples, rows):
        index = rng.integers(0, len(values), (min(rows, resamples - start), len(values)))
        parts.append(values[index].mean(axis=1))
    return np.concatenate(parts)


def _bca_tails(values: np.ndarray, means: np.ndarray, tails: np.ndarray) -> np.ndarray:
    """Return the quantiles to read off the resampled means (Efron 1987, eq. 2.3 and 6.6)."""
    mean = values.mean()
    share = ((means < mean).sum() + (means <= mean).sum()) / (2 * len(means))
    bias = _NORMAL.inv_cdf(min(max(float(share), 0.5 / len(means)), 1 - 0.5 / len(means)))
    left_out = (values.sum() - values) / max(1, len(values) - 1)
    spread = left_out.mean() - left_out
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    z = bias + np.array([_NORMAL.inv_cdf(float(tail)) for tail in tails])
    return np.array([_NORMAL.cdf(float(v)) for v in bias + z / (1 - acceleration * z)])


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of "both succeed equally often", from the episodes only one of them solved."""
    discordant = only_a + only_b
    if discordant == 0:
        return 1.0
    return min(1.0, 2 * _binomial_cdf(min(only_a, only_b), discordant, 0.5))


def paired_difference(both: int, only_a: int, only_b: int, neither: int, confidence: float = 0.95) -> Estimate:
    """Return how much more often B succeeds than A on the same episodes (Newcombe 1998b, method 10)."""
    episodes = both + only_a + only_b + neither
    wins_a, wins_b = both + only_a, both + only_b
    a, b = wilson(wins_a, episodes, confidence), wilson(wins_b, episodes, confidence)
    spread = math.sqrt(wins_a * (episodes - wins_a) * wins_b * (episodes - wins_b))
    product: float = both * neither - only_a * only_b
    if product > 0:
        product = max(product - episodes / 2, 0)
    phi = product / spread if spread else 0.0
    down, up = (b.value - b.low, a.high - a.value), (b.high - b.value, a.value - a.low)
    low = math.sqrt(max(0.0, down[0] ** 2 - 2 * phi * down[0] * down[1] + down[1] ** 2))
    high = math.sqrt(max(0.0, up[0] ** 2 - 2 * phi * up[0] * up[1] + up[1] ** 2))
    difference = (only_b - only_a) / episodes
    return Estimate(difference, difference - low, difference + high, confidence, "newcombe-10")


def sign_flip(differences: np.ndarray, resamples: int = 9999, seed: int = 0) -> float:
    """Return the two-sided p-value of "the mean paired difference is 0" by flipping signs.

    All sign patterns are tried where there are at most `resamples` of them, else as many random ones.
    """
    differences = np.asarray(differences, dtype=np.float64)
    observed = abs(float(differences.sum())) * (1 - 1e-12)  # rounding must not make an equal sum look smaller
    nonzero = differences[differences != 0]
    if 2 ** len(nonzero) <= resamples:
        patterns = np.arange(2 ** len(nonzero))[:, None] >> np.arange(len(nonzero)) & 1
        return float((np.abs((1 - 2 * patterns) @ nonzero) >= observed).mean())
    rng = np.random.default_rng(seed)
    rows, extreme = max(1, _MAX_CELLS // len(nonzero)), 0
    for start in range(0, resamples, rows):
        signs = 1 - 2 * rng.integers(0, 2, (min(rows, resamples - start), len(nonzero)))
        extreme += int((np.abs(signs @ nonzero) >= observed).sum())
    return (extreme + 1) / (resamples + 1)


def required_episodes(half_width: float, rate: float = 0.5, confidence: float = 0.95) -> int:
    """Return how many episodes make Wilson's interval around a success rate at most +- `half_width` wide."""
    if not 0 < half_width < 0.5:
        raise ValueError(f"half_width must be between 0 and 0.5, got {half_width}")
    z, episodes = _quantile(confidence), 1

    def half(n: int) -> float:
        low, high = _wilson(rate, n, z)
        return (high - low) / 2

    while half(episodes) > half_width:
        episodes *= 2
    too_few, enough = episodes // 2, episodes
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (middle, enough) if half(middle) > half_width else (too_few, middle)
    return enough


def required_pairs(discordant: float, difference: float, confidence: float = 0.95, power: float = 0.8) -> int:
    """Return how many paired episodes McNemar's test needs to confirm a difference in success (Connor 1987, eq. 3).

    Args:
        discordant: Share of episodes that only one of the two solves.
        difference: Difference of their success rates.
        confidence: 1 - the test's level.
        power: Chance of finding the difference.
    """
    if not 0 < abs(difference) <= discordant <= 1:
        raise ValueError(f"need 0 < |difference| <= discordant <= 1, got {difference} and {discordant}")
    alpha, beta = _quantile(confidence), _NORMAL.inv_cdf(power)
    spread = math.sqrt(discordant - difference**2)
    return math.ceil(((alpha * math.sqrt(discordant) + beta * spread) / difference) ** 2)
