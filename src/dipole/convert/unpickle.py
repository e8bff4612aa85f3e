"""A pickle reader that can build plain values and nothing else.

Python's own unpickler runs whatever the pickle names. This one interprets the instructions itself (they are decoded by
`pickletools.genops`, which only parses): nothing is ever imported, looked up or called by name. A global must be in the
table of `dipole.convert.allowed`; REDUCE and NEWOBJ work only on names with an entry there, and give plain values or
the inert descriptions of `dipole.convert.values`; BUILD only stores a state in such a description. Everything else
stops with the name of what was refused.

It still runs in the sandboxed child of `dipole.convert.foreign`: two fences are better than one.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

from dipole.convert.allowed import CONSTRUCTORS, NAMES, REDUCERS, build_state
from dipole.convert.archive import Archive
from dipole.convert.values import ITEM_BYTES, STORAGE_DTYPES, Global, Record, Storage
from dipole.errors import DipoleError

MAX_OPCODES = 20_000_000

_MARK = object()
_SCALARS = (str, int, float, bool, bytes, type(None))
# fmt: off
_PUSH_ARGUMENT = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}
# fmt: on
_PUSH_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_IGNORED = frozenset(("PROTO", "FRAME"))


def unpickle(data: bytes, archive: Archive | None = None) -> Any:
    """Return the value of a pickle.

    Args:
        data: The pickle.
        archive: Where the storages that it names are; None refuses storages.

    Raises:
        DipoleError: The pickle is damaged, or asks for anything but plain values, arrays and tensors.
    """
    try:
        return _Machine(archive).run(data)
    except DipoleError:
        raise
    except RecursionError:
        raise DipoleError("the pickle is nested too deeply: refused") from None
    # genops and the handlers meet arbitrary bytes: whatever they stumble on means the same thing to the user.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, UnicodeError) as error:
        raise DipoleError(f"the pickle is damaged or truncated ({type(error).__name__})") from None


def shown(name: object) -> str:
    """Return a name out of a pickle fit for printing: ASCII without control characters, at most 80 characters."""
    return str(name).encode("unicode_escape").decode("ascii")[:80]


class _Machine:
    """The stack, the memo and one method per family of opcodes."""

    def __init__(self, archive: Archive | None) -> None:
        self.archive = archive
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number > MAX_OPCODES:
                raise DipoleError(f"the pickle has more than {MAX_OPCODES} instructions: refused")
            name = opcode.name
            if name in _PUSH_ARGUMENT:
                self.stack.append(argument)
            elif name in _PUSH_NEW:
                self.stack.append(_PUSH_NEW[name]())
            elif name == "STOP":
                return self._pop()
            elif name not in _IGNORED:
                handler = getattr(self, f"_op_{name.lower()}", None)
                if handler is None:
                    raise DipoleError(f"the pickle uses the instruction {name}, which checkpoints do not need: refused")
                handler(argument)
        raise DipoleError("the pickle is truncated: it has no end")

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise DipoleError("the pickle is damaged: a mark stands where a value should be")
        return value

    def _top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise DipoleError("the pickle is damaged: a mark stands where a value should be")
        return self.stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                items = self.stack[start + 1 :]
                del self.stack[start:]
                return items
        raise DipoleError("the pickle is damaged: a mark is missing")

    # Stack and memo.
    def _op_pop(self, _: Any) -> None:
        self.stack.pop()

    def _op_pop_mark(self, _: Any) -> None:
        self._pop_to_mark()

    def _op_dup(self, _: Any) -> None:
        self.stack.append(self._top())

    def _op_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self._top()

    def _op_put(self, index: int) -> None:
        self.memo[index] = self._top()

    def _op_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _op_binput = _op_long_binput = _op_put
    _op_binget = _op_long_binget = _op_get

    # Containers.
    def _op_tuple1(self, _: Any) -> None:
        self.stack.append((self._pop(),))

    def _op_tuple2(self, _: Any) -> None:
        last = self._pop()
        self.stack.append((self._pop(), last))

    def _op_tuple3(self, _: Any) -> None:
        last, middle = self._pop(), self._pop()
        self.stack.append((self._pop(), middle, last))

    def _op_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _op_list(self, _: Any) -> None:
        self.stack.append(self._pop_to_mark())

    def _op_dict(self, _: Any) -> None:
        items = self._pop_to_mark()
        self.stack.append({})
        self._set_items(items)

    def _op_frozenset(self, _: Any) -> None:
        self.stack.append(frozenset(_hashable(item) for item in self._pop_to_mark()))

    def _op_append(self, _: Any) -> None:
        self._extend([self._pop()])

    def _op_appends(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    def _op_setitem(self, _: Any) -> None:
        value = self._pop()
        self._set_items([self._pop(), value])

    def _op_setitems(self, _: Any) -> None:
        self._set_items(self._pop_to_mark())

    def _op_additems(self, _: Any) -> None:
        items = self._pop_to_mark()
        _expect(self._top(), set).update(_hashable(item) for item in items)

    def _extend(self, items: list[Any]) -> None:
        _expect(self._top(), list).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = _expect(self._top(), dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_hashable(key)] = value

    # Globals and what is made of them.
    def _op_global(self, argument: str) -> None:
        # genops joins the two lines by a space; the module comes first and has none.
        module, _, name = argument.partition(" ")
        self._push_global(module, name)

    def _op_stack_global(self, _: Any) -> None:
        name = self._pop()
        self._push_global(_expect(self._pop(), str), _expect(name, str))

    def _push_global(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in NAMES:
            raise DipoleError(f"the pickle asks for '{shown(full)}', which is not a plain value or tensor: refused")
        self.stack.append(Global(NAMES[full]))

    def _op_reduce(self, _: Any) -> None:
        arguments = _expect(self._pop(), tuple)
        function = _expect(self._pop(), Global)
        if function.name not in REDUCERS:
            raise DipoleError(f"the pickle calls '{shown(function.name)}', which may not be called: refused")
        self.stack.append(REDUCERS[function.name](*arguments))

    def _op_newobj(self, _: Any) -> None:
        arguments = _expect(self._pop(), tuple)
        kind = _expect(self._pop(), Global)
        if kind.name not in CONSTRUCTORS or arguments:
            raise DipoleError(f"the pickle creates a '{shown(kind.name)}', which may not be created: refused")
        self.stack.append(Record(kind.name))

    def _op_build(self, _: Any) -> None:
        state = self._pop()
        build_state(self._top(), state)

    def _op_binpersid(self, _: Any) -> None:
        """Resolve torch's reference to a storage: `("storage", class, key, location, number of elements)`."""
        word, kind, key, _, numel = _expect(self._pop(), tuple)
        dtype = _storage_dtype(_expect(kind, Global).name)
        if word != "storage" or self.archive is None or type(numel) is not int or numel < 0:
            raise DipoleError("the pickle refers to an object outside of it that is not a storage: refused")
        available = self.archive.storage_bytes(_expect(key, str))
        if numel * ITEM_BYTES[dtype] > available:
            raise DipoleError(
                f"storage {shown(key)} claims {numel} elements of {dtype}, but the file holds {available} bytes of it"
            )
        self.stack.append(Storage(key, dtype, numel))


def _storage_dtype(name: str) -> str:
    short = name.rpartition(".")[2]
    if short == "UntypedStorage":
        return "U8"
    if short not in STORAGE_DTYPES:
        raise DipoleError(f"the pickle refers to a storage of type '{shown(name)}': refused")
    return STORAGE_DTYPES[short]


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise DipoleError(
            f"the pickle is damaged: a {kind.__name__.lower()} was expected, found {type(value).__name__.lower()}"
        )
    return value


def _hashable(key: Any) -> Any:
    """Return a dictionary key or set member; only scalars and flat tuples of them (hashing deep ones can crash)."""
    if isinstance(key, _SCALARS) or (type(key) is tuple and all(isinstance(item, _SCALARS) for item in key)):
        return key
    raise DipoleError(f"the pickle uses a {type(key).__name__.lower()} as a dictionary key: refused")
