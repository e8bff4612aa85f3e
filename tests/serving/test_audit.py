"""Nothing is answered that was not written down; the logs hold no secrets and survive a full disk."""

import io
import json
import logging
import os
import time
from pathlib import Path

import pytest
from serving_helpers import EchoPolicy, vector

from dipole.errors import DipoleError
from dipole.serving.audit import AuditError, AuditLog, JsonFormatter, SafeHandler
from dipole.serving.auth import Tokens
from dipole.serving.background import serving
from dipole.serving.client import PolicyClient, ServerError
from dipole.serving.models import ModelStore, from_policy

TOKEN = "a-token-of-24-characters"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def full_disk(monkeypatch):
    """Let every write to a file fail as on a full disk, until the returned dict says otherwise."""
    disk, real = {"full": True}, os.write

    def write(file, data):
        if disk["full"] and file > 2 and b'"event"' in bytes(data):
            raise OSError(28, "No space left on device")
        return real(file, data)

    monkeypatch.setattr(os, "write", write)
    return disk


def test_what_is_written_down(tmp_path):
    path = tmp_path / "audit.jsonl"
    store = ModelStore([from_policy("m", EchoPolicy())])
    with serving(store, audit=AuditLog(path), tokens=Tokens({"arm-1": TOKEN})) as server:
        with pytest.raises(ServerError):
            PolicyClient(server.url, "wrong-token-of-some-length", give_up_s=0).connect()
        with PolicyClient(server.url, TOKEN) as client:
            secret = client.metadata["dipole"]["secret"]
            client.infer(vector(1, 2))
            client.reset()
    events = lines(path)
    assert [event["event"] for event in events] == [
        "start", "rejected", "session-open", "infer", "reset", "session-close", "stop"
    ]  # fmt: skip
    assert events[1]["reason"] == "token"
    assert events[2]["holder"] == "arm-1"
    assert len(events[3]["actions"]) == 16
    text = path.read_text()
    assert TOKEN not in text
    assert "wrong-token" not in text
    assert secret not in text
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_refuses_everything_until_there_is_room(tmp_path, monkeypatch):
    path = tmp_path / "audit.jsonl"
    with serving(ModelStore([from_policy("m", EchoPolicy())]), audit=AuditLog(path)) as server:
        client = PolicyClient(server.url, give_up_s=0)
        assert client.infer(vector(1, 2)).actions[0, 2] == 1
        disk = full_disk(monkeypatch)
        for _ in range(2):
            with pytest.raises(ServerError) as caught:
                client.infer(vector(1, 2))
            assert caught.value.code == "unavailable"
        with pytest.raises(ServerError):
            PolicyClient(server.url, give_up_s=0).connect()
        assert server.service.problems() == ["the audit log cannot be written"]
        disk["full"] = False
        # What was refused has left no trace in the session: the count goes on from 1.
        assert client.infer(vector(1, 2)).actions[0, 2] == 2
        assert not server.service.problems()
    assert [event["event"] for event in lines(path)].count("infer") == 2


def test_a_device_that_is_always_full():
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("no /dev/full here")
    log = AuditLog(device)
    with pytest.raises(AuditError):
        log.write("start")
    assert not log.healthy


def test_half_a_line_is_ended_before_the_next(tmp_path, monkeypatch):
    log = AuditLog(tmp_path / "a")
    log.write("one")
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[: len(data) // 2]))
    with pytest.raises(AuditError):
        log.write("two")
    monkeypatch.setattr(os, "write", real)
    log.write("three")
    texts = (tmp_path / "a").read_text().splitlines()
    assert len(texts) == 3
    assert [json.loads(text)["event"] for text in (texts[0], texts[2])] == ["one", "three"]


def test_large_logs_are_turned_over_and_few_are_kept(tmp_path):
    log = AuditLog(tmp_path / "a", max_bytes=200, keep=2)
    for k in range(20):
        log.write("event", number=k)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a", "a.1", "a.2"]
    numbers = [line["number"] for name in ("a.2", "a.1", "a") for line in lines(tmp_path / name)]
    assert numbers == list(range(numbers[0], 20))


def test_a_log_that_cannot_be_opened_stops_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DipoleError, match="cannot be written"):
        AuditLog(tmp_path / "file" / "audit")


def test_what_clients_say_cannot_forge_a_line(tmp_path):
    log = AuditLog(tmp_path / "a")
    log.write("infer", request='x"}\n{"event": "stop"')
    assert [line["event"] for line in lines(tmp_path / "a")] == ["infer"]


def test_json_lines_and_a_stream_that_fails():
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    stream = io.StringIO()
    for target, handler in ((stream, SafeHandler(stream)), (None, SafeHandler(Broken()))):
        handler.setFormatter(JsonFormatter())
        logger = logging.Logger("test")
        logger.addHandler(handler)
        try:
            raise ValueError("why")
        except ValueError:
            logger.exception("what", extra={"fields": {"session": "s"}})
        if target is None:
            assert handler.dropped == 1
    entry = json.loads(stream.getvalue())
    assert entry["message"] == "what"
    assert entry["session"] == "s"
    assert "ValueError: why" in entry["traceback"]


def test_a_jump_of_the_clock_changes_nothing(monkeypatch):
    with serving(ModelStore([from_policy("m", EchoPolicy())])) as server, PolicyClient(server.url) as client:
        client.infer(vector(1, 2))
        real = time.time
        for jump in (1e8, -1e8):
            monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
            reply = client.infer(vector(1, 2))
            assert not reply.restarted
            assert 0 <= reply.message["dipole/timing"]["total_ms"] < 10_000
        assert reply.actions[0, 2] == 3
