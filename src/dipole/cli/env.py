"""List environments, or show one.

Examples:
  dipole env list
  dipole env list --match metaworld --json
  dipole env show pusht
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro


@dataclass
class List:
    """List the environments: name, whether a scripted expert can demonstrate it, and its task."""

    match: str = ""
    """Only names that contain this."""
    json: bool = False
    """Print one JSON document and nothing else."""


@dataclass
class Show:
    """Build one environment and show its observations, actions and limits."""

    name: Annotated[str, tyro.conf.Positional]
    """Name of the environment."""
    json: bool = False
    """Print one JSON document and nothing else."""


@dataclass
class Args:
    """Options of `dipole env`."""

    command: Annotated[
        Annotated[List, tyro.conf.subcommand("list", prefix_name=False)]
        | Annotated[Show, tyro.conf.subcommand("show", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]


def run(args: Args) -> None:
    """Print the list or the description."""
    if isinstance(args.command, Show):
        _show(args.command)
    else:
        _list(args.command)


def _list(args: List) -> None:
    from dipole.envs.registry import has_expert, is_native, tasks

    rows = [
        {"name": name, "expert": has_expert(name), "kind": "numpy" if is_native(name) else "simulator", "task": task}
        for name, task in tasks().items()
        if args.match in name
    ]
    if args.json:
        _print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "kind", "expert", "task")
    for row in rows:
        table.add_row(str(row["name"]), str(row["kind"]), "yes" if row["expert"] else "", str(row["task"]))
    Console().print(table)


def _show(args: Show) -> None:
    from dipole.envs.registry import has_expert, is_native, make

    env = make(args.name)
    spec = env.spec
    env.close()
    features = {**spec.observation, "action": spec.action}
    facts = {
        "name": spec.name,
        "task": spec.task,
        "expert": has_expert(spec.name),
        "kind": "numpy" if is_native(spec.name) else "simulator",
        "features": {
            key: {"dtype": f.dtype, "shape": list(f.shape), "names": list(f.names) if f.names else None}
            for key, f in features.items()
        },
        "action_low": spec.action_low.tolist(),
        "action_high": spec.action_high.tolist(),
        "max_steps": spec.max_steps,
        "fps": spec.fps,
        "score": spec.score,
    }
    if args.json:
        _print_json(facts)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for key, value in facts.items():
        if key != "features":
            table.add_row(key, str(value))
    for key, feature in features.items():
        names = f"  ({', '.join(feature.names)})" if feature.names else ""
        table.add_row(key, f"{feature.dtype} {list(feature.shape)}{names}")
    Console().print(table)


def _print_json(document: Any) -> None:
    import json

    print(json.dumps(document, indent=1))
