"""HTTP: who may pass to the websocket, and the pages `/healthz`, `/metrics`, `/status.json` and `/`."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from email.utils import formatdate
from functools import cache
from http import HTTPStatus
from importlib import resources
from typing import Any
from urllib.parse import unquote

from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from dipole.serving.auth import Tokens, is_foreign_page, is_loopback
from dipole.serving.limits import FailureCounter
from dipole.serving.observability import status
from dipole.serving.service import Service

_MODEL_PATH = re.compile(r"/model/([^/?#]{1,128})")
_TEXT, _JSON, _HTML = "text/plain; charset=utf-8", "application/json", "text/html; charset=utf-8"


def respond(code: HTTPStatus, body: str, kind: str = _TEXT, **headers: str) -> Response:
    """Return an HTTP response; underscores in the names of `headers` stand for hyphens."""
    data = body.encode()
    fields = Headers(
        {
            "Date": formatdate(usegmt=True),
            "Connection": "close",
            "Content-Length": str(len(data)),
            "Content-Type": kind,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
    )
    return Response(code.value, code.phrase, fields, data)


@cache
def page() -> tuple[str, str]:
    """Return the web page and the Content-Security-Policy that lets nothing run but what is in it."""
    html = resources.files("dipole.serving").joinpath("page.html").read_text(encoding="utf-8")
    allowed = {}
    for tag in ("script", "style"):
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        allowed[tag] = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed['script']}'; style-src 'sha256-{allowed['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


class Gate:
    """Decides about every HTTP request: a page, a refusal, or on to the websocket.

    Attributes:
        tokens: Who may connect, or None for everybody.
    """

    def __init__(self, service: Service, tokens: Tokens | None, failures: FailureCounter, host: str) -> None:
        self.tokens = tokens
        self._service, self._failures = service, failures
        self._loopback = is_loopback(host)

    def process(self, connection: Any, request: Request) -> Response | None:
        """Return the response to a request, or None to open the websocket."""
        address = connection.remote_address
        connection.peer = f"{address[0]}:{address[1]}" if address else "unknown"
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return self._health()
        if is_foreign_page(_one(request, "Host"), _one(request, "Origin"), self._loopback):
            return self._reject(HTTPStatus.FORBIDDEN, "foreign-page", connection.peer)
        refused = self._authorize(connection, request, address[0] if address else "")
        if refused is not None:
            return refused
        if "websocket" in (_one(request, "Upgrade") or "").lower():
            return self._websocket(connection, path)
        return self._page(path)

    def _health(self) -> Response:
        problems = self._service.problems()
        if problems:
            return respond(HTTPStatus.SERVICE_UNAVAILABLE, "; ".join(problems) + "\n")
        return respond(HTTPStatus.OK, "OK\n")

    def _authorize(self, connection: Any, request: Request, address: str) -> Response | None:
        connection.holder = "local"
        if self.tokens is None:
            return None
        if self._failures.blocked(address):
            return self._reject(HTTPStatus.TOO_MANY_REQUESTS, "too-many-failures", connection.peer, Retry_After="60")
        holder = self.tokens.holder(_one(request, "Authorization"))
        if holder is None:
            self._failures.count(address)
            ask = 'Basic realm="dipole", charset="UTF-8"'
            return self._reject(HTTPStatus.UNAUTHORIZED, "token", connection.peer, WWW_Authenticate=ask)
        connection.holder = holder
        return None

    def _websocket(self, connection: Any, path: str) -> Response | None:
        store = self._service.store
        match = _MODEL_PATH.fullmatch(path)
        name = unquote(match[1]) if match else store.default
        if (match is None and path != "/") or name not in store.names():
            return self._reject(HTTPStatus.NOT_FOUND, "unknown-model", connection.peer)
        if self._service.draining:
            return self._reject(HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", connection.peer, Retry_After="1")
        connection.model_name = name
        return None

    def _page(self, path: str) -> Response:
        if path == "/":
            html, policy = page()
            return respond(HTTPStatus.OK, html, _HTML, Content_Security_Policy=policy, Referrer_Policy="no-referrer")
        if path == "/status.json":
            return respond(HTTPStatus.OK, json.dumps(status(self._service), allow_nan=False), _JSON)
        if path == "/metrics":
            return respond(HTTPStatus.OK, self._service.metrics.text(), "text/plain; version=0.0.4; charset=utf-8")
        return respond(HTTPStatus.NOT_FOUND, "no such page: / /healthz /metrics /status.json\n")

    def _reject(self, code: HTTPStatus, reason: str, peer: str, **headers: str) -> Response:
        self._service.metrics.rejected.add(reason)
        self._service.note("rejected", peer=peer, reason=reason)
        return respond(code, f"{reason}\n", **headers)


def _one(request: Request, name: str) -> str | None:
    """Return the value of a header that is there once, else None."""
    values = request.headers.get_all(name)
    return values[0] if len(values) == 1 else None
