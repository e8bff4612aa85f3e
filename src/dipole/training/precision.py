"""fp32 or bf16 autocast: measured, not guessed. CPUs with AMX or AVX512-BF16 and GPUs gain, others lose."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

PrecisionName = Literal["fp32", "bf16"]

_WARMUP_UPDATES = 2  # the first ones allocate memory and pack weights
_MOST_UPDATES = 200
_PRODUCT_SIZE, _PRODUCT_SECONDS = 512, 0.05  # of the size of a layer's: 0.3 GFLOP, about a millisecond


def autocast(device: torch.device, precision: PrecisionName) -> AbstractContextManager[None]:
    """Return the context a loss is computed in; weights, moments and EMA stay fp32 either way."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def time_updates(
    update: Callable[[], Any], seconds: float, device: torch.device, agree: Callable[[int], int] = lambda n: n
) -> float:
    """Return the seconds one update takes: the mean without the slowest tenth, over about `seconds`.

    Args:
        update: Does one (or whatever else is to be timed).
        seconds: Time to spend.
        device: Where it runs (a GPU is waited for).
        agree: Makes several processes do the same number of updates.
    """

    def timed() -> float:
        began = time.perf_counter()
        update()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - began

    for _ in range(_WARMUP_UPDATES):
        first = timed()
    count = agree(max(3, min(_MOST_UPDATES, int(seconds / max(first, 1e-6)))))
    times = sorted(timed() for _ in range(count))
    kept = times[: max(1, count - count // 10)]
    return sum(kept) / len(kept)


def time_product(precision: PrecisionName) -> float:
    """Return the seconds that a product of two square matrices of `_PRODUCT_SIZE` takes on the CPU."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = torch.ones(2, _PRODUCT_SIZE, _PRODUCT_SIZE, dtype=dtype)
    return time_updates(lambda: torch.mm(left, right), _PRODUCT_SECONDS, torch.device("cpu"))


def faster(seconds: dict[PrecisionName, float]) -> PrecisionName:
    """Return the faster precision; fp32 unless bf16 gains at least 5 %, the noise of such a measurement."""
    if "bf16" in seconds and ("fp32" not in seconds or seconds["bf16"] < 0.95 * seconds["fp32"]):
        return "bf16"
    return "fp32"


def candidates(precision: str) -> Sequence[PrecisionName]:
    """Return the precisions to measure for a setting."""
    known: dict[str, Sequence[PrecisionName]] = {"auto": ("fp32", "bf16"), "fp32": ("fp32",), "bf16": ("bf16",)}
    return known[precision]
