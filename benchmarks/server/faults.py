"""Faults: clients and servers that die, hang, lie or run out of disk; what was acknowledged must stand.

    python benchmarks/server/faults.py

All the while good clients check every reply (see `good_clients.py`). Every acknowledged one must be in the audit log.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from common import STATE, rss_mb, save, save_small, server_process
from good_clients import callers, summary
from malformed import HANDSHAKE, frame
from stand_in import StandIn, limits

from dipole.errors import DipoleError
from dipole.serving.background import serving
from dipole.serving.client import PolicyClient
from dipole.serving.codec import pack
from dipole.serving.config import ServiceConfig
from dipole.serving.models import ModelStore, from_policy

SCRIPT = Path(__file__).with_name("stand_in.py")


def raw(port: int, receive_buffer: int | None = None) -> socket.socket:
    """Return a websocket on which everything is done by hand."""
    one = socket.socket()
    if receive_buffer:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    one.connect(("127.0.0.1", port))
    one.sendall(HANDSHAKE)
    one.settimeout(10)
    one.recv(100)
    return one


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def sessions_left(server: Any, seconds: float) -> int:
    """Wait until only the good clients' sessions are left; return how many there are."""
    deadline = time.monotonic() + seconds
    while len(server.service.sessions) > 8 and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(server.service.sessions)


@contextlib.contextmanager
def in_process() -> Iterator[Any]:
    config = ServiceConfig(limits(ping_s=1.0, send_timeout_s=1.0, resume_s=1.0, connections=200, sessions=100))
    with serving(ModelStore([from_policy("stand-in", StandIn())]), config) as server:
        yield server


def killed_mid_frame() -> dict[str, Any]:
    """Clients die with half a frame sent, by a reset of the connection."""
    with in_process() as server, callers(server.url) as found:
        for _ in range(20):
            one = raw(server.port)
            one.sendall(frame(bytes(300_000))[:150_000])
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()
        left = sessions_left(server, 10)
    return summary(found, killed=20, sessions_left=left, holds=left == 8)


def half_open() -> dict[str, Any]:
    """Clients fall silent without closing: they never answer a ping."""
    with in_process() as server, callers(server.url) as found:
        silent = [raw(server.port) for _ in range(20)]
        left = sessions_left(server, 15)
        for one in silent:
            one.close()
    return summary(found, silent=20, sessions_left=left, holds=left == 8)


def never_read(port: int, stopped: list[str]) -> None:
    """Ask without end and read nothing; note how it ended."""
    message = frame(pack({STATE: np.zeros(2, np.float32)}))
    with raw(port, receive_buffer=2048) as one:
        try:
            for _ in range(4000):  # 40 MB: more than all buffers on the way
                one.sendall(message * 100)
        except OSError as error:  # cut off by the server; a timeout would mean that it was not
            stopped.append(type(error).__name__)


def slow_reader() -> dict[str, Any]:
    """Clients ask all the time and never read a reply."""
    with in_process() as server, callers(server.url) as found:
        before, stopped = rss_mb(os.getpid()), list[str]()
        lazy = [threading.Thread(target=never_read, args=(server.port, stopped)) for _ in range(4)]
        for one in lazy:
            one.start()
        for one in lazy:
            one.join()
        left = sessions_left(server, 20)
        grown = rss_mb(os.getpid()) - before
    holds = left == 8 and len(stopped) == 4 and "TimeoutError" not in stopped
    return summary(found, slow=4, ended_by=stopped, sessions_left=left, rss_grown_mb=round(grown, 1), holds=holds)


def killed_server() -> dict[str, Any]:
    """Kill -9 under load, three times; the clients come back by themselves."""
    with tempfile.TemporaryDirectory() as name:
        audit = Path(name) / "audit"
        with contextlib.ExitStack() as stack:
            process, url = stack.enter_context(server_process("--audit", audit, script=SCRIPT))
            found = stack.enter_context(callers(url))
            for _ in range(3):
                time.sleep(0.5)
                process.send_signal(signal.SIGKILL)
                process.wait()
                process, _ = stack.enter_context(server_process("--audit", audit, port=port_of(url), script=SCRIPT))
                time.sleep(2.0)
            for caller in found:
                caller.ended.set()
            for caller in found:
                caller.join(60)
            written = written_down(audit)
            acknowledged = set().union(*(caller.acknowledged for caller in found))
            result = summary(found, kills=3, acknowledged=len(acknowledged), not_written=len(acknowledged - written))
            for caller in found:
                caller.answered += 5  # they have ended already: nothing more to wait for
    return {**result, "holds": result["not_written"] == 0 and result["restarts"] == 24}


def written_down(audit: Path) -> set[str]:
    """Return the digests of the actions in an audit log; a line cut off by a kill does not count."""
    found = set()
    for line in audit.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.add(json.loads(line).get("actions", ""))
    return found


def garbage_on_reload() -> dict[str, Any]:
    """A checkpoint is overwritten by garbage under load, then by a good one."""
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 1, (8, 18)).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = save_small(Path(name) / "policy", 0)
        words = (folder, "--watch", 0.1, "--threads", 1, "--rate", 1e6)
        with server_process(*words) as (_, url), callers(url, observation=lambda n, k: {STATE: values[n]}) as found:
            first = found[0].client.metadata["dipole"]["checkpoint"]
            for spoil in (b"garbage" * 1000, b"", None):
                target = folder / "model.safetensors"
                good = target.read_bytes()
                target.write_bytes(good[: len(good) // 2] if spoil is None else spoil)
                os.utime(folder / "config.json")
                time.sleep(1.0)
                target.write_bytes(good)
            seen = set().union(*(caller.checkpoints for caller in found))
            save_small(Path(name) / "new", 1)
            shutil.rmtree(folder)
            shutil.move(Path(name) / "new", folder)
            deadline = time.monotonic() + 20
            while any(c.checkpoints[-1] == first for c in found) and time.monotonic() < deadline:
                time.sleep(0.05)
            replaced = all(c.checkpoints[-1] != first for c in found)
    return summary(found, only_the_old_one=seen == {first}, replaced=replaced, holds=seen == {first} and replaced)


def clock_jumps() -> dict[str, Any]:
    """The wall clock jumps by three years, both ways."""
    real = time.time
    with in_process() as server, callers(server.url) as found:
        for jump in (1e8, -1e8):
            with mock.patch("time.time", lambda jump=jump: real() + jump):
                time.sleep(1.5)
        left = sessions_left(server, 1)
    return summary(found, sessions_left=left, holds=left == 8)


def full_disk() -> dict[str, Any]:
    """No file of the server may grow any more for a while (a limit of the kernel); then they may again."""
    with tempfile.TemporaryDirectory() as name:
        audit = Path(name) / "audit"
        with server_process("--audit", audit, script=SCRIPT) as (process, url), callers(url) as found:
            soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, hard))
            time.sleep(0.5)
            before = sum(caller.answered for caller in found)
            probe = PolicyClient(url, give_up_s=0)
            refused = False
            try:
                probe.infer({STATE: np.zeros(2, np.float32)})
            except DipoleError as error:
                refused = "audit log" in str(error) or "unavailable" in str(error)
            time.sleep(1.0)
            meanwhile = sum(caller.answered for caller in found) - before
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))
            time.sleep(2.0)
        written = written_down(audit)
    acknowledged = set().union(*(caller.acknowledged for caller in found))
    missing = len(acknowledged - written)
    holds = refused and meanwhile == 0 and missing == 0
    more = {"answered_while_full": meanwhile, "told_why": refused, "not_written": missing}
    return summary(found, acknowledged=len(acknowledged), **more, holds=holds)


FAULTS = (killed_mid_frame, half_open, slow_reader, killed_server, garbage_on_reload, clock_jumps, full_disk)


def main() -> None:
    results = {}
    for fault in FAULTS:
        begin = time.monotonic()
        result = fault()
        result["holds"] = bool(
            result["holds"] and result["wrong"] == result["unreachable"] == 0 and result["answered"] > 50
        )
        results[fault.__name__] = {**result, "seconds": round(time.monotonic() - begin, 1)}
        print(fault.__name__, results[fault.__name__], flush=True)
    save("server_faults", {"faults": results, "holds": all(result["holds"] for result in results.values())})


if __name__ == "__main__":
    main()
