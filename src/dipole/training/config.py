"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dipole.errors import DipoleError

Precision = Literal["auto", "fp32", "bf16"]

# What may differ between a run and its resumption: none of these changes the weights.
FREE = (
    "save_every", "log_every", "prefetch", "num_threads", "device", "track", "compare_precision_seconds", "cuda_graph",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """How a policy is trained. Everything a run depends on, besides the policy's own configuration and the data.

    Attributes:
        steps: Number of updates; None when `minutes` is given.
        minutes: Time for all updates instead of a number of them: the number is worked out from a short measurement
            at the start and stored in the run, so that a resumed run has the same schedule.
        batch_size: Windows per update, over all processes together.
        lr: Peak learning rate.
        min_lr: Learning rate at the end of the cosine.
        warmup: Updates of linear warm-up; below 1, a share of all updates.
        weight_decay: Decoupled weight decay, on matrices only (not on biases and norms).
        betas: Adam's moment decays.
        grad_clip: Largest gradient norm; None for no clipping.
        ema: `constant`: decay `ema_decay`, after a ramp; `power`: Diffusion Policy's schedule (see `decay_at`).
        ema_decay: Decay of `constant`, upper bound of `power`.
        precision: `auto` measures fp32 against bf16 autocast at the start and takes the faster.
        compile: Compile the network (`torch.compile`): a minute or two at the start, then faster.
        cuda_graph: On a GPU, record the update once and launch it as a whole from then on: the same numbers, several
            times faster for small networks (policies that cannot be recorded are trained as ever).
        val_fraction: Share of the episodes held out; 0 for none.
        val_every: Updates between two measurements of the held-out loss; None for 20 in all, fewer where that would
            take more than a twentieth of the time.
        val_windows: At most so many held-out windows are measured, spread evenly.
        eval_every: Updates between two evaluations in an environment (if one is given); None for 4 in all.
        save_every: Updates between two saves of the training state; None for about one a minute.
        log_every: Updates between two lines of the log.
        seed: Everything random follows from it.
        prefetch: Batches gathered ahead in a thread; 0 gathers between updates; None chooses by the size of a batch
            (a thread only costs time when a batch is small).
        num_threads: Threads of each process; None leaves torch's choice.
        device: `auto` takes the accelerator of the machine, if any (choose among several with CUDA_VISIBLE_DEVICES).
        track: Further places to log to: `tensorboard`, `wandb`.
        compare_precision_seconds: Time spent measuring each precision.
    """

    steps: int | None = 10_000
    minutes: float | None = None
    batch_size: int = 512
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup: float = 0.02
    weight_decay: float = 1e-6
    betas: tuple[float, float] = (0.95, 0.999)
    grad_clip: float | None = 1.0
    ema: Literal["constant", "power"] = "constant"
    ema_decay: float = 0.999
    precision: Precision = "auto"
    compile: bool = False
    cuda_graph: bool = True
    val_fraction: float = 0.05
    val_every: int | None = None
    val_windows: int = 4096
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int = 50
    seed: int = 0
    prefetch: int | None = None
    num_threads: int | None = None
    device: Literal["auto", "cpu"] = "auto"
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    compare_precision_seconds: float = 1.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise DipoleError("give either a number of steps or of minutes to train for, not both and not neither")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise DipoleError(f"training option {name}={value} must be between {low:g} and {high:g}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise DipoleError(f"training option betas={self.betas}: both must be in [0, 1)")


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("steps", 1, 1e9),
    ("minutes", 1e-3, 1e6),
    ("batch_size", 1, 1e7),
    ("lr", 0, 1e3),
    ("min_lr", 0, 1e3),
    ("warmup", 0, 1e9),
    ("weight_decay", 0, 1e3),
    ("grad_clip", 1e-12, 1e12),
    ("ema_decay", 0, 1),
    ("val_fraction", 0, 0.9),
    ("val_every", 1, 1e9),
    ("val_windows", 1, 1e9),
    ("eval_every", 1, 1e9),
    ("save_every", 1, 1e9),
    ("log_every", 1, 1e9),
    ("seed", 0, 2**63 - 1),
    ("prefetch", 0, 1024),
    ("num_threads", 1, 4096),
    ("compare_precision_seconds", 0, 600),
)
