"""The policies that `equal_calls` compares: trained once per task and training seed, saved in the run folder.

They stand in a module of their own because a finished part of a run counts only while the source of its module is the
same: the comparison can then be changed without training again.

All see the same windows, up to the last frame of every demonstration; but for `student`, `mode` and `transformer`, in
the same number of updates of the same size:

- `base`: v prediction in the discrete levels of Diffusion Policy. Predicting the noise, as there, is learnt too slowly
  for this budget: on peg insertion, DDIM-8 then succeeded in half as many episodes;
- `flow`: flow matching;
- `streaming`: a noise level for every position (Streaming Diffusion Policy), two pieces;
- `student`: the base distilled to one network call, in a quarter as many updates again: each calls the teacher eight
  times, so they cost about what the base did. (A student of the method `consistency`, in twice that time, succeeded in
  2 % of the episodes on peg insertion, where one call of its teacher does in 58 %.)
- `beso`: BESO's preconditioned objective and low noise (Reuss et al. 2023), with the base's network;
- `mode`: MoDE, a small transformer whose experts are chosen by noise level and fused before sampling (Reuss et al.
  2024), in updates a quarter as large and half as many again;
- `transformer`: the base's objective with a small transformer, whose branches are worth caching. Its updates are a
  quarter as large, and four times as many. It is compared with itself only.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dipole.data import Episodes, Windows, load
from dipole.data.formats import lerobot
from dipole.envs import collect
from dipole.envs.seeds import COLLECT_SEED
from dipole.errors import DipoleError
from dipole.networks import MLPConfig, TransformerConfig, UNet1DConfig, full_config
from dipole.networks.moe import MoDEConfig
from dipole.policies import DiffusionPolicy, ObjectiveConfig, SamplerConfig, load_policy, make_config, make_policy
from dipole.policies.config import ProcessConfig
from dipole.policies.mode import make_mode
from dipole.policies.streaming import StreamingTraining
from dipole.systems.experiment import number_of_parameters
from dipole.systems.run import Job, Run
from dipole.training import TrainConfig, fit
from dipole.training.student import DistillConfig, make_student


@dataclass(frozen=True)
class Task:
    """What is imitated, and for how long.

    Attributes:
        env: Environment.
        steps: Updates of each policy.
        demonstrations: How many the scripted expert gives; 0 for the human ones of Push-T.
        noise: Of the expert's actions.
        options: Of the environment.
    """

    env: str
    steps: int
    demonstrations: int = 50
    noise: float = 0.1
    options: dict[str, Any] = field(default_factory=lambda: {"max_steps": 200})  # experts need about 100

    @property
    def name(self) -> str:
        """Return the name of the task's folder."""
        return self.env.rpartition("/")[2]


TASKS = (
    Task("pusht", 4000, demonstrations=0, noise=0.0, options={}),
    Task("metaworld/peg-insert-side-v3", 2000),
)
REACH = Task("metaworld/reach-v3", 600, demonstrations=25)
SEEDS = (0, 1, 2)
KINDS = ("base", "flow", "streaming", "beso", "mode", "transformer")
"""Policies that are trained besides the student."""
HUMAN = "pusht_human_206_lowdim.npz"

# Tp is one more than 16, so that beside the To - 1 = 1 past action two whole pieces of Ta fit in, as streaming needs.
TO, TP, TA = 2, 17, 8
NETWORKS: dict[str, Any] = {
    # levels are embedded narrowly: those of 17 positions side by side would else be most of the streaming network
    "mlp": MLPConfig(width=256, num_blocks=3, step_embed_dim=16),
    "transformer": TransformerConfig(width=64, num_layers=3, num_heads=4, dropout=0.0),
    "mode": MoDEConfig(
        embed_dim=64, num_layers=3, num_heads=4, attention_dropout=0.0, residual_dropout=0.0, expert_dropout=0.0
    ),
    "unet": UNet1DConfig(step_embed_dim=128),  # 63.5 million parameters on Push-T, as LeRobot builds it
}
TRAINING: dict[str, Any] = {
    "batch_size": 256,
    "lr": 1e-3,
    "ema_decay": 0.998,
    "precision": "bf16",
    "val_fraction": 0.0,
    "save_every": 10**9,  # a part is the unit that is resumed
    "num_threads": 1,
}
OTHERWISE: dict[str, dict[str, Any]] = {
    "transformer": {"batch_size": 64, "precision": "fp32"},  # bf16 is slower at this size
    "mode": {"batch_size": 64},
    "unet": {"batch_size": 16, "lr": 3e-4, "ema_decay": 0.99},
}
BESO = ProcessConfig("edm", sigma_min=0.05, sigma_max=1.0)
STUDENT = DistillConfig("direct", nfe=1, teacher_steps=8)
DDIM = SamplerConfig("ddim", 10, clip=1.0)


def demonstrations(task: Task, folder: str) -> Episodes:
    """Return what is imitated; those of an expert are read from where `collect_to` put them.

    Raises:
        DipoleError: The human demonstrations of Push-T are not on this machine.
    """
    return load(_human()) if task.env == "pusht" else load(folder)


def _human() -> Path:
    here, checkout = Path.cwd(), Path(__file__).resolve().parents[3]
    shared = Path("shared") / "data" / "pusht" / HUMAN
    for path in (here / HUMAN, here.parent / shared, checkout.parent / shared):
        if path.is_file():
            return path
    raise DipoleError(
        f"the human demonstrations of Push-T are not here: put {HUMAN} into this folder or ../{shared.parent} (the "
        "arrays `state`, `action` and `episode_ends` of diffusion_policy's pusht_cchi_v7_replay.zarr, see "
        "docs/howto/pusht.md)"
    )


def collect_to(task: Task, folder: str) -> dict[str, float]:
    """Let the expert demonstrate and save it."""
    shutil.rmtree(folder, ignore_errors=True)
    episodes = collect(task.env, task.demonstrations, task.noise, COLLECT_SEED, **task.options)
    lerobot.write(episodes, folder)
    return {"frames": float(episodes.num_frames)}


def untrained(kind: str, episodes: Episodes, seed: int) -> Any:
    """Return a new policy of a kind."""
    torch.manual_seed(seed)
    if kind == "mode":
        keys = [key for key in episodes.features if key.startswith("observation.")]
        return make_mode(
            episodes, observation=keys, seed=seed, network=NETWORKS["mode"], obs_horizon=TO, pred_horizon=TP,
            action_horizon=TA,
        )  # fmt: skip
    streaming, unet, beso = kind == "streaming", kind == "unet", kind == "beso"
    config = make_config(
        episodes,
        network=full_config(NETWORKS.get(kind, NETWORKS["mlp"])),
        process=BESO if beso else "flow" if kind == "flow" else "vp-cosine",
        objective=None if kind in ("flow", "unet", "beso") else ObjectiveConfig("v", "uniform"),
        sampler=None if kind in ("flow", "streaming", "beso") else DDIM,
        obs_horizon=TO,
        pred_horizon=16 if unet else TP,  # a U-Net halves it twice
        action_horizon=TA,
        streaming=StreamingTraining() if streaming else None,
    )
    return make_policy(config, episodes)


def train_kind(kind: str, task: Task, seed: int, demos: str, folder: str) -> dict[str, float]:
    """Train a policy and save it as `folder/checkpoints/last`; a student's teacher is the `base` beside it."""
    episodes = demonstrations(task, demos)
    if kind == "student":
        torch.manual_seed(seed)
        teacher = load_policy(Path(folder).with_name("base") / "checkpoints" / "last")
        policy: DiffusionPolicy = make_student(teacher, STUDENT)
    else:
        policy = untrained(kind, episodes, seed)
    # Up to the last frame of a demonstration: the usual padding, for Ta = 8, leaves out its last eight, where a policy
    # that plans at every env step is asked as well.
    ahead = policy.pred_horizon - TO + 1
    windows = Windows(episodes, list(policy.config.observation), "action", TO, policy.pred_horizon, ahead)
    shutil.rmtree(folder, ignore_errors=True)
    result = fit(policy, windows, None, training(kind, task, seed), folder, progress=False)
    shutil.rmtree(Path(folder) / "training_state", ignore_errors=True)
    return {"loss": result.loss, "seconds": result.seconds, "parameters": float(number_of_parameters(policy))}


def training(kind: str, task: Task, seed: int) -> TrainConfig:
    """Return how a policy is trained."""
    return replace(TrainConfig(seed=seed, steps=updates(kind, task), **TRAINING), **OTHERWISE.get(kind, {}))


def updates(kind: str, task: Task) -> int:
    """Return how many updates a policy gets."""
    shares = {"student": 0.25, "mode": 1.5, "transformer": 4.0}
    return max(1, int(shares.get(kind, 1.0) * task.steps))


def folder_of(run: Run, task: Task, kind: str, seed: int) -> str:
    """Return where a policy is trained, absolute, since parts run in processes of their own."""
    return str((run.out / "policies" / task.name / str(seed) / kind).resolve())


def policy_of(folder: str) -> DiffusionPolicy:
    """Return a trained policy."""
    policy: DiffusionPolicy = load_policy(Path(folder) / "checkpoints" / "last").eval()
    return policy


def demos_of(run: Run, task: Task) -> str:
    """Return where the demonstrations of a task are."""
    return str((run.out / "demonstrations" / task.name).resolve())


def train_all(run: Run) -> dict[str, dict[str, float]]:
    """Train everything that is not there yet; return what each training reports, by the name of its part.

    Raises:
        DipoleError: The human demonstrations of Push-T are not on this machine.
    """
    if any(task.env == "pusht" for task in TASKS):
        _human()  # missed before anything is trained, not after
    simulated = [task for task in (*TASKS, REACH) if task.demonstrations]
    run.parts(
        [(f"demos-{task.name}", source_of(task), partial(collect_to, task, demos_of(run, task))) for task in simulated]
    )
    first = [_job(run, "unet", REACH, 0)]
    first += [_job(run, kind, task, seed) for seed in SEEDS for task in TASKS for kind in KINDS]
    students = [_job(run, "student", task, seed) for seed in SEEDS for task in TASKS]
    names = [name for name, _, _ in (*first, *students)]
    return dict(zip(names, [*run.parts(first), *run.parts(students)], strict=True))


def source_of(task: Task) -> dict[str, Any]:
    """Return what the demonstrations of a task depend on."""
    return {"env": task.env, "count": task.demonstrations, "noise": task.noise, "options": task.options}


def recipe(kind: str, task: Task, seed: int) -> dict[str, Any]:
    """Return what a policy depends on."""
    network = full_config(NETWORKS.get(kind, NETWORKS["mlp"]))
    settings = {**TRAINING, **OTHERWISE.get(kind, {}), "steps": updates(kind, task), "seed": seed}
    return {"task": source_of(task), "kind": kind, "network": network, "training": settings, "horizons": [TO, TP, TA]}


def _job(run: Run, kind: str, task: Task, seed: int) -> Job:
    compute = partial(train_kind, kind, task, seed, demos_of(run, task), folder_of(run, task, kind, seed))
    return f"train-{task.name}-{kind}-{seed}", recipe(kind, task, seed), compute
