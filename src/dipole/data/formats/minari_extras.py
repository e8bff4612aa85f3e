"""What a Minari dataset holds beside its frames, kept so that the same dataset can be written again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dipole.data.features import DONE, REWARD, TRUNCATED
from dipole.data.formats.files import existing, read_json
from dipole.errors import DipoleError

INFO = "info."
SERIES = {"rewards": REWARD, "terminations": DONE, "truncations": TRUNCATED}
_JSON, _ARRAYS = "minari.json", "minari.safetensors"


@dataclass(frozen=True)
class MinariExtras:
    """What a Minari dataset holds beside its frames.

    Attributes:
        metadata: The content of `metadata.json`; spaces are JSON texts.
        episodes: Per episode, what is noted about it: `id`, `seed`, `options` and so on.
        finals: Per feature, its value after the last step of each episode, `[E, *shape]`.
    """

    metadata: dict[str, Any]
    episodes: list[dict[str, Any]]
    finals: dict[str, np.ndarray] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `minari.json` and `minari.safetensors` into a folder (such as `meta/` of a LeRobotDataset)."""
        from safetensors.numpy import save_file

        texts = {key: values.tolist() for key, values in self.finals.items() if values.dtype.kind == "U"}
        arrays = {key: np.ascontiguousarray(values) for key, values in self.finals.items() if key not in texts}
        value = {"metadata": self.metadata, "episodes": self.episodes, "texts": texts}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(arrays, folder / _ARRAYS)
        (folder / _JSON).write_text(json.dumps(value, default=_tagged), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> MinariExtras:
        """Read what `save` wrote.

        Raises:
            DipoleError: Something is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = folder / _JSON
        value = _untagged(read_json(path))
        try:
            finals = load_file(existing(folder / _ARRAYS))
            finals |= {key: np.array(texts, dtype=np.str_) for key, texts in value["texts"].items()}
            extras = cls(value["metadata"], value["episodes"], finals)
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise DipoleError(f"{folder}: what is noted about the Minari dataset is damaged ({error})") from None
        if not isinstance(extras.metadata, dict) or not all(isinstance(episode, dict) for episode in extras.episodes):
            raise DipoleError(f"{path} is damaged: 'metadata' and 'episodes' must hold objects")
        return extras


def _tagged(value: Any) -> Any:
    """Encode the arrays that options may hold."""
    if isinstance(value, np.ndarray):
        return {"__array__": value.tolist(), "dtype": value.dtype.name}
    raise DipoleError(f"an episode's options hold a {type(value).__name__}: only numbers, texts and arrays can be kept")


def _untagged(value: Any) -> Any:
    if isinstance(value, list):
        return [_untagged(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__array__", "dtype"}:
        return np.array(value["__array__"], dtype=value["dtype"])
    return {key: _untagged(item) for key, item in value.items()}
