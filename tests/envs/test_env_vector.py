"""The vectorisers: their contract, and that worker processes change nothing but the speed."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
from envs_helpers import needs

from dipole.data import Feature
from dipole.envs import make
from dipole.envs.async_vector import _serve
from dipole.envs.spec import EnvSpec, Transition, VectorEnv
from dipole.envs.vector import SyncVector
from dipole.errors import DipoleError

NAME = "pusht"  # the simulator that starts fastest


class Counter:
    """Counts its steps; the observation is (seed, steps); succeeds and ends at `end` steps."""

    def __init__(self, end=3):
        low = np.array([-1.0], dtype=np.float32)
        feature = {"observation.state": Feature("float32", (2,))}
        self.spec = EnvSpec("counter", feature, Feature("float32", (1,)), low, -low, 5, 10.0, "Count.")
        self.end, self.last, self.closed = end, None, 0

    def reset(self, seed):
        self.seed, self.count = seed, 0
        return {"observation.state": np.array([seed, 0], dtype=np.float32)}

    def step(self, action):
        self.last = action
        self.count += 1
        over = self.count == self.end
        obs = {"observation.state": np.array([self.seed, self.count], dtype=np.float32)}
        return Transition(obs, 0.5, over, over, {"count": self.count})

    def render(self):
        return np.full((4, 4, 3), self.seed, dtype=np.uint8)

    def close(self):
        self.closed += 1


def test_rows_are_reset_and_stepped_one_by_one():
    env = SyncVector([Counter] * 3)
    assert isinstance(env, VectorEnv)
    obs = env.reset([2, 0], [20, 10])
    assert obs["observation.state"].tolist() == [[20, 0], [10, 0]]
    result = env.step(np.zeros((1, 1)), [2])
    assert result.obs["observation.state"].tolist() == [[20, 1]]
    result = env.step(np.zeros((2, 1)), [0, 2])
    assert result.obs["observation.state"].tolist() == [[10, 1], [20, 2]]
    assert result.reward.dtype == np.float32
    assert [info["count"] for info in result.info] == [1, 2]
    assert env.render(2)[0, 0, 0] == 20


def test_terminated_and_truncated_are_told_apart():
    env = SyncVector([lambda: Counter(end=3), lambda: Counter(end=99)], max_steps=3)
    env.reset([0, 1], [1, 2])
    for _ in range(2):
        assert not env.step(np.zeros((2, 1)), [0, 1]).done.any()
    result = env.step(np.zeros((2, 1)), [0, 1])
    # Both end at step 3; the one that reached its goal is not cut off by the clock.
    assert result.terminated.tolist() == [True, False]
    assert result.truncated.tolist() == [False, True]
    assert result.done.tolist() == [True, True]


def test_there_is_no_autoreset():
    env = SyncVector([lambda: Counter(end=1)])
    with pytest.raises(ValueError, match="must be reset"):
        env.step(np.zeros((1, 1)), [0])
    env.reset([0], [1])
    env.step(np.zeros((1, 1)), [0])
    with pytest.raises(ValueError, match="must be reset"):
        env.step(np.zeros((1, 1)), [0])
    env.reset([0], [1])
    env.step(np.zeros((1, 1)), [0])


def test_actions_are_clipped_and_checked():
    env = SyncVector([Counter])
    env.reset([0], [0])
    env.step(np.array([[3.0]]), [0])
    assert env.envs[0].last.tolist() == [1.0]
    with pytest.raises(ValueError, match="not finite"):
        env.step(np.array([[np.nan]]), [0])
    with pytest.raises(ValueError, match="takes"):
        env.step(np.zeros((1, 2)), [0])


@pytest.mark.parametrize(("rows", "seeds"), [([0, 0], [1, 2]), ([3], [1]), ([-1], [1]), ([0, 1], [1])])
def test_wrong_rows_are_refused(rows, seeds):
    with pytest.raises(ValueError, match="rows"):
        SyncVector([Counter] * 2).reset(rows, seeds)


def test_close_closes_each_environment_once():
    singles = [Counter(), Counter()]
    env = SyncVector([lambda single=single: single for single in singles])
    with env:
        pass
    env.close()
    assert [single.closed for single in singles] == [1, 1]


@pytest.fixture(scope="module")
def workers():
    env = make(NAME, 3, mode="async", num_workers=2)
    yield env
    env.close()


@needs("gym_pusht")
def test_async_is_bitwise_sync(workers):
    assert isinstance(workers, VectorEnv)
    rng = np.random.default_rng(0)
    with make(NAME, 3) as plain:
        assert plain.spec.name == workers.spec.name
        # Rows 0 and 2 live in one worker, row 1 in the other; ask in an order of neither.
        for rows in ([2, 1, 0], [1, 2], [0]):
            seeds = [40 + row for row in rows]
            a, b = plain.reset(rows, seeds), workers.reset(rows, seeds)
            assert all(np.array_equal(a[key], b[key]) for key in a)
            for _ in range(5):
                actions = rng.uniform(0, 512, (len(rows), 2))
                x, y = plain.step(actions, rows), workers.step(actions, rows)
                assert all(np.array_equal(x.obs[key], y.obs[key]) for key in x.obs)
                assert np.array_equal(x.reward, y.reward)
                assert [i["coverage"] for i in x.info] == [i["coverage"] for i in y.info]
        assert np.array_equal(plain.render(0), workers.render(0))


@needs("gym_pusht")
def test_a_wrong_call_does_not_harm_the_workers(workers):
    workers.reset([0, 1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="not finite"):
        workers.step(np.full((1, 2), np.inf), [0])
    with make(NAME, 2, mode="async", num_workers=2) as unready:
        unready.reset([0], [1])
        with pytest.raises(ValueError, match="must be reset"):
            unready.step(np.zeros((2, 2)), [0, 1])
        unready.reset([1], [1])
    assert workers.step(np.zeros((1, 2)), [2]).reward.shape == (1,)


@needs("gym_pusht")
def test_a_dead_worker_is_named():
    env = make(NAME, 2, mode="async", num_workers=2)
    try:
        env.reset([0, 1], [1, 2])
        os.kill(env._workers[1].process.pid, signal.SIGKILL)
        with pytest.raises(DipoleError, match=r"worker 1 of environment 'pusht' died \(exit code -9\)"):
            env.step(np.zeros((2, 2)), [0, 1])
    finally:
        env.close()


class CutOff:
    """A pipe whose other end was lost while it wrote."""

    def recv(self):
        raise OSError("got end of file during message")  # multiprocessing's own words

    def send(self, request):
        pass

    def close(self):
        pass


@needs("gym_pusht")
def test_a_worker_that_dies_while_it_answers_is_named():
    with make(NAME, 2, mode="async", num_workers=2) as env:
        os.kill(env._workers[1].process.pid, signal.SIGKILL)
        env._workers[1]._pipe = CutOff()  # afterwards: the worker ends by itself when its own pipe is closed
        with pytest.raises(DipoleError, match=r"worker 1 of environment 'pusht' died \(exit code -9\)"):
            env.reset([0, 1], [1, 2])
        # The answer of the other was read: the next is the one to the next request.
        assert env.reset([0], [3])["observation.state"].shape == (1, 2)


@pytest.mark.parametrize("mode", ["async", "ray"])
def test_there_are_no_less_than_one_worker(mode):
    with pytest.raises(DipoleError, match="num_workers is 0: it must be at least 1"):
        make("pusht" if mode == "async" else "micro/fork2d", 2, mode=mode, num_workers=0)


def test_what_fails_in_building_is_told_and_not_taken_for_a_lost_parent(monkeypatch):
    def broken(*_, **__):
        raise EOFError("truncated model file")

    monkeypatch.setattr("dipole.envs.registry.make", broken)
    here, theirs = multiprocessing.Pipe()
    before = signal.getsignal(signal.SIGINT)
    try:
        _serve(theirs, NAME, 1, {})
    finally:
        signal.signal(signal.SIGINT, before)
    status, text = here.recv()
    assert status == "crash"
    assert "EOFError: truncated model file" in text


@needs("gym_pusht")
def test_closing_ends_the_processes():
    env = make(NAME, 2, mode="async", num_workers=2)
    processes = [worker.process for worker in env._workers]
    env.close()
    env.close()
    assert [process.exitcode for process in processes] == [0, 0]
    with pytest.raises(ValueError, match="closed"):
        env.reset([0], [0])
