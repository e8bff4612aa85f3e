"""Windows: the pieces of episodes a policy learns from, gathered a whole batch at a time.

A window of frame i ("now") holds the observations i-(To-1)..i and the actions i-(To-1)..i+Tp-To. Where it sticks out of
its episode, the edge frame is repeated, as in Diffusion Policy (Chi et al. 2023): To-1 frames before, Ta-1 after.

Every episode gets a stretch of *positions*, its frames with the repeated edges, so that a window is a run of
consecutive positions. Small columns are laid out that way once (one extra copy), and a batch is then a gather from an
overlapping view: one copy of Tp*D numbers per window, with no index arithmetic. Images are gathered by frame, and
decoded then when they are streamed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dipole.data.episodes import Episodes
from dipole.errors import DipoleError

# Rows above this size are not copied into the padded layout: the gather is bound by memory then.
_SMALL_ROW_BYTES = 4096


class Windows:
    """The training windows of a dataset.

    Args:
        episodes: The data.
        obs_keys: Columns given as observations.
        action_key: Column of the actions.
        obs_horizon: To, observations per window.
        pred_horizon: Tp, actions per window.
        action_horizon: Ta, actions that will be executed; bounds how far a window sticks out at the end.

    Attributes:
        frames: int64 `[W]`, the "now" frame of each window, rising. A short episode keeps at least its first frame.

    Raises:
        DipoleError: A column is missing, or the horizons do not fit (To + Ta - 1 <= Tp).
    """

    def __init__(
        self,
        episodes: Episodes,
        obs_keys: Sequence[str],
        action_key: str = "action",
        obs_horizon: int = 2,
        pred_horizon: int = 16,
        action_horizon: int = 8,
    ) -> None:
        if min(obs_horizon, pred_horizon, action_horizon) < 1 or obs_horizon + action_horizon - 1 > pred_horizon:
            raise DipoleError(
                f"obs_horizon {obs_horizon}, action_horizon {action_horizon} and pred_horizon {pred_horizon} do not "
                "fit: all at least 1, and obs_horizon + action_horizon - 1 <= pred_horizon"
            )
        for key in [*obs_keys, action_key]:
            if episodes.feature(key).is_string:
                raise DipoleError(f"'{key}' holds texts: a window can only hold numbers and images")
        self.episodes = episodes
        self.obs_keys = tuple(obs_keys)
        self.action_key = action_key
        self.obs_horizon = obs_horizon
        self.pred_horizon = pred_horizon
        self.action_horizon = action_horizon
        self._lay_out()

    def _lay_out(self) -> None:
        """Compute the padded positions: `_frame_at` [P], and the first position of every window."""
        lengths, starts = self.episodes.lengths, self.episodes.starts
        before = self.obs_horizon - 1
        ahead = self.pred_horizon - self.obs_horizon
        count = np.maximum(lengths - (ahead - self.action_horizon + 1), 1)
        padded = count + self.pred_horizon - 1
        episode = np.repeat(np.arange(len(lengths)), padded)
        offset = np.arange(padded.sum()) - np.repeat(np.cumsum(padded) - padded, padded) - before
        inside = np.clip(offset, 0, lengths[episode] - 1)
        self._frame_at = starts[episode] + inside
        window_episode = np.repeat(np.arange(len(lengths)), count)
        now = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        self.frames = starts[window_episode] + now
        self._position = (np.cumsum(padded) - padded)[window_episode] + now
        pads = inside != offset
        self._pads = _Source(_runs(pads, self.pred_horizon), None, pads.dtype, (self.pred_horizon,))
        self._sources = {key: self._source(key, self.obs_horizon) for key in self.obs_keys}
        self._actions = self._source(self.action_key, self.pred_horizon)

    def _source(self, key: str, horizon: int) -> _Source:
        column = self.episodes.columns[key]
        row_bytes = column.dtype.itemsize * math.prod(column.shape[1:])
        if row_bytes <= _SMALL_ROW_BYTES and isinstance(column, np.ndarray):
            return _Source(_runs(column[self._frame_at], horizon), None, column.dtype, (horizon, *column.shape[1:]))
        return _Source(_runs(self._frame_at, horizon), column, self._frame_at.dtype, (horizon,))

    def __len__(self) -> int:
        return len(self.frames)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the windows numbered `indices`.

        Args:
            indices: int `[B]`, in 0..len-1.

        Returns:
            Each observation key `[B, To, *shape]`, `action` `[B, Tp, Da]`, and `action_is_pad` bool `[B, Tp]`, true
            where the action repeats an episode's edge. All are copies.
        """
        position = self._position[indices]
        batch = {key: source.gather(position) for key, source in self._sources.items()}
        batch["action"] = self._actions.gather(position)
        batch["action_is_pad"] = self._pads.gather(position)
        return batch


class _Source(NamedTuple):
    """Where the windows of one key come from.

    Attributes:
        runs: `_runs` of the values, or of frame numbers for large rows.
        column: What the frame numbers point to; None when `runs` holds the values.
        dtype: Type of an element of a run.
        shape: Shape of a run.
    """

    runs: np.ndarray
    column: np.ndarray | None
    dtype: np.dtype
    shape: tuple[int, ...]

    def gather(self, position: np.ndarray) -> np.ndarray:
        """Return the runs that start at `position` [B]: `[B, horizon, *shape]`."""
        taken: np.ndarray = self.runs[position].view(self.dtype).reshape(len(position), *self.shape)
        return taken if self.column is None else self.column.take(taken, axis=0)


def _runs(rows: np.ndarray, length: int) -> np.ndarray:
    """Return the overlapping runs of `length` rows of `rows` [P, ...], `[P - length + 1]`, one opaque element each.

    A gather of opaque elements is one memory copy per run: five times as fast as numpy's gather of a strided view.
    """
    rows = np.ascontiguousarray(rows)
    row_bytes = rows.strides[0]
    return np.ndarray((len(rows) - length + 1,), np.dtype(f"V{length * row_bytes}"), rows, strides=(row_bytes,))


def split_episodes(num_episodes: int, validation: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (training, validation) episode numbers, both rising.

    The validation episodes are those Diffusion Policy picks: `default_rng(seed).choice`, without replacement, at least
    one and at most all but one; none when `validation` is 0.

    Args:
        num_episodes: E.
        validation: Share of the episodes held out, in [0, 1).
        seed: Of the choice.
    """
    if not 0 <= validation < 1:
        raise DipoleError(f"the validation share is {validation}: it must be in [0, 1)")
    held_out = np.zeros(num_episodes, dtype=bool)
    if validation > 0:
        if num_episodes < 2:
            raise DipoleError("the dataset has one episode: it cannot be split, set the validation share to 0")
        size = min(max(1, round(num_episodes * validation)), num_episodes - 1)
        held_out[np.random.default_rng(seed).choice(num_episodes, size=size, replace=False)] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
