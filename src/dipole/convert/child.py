"""The sandboxed process: reads one foreign checkpoint, writes `tensors.safetensors`, `tree.json` and `result.json`.

Started by `dipole.convert.foreign` as `python -I -c ...`; it has no other use. All it imports is imported before the
fences go up, and none of it is torch.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from dipole.convert.archive import Archive
from dipole.convert.sandbox import Limits, lock
from dipole.convert.tree import Renderer
from dipole.convert.unpickle import unpickle
from dipole.convert.values import NUMPY_CODES, TensorView
from dipole.errors import DipoleError

# Tensors may repeat parts of their storages (expanded or tied weights), but not without bound.
MAX_REPEATS = 2
SLACK_BYTES = 64 * 2**20

RESULT, TREE, TENSORS = "result.json", "tree.json", "tensors.safetensors"


def main(words: list[str]) -> None:
    """Read `words = [input, output folder, limits as JSON]`; what happened is in `result.json`, also after an error."""
    source, folder = Path(words[0]), Path(words[1])
    limits = Limits(**json.loads(words[2]))
    try:
        lock(source, folder, limits)
        convert(source, folder)
        error = None
    except DipoleError as problem:
        error = str(problem)
    except MemoryError:
        error = f"reading it takes more than {limits.memory_bytes / 2**30:.1f} GiB of memory: refused"
    except RecursionError:
        error = "it is nested too deeply: refused"
    except OSError as problem:
        error = f"it cannot be read, or the result not be written ({problem.strerror})"
    _write_json(folder / RESULT, {"error": error})
    # Skips the interpreter's shutdown, whose own clean-up the audit hook would deny.
    os._exit(0)


def convert(source: Path, folder: Path) -> None:
    """Write the tree and the tensors of the checkpoint `source` into `folder`."""
    archive = Archive(source)
    renderer = Renderer()
    value = unpickle(archive.pickle(), archive)
    if isinstance(value, dict) and isinstance(value.get("pickles"), dict):
        # diffusion_policy pickles small values (epoch, step) once more, each into bytes.
        value["pickles"] = {k: unpickle(v) if isinstance(v, bytes) else v for k, v in value["pickles"].items()}
    _write_json(folder / TREE, renderer.render(value))
    allowed = MAX_REPEATS * archive.total_bytes() + SLACK_BYTES
    needed = sum(_nbytes(tensor) for tensor in renderer.tensors)
    if needed > allowed:
        raise DipoleError(f"its tensors unfold to {needed} bytes, far more than the file holds: refused")
    write_tensors(folder / TENSORS, renderer.tensors, archive)


def write_tensors(path: Path, tensors: list[TensorView | np.ndarray], archive: Archive) -> None:
    """Write `t0, t1, ...` as a safetensors file, one tensor in memory at a time."""
    header: dict[str, Any] = {}
    position = 0
    for number, tensor in enumerate(tensors):
        end = position + _nbytes(tensor)
        header[f"t{number}"] = {"dtype": _code(tensor), "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            data = tensor.materialise(archive) if isinstance(tensor, TensorView) else np.ascontiguousarray(tensor)
            file.write(data.data)


def _nbytes(tensor: TensorView | np.ndarray) -> int:
    return int(tensor.nbytes)


def _code(tensor: TensorView | np.ndarray) -> str:
    return tensor.dtype if isinstance(tensor, TensorView) else NUMPY_CODES[tensor.dtype.str[1:]]


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="ascii") as file:
        json.dump(value, file, allow_nan=False)
