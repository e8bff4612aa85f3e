"""The file a robot can vendor: alone, with nothing but Python."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from serving_helpers import EchoPolicy, ImagePolicy

from dipole.serving.auth import Tokens
from dipole.serving.background import serving
from dipole.serving.codec import pack, unpack
from dipole.serving.models import ModelStore, from_policy

FILE = Path(__file__).parents[2] / "examples" / "robot" / "client.py"
TOKEN = "a-token-of-24-characters"


@pytest.fixture(scope="module")
def robot():
    spec = importlib.util.spec_from_file_location("robot_client", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_alone(tmp_path):
    with serving(ModelStore([from_policy("m", ImagePolicy())]), tokens=Tokens({"me": TOKEN})) as server:
        words = [sys.executable, "-I", "-S", str(FILE), "127.0.0.1", str(server.port)]  # -S: no installed package
        done = subprocess.run([*words, TOKEN], capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("m: echo (10 Hz, 3 actions per chunk)\n  0.0000")
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert "turned away: HTTP/1.1 401" in done.stderr


def test_a_conversation(robot):
    with serving(ModelStore([from_policy("m", EchoPolicy())])) as server:
        client = robot.Client("127.0.0.1", server.port)
        actions, _ = client.infer({"observation.state": robot.vector([1.5, 2.5])})
        assert actions[0][:3] == (1.5, 2.5, 1.0)
        actions, reply = client.infer({"state": robot.vector([1, 2])}, id=7, reset=True, time=3.5)
        assert actions[0][:3] == (1.0, 2.0, 1.0)
        assert reply["dipole/id"] == 7
        assert reply["dipole/validity"]["start"] == 3.5
        with pytest.raises(ConnectionError, match="is missing"):
            client.infer({}, id=8)
        with pytest.raises(ConnectionError, match="bad-observation"):
            client.infer({})


VALUES = [0, 1, 127, 128, 255, 256, 70000, 2**40, -1, -32, -33, -200, -(2**40), 1.5, True, False, None, "", "é" * 20,
          "x" * 300, "x" * 70000, b"", b"y" * 300, b"y" * 70000, [], list(range(20)), [1] * 70000,
          {str(k): k for k in range(20)}, {"a": [{"b": None}]}]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:12])
def test_its_msgpack_is_msgpack(robot, value):
    import msgpack

    assert msgpack.unpackb(robot.pack(value)) == value
    assert robot.unpack(msgpack.packb(value)) == (value, len(msgpack.packb(value)))


def test_its_arrays_are_ours(robot):
    sent = unpack(robot.pack({"x": robot.vector([1.0, -2.0])}))
    np.testing.assert_array_equal(sent["x"], np.array([1, -2], np.float32))
    read, _ = robot.unpack(pack({"x": np.arange(6, dtype=np.float32).reshape(2, 3)}))
    assert robot.rows(read["x"]) == [(0, 1, 2), (3, 4, 5)]
