"""The client: comes back after broken connections, and speaks to servers that behave as openpi's does."""

import asyncio
import threading
import time

import numpy as np
import pytest
from serving_helpers import EchoPolicy, vector
from websockets.asyncio.server import serve

from dipole.errors import DipoleError
from dipole.serving.background import serving
from dipole.serving.client import PolicyClient, ServerError
from dipole.serving.config import ServiceConfig
from dipole.serving.limits import Limits
from dipole.serving.models import ModelStore, from_policy


def echo(**limits):
    return serving(ModelStore([from_policy("m", EchoPolicy())]), ServiceConfig(Limits(**limits)))


def cut(server):
    """Break every connection as a network does: without a word."""
    loop = server._server.get_loop()
    for session in list(server.service.sessions):
        if session.connection is not None:
            loop.call_soon_threadsafe(session.connection.transport.abort)
    time.sleep(0.1)


def test_a_broken_connection_costs_nothing_of_the_session():
    with echo() as server, PolicyClient(server.url) as client:
        assert client.infer(vector(1, 2)).actions[0, 2] == 1
        cut(server)
        reply = client.infer(vector(5, 2))
        assert reply.actions[0, 2] == 2  # the session's own count
        assert reply.actions[1, 0] - reply.actions[0, 0] == 1  # and its history: the frame before was 1
        assert not reply.restarted
        assert len(server.service.sessions) == 1


def test_a_reply_lost_on_the_way_is_given_again():
    with echo() as server, PolicyClient(server.url) as client:
        client.infer(vector(1, 2))
        receive, lost = client._connection.recv, []

        def lose(timeout):
            lost.append(receive(timeout))
            raise ConnectionResetError

        client._connection.recv = lose
        reply = client.infer(vector(1, 2))
        assert len(lost) == 1
        assert reply.actions[0, 2] == 2  # acted on once, told twice


def test_a_session_that_was_waited_for_in_vain_begins_anew_and_says_so():
    with echo(resume_s=0.0) as server, PolicyClient(server.url) as client:
        client.infer(vector(1, 2))
        cut(server)
        time.sleep(0.1)
        reply = client.infer(vector(1, 2))
        assert reply.restarted
        assert reply.actions[0, 2] == 1
        assert not client.infer(vector(1, 2)).restarted


def test_a_stranger_cannot_take_a_session_over():
    with echo() as server, PolicyClient(server.url) as client, PolicyClient(server.url) as other:
        client.infer(vector(1, 2))
        other.close()
        other._secret = client.metadata["dipole"]["session"]  # the public name is no key
        assert other.infer(vector(1, 2)).actions[0, 2] == 1
        assert client.infer(vector(1, 2)).actions[0, 2] == 2


def test_a_server_that_comes_back():
    with echo() as server:
        port = server.port
        client = PolicyClient(server.url, give_up_s=20)
        client.infer(vector(1, 2))
    replies = []
    thread = threading.Thread(target=lambda: replies.append(client.infer(vector(1, 2))))
    thread.start()
    time.sleep(0.3)
    with serving(ModelStore([from_policy("m", EchoPolicy())]), port=port):
        thread.join(20)
        assert replies[0].restarted
        client.close()


def test_nobody_there():
    begin = time.monotonic()
    with pytest.raises(DipoleError, match="is the server up"):
        PolicyClient("ws://127.0.0.1:9", give_up_s=0.3).connect()
    assert time.monotonic() - begin < 5


class OpenpiServer:
    """Behaves as openpi's released server: metadata, arrays packed by its own codec, a traceback as text, 1011."""

    def __init__(self, codec, metadata):
        self.codec, self.metadata, self.seen = codec, metadata, []

    async def talk(self, ws):
        await ws.send(self.codec.packb(self.metadata))
        async for data in ws:
            obs = self.codec.unpackb(data)
            self.seen.append(obs)
            if "bad" in obs:
                await ws.send("Traceback (most recent call last):\n  File ...\nKeyError: 'state'")
                await ws.close(1011, "Internal server error. Traceback included in previous frame.")
                return
            actions = np.tile(obs["observation/state"], (5, 1))
            await ws.send(
                self.codec.packb(
                    {
                        "actions": actions,
                        "state": obs["observation/state"],
                        "policy_timing": {"infer_ms": np.float64(1)},
                    }
                )
            )

    async def main(self):
        self.stop = asyncio.Event()
        async with serve(self.talk, "127.0.0.1", 0, compression=None, max_size=None) as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            self.loop = asyncio.get_running_loop()
            self.ready.set()
            await self.stop.wait()

    def __enter__(self):
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.main()))
        self.thread.start()
        self.ready.wait(10)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()


@pytest.mark.parametrize("metadata", [{}, {"reset_pose": [0.0, 1.0]}])
def test_openpis_server(metadata):
    codec = pytest.importorskip("openpi_client.msgpack_numpy")
    with OpenpiServer(codec, metadata) as server, PolicyClient(f"ws://127.0.0.1:{server.port}", give_up_s=0) as client:
        assert client.metadata == metadata
        assert not client.extended
        client.reset()  # local: there is nothing to tell such a server
        reply = client.infer({"observation/state": np.array([1.5, 2.5]), "prompt": "x"}, time=1.0, seed=3)
        np.testing.assert_array_equal(reply.actions, [[1.5, 2.5]] * 5)
        assert list(server.seen[0]) == ["observation/state", "prompt"]  # nothing of ours is put on its wire
        with pytest.raises(ServerError, match="KeyError: 'state'") as caught:
            client.infer({"bad": 1})
        assert "Traceback" not in str(caught.value)
        assert client.infer({"observation/state": np.ones(2)}).actions.shape == (5, 2)  # on a new connection
