"""What a client may ask of the server: sizes, counts and rates, all checked before memory is spent on them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may send and hold.

    Attributes:
        frame_bytes: Largest message; the connection is closed at the header of a larger one.
        depth: Deepest nesting of maps and lists within a message.
        nodes: Most values within a message (an array is one).
        string_bytes: Longest text within a message.
        array_dims: Most dimensions of an array.
        sessions: Most sessions at once, those waiting for their client to come back included.
        connections: Most open TCP connections, before any handshake.
        requests_per_s: Lasting request rate of one session.
        burst: Requests a session may make at once.
        queue: Requests that may wait for a model; beyond that they are refused as `busy`.
        request_timeout_s: Longest time from a request to its reply.
        send_timeout_s: Longest time a client may take to read a reply.
        handshake_timeout_s: Longest time for TLS and the opening handshake.
        ping_s: Interval of keep-alive pings, and how long their answer may take.
        idle_s: A session without a request for this long is closed.
        resume_s: How long a session whose connection broke waits for its client.
        auth_failures: Wrong tokens an address may send per minute.
    """

    frame_bytes: int = 16 * 2**20
    depth: int = 8
    nodes: int = 4096
    string_bytes: int = 16384
    array_dims: int = 8
    sessions: int = 64
    connections: int = 128
    requests_per_s: float = 500.0
    burst: int = 1000
    queue: int = 256
    request_timeout_s: float = 10.0
    send_timeout_s: float = 10.0
    handshake_timeout_s: float = 10.0
    ping_s: float = 20.0
    idle_s: float = 900.0
    resume_s: float = 30.0
    auth_failures: int = 10


class TokenBucket:
    """A rate limit: `rate` per second, up to `burst` at once.

    Attributes:
        rate: Tokens that come back per second.
        burst: Most tokens held.
    """

    def __init__(self, rate: float, burst: float, clock: Clock = time.monotonic) -> None:
        self.rate, self.burst = rate, burst
        self._clock = clock
        self._tokens, self._since = burst, clock()

    def wait(self) -> float:
        """Return how many seconds until a token is there; 0 if one is."""
        now = self._clock()
        self._tokens = min(self.burst, self._tokens + (now - self._since) * self.rate)
        self._since = now
        return 0.0 if self._tokens >= 1 else (1 - self._tokens) / self.rate

    def take(self) -> float:
        """Take a token and return 0, or return how many seconds until there is one."""
        wait = self.wait()
        if wait == 0:
            self._tokens -= 1
        return wait


class FailureCounter:
    """Wrong tokens by address; remembers a bounded number of addresses, the latest ones."""

    def __init__(self, per_minute: int, remembered: int = 1024, clock: Clock = time.monotonic) -> None:
        self._per_minute, self._remembered, self._clock = per_minute, remembered, clock
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def blocked(self, address: str) -> bool:
        """Whether an address has failed too often lately."""
        bucket = self._buckets.get(address)
        return bucket is not None and bucket.wait() > 0

    def count(self, address: str) -> None:
        """Count one failure."""
        bucket = self._buckets.pop(address, None) or TokenBucket(self._per_minute / 60, self._per_minute, self._clock)
        bucket.take()
        self._buckets[address] = bucket
        while len(self._buckets) > self._remembered:
            self._buckets.popitem(last=False)
