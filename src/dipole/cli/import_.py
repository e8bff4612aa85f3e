"""Take over a policy of LeRobot: its `diffusion` policies of every version become a policy folder of dipole's.

The folder acts as the original does, and works wherever a checkpoint does: dipole eval, compare, export and so on.
The statistics are read from the processor files, or (LeRobot 0.3 and earlier) from the weights.

Examples:
  dipole import lerobot/diffusion_pusht --out runs/pusht
  dipole import lerobot/diffusion_pusht --revision main --out runs/pusht --fps 10
  dipole import outputs/train/my_run/checkpoints/last/pretrained_model --out runs/mine
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from dipole.errors import DipoleError


@dataclass
class Args:
    """Options of `dipole import`."""

    checkpoint: tyro.conf.Positional[str]
    """A pretrained_model folder, a run folder around it, or ORGANISATION/NAME on the Hugging Face Hub."""
    out: Path
    """Policy folder to write; must not exist yet."""
    revision: str | None = None
    """Commit, branch or tag on the Hub."""
    fps: float = 10.0
    """Control rate of the demonstrations in Hz: LeRobot does not store it with a policy."""
    task: str = ""
    """What the policy does, in words."""
    json: bool = False
    """Print one JSON document and nothing else."""


def run(args: Args) -> None:
    """Import, save, print."""
    from dipole.policies import from_lerobot, save_policy

    if args.out.exists():
        raise DipoleError(f"{args.out} exists: choose another folder")
    policy = from_lerobot(args.checkpoint, args.revision, fps=args.fps, task=args.task)
    save_policy(policy, args.out)
    config = policy.config
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    if args.json:
        import json

        from dipole.serialization import to_dict

        document = {"source": config.source, "out": str(args.out), "parameters": parameters, "config": to_dict(config)}
        print(json.dumps(document, indent=1))
        return
    print(f"{args.checkpoint} -> {args.out}: {parameters / 1e6:.1f} M parameters")
    for key, feature in {**config.observation, "action": config.action}.items():
        print(f"  {key} {list(feature.shape)}, {config.normalization_mode(key)}")
    print(f"  To {config.obs_horizon}, Tp {config.pred_horizon}, Ta {config.action_horizon}")
    print(f"  {config.process.name}, {config.sampler.name}-{config.sampler.num_steps}")
