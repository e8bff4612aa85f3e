"""From nothing to an evaluated policy and a report: collect demonstrations, train, evaluate, compare samplers.

Every stage is kept: an interrupted demo goes on where it stopped, a finished one only writes its report again.

Examples:
  dipole demo
  dipole demo --env metaworld/pick-place-v3 --out runs/pick-place
  dipole demo --minutes 3 --episodes 100 --out runs/longer
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipole.errors import DipoleError

if TYPE_CHECKING:
    from dipole.envs.spec import VectorEnv
    from dipole.policies import DiffusionPolicy, SamplerConfig

STATE = "demo.json"
NUM_ENVS = 10
LATENCY_CALLS = 15  # DDPM's hundred steps are slow to time


@dataclass
class Args:
    """Options of `dipole demo`."""

    out: Path = Path("runs/demo")
    """Folder of the run; the demonstrations go beside it, into OUT-data."""
    env: str = "metaworld/peg-insert-side-v3"
    """Environment with a scripted expert (`dipole env list`)."""
    episodes: int = 60
    """Demonstrations to collect."""
    noise: float = 0.1
    """Noise on the expert's executed actions, so that the policy sees how to come back."""
    minutes: float = 1.0
    """Training time."""
    eval_episodes: int = 50
    """Unseen episodes to evaluate on."""
    videos: int = 4
    """Episodes to film (the first ones, not the best); none where the machine cannot render."""
    seed: int = 0
    """Seed of demonstrations and training."""
    restart: bool = False
    """Throw away what OUT and OUT-data hold and begin again."""
    json: bool = False
    """Print the summary as one JSON document and nothing else."""


def run(args: Args) -> None:
    """Run every stage that has not been run yet, then write the report."""
    from dipole.evaluation.report import write_report

    begin = time.monotonic()
    _prepare(args)
    with _stage("demonstrations"):
        _demonstrations(args)
    with _stage("training"):
        policy = _policy(args)
    with _environment(args) as env:
        with _stage("evaluation"):
            _evaluation(args, policy, env)
        with _stage("samplers"):
            _samplers(args, policy, env)
    _summary(args, time.monotonic() - begin)
    page = write_report(args.out)
    _print(args, page)


def _data(args: Args) -> Path:
    return args.out.with_name(args.out.name + "-data")


def _settings(args: Args) -> dict[str, Any]:
    """Return what decides the result, to refuse to go on with other settings."""
    free = ("out", "restart", "json", "videos")
    return {key: value for key, value in asdict(args).items() if key not in free}


def _prepare(args: Args) -> None:
    """Check the settings against those of an earlier demo in the same folder."""
    from dipole.envs.registry import has_expert
    from dipole.serialization import read_json, write_json

    if not has_expert(args.env):
        raise DipoleError(f"environment '{args.env}' has no scripted expert: 'dipole env list' shows which have one")
    state = _data(args) / STATE
    if args.restart:
        shutil.rmtree(args.out, ignore_errors=True)
        shutil.rmtree(_data(args), ignore_errors=True)
    if state.is_file():
        before = read_json(state)
        changed = [key for key, value in _settings(args).items() if before.get(key) != value]
        if changed:
            key = changed[0]
            raise DipoleError(
                f"{args.out} holds a demo with {key}={before.get(key)}, not {getattr(args, key)}: choose another "
                "--out, or --restart"
            )
        return
    for folder in (args.out, _data(args)):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DipoleError(f"{folder} is not empty: choose another --out, or --restart to empty it")
    write_json(state, _settings(args))


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Say on stderr what is being done and how long it took."""
    begin = time.monotonic()
    print(f"dipole demo: {name} ...", file=sys.stderr, flush=True)
    yield
    print(f"dipole demo: {name} done in {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)


def _demonstrations(args: Args) -> None:
    from dipole.data.formats import lerobot
    from dipole.envs import collect

    folder = _data(args) / "demonstrations"
    if folder.exists():
        return
    episodes = collect(args.env, args.episodes, noise=args.noise, seed=args.seed, num_envs=2)
    lerobot.write(episodes, folder)


def _policy(args: Args) -> DiffusionPolicy:
    """Train, or go on training, or load what was trained."""
    import torch

    from dipole.data import load
    from dipole.policies import load_policy, make_config, make_policy
    from dipole.training import TrainConfig, train
    from dipole.training.record import RECORD

    episodes = load(_data(args) / "demonstrations")
    torch.manual_seed(args.seed)
    policy = make_policy(make_config(episodes, network="mlp", process="flow"), episodes)
    config = TrainConfig(steps=None, minutes=args.minutes, lr=2e-3, seed=args.seed)
    train(policy, episodes, config, args.out, resume=(args.out / RECORD).exists())
    trained: DiffusionPolicy = load_policy(args.out)
    return trained


@contextmanager
def _environment(args: Args) -> Iterator[VectorEnv]:
    from dipole.envs import make
    from dipole.envs.registry import is_native

    rows = min(NUM_ENVS, args.eval_episodes)
    env = make(args.env, rows, mode="native" if is_native(args.env) else "async")
    try:
        yield env
    finally:
        env.close()


def _evaluation(args: Args, policy: DiffusionPolicy, env: VectorEnv) -> None:
    from dipole.evaluation.chain import record_chain, save_chain
    from dipole.evaluation.evaluate import FILE, evaluate

    if (args.out / FILE).exists():
        return
    from dipole.envs.seeds import EVAL_SEED

    evaluation = evaluate(policy, env, episodes=args.eval_episodes, videos=args.videos, folder=args.out)
    save_chain(args.out, record_chain(policy, env, EVAL_SEED))
    evaluation.save(args.out / FILE)


def demo_samplers() -> list[SamplerConfig]:
    """Return the samplers compared: one network, sampled as a flow and, by matching noise levels, as a DDPM."""
    from dipole.policies import ProcessConfig, SamplerConfig

    vp = ProcessConfig("vp-cosine")
    return [
        SamplerConfig("ddpm", 100, clip=1.0, process=vp),
        SamplerConfig("ddim", 10, clip=1.0, process=vp),
        *(SamplerConfig("euler", steps) for steps in (10, 5, 3, 1)),
    ]


def _samplers(args: Args, policy: DiffusionPolicy, env: VectorEnv) -> None:
    from dipole.evaluation.sweep import FILE, save_sweep, sweep

    if (args.out / FILE).exists():
        return
    results = sweep(policy, env, demo_samplers(), episodes=args.eval_episodes, latency_calls=LATENCY_CALLS)
    save_sweep(args.out, results)


def _summary(args: Args, seconds: float) -> None:
    from dipole.evaluation.report_data import SUMMARY
    from dipole.serialization import write_json

    path = args.out / SUMMARY
    if path.exists():
        return
    data = _data(args) / "demonstrations"
    write_json(
        path,
        {
            "title": "",
            "commands": [
                f"dipole collect {args.env} --episodes {args.episodes} --noise {args.noise} --out {data}",
                f"dipole train --data {data} --out {args.out} --minutes {args.minutes} --lr 2e-3",
                f"dipole eval {args.out} --env {args.env} --episodes {args.eval_episodes} --videos {args.videos}",
                f"dipole report {args.out}",
            ],
            "data": {"demonstrations": f"{args.episodes} by a scripted expert, noise {args.noise} on its actions"},
            "training": _training_facts(args),
            "total_seconds": round(seconds, 1),
            "finished": time.strftime("%Y-%m-%d %H:%M"),
        },
    )


def _training_facts(args: Args) -> dict[str, Any]:
    from dipole.serialization import read_json
    from dipole.training.record import RECORD

    plan = read_json(args.out / RECORD)["plan"]
    return {"time asked for": f"{args.minutes} minutes", "updates": plan["steps"], "precision": plan["precision"]}


def _print(args: Args, page: Path) -> None:
    import json

    from dipole.evaluation.evaluate import FILE, load_evaluation
    from dipole.evaluation.report_data import SUMMARY
    from dipole.serialization import read_json

    evaluation = load_evaluation(args.out / FILE)
    success = evaluation.success
    seconds = read_json(args.out / SUMMARY)["total_seconds"]
    if args.json:
        values = {"run": str(args.out), "report": str(page), "seconds": seconds, "success": asdict(success)}
        print(json.dumps(values, indent=1))
        return
    print(
        f"{args.env}: success {success.value:.0%} ({success.low:.0%} to {success.high:.0%}, "
        f"{evaluation.num_episodes} unseen episodes), {seconds:.0f} s in all\nreport: {page}"
    )
