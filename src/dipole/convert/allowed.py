"""The only names a foreign pickle may use, and what each one makes.

`NAMES` maps every spelling (Python 2 module names, numpy before and after 2.0) to one canonical name; `REDUCERS` are
the names that may be called, each with a function of ours that stands in for it; `CONSTRUCTORS` are the classes whose
objects are kept as records. OmegaConf's objects are rendered as plain values by `dipole.convert.tree`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dipole.convert.values import (
    NUMPY_CODES,
    STORAGE_DTYPES,
    TORCH_DTYPES,
    Global,
    Record,
    Storage,
    TensorView,
    count,
)
from dipole.errors import DipoleError

_MAX_TEXT_ITEM = 1 << 20


def _is(value: Any, kind: Any, what: str) -> Any:
    if not isinstance(value, kind):
        raise DipoleError(f"the pickle is damaged: {what} is a {type(value).__name__.lower()}")
    return value


# torch ---------------------------------------------------------------------------------------------------------------


def _tensor(storage: Storage, offset: int, size: Any, stride: Any, *_: Any) -> TensorView:
    _is(storage, Storage, "a tensor's storage")
    return TensorView(storage, storage.dtype, offset, tuple(size), tuple(stride))


def _tensor_v3(
    storage: Storage, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> TensorView:
    _is(storage, Storage, "a tensor's storage")
    name = _is(dtype, Global, "a tensor's dtype").name
    if name.removeprefix("torch.") not in TORCH_DTYPES:
        raise DipoleError(f"tensors of dtype '{name}' are not supported")
    return TensorView(storage, TORCH_DTYPES[name.removeprefix("torch.")], offset, tuple(size), tuple(stride))


def _parameter(data: TensorView, *_: Any) -> TensorView:
    view: TensorView = _is(data, TensorView, "a parameter's value")
    return view


def _tensor_of_type(function: Global, kind: Any, arguments: tuple[Any, ...], *_: Any) -> Any:
    name = _is(function, Global, "a tensor's maker").name
    makers: dict[str, Callable[..., TensorView]] = {
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_parameter": _parameter,
    }
    if name not in makers:
        raise DipoleError(f"the pickle rebuilds a tensor through '{name}': refused")
    return makers[name](*_is(arguments, tuple, "a tensor's description"))


def _device(*words: Any) -> str:
    return ":".join(str(_is(word, (str, int), "a device")) for word in words)


# numpy ---------------------------------------------------------------------------------------------------------------


def _dtype(code: str, *_: Any) -> Record:
    return Record("numpy.dtype", {"code": _is(code, str, "a numpy dtype"), "order": "<"})


def _numpy_dtype(record: Any) -> np.dtype:
    code = _is(record, Record, "a numpy dtype").state.get("code", "")
    if code in NUMPY_CODES:
        return np.dtype(code if code[1:] == "1" else f"{record.state['order']}{code}")
    if code[:1] in ("U", "S") and code[1:].isdigit() and int(code[1:]) < _MAX_TEXT_ITEM:
        return np.dtype(code if code[0] == "S" else f"{record.state['order']}{code}")
    raise DipoleError(f"numpy arrays of dtype '{ascii(code)[1:20]}' are not supported (object arrays are refused)")


def _array(data: bytes, dtype: Any, shape: Any, order: str) -> np.ndarray:
    kind = _numpy_dtype(dtype)
    shape = tuple(shape)
    if any(type(n) is not int or n < 0 for n in shape) or len(shape) > 32:
        raise DipoleError("a numpy array in the pickle has an impossible shape")
    if not isinstance(data, bytes | bytearray) or len(data) != count(shape) * kind.itemsize:
        raise DipoleError(f"a numpy array of shape {shape} does not have the bytes for it")
    flat = np.frombuffer(data, kind) if len(data) else np.zeros(count(shape), kind)
    array = flat.reshape(shape, order="F" if order == "F" else "C")
    return np.ascontiguousarray(array.astype(kind.newbyteorder("="))).reshape(shape)


def _empty_array(*_: Any) -> Record:
    return Record("numpy.ndarray", {"array": np.zeros(0)})


def _array_from_buffer(data: bytes, dtype: Any, shape: Any, order: str) -> Record:
    return Record("numpy.ndarray", {"array": _array(data, dtype, shape, order)})


def _scalar(dtype: Any, data: bytes) -> Any:
    return _array(data, dtype, (), "C").item()


# plain Python --------------------------------------------------------------------------------------------------------


def _dict(items: Any = ()) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, dict) else items
    return {_key(key): value for key, value in pairs}


def _key(key: Any) -> Any:
    if not isinstance(key, str | int | float | bool | bytes | None):
        raise DipoleError(f"the pickle uses a {type(key).__name__.lower()} as a dictionary key: refused")
    return key


def _defaultdict(factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    return _dict(items)


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise DipoleError(f"the pickle encodes text as '{ascii(encoding)[1:20]}': refused")
    return str(_is(text, str, "a text")).encode(encoding)


def _bytearray(data: Any = b"", encoding: str | None = None) -> bytearray:
    return bytearray(_encode(data, encoding) if encoding is not None else _is(data, bytes | bytearray, "bytes"))


def _sequence(kind: type) -> Callable[..., Any]:
    def make(items: Any = ()) -> Any:
        values = list(_is(items, list | tuple | set | frozenset, "the content of a sequence"))
        return kind(map(_key, values)) if kind in (set, frozenset) else kind(values)

    return make


def _path(*parts: Any) -> str:
    text = "/".join(_is(part, str, "a part of a path") for part in parts)
    return text.replace("//", "/", 1) if text.startswith("//") else text


def _type_name(name: Any) -> Global:
    """Stand in for dill's lookup of a built-in type by name: the result is only ever a label."""
    return Global(f"type.{_is(name, str, 'the name of a type')[:80]}")


# the tables ----------------------------------------------------------------------------------------------------------

REDUCERS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_type,
    "torch.Size": _sequence(tuple),
    "torch.device": _device,
    "numpy.dtype": _dtype,
    "numpy._reconstruct": _empty_array,
    "numpy.scalar": _scalar,
    "numpy._frombuffer": _array_from_buffer,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _defaultdict,
    "_codecs.encode": _encode,
    "builtins.dict": _dict,
    "builtins.list": _sequence(list),
    "builtins.tuple": _sequence(tuple),
    "builtins.set": _sequence(set),
    "builtins.frozenset": _sequence(frozenset),
    "builtins.bytes": lambda data=b"": bytes(_is(data, bytes | bytearray, "bytes")),
    "builtins.bytearray": _bytearray,
    "pathlib.Path": _path,
    "dill._dill._load_type": _type_name,
}

_OMEGACONF_NODES = ("Any", "Boolean", "Bytes", "Float", "Integer", "InterpolationResult", "Path", "String", "Value")
CONSTRUCTORS = frozenset(
    ["omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.base.Metadata"]
    + ["omegaconf.base.ContainerMetadata"]
    + [f"omegaconf.nodes.{name}Node" for name in _OMEGACONF_NODES]
)

_LABELS = (
    ["typing.Any", "typing.Union", "numpy.ndarray", "torch.Tensor", "torch.nn.parameter.Parameter"]
    + ["torch.storage.UntypedStorage", "torch._tensor.Tensor"]
    + [f"torch.{name}" for name in (*STORAGE_DTYPES, *TORCH_DTYPES)]
    + [f"builtins.{name}" for name in ("int", "float", "bool", "str", "object", "complex")]
)


def _all_names() -> dict[str, str]:
    """Return every allowed spelling -> canonical name."""
    names = {name: name for name in (*REDUCERS, *CONSTRUCTORS, *_LABELS) if not name.startswith("numpy._")}
    names.pop("numpy.scalar")
    for name in tuple(names):
        if name.startswith("builtins."):
            names[name.replace("builtins.", "__builtin__.")] = name
    for core in ("numpy.core", "numpy._core"):
        names |= {f"{core}.multiarray._reconstruct": "numpy._reconstruct", f"{core}.multiarray.scalar": "numpy.scalar"}
        names[f"{core}.numeric._frombuffer"] = "numpy._frombuffer"
    for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        names |= {f"pathlib.{kind}": "pathlib.Path", f"pathlib._local.{kind}": "pathlib.Path"}
    return names


NAMES: Mapping[str, str] = _all_names()


def build_state(target: Any, state: Any) -> None:
    """Give a record its state, as BUILD asks; the attributes of a dictionary (torch's `_metadata`) are dropped."""
    if isinstance(target, dict):
        return
    kind = target.kind if isinstance(target, Record) else type(target).__name__.lower()
    if kind == "numpy.dtype":
        if (
            type(state) is not tuple
            or len(state) < 8
            or state[1] not in ("<", ">", "|", "=")
            or state[2:5] != (None,) * 3
        ):
            raise DipoleError("a structured numpy dtype is not supported")
        target.state["order"] = state[1] if state[1] == ">" else "<"
    elif kind == "numpy.ndarray":
        _, shape, dtype, fortran, data = _is(state, tuple, "the state of an array")
        target.state["array"] = _array(data, dtype, shape, "F" if fortran else "C")
    elif kind in CONSTRUCTORS:
        target.state = dict(_is(state, dict, f"the state of {kind}"))
    else:
        raise DipoleError(f"the pickle sets the state of a {kind}: refused")
