"""What a foreign pickle may contain besides plain Python values: inert descriptions of storages, tensors and records.

None of them can be called and none carries behaviour: they say what the pickle said.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dipole.convert.archive import Archive
from dipole.errors import DipoleError

# torch's names of storage classes and of dtypes -> (safetensors code, bytes per element).
STORAGE_DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
TORCH_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
ITEM_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
NUMPY_CODES = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8"}
NUMPY_CODES |= {"u8": "U64", "u4": "U32", "u2": "U16", "u1": "U8", "b1": "BOOL"}

MAX_DIMENSIONS = 32


@dataclass(frozen=True)
class Global:
    """An allowed name of a foreign module, e.g. `torch.float32`; what it stands for is never imported."""

    name: str


@dataclass
class Record:
    """An object of an allowed foreign class: its class name and the state that BUILD gave it."""

    kind: str
    state: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """Bytes in the archive: their key, the dtype of its elements ("U8" when untyped), and how many there are."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class TensorView:
    """A strided view of a storage, checked to lie inside it."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_counts("shape", self.shape)
        _check_counts("stride", self.stride)
        _check_counts("offset", (self.offset,))
        if len(self.shape) != len(self.stride):
            raise DipoleError(f"a tensor has {len(self.shape)} sizes but {len(self.stride)} strides")
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        available = self.storage.numel * ITEM_BYTES[self.storage.dtype]
        if self.numel and (last + 1) * ITEM_BYTES[self.dtype] > available:
            raise DipoleError(f"a tensor of shape {self.shape} reaches beyond its storage of {available} bytes")

    @property
    def numel(self) -> int:
        """Number of elements."""
        return count(self.shape)

    @property
    def nbytes(self) -> int:
        """Size when contiguous."""
        return self.numel * ITEM_BYTES[self.dtype]

    def materialise(self, archive: Archive) -> np.ndarray:
        """Return the elements, contiguous, as unsigned integers of the element's size (`[*shape]`)."""
        size = ITEM_BYTES[self.dtype]
        words = archive.storage(self.storage.key)
        words = words[: len(words) // size * size].view(f"u{size}")
        if self.numel == 0:
            return np.empty(self.shape, words.dtype)
        strides = [s * size for s in self.stride]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(words[self.offset :], self.shape, strides))


def count(shape: tuple[int, ...]) -> int:
    """Return the number of elements of `shape` (Python integers, so a hostile shape cannot overflow)."""
    total = 1
    for n in shape:
        total *= n
    return total


def _check_counts(what: str, numbers: Any) -> None:
    if not isinstance(numbers, tuple) or len(numbers) > MAX_DIMENSIONS:
        raise DipoleError(f"a tensor's {what} is not a tuple of at most {MAX_DIMENSIONS} numbers")
    if any(type(n) is not int or n < 0 or n >= 2**62 for n in numbers):
        raise DipoleError(f"a tensor's {what} holds something other than a natural number")
