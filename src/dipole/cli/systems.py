"""List the published systems, what each one changes, and the recorded outcome of its reproductions.

Examples:
  dipole systems
  dipole systems --json
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Args:
    """Options of `dipole systems`."""

    json: bool = False
    """Print one JSON document and nothing else."""


def run(args: Args) -> None:
    """Print the list."""
    rows = _rows()
    if args.json:
        import json

        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("system", no_wrap=True), "what it is", "changes", "ci", "small", "gpu")
    for row in rows:
        cells = (_cell(row["tiers"], row["results"].get(tier), tier) for tier in ("ci", "small", "gpu"))
        table.add_row(row["name"], row["title"], row["axis"], *cells)
    Console().print(table)


def _rows() -> list[dict[str, Any]]:
    from dataclasses import asdict

    from dipole.systems import card, names, store, tiers

    results = store.load()
    return [
        {
            **asdict(card(name)),
            "tiers": tiers(name),
            "results": {k: _brief(r) for k, r in results.get(name, {}).items()},
        }
        for name in names()
    ]


def _brief(report: dict[str, Any]) -> dict[str, Any]:
    verdicts = [claim["verdict"] for claim in report["claims"]]
    counts = {verdict: verdicts.count(verdict) for verdict in ("passed", "failed", "measured")}
    return {"date": report["date"], "verdict": report["verdict"], "version": report["version"], **counts}


def _cell(tiers: list[str], brief: dict[str, Any] | None, tier: str) -> str:
    if tier not in tiers:
        return ""
    if brief is None:
        return "[dim]not run[/]"
    asked = brief["passed"] + brief["failed"]
    colour = "green" if brief["verdict"] == "passed" else "bold red" if brief["verdict"] == "failed" else "dim"
    return f"[{colour}]{brief['passed']}/{asked} passed[/] {brief['date']}"
