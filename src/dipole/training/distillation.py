"""Distillation: from a trained policy to one of the same architecture that needs one or two network calls.

    student = make_student(teacher, DistillConfig("consistency", nfe=1))
    distill(teacher, episodes, DistillConfig("shortcut", nfe=2), TrainConfig(minutes=1), "runs/fast")

What comes out is an ordinary checkpoint: another sampler, other weights. The methods are in `dipole.training.student`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dipole.data import Episodes, Windows
from dipole.evaluation.describe import digest
from dipole.policies.checkpoint import load_policy
from dipole.policies.diffusion_policy import DiffusionPolicy
from dipole.training.config import TrainConfig
from dipole.training.imitation import check_demonstrations, split_windows
from dipole.training.loop import fit
from dipole.training.record import RECORD, fingerprint
from dipole.training.result import Evaluate, TrainResult
from dipole.training.student import DistillConfig, StudentPolicy, make_student


def distill(
    teacher: DiffusionPolicy,
    episodes: Episodes,
    options: DistillConfig,
    config: TrainConfig,
    out: str | Path,
    *,
    command: Mapping[str, Any] | None = None,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Distill a policy; see `dipole.training.fit` for what is written to `out` and how it resumes.

    Args:
        teacher: The trained policy.
        episodes: The demonstrations it was trained on, or others of the task.
        options: Method and sizes.
        config: Training settings; with `progressive` its updates or minutes are shared out among the rounds, which are
            kept in `<out>-rounds`.
        out: Folder of the run.
        command: Kept in `train.json`.
        resume: Go on with that run.
        evaluate: Evaluation in an environment, called now and then.
        progress: Show a progress bar.

    Raises:
        DipoleError: Teacher and demonstrations do not fit, or as for `fit`.
    """
    out = Path(out)
    *before, final = _rounds(options)
    share = _share(config, len(before) + 1)
    for part in before:
        folder = out.with_name(f"{out.name}-rounds") / str(part.nfe)
        started = resume and (folder / RECORD).is_file()
        _fit(make_student(teacher, part), episodes, share, folder, command, started, None, progress)
        teacher = load_policy(folder / "checkpoints" / "last")
    started = resume and ((out / RECORD).is_file() or not before)  # `fit` says where there is nothing to resume
    return _fit(make_student(teacher, final), episodes, share, out, command, started, evaluate, progress)


def _rounds(options: DistillConfig) -> list[DistillConfig]:
    if options.method != "progressive":
        return [options]
    sizes = []
    steps = options.teacher_steps
    while steps > options.nfe:
        sizes.append(replace(options, nfe=steps // 2, teacher_steps=steps))
        steps //= 2
    return sizes


def _share(config: TrainConfig, rounds: int) -> TrainConfig:
    if config.steps is not None:
        return replace(config, steps=max(1, config.steps // rounds))
    return replace(config, minutes=(config.minutes or 0) / rounds)


def _fit(
    student: StudentPolicy,
    episodes: Episodes,
    config: TrainConfig,
    out: Path,
    command: Mapping[str, Any] | None,
    resume: bool,
    evaluate: Evaluate | None,
    progress: bool | None,
) -> TrainResult:
    keys = list(student.config.observation)
    check_demonstrations(student, episodes, keys)
    horizons = (student.obs_horizon, student.pred_horizon, student.action_horizon)
    source, held_out = split_windows(Windows(episodes, keys, "action", *horizons), config.val_fraction, config.seed)
    data = fingerprint(episodes, [*keys, "action"]) | {"teacher": digest(student._teacher.policy)}
    return fit(
        student, source, held_out, config, out,
        data=data, command=command, resume=resume, evaluate=evaluate, progress=progress,
    )  # fmt: skip
