"""The spaces in a Minari dataset's metadata: a JSON text, flattened to one feature per leaf.

Box at the root            observation.state, or observation.image if it is a picture; action
Dict, Tuple                observation.<key>.<key>..., action.<key>...; the parts of a Tuple are numbered
Discrete                   int64 (1,)
picture                    (H, W, C) uint8: a Box as Minari defines one (uint8, 0 to 255, at least 32 x 32)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dipole.data.features import Feature
from dipole.errors import DipoleError

_MAX_DEPTH = 16
_MIN_PICTURE = 32

Space = dict[str, Any]


@dataclass(frozen=True)
class Leaf:
    """One array of an observation or action.

    Attributes:
        key: Name of its feature.
        path: Keys (Dict) and numbers (Tuple) that lead to it.
        dtype: numpy name, or "string".
        shape: Shape in the space, `()` for a Discrete.
        picture: Whether Minari treats it as a picture, and may store it as JPEG.
    """

    key: str
    path: tuple[str | int, ...]
    dtype: str
    shape: tuple[int, ...]
    picture: bool = False

    def feature(self, dtype: np.dtype) -> Feature:
        """Return the feature of arrays of this leaf that are of type `dtype`."""
        if self.picture:
            return Feature("image", self.shape if len(self.shape) == 3 else (*self.shape, 1))
        return Feature("string" if self.dtype == "string" else dtype.name, self.shape or (1,))


def parse(text: Any, what: str, source: Path) -> Space:
    """Return a space from its JSON text.

    Raises:
        DipoleError: It is not one.
    """
    try:
        space = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        space = None
    if not isinstance(space, dict) or "type" not in space:
        raise DipoleError(f"{source}: '{what}' is not the JSON text of a space: the file is damaged")
    return space


def leaves(space: Space, group: str, source: Path) -> list[Leaf]:
    """Return the leaves of a space in order.

    Args:
        space: The space.
        group: `observation` or `action`: the first word of the feature names.
        source: The file, for errors.

    Raises:
        DipoleError: The space is damaged, of an unsupported kind, or two leaves would get one name.
    """
    found: list[Leaf] = []
    _collect(space, (), group, source, found)
    if not found:
        raise DipoleError(f"{source}: the {group} space is empty")
    names = [leaf.key for leaf in found]
    for name in names:
        if names.count(name) > 1:
            raise DipoleError(f"{source}: two parts of the {group} space would both be named '{name}'")
    return found


def _collect(space: Any, path: tuple[str | int, ...], group: str, source: Path, found: list[Leaf]) -> None:
    where = f"{source}: {group} space {'.'.join(map(str, path)) or '(root)'}"
    if not isinstance(space, dict) or len(path) > _MAX_DEPTH:
        raise DipoleError(f"{where} is damaged or nested too deeply")
    kind, inner = space.get("type"), space.get("subspaces")
    if kind == "Dict" and isinstance(inner, dict):
        for name, part in inner.items():
            _collect(part, (*path, name), group, source, found)
    elif kind == "Tuple" and isinstance(inner, list):
        for number, part in enumerate(inner):
            _collect(part, (*path, number), group, source, found)
    else:
        found.append(_leaf(space, path, group, where))


def _leaf(space: Space, path: tuple[str | int, ...], group: str, where: str) -> Leaf:
    kind = space.get("type")
    picture = False
    try:
        if kind == "Box":
            dtype, shape = np.dtype(space["dtype"]).name, _shape(space["shape"])
            picture = _is_picture(space, dtype, shape)
        elif kind == "Discrete":
            dtype, shape = "int64", ()
        elif kind == "MultiDiscrete":
            dtype, shape = np.dtype(space["dtype"]).name, np.shape(space["nvec"])
        elif kind == "MultiBinary":
            dtype, shape = "int8", _shape(space["n"] if isinstance(space["n"], list) else [space["n"]])
        elif kind == "Text":
            dtype, shape = "string", ()
        else:
            raise DipoleError(
                f"{where} is a '{str(kind)[:40]}': Box, Discrete, MultiDiscrete, MultiBinary, Text, Dict and "
                "Tuple can be read"
            )
        leaf = Leaf(_key(path, group, picture), path, dtype, shape, picture)
        leaf.feature(np.dtype(np.str_) if dtype == "string" else np.dtype(dtype))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DipoleError(f"{where} is damaged ({type(error).__name__}: {error})") from None
    return leaf


def _shape(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, list) or any(type(n) is not int or not 0 < n < 2**31 for n in sizes):
        raise ValueError(f"shape {str(sizes)[:40]}")
    return tuple(sizes)


def _is_picture(space: Space, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether Minari takes a Box for a picture (and would store it as JPEG)."""
    if dtype != "uint8" or len(shape) not in (2, 3) or min(shape[:2]) < _MIN_PICTURE:
        return False
    return bool(np.all(np.asarray(space["low"]) == 0) and np.all(np.asarray(space["high"]) == 255))


def _key(path: tuple[str | int, ...], group: str, picture: bool) -> str:
    if path:
        return ".".join([group, *map(str, path)])
    if group == "action":
        return "action"
    return f"{group}.image" if picture else f"{group}.state"


def box(feature: Feature) -> Space:
    """Return the widest Box that holds a feature's values (Text for texts)."""
    if feature.is_string:
        charset = "".join(map(chr, range(32, 127)))
        return {"type": "Text", "max_length": 4096, "min_length": 0, "charset": charset}
    dtype = feature.numpy_dtype
    low: float | int
    high: float | int
    if dtype.kind == "f":
        low, high = -np.inf, np.inf
    elif dtype.kind == "b":
        low, high, dtype = 0, 1, np.dtype(np.int8)
    else:
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    shape = feature.shape
    return {
        "type": "Box",
        "dtype": dtype.name,
        "shape": list(shape),
        "low": np.full(shape, low, dtype).tolist(),
        "high": np.full(shape, high, dtype).tolist(),
    }


def nested(parts: dict[tuple[str, ...], Space]) -> Space:
    """Return the Dict space of `{path: space}`; a single part with an empty path is returned as it is."""
    if () in parts:
        return parts[()]
    root: Space = {"type": "Dict", "subspaces": {}}
    for path, space in parts.items():
        node = root
        for name in path[:-1]:
            node = node["subspaces"].setdefault(name, {"type": "Dict", "subspaces": {}})
            if node["type"] != "Dict":
                raise DipoleError(f"'{'.'.join(path)}' lies inside another feature: rename one of the two")
        if path[-1] in node["subspaces"]:
            raise DipoleError(f"'{'.'.join(path)}' holds other features: rename one of them")
        node["subspaces"][path[-1]] = space
    return root
