"""What a policy server does, apart from sockets: answers requests of sessions, replaces models, keeps count."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from dipole.errors import DipoleError
from dipole.evaluation.seeds import policy_generator
from dipole.serving import protocol
from dipole.serving.audit import AuditError, AuditLog
from dipole.serving.batching import Batcher
from dipole.serving.codec import CodecError, unpack
from dipole.serving.config import ServiceConfig
from dipole.serving.inference import Answer, Row, answer
from dipole.serving.models import ModelStore
from dipole.serving.observability import ServerMetrics
from dipole.serving.protocol import Refusal, Request
from dipole.serving.replies import build_metadata, build_reply, rule_names
from dipole.serving.schema import extend, read_noise, read_observation
from dipole.serving.sessions import Memory, Session, Sessions, moved

Opened = tuple[Session, bool, Any]


class Service:
    """The models, the sessions and the one worker thread that calls policies (see `batching` for when it is spared).

    Attributes:
        store: The models.
        config: How requests are answered.
        sessions: The sessions.
        audit: The audit log.
        metrics: What has been counted.
        draining: Whether the server is shutting down.
    """

    def __init__(
        self,
        store: ModelStore,
        config: ServiceConfig | None = None,
        audit: AuditLog | None = None,
        logger: logging.Logger | None = None,
    ) -> None:
        self.store = store
        self.config = config or ServiceConfig()
        self.limits = self.config.limits
        self.audit = audit or AuditLog(None)
        self.logger = logger or logging.getLogger("dipole.serving")
        self.sessions = Sessions(self.limits)
        self.draining = False
        self.recent: deque[tuple[float, float]] = deque(maxlen=600)  # (when, total ms), for the page
        self.started = time.monotonic()
        self.in_flight = 0
        self._executor = ThreadPoolExecutor(1, "dipole-policy")
        self._tasks: list[asyncio.Task[None]] = []
        self._reloading = asyncio.Lock()
        self.batchers = {name: self._batcher(name) for name in store.names()}
        self.metrics = ServerMetrics(self)

    def _batcher(self, name: str) -> Batcher:
        return Batcher(
            partial(answer, block=self.config.block),
            self._executor,
            max_batch=self.config.block or self.config.max_batch,
            budget_s=self.config.latency_budget_ms / 1000,
            capacity=self.limits.queue,
            quick_s=self.config.quick_ms / 1000,
            others=lambda: self.sessions.active(name),
            alone=lambda: len(self.sessions) == 1,
            observe=lambda rows, seconds: self.metrics.called(name, rows, seconds),
        )

    def start(self) -> None:
        """Start answering."""
        self._tasks = [asyncio.create_task(batcher.run()) for batcher in self.batchers.values()]

    async def stop(self) -> None:
        """Stop answering; a call under way is waited for."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)
        self.audit.close()

    def frame_bytes(self) -> int:
        """Return the largest message that is accepted."""
        return min(self.limits.frame_bytes, max(self.store[n].schema.frame_bytes() for n in self.store.names()))

    def problems(self) -> list[str]:
        """Return why the server is not healthy; empty if it is."""
        found = ["shutting down"] if self.draining else []
        if not self.audit.healthy:
            found.append("the audit log cannot be written")
        limit = time.monotonic() - self.limits.request_timeout_s
        if any(b.busy_since is not None and b.busy_since < limit for b in self.batchers.values()):
            found.append("a call of a policy does not end")
        return found

    def open(self, model_name: str, holder: str, peer: str, secret: str | None, connection: Any) -> Opened:
        """Return a client's session, whether it came back to it, and the connection that it had, if still open.

        Raises:
            Refusal: There is no room, or the audit log cannot be written.
        """
        session = self.sessions.find(secret, holder, model_name)
        if session is None and self.sessions.full:
            raise Refusal("busy", "all sessions are taken: try again later", 1000.0, final=True)
        if session is not None:
            self.write_audit("session-resume", session=session.id, peer=peer)
            old = session.connection
            self.sessions.attach(session, connection, peer)
            return session, True, old
        session = self.sessions.open(self.store[model_name], holder, peer, connection)
        try:
            self.write_audit("session-open", session=session.id, holder=holder, peer=peer, model=model_name)
        except Refusal:
            self.sessions.close(session)
            raise
        return session, False, None

    def metadata(self, session: Session, resumed: bool) -> bytes:
        """Return the first message to a client."""
        model = self.store[session.model_name]
        limits = {
            "frame_bytes": self.frame_bytes(),
            "requests_per_s": self.limits.requests_per_s,
            "idle_s": self.limits.idle_s,
            "resume_s": self.limits.resume_s,
        }
        return build_metadata(session, resumed, model, self.store.names(), limits, self.config.metadata)

    def read(self, session: Session, data: bytes | str) -> Request:
        """Return the request in a message.

        Raises:
            Refusal: It is not one, or the session asks too often.
        """
        wait = session.bucket.take()
        if wait:
            raise Refusal("rate", f"more than {self.limits.requests_per_s:g} requests per second", 1000 * wait)
        if isinstance(data, str):
            raise Refusal("malformed", "a text frame: send msgpack in binary frames", final=True)
        try:
            request = protocol.parse(unpack(data, self.limits))
        except CodecError as error:
            raise Refusal("malformed", str(error), final=True) from None
        session.last_request = time.monotonic()
        session.extended |= request.extended
        return request

    async def answer(self, session: Session, request: Request, received: float) -> bytes:
        """Return the reply to a request.

        Args:
            session: Whose it is.
            request: From `read`.
            received: When it came, by the monotonic clock.

        Raises:
            Refusal: There is none; the session is as it was before.
        """
        if self.draining:
            raise Refusal("unavailable", "the server is shutting down", 1000.0, final=True)
        self.in_flight += 1
        try:
            async with session.lock:
                if request.id is not None and request.id == session.last_id and session.last_reply is not None:
                    return session.last_reply
                return await self._answer(session, request, received)
        except Refusal:
            raise
        except DipoleError as error:
            raise Refusal("bad-observation", str(error)) from None
        except Exception:
            incident = secrets.token_hex(4)
            self.logger.exception("incident", extra={"fields": {"incident": incident, "session": session.id}})
            raise Refusal("internal", f"an error of the server, see incident {incident} in its log") from None
        finally:
            self.in_flight -= 1

    async def _answer(self, session: Session, request: Request, received: float) -> bytes:
        model = self.store[session.model_name]
        memory = Memory(model) if request.reset else moved(session.memory, model)
        generator = session.generator
        if request.seed is not None:
            generator = policy_generator(request.seed, model.device)
        result = None
        if request.op != "reset":
            arrays = read_observation(request.observation, model.schema)
            memory = replace(memory, history=extend(memory.history, arrays, model.schema.obs_horizon))
        if request.op == "infer":
            assert memory.history is not None
            previous, past = memory.previous(request.executed), memory.remembered(request.executed)
            noise = read_noise(request.noise, model.schema)
            slot = int(session.id, 16)
            row = Row(model, memory.history, memory.state, generator, previous, slot, noise, past)
            result = await self._call(session, row, request, received)
            seen = None if model.guard is None or model.guard.monitor is None else memory.history
            memory = replace(memory, state=result.state, chunk=result.actions, before=previous, past=past, seen=seen)
        reply = build_reply(session, request, memory, result, received)
        self._write_down(session, request, memory, result)
        # From here on nothing can fail: the reply is on its way, and the session has moved on with it.
        session.generator, session.memory = generator, replace(memory, events=())
        session.last_id, session.last_reply = request.id, reply if request.id is not None else None
        session.requests += 1
        if result is not None:
            session.violations += len(result.violations)
        return reply

    async def _call(self, session: Session, row: Row, request: Request, received: float) -> Answer:
        deadline = None if request.deadline_ms is None else received + request.deadline_ms / 1000
        try:
            async with asyncio.timeout(self.limits.request_timeout_s):
                result: Answer = await self.batchers[session.model_name].submit(row, deadline)
        except TimeoutError:
            raise Refusal("timeout", "the policy did not answer in time", 1000.0) from None
        except Refusal as refusal:
            if refusal.code == "unsafe-output":
                self._count(session, refusal.violations)
                rules = rule_names(refusal.violations)
                self.write_audit("unsafe-output", session=session.id, request=request.id, rules=rules)
            raise
        self._count(session, result.violations)
        return result

    def _count(self, session: Session, violations: list[dict[str, Any]]) -> None:
        for violation in violations:
            self.metrics.violations.add(session.model_name, violation["rule"], by=violation["count"])

    def _write_down(self, session: Session, request: Request, memory: Memory, result: Answer | None) -> None:
        if self.audit.path is None:
            return
        fields: dict[str, Any] = {}
        if result is not None:
            fields = {
                "actions": hashlib.sha256(result.actions.tobytes()).hexdigest()[:16],
                "violations": len(result.violations),
                "rules": rule_names(result.violations),
                "steered": request.noise is not None,
            }
        checkpoint = memory.model.checkpoint
        self.write_audit(request.op, session=session.id, request=request.id, checkpoint=checkpoint, **fields)

    def write_audit(self, event: str, **fields: Any) -> None:
        """Write to the audit log.

        Raises:
            Refusal: It cannot be written.
        """
        try:
            self.audit.write(event, **fields)
        except AuditError as error:
            self.metrics.audit_failures.add()
            self.logger.error(str(error))
            raise Refusal("unavailable", "the audit log cannot be written: nothing is answered", 1000.0) from None

    def note(self, event: str, **fields: Any) -> None:
        """Write to both logs what has happened already and cannot be refused any more."""
        self.logger.info(event, extra={"fields": fields})
        try:
            self.audit.write(event, **fields)
        except AuditError:
            self.metrics.audit_failures.add()

    def close(self, session: Session, reason: str) -> None:
        """End a session."""
        self.sessions.close(session)
        self.note("session-close", session=session.id, requests=session.requests, reason=reason)

    async def reload(self, name: str) -> bool:
        """Load a model again and put it in place between two calls; sessions go on.

        Returns:
            Whether the model was replaced. Damaged or foreign files are refused, and the old model goes on.
        """
        async with self._reloading:
            try:
                model = await asyncio.to_thread(self.store.load_again, name)
            except Exception as error:  # files can be broken in any way; the model in place must survive all of them
                self.metrics.reloads.add(name, "refused")
                reason = str(error) if isinstance(error, DipoleError) else type(error).__name__
                self.note("model-refused", model=name, reason=reason)
                return False
            if model is None:
                return False
            self.store.replace(model)
            for session in self.sessions:
                if session.model_name == name and not session.lock.locked():
                    session.memory = moved(session.memory, model)
            self.metrics.reloads.add(name, "replaced")
            self.note("model-replaced", model=name, checkpoint=model.checkpoint)
            return True
