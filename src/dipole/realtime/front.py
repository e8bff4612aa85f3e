"""The outcome of `dipole accelerate` for people: a picture of the Pareto front, and a page with the table."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dipole.errors import MissingExtraError
from dipole.evaluation.wording import number, percent
from dipole.serialization import write_text

PICTURE, PAGE = "front.png", "front.html"


def draw(document: Mapping[str, Any], path: Path) -> Path:
    """Draw score against latency, with intervals, the front and the choice, as a PNG (or what the suffix says).

    Args:
        document: From `accelerate`.
        path: The file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "report") from None
    rows = [row for row in document["rows"] if row["score"] is not None and row["p50_ms"] is not None]
    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        _point(axes, row, document)
    front = sorted((row for row in rows if row["front"]), key=lambda row: row["p50_ms"])
    axes.step([r["p50_ms"] for r in front], [r["score"]["value"] for r in front], where="post", color="C0", lw=1)
    if document["config"]["target_ms"] is not None:
        axes.axvline(document["config"]["target_ms"], color="C3", lw=0.8, ls="--", label="target")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_number)
    axes.xaxis.set_minor_formatter(_number)
    axes.set_xlabel("milliseconds per chunk (median, one observation, one thread)")
    axes.set_ylabel({"success": "success rate", "max_reward": "largest reward"}.get(document["score_name"], "return"))
    bottom, top = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= top])
    axes.set_ylim(bottom, top + 0.35 * (top - bottom))  # room for the names
    axes.set_title(f"{document['env']}: {Path(document['run']).name}", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    figure.savefig(temporary, dpi=130)
    temporary.replace(path)
    return path


def _number(value: float, position: float) -> str:
    return f"{value:g}"


def _point(axes: Any, row: Mapping[str, Any], document: Mapping[str, Any]) -> None:
    score, chosen, reference = row["score"], row["name"] == document["chosen"], row["name"] == document["reference"]
    complete = row["episodes"] == document["config"]["episodes"]
    colour = "C3" if chosen else "0.2" if reference else "C0" if row["front"] else "0.65"
    low, high = score["value"] - score["low"], score["high"] - score["value"]
    axes.errorbar(
        row["p50_ms"], score["value"], [[max(0.0, low)], [max(0.0, high)]], color=colour, fmt="o" if complete else "x",
        ms=7 if chosen or reference else 5, lw=0.8, alpha=1.0 if complete else 0.6,
    )  # fmt: skip
    # Equals stand close together: those one might take have their name above, aslant, the others below, upright.
    plain = chosen or reference or row["front"]
    if complete or chosen:
        place: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8 if plain else 6}
        place |= (
            {"xytext": (3, 4), "rotation": 40, "va": "bottom"}
            if plain
            else {"xytext": (-2, -12), "rotation": 90, "ha": "right", "va": "top"}
        )
        axes.annotate(row["name"], (row["p50_ms"], score["value"]), color=colour, **place)


def write_page(document: Mapping[str, Any], folder: Path) -> Path:
    """Write `front.html`, which needs nothing but itself, next to the picture in `folder`."""
    picture = folder / PICTURE
    image = ""
    if picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode()
        image = f'<img alt="score against latency" src="data:image/png;base64,{data}">'
    heads = "".join(f"<th>{escape(head)}</th>" for head in HEADS)
    body = "".join(
        f"<tr{' class=chosen' if row['name'] == document['chosen'] else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells(row, document))
        + "</tr>"
        for row in ordered(document["rows"])
    )
    title = f"{document['run']} in {document['env']}"
    text = "".join(f"<p>{escape(line)}</p>" for line in sentences(document))
    write_text(folder / PAGE, _PAGE.format(title=escape(title), text=text, image=image, heads=heads, body=body))
    return folder / PAGE


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;
margin:2rem auto;padding:0 1rem;color-scheme:light dark}}
img{{max-width:100%;background:#fff}}table{{border-collapse:collapse;font-variant-numeric:tabular-nums}}
td,th{{padding:.25rem .7rem;text-align:left;border-bottom:1px solid #8884}}.chosen{{font-weight:600}}</style>
<h1>{title}</h1>{text}{image}<table><tr>{heads}</tr>{body}</table></html>
"""

HEADS = ("candidate", "nfe", "ms", "p95", "ms per action", "score", "interval", "episodes", "")


def ordered(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows, fastest first, without those that were never timed: `sentences` tells why."""
    return sorted((row for row in rows if row["p50_ms"] is not None), key=lambda row: row["p50_ms"])


def cells(row: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    """Return a row of the table, as text."""
    score = row["score"]
    share = document["score_name"] == "success"

    def shown(value: float) -> str:
        return percent(value) if share else number(value)

    remark = "front" if row["front"] else ""
    if row["problem"]:
        remark = "not run"
    elif row["name"] == document["chosen"]:
        remark = "chosen"
    elif row["name"] == document["reference"]:
        remark = "reference"
    return [
        row["name"],
        "–" if row["nfe"] is None else str(row["nfe"]),
        number(row["p50_ms"]),
        number(row["p95_ms"]),
        number(row["ms_per_action"]),
        "–" if score is None else shown(score["value"]) + (" %" if share else ""),
        "" if score is None else f"{shown(score['low'])} to {shown(score['high'])}",
        str(row["episodes"]),
        remark,
    ]


def sentences(document: Mapping[str, Any]) -> list[str]:
    """Return what was found, in words."""
    rows = {row["name"]: row for row in document["rows"]}
    chosen, reference = document["chosen"], document["reference"]
    remarks = [*document["notes"], *_problems(document["rows"])]
    if chosen is None:
        return ["Nothing was chosen: no candidate is as fast as asked.", *remarks]
    if chosen == reference:
        return [f"'{reference}' stays: nothing faster scores high enough.", *remarks]
    ratio = rows[reference]["p50_ms"] / rows[chosen]["p50_ms"]
    lines = [
        f"chosen: '{chosen}', {number(rows[chosen]['p50_ms'])} ms per chunk instead of "
        f"{number(rows[reference]['p50_ms'])} ({ratio:.1f} times as fast)"
    ]
    fresh = document["confirmation"]
    if fresh and fresh["episodes"]:
        difference = fresh["difference"]
        scale, unit = (100, " points") if document["score_name"] == "success" else (1, "")
        low, value, high = (scale * difference[key] for key in ("low", "value", "high"))
        spec = "+.0f" if unit else "+.3f"
        lines.append(
            f"on {fresh['episodes']} fresh seeds: {value:{spec}}{unit} against the reference "
            f"(95 % interval {low:{spec}} to {high:{spec}}, p = {fresh['p']:.2f})"
        )
        allowed = document["config"]["max_drop"]
        if document["config"]["target_ms"] is None and difference["value"] < -allowed:
            lines.append("the drop on fresh seeds is larger than was allowed: more --episodes would choose better")
    return [*lines, *remarks]


def _problems(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return why candidates could not be run, each reason once."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row["problem"]:
            names.setdefault(row["problem"], []).append(row["name"])
    return [
        f"not run: '{those[0]}'{f' and {len(those) - 1} more' if len(those) > 1 else ''}: {problem}"
        for problem, those in names.items()
    ]
