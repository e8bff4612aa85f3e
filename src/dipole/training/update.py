"""One update: loss, gradients, clipping, AdamW, EMA; the same arithmetic for one process and for several."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Generator, Tensor, nn

from dipole.allocator import keep_freed_memory
from dipole.compiler import need_compiler
from dipole.errors import DipoleError
from dipole.training.config import TrainConfig
from dipole.training.draws import ShardedDraws
from dipole.training.ema import EMA
from dipole.training.optim import clip, learning_rate, make_optimizer, set_learning_rate
from dipole.training.precision import PrecisionName, autocast
from dipole.training.recorded import RecordedUpdate
from dipole.training.seeding import generator, seed_global


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator: device, and process group when launched by `accelerate launch` or `torchrun`."""
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState._shared_state
    if state and (state["device"].type == "cpu") != cpu and state["num_processes"] == 1:
        # accelerate knows one device per process, the first: training on the other would fail, or use the first.
        AcceleratorState._reset_state(reset_partial_state=True)
    # Buffers (normalizer statistics, tables) never change, so they are not sent round at every update. Precision is
    # ours to choose, after a measurement.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[ddp])


def _compiler_options(device: torch.device, records: bool) -> dict[str, bool]:
    """Return what keeps Python from launching kernel after kernel, a tenth of an update of a small network and more."""
    if device.type == "cpu":
        return {"cpp_wrapper": True}
    return {"triton.cudagraphs": device.type == "cuda" and not records}


def batch_rows(batch: dict[str, Tensor]) -> int:
    """Return the number of rows of a batch."""
    return len(next(iter(batch.values())))


class Updater:
    """A policy being trained: its weights, optimizer and EMA.

    Attributes:
        policy: The policy (raw weights), on the accelerator's device.
        ema: Its average.
        optimizer: The optimizer.
    """

    def __init__(self, accelerator: Accelerator, policy: Any, config: TrainConfig, precision: PrecisionName) -> None:
        self.accelerator, self.config, self.precision = accelerator, config, precision
        self.device = accelerator.device
        records = self.device.type == "cuda" and accelerator.num_processes == 1 and config.cuda_graph
        keep_freed_memory()
        self.policy = policy.to(self.device).train()
        if config.compile:
            if not isinstance(getattr(policy, "network", None), nn.Module):
                raise DipoleError("this policy has no network of its own to compile: train it without --compile")
            if self.device.type == "cpu":
                need_compiler("--compile", "train without it")
            # In place: the names of the weights stay as they are.
            policy.network.compile(dynamic=False, options=_compiler_options(self.device, records))
        self.optimizer = make_optimizer(policy, config)
        self.parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        # The optimizer stays bare: accelerate's wrapper searches for optional packages at every step.
        with warnings.catch_warnings():
            # torch 2.13 has a new name for `broadcast_buffers`, which accelerate does not pass on yet.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            self._model = accelerator.prepare(policy)
        # Last: DistributedDataParallel may give the parameters other storage.
        self.ema = EMA(policy, config.ema, config.ema_decay)
        objective = getattr(getattr(policy, "config", None), "objective", None)
        self._masked = accelerator.num_processes > 1 and getattr(objective, "mask_padding", False)
        self._recorded = RecordedUpdate(self.optimizer, self.device) if records else None

    def update(self, batch: dict[str, Tensor], step: int, total: int) -> tuple[Tensor, Tensor]:
        """Do update `step` of `total` and return loss and gradient norm, both on the device."""
        set_learning_rate(self.optimizer, learning_rate(step, total, self.config))
        seed_global(self.device, self.config.seed, "dropout", step, self.accelerator.process_index)
        noise = partial(generator, self.config.seed, "noise", step)
        if self._recorded is not None:
            loss, norm = self._recorded(self._compute, batch, noise)
        else:
            drawn = noise()
            loss, norm = self._compute(batch, drawn, self._draws(drawn, batch_rows(batch)))
        self.ema.update()
        return loss, norm

    def _compute(self, batch: dict[str, Tensor], noise: Generator, draws: AbstractContextManager[Any]) -> Tensor:
        """Do all of an update but the average, and return loss and gradient norm, `[2]`."""
        with draws, autocast(self.device, self.precision):
            loss = self._model(batch, noise)
        if self._masked:
            loss = loss * self._share(batch)
        self.accelerator.backward(loss)
        norm = clip(self.parameters, self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack((loss.detach(), norm))

    def _draws(self, noise: Generator, rows: int) -> AbstractContextManager[Any]:
        if self.accelerator.num_processes == 1 and self.device.type == "cpu":
            return nullcontext()
        return ShardedDraws(noise, self.accelerator.process_index, self.accelerator.num_processes, rows)

    def _share(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the factor that makes the mean over processes of masked means the mean over the whole batch."""
        ours = (~batch["action_is_pad"]).sum().float()
        share: Tensor = ours / self.accelerator.reduce(ours, "mean").clamp(min=1)
        return share
