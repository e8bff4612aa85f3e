"""The HDF5 storage of a Minari dataset: `main_data.hdf5` with groups `episode_<i>`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dipole.data.formats.files import inside
from dipole.data.formats.hdf5 import Hdf5
from dipole.data.formats.minari_spaces import Leaf
from dipole.data.formats.minari_store import GROUPS, Path_, decode_jpeg
from dipole.errors import DipoleError

_MAX_INFO_DEPTH = 16


class Hdf5Store:
    """Storage in one HDF5 file; a context manager.

    Args:
        folder: The `data` folder.
        jpeg: Whether pictures are JPEG files.
    """

    def __init__(self, folder: Path, jpeg: bool) -> None:
        self.source = inside(folder, "main_data.hdf5")
        self._jpeg = jpeg
        self._file = Hdf5(self.source)

    def __enter__(self) -> Hdf5Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()

    def numbers(self) -> list[int]:
        """See `Store`."""
        names = [name for name in self._file.names(self._file.root) if name.startswith("episode_")]
        found = [name.removeprefix("episode_") for name in names]
        if not all(text.isascii() and text.isdigit() and len(text) < 10 for text in found):
            raise DipoleError(f"{self.source} holds groups that are no 'episode_<number>': it is no Minari dataset")
        return sorted(int(text) for text in found)

    def _episode(self, episode: int) -> Any:
        return self._file.group(self._file.root, f"episode_{episode}")

    def attributes(self, episode: int) -> dict[str, Any]:
        """See `Store`."""
        root: dict[str, Any] = {}
        for key, value in self._file.attributes(self._episode(episode)).items():
            *parents, last = key.split("/")
            node = root
            for name in parents:
                node = node.setdefault(name, {})
                if not isinstance(node, dict):
                    raise DipoleError(f"{self.source}: attribute '{key}' of episode {episode} contradicts another")
            node[last] = value.item() if isinstance(value, np.generic) else value
        return root

    def leaf(self, episode: int, group: str, leaf: Leaf) -> np.ndarray:
        """See `Store`."""
        names = [GROUPS[group], *(f"_index_{part}" if isinstance(part, int) else part for part in leaf.path)]
        node = self._episode(episode)
        for name in names[:-1]:
            node = self._file.group(node, name)
        dataset = self._file.dataset(node, names[-1])
        if leaf.dtype == "string":
            return self._file.texts(dataset)
        if self._jpeg and leaf.picture:
            return decode_jpeg(self._file.blobs(dataset), leaf, dataset.shape[0], self.source)
        return self._file.numbers(dataset)

    def series(self, episode: int, name: str) -> np.ndarray:
        """See `Store`."""
        return self._file.numbers(self._file.dataset(self._episode(episode), name))

    def infos(self, episode: int) -> list[Path_]:
        """See `Store`."""
        group = self._episode(episode)
        return [*self._walk(group, ("infos",))] if "infos" in self._file.names(group) else []

    def _walk(self, parent: Any, path: Path_) -> Iterator[Path_]:
        if len(path) > _MAX_INFO_DEPTH:
            raise DipoleError(f"{self.source}: the infos are nested deeper than {_MAX_INFO_DEPTH} levels: refused")
        if not self._file.is_group(parent, path[-1]):
            yield path[1:]
            return
        group = self._file.group(parent, path[-1])
        for name in self._file.names(group):
            yield from self._walk(group, (*path, name))

    def info(self, episode: int, path: Path_) -> np.ndarray:
        """See `Store`."""
        node = self._episode(episode)
        for name in ("infos", *path[:-1]):
            node = self._file.group(node, name)
        dataset = self._file.dataset(node, path[-1])
        return self._file.texts(dataset) if self._file.is_text(dataset) else self._file.numbers(dataset)
