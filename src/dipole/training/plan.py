"""What a run decides by measurement when it starts: precision, and with a time budget the number of updates.

The decision is stored in the run, so that a resumed run has the same learning rates and the same arithmetic.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dipole.training.batches import Loader, Source
from dipole.training.config import TrainConfig
from dipole.training.precision import PrecisionName, candidates, faster, time_product, time_updates
from dipole.training.update import Updater
from dipole.training.validation import FORWARD_SHARE, validation_interval


@dataclass(frozen=True)
class Plan:
    """The decision.

    Attributes:
        steps: Updates of the whole run.
        precision: Precision of the loss.
        seconds_per_update: Measured, by precision; empty when nothing had to be measured.
    """

    steps: int
    precision: PrecisionName
    seconds_per_update: dict[str, float]


def agreed(value: Any) -> Any:
    """Return the main process's value in every process."""
    box = [value]
    broadcast_object_list(box)
    return box[0]


def make_plan(
    accelerator: Accelerator, policy: Any, source: Source, config: TrainConfig, held_out_windows: int = 0
) -> Plan:
    """Measure what has to be measured, on copies of the policy: its weights are left as they are.

    Args:
        accelerator: Device and processes.
        policy: The policy to be trained.
        source: Training samples.
        config: Settings.
        held_out_windows: Windows in one measurement of the held-out loss, whose time is set aside.
    """
    began = time.perf_counter()
    names = candidates(config.precision)
    seconds: dict[PrecisionName, float] = {}
    if len(names) == 1:
        precision = names[0]
    elif config.compile and accelerator.device.type == "cpu":
        # Compiling both would take minutes, and without compiling bf16 loses in its conversions what it gains. In a
        # compiled network these are part of other kernels: its products decide.
        precision = faster({name: time_product(name) for name in names})
    else:
        seconds = {name: _time(accelerator, policy, source, config, name) for name in names}
        precision = faster(seconds)
    precision = agreed(precision)
    steps = config.steps
    if steps is None:
        if precision not in seconds:
            seconds[precision] = _time(accelerator, policy, source, config, precision)
        left = 60 * (config.minutes or 0) - (time.perf_counter() - began)
        steps = _updates_that_fit(left / seconds[precision], config, held_out_windows)
    plan: Plan = agreed(Plan(steps, precision, {name: round(value, 6) for name, value in seconds.items()}))
    return plan


def _updates_that_fit(updates: float, config: TrainConfig, held_out_windows: int) -> int:
    """Return how many of `updates` remain when the held-out loss is measured as well."""
    if held_out_windows:
        batches = math.ceil(held_out_windows / config.batch_size)
        times = 1 + int(updates) // validation_interval(config, max(1, int(updates)), batches)
        updates = max(updates / 2, updates - times * FORWARD_SHARE * held_out_windows / config.batch_size)
    return max(1, int(updates))


def _time(
    accelerator: Accelerator, policy: Any, source: Source, config: TrainConfig, precision: PrecisionName
) -> float:
    updater = Updater(accelerator, copy.deepcopy(policy), config, precision)
    loader = Loader.of(source, config, accelerator)
    seconds = time_updates(
        _one_after_another(updater, loader),
        config.compare_precision_seconds,
        accelerator.device,
        lambda count: int(agreed(count)),
    )
    accelerator.free_memory()
    return seconds


def _one_after_another(updater: Updater, loader: Loader) -> Callable[[], None]:
    steps = iter(range(1_000_000))

    def update() -> None:
        step = next(steps)
        updater.update(loader.load(step), step, 1_000_000)

    return update
