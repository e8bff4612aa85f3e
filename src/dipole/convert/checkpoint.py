"""What a converted checkpoint is on disk: plain files, without any pickle.

```
OUT/model.safetensors         the policy's weights under their own names
OUT/normalizer.safetensors    normalisation statistics, `<feature>.<statistic>` (only when the checkpoint has some)
OUT/config.json               the configuration it was trained with
OUT/source.json               framework, file, which weights were taken, what was left out
```
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dipole.convert.tree import TensorName, plain
from dipole.data.formats.files import atomic_folder
from dipole.errors import DipoleError


@dataclass(frozen=True)
class Converted:
    """A checkpoint in plain terms.

    Attributes:
        weights: Parameters and buffers of the policy, under their own names.
        normalizer: Statistics, `<feature>.<statistic>`.
        config: Configuration of the training run; plain JSON values.
        source: Where it comes from and what was chosen; plain JSON values.
    """

    weights: dict[str, Tensor]
    normalizer: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    def write(self, out: Path) -> None:
        """Write the folder `out`, which must not exist yet, or be empty (complete, or not at all).

        Raises:
            DipoleError: `out` exists, or there are no weights.
        """
        from safetensors.torch import save_file

        if not self.weights:
            raise DipoleError("the checkpoint has no weights to convert")
        with atomic_folder(out) as folder:
            for name, value in (("config.json", self.config), ("source.json", self.source)):
                (folder / name).write_text(json.dumps(plain(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
            for name, tensors in (("model", self.weights), ("normalizer", self.normalizer)):
                if tensors:
                    save_file(_separate(tensors), folder / f"{name}.safetensors")
                    # safetensors makes private files; these get the permissions of any other.
                    shutil.copymode(folder / "config.json", folder / f"{name}.safetensors")


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies that share no memory, as safetensors wants (tied weights are written twice)."""
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def mapping(value: Any, what: str) -> dict[str, Any]:
    """Return `value` if it is a dictionary, else raise a DipoleError that says `what` is missing."""
    if not isinstance(value, dict):
        raise DipoleError(f"the checkpoint has no {what}: is it of another framework? choose one with --from")
    return value


def flat_tensors(value: Any, prefix: str = "") -> dict[str, TensorName]:
    """Return the tensors of nested dictionaries under dotted names."""
    if isinstance(value, TensorName):
        return {prefix: value}
    found: dict[str, TensorName] = {}
    for key, item in value.items() if isinstance(value, dict) else ():
        found |= flat_tensors(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def choose_weights(available: dict[str, Any], order: tuple[str, ...], wanted: str | None) -> str:
    """Return the name of the weights to take: `wanted`, or the first of `order` that the checkpoint has.

    Raises:
        DipoleError: There are none of that name.
    """
    present = [name for name in order if isinstance(available.get(name), dict) and available[name]]
    if wanted is not None:
        if wanted not in present:
            raise DipoleError(f"the checkpoint has no '{wanted}' weights: it has {', '.join(present) or 'none'}")
        return wanted
    if not present:
        raise DipoleError(f"the checkpoint has no weights: expected one of {', '.join(order)}")
    return present[0]
