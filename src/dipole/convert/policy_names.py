"""Which of our names the features of a foreign policy get, and whether one vector is split into several features."""

from __future__ import annotations

from collections.abc import Mapping

from dipole.convert.policy_parts import Column
from dipole.data.features import Feature
from dipole.errors import DipoleError

STATE, IMAGE = "observation.state", "observation.image"


def default_names(features: Mapping[str, bool]) -> dict[str, str]:
    """Return our names of features (`{foreign name: whether it is an image}`), where the user gives none."""
    cameras = [key for key, image in features.items() if image]
    vectors = [key for key, image in features.items() if not image]
    names = {key: f"observation.images.{key}" for key in cameras} | {key: f"observation.{key}" for key in vectors}
    if len(cameras) == 1:
        names[cameras[0]] = IMAGE
    if len(vectors) == 1:
        names[vectors[0]] = STATE
    return names


def renamed(columns: list[Column], names: Mapping[str, str]) -> list[Column]:
    """Return the features under the names that the user gives.

    Args:
        columns: Features, in the foreign order.
        names: Foreign name -> our name; or, for a vector, `NAME:WIDTH,NAME:WIDTH` to split it.

    Raises:
        DipoleError: A name is unknown or comes twice, or the widths do not add up.
    """
    known = [column.key for column in columns]
    for key in names:
        if key not in known:
            raise DipoleError(f"--rename {key}: the policy has no such feature, it has {', '.join(known)}")
    found: list[Column] = []
    for column in columns:
        found += _split(column, names[column.key]) if column.key in names else [column]
    given = [column.name for column in found]
    twice = [name for name in given if given.count(name) > 1]
    if twice:
        raise DipoleError(f"two features would be called '{twice[0]}': give other names with --rename OLD=NEW")
    return found


def _split(column: Column, text: str) -> list[Column]:
    parts = [part.partition(":") for part in text.split(",")]
    if len(parts) == 1 and not parts[0][1]:
        return [_part(column, text, 0, column.width)]
    widths = [int(width) if width.isdigit() else 0 for _, _, width in parts]
    if column.feature.is_image or min(widths) < 1 or sum(widths) != column.width:
        raise DipoleError(
            f"--rename {column.key}={text}: the widths must add up to the {column.width} numbers of '{column.key}'"
        )
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return [_part(column, parts[i][0], starts[i], widths[i]) for i in range(len(parts))]


def _part(column: Column, name: str, start: int, width: int) -> Column:
    if not name.startswith("observation."):
        raise DipoleError(f"--rename {column.key}={name}: our names of observations begin with 'observation.'")
    if column.feature.is_image:
        return Column(column.key, name, column.feature, width, column.scale, column.offset)
    part = slice(start, start + width)
    return Column(column.key, name, Feature("float32", (width,)), width, column.scale[part], column.offset[part])
