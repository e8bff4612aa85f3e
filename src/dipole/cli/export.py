"""Write a policy for LeRobot: a folder that LeRobot 0.4.4 loads and that acts as the policy does.

LeRobot's diffusion policy is a U-Net (with a ResNet for images) in a DDPM process, sampled by DDPM or DDIM with
`leading` spacing; a policy of another kind is refused. --steps chooses that spacing and a number of steps: a
policy trained with another spacing acts a little differently with it, so evaluate it.

Examples:
  dipole export runs/pusht --format lerobot --out runs/pusht-lerobot
  dipole export runs/pusht --format lerobot --sampler ddim --steps 10 --out runs/pusht-lerobot
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Args:
    """Options of `dipole export`."""

    run: tyro.conf.Positional[Path]
    """Run folder (its best, else its last checkpoint), or a checkpoint folder."""
    out: Path
    """Folder to write; must not exist yet, or be empty."""
    format: Literal["lerobot"] = "lerobot"
    """Format of the folder."""
    sampler: Literal["ddim", "ddpm"] | None = None
    """Sampler in place of the policy's own."""
    steps: int | None = None
    """Denoising steps in place of the policy's own, with leading spacing."""
    json: bool = False
    """Print one JSON document and nothing else."""


def run(args: Args) -> None:
    """Export and say where."""
    from dipole.errors import DipoleError
    from dipole.policies import load_policy, to_lerobot

    policy = load_policy(args.run)
    sampler = getattr(policy, "sampler", None)
    if (args.sampler is not None or args.steps is not None) and sampler is not None:
        if args.steps is not None and args.steps < 1:
            raise DipoleError(f"--steps {args.steps}: at least 1")
        changes = {"name": args.sampler or sampler.name, "num_steps": args.steps or sampler.num_steps, "eta": None}
        policy = policy.with_sampler(replace(sampler, spacing="leading", **changes))
    folder = to_lerobot(policy, args.out)
    if args.json:
        import json

        print(json.dumps({"run": str(args.run), "out": str(folder), "format": args.format}, indent=1))
        return
    print(f"{args.run} -> {folder}: a LeRobot 0.4.4 policy")
