"""Normalizer: one affine map per feature, fitted from a dataset's statistics and stored with the policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dipole.errors import DipoleError, unknown

Mode = Literal["min_max", "mean_std", "quantiles", "quantiles10", "identity"]

# A dimension that varies less than this is constant: it is centred, not blown up (Diffusion Policy's rule).
SMALLEST_RANGE = 1e-4


class Normalizer(nn.Module):
    """y = scale (x - origin) + offset, per feature, each of the feature's shape; the origin is 0 unless given.

    Features it was not fitted on are an error, never passed through.

    Args:
        affine: `{feature: (scale, offset)}`.
        origin: `{feature: origin}` for features whose scale is so large that scale x + offset would lose all digits,
            such as constant dimensions of LeRobot's policies.
    """

    def __init__(self, affine: Mapping[str, tuple[Tensor, Tensor]], origin: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.features = tuple(affine)
        for key, pair in affine.items():
            scale, offset = (torch.as_tensor(value) for value in pair)
            center = torch.as_tensor((origin or {}).get(key, torch.zeros_like(offset)))
            if not scale.shape == offset.shape == center.shape:
                raise DipoleError(f"the normalizer's scale and offset of '{key}' differ in shape")
            finite = torch.isfinite(scale) & torch.isfinite(offset) & torch.isfinite(center)
            if not bool((finite & (scale != 0)).all()):
                raise DipoleError(f"the normalizer's scale and offset of '{key}' must be finite, and no scale zero")
            self.register_buffer(_buffer(key, "scale"), scale.float())
            self.register_buffer(_buffer(key, "offset"), offset.float())
            self.register_buffer(_buffer(key, "origin"), center.float() if key in (origin or {}) else None)

    @classmethod
    def fit(cls, stats: Mapping[str, Mapping[str, np.ndarray]], modes: Mapping[str, Mode]) -> Normalizer:
        """Return the normalizer of some features.

        Args:
            stats: Per feature `min, max, mean, std, q01, q99`, as `Episodes.stats` gives.
            modes: Per feature: `min_max` (to [-1, 1]), `mean_std` (to mean 0, std 1), `quantiles` (q01..q99 to [-1, 1];
                a dimension whose quantiles coincide falls back to its min and max), `quantiles10` (likewise q10..q90),
                or `identity`. A dimension with a range (or std) below 1e-4 is only centred.

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
        """Return (scale, offset) of a feature, such that y = scale x + offset."""
        scale, offset, origin = self.parts(key)
        return scale, offset if origin is None else offset - scale * origin

    def parts(self, key: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (scale, offset, origin) of a feature; the origin is None where it is 0."""
        if key not in self.features:
            raise DipoleError(
                f"the normalizer was not fitted on '{key}': it knows {', '.join(self.features) or 'nothing'}; "
                "train with that feature, or leave it out of the observation"
            )
        scale, offset, origin = (getattr(self, _buffer(key, part)) for part in ("scale", "offset", "origin"))
        return scale, offset, origin

    def normalize(self, key: str, x: Tensor) -> Tensor:
        """Return scale (x - origin) + offset; `x` is `[..., *shape]`."""
        scale, offset, origin = self.parts(key)
        return (x if origin is None else x - origin) * scale + offset

    def denormalize(self, key: str, y: Tensor) -> Tensor:
        """Return (y - offset) / scale + origin, the inverse of `normalize`."""
        scale, offset, origin = self.parts(key)
        x = (y - offset) / scale
        return x if origin is None else x + origin

    def state(self) -> dict[str, Tensor]:
        """Return the flat dict `<feature>.scale`, `.offset` (and `.origin` where there is one), fit for safetensors."""
        state = {}
        for key in self.features:
            for part, value in zip(("scale", "offset", "origin"), self.parts(key), strict=True):
                if value is not None:
                    state[f"{key}.{part}"] = value.detach().cpu()
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Normalizer:
        """Return the normalizer that `state()` described."""
        keys = dict.fromkeys(name.rpartition(".")[0] for name in state)
        expected = {f"{key}.{part}" for key in keys for part in ("scale", "offset")}
        optional = {f"{key}.origin" for key in keys}
        odd = sorted(expected ^ (set(state) - optional))
        if odd:
            raise DipoleError(f"the normalizer's state is incomplete or not one: {', '.join(odd)}")
        origin = {key: state[f"{key}.origin"] for key in keys if f"{key}.origin" in state}
        return cls({key: (state[f"{key}.scale"], state[f"{key}.offset"]) for key in keys}, origin)

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
        low, high = (need("q01"), need("q99")) if mode == "quantiles" else (need("q10"), need("q90"))
        flat = high - low < SMALLEST_RANGE
        low, high = np.where(flat, need("min"), low), np.where(flat, need("max"), high)
    width = high - low
    scale = np.where(width < SMALLEST_RANGE, 1.0, 2.0 / np.maximum(width, SMALLEST_RANGE))
    return scale, -scale * (low + high) / 2
