"""The state of a training run on disk: everything needed to go on exactly as if nothing had happened.

    RUN/training_state/step-000001000/   model.safetensors, ema.safetensors, optimizer.safetensors, loop.safetensors
                                         state.json (step, and size and SHA-256 of each file), written last

A state is written under a temporary name, flushed to the disk and renamed, and the two newest are kept, so that
whenever a process is killed there is a complete one. Nothing random is stored: see `dipole.training.seeding`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

from dipole.errors import DipoleError

Groups = dict[str, dict[str, Tensor]]

FORMAT = 1
KEEP = 2
MANIFEST = "state.json"
_PREFIX, _TEMPORARY = "step-", ".saving-"


@dataclass(frozen=True)
class TrainingState:
    """A state read back.

    Attributes:
        step: Updates done.
        tensors: `model`, `ema`, `optimizer`, `loop`.
        values: What else was saved (plain values).
    """

    step: int
    tensors: Groups
    values: dict[str, Any]


def save_state(folder: Path, step: int, tensors: Groups, values: Mapping[str, Any], keep: int = KEEP) -> Path:
    """Write a state atomically and remove all but the `keep` newest.

    Args:
        folder: `RUN/training_state`.
        step: Updates done.
        tensors: Groups of tensors, one file each.
        values: JSON-able values.
        keep: Complete states to leave, this one included.

    Raises:
        DipoleError: The disk is full or cannot be written; older states are untouched.
    """
    final, temporary = folder / f"{_PREFIX}{step:09d}", folder / f"{_TEMPORARY}{step:09d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir()
        files = {f"{name}.safetensors": save(_portable(group)) for name, group in tensors.items()}
        manifest = {
            "format": FORMAT,
            "step": step,
            "values": dict(values),
            "files": {name: {"bytes": len(data), "sha256": _digest(data)} for name, data in files.items()},
        }
        files[MANIFEST] = json.dumps(manifest, indent=2).encode()
        for name, data in files.items():
            _write(temporary / name, data)
        _flush_folder(temporary)
        _remove(final)
        os.rename(temporary, final)
        _flush_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DipoleError(
            f"{final}: the training state cannot be written ({error.strerror}): free some space and go on with "
            "--resume, older checkpoints are intact"
        ) from None
    prune(folder, keep)
    return final


def load_state(folder: Path) -> TrainingState | None:
    """Return the newest complete state, or None when there is none at all.

    Raises:
        DipoleError: There are states, but all are damaged.
    """
    problems = []
    for path in reversed(_states(folder)):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            problems.append(f"{path.name}: {error}")
    if problems:
        raise DipoleError(f"{folder}: no intact training state ({problems[0]}): start again in another folder")
    return None


def prune(folder: Path, keep: int = KEEP) -> None:
    """Remove all but the newest `keep` states, and leftovers of killed saves."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        _remove(path)
    for path in _states(folder)[:-keep]:
        _remove(path)


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def _remove(path: Path) -> None:
    """Remove a folder; its manifest goes first, so that one half removed is not taken for complete."""
    if path.exists():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def _read(path: Path) -> TrainingState:
    manifest = json.loads((path / MANIFEST).read_bytes())
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']} is not {FORMAT}")
    tensors: Groups = {}
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        if len(data) != entry["bytes"] or _digest(data) != entry["sha256"]:
            raise ValueError(f"{name} is damaged")
        tensors[name.removesuffix(".safetensors")] = load(data)
    return TrainingState(int(manifest["step"]), tensors, manifest["values"])


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _portable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module by name, shared ones once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@torch.no_grad()
def restore_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into a module in place.

    Raises:
        DipoleError: Names or shapes are not the module's.
    """
    own = module_tensors(module)
    for name in own.keys() ^ tensors.keys():
        raise DipoleError(f"training state: '{name}' is in only one of the saved and the present policy")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise DipoleError(f"training state: '{name}' is {list(tensor.shape)}, the policy's {list(own[name].shape)}")
        own[name].copy_(tensor)


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's tensors as `<parameter>/<moment>`."""
    return {
        f"{name}/{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned."""
    parameters = dict(module.named_parameters())
    fused = bool(optimizer.defaults.get("fused"))
    optimizer.state.clear()
    for name, value in tensors.items():
        owner, _, key = name.rpartition("/")
        if owner not in parameters:
            raise DipoleError(f"training state: the optimizer has '{owner}', the policy has not")
        # Adam's counters stay on the CPU unless its kernel is fused.
        device = torch.device("cpu") if key == "step" and not fused else parameters[owner].device
        optimizer.state[parameters[owner]][key] = value.to(device)
