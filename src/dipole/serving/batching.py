"""Dynamic batching: requests of several clients are answered by one call of the policy.

While a call runs, requests gather. When the worker is free, the batcher goes at once if every session that has been
active lately is waiting, else it waits for the others, but never longer than the budget. So a lone client pays nothing.

The worker is a thread, lest a call keep the event loop from everybody else. With one session there is nobody else, and
a policy that has lately been quick is called in the loop itself: waking two threads costs more than its call.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from dipole.serving.inference import Row
from dipole.serving.protocol import Refusal

Call = Callable[[Sequence[Row]], list[Any]]

_LATELY = 20  # calls that must all have been quick


@dataclass(eq=False)
class Pending:
    """A request that waits.

    Attributes:
        row: What to call the policy with.
        future: Gets the answer.
        arrived: When it came, by the monotonic clock.
        deadline: Until when the call must begin, or None.
    """

    row: Row
    future: asyncio.Future[Any]
    arrived: float
    deadline: float | None = None


class Batcher:
    """Gathers requests for one model and calls it.

    Attributes:
        queue: Requests that wait.
        busy_since: When the call under way began, or None.
    """

    def __init__(
        self,
        call: Call,
        executor: Executor,
        *,
        max_batch: int,
        budget_s: float,
        capacity: int,
        quick_s: float = 0.0,
        others: Callable[[], int] = lambda: 1,
        alone: Callable[[], bool] = lambda: False,
        observe: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        """Make a batcher; `run` must be started as a task.

        Args:
            call: Answers rows, in the worker thread.
            executor: The worker.
            max_batch: Most rows per call.
            budget_s: Longest wait for other clients.
            capacity: Most requests that may wait.
            quick_s: Longest call that may be made in the event loop.
            others: Returns how many sessions may be about to ask.
            alone: Returns whether the server has no more than one session, so that nobody else can be kept waiting.
            observe: Told the size and duration of each call.
        """
        self._call, self._executor = call, executor
        self._max_batch, self._budget, self._capacity = max_batch, budget_s, capacity
        self._quick, self._others, self._alone, self._observe = quick_s, others, alone, observe
        self._arrival = asyncio.Event()
        self._call_s = 0.05  # moving average of a call's duration, for the advice given with `busy`
        self._latest: deque[float] = deque(maxlen=_LATELY)  # durations
        self.queue: deque[Pending] = deque()
        self.busy_since: float | None = None

    async def submit(self, row: Row, deadline: float | None = None) -> Any:
        """Return the answer for a row.

        Raises:
            Refusal: Too many requests wait already, the deadline passes first, or the call failed.
        """
        if len(self.queue) >= self._capacity:
            calls = 1 + len(self.queue) / self._max_batch
            raise Refusal("busy", "too many requests are waiting: try again later", 1000 * calls * self._call_s)
        if self._may_call_here():
            result = self._call_here(row)
        else:
            result = await self._wait_for_worker(row, deadline)
        if isinstance(result, Exception):
            raise result
        return result

    def _may_call_here(self) -> bool:
        free = self.busy_since is None and not self.queue
        return free and len(self._latest) == _LATELY and max(self._latest) <= self._quick and self._alone()

    def _call_here(self, row: Row) -> Any:
        """Call in the event loop, which does nothing else meanwhile."""
        self.busy_since = time.monotonic()
        try:
            return self._call([row])[0]
        finally:
            self._count(1)

    async def _wait_for_worker(self, row: Row, deadline: float | None) -> Any:
        pending = Pending(row, asyncio.get_running_loop().create_future(), time.monotonic(), deadline)
        self.queue.append(pending)
        self._arrival.set()
        try:
            return await pending.future
        finally:
            if not pending.future.done() or pending.future.cancelled():
                self._forget(pending)

    def _forget(self, pending: Pending) -> None:
        if pending in self.queue:
            self.queue.remove(pending)

    async def run(self) -> None:
        """Answer requests until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_for_company()
            batch = self._take()
            if not batch:
                continue
            self.busy_since = time.monotonic()
            answered = loop.create_future()
            # Not `run_in_executor`, whose chain of futures costs a fifth of what the server adds to a request.
            self._executor.submit(self._work, batch, loop, answered)
            await answered

    def _work(self, batch: Sequence[Pending], loop: asyncio.AbstractEventLoop, answered: asyncio.Future[None]) -> None:
        """Call, in the worker thread, and have the answers given out by the loop."""
        results: list[Any]
        try:
            results = self._call([one.row for one in batch])
        except Exception as error:  # `call` returns errors; this is a fault of the worker itself
            results = [error] * len(batch)
        with contextlib.suppress(RuntimeError):  # a loop that was closed meanwhile has nobody left to answer
            loop.call_soon_threadsafe(self._give_out, batch, results, answered)

    def _count(self, rows: int) -> None:
        """Count a call that has ended."""
        duration = time.monotonic() - (self.busy_since or time.monotonic())
        self.busy_since = None
        self._call_s += 0.2 * (duration - self._call_s)
        self._latest.append(duration)
        self._observe(rows, duration)

    def _give_out(self, batch: Sequence[Pending], results: list[Any], answered: asyncio.Future[None]) -> None:
        self._count(len(batch))
        for one, result in zip(batch, results, strict=True):
            if not one.future.done():
                one.future.set_result(result)
        if not answered.done():
            answered.set_result(None)

    async def _wait_for_company(self) -> None:
        """Return when a call should begin."""
        while not self.queue:
            self._arrival.clear()
            await self._arrival.wait()
        leave = self.queue[0].arrived + self._budget
        while 0 < len(self.queue) < min(self._max_batch, self._others()):
            remaining = leave - time.monotonic()
            if remaining <= 0:
                return
            self._arrival.clear()
            try:
                async with asyncio.timeout(remaining):
                    await self._arrival.wait()
            except TimeoutError:
                return

    def _take(self) -> list[Pending]:
        """Take the next batch: rows for the same model, of the same types, all or none with noise, none too late."""
        batch: list[Pending] = []
        rest: list[Pending] = []
        kind: Any = None
        now = time.monotonic()
        while self.queue and len(batch) < self._max_batch:
            one = self.queue.popleft()
            if one.future.done():
                continue
            if one.deadline is not None and now > one.deadline:
                one.future.set_result(Refusal("expired", "the deadline passed while the request waited", 0.0))
                continue
            types = {key: (value.dtype, value.shape) for key, value in one.row.history.items()}
            own = (id(one.row.model), types, one.row.noise is None)
            if kind is None or own == kind:
                kind = own
                batch.append(one)
            else:
                rest.append(one)
        self.queue.extendleft(reversed(rest))
        return batch
