"""What a published system is (`Card`), what it claims and what was measured (`Claim`), and where the numbers are kept.

A claim's verdict is never typed in: it follows from the measured numbers and the `Margin` asked, and the text printed
for that margin is made from the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Axis = Literal[
    "objective",
    "network",
    "start and levels",
    "reuse",
    "guidance",
    "decoding",
    "online RL",
    "imagination",
    "offline",
    "preference",
    "reward alignment",
    "agents",
    "safety",
]
Tier = Literal["ci", "small", "gpu"]
Verdict = Literal["passed", "failed", "measured"]
TIERS: tuple[Tier, ...] = ("ci", "small", "gpu")


@dataclass(frozen=True)
class Source:
    """The publication a system comes from; `arxiv` is None where the identifier is not known for certain."""

    paper: str
    year: int
    arxiv: str | None = None


@dataclass(frozen=True)
class Card:
    """What a system is.

    Attributes:
        name: Name on the command line, e.g. `bc-diffusion`.
        title: One line for people.
        source: Where it was published.
        axis: What it changes (see the table of systems in the documentation).
        summary: What it does, in two or three sentences.
        claim: What its authors claim.
        spec_section: Where its equations are written down for this library, e.g. `a2`.
        needs_extras: Optional dependency groups its reproduction needs.
    """

    name: str
    title: str
    source: Source
    axis: Axis
    summary: str
    claim: str
    spec_section: str
    needs_extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measure:
    """One measured number, with the ends of its confidence interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        text = _short(self.value)
        if self.low is None or self.high is None:
            return text + unit
        return f"{text} [{_short(self.low)}, {_short(self.high)}]{unit}"


@dataclass(frozen=True)
class Margin:
    """What must hold for a claim to pass: a quantity made of `ours` and `baseline` lies in `[low, high]`.

    Attributes:
        of: The quantity: `ours`, the `difference` ours - baseline, or the `ratio` ours / baseline.
        low: Smallest value that passes.
        high: Largest value that passes.
    """

    of: Literal["ours", "difference", "ratio"] = "ours"
    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        name = {"ours": "ours", "difference": "ours - baseline", "ratio": "ours / baseline"}[self.of]
        if self.low == self.high:
            return f"{name} = {_short(self.low)}"
        if math.isinf(self.high):
            return f"{name} >= {_short(self.low)}"
        if math.isinf(self.low):
            return f"{name} <= {_short(self.high)}"
        return f"{_short(self.low)} <= {name} <= {_short(self.high)}"

    def holds(self, ours: float, baseline: float | None) -> bool:
        """Return whether the numbers meet the margin; a NaN never does.

        Raises:
            ValueError: The margin compares with a baseline and there is none.
        """
        if self.of == "ours":
            return self.low <= ours <= self.high
        if baseline is None:
            raise ValueError(f"the margin '{self}' needs a baseline")
        if self.of == "difference":
            return self.low <= ours - baseline <= self.high
        return baseline != 0 and self.low <= ours / baseline <= self.high


@dataclass(frozen=True)
class Claim:
    """One row of a reproduction.

    Attributes:
        claim: What is claimed.
        paper: What the paper (or the closed form) gives, as text.
        ours: What was measured with the method.
        baseline: What was measured without it, on the same work.
        margin: What was asked; None for a number that is reported only.
        note: Conditions, and why a claim failed.
    """

    claim: str
    paper: str
    ours: Measure
    baseline: Measure | None = None
    margin: Margin | None = None
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """Return `passed`, `failed`, or `measured` where nothing was asked."""
        if self.margin is None:
            return "measured"
        baseline = None if self.baseline is None else self.baseline.value
        return "passed" if self.margin.holds(self.ours.value, baseline) else "failed"

    def as_dict(self) -> dict[str, Any]:
        """Return the claim as JSON-able data (numbers that are infinite or not numbers become null)."""
        data = asdict(self)
        for key in ("ours", "baseline"):
            if data[key] is not None:
                data[key]["value"] = _finite(data[key]["value"])
        if self.margin is not None:
            ends = {"low": _finite(self.margin.low), "high": _finite(self.margin.high)}
            data["margin"] = {"of": self.margin.of, **ends, "text": str(self.margin)}
        return {**data, "verdict": self.verdict}


@dataclass(frozen=True)
class Report:
    """The outcome of one reproduction: its claims, where and how long it ran, and the files it left."""

    system: str
    tier: Tier
    claims: Sequence[Claim]
    date: str
    seconds: float
    machine: dict[str, Any]
    version: str
    plots: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> Verdict:
        """Return `failed` if any claim failed, else `passed` if any was asked for, else `measured`."""
        verdicts = {claim.verdict for claim in self.claims}
        if "failed" in verdicts:
            return "failed"
        return "passed" if "passed" in verdicts else "measured"

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able data."""
        return {
            "system": self.system,
            "tier": self.tier,
            "verdict": self.verdict,
            "date": self.date,
            "seconds": round(self.seconds, 1),
            "version": self.version,
            "machine": self.machine,
            "claims": [claim.as_dict() for claim in self.claims],
            "plots": list(self.plots),
        }


def _short(value: float) -> str:
    if math.isnan(value) or math.isinf(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.1e}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
