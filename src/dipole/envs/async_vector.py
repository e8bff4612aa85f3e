"""Several single environments behind the `VectorEnv` protocol, stepped by worker processes.

Each worker owns some of the rows (see `split`) and serves them with a `SyncVector`. Workers come from a fork server
that has loaded numpy but no simulator and no graphics context, so that none of those is ever shared over a fork. As
with any use of `multiprocessing`, a script that builds one needs `if __name__ == "__main__":` around its main code.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

from dipole.cores import usable_cores
from dipole.envs.split import Answer, Request, SplitVector, answer, build, end
from dipole.errors import DipoleError

_CLOSE_SECONDS = 5.0  # a worker that has not left by then is killed


def _serve(pipe: Connection, name: str, num_rows: int, options: dict[str, Any]) -> None:
    """Build `num_rows` environments and answer requests until told to close or until the parent is gone."""
    # Ctrl-C reaches the whole process group; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    vector, built = build(name, num_rows, mode="sync", **options)
    try:
        pipe.send(built)
        while vector is not None and (request := pipe.recv())[0] != "close":
            pipe.send(answer(vector, *request))
    except (EOFError, OSError):
        pass  # the parent is gone
    except Exception:  # an answer that cannot be sent
        pipe.send(("crash", traceback.format_exc()))
    finally:
        if vector is not None:
            vector.close()
        pipe.close()


class _Process:
    """A worker process, as `split.Worker`."""

    def __init__(self, context: ForkServerContext, index: int, name: str, rows: int, options: dict[str, Any]) -> None:
        self._what = f"worker {index} of environment '{name}'"
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name, rows, options), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, request: Request) -> None:
        # A broken pipe shows again, with its reason, when the answer is read.
        with contextlib.suppress(ConnectionError):
            self._pipe.send(request)

    def receive(self) -> Answer:
        try:
            received: Answer = self._pipe.recv()
        except (EOFError, OSError):  # of the latter also an answer cut off in the middle
            self.process.join(_CLOSE_SECONDS)
            raise DipoleError(
                f"{self._what} died (exit code {self.process.exitcode}): if its script has no "
                f"'if __name__ == \"__main__\":' add one, if memory ran out use fewer environments"
            ) from None
        return received

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(("close", ()))

    def wait(self) -> None:
        self.process.join(_CLOSE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._pipe.close()


class AsyncVector(SplitVector):
    """Rows of single environments spread over worker processes.

    Args:
        name: Name of the environment.
        num_envs: Number of rows.
        num_workers: Number of processes; by default one per row, at most one per processor.
        options: Passed to `make` in each worker.

    Raises:
        DipoleError: An environment cannot be built, or a worker died.
    """

    def __init__(self, name: str, num_envs: int, num_workers: int | None = None, **options: Any) -> None:
        count = max(1, min(num_envs, num_workers or usable_cores()))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["dipole.envs.async_vector"])
        workers: list[_Process] = []
        try:
            for index in range(count):
                workers.append(_Process(context, index, name, len(range(index, num_envs, count)), options))
        except BaseException:
            end(workers)
            raise
        super().__init__(name, num_envs, workers)
