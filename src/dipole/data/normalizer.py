"""Normalizer: one affine map per feature, fitted from a dataset's statistics and stored with the policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dipole.errors import DipoleError, unknown

Mode = Literal["min_max", "mean_std", "quantiles", "identity"]

# A dimension that varies less than this is constant: it is centred, not blown up (Diffusion Policy's rule).
SMALLEST_RANGE = 1e-4


class Normalizer(nn.Module):
    """y = scale x + offset, per feature, with `scale` and `offset` of the feature's shape.

    Features it was not fitted on are an error, never passed through.

    Args:
        affine: `{feature: (scale, offset)}`.
    """

    def __init__(self, affine: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.features = tuple(affine)
        for key, (scale, offset) in affine.items():
            scale, offset = torch.as_tensor(scale), torch.as_tensor(offset)
            if scale.shape != offset.shape:
                raise DipoleError(f"the normalizer's scale and offset of '{key}' differ in shape")
            if not bool((torch.isfinite(scale) & torch.isfinite(offset) & (scale != 0)).all()):
                raise DipoleError(f"the normalizer's scale and offset of '{key}' must be finite, and no scale zero")
            self.register_buffer(_buffer(key, "scale"), scale.float())
            self.register_buffer(_buffer(key, "offset"), offset.float())

    @classmethod
    def fit(cls, stats: Mapping[str, Mapping[str, np.ndarray]], modes: Mapping[str, Mode]) -> Normalizer:
        """Return the normalizer of some features.

        Args:
            stats: Per feature `min, max, mean, std, q01, q99`, as `Episodes.stats` gives.
            modes: Per feature: `min_max` (to [-1, 1]), `mean_std` (to mean 0, std 1), `quantiles` (q01..q99 to [-1, 1];
                a dimension whose quantiles coincide falls back to its min and max), or `identity`. A dimension with a
                range (or std) below 1e-4 is only centred.

        Raises:
            DipoleError: A feature, or the statistic its mode needs, is missing.
        """
        affine = {}
        for key, mode in modes.items():
            if mode not in get_args(Mode):
                raise unknown("normalization mode", mode, get_args(Mode))
            if key not in stats:
                raise DipoleError(f"there are no statistics for '{key}': there are for {', '.join(stats)}")
            scale, offset = _affine(key, stats[key], mode)
            affine[key] = (torch.from_numpy(scale), torch.from_numpy(offset))
        return cls(affine)

    def affine(self, key: str) -> tuple[Tensor, Tensor]:
        """Return (scale, offset) of a feature."""
        if key not in self.features:
            raise DipoleError(
                f"the normalizer was not fitted on '{key}': it knows {', '.join(self.features) or 'nothing'}; "
                "train with that feature, or leave it out of the observation"
            )
        return getattr(self, _buffer(key, "scale")), getattr(self, _buffer(key, "offset"))

    def normalize(self, key: str, x: Tensor) -> Tensor:
        """Return scale x + offset; `x` is `[..., *shape]`."""
        scale, offset = self.affine(key)
        return x * scale + offset

    def denormalize(self, key: str, y: Tensor) -> Tensor:
        """Return (y - offset) / scale, the inverse of `normalize`."""
        scale, offset = self.affine(key)
        return (y - offset) / scale

    def state(self) -> dict[str, Tensor]:
        """Return the flat dict `<feature>.scale`, `<feature>.offset`, fit for safetensors."""
        state = {}
        for key in self.features:
            scale, offset = self.affine(key)
            state[f"{key}.scale"], state[f"{key}.offset"] = scale.detach().cpu(), offset.detach().cpu()
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Normalizer:
        """Return the normalizer that `state()` described."""
        keys = dict.fromkeys(name.rpartition(".")[0] for name in state)
        expected = {f"{key}.{part}" for key in keys for part in ("scale", "offset")}
        odd = sorted(expected ^ set(state))
        if odd:
            raise DipoleError(f"the normalizer's state is incomplete or not one: {', '.join(odd)}")
        return cls({key: (state[f"{key}.scale"], state[f"{key}.offset"]) for key in keys})

    def extra_repr(self) -> str:
        """Return the features, for `repr`."""
        return ", ".join(self.features)


def _buffer(key: str, part: str) -> str:
    """Return a legal buffer name: a module's names may not hold dots."""
    return f"{key.replace('.', '/')}/{part}"


def _affine(key: str, stats: Mapping[str, np.ndarray], mode: Mode) -> tuple[np.ndarray, np.ndarray]:
    def need(name: str) -> np.ndarray:
        if name not in stats:
            raise DipoleError(f"the statistics of '{key}' have no '{name}', which mode '{mode}' needs: recompute them")
        return np.asarray(stats[name], dtype=np.float64)

    if mode == "identity":
        shape = np.shape(next(iter(v for k, v in stats.items() if k != "count")))
        return np.ones(shape), np.zeros(shape)
    if mode == "mean_std":
        mean, std = need("mean"), need("std")
        scale = np.where(std < SMALLEST_RANGE, 1.0, 1.0 / np.maximum(std, SMALLEST_RANGE))
        return scale, -mean * scale
    if mode == "min_max":
        low, high = need("min"), need("max")
    else:
        low, high = need("q01"), need("q99")
        flat = high - low < SMALLEST_RANGE
        low, high = np.where(flat, need("min"), low), np.where(flat, need("max"), high)
    width = high - low
    scale = np.where(width < SMALLEST_RANGE, 1.0, 2.0 / np.maximum(width, SMALLEST_RANGE))
    return scale, -scale * (low + high) / 2
