"""Several sessions in one call: nobody sees another's observation, state or noise, and rounding is all that differs."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from serving_helpers import STATE, EchoPolicy, ImagePolicy, real_policy, vector

from dipole.evaluation.seeds import policy_generator
from dipole.serving.background import serving
from dipole.serving.batching import Batcher
from dipole.serving.client import PolicyClient
from dipole.serving.config import ServiceConfig
from dipole.serving.inference import Row, answer
from dipole.serving.models import ModelStore, from_policy
from dipole.serving.protocol import Refusal


def row(model, value, seed=0, state=None, slot=0):
    history = {STATE: np.full((2, 2), value, np.float32)}
    return Row(model, history, state, policy_generator(seed), slot=slot)


@pytest.mark.parametrize("block", [0, 8])
def test_a_row_in_company_is_answered_as_alone(block):
    model = from_policy("m", real_policy(width=64))
    together = answer([row(model, k / 10, seed=k, slot=k) for k in range(5)], block)
    for k, one in enumerate(together):
        alone = answer([row(model, k / 10, seed=k, slot=k)], block)[0]
        if block:  # the same number of rows, in the same places: not one bit differs
            np.testing.assert_array_equal(one.actions, alone.actions)
        else:  # float32 through five network calls
            np.testing.assert_allclose(one.actions, alone.actions, atol=2e-5)
    assert len({one.actions.tobytes() for one in together}) == 5


def test_rows_at_different_points_of_their_episodes():
    model = from_policy("m", EchoPolicy())
    state = {"count": torch.tensor([6]), "sum": torch.zeros(1, 2)}
    fresh, old = answer([row(model, 1), row(model, 2, state=state)])
    assert fresh.actions[0, :3].tolist() == [1, 1, 1]
    assert old.actions[0, :3].tolist() == [2, 2, 7]
    assert old.state["count"].tolist() == [7]
    assert state["count"].tolist() == [6]  # the old one can be used again if the reply is lost


def test_many_clients_get_their_own_answers_in_shared_calls():
    policy = EchoPolicy(sleep=0.005)
    wrong = []

    def talk(url, name):
        with PolicyClient(url) as client:
            for k in range(15):
                reply = client.infer(vector(name, k))
                if reply.actions[0, :3].tolist() != [name, k, k + 1]:
                    wrong.append((name, k, reply.actions))

    with serving(ModelStore([from_policy("m", policy)])) as server:
        threads = [threading.Thread(target=talk, args=(server.url, name)) for name in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert sum(policy.batches) == 12 * 15
    assert np.mean(policy.batches) > 3  # far fewer calls than requests; 12 is the most


def test_pictures_of_different_types_are_not_mixed():
    policy = ImagePolicy()
    uint8 = np.full((16, 20, 3), 51, np.uint8)
    floats = np.full((16, 20, 3), 0.2)
    replies = {}

    def ask(name, image, url):
        with PolicyClient(url) as client:
            replies[name] = client.infer({"images": {"top": image}, "state": np.ones(2)}).actions[0]

    with serving(ModelStore([from_policy("m", policy)]), ServiceConfig(latency_budget_ms=50)) as server:
        threads = [
            threading.Thread(target=ask, args=(f"{kind}{k}", image, server.url))
            for k in range(3)
            for kind, image in (("u", uint8), ("f", floats))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for reply in replies.values():
        np.testing.assert_allclose(reply, [0.2, 0.2, 0.2, 1], atol=1e-6)  # float32 means


class Pieces:
    """A batcher on its own, with a call that can be held up."""

    def __init__(self, **options):
        self.sizes = []
        self.gate = threading.Event()
        self.gate.set()
        self.executor = ThreadPoolExecutor(1)
        self.model = from_policy("m", EchoPolicy())
        settings = {"max_batch": 4, "budget_s": 0.2, "capacity": 10} | options
        self.batcher = Batcher(self.call, self.executor, **settings)

    def call(self, rows):
        self.gate.wait(10)
        self.sizes.append(len(rows))
        return [one.history[STATE][0, 0] for one in rows]

    async def ask(self, values):
        task = asyncio.create_task(self.batcher.run())
        begin = time.monotonic()
        try:
            return await asyncio.gather(
                *(self.batcher.submit(row(self.model, v)) for v in values), return_exceptions=True
            ), time.monotonic() - begin
        finally:
            task.cancel()


def test_a_lone_client_does_not_wait():
    pieces = Pieces(budget_s=5.0, others=lambda: 1)
    results, seconds = asyncio.run(pieces.ask([1]))
    assert results == [1]
    assert seconds < 2  # the budget is 5 s


def test_company_is_waited_for_no_longer_than_the_budget():
    pieces = Pieces(budget_s=0.1, others=lambda: 3)
    results, seconds = asyncio.run(pieces.ask([1, 2]))
    assert results == [1, 2]
    assert pieces.sizes == [2]
    assert seconds >= 0.09
    pieces = Pieces(budget_s=5.0, others=lambda: 2)
    results, seconds = asyncio.run(pieces.ask([1, 2]))
    assert pieces.sizes == [2]
    assert seconds < 2


def test_capacity_and_batch_size():
    pieces = Pieces(capacity=6, others=lambda: 100)
    results, _ = asyncio.run(pieces.ask(range(9)))
    refused = [result for result in results if isinstance(result, Refusal)]
    assert [refusal.code for refusal in refused] == ["busy"] * 3
    assert all(refusal.retry_after_ms > 0 for refusal in refused)
    assert results[:6] == [0, 1, 2, 3, 4, 5]
    assert pieces.sizes == [4, 2]


def test_a_call_that_breaks_is_told_to_all_and_the_next_goes_on():
    pieces = Pieces(others=lambda: 2)
    good, pieces.batcher._call = pieces.batcher._call, lambda rows: 1 / 0
    results, _ = asyncio.run(pieces.ask([1, 2]))
    assert [type(result) for result in results] == [ZeroDivisionError] * 2
    pieces.batcher._call = good
    pieces.batcher._arrival = asyncio.Event()
    assert asyncio.run(pieces.ask([3]))[0] == [3]


def test_a_client_that_gave_up_is_left_out():
    async def scenario():
        pieces = Pieces(others=lambda: 1)
        pieces.gate.clear()
        task = asyncio.create_task(pieces.batcher.run())
        first = asyncio.create_task(pieces.batcher.submit(row(pieces.model, 1)))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(pieces.batcher.submit(row(pieces.model, 2)))
        third = asyncio.create_task(pieces.batcher.submit(row(pieces.model, 3)))
        await asyncio.sleep(0.05)
        second.cancel()
        await asyncio.sleep(0)
        pieces.gate.set()
        assert await first == 1
        assert await third == 3
        task.cancel()
        return pieces.sizes

    assert asyncio.run(scenario()) == [1, 1]


def test_a_quick_policy_is_called_in_the_loop_for_a_lone_session_only():
    threads, sessions, pause = [], [1], [0.0]

    class Watched(Pieces):
        def call(self, rows):
            threads.append(threading.current_thread())
            time.sleep(pause[0])
            return super().call(rows)

    # The limit is far above what the calls take on any machine, and far below the slow one.
    pieces = Watched(quick_s=1.0, alone=lambda: sessions[0] == 1)
    assert asyncio.run(pieces.ask([0] * 4))[0] == [0] * 4  # together: they queue

    async def scenario():
        here, task = threading.current_thread(), asyncio.create_task(pieces.batcher.run())

        async def in_loop():
            threads.clear()
            assert await pieces.batcher.submit(row(pieces.model, 7)) == 7
            return threads == [here]

        pieces.batcher._arrival = asyncio.Event()
        first = [await in_loop() for _ in range(30)]
        assert first == sorted(first)  # the worker's thread until enough calls are known
        assert not any(first[:15])
        assert all(first[-5:])
        sessions[0] = 2
        assert not await in_loop()
        sessions[0] = 1
        assert await in_loop()
        pause[0] = 1.1
        assert await in_loop()  # nobody could know
        pause[0] = 0.0
        assert not await in_loop()  # the slow one is remembered
        task.cancel()

    asyncio.run(scenario())


def test_a_call_in_the_loop_that_breaks_is_told_and_the_next_goes_on():
    pieces = Pieces(quick_s=1.0, alone=lambda: True)

    async def scenario():
        task = asyncio.create_task(pieces.batcher.run())
        for _ in range(25):
            await pieces.batcher.submit(row(pieces.model, 1))
        good, pieces.batcher._call = pieces.batcher._call, lambda rows: 1 / 0
        with pytest.raises(ZeroDivisionError):
            await pieces.batcher.submit(row(pieces.model, 1))
        assert pieces.batcher.busy_since is None
        pieces.batcher._call = good
        assert await pieces.batcher.submit(row(pieces.model, 3)) == 3
        task.cancel()

    asyncio.run(scenario())


def test_replies_are_the_same_in_the_loop_and_in_the_worker():
    def replies(quick_ms):
        store, config = ModelStore([from_policy("m", real_policy())]), ServiceConfig(quick_ms=quick_ms)
        with serving(store, config) as server, PolicyClient(server.url) as client:
            client.reset(seed=3)
            return np.stack([client.infer(vector(0.1, k / 30)).actions for k in range(30)])

    np.testing.assert_array_equal(replies(1e6), replies(0.0))
