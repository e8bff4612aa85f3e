"""The value of a foreign pickle as JSON, with its tensors and arrays set aside.

Every JSON object is a tag, so nothing in the pickle can pass for one: `{"dict": [[key, value], ...]}`, `{"tensor":
"t0"}` (its name in the safetensors file), `{"bytes": base64}`, `{"float": "nan"}`, `{"type": "torch.float32"}`. Tuples
and sets become lists. OmegaConf containers become plain dictionaries, lists and values; interpolations stay the strings
they were.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dipole.convert.values import Global, Record, TensorView
from dipole.errors import DipoleError

MAX_DEPTH = 100
MAX_NODES = 1_000_000

_AS_IS = (bool, str)
_SEQUENCES = (list, tuple, set, frozenset)


@dataclass
class Renderer:
    """Turns a value into its JSON tree and collects the tensors on the way.

    Shared values are written once per place, so the number of nodes is limited (a "billion laughs" pickle is tiny but
    endless); so is the depth, which also ends cycles.
    """

    tensors: list[TensorView | np.ndarray] = field(default_factory=list)
    nodes: int = 0
    _names: dict[int, str] = field(default_factory=dict)

    def render(self, value: Any, depth: int = 0) -> Any:
        """Return the JSON tree of `value`."""
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            limit = f"{MAX_DEPTH} levels" if depth > MAX_DEPTH else f"{MAX_NODES} values"
            raise DipoleError(f"the pickle unfolds to more than {limit} (or contains itself): refused")
        if value is None or isinstance(value, _AS_IS):
            return value
        if isinstance(value, int):
            return _integer(value)
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, bytes | bytearray):
            return {"bytes": base64.b64encode(value).decode("ascii")}
        if isinstance(value, dict):
            items = [[self.render(k, depth + 1), self.render(v, depth + 1)] for k, v in value.items()]
            return {"dict": items}
        if isinstance(value, _SEQUENCES):
            return [self.render(item, depth + 1) for item in value]
        if isinstance(value, Global):
            return {"type": value.name}
        if isinstance(value, TensorView):
            return self._tensor(value, value)
        if isinstance(value, Record):
            return self._record(value, depth)
        raise DipoleError(f"the pickle holds a {type(value).__name__.lower()} where a value should be: refused")

    def _tensor(self, owner: object, data: TensorView | np.ndarray) -> dict[str, str]:
        # The same object in two places (EMA and model sharing a buffer) is written once.
        if id(owner) not in self._names:
            self._names[id(owner)] = f"t{len(self.tensors)}"
            self.tensors.append(data)
        return {"tensor": self._names[id(owner)]}

    def _record(self, record: Record, depth: int) -> Any:
        if record.kind == "numpy.ndarray":
            array = record.state["array"]
            if array.dtype.kind == "S":
                array = np.char.decode(array, "latin-1")
            return array.tolist() if array.dtype.kind == "U" else self._tensor(record, array)
        if record.kind == "numpy.dtype":
            return {"type": f"numpy.{record.state['code']}"}
        if record.kind.endswith("Metadata"):
            return None
        content = record.state.get("_content" if record.kind.endswith("Config") else "_val")
        return self.render(content, depth + 1)


def _integer(value: int) -> int:
    if value.bit_length() > 64:
        raise DipoleError(f"the pickle holds an integer of {value.bit_length()} bits: refused")
    return value


@dataclass(frozen=True)
class TensorName:
    """Stands for a tensor in a tree that was read back: its name in the safetensors file."""

    name: str


def restore(tree: Any) -> Any:
    """Return the plain Python value of a JSON tree; tensors are `TensorName`s."""
    if isinstance(tree, list):
        return [restore(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((tag, value),) = tree.items()
    if tag == "dict":
        return {_key(restore(key)): restore(item) for key, item in value}
    if tag == "tensor":
        return TensorName(value)
    if tag == "bytes":
        return base64.b64decode(value)
    return float(value) if tag == "float" else str(value)


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def plain(value: Any) -> Any:
    """Return `value` fit for strict JSON: text keys, no tensors or bytes, non-finite numbers as text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items() if not isinstance(v, TensorName | bytes)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value if not isinstance(item, TensorName | bytes)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
