"""Episodes: all frames of a dataset, column by column, one episode after the other.

Memory: columns up to `storage.memory_limit()` are ordinary arrays, larger ones (images) are memory-mapped temporary
files, so resident memory is bounded by the limit times the number of columns plus what is being read. Pictures may also
stay in their files and be decoded when asked for: see `dipole.data.streaming`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from dipole.data import statistics
from dipole.data.features import IMPLICIT, TASK_INDEX, Feature
from dipole.data.storage import allocate
from dipole.data.streaming import StreamedColumn, concatenated
from dipole.errors import DipoleError

Stats = dict[str, dict[str, np.ndarray]]


@dataclass
class Episodes:
    """All frames of all episodes, contiguous.

    Attributes:
        features: What each column holds. The implicit columns (`timestamp`, `frame_index`, `episode_index`, `index`)
            are not stored: see `timestamp` and the like.
        columns: `[N, *feature.shape]` per feature; a number is `[N, 1]`. A column of pictures may be a
            `StreamedColumn`.
        ends: int64 `[E]`, exclusive end of each episode; the last is N.
        fps: Frames per second.
        tasks: Sentences that the column `task_index` `[N, 1]` points to; empty when there are none.

    Raises:
        DipoleError: Columns, features and ends do not fit together, or there is no frame.
    """

    features: dict[str, Feature]
    columns: dict[str, np.ndarray]
    ends: np.ndarray
    fps: float
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.ends = np.ascontiguousarray(self.ends, dtype=np.int64)
        self.tasks = tuple(self.tasks)
        self.fps = float(self.fps)
        if self.ends.ndim != 1 or len(self.ends) == 0:
            raise DipoleError("the dataset has no episodes")
        if self.ends[0] <= 0 or (np.diff(self.ends) <= 0).any():
            raise DipoleError("episode ends must be positive and increasing: some episode has no frames")
        if not (np.isfinite(self.fps) and self.fps > 0):
            raise DipoleError(f"fps is {self.fps}: it must be a positive number of frames per second")
        if self.features.keys() != self.columns.keys():
            odd = sorted(self.features.keys() ^ self.columns.keys())
            raise DipoleError(f"features and columns differ: {', '.join(odd)}")
        for key, feature in self.features.items():
            self._check_column(key, feature, self.columns[key])
        if TASK_INDEX in self.columns:
            self._check_tasks()

    def _check_column(self, key: str, feature: Feature, column: np.ndarray) -> None:
        if key in IMPLICIT:
            raise DipoleError(f"column '{key}' is implicit (derived from the episode ends and fps): leave it out")
        if len(column) != self.num_frames:
            raise DipoleError(f"column '{key}' has {len(column)} frames, but the episodes have {self.num_frames}")
        if not feature.accepts(column):
            raise DipoleError(
                f"column '{key}' is {column.dtype} {column.shape[1:]} per frame, but its feature says "
                f"{feature.dtype} {feature.shape}"
            )

    def _check_tasks(self) -> None:
        index = self.columns[TASK_INDEX]
        if index.min() < 0 or (self.tasks and index.max() >= len(self.tasks)):
            raise DipoleError(
                f"task_index runs from {index.min()} to {index.max()}, but there are {len(self.tasks)} tasks"
            )

    @property
    def num_episodes(self) -> int:
        """Number of episodes E."""
        return len(self.ends)

    @property
    def num_frames(self) -> int:
        """Number of frames N."""
        return int(self.ends[-1])

    @property
    def starts(self) -> np.ndarray:
        """int64 `[E]`: first frame of each episode."""
        return np.concatenate([[0], self.ends[:-1]])

    @property
    def lengths(self) -> np.ndarray:
        """int64 `[E]`: frames of each episode."""
        return np.diff(self.ends, prepend=0)

    @property
    def episode_index(self) -> np.ndarray:
        """int64 `[N]`: the episode of each frame."""
        return np.repeat(np.arange(self.num_episodes), self.lengths)

    @property
    def frame_index(self) -> np.ndarray:
        """int64 `[N]`: position of each frame in its episode."""
        return np.asarray(np.arange(self.num_frames) - np.repeat(self.starts, self.lengths))

    @property
    def timestamp(self) -> np.ndarray:
        """float32 `[N]`: seconds since the start of the episode."""
        return (self.frame_index / self.fps).astype(np.float32)

    def episode(self, index: int) -> dict[str, np.ndarray]:
        """Return the columns of one episode, `[T, *shape]` each, as views."""
        if not 0 <= index < self.num_episodes:
            raise DipoleError(f"there is no episode {index}: the dataset has 0 to {self.num_episodes - 1}")
        start = self.ends[index - 1] if index else 0
        return {key: column[start : self.ends[index]] for key, column in self.columns.items()}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.episode(i) for i in range(self.num_episodes))

    def task_of(self, index: int) -> str | None:
        """Return the sentence of an episode's first frame, or None when the dataset names no tasks."""
        if not self.tasks or TASK_INDEX not in self.columns:
            return None
        return self.tasks[int(self.episode(index)[TASK_INDEX][0, 0])]

    def select(self, indices: Sequence[int] | np.ndarray, keys: Sequence[str] | None = None) -> Episodes:
        """Return a copy with the given episodes, in the given order, and only the given columns.

        Args:
            indices: Episode numbers; may repeat.
            keys: Columns to keep; None keeps all.
        """
        keys = list(self.features) if keys is None else list(keys)
        features = {key: self.feature(key) for key in keys}
        pieces = [self.episode(int(i)) for i in indices]
        if not pieces:
            raise DipoleError("no episode was selected: name at least one")
        lengths = self.lengths[np.asarray(indices, dtype=np.int64)]
        columns = {key: _join([piece[key] for piece in pieces], key) for key in keys}
        return Episodes(features, columns, np.cumsum(lengths), self.fps, self.tasks)

    def feature(self, key: str) -> Feature:
        """Return the feature named `key`, or raise a DipoleError that lists what there is."""
        if key not in self.features:
            raise DipoleError(f"the dataset has no '{key}': it has {', '.join(self.features)}")
        return self.features[key]

    @property
    def is_streamed(self) -> bool:
        """Whether pictures are decoded when they are asked for."""
        return any(isinstance(column, StreamedColumn) for column in self.columns.values())

    def close(self) -> None:
        """End the threads that decode streamed pictures; without any, there is nothing to do."""
        for column in self.columns.values():
            if isinstance(column, StreamedColumn):
                column.close()

    def stats(self) -> Stats:
        """Return `min, max, mean, std, q01, q10, q50, q90, q99, count` per feature; texts are left out.

        Numbers: shape of the feature, float64. Images: per channel on [0, 1], shape `(C, 1, 1)`, from a subset of
        frames, as LeRobot does. See `dipole.data.statistics`.
        """
        return {
            key: statistics.column_stats(self.columns[key], feature, key)
            for key, feature in self.features.items()
            if not feature.is_string
        }

    @classmethod
    def from_list(
        cls,
        episodes: Sequence[Mapping[str, np.ndarray]],
        features: Mapping[str, Feature] | None = None,
        fps: float = 10.0,
        tasks: Sequence[str] = (),
    ) -> Episodes:
        """Return the episodes of a list of `{key: [T, *shape]}`.

        Args:
            episodes: One mapping per episode, all with the same keys. `[T]` is taken as `[T, 1]`.
            features: Their description; None derives it (uint8 `[T, H, W, C]` under an `observation.image*` name is an
                image).
            fps: Frames per second.
            tasks: Sentences for `task_index`.
        """
        if not episodes:
            raise DipoleError("the dataset has no episodes")
        keys = list(episodes[0] if features is None else features)
        lengths: list[int] = []
        columns: dict[str, list[np.ndarray]] = {key: [] for key in keys}
        for number, episode in enumerate(episodes):
            arrays = {key: _as_column(episode, key, number) for key in keys}
            sizes = {key: len(array) for key, array in arrays.items()}
            if len(set(sizes.values())) != 1:
                raise DipoleError(f"episode {number} has columns of different lengths: {sizes}")
            lengths.append(next(iter(sizes.values())))
            for key, array in arrays.items():
                columns[key].append(array)
        joined = {key: _join(pieces, key) for key, pieces in columns.items()}
        found = {key: infer_feature(key, column) for key, column in joined.items()} if features is None else features
        return cls(dict(found), joined, np.cumsum(lengths), fps, tuple(tasks))

    @classmethod
    def concatenate(cls, parts: Sequence[Episodes]) -> Episodes:
        """Return the episodes of several datasets with the same features and frame rate; their tasks are merged."""
        if not parts:
            raise DipoleError("there is no dataset to concatenate")
        first = parts[0]
        for number, part in enumerate(parts[1:], 1):
            for key in first.features.keys() | part.features.keys():
                a, b = first.features.get(key), part.features.get(key)
                if a is None or b is None or (a.numpy_dtype, a.shape) != (b.numpy_dtype, b.shape):
                    raise DipoleError(f"dataset {number} differs from dataset 0 in feature '{key}': {b} against {a}")
            if part.fps != first.fps:
                raise DipoleError(f"dataset {number} has {part.fps} fps, dataset 0 has {first.fps}: resample one")
        tasks = tuple(dict.fromkeys(task for part in parts for task in part.tasks))
        columns = {key: _join([_retasked(part, key, tasks) for part in parts], key) for key in first.features}
        ends = np.cumsum(np.concatenate([part.lengths for part in parts]))
        return cls(dict(first.features), columns, ends, first.fps, tasks)


def infer_feature(key: str, column: np.ndarray) -> Feature:
    """Return the feature of a column `[N, *shape]`: an image if it is uint8 `[N, H, W, 1 or 3]` of that name."""
    shape = column.shape[1:]
    if "image" in key and column.dtype == np.uint8 and len(shape) == 3:
        return Feature("image", shape)
    return Feature("string" if column.dtype.kind == "U" else column.dtype.name, shape)


def _as_column(episode: Mapping[str, np.ndarray], key: str, number: int) -> np.ndarray:
    if key not in episode:
        raise DipoleError(f"episode {number} has no '{key}': it has {', '.join(episode)}")
    array = np.asarray(episode[key])
    return array[:, None] if array.ndim == 1 else array


def _join(pieces: Sequence[np.ndarray], key: str) -> np.ndarray:
    """Return the pieces `[T_i, *shape]` one after the other, on disk when they are large."""
    if any(isinstance(piece, StreamedColumn) for piece in pieces):
        streamed = concatenated(pieces)
        if streamed is not None:
            return cast("np.ndarray", streamed)
        pieces = [np.asarray(piece) for piece in pieces]
    if len(pieces) == 1 and pieces[0].base is None:
        return pieces[0]
    if len({piece.shape[1:] for piece in pieces}) != 1:
        raise DipoleError(f"'{key}' changes its shape between episodes: {sorted({p.shape[1:] for p in pieces})}")
    dtype = np.result_type(*pieces)
    joined = allocate((sum(len(piece) for piece in pieces), *pieces[0].shape[1:]), dtype, f"column '{key}'")
    return np.concatenate(pieces, out=joined)


def _retasked(part: Episodes, key: str, tasks: tuple[str, ...]) -> np.ndarray:
    """Return a column; task numbers are those of the merged list `tasks`."""
    if key != TASK_INDEX or not part.tasks:
        return part.columns[key]
    numbers = np.array([tasks.index(task) for task in part.tasks], dtype=np.int64)
    return np.asarray(numbers[part.columns[key]])
