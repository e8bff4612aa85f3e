"""`load`: a dataset in any known format, by path or by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

from dipole.data import hub
from dipole.data.episodes import Episodes
from dipole.data.storage import picture_budget
from dipole.data.streaming import Streaming
from dipole.errors import DipoleError


def _is_robomimic(path: Path) -> bool:
    return path.suffix in (".hdf5", ".h5") and path.is_file()


def _is_minari(path: Path) -> bool:
    folder = path / "data" if (path / "data").is_dir() else path
    return (folder / "metadata.json").is_file()


def _is_zarr(path: Path) -> bool:
    marks = (".zgroup", "zarr.json", ".zarray")
    return any((path / mark).is_file() for mark in marks) or path.name.endswith((".zarr", ".zarr.zip", ".zip"))


# In the order of trial. Each looks at names only; the reader finds out whether the content is right.
FORMATS: dict[str, Callable[[Path], bool]] = {
    "lerobot": lambda path: (path / "meta" / "info.json").is_file(),
    "minari": _is_minari,
    "zarr_replay": _is_zarr,
    "npz": lambda path: path.suffix == ".npz" or (path / "train.npz").is_file(),
    "robomimic": _is_robomimic,
}
_EXPECTED = (
    "a LeRobotDataset (meta/info.json), a Minari dataset (data/metadata.json), a zarr replay buffer, an .npz archive "
    "with episode_ends, or a robomimic .hdf5"
)


def detect(path: str | Path) -> str:
    """Return the name of the format of an existing file or folder, a key of `FORMATS`.

    Raises:
        DipoleError: It is none of them.
    """
    path = Path(path)
    for name, matches in FORMATS.items():
        if matches(path):
            return name
    inner = [child.name for child in sorted(path.iterdir()) if child.is_dir()] if path.is_dir() else []
    hint = f"; did you mean one of its folders ({', '.join(inner[:4])})?" if inner else ""
    raise DipoleError(f"{path} is no dataset that dipole knows: expected {_EXPECTED}{hint}")


def decoded_bytes(path: Path, episodes: Sequence[int] | None = None, keys: Sequence[str] | None = None) -> int:
    """Return the size of the decoded pictures of a LeRobotDataset, of which only the description is read."""
    from dipole.data.formats import lerobot_layout

    layout = lerobot_layout.read(path)
    wanted = None if episodes is None else set(episodes)
    frames = sum(entry.length for entry in layout.entries if wanted is None or entry.index in wanted)
    pictures = [f for key, f in layout.features.items() if f.is_image and (keys is None or key in keys)]
    return frames * sum(feature.size for feature in pictures)


def load(
    path: str | Path,
    episodes: Sequence[int] | None = None,
    *,
    keys: Sequence[str] | None = None,
    images: bool = True,
    allow_nan: bool = False,
    stream: bool | Streaming | None = False,
    memory: int | None = None,
) -> Episodes:
    """Load a dataset.

    Args:
        path: A file or folder, or `organisation/name[@revision]` on the Hugging Face Hub. Formats: LeRobotDataset v3.0,
            v2.1, v2.0; Minari; diffusion_policy's zarr replay buffer; npz (diffusion_policy, DPPO); robomimic HDF5.
        episodes: Which episodes, in that order; None loads all.
        keys: Which features; None loads all.
        images: Whether to load pictures and videos.
        allow_nan: Whether NaN and infinity are let through.
        stream: Leave the pictures of a LeRobotDataset in their files and decode them when asked for
            (`dipole.data.streaming`). None: if they would take more than `memory`. In other formats, columns above
            1 GiB (`dipole.data.storage`) are memory-mapped files in any case.
        memory: Bytes that decoded pictures may take with `stream=None`; None: half of the machine's.

    Raises:
        DipoleError: There is no such dataset, or it is incomplete or damaged; the message says how to mend it.
    """
    found = hub.resolve(path, "dataset", ignore=None if images else ("videos/*", "*.mp4"))
    form = detect(found)
    reader = importlib.import_module(f"dipole.data.formats.{form}").read
    if stream is None:
        budget = picture_budget() if memory is None else memory
        stream = form == "lerobot" and images and decoded_bytes(found, episodes, keys) > budget
    streaming = Streaming() if stream is True else stream or None
    offered = {"episodes": episodes, "keys": keys, "images": images, "allow_nan": allow_nan, "stream": streaming}
    known = inspect.signature(reader).parameters
    data: Episodes = reader(found, **{name: value for name, value in offered.items() if name in known})
    wanted = list(data.features if keys is None else keys)
    if not images:
        wanted = [key for key in wanted if not data.feature(key).is_image]
    if episodes is not None and "episodes" not in known:
        return data.select(episodes, wanted)
    if wanted == list(data.features):
        return data
    features = {key: data.feature(key) for key in wanted}
    return Episodes(features, {key: data.columns[key] for key in wanted}, data.ends, data.fps, data.tasks)
