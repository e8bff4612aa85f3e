"""Read somebody else's torch checkpoint without trusting it.

The file is parsed by `dipole.convert.child` in a process of its own (see `dipole.convert.sandbox`), which can make
plain values and tensors only and leaves them as JSON and safetensors; this process reads those.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dipole.convert.child import RESULT, TENSORS, TREE
from dipole.convert.sandbox import Limits
from dipole.convert.tree import TensorName, restore
from dipole.errors import DipoleError

_BOOTSTRAP = "import sys; sys.path.insert(0, sys.argv[1]); from dipole.convert.child import main; main(sys.argv[2:])"
_MAX_JSON_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Foreign:
    """A foreign checkpoint, read.

    Attributes:
        name: File name, for messages.
        value: What was pickled; tensors and arrays are `TensorName`s.
        tensor_file: The safetensors file with the tensors; gone after `read_foreign` ends.
    """

    name: str
    value: Any
    tensor_file: Path

    def tensors(self, names: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors among `names` (key -> value), under their keys."""
        from safetensors import safe_open

        with safe_open(self.tensor_file, framework="pt") as file:
            return {key: file.get_tensor(v.name) for key, v in names.items() if isinstance(v, TensorName)}


@contextmanager
def read_foreign(path: Path, memory_gib: float = 6.0, cpu_seconds: int = 600) -> Iterator[Foreign]:
    """Read a torch checkpoint of unknown origin.

    Args:
        path: File written by `torch.save` (with pickle or dill).
        memory_gib: Address space that the reading process may use.
        cpu_seconds: Processor time that it may use; on the wall clock four times as much.

    Yields:
        The checkpoint; its tensors can be fetched until the context ends.

    Raises:
        DipoleError: The file is damaged, or its pickle asks for more than plain values and tensors.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise DipoleError(f"'{path}' is not a file: give the checkpoint file itself")
    # The child writes at most twice what it reads, plus a little: see `dipole.convert.child`.
    limits = Limits(int(memory_gib * 2**30), cpu_seconds, file_bytes=3 * path.stat().st_size + 256 * 2**20)
    with tempfile.TemporaryDirectory(prefix="dipole-convert-") as name:
        folder = Path(name).resolve()
        _run_child(path, folder, limits)
        with (folder / TREE).open(encoding="ascii") as file:
            tree = json.load(file)
        yield Foreign(path.name, restore(tree), folder / TENSORS)


def _run_child(path: Path, folder: Path, limits: Limits) -> None:
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, "-I", "-c", _BOOTSTRAP, str(root), str(path), str(folder), json.dumps(asdict(limits))]
    # One thread: a pool's stacks would eat the address space. Of our environment only the way to libraries goes along.
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PATH": os.defpath}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    try:
        done = subprocess.run(
            words,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=4 * limits.cpu_seconds,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DipoleError(f"reading '{path.name}' took longer than {4 * limits.cpu_seconds} s: given up") from None
    result = folder / RESULT
    if not result.is_file():
        raise DipoleError(
            f"reading '{path.name}' failed: its reader was stopped (status {done.returncode}), as by a limit of "
            f"{limits.memory_bytes / 2**30:.1f} GiB memory or {limits.cpu_seconds} s"
        )
    error = json.loads(result.read_text(encoding="ascii"))["error"]
    if error is not None:
        raise DipoleError(f"cannot convert '{path.name}': {error}")
    if (folder / TREE).stat().st_size > _MAX_JSON_BYTES:
        raise DipoleError(
            f"cannot convert '{path.name}': it holds more than {_MAX_JSON_BYTES} bytes beside its tensors"
        )
