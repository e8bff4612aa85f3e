"""Improve a policy by reinforcement learning in an environment; an interrupted run goes on with --resume, exactly.

Methods: dsrl steers a frozen policy by choosing its noise (fewest samples, when it can do the task now and then);
resip adds a small correction at every step (the last centimetre); expo goes on imitating and edits chunks (with
recorded data, --data); dppo tunes the denoising network (a fast simulator, many samples); reinflow does so for flow
policies; ddpo is dppo without a critic. An option left out has its default, or, with --resume, its former value.

Examples:
  dipole finetune dsrl runs/peg --env metaworld/peg-insert-side-v3 --out runs/peg-dsrl --env-steps 20000
  dipole finetune resip runs/slot --env micro/slot_peg --out runs/slot-resip --num-envs 64 --set steps=64 epochs=10
  dipole finetune expo runs/peg --env metaworld/peg-insert-side-v3 --data runs/demos --out runs/peg-expo
  dipole finetune dsrl runs/peg --out runs/peg-dsrl --resume
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dipole.errors import DipoleError

if TYPE_CHECKING:
    from dipole.rl.settings import FinetuneConfig, FinetuneResult


def _option(metavar: str, default: str | None = None) -> Any:
    # None stands for "the default, or on resumption as before"; the help tells the default itself.
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "")


@dataclass
class Args:
    """Options of `dipole finetune`."""

    method: tyro.conf.Positional[str]
    """dppo, ddpo, reinflow, dsrl, expo, find or resip."""
    run: tyro.conf.Positional[Path]
    """Run or checkpoint folder of the policy to improve; it is left as it is."""
    out: Path
    """Folder of the new run: new or empty, or with --resume the one to go on with."""
    env: Annotated[str | None, _option("ENV")] = None
    """Environment (see `dipole env list`)."""
    resume: bool = False
    """Go on with the run in OUT."""
    env_steps: Annotated[int | None, _option("INT", "100000")] = None
    """Env steps to take in all."""
    num_envs: Annotated[int | None, _option("INT", "8")] = None
    """Environments run at once; they are part of the method: another number gives another result."""
    set: Annotated[tuple[str, ...] | None, _option("KEY=VALUE ...")] = None
    """Settings of the method, e.g. updates=20 noise_bound=1.5."""
    data: Annotated[str | None, _option("PATH|NAME")] = None
    """Recorded experience with rewards, for methods that use it (expo, dsrl)."""
    sampler: Annotated[str | None, _option("NAME")] = None
    """Sampler of the base in place of its own, e.g. ddim."""
    steps: Annotated[int | None, _option("INT")] = None
    """Denoising steps of the base in place of its own."""
    reward: Annotated[Literal["env", "success"] | None, _option("env|success", "env")] = None
    """The environment's own reward, or 1 at success."""
    step_penalty: Annotated[float | None, _option("FLOAT", "0")] = None
    """Subtracted from the reward of every env step."""
    eval_every: Annotated[int | None, _option("INT", "ten evaluations in all")] = None
    """Env steps between two evaluations."""
    eval_episodes: Annotated[int | None, _option("INT", "50")] = None
    """Episodes of an evaluation, on seeds that no final evaluation uses; 0 for none."""
    mode: Annotated[Literal["sync", "async", "native"] | None, _option("sync|async|native")] = None
    """How environments run at once: one after the other, or in worker processes (async)."""
    num_workers: Annotated[int | None, _option("INT", "one per processor")] = None
    """Worker processes of --mode async."""
    seed: Annotated[int | None, _option("INT", "0")] = None
    """Seed of everything random."""
    threads: Annotated[int | None, _option("INT", "torch's choice")] = None
    """Threads of this process."""
    track: Annotated[tuple[Literal["tensorboard", "wandb"], ...] | None, _option("tensorboard|wandb ...")] = None
    """Log there as well as to metrics.jsonl."""
    json: bool = False
    """Print the summary as one JSON document and nothing else."""


def run(args: Args) -> None:
    """Improve the policy, and say what to run next."""
    import torch

    from dipole.data import load
    from dipole.policies import load_policy
    from dipole.rl.finetune import finetune
    from dipole.rl.methods import make_config

    options = _given(args) if not args.resume else {**_stored(args.out, args.method), **_given(args)}
    if "env" not in options:
        raise DipoleError("no environment: give --env ENV (see `dipole env list`)")
    config = make_config(args.method, _table(options.get("set", ())))
    settings = _config(options)
    if options.get("threads") is not None:
        torch.set_num_threads(options["threads"])
    policy = _with_sampler(load_policy(args.run), options)
    offline = load(options["data"]) if "data" in options else None
    try:
        result = finetune(
            policy, options["env"], args.method, config, settings, args.out,
            offline=offline, command=options, resume=args.resume,
        )  # fmt: skip
    except KeyboardInterrupt:
        _say_how_to_resume(args)
        raise SystemExit(130) from None
    _print(result, options, args.json)


def _given(args: Args) -> dict[str, Any]:
    """Return the options that were given, by name; the path of local data is made absolute."""
    skipped = ("method", "run", "out", "resume", "json")
    values = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in skipped}
    given = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}
    if args.data is not None and Path(args.data).exists():
        given["data"] = str(Path(args.data).resolve())
    return given


def _stored(out: Path, method: str) -> dict[str, Any]:
    """Return the options the run was started with."""
    from dipole.rl.settings import read_record

    return dict(read_record(out, method).get("command", {}))


def _config(options: Mapping[str, Any]) -> FinetuneConfig:
    from dipole.rl.settings import FinetuneConfig

    names = {field.name for field in fields(FinetuneConfig)}
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in options.items() if name in names
    }
    return FinetuneConfig(**values)


def _table(words: list[str]) -> dict[str, Any]:
    """Return `key=value` words as a table; values are JSON, or else text."""
    import json

    table = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise DipoleError(f"--set {word}: expected key=value, such as updates=20")
        try:
            table[key] = json.loads(value)
        except json.JSONDecodeError:
            table[key] = value
    return table


def _with_sampler(policy: Any, options: Mapping[str, Any]) -> Any:
    """Return the base with the sampler asked for, as its own: it is stored with the result."""
    from dipole.evaluation.sweep import parse_sampler

    if "sampler" not in options and "steps" not in options:
        return policy
    steps = f":{options['steps']}" if "steps" in options else ""
    return policy.with_sampler(parse_sampler(f"{options.get('sampler', '')}{steps}", policy.sampler))


def _say_how_to_resume(args: Args) -> None:
    import shlex
    import sys

    words = ["dipole", "finetune", args.method, str(args.run), "--out", str(args.out), "--resume"]
    print(f"dipole: interrupted and saved; go on with:  {shlex.join(words)}", file=sys.stderr)


def _print(result: FinetuneResult, options: Mapping[str, Any], as_json: bool) -> None:
    import json
    import shlex

    from dipole.serialization import to_dict

    command = shlex.join(["dipole", "eval", str(result.out), "--env", options["env"]])
    if as_json:
        names = ("env_steps", "episodes", "seconds", "before", "after", "lost")
        values = {name: getattr(result, name) for name in names}
        print(json.dumps({**values, "out": str(result.out), "best": to_dict(result.best), "next": command}, indent=1))
        return
    print(f"{result.env_steps} env steps, {result.episodes} episodes in {result.seconds:.1f} s -> {result.out}")
    if result.before is not None and result.after is not None and result.best is not None:
        best = f"best {result.best.score:.4g} after {result.best.step} env steps"
        print(f"score on the seeds of choice: {result.before:.4g} before, {result.after:.4g} after, {best}")
    if result.lost["workers"]:
        lost = result.lost
        print(f"lost: {lost['workers']} times a worker died, with {lost['episodes']} episodes under way")
    print(f"next:  {command}")
