"""Several single environments behind the `VectorEnv` protocol, stepped by worker processes.

Each worker owns some of the rows and serves them with a `SyncVector`; row r belongs to worker r modulo the number of
workers. Workers come from a fork server that has loaded numpy but no simulator and no graphics context, so that none of
those is ever shared over a fork. As with any use of `multiprocessing`, a script that builds one needs
`if __name__ == "__main__":` around its main code.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, Self

import numpy as np

from dipole.envs.spec import EnvSpec, Observation, StepResult, VectorEnv, check_rows, clip_actions
from dipole.errors import DipoleError

_CLOSE_SECONDS = 5.0  # a worker that has not left by then is killed


def _processors() -> int:
    """Return how many processors this process may use (macOS only says how many there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve(pipe: Connection, name: str, num_rows: int, options: dict[str, Any]) -> None:
    """Build `num_rows` environments and answer requests until told to close or until the parent is gone."""
    # Ctrl-C reaches the whole process group; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from dipole.envs.registry import make

    vector = None
    try:
        vector = make(name, num_rows, mode="sync", **options)
        pipe.send(("ok", vector.spec))
        while (request := pipe.recv())[0] != "close":
            pipe.send(_answer(vector, *request))
    except (EOFError, ConnectionError):
        pass  # the parent is gone
    except DipoleError as error:
        pipe.send(("user", str(error)))
    except Exception:
        pipe.send(("crash", traceback.format_exc()))
    finally:
        if vector is not None:
            vector.close()
        pipe.close()


def _answer(vector: VectorEnv, method: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "ok", getattr(vector, method)(*arguments)
    except ValueError as error:
        # A wrong call leaves the environments as they were: go on serving.
        return "value", str(error)


class AsyncVector:
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
        self._workers: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        self.num_envs = num_envs
        self._name = name
        count = max(1, min(num_envs, num_workers or _processors()))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["dipole.envs.async_vector"])
        try:
            for worker in range(count):
                ours, theirs = context.Pipe()
                rows = len(range(worker, num_envs, count))
                process = context.Process(target=_serve, args=(theirs, name, rows, options), daemon=True)
                process.start()
                theirs.close()
                self._workers.append(process)
                self._pipes.append(ours)
            specs = [self._receive(worker) for worker in range(count)]
            self.spec: EnvSpec = specs[0]
        except BaseException:
            self.close()
            raise

    def _receive(self, worker: int) -> Any:
        try:
            status, value = self._pipes[worker].recv()
        except (EOFError, ConnectionError):
            self._workers[worker].join(_CLOSE_SECONDS)
            code = self._workers[worker].exitcode
            raise DipoleError(
                f"worker {worker} of environment '{self._name}' died (exit code {code}): if its script has no "
                f"'if __name__ == \"__main__\":' add one, if memory ran out use fewer environments"
            ) from None
        if status == "user":
            raise DipoleError(value)
        if status == "value":
            raise ValueError(value)
        if status == "crash":
            raise RuntimeError(f"environment '{self._name}' failed in worker {worker}:\n{value}")
        return value

    def _ask(self, requests: dict[int, tuple[str, tuple[Any, ...]]]) -> list[Any]:
        """Send every request first, then wait for all the answers, so that the workers run at the same time."""
        for worker, request in requests.items():
            # A broken pipe shows again, with its reason, when the answer is read.
            with contextlib.suppress(ConnectionError):
                self._pipes[worker].send(request)
        # All answers are read before a failure is raised: a request left unanswered would shift every later answer.
        answers: list[Any] = []
        failure: Exception | None = None
        for worker in requests:
            try:
                answers.append(self._receive(worker))
            except (DipoleError, RuntimeError, ValueError) as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return answers

    def _split(self, rows: list[int]) -> dict[int, list[int]]:
        """Return worker to the positions in `rows` that it owns."""
        if not self._workers:
            raise ValueError(f"environment '{self._name}' is closed")
        owners: dict[int, list[int]] = {}
        for position, row in enumerate(rows):
            owners.setdefault(row % len(self._workers), []).append(position)
        return owners

    def _local(self, rows: list[int], positions: list[int]) -> list[int]:
        return [rows[position] // len(self._workers) for position in positions]

    def reset(self, rows: Sequence[int], seeds: Sequence[int]) -> Observation:
        """Start the episodes that `seeds` name; see `VectorEnv.reset`."""
        rows = check_rows(rows, self.num_envs, len(seeds), "seeds")
        owners = self._split(rows)
        answers = self._ask({w: ("reset", (self._local(rows, p), [seeds[i] for i in p])) for w, p in owners.items()})
        return _merge_dicts(answers, list(owners.values()))

    def step(self, actions: np.ndarray, rows: Sequence[int]) -> StepResult:
        """Step `rows`; see `VectorEnv.step`."""
        actions = clip_actions(self.spec, actions)
        rows = check_rows(rows, self.num_envs, len(actions), "actions")
        owners = self._split(rows)
        answers = self._ask({w: ("step", (actions[p], self._local(rows, p))) for w, p in owners.items()})
        positions = list(owners.values())
        merged = _merge_dicts([{k: getattr(a, k) for k in _ARRAYS} for a in answers], positions)
        info: list[dict[str, Any]] = [{}] * len(rows)
        for answer, part in zip(answers, positions, strict=True):
            for position, item in zip(part, answer.info, strict=True):
                info[position] = item
        return StepResult(obs=_merge_dicts([answer.obs for answer in answers], positions), info=info, **merged)

    def render(self, row: int) -> np.ndarray:
        """Return a picture of one row, uint8 `[H, W, 3]`."""
        check_rows([row], self.num_envs, 1, "row")
        owners = self._split([row])
        picture: np.ndarray = self._ask({worker: ("render", (row // len(self._workers),)) for worker in owners})[0]
        return picture

    def close(self) -> None:
        """Stop the workers; those that do not leave by themselves are killed. May be called twice."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(("close", ()))
        for process in self._workers:
            process.join(_CLOSE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self._workers, self._pipes = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


_ARRAYS = ("reward", "terminated", "truncated", "success")


def _merge_dicts(parts: list[dict[str, np.ndarray]], positions: list[list[int]]) -> dict[str, np.ndarray]:
    """Put the arrays of several workers together: rows of `parts[k]` go to `positions[k]`."""
    order = np.argsort(np.concatenate([np.asarray(p, dtype=np.int64) for p in positions]))
    return {key: np.concatenate([part[key] for part in parts])[order] for key in parts[0]}
