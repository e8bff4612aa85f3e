"""What a result was computed with: the source of a module and of all modules of dipole that it imports.

Imports are followed wherever they stand, functions included, and so are modules named in quotation marks, by which
registries of environments, formats, kinds of policies and methods import what they need (`"dipole.a.b"`;
`"dipole.a.{name}"` stands for all of a folder). What only keeps the books of experiments is left out, as it cannot
change a result: else a new system would throw away the finished parts of all others.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
BOOKS = frozenset(f"dipole{name}" for name in ("", ".systems", ".systems.card", ".systems.run", ".systems.store"))

_TEXT = re.compile(r'""".*?"""', re.DOTALL)  # docstrings, whose examples import nothing
_FROM = re.compile(r"^[ \t]*from (dipole[\w.]*) import (\([^)]*\)|[^\n#]*)", re.MULTILINE)
_PLAIN = re.compile(r"^[ \t]*import (dipole[\w.]*)", re.MULTILINE)
_QUOTED = re.compile(r"""["'](dipole\.[\w.]+)["']""")
_FOLDER = re.compile(r"""["'](dipole\.[\w.]+)\.\{""")


@cache
def digest(module: str) -> str:
    """Return the digest of what a loaded module computes with, whether it is dipole's or somebody else's.

    In one process it stays the same, whatever is edited meanwhile: so does what was loaded.
    """
    own = ""
    if _file(module) is None:
        try:
            own = inspect.getsource(sys.modules[module])
        except (KeyError, OSError, TypeError):  # typed in, or written in C
            own = ""
    found = hashlib.sha256(own.encode())
    for name in sorted(followed([module, *imports(own)])):
        found.update(f"{name}\0{_source(name)}\0".encode())
    return found.hexdigest()


def followed(modules: list[str]) -> set[str]:
    """Return those of some modules that are dipole's, and all modules of dipole that these import, directly or not."""
    found: set[str] = set()
    left = list(modules)
    while left:
        name = left.pop()
        if name not in found and name not in BOOKS and _file(name) is not None:
            found.add(name)
            left += [name.rpartition(".")[0], *imports(_source(name))]
    return found


def imports(source: str) -> set[str]:
    """Return the names below dipole that a source imports; of `from a import b` both `a` and `a.b`, whatever b is."""
    code = _TEXT.sub("", source)
    found = {*_PLAIN.findall(code), *_QUOTED.findall(code)}
    for folder in _FOLDER.findall(code):
        files = PACKAGE.joinpath(*folder.split(".")[1:]).glob("*.py")
        found |= {f"{folder}.{file.stem}" for file in files}
    for module, names in _FROM.findall(code):
        parts = (name.split(" as ")[0].strip() for name in names.strip("()").split(","))
        found |= {module, *(f"{module}.{part}" for part in parts if part)}
    return found


def _file(module: str) -> Path | None:
    """Return the file of a module of dipole; None where there is no such module."""
    top, *parts = module.split(".")
    if top != "dipole":
        return None
    path = PACKAGE.joinpath(*parts)
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in candidates if file.is_file()), None)


def _source(module: str) -> str:
    file = _file(module)
    return "" if file is None else file.read_text(encoding="utf-8")
