"""Distill a trained policy to one or two network calls per chunk: a new checkpoint of the same architecture.

The result is trained, evaluated and served like any other run. Whether it keeps the success is for `dipole eval` or
`dipole accelerate --distilled` to say. Interrupted, it goes on with --resume.

Methods: direct (land where the teacher's own steps do), consistency (jump to the end of the denoising path from
anywhere on it), shortcut (steps of every length, each from two of half its length), progressive (halve the number of
steps, again and again).

Examples:
  dipole distill runs/peg --out runs/peg-one
  dipole distill runs/peg --method shortcut --nfe 2 --minutes 5 --out runs/peg-two
  dipole distill runs/pusht --method progressive --teacher-steps 32 --steps 20000 --out runs/pusht-one
  dipole accelerate runs/peg --env metaworld/peg-insert-side-v3 --distilled runs/peg-one runs/peg-two
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from dipole.errors import DipoleError

if TYPE_CHECKING:
    from dipole.training import TrainResult


@dataclass
class Args:
    """Options of `dipole distill`."""

    run: tyro.conf.Positional[Path]
    """The teacher: a run folder (its best, else its last checkpoint), or a checkpoint folder."""
    out: Path
    """Folder of the new run."""
    method: Literal["direct", "consistency", "shortcut", "progressive"] = "direct"
    """How (see above)."""
    nfe: int = 1
    """Network calls per chunk of the student: 1, 2, 4, ..."""
    teacher_steps: int = 8
    """Steps of the teacher that are condensed, a power of two."""
    data: str | None = None
    """Demonstrations (default: those the teacher was trained on)."""
    steps: int | None = None
    """Updates (default 10000, if no --minutes are given)."""
    minutes: float | None = None
    """Time to train for, instead of a number of updates."""
    batch_size: int = 256
    """Windows per update."""
    lr: float = 3e-4
    """Peak learning rate."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are the ones saved."""
    seed: int = 0
    """Seed of everything random."""
    threads: int | None = None
    """Threads (default: torch's choice)."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU if there is one."""
    resume: bool = False
    """Go on with the run in OUT; give the other options as before."""
    json: bool = False
    """Print the summary as one JSON document and nothing else."""


def run(args: Args) -> None:
    """Distill, and say what to run next."""
    import torch

    from dipole.data import load
    from dipole.policies import load_policy
    from dipole.training import TrainConfig
    from dipole.training.distillation import distill
    from dipole.training.student import DistillConfig, make_student

    options = DistillConfig(args.method, args.nfe, args.teacher_steps)
    teacher = load_policy(args.run)
    make_student(teacher, options)  # a policy that cannot be distilled is refused before its data is read
    data = args.data or _data_of(args.run)
    config = TrainConfig(
        steps=args.steps if args.minutes is not None else args.steps or 10_000,
        minutes=args.minutes,
        batch_size=args.batch_size,
        lr=args.lr,
        ema_decay=args.ema_decay,
        seed=args.seed,
        num_threads=args.threads,
        device=args.device,
    )
    torch.manual_seed(config.seed)
    command = {"teacher": str(args.run), "data": data, "method": args.method, "nfe": args.nfe}
    result = distill(teacher, load(data), options, config, args.out, command=command, resume=args.resume)
    _print(result, args)


def _data_of(run: Path) -> str:
    """Return the demonstrations a run was trained on."""
    from dipole.serialization import read_json
    from dipole.training.record import RECORD

    if (run / RECORD).is_file():
        data = read_json(run / RECORD).get("command", {}).get("data")
        if data:
            return str(data)
    raise DipoleError(f"{run}: does not say which demonstrations it was trained on: give them with --data")


def _print(result: TrainResult, args: Args) -> None:
    import json
    import shlex

    from dipole.serialization import to_dict

    words: list[Any] = ["dipole", "accelerate", args.run, "--env", "ENV", "--distilled", result.out]
    command = shlex.join(str(word) for word in words)
    if args.json:
        print(json.dumps({**to_dict(result), "out": str(result.out), "next": command}, indent=1))
        return
    calls = "one network call" if args.nfe == 1 else f"{args.nfe} network calls"
    print(
        f"{args.method}: {calls} per chunk after {result.steps} updates in {result.seconds:.1f} s, "
        f"loss {result.loss:.4g} -> {result.out}"
    )
    print(f"next:  {command}")
