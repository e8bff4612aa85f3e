"""The pickle reader on its own: plain values come out as they went in, everything else is named and refused."""

import collections
import math
import pickle
import pickletools
from pathlib import PurePosixPath

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dipole.convert.allowed import CONSTRUCTORS, NAMES, REDUCERS
from dipole.convert.tree import Renderer, plain, restore
from dipole.convert.unpickle import unpickle
from dipole.convert.values import ITEM_BYTES, NUMPY_CODES, STORAGE_DTYPES, TORCH_DTYPES, Record, Storage, TensorView
from dipole.errors import DipoleError

_scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text() | st.binary()
)
_keys = st.text() | st.integers(-5, 5) | st.tuples(st.text(), st.integers(-5, 5))
_values = st.recursive(
    _scalars | st.frozensets(st.integers(-9, 9)) | st.binary().map(bytearray),
    lambda inner: st.lists(inner) | st.dictionaries(_keys, inner) | st.tuples(inner, inner) | st.tuples(inner),
    max_leaves=20,
)


@given(value=_values, protocol=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_plain_values_come_out_as_they_went_in(value, protocol):
    assert unpickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(6))
def test_shared_values_stay_shared(protocol):
    inner = [1, 2]
    first, second, mapping = unpickle(pickle.dumps([inner, inner, {"a": inner}], protocol))
    assert first is second is mapping["a"]


@pytest.mark.parametrize("protocol", range(6))
def test_collections_sets_and_paths(protocol):
    value = {
        "ordered": collections.OrderedDict(a=1, b=2),
        "default": collections.defaultdict(list, {1: [2]}),
        "counter": collections.Counter("aab"),
        "set": {1, 2},
        "path": PurePosixPath("/a/b"),
        "relative": PurePosixPath("a/b"),
    }
    expected = {"ordered": {"a": 1, "b": 2}, "default": {1: [2]}, "counter": {"a": 2, "b": 1}, "set": {1, 2}}
    assert unpickle(pickle.dumps(value, protocol)) == {**expected, "path": "/a/b", "relative": "a/b"}


ARRAYS = [
    np.arange(6, dtype="<f4").reshape(2, 3),
    np.arange(6, dtype=">i2"),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.zeros((0, 4)),
    np.array(3.5),
    np.array([True, False]),
    np.array(["a", "bcd"]),
    np.array([b"a", b"bcd"]),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_arrays(array, protocol):
    record = unpickle(pickle.dumps(array, protocol))
    assert isinstance(record, Record)
    np.testing.assert_array_equal(record.state["array"], array)
    assert record.state["array"].shape == array.shape
    assert record.state["array"].dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(-3), np.bool_(True), np.float64(math.pi)])
def test_numpy_scalars_become_python_numbers(value):
    found = unpickle(pickle.dumps(value, 4))
    assert found == value.item()
    assert type(found) is type(value.item())


REFUSED = {
    "object array": (np.array([1, "a"], object), "object arrays are refused"),
    "structured array": (np.zeros(2, [("a", "f4")]), "numpy"),
    "complex": (1 + 2j, "builtins.complex"),
    "a class": (Record, "dipole.convert.values.Record"),
    "an exception": (ValueError("x"), "builtins.ValueError"),
    "a function": (math.sqrt, "math.sqrt"),
    "a slice": (slice(1, 2), "builtins.slice"),
    "tuple keys of tuples": ({((1,),): 2}, "dictionary key"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_are_not_plain_are_refused_by_name(name):
    value, words = REFUSED[name]
    with pytest.raises(DipoleError, match=words):
        unpickle(pickle.dumps(value, 4))


# Instructions by hand: things that Python's own pickler never writes.
CRAFTED = {
    "call a plain value": (b"\x80\x02X\x01\x00\x00\x00a)R.", "global was expected"),
    "call a label": (b"\x80\x02ctorch\nfloat32\n)R.", "torch.float32.*may not be called"),
    "call with a list": (b"\x80\x02ccollections\nOrderedDict\n]R.", "tuple was expected"),
    "instance of a reducer": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "may not be created"),
    "state of a list": (b"\x80\x02]}b.", "sets the state of a list"),
    "state of a global": (b"\x80\x02ctorch\nfloat32\n}b.", "sets the state of a global"),
    "state of a callable": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", "sets the state"),
    "old-style instance": (b"(ios\nsystem\n.", "INST"),
    "old-style object": (b"(cbuiltins\nlist\no.", "OBJ"),
    "extension registry": (b"\x80\x02\x82\x01.", "EXT1"),
    "text persistent id": (b"Pstorage\n.", "PERSID"),
    "storage without archive": (
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000NK\x01tQ.",
        "not a",
    ),
    "out-of-band buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "memo that was never set": (b"\x80\x02h\x07.", "damaged"),
    "mark as a value": (b"\x80\x02(.", "mark"),
    "odd number of items": (b"\x80\x02}(K\x01u.", "damaged"),
    "empty stack": (b"\x80\x02.", "damaged"),
    "no end": (b"\x80\x02K\x01", "damaged|truncated"),
    "nothing": (b"", "truncated|damaged"),
    "text, not a pickle": (b"hello world, this is no pickle", "damaged|refused"),
    "dotted attribute": (b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.mro\x93.", "ndarray.mro"),
    "huge declared text": (b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"abc.", "damaged"),
    "huge declared bytes": (b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"abc.", "damaged"),
    "array larger than its bytes": (
        b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87RX\x01\x00\x00\x00a\x86R.",
        "does not have the bytes",
    ),
    "control characters in a name": (b"\x80\x04\x8c\x02os\x8c\x07\x1b[31mab\x93.", r"os\.\\x1b\[31mab"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_instructions_are_refused(name):
    data, words = CRAFTED[name]
    with pytest.raises(DipoleError, match=words):
        unpickle(data)


def test_every_instruction_is_either_handled_or_refused():
    # New Python versions add instructions: this lists what the reader handles, so an addition is noticed.
    from dipole.convert import unpickle as module

    handled = {name.removeprefix("_op_").upper() for name in dir(module._Machine) if name.startswith("_op_")}
    handled |= module._PUSH_ARGUMENT | module._PUSH_NEW.keys() | module._IGNORED | {"STOP"}
    refused = {opcode.name for opcode in pickletools.opcodes} - handled
    expected = {"INST", "OBJ", "PERSID", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "NEXT_BUFFER", "READONLY_BUFFER"}
    assert refused == expected


def test_the_table_of_names_is_consistent():
    known = REDUCERS.keys() | CONSTRUCTORS
    labels = set(NAMES.values()) - known
    assert known <= set(NAMES.values())
    # Names without an entry cannot be called or created; they may only be mentioned.
    assert all(name.startswith(("torch.", "typing.", "builtins.", "numpy.ndarray")) for name in labels)
    for forbidden in ("os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.getattr", "torch.load"):
        assert forbidden not in NAMES
    assert ITEM_BYTES.keys() >= {*NUMPY_CODES.values(), *STORAGE_DTYPES.values(), *TORCH_DTYPES.values()}


def test_tensor_views_must_lie_inside_their_storage():
    storage = Storage("0", "F32", 12)
    assert TensorView(storage, "F32", 0, (3, 4), (4, 1)).nbytes == 48
    assert TensorView(storage, "F32", 12, (0, 4), (4, 1)).numel == 0
    for offset, shape, stride in [(1, (3, 4), (4, 1)), (0, (3, 4), (5, 1)), (0, (2**61,), (1,)), (13, (), ())]:
        with pytest.raises(DipoleError, match="beyond its storage"):
            TensorView(storage, "F32", offset, shape, stride)
    for offset, shape, stride in [
        (-1, (3,), (1,)),
        (0, (-3,), (1,)),
        (0, (3,), (-1,)),
        (0, (True,), (1,)),
        (0, ("3",), (1,)),
    ]:
        with pytest.raises(DipoleError, match="natural number"):
            TensorView(storage, "F32", offset, shape, stride)
    with pytest.raises(DipoleError, match="2 sizes but 1 strides"):
        TensorView(storage, "F32", 0, (1, 1), (1,))


def test_a_cycle_and_a_billion_laughs_are_refused(monkeypatch):
    cycle: list = []
    cycle.append(cycle)
    with pytest.raises(DipoleError, match="contains itself"):
        Renderer().render(unpickle(pickle.dumps(cycle)))
    monkeypatch.setattr("dipole.convert.tree.MAX_NODES", 50_000)  # the real limit takes seconds to reach
    laughs: list = ["ha"]
    for _ in range(40):  # 2^40 values in 300 bytes
        laughs = [laughs, laughs]
    with pytest.raises(DipoleError, match="unfolds to more than 50000 values"):
        Renderer().render(unpickle(pickle.dumps(laughs)))


def test_deep_nesting_is_refused_without_overflowing_the_stack():
    for opener in (b"]" * 30_000 + b"a" * 29_999, b")" + b"\x85" * 30_000):
        with pytest.raises(DipoleError, match="levels"):
            Renderer().render(unpickle(b"\x80\x02" + opener + b"."))


@given(value=_values)
@settings(max_examples=100, deadline=None)
def test_tree_and_back(value):
    def listed(item):
        if isinstance(item, list | tuple | set | frozenset):
            return [listed(i) for i in item]
        return {k: listed(v) for k, v in item.items()} if isinstance(item, dict) else item

    assert restore(Renderer().render(value)) == listed(value)


def test_plain_is_strict_json():
    assert plain({1: float("inf"), "b": b"x", "n": [float("nan"), None, 2]}) == {"1": "inf", "n": ["nan", None, 2]}


_SEED = pickle.dumps(
    {"a": [1, 2.5, "x", b"y", (None, True)], "n": np.arange(3.0), "o": collections.OrderedDict(k=1)}, 2
)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_pickles_give_an_error_or_a_value_and_nothing_else(data):
    damaged = bytearray(_SEED)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged
    message = ""
    try:
        Renderer().render(unpickle(bytes(damaged)))
    except DipoleError as error:  # anything else fails
        message = str(error)
    assert "\n" not in message
