"""Claims, margins and verdicts: the verdict follows from the numbers, and the printed margin is the tested one."""

import json
import math

import pytest

from dipole.systems.card import Claim, Margin, Measure, Report


@pytest.mark.parametrize(
    ("margin", "ours", "baseline", "holds"),
    [
        (Margin("ours", low=0.95), 0.95, None, True),
        (Margin("ours", low=0.95), 0.9499, None, False),
        (Margin("ours", high=0.3), 0.3, 0.9, True),
        (Margin("ours", low=0.35, high=0.65), 0.5, None, True),
        (Margin("ours", low=0.35, high=0.65), 0.66, None, False),
        (Margin("difference", low=0.15), 0.9, 0.75 - 1e-9, True),
        (Margin("difference", low=0.15), 0.9, 0.76, False),
        (Margin("ratio", high=0.7), 0.7, 1.0, True),
        (Margin("ratio", high=0.7), 0.71, 1.0, False),
        (Margin("ratio", low=0.95), 0.5, 0.0, False),
        (Margin("ours", low=-math.inf, high=math.inf), math.nan, None, False),
        (Margin("difference", low=0.0), math.nan, 1.0, False),
    ],
)
def test_margin(margin, ours, baseline, holds):
    assert margin.holds(ours, baseline) is holds
    claim = Claim("c", "p", Measure(ours), None if baseline is None else Measure(baseline), margin)
    assert claim.verdict == ("passed" if holds else "failed")


def test_margins_in_words():
    assert str(Margin("ours", low=0.95)) == "ours >= 0.95"
    assert str(Margin("ratio", high=0.7)) == "ours / baseline <= 0.7"
    assert str(Margin("difference", low=-0.05, high=0.05)) == "-0.05 <= ours - baseline <= 0.05"
    assert str(Margin("ours", low=2, high=2)) == "ours = 2"


def test_a_comparison_needs_a_baseline():
    with pytest.raises(ValueError, match="needs a baseline"):
        _ = Claim("c", "p", Measure(1.0), margin=Margin("ratio", low=1)).verdict


def test_measures_in_words():
    assert str(Measure(0.98765)) == "0.9877"
    assert str(Measure(0.5, 0.4, 0.6)) == "0.5 [0.4, 0.6]"
    assert str(Measure(12.0, unit="ms")) == "12 ms"
    assert str(Measure(5.7e-14)) == "5.7e-14"


def report(*claims):
    return Report("beso", "ci", claims, "2026-01-01", 1.0, {"cores": 2}, "0.1.0")


def test_report_verdict():
    good = Claim("a", "", Measure(1.0), margin=Margin(low=0))
    bad = Claim("b", "", Measure(-1.0), margin=Margin(low=0))
    told = Claim("c", "", Measure(5.0))
    assert told.verdict == "measured"
    assert report(told).verdict == "measured"
    assert report(good, told).verdict == "passed"
    assert report(good, bad, told).verdict == "failed"


def test_a_missing_number_fails_and_is_null_in_json():
    row = Claim("a", "x", Measure(math.nan), margin=Margin(low=0)).as_dict()
    assert (row["ours"]["value"], row["verdict"]) == (None, "failed")


def test_report_is_strict_json():
    claim = Claim("a", "x", Measure(1.0, 0.9, 1.1), Measure(0.5), Margin("difference", low=0.15), "why")
    text = json.dumps(report(claim).as_dict(), allow_nan=False)
    row = json.loads(text)["claims"][0]
    assert row["margin"] == {"of": "difference", "low": 0.15, "high": None, "text": "ours - baseline >= 0.15"}
    assert row["verdict"] == "passed"
    assert row["ours"] == {"value": 1.0, "low": 0.9, "high": 1.1, "unit": ""}
