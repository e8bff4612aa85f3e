"""Malformed input for the fuzz: messages in sound websocket frames, broken frames, and garbage for a handshake.

`MESSAGES`, `FRAMES` and `HANDSHAKES` are functions of a random number generator, by the name of what they make.
"""

from __future__ import annotations

import random
import struct
from typing import Any

import msgpack
import numpy as np
from common import STATE

from dipole.serving.codec import pack

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
GOOD = {STATE: np.linspace(-1, 1, 18, dtype=np.float32)}


def frame(payload: bytes, head: int = 0x82, mask: bool = True) -> bytes:
    """Return a websocket frame, masked with zeros."""
    bit = 0x80 if mask else 0
    n = len(payload)
    length = bytes([bit | n]) if n < 126 else bytes([bit | 127]) + struct.pack(">Q", n)
    return bytes([head]) + length + (bytes(4) if mask else b"") + payload


def mutated(rng: random.Random) -> bytes:
    data = bytearray(pack({**GOOD, "prompt": "lift", "dipole/id": 1}))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randint(1, 9)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 9))
        else:
            data[at] ^= 1 << rng.randrange(8)
        if not data:
            break
    return bytes(data)


def bomb(rng: random.Random) -> bytes:
    n = rng.randint(1, 2000)
    return rng.choice(
        [
            b"\x91" * n,
            b"\x81\xa1a" * n,
            b"\xdd" + rng.randbytes(4),
            b"\xdf" + rng.randbytes(4),
            b"\xdb\xff\xff\xff" + rng.randbytes(1),
            b"\xc6\xff\xff\xff" + rng.randbytes(5),
            b"\x9f" * n + b"\xc0",
            msgpack.packb(msgpack.ExtType(rng.randrange(128), rng.randbytes(n % 100))),
            msgpack.packb(["x"] * 5000),
        ]
    )


def array(rng: random.Random) -> bytes:
    data = rng.randbytes(rng.choice([0, 1, 4, 72, 144]))
    table: dict[Any, Any] = {
        b"__ndarray__": rng.choice([True, False, None, 1]),
        b"data": rng.choice([data, "text", None, [1]]),
        b"dtype": rng.choice(
            ["<f4", "|O", "<c8", "V8", "<f16", ">f4", "i4,i4", "|S0", "<U1", "<M8[s]", "x" * 50, 5, b"<f4"]
        ),
        b"shape": [rng.choice([-1, 0, 1, 2, 18, 2**31, 2**62, 2**64 - 1, 1.5, None]) for _ in range(rng.randint(0, 9))],
    }
    if rng.random() < 0.3:
        table.pop(rng.choice(list(table)))
    return msgpack.packb({STATE: table})


def observation(rng: random.Random) -> bytes:
    """A sound message with a wrong observation."""
    shape = rng.choice([(0,), (1,), (17,), (19,), (3, 18), (1, 2, 18), (2, 18, 1)])
    value = rng.choice(
        [
            np.zeros(shape, rng.choice(["f4", "f8", "i8", "?"])),
            np.full(18, rng.choice([np.nan, np.inf, -np.inf, 1e300])),
            np.array(["text"]),
            np.float32(1),
            None,
            "text",
            [[1], [2, 3]],
            {},
            b"bytes",
            list(range(19)),
            [2**63] * 18 + [-1],
        ]
    )
    name = rng.choice([STATE, "observation/state", "state", "other"])
    return pack({name: value, "dipole/id": rng.randrange(2**31)})


def reserved(rng: random.Random) -> bytes:
    key = rng.choice(["id", "op", "reset", "seed", "time", "deadline_ms", "executed", "noise", "exec", ""])
    value = rng.choice([None, [], {}, "x" * 100, -1, 2**64 - 1, 1e308, float("nan"), b"x", np.zeros(2), 1.5])
    table: dict[Any, Any] = {**GOOD, f"dipole/{key}": value, "dipole/unknown": 1}
    return pack(rng.choice([table, [table], {1: 2}, {b"k": 1}, 5, None, "text"]))


def noise(rng: random.Random) -> bytes:
    """A sound observation with noise that is not."""
    shape = rng.choice([(), (0, 4), (16,), (4, 16), (16, 5), (1, 16, 4), (16, 4)])
    kind = rng.choice(["f2", "f8", "i4", "?", "S4"]) if shape != (16, 4) else rng.choice(["i4", "u1", "?"])
    value = rng.choice([np.zeros(shape, kind), np.full((16, 4), rng.choice([np.nan, np.inf, 1e300]))])
    return pack({**GOOD, "dipole/noise": value, "dipole/id": rng.randrange(2**31)})


MESSAGES = {
    "random bytes": lambda rng: rng.randbytes(rng.randint(0, 400)),
    "mutated": mutated,
    "bomb": bomb,
    "array": array,
    "reserved keys": reserved,
    "observation": observation,
    "noise": noise,
}
SURVIVED = ("observation", "noise")  # refused, and the conversation goes on
FRAMES = {
    "opcode": lambda rng: frame(rng.randbytes(20), 0x80 | rng.choice([3, 4, 5, 6, 7, 11, 12, 13, 14, 15])),
    "reserved bits": lambda rng: frame(rng.randbytes(20), 0x82 | rng.choice([0x10, 0x20, 0x40, 0x70])),
    "not masked": lambda rng: frame(rng.randbytes(20), mask=False),
    "too long": lambda rng: b"\x82\xff" + struct.pack(">Q", rng.randint(2**26, 2**63 - 1)) + bytes(4),
    "negative length": lambda rng: b"\x82\xff" + struct.pack(">Q", rng.randint(2**63, 2**64 - 1)) + bytes(4),
    "continuation of nothing": lambda rng: frame(rng.randbytes(5), 0x80),
    "message within a message": lambda rng: frame(b"a", 0x02) + frame(b"b", 0x82),
    "long ping": lambda rng: frame(rng.randbytes(126), 0x89),
    "invalid text": lambda rng: frame(b"\xff\xfe" + rng.randbytes(5), 0x81),
    "close of one byte": lambda rng: frame(b"\x03", 0x88),
    "text": lambda rng: frame(b"hello", 0x81),
    "random": lambda rng: rng.randbytes(rng.randint(2, 300)),
}
HANDSHAKES = {
    "random": lambda rng: rng.randbytes(rng.randint(1, 500)) + b"\r\n\r\n",
    "no key": lambda rng: HANDSHAKE.replace(b"Sec-WebSocket-Key", b"X"),
    "bad version": lambda rng: HANDSHAKE.replace(b"Version: 13", b"Version: 99"),
    "post": lambda rng: HANDSHAKE.replace(b"GET", b"POST"),
    "long path": lambda rng: HANDSHAKE.replace(b"GET /", b"GET /" + b"a" * rng.randint(1, 20_000)),
    "many headers": lambda rng: HANDSHAKE[:-2] + b"X-A: b\r\n" * 500 + b"\r\n",
    "foreign origin": lambda rng: HANDSHAKE[:-2] + b"Origin: http://evil.example\r\n\r\n",
    "bad authorization": lambda rng: HANDSHAKE[:-2] + b"Authorization: Basic \xff\xff==\r\n\r\n",
    "bad session": lambda rng: b"GET /model/" + rng.randbytes(3).hex().encode() + HANDSHAKE[5:],
}
