"""The protocol over real sockets on this machine: openpi's own client, and what dipole adds."""

import asyncio
import json
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from serving_helpers import STATE, BadPolicy, EchoPolicy, ImagePolicy, vector
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from dipole.errors import DipoleError
from dipole.safety import Limits as ActionLimits
from dipole.safety import OutputGuard
from dipole.serving.auth import Tokens, tls_context
from dipole.serving.background import serving
from dipole.serving.client import PolicyClient, ServerError
from dipole.serving.codec import pack, unpack
from dipole.serving.config import ServiceConfig
from dipole.serving.limits import Limits
from dipole.serving.models import ModelStore, from_policy

TOKEN = "a-token-of-24-characters"


def store(*policies, guard=None):
    return ModelStore([from_policy(f"m{k}", policy, guard=guard) for k, policy in enumerate(policies)])


@pytest.fixture
def echo():
    policy = EchoPolicy()
    with serving(store(policy)) as server:
        server.policy = policy
        yield server


def get(server, path, **headers):
    request = urllib.request.Request(f"http{server.url[2:]}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, reply.read().decode(), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


class TestOpenpiClient:
    """The released client of openpi, unchanged."""

    @pytest.fixture
    def connect(self):
        module = pytest.importorskip("openpi_client.websocket_client_policy")
        return module.WebsocketClientPolicy

    def test_metadata_inference_and_chunk_broker(self, echo, connect):
        brokers = pytest.importorskip("openpi_client.action_chunk_broker")
        client = connect("127.0.0.1", echo.port)
        assert client.get_server_metadata()["dipole"]["action_horizon"] == 3
        reply = client.infer({"observation/state": np.array([1.0, 2.0]), "prompt": "lift"})
        assert set(reply) == {"actions", "policy_timing", "server_timing"}
        assert reply["actions"].dtype == np.float32
        np.testing.assert_array_equal(reply["actions"][:, :3], [[1, 2, 1], [2, 3, 2], [1, 2, 1]])
        broker = brokers.ActionChunkBroker(client, action_horizon=3)
        steps = [broker.infer({STATE: np.array([5.0, 0.0])})["actions"] for _ in range(4)]
        assert [step[2] for step in steps] == [2, 3, 2, 3]  # the fourth comes from a new call: count 3

    def test_where_it_goes_by_default(self, echo, connect):
        assert connect(port=echo.port).infer(vector(1, 2))["actions"].shape == (3, 4)  # host 0.0.0.0

    def test_an_error_is_text_and_1011(self, echo, connect):
        client = connect("127.0.0.1", echo.port)
        with pytest.raises(RuntimeError, match=r"bad-observation: 'observation.state' is missing") as caught:
            client.infer({"observation/other": np.zeros(2)})
        assert "Traceback" not in str(caught.value)
        with pytest.raises(ConnectionClosed) as closed:
            client._ws.recv()
        assert closed.value.rcvd.code == 1011

    def test_token_and_images(self, connect):
        with serving(store(ImagePolicy()), tokens=Tokens({"me": TOKEN})) as server:
            client = connect("127.0.0.1", server.port, api_key=TOKEN)
            image = np.full((16, 20, 3), (0, 51, 255), np.uint8)
            reply = client.infer({"images": {"top": image}, "state": np.array([4.0, 0])})
            np.testing.assert_allclose(reply["actions"][0], [0, 0.2, 1, 4], atol=1e-6)  # float32
            with pytest.raises(InvalidStatus) as caught:
                connect("127.0.0.1", server.port, api_key=TOKEN + "x")
            assert caught.value.response.status_code == 401

    def test_another_model_by_its_address(self, connect):
        with serving(store(EchoPolicy(), EchoPolicy(offset=10))) as server:
            client = connect(f"{server.url}/model/m1")
            assert client.infer(vector(1, 2))["actions"][0, 0] == 11


def test_first_frame_is_binary_metadata_and_frames_are_plain(echo):
    with connect(echo.url, compression=None) as ws:
        first = ws.recv()
        assert isinstance(first, bytes)
        metadata = unpack(first)
        assert metadata["dipole"]["observation"] == {STATE: {"dtype": "float32", "shape": [2]}}
        ws.send(pack(vector(1, 2)))
        assert isinstance(ws.recv(), bytes)
        assert not ws.protocol.extensions


def test_extended_requests(echo):
    with connect(echo.url) as ws:
        ws.recv()

        def ask(**message):
            ws.send(pack(message))
            return unpack(ws.recv())

        def extended(name):
            return {f"dipole/{key}": value for key, value in name.items()}

        first = ask(**vector(1, 2), **extended({"id": "a", "seed": 7, "time": 100.0}))
        assert first["dipole/id"] == "a"
        assert first["dipole/validity"] == {
            "dt_s": 0.1,
            "duration_s": 0.1 * 3,
            "start": 100.0,
            "until": 100.0 + 0.1 * 3,
        }
        assert first["dipole/timing"]["batch"] == 1
        # The same id: the same answer, although the policy has moved on.
        assert ask(**vector(9, 9), **extended({"id": "a"}))["actions"].tolist() == first["actions"].tolist()
        again = ask(**vector(1, 2), **extended({"id": "b", "reset": True, "seed": 7}))
        np.testing.assert_array_equal(again["actions"], first["actions"])  # count and noise began anew
        assert ask(**extended({"id": 3, "op": "observe"}), **vector(4, 4)).keys() == {
            "dipole/id",
            "dipole/checkpoint",
            "dipole/events",
        }
        third = ask(**vector(5, 5), **extended({"id": 4}))
        assert third["actions"][1, 0] - third["actions"][0, 0] == 4  # the history's first frame: the one observed
        assert third["actions"][0, 2] == 2  # observing is not acting
        # A bad observation does not end an extended conversation, nor change the session.
        error = ask(**{STATE: np.zeros(3)}, **extended({"id": 5}))
        assert error["dipole/error"]["code"] == "bad-observation"
        assert error["dipole/id"] == 5
        assert ask(**vector(5, 5), **extended({"id": 6}))["actions"][0, 2] == 3
        assert ask(**extended({"op": "reset"}))["dipole/events"] == []
        assert ask(**vector(5, 5), **extended({"id": 7}))["actions"][0, 2] == 1


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x91" * 1000,
        pack([1]),
        pack({1: 2}),
        pack({**vector(1, 2), "dipole/unknown": 1}),
        pack({**vector(1, 2), "dipole/id": "x" * 65}),
        pack({**vector(1, 2), "dipole/seed": -1}),
        pack({**vector(1, 2), "dipole/seed": True}),
        pack({**vector(1, 2), "dipole/op": "format"}),
        pack({**vector(1, 2), "dipole/time": float("nan")}),
        "text",
    ],
)
def test_malformed_frames_end_the_connection_and_nothing_else(echo, frame):
    with PolicyClient(echo.url) as other:
        other.infer(vector(1, 2))
        with connect(echo.url) as ws:
            ws.recv()
            ws.send(frame)
            reply = ws.recv()
            assert isinstance(reply, str)
            assert reply.startswith("malformed: ")
            with pytest.raises(ConnectionClosed) as closed:
                ws.recv()
            assert closed.value.rcvd.code == 1011
        assert other.infer(vector(1, 2)).actions[0, 2] == 2


def test_frames_beyond_the_limit_are_cut_off_at_their_header(echo):
    limit = echo.service.frame_bytes()
    assert limit < 2**21
    with socket.create_connection(("127.0.0.1", echo.port)) as raw:
        raw.sendall(
            b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        time.sleep(0.2)
        raw.sendall(b"\x82\xff" + (2**40).to_bytes(8, "big") + b"\0\0\0\0")  # the header of a terabyte
        raw.settimeout(5)
        data = b""
        while chunk := raw.recv(4096):
            data += chunk
    assert b"\x88" in data  # a close frame
    assert (1009).to_bytes(2, "big") in data


def test_faults_of_the_policy_stay_with_their_session():
    with serving(store(BadPolicy(sleep=0.05)), ServiceConfig(latency_budget_ms=200)) as server:
        outcomes = {}

        def ask(name, value):
            with PolicyClient(server.url, give_up_s=1) as client:
                for _ in range(3):
                    try:
                        outcomes.setdefault(name, []).append(client.infer(vector(value, 0)).actions[0, 2])
                    except ServerError as error:
                        outcomes.setdefault(name, []).append((error.code, str(error)))

        threads = [threading.Thread(target=ask, args=pair) for pair in (("good", 1), ("nan", -1), ("raise", 101))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes["good"] == [1, 2, 3]
        assert {code for code, _ in outcomes["nan"]} == {"unsafe-output"}
        assert {code for code, _ in outcomes["raise"]} == {"internal"}
        told = json.dumps(outcomes["raise"])
        assert "incident" in told
        assert "secret" not in told
        assert "RuntimeError" not in told


def test_violations_of_the_limits_are_clamped_counted_and_told():
    limits = ActionLimits(low=(-1.0,) * 4, high=(1.0,) * 4, max_change=(0.5,) * 4)
    with serving(store(EchoPolicy(), guard=OutputGuard(limits))) as server, PolicyClient(server.url) as client:
        reply = client.infer(vector(3, 0.25))
        assert np.abs(reply.actions).max() <= 1
        assert {v["rule"] for v in reply.violations} == {"limits", "rate"} or reply.violations[0]["rule"] == "limits"
        assert reply.violations[0]["response"] == "clamp"
        assert reply.message["server_timing"]["violations"] == len(reply.violations)
        second = client.infer(vector(-3, 0.25)).actions
        assert np.all(np.abs(second[0] - reply.actions[-1]) <= 0.5 + 1e-6)  # rate kept across chunks; float32
        begun = client.infer(vector(-3, 0.25), executed=1).actions
        assert np.all(np.abs(begun[0] - second[0]) <= 0.5 + 1e-6)
        _, text, _ = get(server, "/metrics")
        assert 'dipole_violations_total{model="m0",rule="limits"}' in text


def test_busy_instead_of_growth():
    policy = EchoPolicy()
    config = ServiceConfig(Limits(queue=2, request_timeout_s=20), max_batch=1, latency_budget_ms=0)
    with serving(store(policy), config) as server:
        clients = [PolicyClient(server.url, give_up_s=0) for _ in range(6)]
        for client in clients:
            client.connect()
        policy.gate.clear()  # the policy does not answer for now
        outcomes = []

        def ask(client):
            try:
                outcomes.append(client.infer(vector(1, 2)).actions[0, 2])
            except ServerError as error:
                outcomes.append((error.code, error.retry_after_s > 0))

        threads = [threading.Thread(target=ask, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        deadline = time.monotonic() + 10
        while len(outcomes) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert outcomes == [("busy", True)] * 3  # one is being answered, two wait
        policy.gate.set()
        for thread in threads:
            thread.join()
        assert outcomes[3:] == [1, 1, 1]


def test_deadlines_timeouts_and_rates():
    policy = EchoPolicy()
    config = ServiceConfig(Limits(request_timeout_s=0.3, requests_per_s=1, burst=6), latency_budget_ms=0)
    with serving(store(policy), config) as server:
        first, second = PolicyClient(server.url, give_up_s=0), PolicyClient(server.url, give_up_s=0)
        first.connect()
        second.connect()
        policy.gate.clear()
        codes = {}

        def ask(name, client, **options):
            try:
                client.infer(vector(1, 2), **options)
            except ServerError as error:
                codes[name] = error.code

        threads = [threading.Thread(target=ask, args=("timeout", first))]
        threads[0].start()
        time.sleep(0.1)
        threads.append(threading.Thread(target=ask, args=("expired", second), kwargs={"deadline_ms": 1}))
        threads[1].start()
        threads[0].join()
        assert get(server, "/healthz")[0] == 503  # a call that does not end
        policy.gate.set()
        threads[1].join()
        assert codes["timeout"] == "timeout"
        assert codes["expired"] in ("expired", "timeout")  # the timeout may strike while it waits
        third = PolicyClient(server.url, give_up_s=0)
        for _ in range(6):
            third.infer(vector(1, 2))
        with pytest.raises(ServerError, match="rate"):
            third.infer(vector(1, 2))
        assert get(server, "/healthz")[:2] == (200, "OK\n")


def test_sessions_and_connections_are_limited():
    with serving(store(EchoPolicy()), ServiceConfig(Limits(sessions=2, connections=4))) as server:
        clients = [PolicyClient(server.url, give_up_s=0) for _ in range(3)]
        clients[0].connect()
        clients[1].connect()
        with pytest.raises(ServerError) as caught:
            clients[2].connect()
        assert caught.value.code == "busy"
        clients[0].close()
        time.sleep(0.2)
        clients[2].connect()
        raw = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
        time.sleep(0.2)
        raw[-1].settimeout(2)
        assert raw[-1].recv(1) == b""  # cut off before a word was said
        for one in raw:
            one.close()
        assert clients[2].infer(vector(1, 2)).actions.shape == (3, 4)


def test_health_metrics_status_and_who_may_see_them(echo):
    with PolicyClient(echo.url) as client:
        client.infer(vector(1, 2))
        assert get(echo, "/healthz")[:2] == (200, "OK\n")
        code, text, _ = get(echo, "/metrics")
        assert code == 200
        assert 'dipole_request_seconds_count{model="m0"} 1' in text
        assert 'dipole_batch_rows_bucket{model="m0",le="1"} 1' in text
        code, text, _ = get(echo, "/status.json")
        status = json.loads(text)
        assert status["healthy"]
        assert status["sessions"][0]["actions"][:3] == [1, 2, 1]
        assert client.metadata["dipole"]["secret"] not in text
    code, _, headers = get(echo, "/")
    assert code == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert get(echo, "/etc/passwd")[0] == 404
    assert get(echo, "/status.json", Host="evil.example")[0] == 403
    assert get(echo, "/status.json", Origin="http://evil.example")[0] == 403
    with pytest.raises(InvalidStatus):
        connect(echo.url, origin="http://evil.example")
    with pytest.raises(InvalidStatus):
        connect(f"{echo.url}/model/none")


def test_tokens_guard_everything_but_health():
    with serving(store(EchoPolicy()), ServiceConfig(Limits(auth_failures=5)), tokens=Tokens({"me": TOKEN})) as server:
        assert get(server, "/healthz")[0] == 200
        assert get(server, "/")[0] == 401
        assert get(server, "/metrics", Authorization=f"Bearer {TOKEN}")[0] == 200
        with pytest.raises(ServerError, match="401"):
            PolicyClient(server.url, give_up_s=0).connect()
        with PolicyClient(server.url, TOKEN) as client:
            client.infer(vector(1, 2))
        codes = [get(server, "/metrics", Authorization="Bearer wrong")[0] for _ in range(6)]
        assert codes[0] == 401
        assert codes[-1] == 429
        # A right token from there has to wait as well: guessing cannot go on behind it.
        assert get(server, "/metrics", Authorization=f"Bearer {TOKEN}")[0] == 429
        assert get(server, "/healthz")[0] == 200


def test_a_robot_whose_token_was_taken_away_is_cut_off():
    tokens = [Tokens({"a": TOKEN, "b": TOKEN + "2"})]
    with serving(store(EchoPolicy()), tokens=tokens[0], read_tokens=lambda: tokens[0]) as server:
        a, b = PolicyClient(server.url, TOKEN, give_up_s=0), PolicyClient(server.url, TOKEN + "2", give_up_s=0)
        a.infer(vector(1, 2))
        b.infer(vector(1, 2))
        tokens[0] = Tokens({"b": TOKEN + "2"})
        asyncio.run_coroutine_threadsafe(server.refresh(), server._server.get_loop()).result(20)
        with pytest.raises(DipoleError):
            a.infer(vector(1, 2))
        assert b.infer(vector(1, 2)).actions[0, 2] == 2


def test_beyond_loopback_only_with_a_token():
    with pytest.raises(DipoleError, match="--token-file"), serving(store(EchoPolicy()), host="0.0.0.0"):
        pass


def test_tls(tmp_path):
    pem, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(pem)],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl to make a certificate with")
    with serving(store(EchoPolicy()), tls=tls_context(pem, key)) as server:
        assert server.url.startswith("wss://")
        trust = ssl.create_default_context(cafile=str(pem))
        with PolicyClient(server.url, tls=trust) as client:
            assert client.infer(vector(1, 2)).actions[0, 0] == 1
        with pytest.raises(DipoleError):
            PolicyClient(server.url, give_up_s=0).connect()  # an unknown certificate
        with pytest.raises(DipoleError):
            PolicyClient(f"ws{server.url[3:]}", give_up_s=0, timeout_s=2).connect()  # no TLS


def test_shutdown_answers_what_was_asked():
    policy = EchoPolicy(sleep=0.3)
    replies = []
    with serving(store(policy)) as server:
        client = PolicyClient(server.url, give_up_s=0)
        client.connect()
        thread = threading.Thread(target=lambda: replies.append(client.infer(vector(1, 2)).actions[0, 2]))
        thread.start()
        while not policy.batches:
            time.sleep(0.01)
    thread.join()
    assert replies == [1]
    with pytest.raises(DipoleError, match="no answer"):
        client.infer(vector(1, 2))


def test_two_servers_cannot_share_a_port(echo):
    with pytest.raises(DipoleError, match="choose another --port"), serving(store(EchoPolicy()), port=echo.port):
        pass
