"""Find the fastest way to run a policy that still does its job, and keep it as runtime.json beside the weights.

Tries samplers and numbers of steps, warm starts, the block cache, distilled checkpoints and other back ends; all play
the same episodes, the worse half is left out after every round. Prints a table, draws the front of score against
latency, and checks the choice against the reference on fresh seeds. `dipole eval` and `dipole serve` obey the file from
then on; remove it to run the policy as it was trained. Interrupted, the same command goes on where it was.

Examples:
  dipole accelerate runs/peg --env metaworld/peg-insert-side-v3
  dipole accelerate runs/peg --env metaworld/peg-insert-side-v3 --target-ms 2
  dipole accelerate runs/pusht --env pusht --max-drop 0.01 --episodes 192 --distilled runs/pusht-one
  dipole accelerate runs/peg --env metaworld/peg-insert-side-v3 --samplers euler:1 euler:2 --backends packed --json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from dipole.realtime.selection import SearchConfig


@dataclass
class Args:
    """Options of `dipole accelerate`."""

    run: tyro.conf.Positional[Path]
    """Run folder (its best, else its last checkpoint), or a checkpoint folder."""
    env: str
    """Environment to do well in (see `dipole env list`)."""
    target_ms: float | None = None
    """Choose the best score among candidates that take at most this per chunk (95th percentile)."""
    max_drop: float = 0.02
    """Without a target: choose the fastest candidate whose score is at most this much below the reference's."""
    episodes: int = 96
    """Episodes of the last round, and of the confirmation."""
    seed: int = 0
    """Which seeds: episodes are the same in every repetition. Timings are not."""
    samplers: tuple[str, ...] = ()
    """Samplers to try, written name:steps, in place of the usual ones."""
    distilled: tuple[Path, ...] = ()
    """Checkpoints from `dipole distill` to try as well."""
    backends: tuple[str, ...] | None = None
    """Back ends to try besides eager, in place of all (none: give the option without a name)."""
    confirm: bool = True
    """Play the choice against the reference on fresh seeds."""
    num_envs: int = 16
    """Environments run at once. Does not change the result."""
    max_steps: int | None = None
    """Longest episode in env steps, in place of the environment's own."""
    mode: Literal["sync", "async", "native"] | None = None
    """How environments run at once."""
    device: str = "cpu"
    """Where the policy runs: cpu or cuda."""
    out: Path | None = None
    """Folder for accelerate.json, front.png, front.html and what is needed to go on (default RUN/accelerate)."""
    fresh: bool = False
    """Start again instead of going on with an earlier search in the folder."""
    json: bool = False
    """Print one JSON document and nothing else."""


def run(args: Args) -> None:
    """Search, save, print."""
    import sys

    from dipole.envs import make
    from dipole.evaluation.progress import EpisodeBar
    from dipole.policies.checkpoint import find_policy
    from dipole.realtime.accelerate import accelerate, forget

    config = _config(args)
    find_policy(args.run)  # a wrong path is reported before an environment is made
    out = args.run / "accelerate" if args.out is None else args.out
    if args.fresh:
        forget(out)
    env = make(args.env, num_envs=max(1, min(args.num_envs, args.episodes)), mode=args.mode)
    bars: list[EpisodeBar] = []

    def progress(total: int) -> EpisodeBar:
        bars.append(EpisodeBar(total, "episodes"))
        return bars[-1].__enter__()

    def say(line: str) -> None:
        print(f"dipole accelerate: {line}", file=sys.stderr, flush=True)

    try:
        document = accelerate(args.run, env, config, out, device=args.device, progress=progress, say=say)
    finally:
        for bar in bars:
            bar.__exit__()
        env.close()
    _report(document, out, args.json)


def _config(args: Args) -> SearchConfig:
    from dipole.realtime.selection import SearchConfig

    return SearchConfig(
        episodes=args.episodes,
        seed=args.seed,
        target_ms=args.target_ms,
        max_drop=args.max_drop,
        samplers=args.samplers or None,
        distilled=tuple(str(path) for path in args.distilled),
        backends=args.backends,
        max_steps=args.max_steps,
        confirm=args.confirm,
    )


def _report(document: dict[str, Any], out: Path, as_json: bool) -> None:
    import json
    import sys

    from dipole.errors import MissingExtraError
    from dipole.realtime.front import PICTURE, draw, write_page

    try:
        draw(document, out / PICTURE)
    except MissingExtraError as error:
        print(f"dipole accelerate: no picture: {error}", file=sys.stderr)
    page = write_page(document, out)
    if as_json:
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        _print(document, page)


def _print(document: dict[str, Any], page: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from dipole.realtime.front import HEADS, cells, ordered, sentences

    table = Table(*HEADS)
    table.columns[0].no_wrap = True
    for row in ordered(document["rows"]):
        style = "bold" if row["name"] == document["chosen"] else "dim" if row["problem"] else None
        table.add_row(*cells(row, document), style=style)
    Console().print(table)
    for line in sentences(document):
        print(line)
    print(f"saved in {document['runtime']}, page in {page}")
