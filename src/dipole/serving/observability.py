"""What a server shows of itself: metrics for Prometheus, and the figures behind its web page."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from dipole.serving.metrics import ROWS, SECONDS, Counter, Gauge, Histogram, exposition

if TYPE_CHECKING:
    from dipole.serving.service import Service
    from dipole.serving.sessions import Session


class ServerMetrics:
    """The metrics of a server."""

    def __init__(self, service: Service) -> None:
        self._service = service
        per_model = ("model",)
        self.latency = Histogram("dipole_request_seconds", "From a request's arrival to its reply.", SECONDS, per_model)
        self.call_seconds = Histogram("dipole_policy_call_seconds", "Duration of a policy call.", SECONDS, per_model)
        self.batch = Histogram("dipole_batch_rows", "Sessions answered by one policy call.", ROWS, per_model)
        self.replies = Counter("dipole_replies_total", "Requests answered.", per_model)
        self.refusals = Counter("dipole_refusals_total", "Requests refused, by code.", ("code",))
        self.rejected = Counter("dipole_rejected_connections_total", "Connections rejected, by reason.", ("reason",))
        self.violations = Counter("dipole_violations_total", "Action values beyond the limits.", ("model", "rule"))
        self.reloads = Counter("dipole_reloads_total", "Attempts to replace a model.", ("model", "outcome"))
        self.audit_failures = Counter("dipole_audit_failures_total", "Lines the audit log could not take.")
        sessions = service.sessions
        self.gauges = [
            Gauge("dipole_sessions", "Live sessions.", lambda: {(): float(len(sessions))}),
            Gauge("dipole_queue", "Requests waiting for a model.", self._queues, per_model),
            Gauge("dipole_healthy", "1 while requests are answered.", lambda: {(): float(not service.problems())}),
            Gauge("dipole_uptime_seconds", "Age.", lambda: {(): time.monotonic() - service.started}),
            Gauge("dipole_log_dropped_total", "Log records that could not be written.", self._dropped),
        ]

    def _queues(self) -> dict[tuple[str, ...], float]:
        return {(name,): float(len(batcher.queue)) for name, batcher in self._service.batchers.items()}

    def _dropped(self) -> dict[tuple[str, ...], float]:
        handlers = self._service.logger.handlers
        return {(): float(sum(getattr(handler, "dropped", 0) for handler in handlers))}

    def called(self, model: str, rows: int, seconds: float) -> None:
        """Count a policy call."""
        self.batch.observe(rows, model)
        self.call_seconds.observe(seconds, model)

    def replied(self, session: Session, seconds: float) -> None:
        """Count a reply."""
        self.replies.add(session.model_name)
        self.latency.observe(seconds, session.model_name)
        session.latencies.append(1000 * seconds)
        self._service.recent.append((time.monotonic() - self._service.started, 1000 * seconds))

    def text(self) -> str:
        """Return the text of `/metrics`."""
        return exposition(
            [
                self.latency,
                self.call_seconds,
                self.batch,
                self.replies,
                self.refusals,
                self.rejected,
                self.violations,
                self.reloads,
                self.audit_failures,
                *self.gauges,
            ]
        )


def status(service: Service) -> dict[str, Any]:
    """Return the figures behind the web page, as JSON-able values without secrets."""
    now = time.monotonic()
    problems = service.problems()
    models = [
        {
            "name": name,
            "checkpoint": service.store[name].checkpoint,
            "task": service.store[name].schema.task,
            "queue": len(service.batchers[name].queue),
        }
        for name in service.store.names()
    ]
    recent = [(round(when, 2), round(ms, 2)) for when, ms in service.recent]
    return {
        "healthy": not problems,
        "problems": problems,
        "uptime_s": round(now - service.started, 1),
        "models": models,
        "sessions": [_session_status(session, now) for session in service.sessions],
        "latency": recent,
        "p50_ms": _percentile([ms for _, ms in recent], 50),
        "p99_ms": _percentile([ms for _, ms in recent], 99),
    }


def _session_status(session: Session, now: float) -> dict[str, Any]:
    chunk = session.memory.chunk
    return {
        "id": session.id,
        "model": session.model_name,
        "holder": session.holder,
        "peer": session.peer,
        "connected": session.connection is not None,
        "age_s": round(now - session.started, 1),
        "idle_s": round(now - session.last_request, 1),
        "requests": session.requests,
        "refusals": session.refusals,
        "violations": session.violations,
        "p50_ms": _percentile(list(session.latencies), 50),
        "p99_ms": _percentile(list(session.latencies), 99),
        "actions": [] if chunk is None else [round(float(value), 4) for value in chunk[0][:16]],
    }


def _percentile(values: list[float], q: float) -> float | None:
    return round(float(np.percentile(values, q)), 2) if values else None
