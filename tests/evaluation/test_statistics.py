import numpy as np
import pytest
import scipy.stats

from dipole.evaluation.statistics import (
    bootstrap,
    clopper_pearson,
    mcnemar,
    paired_difference,
    required_episodes,
    required_pairs,
    sign_flip,
    wilson,
)

COUNTS = [(0, 1), (0, 50), (1, 2), (3, 20), (27, 50), (49, 50), (50, 50), (463, 500)]


@pytest.mark.parametrize(("successes", "episodes"), COUNTS)
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_intervals_of_a_rate_agree_with_scipy(successes, episodes, confidence):
    test = scipy.stats.binomtest(successes, episodes)
    for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        theirs = test.proportion_ci(confidence, method)
        mine = ours(successes, episodes, confidence)
        assert mine.value == successes / episodes
        # scipy finds the exact interval by root search to about 1e-12
        assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=1e-10)


def test_wilson_published():
    # Newcombe (1998a), Statistics in Medicine 17:857, table I, method 3: 81/263, 15/148, 0/20, 1/29
    for counts, low, high in [((81, 263), 0.2553, 0.3662), ((15, 148), 0.0624, 0.1605), ((0, 20), 0, 0.1611)]:
        mine = wilson(*counts)
        assert (mine.low, mine.high) == pytest.approx((low, high), abs=5e-5)  # printed to four digits
    assert wilson(1, 29).high == pytest.approx(0.1718, abs=5e-5)


def test_wilson_covers():
    # Exact coverage at n = 50, averaged over rates: 0.95 +- 0.01; a Wald interval would have 0.94 or less.
    rates, k = np.linspace(0.05, 0.95, 91), np.arange(51)
    low, high = np.array([(wilson(int(i), 50).low, wilson(int(i), 50).high) for i in k]).T
    weight = scipy.stats.binom.pmf(k[:, None], 50, rates)
    coverage = (weight * ((low[:, None] <= rates) & (rates <= high[:, None]))).sum(0)
    assert coverage.mean() == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("bad", [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts(bad):
    with pytest.raises(ValueError, match="successes of"):
        wilson(*bad)


def test_impossible_confidence():
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, confidence=95)


@pytest.mark.parametrize(("method", "theirs"), [("bca", "BCa"), ("percentile", "percentile")])
@pytest.mark.parametrize(
    "values", [np.random.default_rng(1).exponential(size=30), np.repeat([0.0, 1.0, 0.5], [3, 5, 2])]
)
def test_bootstrap_agrees_with_scipy_on_the_same_draws(method, theirs, values):
    rng = np.random.default_rng(7)
    expected = scipy.stats.bootstrap((values,), np.mean, method=theirs, n_resamples=2000, rng=rng).confidence_interval
    mine = bootstrap(values, method=method, resamples=2000, seed=7)
    assert mine.value == values.mean()
    assert (mine.low, mine.high) == pytest.approx((expected.low, expected.high), rel=1e-9)  # same draws, same formula


def test_bootstrap_in_pieces_draws_the_same(monkeypatch):
    values = np.random.default_rng(0).normal(size=40)
    whole = bootstrap(values, resamples=500)
    monkeypatch.setattr("dipole.evaluation.statistics._MAX_CELLS", 1000)
    assert bootstrap(values, resamples=500) == whole


def test_bootstrap_at_the_edges():
    assert (bootstrap([2.0]).low, bootstrap([2.0, 2.0]).high) == (2.0, 2.0)
    one_off = bootstrap([0.0] * 99 + [1.0])
    assert 0 <= one_off.low < 0.01 < one_off.high < 0.1
    for bad in ([], [np.nan, 1.0], [[1.0]]):
        with pytest.raises(ValueError, match="finite"):
            bootstrap(bad)


def test_bca_covers_skewed_means_better_than_its_share():
    # 200 samples of 20 exponentials: nominal 0.95; the binomial standard error is 0.016, BCa is known to reach ~0.92.
    rng = np.random.default_rng(0)
    hits = [
        est.low <= 1 <= est.high for est in (bootstrap(rng.exponential(size=20), resamples=999) for _ in range(200))
    ]
    assert np.mean(hits) > 0.87


@pytest.mark.parametrize(("a", "b"), [(0, 0), (1, 7), (7, 1), (5, 5), (0, 12), (30, 55)])
def test_mcnemar_is_the_binomial_test(a, b):
    expected = scipy.stats.binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_paired_difference_published():
    # Airway hyper-responsiveness (Bentur et al. 2009): 1, 1, 7, 12. Fagerland, Lydersen and Laake (2014) print
    # Newcombe -0.507 to -0.026 for before - after and the exact test's P = 0.070.
    mine = paired_difference(both=1, only_a=1, only_b=7, neither=12)
    assert (mine.low, mine.high) == pytest.approx((0.026, 0.507), abs=5e-4)
    assert mcnemar(1, 7) == pytest.approx(0.0703125)


def test_paired_difference_is_antisymmetric_and_covers():
    forward, backward = paired_difference(20, 4, 9, 17), paired_difference(20, 9, 4, 17)
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low))
    assert paired_difference(10, 0, 0, 0).value == 0
    # 2000 tables of 50 pairs, strongly correlated, true difference 0.1: nominal 0.95, standard error 0.005
    tables = np.random.default_rng(0).multinomial(50, [0.55, 0.05, 0.15, 0.25], size=2000)
    intervals = [paired_difference(*(int(n) for n in table)) for table in tables]
    coverage = np.mean([i.low <= 0.1 <= i.high for i in intervals])
    assert 0.93 < coverage < 0.985


def test_sign_flip_agrees_with_scipy():
    x = np.array([0.3, -0.1, 0.8, 0.4, 0.0, -0.2, 0.5])
    expected = scipy.stats.permutation_test((x, np.zeros(7)), lambda a, b: np.mean(a - b), permutation_type="samples")
    assert sign_flip(x) == pytest.approx(expected.pvalue)  # both try all patterns
    assert sign_flip(np.zeros(5)) == 1.0
    big = np.random.default_rng(0).normal(0.3, 1, 60)
    # random patterns: standard error of a p of 0.03 from 9999 draws is 0.002
    assert sign_flip(big) == pytest.approx(scipy.stats.ttest_1samp(big, 0).pvalue, abs=0.01)
    assert sign_flip(big, seed=3) == sign_flip(big, seed=3)


def test_required_episodes_is_the_smallest():
    for half_width, rate in [(0.1, 0.5), (0.05, 0.9), (0.02, 0.0), (0.14, 0.5), (0.45, 0.5)]:
        n = required_episodes(half_width, rate)

        def half(n, rate=rate):
            z = scipy.stats.norm.ppf(0.975)
            return z / (1 + z * z / n) * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))

        assert half(n) <= half_width < (half(n - 1) if n > 1 else 1)
    assert required_episodes(0.1) == 93
    with pytest.raises(ValueError, match="half_width"):
        required_episodes(0.0)


def test_required_pairs():
    # By hand: discordant 0.4, difference 0.2: ((1.95996 sqrt(0.4) + 0.84162 sqrt(0.36)) / 0.2)^2 = 76.02
    assert required_pairs(0.4, 0.2) == 77
    # The asymptotic formula against the power of the exact test at that size, by simulation (standard error 0.01)
    tables = np.random.default_rng(0).multinomial(77, [0.3, 0.1, 0.3, 0.3], size=1500)
    power = np.mean([mcnemar(int(t[1]), int(t[2])) < 0.05 for t in tables])
    assert power == pytest.approx(0.8, abs=0.08)  # the exact test is more careful than the formula
    with pytest.raises(ValueError, match="difference"):
        required_pairs(0.1, 0.2)
