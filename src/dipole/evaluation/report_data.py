"""What a report is made of: the files of a run folder, any of which may be missing.

RUN/summary.json      what was done, in words and numbers (see `Summary`)
RUN/train.json        settings of the training run, or RUN/config.json
RUN/metrics.jsonl     lines {"step", "loss", "val_loss"?, "lr", "samples_per_s", ...}
RUN/evaluation.json   from `dipole eval`
RUN/samplers.json     from `dipole eval --sweep`: a list of `SamplerResult`
RUN/chain.json        from `record_chain`: levels and chunks
RUN/videos/*.mp4      rollouts
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dipole.errors import DipoleError
from dipole.evaluation.chain import FILE as CHAIN
from dipole.evaluation.evaluate import FILE as EVALUATION
from dipole.evaluation.evaluate import VIDEOS, Evaluation, load_evaluation
from dipole.evaluation.sweep import FILE as SAMPLERS
from dipole.evaluation.sweep import SamplerResult
from dipole.evaluation.video import embed
from dipole.serialization import from_dict, read_json

SUMMARY = "summary.json"
MAX_VIDEOS = 9
MAX_VIDEO_BYTES = 3_000_000  # embedded, a page stays below about 30 MB


@dataclass(frozen=True)
class Summary:
    """`summary.json`: what a run did, written by the command that did it. Everything is optional.

    Attributes:
        title: Headline; default the task.
        commands: Shell commands that repeat the run, in order.
        data: Facts about the demonstrations, label to value (e.g. `{"demonstrations": "60 scripted episodes"}`).
        training: Facts about the training.
        total_seconds: Wall-clock time of everything.
        finished: When, as text.
    """

    title: str = ""
    commands: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    total_seconds: float | None = None
    finished: str = ""


@dataclass(frozen=True)
class Video:
    """A video to embed.

    Attributes:
        address: A `data:` address.
        caption: What it shows.
        success: Outcome; None for several episodes in one picture.
    """

    address: str
    caption: str
    success: bool | None


@dataclass(frozen=True)
class ReportData:
    """Everything in a report.

    Attributes:
        run: The run folder's name.
        summary: What was done.
        train: `train.json`, or `config.json`.
        metrics: Lines of the training log.
        evaluation: The evaluation.
        samplers: Rows of the sampler table, as `SamplerResult`.
        chain: A denoising chain.
        videos: Rollouts.
        missing: What is not there, and how to get it, in words.
    """

    run: str
    summary: Summary
    train: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    evaluation: Evaluation | None
    samplers: list[dict[str, Any]]
    chain: dict[str, Any] | None
    videos: list[Video]
    missing: tuple[str, ...]


def read_report_data(run: Path) -> ReportData:
    """Read what there is in a run folder.

    Raises:
        DipoleError: There is no such folder, or nothing in it to report on.
    """
    if not run.is_dir():
        raise DipoleError(f"{run}: no such folder: give the folder of a run")
    from dipole.training.tracking import METRICS, read_metrics  # imports accelerate: slow, and needed only here

    missing: list[str] = []

    def attempt(name: str, read: Callable[[], Any], default: Any, hint: str) -> Any:
        """Return what was read; a missing or damaged file is noted."""
        if not (run / name).exists():
            missing.append(f"{name} is not there: {hint}")
            return default
        try:
            return read()
        except (DipoleError, KeyError, TypeError, ValueError) as error:
            missing.append(f"{name} could not be read ({error})")
            return default

    evaluation = attempt(EVALUATION, lambda: load_evaluation(run / EVALUATION), None, "run  dipole eval RUN --env ENV")
    metrics = attempt(METRICS, lambda: read_metrics(run), [], "the training log")
    samplers = attempt(SAMPLERS, lambda: _samplers(run), [], "run  dipole eval RUN --env ENV --sweep ddim:2 ddim:10")
    chain = attempt(CHAIN, lambda: _chain(run), None, "a denoising chain; dipole eval writes it")
    summary = Summary()
    if (run / SUMMARY).exists():  # written by `dipole demo`; other runs are described by train.json
        summary = attempt(SUMMARY, lambda: from_dict(Summary, _complete(read_json(run / SUMMARY))), summary, "")
    train_file = "train.json" if (run / "train.json").exists() else "config.json"
    train = attempt(train_file, lambda: dict(read_json(run / train_file)), None, "settings of the training")
    videos = _videos(run, evaluation, missing)
    if evaluation is None and not metrics and not samplers and not videos and train is None:
        raise DipoleError(f"{run}: nothing to report on: give the folder of a run, or evaluate the policy first")
    return ReportData(run.resolve().name, summary, train, metrics, evaluation, samplers, chain, videos, tuple(missing))


def _complete(values: Any) -> Any:
    """Return the summary with defaults for keys it leaves out."""
    return {**vars(Summary()), **values} if isinstance(values, dict) else values


def _samplers(run: Path) -> list[dict[str, Any]]:
    rows = read_json(run / SAMPLERS)
    return [vars(from_dict(SamplerResult, row, f"{SAMPLERS}[{k}]")) for k, row in enumerate(rows)]


def _chain(run: Path) -> dict[str, Any]:
    chain = read_json(run / CHAIN)
    if len(chain["levels"]) != len(chain["samples"]) or not chain["samples"][0]:
        raise ValueError("levels and samples do not fit")
    return dict(chain)


def _videos(run: Path, evaluation: Evaluation | None, missing: list[str]) -> list[Video]:
    known = {str(video["file"]): video for video in (evaluation.videos if evaluation else ())}
    files = [run / name for name in known] or sorted((run / VIDEOS).glob("*.mp4"))
    grid = run / VIDEOS / "grid.mp4"
    if grid.exists() and len(known) > MAX_VIDEOS:
        files = [grid]
    videos = []
    for path in files[:MAX_VIDEOS]:
        if not path.is_file():
            missing.append(f"{path.name} is not there: run  dipole eval RUN --env ENV --videos N")
        elif path.stat().st_size > MAX_VIDEO_BYTES:
            missing.append(f"{path.name} is too large to embed: it is in {VIDEOS}/")
        else:
            facts = known.get(f"{VIDEOS}/{path.name}")
            videos.append(Video(embed(path), _caption(path, facts), None if facts is None else bool(facts["success"])))
    if not files:
        missing.append("videos are not there: run  dipole eval RUN --env ENV --videos 4")
    return videos


def _caption(path: Path, facts: dict[str, Any] | None) -> str:
    if facts is None:
        return path.stem.replace("_", " ")
    return f"{'success' if facts['success'] else 'failure'} after {facts['length']} steps\nseed {facts['seed']}"
