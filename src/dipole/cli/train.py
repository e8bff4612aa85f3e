"""Train a diffusion or flow policy on demonstrations; an interrupted run goes on with --resume, exactly.

An option left out has its default, or, with --resume, the value the run was started with.
Several processes: torchrun --nproc-per-node 2 $(which dipole) train ...; the batch size is that of all together.

Examples:
  dipole train --data runs/demos --out runs/peg --minutes 1
  dipole train --data runs/demos --out runs/peg --env metaworld/peg-insert-side-v3 --steps 10000
  dipole train --data lerobot/pusht --out runs/pusht --policy unet --network down_dims=[64,128,256] --process vp-cosine
  dipole train --data lerobot/pusht --out runs/pusht --process vp-cosine --prediction v
  dipole train --data lerobot/pusht --out runs/pusht --policy unet --method sdp --pred-horizon 20
  dipole train --out runs/pusht --resume
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dipole.cli.words import table
from dipole.errors import DipoleError, unknown

if TYPE_CHECKING:
    from dipole.data import Episodes
    from dipole.policies import DiffusionPolicy
    from dipole.training import TrainConfig, TrainResult

NETWORKS = {"mlp": "mlp", "unet": "unet1d", "transformer": "transformer"}
# Streamed batches take long to decode, whatever their size: two are made ahead.
PREFETCH_STREAMED = 2
LEARNING_RATES = {"mlp": 2e-3, "unet": 3e-4, "transformer": 3e-4}


def _option(metavar: str, default: str | None = None) -> Any:
    # None stands for "the default, or on resumption as before"; the help tells the default itself.
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "")


@dataclass
class Args:
    """Options of `dipole train`."""

    out: Path
    """Folder of the run: new or empty, or with --resume the one to go on with."""
    data: Annotated[str | None, _option("PATH|NAME")] = None
    """Demonstrations: a dataset in any format dipole reads, or the name of one on the hub (lerobot/pusht)."""
    memory: Annotated[float | None, _option("GIB", "half of the machine's")] = None
    """Memory for decoded pictures; a LeRobot dataset with more is streamed from its files, 0 streams in any case."""
    resume: bool = False
    """Go on with the run in OUT."""
    env: Annotated[str | None, _option("ENV")] = None
    """Evaluate in this environment now and then, and keep the checkpoint that does best there."""
    policy: Annotated[str | None, _option("NAME", "mlp")] = None
    """Network: mlp (for state vectors), unet or transformer."""
    network: Annotated[tuple[str, ...] | None, _option("KEY=VALUE ...")] = None
    """Options of the network, e.g. width=768 num_blocks=4."""
    vision: Annotated[tuple[str, ...] | None, _option("KEY=VALUE ...")] = None
    """Image encoder and its options, e.g. name=resnet18."""
    method: Annotated[Literal["plain", "sdp"] | None, _option("plain|sdp", "plain")] = None
    """sdp trains a noise level for every position, so that the policy can stream (one short call per chunk)."""
    binary: Annotated[tuple[int, ...] | None, _option("INDEX ...")] = None
    """Binary actions, kept at a tenth of their size inside the policy: short warm starts (rti) can then flip them."""
    process: Annotated[str | None, _option("NAME", "flow; sdp: vp-cosine")] = None
    """Forward process: flow, vp-cosine, vp-linear, edm, ..."""
    prediction: Annotated[
        Literal["epsilon", "x0", "v", "velocity", "edm"] | None, _option("NAME", "the process's usual one")
    ] = None
    """What the network predicts. Noise (epsilon), usual in vp-*, is learnt slowly; v and x0 (LeRobot: sample) fast."""
    features: Annotated[tuple[str, ...] | None, _option("NAME ...", "all of the dataset")] = None
    """Observations to see."""
    obs_horizon: Annotated[int | None, _option("INT", "2")] = None
    """Observations given to the policy, To."""
    pred_horizon: Annotated[int | None, _option("INT", "16")] = None
    """Actions denoised at once, Tp."""
    action_horizon: Annotated[int | None, _option("INT", "8")] = None
    """Actions executed before the next chunk, Ta."""
    steps: Annotated[int | None, _option("INT", "10000")] = None
    """Updates."""
    minutes: Annotated[float | None, _option("FLOAT")] = None
    """Time to train for, instead of a number of updates: as many as a measurement at the start says will fit."""
    batch_size: Annotated[int | None, _option("INT", "512")] = None
    """Windows per update."""
    lr: Annotated[float | None, _option("FLOAT", "2e-3 for mlp, else 3e-4")] = None
    """Peak learning rate."""
    warmup: Annotated[float | None, _option("FLOAT", "0.02")] = None
    """Updates of linear warm-up; below 1 a share of all."""
    weight_decay: Annotated[float | None, _option("FLOAT", "1e-6")] = None
    """Weight decay."""
    ema_decay: Annotated[float | None, _option("FLOAT", "0.999")] = None
    """Decay of the averaged weights, which are the ones evaluated and saved."""
    precision: Annotated[Literal["auto", "fp32", "bf16"] | None, _option("auto|fp32|bf16", "auto")] = None
    """Of the loss; auto takes the faster one, measured at the start."""
    compile: bool = False
    """Compile the network: a minute or two at the start, then faster updates."""
    cuda_graph: bool = True
    """On a GPU, launch each update as one recorded CUDA graph."""
    val_fraction: Annotated[float | None, _option("FLOAT", "0.05")] = None
    """Share of the episodes held out to measure the loss on."""
    eval_every: Annotated[int | None, _option("INT", "four in all")] = None
    """Updates between two evaluations in the environment."""
    eval_episodes: Annotated[int | None, _option("INT", "20")] = None
    """Episodes of such an evaluation, on seeds that no final evaluation uses."""
    save_every: Annotated[int | None, _option("INT", "about one a minute")] = None
    """Updates between two saves for --resume."""
    seed: Annotated[int | None, _option("INT", "0")] = None
    """Seed of everything random."""
    threads: Annotated[int | None, _option("INT", "torch's choice")] = None
    """Threads of each process."""
    device: Annotated[Literal["auto", "cpu"] | None, _option("auto|cpu", "auto")] = None
    """auto takes a GPU if there is one."""
    track: Annotated[tuple[Literal["tensorboard", "wandb"], ...] | None, _option("tensorboard|wandb ...")] = None
    """Log there as well as to metrics.jsonl."""
    json: bool = False
    """Print the summary as one JSON document and nothing else."""


def run(args: Args) -> None:
    """Train, and say what to run next."""
    import torch

    from dipole.data import load
    from dipole.training import train

    out = args.out
    given = _given(args)
    options = given if not args.resume else {**_stored(out), **given}
    if "data" not in options:
        raise DipoleError("no demonstrations: give --data PATH (make some with `dipole collect`)")
    config = _train_config(options)
    memory = None if "memory" not in options else int(options["memory"] * 2**30)
    episodes = load(options["data"], stream=None, memory=memory)
    if episodes.is_streamed:
        config = replace(config, prefetch=PREFETCH_STREAMED)
        print("dipole: the pictures are streamed from their files (see --memory)", file=sys.stderr)
    torch.manual_seed(config.seed)
    policy = _make_policy(episodes, options)
    try:
        with _evaluation(options) as evaluate:
            result = train(policy, episodes, config, out, command=options, resume=args.resume, evaluate=evaluate)
    except KeyboardInterrupt:
        _say_how_to_resume(out)
        raise SystemExit(130) from None
    if _is_main():
        _print(result, options, args.json)


def _is_main() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def _given(args: Args) -> dict[str, Any]:
    """Return the options that were given, by name; the path of local data is made absolute."""
    skipped = ("out", "resume", "json")
    values = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in skipped}
    given = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}
    for flag, default in (("compile", False), ("cuda_graph", True)):
        if given[flag] == default:  # a flag that is left out is not given: --resume would take it back
            del given[flag]
    if args.data is not None and Path(args.data).exists():
        given["data"] = str(Path(args.data).resolve())
    return given


def _stored(out: Path) -> dict[str, Any]:
    """Return the options the run was started with."""
    from dipole.training.record import check_out, read_record

    check_out(out, resume=True)
    return dict(read_record(out)[0].get("command", {}))


def _train_config(options: Mapping[str, Any]) -> TrainConfig:
    from dipole.training import TrainConfig

    names = {field.name for field in fields(TrainConfig)} - {"track"}
    values = {name: value for name, value in options.items() if name in names}
    # A number of updates is the default only where no time is given.
    values["steps"] = options.get("steps", None if "minutes" in options else 10_000)
    values["lr"] = options.get("lr", LEARNING_RATES[_network_name(options)])
    return TrainConfig(**values, num_threads=options.get("threads"), track=tuple(options.get("track", ())))


def _network_name(options: Mapping[str, Any]) -> str:
    name: str = options.get("policy", "mlp")
    if name not in NETWORKS:
        raise unknown("policy", name, NETWORKS)
    return name


def _make_policy(episodes: Episodes, options: Mapping[str, Any]) -> DiffusionPolicy:
    from dipole.policies import make_config, make_policy
    from dipole.policies.config import ProcessConfig, default_objective
    from dipole.policies.streaming import StreamingTraining

    values: dict[str, Any]
    names = ("process", "obs_horizon", "pred_horizon", "action_horizon")
    values = {name: options[name] for name in names if name in options}
    network = {"name": NETWORKS[_network_name(options)], **table(options.get("network", ()), "--network", "width=768")}
    vision = table(options.get("vision", ()), "--vision", "name=resnet18")
    if options.get("method") == "sdp":
        values = {"process": "vp-cosine", **values, "streaming": StreamingTraining()}
    if "prediction" in options:
        usual = default_objective(ProcessConfig(values.get("process", "flow")))
        values["objective"] = replace(usual, prediction_type=options["prediction"])
    config = make_config(
        episodes, network=network, vision=vision or None, observation=options.get("features"), **values
    )
    policy = make_policy(config, episodes)
    if options.get("binary"):
        from dipole.realtime.rti import scale_discrete

        policy.normalizer = scale_discrete(policy.normalizer, tuple(options["binary"]))
    return policy


@contextmanager
def _evaluation(options: Mapping[str, Any]) -> Iterator[Callable[[Any], Mapping[str, float]] | None]:
    """Yield an evaluation in the environment, on the seeds set aside for choosing checkpoints; None without one."""
    if "env" not in options or not _is_main():
        yield None
        return
    from dipole.envs import make
    from dipole.envs.seeds import SELECT_SEED
    from dipole.evaluation.evaluate import evaluate
    from dipole.realtime import apply, default_runtime

    episodes = options.get("eval_episodes", 20)
    if episodes < 1:
        raise DipoleError(f"--eval-episodes {episodes}: at least one")
    env = make(options["env"], num_envs=min(16, episodes))

    def score(policy: Any) -> Mapping[str, float]:
        found = evaluate(apply(policy, default_runtime(policy)), env, episodes, SELECT_SEED, latency_calls=0)
        return {"score": found.score.value, "success": found.success.value, "length": found.length.value}

    try:
        yield score
    finally:
        env.close()


def _say_how_to_resume(out: Path) -> None:
    import shlex

    from dipole.training.checkpoint import load_state

    state = load_state(out / "training_state") if (out / "training_state").is_dir() else None
    if not _is_main():
        return
    if state is None:
        print("dipole: interrupted before the first update", file=sys.stderr)
        return
    command = shlex.join(["dipole", "train", "--out", str(out), "--resume"])
    print(f"dipole: interrupted and saved after update {state.step}; go on with:  {command}", file=sys.stderr)


def _print(result: TrainResult, options: Mapping[str, Any], as_json: bool) -> None:
    import json
    import shlex

    from dipole.serialization import to_dict

    env = options.get("env", "ENV")
    command = f"{shlex.join(['dipole', 'eval', str(result.out), '--env'])} {env}"
    if as_json:
        values = {**to_dict(result), "out": str(result.out), "next": command}
        print(json.dumps(values, indent=1))
        return
    held_out = "" if result.val_loss is None else f", held-out loss {result.val_loss:.4g}"
    print(
        f"{result.steps} updates in {result.seconds:.1f} s ({result.samples_per_s:.0f} windows/s, {result.precision}), "
        f"loss {result.loss:.4g}{held_out} -> {result.out}"
    )
    if result.best is not None:
        print(f"best checkpoint: update {result.best.step}, score {result.best.score:.4g}")
    print(f"next:  {command}")
