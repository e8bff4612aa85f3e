"""Write a policy for a robot without dipole (ONNX, torch.export, AOTInductor), or for LeRobot.

onnx, torch-export and aoti give a folder with the graphs of the policy, its constants and a small runner (numpy with
onnxruntime, or torch) that acts by itself. What was written is run and compared with the policy; where they differ by
more than --tolerance, nothing is written.

LeRobot's diffusion policy is a U-Net (with a ResNet for images) in a DDPM process, sampled by DDPM or DDIM with
`leading` spacing; a policy of another kind is refused. There --steps chooses that spacing and a number of steps: a
policy trained with another spacing acts a little differently with it, so evaluate it.

Examples:
  dipole export runs/peg --format onnx --out runs/peg-onnx
  dipole export runs/peg --format onnx --sampler ddim --steps 5 --unroll --out runs/peg-one-graph
  dipole export runs/peg --format aoti --out runs/peg-compiled
  dipole export runs/pusht --format lerobot --out runs/pusht-lerobot
  dipole export runs/pusht --format lerobot --sampler ddim --steps 10 --out runs/pusht-lerobot
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from dipole.errors import DipoleError


@dataclass
class Args:
    """Options of `dipole export`."""

    run: tyro.conf.Positional[Path]
    """Run folder (its best, else its last checkpoint), or a checkpoint folder."""
    out: Path
    """Folder to write; must not exist yet, or be empty."""
    format: Literal["lerobot", "onnx", "torch-export", "aoti"] = "lerobot"
    """Format of the folder."""
    sampler: str | None = None
    """Sampler in place of the policy's own (LeRobot knows ddim and ddpm)."""
    steps: int | None = None
    """Denoising steps in place of the policy's own (lerobot: with leading spacing)."""
    unroll: bool = False
    """onnx, torch-export, aoti: one graph with all denoising steps, for samplers that draw no noise."""
    tolerance: float = 1e-4
    """onnx, torch-export, aoti: largest difference from the policy, in normalised actions (whose range is about 2)."""
    json: bool = False
    """Print one JSON document and nothing else."""


def run(args: Args) -> None:
    """Export and say where."""
    from dipole.policies import load_policy

    if args.steps is not None and args.steps < 1:
        raise DipoleError(f"--steps {args.steps}: at least 1")
    policy = load_policy(args.run)
    if args.format == "lerobot":
        result = _lerobot(args, policy)
    else:
        result = _graphs(args, policy)
    if args.json:
        import json

        document = {"run": str(args.run), "out": str(args.out), "format": args.format, **result}
        print(json.dumps(document, indent=1))


def _chosen(args: Args, policy: Any, **changes: Any) -> Any:
    """Return the policy with the sampler and steps asked for."""
    sampler = getattr(policy, "sampler", None)
    if (args.sampler is None and args.steps is None) or sampler is None:
        return policy
    changes |= {"name": args.sampler or sampler.name, "num_steps": args.steps or sampler.num_steps}
    if args.sampler is not None:
        changes["eta"] = None
    changed = replace(sampler, **changes)
    changed.build()  # an unknown name is reported here
    return policy.with_sampler(changed)


def _lerobot(args: Args, policy: Any) -> dict[str, Any]:
    from dipole.policies import to_lerobot

    if args.unroll:
        raise DipoleError("--unroll: a LeRobot folder holds no graphs, leave it out")
    folder = to_lerobot(_chosen(args, policy, spacing="leading", eta=None), args.out)
    if not args.json:
        print(f"{args.run} -> {folder}: a LeRobot 0.4.4 policy")
    return {}


def _graphs(args: Args, policy: Any) -> dict[str, Any]:
    from dipole.realtime.export import export

    if not args.tolerance > 0:
        raise DipoleError(f"--tolerance {args.tolerance:g}: it must be above 0")
    parity = export(_chosen(args, policy), args.out, args.format, unroll=args.unroll, tolerance=args.tolerance)
    if not args.json:
        print(f"{args.run} -> {args.out}: {args.format}, runs with {args.out / 'runner.py'}")
        print(
            f"largest difference from the policy: {parity['max_difference']:.2g} in normalised actions "
            f"({parity['max_difference_physical']:.2g} in physical units; tolerance {parity['tolerance']:g})"
        )
    return {"parity": parity}
