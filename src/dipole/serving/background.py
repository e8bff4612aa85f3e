"""A server in a thread of this process, for tests, notebooks and programs that bring their own policy.

Example: `with serving(ModelStore([from_policy("mine", policy)])) as server: PolicyClient(server.url)`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dipole.serving.audit import AuditLog
from dipole.serving.config import ServiceConfig
from dipole.serving.models import ModelStore
from dipole.serving.server import Server
from dipole.serving.service import Service


@contextmanager
def serving(
    store: ModelStore, config: ServiceConfig | None = None, audit: AuditLog | None = None, **options: Any
) -> Iterator[Server]:
    """Serve on a free port of this machine until the block is left.

    Args:
        store: The models.
        config: How requests are answered.
        audit: The audit log.
        **options: Of `Server`.
    """
    loop = asyncio.new_event_loop()
    started: dict[str, Server] = {}

    async def start() -> None:
        server = Server(Service(store, config, audit), **{"port": 0, **options})
        await server.start()
        started["server"] = server

    thread = threading.Thread(target=loop.run_forever, name="dipole-serve", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(start(), loop).result(60)
        yield started["server"]
    finally:
        if "server" in started:
            asyncio.run_coroutine_threadsafe(started["server"].stop(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
