"""The codec: byte for byte openpi's, and nothing malformed passes."""

import struct

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dipole.serving.codec import CodecError, check_structure, pack, unpack
from dipole.serving.limits import Limits

# Written by openpi-client 0.1.2's packer.
GOLDEN = {
    "82ab6f62736572766174696f6e84c40b5f5f6e6461727261795f5fc3c40464617461c4080000803f000000c0c405647479"
    "7065a33c6634c405736861706591 02a670726f6d7074a46c696674": {
        "observation": np.array([1.0, -2.0], np.float32),
        "prompt": "lift",
    },
    "81a17383c40d5f5f6e7067656e657269635f5fc3c40464617461cb3ff8000000000000c4056474797065a33c6634": {
        "s": np.float32(1.5)
    },
}
VALUES = [
    np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
    np.zeros((0, 3), np.float32),
    np.array(3.5),
    np.array([True, False]),
    np.array(["ab", "c"]),
    np.array([b"ab"]),
    np.float64(2.0),
    np.int64(-3),
    np.bool_(True),
    [1, 2.5, None, True, "text", b"bytes", -(2**40)],
    {"a": {"b": [np.ones((1, 2), np.int16)]}},
]


def same(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize(("frame", "message"), GOLDEN.items())
def test_golden_frames_of_openpi(frame, message):
    data = bytes.fromhex(frame)
    assert pack(message) == data
    assert same(message, unpack(data))


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_same_bytes_and_values_as_openpi_client(value):
    theirs = pytest.importorskip("openpi_client.msgpack_numpy")
    data = pack({"x": value})
    assert data == theirs.packb({"x": value})
    assert same(unpack(data), theirs.unpackb(data))


@pytest.mark.parametrize("array", [np.array([None]), np.array([1j]), np.zeros(2, "i4,i4")], ids=str)
def test_objects_and_records_are_not_sent(array):
    with pytest.raises(ValueError, match="cannot be sent"):
        pack({"x": array})


def array(data=bytes(8), dtype="<f4", shape=(2,), **more):
    table = {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}
    return msgpack.packb({"x": table | {key.encode(): value for key, value in more.items()}})


def scalar(data, dtype):
    return msgpack.packb({"x": {b"__npgeneric__": True, b"data": data, b"dtype": dtype}})


MALFORMED = {
    "object dtype": array(dtype="|O", shape=[1]),
    "record dtype": array(dtype="i4,i4", shape=[1]),
    "complex": array(dtype="<c8", shape=[1]),
    "date": array(dtype="<M8[s]", shape=[1]),
    "items of no size": array(b"", "|S0", [9**5]),
    "negative shape": array(shape=[-2]),
    "two negative sizes": array(shape=[-1, -2]),
    "huge shape": array(b"", shape=[2**62, 4]),
    "product that wraps": array(b"", shape=[2**32, 2**32]),
    "huge but empty": array(b"", shape=[0, 2**62]),
    "too little data": array(b""),
    "shape of bools": array(bytes(4), shape=[True]),
    "shape that is no list": array(bytes(4), shape=1),
    "many dimensions": array(bytes(4), shape=[1] * 9),
    "missing keys": msgpack.packb({"x": {b"__ndarray__": True}}),
    "foreign keys": array(more=1),
    "text as data": array("text", shape=[1]),
    "surrogates": array(struct.pack("<I", 0xD800), "<U1", [1]),
    "scalar out of range": scalar(300, "|u1"),
    "scalar of another kind": scalar("1", "<f4"),
    "deep": b"\x91" * 9 + b"\xc0",
    "very deep": b"\x91" * 100_000,
    "list of 4 billion": b"\xdd\xff\xff\xff\xff",
    "map of 4 billion": b"\xdf\xff\xff\xff\xff\xc0",
    "text of 4 GB": b"\xdb\xff\xff\xff\xff",
    "bytes of 4 GB": b"\xc6\xff\xff\xff\xff",
    "many values": msgpack.packb(list(range(5000))),
    "long text": msgpack.packb("x" * 20_000),
    "extension": msgpack.packb(msgpack.ExtType(1, b"x")),
    "timestamp": msgpack.packb(msgpack.Timestamp(1)),
    "never used": b"\xc1",
    "trailing": b"\xc0\xc0",
    "nothing": b"",
    "invalid utf-8": b"\xa1\xff",
    "list as key": b"\x81\x90\xc0",
    "cut length": b"\xc6\x00",
}


@pytest.mark.parametrize("frame", MALFORMED.values(), ids=MALFORMED)
def test_malformed_messages_are_refused(frame):
    with pytest.raises(CodecError):
        unpack(frame)


def test_every_prefix_of_a_message_is_refused():
    frame = pack({"observation.state": np.ones(3, np.float32), "prompt": "x", "n": {"a": [1, 2**40, 1.5]}})
    for length in range(len(frame)):
        with pytest.raises(CodecError):
            unpack(frame[:length])


def test_limits_are_obeyed():
    unpack(msgpack.packb([[1]]), Limits(depth=3))
    with pytest.raises(CodecError, match="deeper than 2"):
        unpack(msgpack.packb([[1]]), Limits(depth=2))
    with pytest.raises(CodecError, match="more than 3 values"):
        check_structure(msgpack.packb([1, 2, 3]), Limits(nodes=3))


def test_what_is_read_cannot_be_written_to():
    array = unpack(pack({"x": np.zeros(3)}))["x"]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def refusal(data):
    """Return the message with which bytes are refused, empty if they are read; any other error fails the test."""
    try:
        unpack(data)
    except CodecError as error:
        return str(error)
    return ""


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(data):
    assert "\n" not in refusal(data)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_message_with_a_changed_byte_is_read_or_refused(data):
    frame = bytearray(pack({"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": "text", "c": [np.float32(1)]}))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    assert "\n" not in refusal(bytes(frame))
