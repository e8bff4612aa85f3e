"""Fuzz: 120,000 malformed frames, handshakes and requests over real sockets, against a server that must not care.

    python benchmarks/server/fuzz.py [--frames 120000] [--seed 0]

Three kinds. *Messages* in sound websocket frames: random bytes, cut or mutated observations, msgpack bombs, arrays with
impossible dtypes and shapes, requests with wrong reserved keys; each must be answered by a one-line refusal. *Frames*:
wrong opcodes, reserved bits, no mask, terabyte lengths, endless fragments; the connection must end. *Handshakes*:
garbage for HTTP; likewise. All the while a good client asks and must be answered right. Nothing may hang, leave a
session behind, put a traceback on the wire or into the log, or make the server grow.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import rss_mb, save, save_small, server_process
from malformed import FRAMES, GOOD, HANDSHAKE, HANDSHAKES, MESSAGES, SURVIVED, frame

from dipole.serving.client import PolicyClient
from dipole.serving.codec import unpack

HANG_S = 20.0
WORKERS = 8
TRAIN = 8  # wrong observations in a row, on average


class Report:
    """What came back."""

    def __init__(self) -> None:
        self.sent: collections.Counter[str] = collections.Counter()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.hangs = self.tracebacks = 0

    def said(self, data: bytes) -> None:
        """Look for what must never be said."""
        if b"Traceback" in data or b'File "' in data or b".py" in data:
            self.tracebacks += 1


class Wire:
    """A websocket spoken by hand."""

    def __init__(self, port: int, report: Report) -> None:
        self.port, self.report = port, report
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        """Open it, and read the metadata."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(HANDSHAKE)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        if b" 101 " not in answer.split(b"\r\n")[0]:
            raise ConnectionError(answer[:60])
        await self.receive()

    async def receive(self) -> tuple[int, bytes]:
        """Return the opcode and the payload of the next frame."""
        assert self.reader is not None
        head, length = await self.reader.readexactly(2)
        if length > 125:
            length = int.from_bytes(await self.reader.readexactly(2 if length == 126 else 8), "big")
        data = await self.reader.readexactly(length)
        self.report.said(data)
        return head & 15, data

    async def close(self) -> None:
        """Close it."""
        if self.writer is not None:
            self.writer.close()
            with contextlib.suppress(OSError):
                await self.writer.wait_closed()
        self.writer = None


async def messages(port: int, count: int, rng: random.Random, report: Report) -> None:
    """Send trains of messages: wrong observations, which the connection survives, and last one that may end it."""
    wire = Wire(port, report)
    fatal = [kind for kind in MESSAGES if kind not in SURVIVED]
    while count > 0:
        kinds = [*rng.choices(SURVIVED, (9, 1), k=rng.randint(0, 2 * TRAIN)), rng.choice(fatal)]
        count -= len(kinds)
        report.sent.update(kinds)
        left = len(kinds)
        try:
            async with asyncio.timeout(HANG_S):
                if wire.writer is None:
                    await wire.open()
                assert wire.writer is not None
                wire.writer.write(b"".join(frame(MESSAGES[kind](rng)) for kind in kinds))
                while left:
                    opcode, data = await wire.receive()
                    left -= 1
                    if opcode == 2:  # a mutation may be sound, and then it is answered
                        code = unpack(data).get("dipole/error", {}).get("code", "answered")
                    else:
                        code = data.decode().partition(":")[0] if opcode == 1 else "closed"
                        await wire.close()
                        report.outcomes["cut off by one before"] += left
                        left = 0
                    report.outcomes[code] += 1
        except TimeoutError:
            report.hangs += 1
            await wire.close()
        except (OSError, EOFError):
            report.outcomes["closed"] += left
            await wire.close()
    await wire.close()


async def bursts(port: int, count: int, rng: random.Random, report: Report) -> None:
    """Send broken frames and handshakes: what matters is that the connection ends."""
    for _ in range(count):
        group = rng.choice([FRAMES, HANDSHAKES])
        kind = rng.choice(list(group))
        report.sent[("frame: " if group is FRAMES else "handshake: ") + kind] += 1
        wire = Wire(port, report)
        try:
            async with asyncio.timeout(HANG_S):
                if group is FRAMES:
                    await wire.open()
                else:
                    wire.reader, wire.writer = await asyncio.open_connection("127.0.0.1", port)
                assert wire.reader is not None
                assert wire.writer is not None
                wire.writer.write(group[kind](rng))
                wire.writer.write_eof()
                report.said(await wire.reader.read(-1))
                report.outcomes["ended"] += 1
        except TimeoutError:
            report.hangs += 1
        except (OSError, EOFError):
            report.outcomes["ended"] += 1
        await wire.close()


async def attack(port: int, frames: int, seed: int, report: Report, watch: Any) -> None:
    watcher = asyncio.create_task(watch())
    broken = frames // 20
    workers = [messages(port, (frames - broken) // WORKERS, random.Random(seed + k), report) for k in range(WORKERS)]
    workers += [bursts(port, broken // WORKERS, random.Random(seed + 100 + k), report) for k in range(WORKERS)]
    await asyncio.gather(*workers)
    watcher.cancel()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report, memory, good = Report(), [], collections.Counter[str]()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "log"
        words = (save_small(folder / "policy"), "--rate", 1e9, "--threads", 1, "--audit", folder / "audit")
        with server_process(*words, log=log) as (process, url):
            port = int(url.rpartition(":")[2])
            client = PolicyClient(url, give_up_s=30)
            expected = client.infer(GOOD, seed=1).actions

            async def watch() -> None:
                while True:
                    same = (await asyncio.to_thread(client.infer, GOOD, seed=1)).actions
                    good["asked"] += 1
                    good["wrong"] += not np.allclose(same, expected, atol=1e-4)  # batches round differently
                    memory.append(round(rss_mb(process.pid), 1))
                    await asyncio.sleep(0.5)

            # The first tenth warms up allocator and caches; growth is counted from there.
            asyncio.run(attack(port, args.frames // 10, args.seed + 1000, report, watch))
            settled = rss_mb(process.pid)
            asyncio.run(attack(port, args.frames, args.seed, report, watch))
            time.sleep(1)
            after = rss_mb(process.pid)
            client.close()
            time.sleep(0.5)
            with PolicyClient(url) as last:
                alive = bool(np.allclose(last.infer(GOOD, seed=1).actions, expected, atol=1e-4))
            running = process.poll() is None
        text = log.read_text(errors="replace")
    result = {
        "frames": sum(report.sent.values()),
        "seconds": round(time.monotonic() - begin, 1),
        "sent": dict(sorted(report.sent.items())),
        "outcomes": dict(report.outcomes.most_common()),
        "hangs": report.hangs,
        "tracebacks_on_the_wire": report.tracebacks,
        "tracebacks_in_the_log": text.count('"traceback"') + text.count("Traceback (most recent"),
        "good_client": dict(good),
        "server_alive": alive and running,
        "rss_mb": {"after_warm_up": round(settled, 1), "after": round(after, 1), "highest": max(memory)},
        "log_mb": round(len(text) / 1e6, 1),
    }
    result["holds"] = (
        result["frames"] >= 100_000
        and not (report.hangs or report.tracebacks or result["tracebacks_in_the_log"] or good["wrong"])
        and alive
        and running
        and after - settled < 32  # MB: about one message's worth per connection
    )
    save("server_fuzz", result)


if __name__ == "__main__":
    main()
