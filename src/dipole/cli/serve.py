"""Serve policies to robots: openpi's protocol (its clients connect unchanged), many robots at once, safe by default.

Listens on this machine only, unless there is a token. SIGTERM ends it gracefully; SIGHUP loads models and tokens again.
`http://HOST:PORT/` shows what is going on, `/metrics` is for Prometheus, `/healthz` for load balancers.

Examples:
  dipole serve runs/peg
  dipole serve runs/peg --limits runs/peg-data --runtime runtime.json --audit audit.jsonl
  dipole serve peg=runs/peg push=runs/pusht --watch 5
  dipole serve runs/peg --host 0.0.0.0 --token-file tokens --tls-cert cert.pem --tls-key key.pem
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from dipole.errors import DipoleError

if TYPE_CHECKING:
    from dipole.safety import Limits, OutputGuard
    from dipole.serving.config import ServiceConfig
    from dipole.serving.models import ModelStore
    from dipole.serving.server import Server


@dataclass
class Args:
    """Options of `dipole serve`."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run or checkpoint folders, or NAME=FOLDER; clients choose one by ws://HOST:PORT/model/NAME, the first without."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines can reach needs --token-file."""
    port: int = 8000
    """Port; 0 for any free one."""
    token_file: Path | None = None
    """Who may connect: lines `TOKEN` or `NAME TOKEN`, a file that only you can read."""
    tls_cert: Path | None = None
    """Certificate chain (PEM), for wss:// and https://."""
    tls_key: Path | None = None
    """Its key."""
    runtime: Path | None = None
    """How the policies are run, in place of the runtime.json of their folders."""
    limits: Path | None = None
    """Limits of the actions: a file (JSON, TOML), or a dataset whose actions' range and rate are the limits."""
    monitor: Path | None = None
    """Rules of signal temporal logic that actions must obey: a JSON file (see the how-to "Serve")."""
    rename: Path | None = None
    """JSON file: names that clients use, to feature names, e.g. {"observation/image": "observation.images.top"}."""
    metadata: Path | None = None
    """JSON file: further entries of the metadata, such as openpi's reset_pose."""
    max_batch: int = 16
    """Most robots answered by one call of the policy."""
    latency_budget: float = 5.0
    """Longest wait, in ms, for other robots' requests before a call; a lone robot never waits."""
    quick: float = 10.0
    """With one robot, a policy that lately answered within so many ms is called without a thread of its own; pages and
    new robots wait meanwhile. 0: never."""
    block: int = 0
    """Pad every call to this many rows: replies are then the same to the digit whoever else asks. 0: no padding."""
    max_sessions: int = 64
    """Most robots at once."""
    max_frame_mb: float = 64.0
    """Largest message in MB; less where what the policies see shows that less is enough."""
    rate: float = 500.0
    """Most requests per second and robot."""
    timeout: float = 10.0
    """Longest time, in seconds, from a request to its reply."""
    watch: float = 0.0
    """Look every so many seconds whether a checkpoint was replaced, and load it; 0: only on SIGHUP."""
    audit: Path | None = None
    """Audit log (JSON lines); nothing is answered while it cannot be written."""
    log: Path | None = None
    """Log (JSON lines) in place of stderr."""
    device: str = "cpu"
    """Where policies compute: cpu or cuda."""
    threads: int = 0
    """Threads of a policy's computation; 0: torch's default."""


def run(args: Args) -> None:
    """Serve until SIGTERM or SIGINT."""
    import asyncio
    import signal
    import sys

    from dipole.serving.audit import AuditLog, json_logger
    from dipole.serving.auth import check_bind, read_tokens, tls_context
    from dipole.serving.server import Server
    from dipole.serving.service import Service

    token_file = args.token_file
    tokens = None if token_file is None else read_tokens(token_file)
    check_bind(args.host, tokens)
    tls = tls_context(args.tls_cert, args.tls_key)
    logger = json_logger(args.log)
    audit = AuditLog(args.audit)
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a reload that comes before the server is up must not end it
    service_config, store = _config(args), _store(args)
    sys.setswitchinterval(0.001)  # seconds: a policy's Python should not hold up the loop that reads and answers

    async def main() -> None:
        server = Server(
            Service(store, service_config, audit, logger),
            args.host,
            args.port,
            tokens=tokens,
            tls=tls,
            watch_s=args.watch,
            read_tokens=None if token_file is None else lambda: read_tokens(token_file),
        )
        await server.run(_announce)

    asyncio.run(main())


def _config(args: Args) -> ServiceConfig:
    from dipole.serving.config import ServiceConfig
    from dipole.serving.limits import Limits

    limits = Limits(
        frame_bytes=int(args.max_frame_mb * 1e6),
        sessions=args.max_sessions,
        connections=2 * args.max_sessions + 32,
        requests_per_s=args.rate,
        burst=max(2, int(2 * args.rate)),
        request_timeout_s=args.timeout,
    )
    return ServiceConfig(
        limits=limits,
        max_batch=args.max_batch,
        latency_budget_ms=args.latency_budget,
        block=args.block,
        quick_ms=args.quick,
        metadata=_table(args.metadata),
    )


def _store(args: Args) -> ModelStore:
    from dipole.serving.models import ModelStore, Source, load_model

    rename = _table(args.rename)
    if not all(isinstance(value, str) for value in rename.values()):
        raise DipoleError(f"{args.rename}: every name must stand for a feature's name")
    sources = []
    for text in args.runs:
        name, found, path = text.partition("=")
        folder = Path(path if found else text)
        name = name if found else folder.resolve().name
        sources.append(Source(name, folder, args.runtime, args.device, rename))
    guard = _guard(args.limits, args.monitor)
    return ModelStore([load_model(source, guard) for source in sources], sources)


def _guard(limits: Path | None, monitor: Path | None) -> OutputGuard | None:
    from dipole.safety import Limits, OutputGuard, read_monitor

    if limits is None and monitor is None:
        return None
    chosen = Limits() if limits is None else _limits(limits)
    return OutputGuard(chosen, None if monitor is None else read_monitor(monitor))


def _limits(path: Path) -> Limits:
    from dipole.safety import limits_from_episodes, read_limits

    if path.suffix in (".json", ".toml") and path.is_file():
        return read_limits(path)
    from dipole.data import load

    return limits_from_episodes(load(str(path)))


def _table(path: Path | None) -> dict[str, Any]:
    from dipole.serialization import read_json

    table = {} if path is None else read_json(path)
    if not isinstance(table, dict):
        raise DipoleError(f"{path}: expected a table")
    return table


def _announce(server: Server) -> None:
    import sys

    print(f"serving on {server.url} (page: http{server.url[2:]}/)", file=sys.stderr, flush=True)
