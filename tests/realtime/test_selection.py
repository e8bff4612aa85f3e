import itertools
import math

import numpy as np
import pytest

from dipole.errors import DipoleError
from dipole.realtime.candidates import Candidate, on_backends
from dipole.realtime.runtime import Runtime
from dipole.realtime.selection import (
    FINALISTS,
    Entry,
    SearchConfig,
    choose,
    domination_ranks,
    halve,
    paired,
    planned,
    rungs,
    survivors,
)


def entry(name, scores, ms, p95=None):
    successes = [score > 0 for score in scores]
    return Entry(
        Candidate(name, "run", Runtime()), "key", list(scores), successes, [1] * len(scores), ms, p95 or 1.2 * ms, 1, 8
    )


def share(rate, episodes=100):
    return [1.0] * round(rate * episodes) + [0.0] * (episodes - round(rate * episodes))


def test_rounds_double_and_end_at_what_was_asked():
    assert rungs(16) == [16]
    assert rungs(96) == [16, 32, 64, 96]
    assert rungs(128) == [16, 32, 64, 128]
    assert [survivors(n) for n in (1, 3, 4, 7, 20)] == [1, 3, 4, 4, 10]
    # 20, 10, 5 and 4 candidates
    assert planned(20, 96) == 20 * 16 + 10 * 16 + 5 * 32 + 4 * 32


def test_ranks_peel_off_one_front_after_the_other():
    points = [(0.9, 10.0), (0.8, 5.0), (0.8, 6.0), (0.5, 7.0), (0.9, 10.0)]
    assert domination_ranks(points) == [0, 0, 1, 2, 0]
    rng = np.random.default_rng(0)
    points = [tuple(point) for point in rng.uniform(size=(40, 2))]
    ranks = domination_ranks(points)
    for (i, a), (j, b) in itertools.permutations(enumerate(points), 2):
        if a[0] >= b[0] and a[1] <= b[1]:
            assert ranks[i] < ranks[j]


def test_the_reference_and_the_better_half_go_on():
    reference = entry("reference", share(0.2), 100.0)
    others = [entry(f"c{i}", share(0.3 + 0.05 * i), 10.0 + i) for i in range(9)]
    kept = halve([reference, *others], reference, SearchConfig(target_ms=1000.0))
    assert kept[0] is reference
    assert len(kept) == 5
    assert others[-1] in kept
    assert others[0] not in kept  # all are on the front: then the score decides
    few = [reference, *others[: FINALISTS - 1]]
    assert halve(few, reference, SearchConfig(target_ms=1000.0)) == few


def test_what_surely_drops_too_far_is_spared_the_rest():
    reference, bad, maybe = (
        entry("r", share(1.0), 10.0),
        entry("bad", share(0.2), 1.0),
        entry("maybe", share(0.97), 2.0),
    )
    assert halve([reference, bad, maybe], reference, SearchConfig()) == [reference, maybe]
    # with a time to keep to, a low score may still be the best there is
    assert bad in halve([reference, bad, maybe], reference, SearchConfig(target_ms=1.5))


def test_what_could_not_be_run_does_not_go_on():
    reference, broken = entry("r", share(0.5), 1.0), entry("broken", [], 1.0)
    broken.problem = "an action is not finite"
    assert halve([reference, broken], reference, SearchConfig()) == [reference]
    assert choose([reference, broken], reference, SearchConfig()) is reference


def test_the_fastest_within_the_drop_is_chosen():
    reference = entry("r", share(0.9), 100.0)
    within, below, slower = entry("a", share(0.88), 5.0), entry("b", share(0.87), 1.0), entry("c", share(1.0), 50.0)
    finalists = [reference, within, below, slower]
    assert choose(finalists, reference, SearchConfig()) is within
    assert choose(finalists, reference, SearchConfig(max_drop=0.03)) is below
    assert choose(finalists, reference, SearchConfig(max_drop=0.0)) is slower
    assert choose([reference], reference, SearchConfig()) is reference


def test_the_best_within_the_time_is_chosen():
    reference = entry("r", share(0.9), 100.0)
    fast, faster, tail = (
        entry("a", share(0.8), 5.0),
        entry("b", share(0.8), 4.0),
        entry("c", share(0.85), 3.0, p95=30.0),
    )
    finalists = [reference, fast, faster, tail]
    assert choose(finalists, reference, SearchConfig(target_ms=10.0)) is faster
    assert choose(finalists, reference, SearchConfig(target_ms=40.0)) is tail
    assert choose(finalists, reference, SearchConfig(target_ms=1.0)) is None


def test_paired_differences():
    a, b = entry("a", [1, 1, 0, 0, 1, 0], 1.0), entry("b", [1, 1, 1, 1, 0, 0, 1], 1.0)
    found = paired(a, b, on_success=True)
    assert found["episodes"] == 6
    assert found["difference"]["value"] == pytest.approx(1 / 6)
    assert found["p"] == 1.0  # two against one
    scored = paired(entry("a", [0.1, 0.2], 1.0), entry("b", [0.3, 0.4], 1.0), on_success=False)
    assert scored["difference"]["value"] == pytest.approx(0.2)
    assert paired(a, entry("c", [], 1.0), on_success=True) == {"episodes": 0}


def test_rows_say_what_a_candidate_costs():
    row = entry("a", share(0.5), 4.0).row(on_success=True)
    assert row["ms_per_action"] == 0.5
    assert row["score"]["value"] == 0.5
    assert 0.4 < row["score"]["low"] < 0.5 < row["score"]["high"] < 0.6
    assert entry("b", [], 4.0).row(on_success=True)["score"] is None
    assert math.isnan(entry("b", [], 4.0).score)


def test_settings_that_make_no_sense_are_refused():
    for options in ({"episodes": 3}, {"target_ms": 0.0}, {"max_drop": -0.1}):
        with pytest.raises(DipoleError, match="--"):
            SearchConfig(**options)


def test_back_ends_are_tried_for_what_they_can_run():
    plain = Candidate("ddim:5", "run", Runtime())
    names = [candidate.name for candidate in on_backends(plain, ["packed", "eager"])]
    assert names == ["ddim:5 + packed"]
    assert [c.runtime.backend for c in on_backends(plain)] == ["compile", "packed", "packed-compiled", "whole-chunk"]
    assert [c.runtime.backend for c in on_backends(plain, device="cuda:0")] == ["compile", "cuda-graph"]
    assert on_backends(Candidate("c", "run", Runtime("block-cache")), ["packed"]) == []
    assert Candidate("rti:3, Ta 1", "run", Runtime()).slug == "rti-3-ta-1"
