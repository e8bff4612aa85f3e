"""Several single environments behind the `VectorEnv` protocol, stepped by Ray actors on this or other machines.

Each actor owns some of the rows (see `split`) and serves them with a vector of its own. Only arrays, seeds and plain
values travel: policies stay with whoever asks, who computes them in the same batches as for environments in this
process, so that results are the same to the last digit (on machines of one kind: simulators round as their processor
and its libraries do).

Ray's ports execute what they are sent: use networks that nobody else reaches, and Ray's token.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from typing import Any

from dipole.cores import usable_cores
from dipole.envs.spec import VectorEnv
from dipole.envs.split import Answer, Request, SplitVector, answer, build
from dipole.errors import DipoleError, MissingExtraError

_START_SECONDS = 120.0  # for a processor of the cluster to be free and a process on it to start
_WAIT_SECONDS = 5.0  # for an address to answer
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"  # of HTTP/2, with empty settings
_OBJECT_STORE_BYTES = 2**27  # of a cluster of our own; what is under way is one step of each row


class _Rows:
    """The rows of one actor."""

    def __init__(self) -> None:
        self._vector: VectorEnv | None = None

    def build(self, name: str, num_rows: int, options: dict[str, Any], version: str) -> Answer:
        """Build the environments and answer with their spec."""
        from dipole import __version__

        where = f"on the Ray node '{socket.gethostname()}'"
        if __version__ != version:
            return "user", f"dipole is {__version__} {where} and {version} here: install the same version on every node"
        self._vector, (status, value) = build(name, num_rows, **options)
        return status, f"{where}: {value}" if status == "user" else value

    def answer(self, method: str, arguments: tuple[Any, ...]) -> Answer:
        """Serve one request."""
        assert self._vector is not None
        return answer(self._vector, method, arguments)


class _Actor:
    """An actor, as `split.Worker`."""

    def __init__(self, ray: Any, handle: Any, what: str) -> None:
        self._ray, self.handle, self._what = ray, handle, what
        self._asked: list[Any] = []

    def build(self, *arguments: Any) -> None:
        self._asked.append(self.handle.build.remote(*arguments))

    def send(self, request: Request) -> None:
        self._asked.append(self.handle.answer.remote(*request))

    def receive(self) -> Answer:
        try:
            received: Answer = self._ray.get(self._asked.pop(0))
        except self._ray.exceptions.RayError as error:
            raise DipoleError(
                f"{self._what} died ({_first_line(error)}): see whether its node is up (`ray status`), and whether its "
                "memory ran out"
            ) from None
        return received

    def stop(self) -> None:
        with contextlib.suppress(Exception):  # gone already, or the whole cluster is
            self._ray.kill(self.handle)

    def wait(self) -> None:
        """Ray sees to it."""


class RayVector(SplitVector):
    """Rows of single environments spread over Ray actors.

    Args:
        name: Name of the environment.
        num_envs: Number of rows.
        num_workers: Number of actors, of a processor each; at most as many as there are rows, or processors in the
            cluster, which is also the default.
        ray_address: `HOST:PORT` of a cluster of which this machine is a node, or `auto` for the one that runs here; by
            default the environment variable `RAY_ADDRESS`, or else a cluster of our own. Ignored where this process is
            connected to Ray already; else `close` leaves the cluster again, and ends our own.
        options: Passed to `make` in each actor.

    Raises:
        DipoleError: Ray cannot be reached, gives no worker, or one died; or an environment cannot be built.
        MissingExtraError: Ray is not installed.
    """

    def __init__(
        self, name: str, num_envs: int, num_workers: int | None = None, ray_address: str | None = None, **options: Any
    ) -> None:
        from dipole import __version__

        self._ray = _import()
        self._joined = not self._ray.is_initialized()
        if self._joined:
            _join(self._ray, ray_address or os.environ.get("RAY_ADDRESS") or None, num_workers)
        try:
            most = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
            handles = _start(self._ray, min(num_envs, num_workers or num_envs, most))
            what = f"of environment '{name}'"
            workers = [_Actor(self._ray, handle, f"Ray worker {i} {what}") for i, handle in enumerate(handles)]
            for index, worker in enumerate(workers):
                worker.build(name, len(range(index, num_envs, len(workers))), options, __version__)
        except BaseException:
            self._leave()
            raise
        super().__init__(name, num_envs, workers)

    def close(self) -> None:
        """Stop the workers, and leave the cluster if this vector joined it. May be called twice."""
        super().close()
        self._leave()

    def _leave(self) -> None:
        if self._joined:
            self._ray.shutdown()
            self._joined = False


def _start(ray: Any, count: int) -> list[Any]:
    """Return the actors that run within a while: another user or a lost node may have taken the place of some."""
    actor = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_Rows)
    handles = [actor.remote() for _ in range(count)]
    signs = {handle.__ray_ready__.remote(): handle for handle in handles}
    ready, _ = ray.wait(list(signs), num_returns=count, timeout=_START_SECONDS)
    running, reason = [], f"none was free within {_START_SECONDS:.0f} s"
    for sign in ready:
        try:
            ray.get(sign)
            running.append(signs[sign])
        except ray.exceptions.RayError as error:
            reason = _first_line(error)
    for handle in handles:
        if handle not in running:
            ray.kill(handle)
    if not running:
        total, free = (found.get("CPU", 0) for found in (ray.cluster_resources(), ray.available_resources()))
        raise DipoleError(
            f"the Ray cluster started no worker ({reason}; {free:.0f} of {total:.0f} processors are free): free some, "
            "or run the environments here"
        )
    return running


def _import() -> Any:
    # Read when Ray is imported, and by the processes it starts: nothing is reported to its makers.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "ray") from None
    return ray


def _join(ray: Any, address: str | None, num_cpus: int | None) -> None:
    """Join the cluster at `address`, or start one of our own."""
    if address is None:
        how: dict[str, Any] = {"address": "local", "num_cpus": num_cpus or usable_cores(), "include_dashboard": False}
        how["object_store_memory"] = _OBJECT_STORE_BYTES
        # Of themselves Ray's workers give way to every other process, and starve on a machine in use.
        os.environ.setdefault("RAY_worker_niceness", "0")
    else:
        how = {"address": address}
        if address != "auto":
            _knock(address)
    stopping = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**how, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # of many kinds: no address, no answer, no token, too slow
        where = "a Ray cluster cannot be started here" if address is None else f"no Ray cluster at '{address}'"
        raise DipoleError(f"{where} ({_first_line(error)}): {_MEND}") from None
    # Ray takes SIGTERM over, in a run that joins again too, which would then end without being saved.
    if callable(stopping):
        with contextlib.suppress(ValueError):  # not in the main thread: nothing was taken over
            signal.signal(signal.SIGTERM, stopping)


_MEND = (
    "start one with `ray start --head`, join this machine with `ray start --address=HOST:PORT`, and give its address"
)


def _knock(address: str) -> None:
    """Raise DipoleError unless Ray answers at `address`: it would itself try for minutes to find it there."""
    host, _, port = address.rpartition(":")
    if "/" in host or not host or not port.isdecimal():
        raise DipoleError(f"the Ray address '{address}' is not of the form HOST:PORT (or 'auto')")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _WAIT_SECONDS) as stream:
            if os.environ.get("RAY_USE_TLS") == "1":
                return
            stream.sendall(_GREETING)
            reply = stream.recv(9)
    except (OSError, OverflowError) as error:
        raise DipoleError(f"no Ray cluster at '{address}' ({_first_line(error)}): {_MEND}") from None
    # Ray speaks gRPC: the first frame of its side, too, has the type "settings".
    if reply[3:4] != b"\x04":
        raise DipoleError(
            f"what answers at '{address}' is not a Ray cluster (its port is 6379, unless chosen): {_MEND}"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
