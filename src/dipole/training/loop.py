"""The training loop: any policy with a `loss`, any source of batches; resumable, measured, interruptible.

    fit(policy, windows, held_out, config, out)

writes `RUN/train.json`, `metrics.jsonl`, `checkpoints/last` (a policy folder with EMA weights), `checkpoints/best` and
`training_state/`. A resumed run on one CPU process ends with the very weights of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dipole.training.batches import Source, shard
from dipole.training.checkpoint import load_state
from dipole.training.config import TrainConfig
from dipole.training.plan import make_plan
from dipole.training.record import check_out, check_same, describe, read_record, write_record
from dipole.training.result import Evaluate, TrainResult
from dipole.training.tracking import check_trackers
from dipole.training.trainer import Trainer
from dipole.training.update import make_accelerator


def fit(
    policy: Any,
    source: Source,
    held_out: Source | None,
    config: TrainConfig,
    out: str | Path,
    *,
    data: Mapping[str, Any] | None = None,
    command: Mapping[str, Any] | None = None,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Train a policy.

    Args:
        policy: Module with `config` (a dataclass), `loss(batch, generator)`, also as `forward`, and what `save_policy`
            needs. Trained in place.
        source: Training samples.
        held_out: Samples for the held-out loss; None for none.
        config: Settings.
        out: Folder of the run: new or empty, or with `resume` the one to go on with.
        data: What tells the dataset from another, stored and compared on resumption.
        command: Anything JSON-able to keep in `train.json`, such as the options of the command line.
        resume: Go on from the newest training state.
        evaluate: `evaluate(policy) -> figures`, called now and then with the EMA policy; `score` (larger is better)
            then chooses the best checkpoint.
        progress: Show a progress bar on stderr; None only on a terminal.

    Raises:
        DipoleError: Settings, folder or disk are at fault, or the loss is not finite.
        KeyboardInterrupt: On Ctrl-C or SIGTERM, after the state was saved.
    """
    out = Path(out)
    accelerator = make_accelerator(config)
    threads = torch.get_num_threads()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    try:
        check_out(out, resume)
        check_trackers(config.track)
        shard(config.batch_size, accelerator.process_index, accelerator.num_processes)
        accelerator.wait_for_everyone()  # nobody writes before all have looked
        described = describe(config, policy, data or {}, command or {})
        state = None
        if resume:
            record, plan = read_record(out)
            check_same(record, described, out)
            state = load_state(out / "training_state")  # None: killed before the first save, so begin again
        else:
            windows = 0 if held_out is None else min(len(held_out), config.val_windows)
            plan = make_plan(accelerator, policy, source, config, windows)
            if accelerator.is_main_process:
                write_record(out, described, plan)
        trainer = Trainer(accelerator, policy, source, held_out, config, plan, out, evaluate)
        if state is not None:
            trainer.restore(state)
        return trainer.run(described, progress)
    finally:
        torch.set_num_threads(threads)
