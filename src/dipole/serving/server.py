"""The server: websocket connections, each one's conversation, shutdown. HTTP pages are in `pages`.

    server = Server(service, host="127.0.0.1", port=8000)
    async with server:            # or: await server.run() until SIGTERM
        ...

The event loop computes for nobody but a lone client of a quick policy; else policies are called in a worker thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import ssl
import time
from collections.abc import Callable
from functools import partial

from dipole.errors import DipoleError, MissingExtraError
from dipole.serving.auth import Tokens, check_bind
from dipole.serving.codec import pack
from dipole.serving.connection import Census, Connection
from dipole.serving.limits import FailureCounter
from dipole.serving.pages import Gate
from dipole.serving.protocol import CLOSE_ERROR, CLOSE_TRY_LATER, LATER, SESSION_HEADER, Refusal, Request
from dipole.serving.service import Service
from dipole.serving.sessions import Session

try:
    from websockets.asyncio.server import Server as WebSocketServer
    from websockets.asyncio.server import serve
    from websockets.exceptions import ConnectionClosed, ConnectionClosedError
except ModuleNotFoundError:  # pragma: no cover
    raise MissingExtraError("websockets", "serve") from None

_WRITE_BUFFER = 2**16


class Server:
    """A policy server on one address.

    Attributes:
        service: What answers.
        host: Address to listen on.
        port: Port; once started the real one, if it was 0.
    """

    def __init__(
        self,
        service: Service,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        tokens: Tokens | None = None,
        tls: ssl.SSLContext | None = None,
        watch_s: float = 0.0,
        drain_s: float = 10.0,
        read_tokens: Callable[[], Tokens | None] | None = None,
    ) -> None:
        """Make a server; nothing is opened yet.

        Args:
            service: What answers.
            host: Address to listen on.
            port: Port; 0 for any.
            tokens: Who may connect; None for everybody, on loopback addresses only.
            tls: TLS settings.
            watch_s: How often to look whether the models' files have been replaced; 0 for never.
            drain_s: How long requests may take to end at shutdown.
            read_tokens: Reads the tokens again on SIGHUP.

        Raises:
            DipoleError: The address can be reached from other machines and there are no tokens.
        """
        check_bind(host, tokens)
        self.service, self.host, self.port = service, host, port
        self._tls, self._watch_s, self._drain_s, self._read_tokens = tls, watch_s, drain_s, read_tokens
        self._failures = FailureCounter(service.limits.auth_failures)
        self._gate = Gate(service, tokens, self._failures, host)
        self._census = Census(service.limits.connections, lambda: service.metrics.rejected.add("connections"))
        self._server: WebSocketServer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def url(self) -> str:
        """Return the address for clients."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'ws' if self._tls is None else 'wss'}://{host}:{self.port}"

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen.

        Raises:
            DipoleError: The address is taken or does not exist.
        """
        limits = self.service.limits
        # A handshake that fails is counted by us; the library would log a traceback for each.
        quiet = logging.getLogger("dipole.serving.websockets")
        quiet.setLevel(logging.CRITICAL + 1)
        self.service.start()
        try:
            self._server = await serve(
                self._talk,  # type: ignore[arg-type]
                self.host,
                self.port,
                process_request=self._gate.process,
                create_connection=partial(Connection, self._census),  # type: ignore[arg-type]
                compression=None,  # as openpi; images do not shrink, and a small frame could unfold into a huge one
                max_size=self.service.frame_bytes(),
                max_queue=1,
                write_limit=_WRITE_BUFFER,
                open_timeout=limits.handshake_timeout_s,
                close_timeout=2,
                ping_interval=limits.ping_s,
                ping_timeout=limits.ping_s,
                server_header=None,
                logger=quiet,
                ssl=self._tls,
            )
        except OSError as error:
            await self.service.stop()
            raise DipoleError(
                f"cannot listen on {self.host}:{self.port} ({error.strerror}): choose another --port"
            ) from None
        self.port = next(iter(self._server.sockets)).getsockname()[1]
        models = {name: self.service.store[name].checkpoint for name in self.service.store.names()}
        self.service.note("start", host=self.host, port=self.port, tls=self._tls is not None, models=models)
        self._tasks = [asyncio.create_task(self._sweep())]
        if self._watch_s > 0:
            self._tasks.append(asyncio.create_task(self._watch()))

    async def stop(self) -> None:
        """Answer what has been asked, refuse everything new, close."""
        self.service.draining = True
        deadline = time.monotonic() + self._drain_s
        while self.service.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._server.wait_closed(), 5)
        self.service.note("stop")
        await self.service.stop()

    async def run(self, ready: Callable[[Server], None] = lambda server: None) -> None:
        """Serve until SIGTERM or SIGINT; SIGHUP loads models and tokens again."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._tasks.append(asyncio.create_task(self.refresh())))
        async with self:
            ready(self)
            await ended.wait()

    async def refresh(self) -> None:
        """Read the tokens and load the models again; what is damaged is refused, and the old goes on."""
        if self._read_tokens is not None:
            try:
                tokens = self._gate.tokens = self._read_tokens()
                self.service.note("tokens-replaced")
                self._cut_off_strangers(tokens)
            except DipoleError as error:
                self.service.note("tokens-refused", reason=str(error))
        for name in self.service.store.names():
            await self.service.reload(name)

    def _cut_off_strangers(self, tokens: Tokens | None) -> None:
        """End the sessions of those whose token is not accepted any more."""
        for session in self.service.sessions:
            if tokens is not None and session.holder not in tokens:
                if session.connection is not None:
                    session.connection.transport.abort()
                session.connection = None
                self.service.close(session, "token taken away")

    async def _watch(self) -> None:
        """Load models again whose files have been replaced; a refused one is tried again when it changes again."""
        store = self.service.store
        seen = {name: store.stamp(name) for name in store.names()}
        while True:
            await asyncio.sleep(self._watch_s)
            for name in store.names():
                stamp = await asyncio.to_thread(store.stamp, name)
                if stamp is not None and stamp != seen[name]:
                    seen[name] = stamp
                    await self.service.reload(name)

    async def _sweep(self) -> None:
        """Forget sessions whose clients stay away."""
        while True:
            await asyncio.sleep(min(1.0, self.service.limits.resume_s))
            for session in self.service.sessions.expire():
                self.service.note("session-close", session=session.id, requests=session.requests, reason="away")

    async def _talk(self, ws: Connection) -> None:
        """Hold one connection's conversation."""
        secret = None if ws.request is None else ws.request.headers.get(SESSION_HEADER)
        try:
            session, resumed, old = self.service.open(ws.model_name, ws.holder, ws.peer, secret, ws)
        except Refusal as refusal:
            self.service.metrics.rejected.add(refusal.code)
            await self._end(ws, refusal)
            return
        reason = "closed"
        try:
            if old is not None:
                old.transport.abort()  # the client gave it up; we had not noticed yet
            await self._send(ws, self.service.metadata(session, resumed))
            while True:
                async with asyncio.timeout(self.service.limits.idle_s):
                    data = await ws.recv()
                if not await self._respond(ws, session, data):
                    reason = "refused"
                    return
        except ConnectionClosed as closed:
            reason = "closed" if closed.rcvd is not None else "lost"
        except TimeoutError:
            reason = "idle"
            await ws.close(1000, "idle")
        finally:
            self._leave(ws, session, reason)

    def _leave(self, ws: Connection, session: Session, reason: str) -> None:
        if session.connection is not ws:
            return  # the client is back on another connection already
        if reason == "lost" and session.extended and not self.service.draining:
            self.service.sessions.detach(session)
            self.service.note("session-lost", session=session.id)
        else:
            self.service.close(session, reason)

    async def _respond(self, ws: Connection, session: Session, data: bytes | str) -> bool:
        """Answer one message; return whether the conversation goes on."""
        received = time.monotonic()
        request: Request | None = None
        try:
            request = self.service.read(session, data)
            reply = await self.service.answer(session, request, received)
        except Refusal as refusal:
            session.refusals += 1
            self.service.metrics.refusals.add(refusal.code)
            extended = session.extended if request is None else request.extended
            if refusal.final or not extended:
                await self._end(ws, refusal)
                return False
            await self._send(ws, pack(refusal.table(None if request is None else request.id)))
            return True
        await self._send(ws, reply)
        self.service.metrics.replied(session, time.monotonic() - received)
        return True

    async def _send(self, ws: Connection, message: bytes | str) -> None:
        """Send a message; a client that does not read it in time is cut off."""
        try:
            async with asyncio.timeout(self.service.limits.send_timeout_s):
                await ws.send(message)
        except TimeoutError:
            self.service.note("slow-reader", peer=ws.peer)
            ws.transport.abort()
            raise ConnectionClosedError(None, None) from None

    async def _end(self, ws: Connection, refusal: Refusal) -> None:
        """Tell why and close, as openpi's server does."""
        self.service.note("refused", peer=ws.peer, code=refusal.code, message=refusal.message)
        with contextlib.suppress(ConnectionClosed):
            await self._send(ws, refusal.text())
            code = CLOSE_TRY_LATER if refusal.code in LATER else CLOSE_ERROR
            await ws.close(code, refusal.code)
