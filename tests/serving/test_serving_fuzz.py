"""Malformed messages without sockets: whatever comes in, only a refusal comes out (with sockets: benchmarks/server)."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "server"))
import malformed

from dipole.data import Feature
from dipole.serving.codec import CodecError, pack, unpack
from dipole.serving.limits import Limits
from dipole.serving.protocol import Refusal, parse
from dipole.serving.schema import Schema, read_noise, read_observation

SCHEMA = Schema({malformed.STATE: Feature("float32", (18,))}, 2, 16, 8, 4, None, 10.0, "")
COUNT = int(os.environ.get("DIPOLE_FUZZ", "4000"))  # a few seconds


@pytest.mark.parametrize("kind", malformed.MESSAGES)
def test_only_refusals_come_out(kind):
    rng, limits, sound = random.Random(0), Limits(), 0
    for _ in range(COUNT // len(malformed.MESSAGES)):
        data = malformed.MESSAGES[kind](rng)
        try:
            request = parse(unpack(data, limits))
            arrays = read_observation(request.observation, SCHEMA)
            noise = read_noise(request.noise, SCHEMA)
        except (CodecError, Refusal) as refusal:
            text = pack(refusal.table(1)).decode(errors="replace") if isinstance(refusal, Refusal) else str(refusal)
            assert len(text) < 500
            assert "Traceback" not in text
        else:
            sound += 1
            assert all(np.isfinite(value).all() for value in arrays.values())
            assert noise is None or np.isfinite(noise).all()
    # A mutation can leave a message sound, and an array of zeros may be right; most are neither.
    assert sound <= 0.5 * COUNT / len(malformed.MESSAGES)
