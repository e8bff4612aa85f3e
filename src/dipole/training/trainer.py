"""A training run in this process: updates, log, held-out loss, evaluation, checkpoints, and going on from them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dipole.errors import DipoleError
from dipole.policies.checkpoint import save_policy
from dipole.training.batches import EpochOrder, Loader, Source
from dipole.training.checkpoint import (
    TrainingState,
    module_tensors,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
    save_state,
)
from dipole.training.config import TrainConfig
from dipole.training.optim import learning_rate
from dipole.training.plan import Plan
from dipole.training.progress import ProgressBar
from dipole.training.result import Best, Evaluate, TrainResult
from dipole.training.stopping import StopRequest
from dipole.training.tracking import Trackers, open_trackers
from dipole.training.update import Updater
from dipole.training.validation import HeldOutLoss, is_due, validation_interval

EVALUATIONS = 4
SAVE_SECONDS = 60.0
# Several processes must stop at the same update; agreeing costs a message, so they ask each other now and then.
_AGREE_EVERY = 10


@dataclass
class Trainer:
    """A run in this process: see `dipole.training.fit`, which makes it.

    Attributes:
        accelerator: Device and processes.
        policy: The policy, trained in place.
        source: Training samples.
        held_out: Held-out samples.
        config: Settings.
        plan: What was decided at the start.
        out: Folder.
        evaluate: Evaluation in an environment.
        step: Updates done.
        seconds: Time they took.
        best: Best checkpoint so far.
        loss: Mean loss of the last log interval.
        val_loss: Last held-out loss.
    """

    accelerator: Accelerator
    policy: Any
    source: Source
    held_out: Source | None
    config: TrainConfig
    plan: Plan
    out: Path
    evaluate: Evaluate | None = None
    step: int = 0
    seconds: float = 0.0
    best: Best | None = None
    loss: float = math.nan
    val_loss: float | None = None

    def __post_init__(self) -> None:
        config, device = self.config, self.accelerator.device
        self.updater = Updater(self.accelerator, self.policy, config, self.plan.precision)
        self.order = EpochOrder(len(self.source), config.batch_size, config.seed)
        self.measure: HeldOutLoss | None = None
        self._val_every = self.plan.steps
        self._eval_every = config.eval_every or max(1, self.plan.steps // EVALUATIONS)
        if self.held_out is not None:
            most, size = config.val_windows, config.batch_size
            self.measure = HeldOutLoss(self.held_out, most, size, config.seed, device, self.plan.precision)
            self._val_every = validation_interval(config, self.plan.steps, len(self.measure.batches))
        # Sums since the last line of the log: loss, gradient norm, updates. On the device: no waiting for a GPU.
        self.meter = torch.zeros(3, dtype=torch.float64, device=device)
        self.trackers = Trackers([])

    def run(self, described: Mapping[str, Any], progress: bool | None) -> TrainResult:
        """Train to the end, or to a request to stop."""
        main = self.accelerator.is_main_process
        self._start_clocks()
        if main:
            self.trackers = open_trackers(self.config.track, self.out, self.step, described)
            if self.step == 0:
                self._save()
        loader = Loader.of(self.source, self.config, self.accelerator, self.step, self.plan.steps)
        one = torch.ones((), device=self.accelerator.device)
        try:
            with StopRequest() as stop, ProgressBar(self.plan.steps, self.step, progress if main else False) as bar:
                for batch in loader:
                    loss, norm = self.updater.update(batch, self.step, self.plan.steps)
                    self.meter += torch.stack((loss, norm, one))
                    self.step += 1
                    self._after_update(loader, bar)
                    if self._must_stop(stop):
                        self._save()
                        raise KeyboardInterrupt
        finally:
            self.trackers.close()
        self.accelerator.wait_for_everyone()
        return self._result()

    def restore(self, state: TrainingState) -> None:
        """Go on from a saved state."""
        updater = self.updater
        restore_module(updater.policy, state.tensors["model"])
        restore_module(updater.ema.module, state.tensors["ema"])
        restore_optimizer(updater.optimizer, updater.policy, state.tensors["optimizer"])
        self.meter.copy_(state.tensors["loop"]["meter"])
        self.step = state.step
        self.seconds, self.loss, self.val_loss = (state.values[key] for key in ("seconds", "loss", "val_loss"))
        updater.ema.updates = state.values["ema_updates"]
        self.best = Best(*state.values["best"]) if state.values["best"] else None

    def _after_update(self, loader: Loader, bar: ProgressBar) -> None:
        last = self.step == self.plan.steps
        if last or self.step % self.config.log_every == 0:
            self._log(loader)
            bar.show(self.step, loss=self.loss, val=self.val_loss)
        bar.update(self.step)
        if not self.accelerator.is_main_process:
            return
        if self.measure is not None and is_due(self.step, self.plan.steps, self._val_every):
            val_loss = self.val_loss = self.measure(self.updater.ema.module)
            self.trackers.log(self.step, {"val_loss": val_loss})
        if self.evaluate is not None and is_due(self.step, self.plan.steps, self._eval_every):
            figures = self.evaluate(self.updater.ema.module)
            self.trackers.log(self.step, {f"eval/{name}": value for name, value in figures.items()})
            self._consider(Best(figures["score"], self.step))
        if last or self._save_due():
            self._save()

    def _save_due(self) -> bool:
        if self.config.save_every is not None:
            return self.step % self.config.save_every == 0
        return time.monotonic() - self._saved_at > SAVE_SECONDS

    def _must_stop(self, stop: StopRequest) -> bool:
        if self.accelerator.num_processes == 1:
            return stop.received
        if self.step % _AGREE_EVERY:
            return False
        asked = torch.tensor(float(stop.received), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)

    def _start_clocks(self) -> None:
        now = time.monotonic()
        self._began = self._saved_at = self._logged_at = now
        self._before, self._started_at, self._logged_step, self._waited = self.seconds, self.step, self.step, 0.0

    def _log(self, loader: Loader) -> None:
        sums = self.accelerator.reduce(self.meter, "mean").tolist()
        self.meter.zero_()
        self.loss = sums[0] / sums[2]
        if not math.isfinite(self.loss):
            raise DipoleError(
                f"the training loss is {self.loss} at update {self.step}: lower the learning rate, or look for odd "
                f"values with `dipole inspect`; checkpoints in {self.out} are from before"
            )
        now = time.monotonic()
        self.seconds = self._before + now - self._began
        elapsed = max(now - self._logged_at, 1e-9)
        self.trackers.log(
            self.step,
            {
                "loss": self.loss,
                "grad_norm": sums[1] / sums[2],
                "lr": learning_rate(self.step - 1, self.plan.steps, self.config),
                "epoch": self.order.epoch(self.step),
                "seconds": self.seconds,
                "samples_per_s": (self.step - self._logged_step) * self.config.batch_size / elapsed,
                "data_wait": (loader.waited - self._waited) / elapsed,
            },
        )
        self._logged_at, self._logged_step, self._waited = now, self.step, loader.waited

    def _consider(self, candidate: Best) -> None:
        if self.best is None or candidate.score > self.best.score:
            self.best = candidate
            save_policy(self.updater.ema.module, self.out / "checkpoints" / "best")

    def _save(self) -> None:
        """Save the policy, then the state: a state never speaks of a checkpoint that is not there."""
        if not self.accelerator.is_main_process:
            return
        if not math.isfinite(float(self.meter[0])):
            raise DipoleError(f"the training loss is not finite at update {self.step}: lower the learning rate")
        updater = self.updater
        self.seconds = self._before + time.monotonic() - self._began
        save_policy(updater.ema.module, self.out / "checkpoints" / "last")
        tensors = {
            "model": module_tensors(updater.policy),
            "ema": module_tensors(updater.ema.module),
            "optimizer": optimizer_tensors(updater.optimizer, updater.policy),
            "loop": {"meter": self.meter},
        }
        values = {
            "seconds": self.seconds,
            "ema_updates": updater.ema.updates,
            "loss": self.loss,
            "val_loss": self.val_loss,
            "best": None if self.best is None else [self.best.score, self.best.step],
        }
        save_state(self.out / "training_state", self.step, tensors, values)
        self._saved_at = time.monotonic()

    def _result(self) -> TrainResult:
        done = self.step - self._started_at
        elapsed = max(time.monotonic() - self._began, 1e-9)
        return TrainResult(
            out=self.out,
            steps=self.step,
            seconds=self.seconds,
            loss=self.loss,
            val_loss=self.val_loss,
            best=self.best,
            samples_per_s=done * self.config.batch_size / elapsed,
            precision=self.plan.precision,
            resumed_from=self._started_at,
        )
