"""Improve a policy by reinforcement learning in an environment; an interrupted run goes on with --resume, exactly.

Methods: dsrl steers a frozen policy by choosing its noise (fewest samples, when it can do the task now and then); find
does so with one Gaussian of noise for the whole task, whatever the state (very few samples, and a task with one good
way); resip adds a small correction at every step (the last centimetre); expo goes on imitating and edits chunks (with
recorded data, --data); dppo tunes the denoising network (a fast simulator, many samples); reinflow does so for flow
policies; ddpo is dppo without a critic. dppo, ddpo and reinflow follow PPO (direction=adam) or, with --set direction=pg
or npg, npg-igt, n-harpg, harpg, one step per iteration of that kind and of a length set by length=; find takes npg and
npg-igt. An option left out has its default, or, with --resume, its former value.

At the end base and result play the same unseen episodes, and OUT/report.html says what came of it (`dipole report OUT`
writes it again).

Examples:
  dipole finetune dsrl runs/peg --env metaworld/peg-insert-side-v3 --out runs/peg-dsrl --env-steps 20000
  dipole finetune resip runs/slot --env micro/slot_peg --out runs/slot-resip --num-envs 64 --set steps=64 epochs=10
  dipole finetune expo runs/peg --env metaworld/peg-insert-side-v3 --data runs/demos --out runs/peg-expo
  dipole finetune find runs/two --env micro/two_goal --out runs/two-find --set lr=0.02
  dipole finetune dppo runs/two --env micro/two_goal --out runs/two-igt --set direction=npg-igt length=0.1
  dipole finetune resip runs/peg --env metaworld/peg-insert-side-v3 --out runs/peg-resip --rollouts ray --num-workers 16
  dipole finetune dsrl runs/peg --out runs/peg-dsrl --resume
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dipole.cli.words import env_options, table
from dipole.errors import DipoleError

if TYPE_CHECKING:
    from dipole.evaluation.compare import Comparison
    from dipole.rl.settings import FinetuneConfig, FinetuneResult

REPORT_EPISODES, VIDEOS = 50, 4


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
    report_episodes: Annotated[int | None, _option("INT", str(REPORT_EPISODES))] = None
    """Unseen episodes that base and result play at the end, for the report; 0 for none."""
    videos: Annotated[int | None, _option("INT", str(VIDEOS))] = None
    """Film this many of them (the first ones), base and result; none where the machine cannot render."""
    max_steps: Annotated[int | None, _option("INT")] = None
    """Longest episode in env steps, in place of the environment's own."""
    env_options: Annotated[tuple[str, ...] | None, _option("KEY=VALUE ...")] = None
    """Options of the environment, e.g. randomise=1 for pictures that vary."""
    mode: Annotated[Literal["sync", "async", "native"] | None, _option("sync|async|native")] = None
    """How environments run at once: one after the other, or in worker processes (async)."""
    rollouts: Annotated[Literal["local", "ray"] | None, _option("local|ray", "local")] = None
    """Environments on this machine, or in workers of a Ray cluster; the results are the same."""
    num_workers: Annotated[int | None, _option("INT", "one per processor")] = None
    """Worker processes of --mode async, or workers of --rollouts ray (at most; of one processor each)."""
    ray_address: Annotated[
        str | None, _option("HOST:PORT", "RAY_ADDRESS, or else a cluster of this run on this machine")
    ] = None
    """The Ray cluster; this machine must be one of its nodes."""
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
    import contextlib
    import sys

    import torch

    from dipole.data import load
    from dipole.policies import load_policy
    from dipole.rl.finetune import finetune
    from dipole.rl.methods import make_config

    options = _given(args) if not args.resume else _merged(_stored(args.out, args.method), _given(args))
    if "env" not in options:
        raise DipoleError("no environment: give --env ENV (see `dipole env list`)")
    config = make_config(args.method, table(options.get("set", ()), "--set", "updates=20"))
    settings = _config(options)
    if options.get("threads") is not None:
        torch.set_num_threads(options["threads"])
    policy = _with_sampler(load_policy(args.run), options)
    offline = load(options["data"]) if "data" in options else None
    try:
        # Simulators and Ray print what they like; stdout is for the summary.
        with contextlib.redirect_stdout(sys.stderr):
            result = finetune(
                policy, options["env"], args.method, config, settings, args.out,
                offline=offline, env_options=_env_options(options),
                command={**options, "run": str(args.run), "out": str(args.out)}, resume=args.resume,
            )  # fmt: skip
        comparison = _review(policy, result, options)
    except KeyboardInterrupt:
        _say_how_to_resume(args)
        raise SystemExit(130) from None
    _print(result, comparison, _write_report(args.out), options, args.json)


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

    command = dict(read_record(out, method).get("command", {}))
    return {name: value for name, value in command.items() if name not in ("run", "out")}


def _merged(stored: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a resumption; where environments run is chosen as a whole."""
    if "mode" in given or "rollouts" in given:
        given = {**dict.fromkeys(("mode", "rollouts", "num_workers", "ray_address")), **given}
    return {**stored, **given}


def _config(options: Mapping[str, Any]) -> FinetuneConfig:
    from dipole.rl.settings import FinetuneConfig

    names = {field.name for field in fields(FinetuneConfig)}
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in options.items() if name in names
    }
    if options.get("rollouts") == "ray":
        if values.get("mode") is not None:
            raise DipoleError(f"--mode {values['mode']} is for environments on this machine: not with --rollouts ray")
        values["mode"] = "ray"
    return FinetuneConfig(**values)


def _with_sampler(policy: Any, options: Mapping[str, Any]) -> Any:
    """Return the base with the sampler asked for, as its own: it is stored with the result."""
    from dipole.evaluation.sweep import parse_sampler

    if "sampler" not in options and "steps" not in options:
        return policy
    steps = f":{options['steps']}" if "steps" in options else ""
    return policy.with_sampler(parse_sampler(f"{options.get('sampler', '')}{steps}", policy.sampler))


def _env_options(options: Mapping[str, Any]) -> dict[str, Any]:
    given = env_options(options.get("env_options", ()), options["env"])
    return {name: options[name] for name in ("max_steps",) if name in options} | given


def _review(policy: Any, result: FinetuneResult, options: Mapping[str, Any]) -> Comparison | None:
    """Let base and result play unseen episodes."""
    from dipole.evaluation.progress import EpisodeBar
    from dipole.rl.review import review

    episodes, videos = options.get("report_episodes", REPORT_EPISODES), options.get("videos", VIDEOS)
    if not episodes:
        return None
    with EpisodeBar(2 * episodes, "base and result") as bar:
        return review(
            policy, result.out, options["env"], episodes,
            videos=min(videos, episodes), mode=options.get("mode"), env_options=_env_options(options), progress=bar,
        )  # fmt: skip


def _write_report(out: Path) -> Path | None:
    """Write the page; None, with a line on stderr, where what draws it is not installed."""
    import sys

    from dipole.errors import MissingExtraError
    from dipole.evaluation.report import write_report

    try:
        return write_report(out)
    except MissingExtraError as error:
        print(f"dipole finetune: no report: {error}", file=sys.stderr)
        return None


def _say_how_to_resume(args: Args) -> None:
    import shlex
    import sys

    words = ["dipole", "finetune", args.method, str(args.run), "--out", str(args.out), "--resume"]
    print(f"dipole: interrupted and saved; go on with:  {shlex.join(words)}", file=sys.stderr)


def _print(
    result: FinetuneResult, comparison: Comparison | None, page: Path | None, options: Mapping[str, Any], as_json: bool
) -> None:
    import json
    import shlex

    from dipole.serialization import to_dict

    command = shlex.join(["dipole", "eval", str(result.out), "--env", options["env"]])
    if as_json:
        names = ("env_steps", "episodes", "seconds", "updates", "before", "after", "lost")
        values = {name: getattr(result, name) for name in names}
        values |= {"out": str(result.out), "best": to_dict(result.best), "comparison": to_dict(comparison)}
        print(json.dumps({**values, "report": None if page is None else str(page), "next": command}, indent=1))
        return
    print(f"{result.env_steps} env steps, {result.episodes} episodes in {result.seconds:.1f} s -> {result.out}")
    if result.before is not None and result.after is not None and result.best is not None:
        best = f"best {result.best.score:.4g} after {result.best.step} env steps"
        print(f"score on the seeds of choice: {result.before:.4g} before, {result.after:.4g} after, {best}")
    if result.lost["workers"]:
        lost, times = result.lost, "once" if result.lost["workers"] == 1 else f"{result.lost['workers']} times"
        print(f"lost: {lost['episodes']} episodes under way ({lost['env_steps']} env steps), as {times} a worker died")
    if comparison is not None:
        print(f"on unseen episodes: {comparison.verdict}")
    if page is not None:
        print(f"report: {page}")
    print(f"next:  {command}")
