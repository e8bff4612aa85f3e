"""The picture of a sweep over delays: one line per mode, with intervals, as an SVG file of its own."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from dipole.errors import MissingExtraError
from dipole.realtime.delay_sweep import DelayResult
from dipole.serialization import write_text

FILE = "delays.svg"
_MARKERS = "osD^vPX*"


def plot_delays(path: Path, results: Sequence[DelayResult], env: str, score_name: str) -> None:
    """Draw success (or the score, where success is not what the environment scores) against latency.

    Args:
        path: SVG file to write; the same bytes for the same results.
        results: Rows of `sweep_delays`.
        env: Name of the environment, for the title.
        score_name: What it scores.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "report") from None
    on_success = score_name == "success"
    with matplotlib.rc_context({"svg.hashsalt": "delays", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for k, mode in enumerate(dict.fromkeys(row.mode for row in results)):
            rows = sorted((row for row in results if row.mode == mode), key=lambda row: row.latency_ms)
            y = [100 * row.success if on_success else row.score for row in rows]
            low = [100 * row.low if on_success else row.score_low for row in rows]
            high = [100 * row.high if on_success else row.score_high for row in rows]
            x = [row.latency_ms for row in rows]
            colour = f"C{k}"
            axes.plot(x, y, color=colour, marker=_MARKERS[k % len(_MARKERS)], ms=5, lw=1.8, label=mode)
            axes.fill_between(x, low, high, color=colour, alpha=0.08, lw=0)
        axes.set(xlabel="latency from observation to chunk, ms", title=_title(results, env))
        axes.set_ylabel("success, % (band: interval of each point)" if on_success else score_name.replace("_", " "))
        if on_success:
            axes.set_ylim(-2, 102)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    write_text(path, out.getvalue())


def _title(results: Sequence[DelayResult], env: str) -> str:
    first = results[0]
    return f"{env}: jitter ±{first.jitter_ms:g} ms, {100 * first.drop:g} % lost, {first.episodes} episodes per point"
