"""What a worker calls: a policy on the robot's machine, one that is told the plan, one on a server."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dipole.data import Feature
from dipole.data.normalizer import Normalizer
from dipole.policies import DiffusionPolicy, PolicyConfig
from dipole.policies.policy import take_rows
from dipole.realtime.execution import Request
from dipole.realtime.local import LocalPolicy
from dipole.realtime.prefix import PrefixPolicy
from dipole.realtime.remote import RemotePolicy
from dipole.realtime.worker import Job

TO, TP, TA = 2, 10, 4
USABLE = TP - TO + 1


@pytest.fixture(scope="module")
def policy():
    vector = Feature("float32", (2,))
    network = {"name": "mlp", "width": 24, "num_blocks": 1}
    config = PolicyConfig({"observation.state": vector}, vector, TO, TP, TA, network=network)
    stats = {"min": np.full(2, -1.5, np.float32), "max": np.full(2, 2.5, np.float32)}
    keys = ("observation.state", "action")
    torch.manual_seed(0)
    return DiffusionPolicy(config, Normalizer.fit(dict.fromkeys(keys, stats), dict.fromkeys(keys, "min_max"))).eval()


def request(planned=0, delay=0, tick=0, executed=0, seed=0):
    actions = np.random.default_rng(seed).uniform(-1, 1, (planned, 2)).astype(np.float32)
    return Request(0, tick, actions, delay, executed)


def observation(rows=1):
    return {"observation.state": torch.linspace(-1, 1, rows * TO * 2).reshape(rows, TO, 2)}


def generators(rows):
    return [torch.Generator().manual_seed(k) for k in range(rows)]


def test_told_nothing_it_is_the_policy_with_its_whole_chunk(policy):
    told = PrefixPolicy(policy)
    chunk, _ = told.act(observation(), told.told([request()]), generator=generators(1))
    own, _ = policy.act(observation(), {}, generator=generators(1))
    assert chunk.shape == (1, USABLE, 2)
    assert torch.equal(chunk[:, :TA], own)


@pytest.mark.parametrize(("planned", "delay"), [(6, 3), (9, 0), (9, 9), (3, 5), (20, 4)])
def test_the_chunk_begins_with_what_will_have_been_executed(policy, planned, delay):
    told, asked = PrefixPolicy(policy), request(planned, delay)
    chunk, _ = told.act(observation(), told.told([asked]), generator=generators(1))
    settled = min(planned, delay, USABLE)
    # Normalised and back again: a few roundings of float32 at values up to 2.5.
    np.testing.assert_allclose(chunk[0, :settled].numpy(), asked.planned[:settled], rtol=0, atol=1e-6)
    assert torch.isfinite(chunk).all()


def test_the_rest_is_drawn_towards_the_plan(policy):
    told, asked = PrefixPolicy(policy), request(9, 3)
    free, _ = told.act(observation(), told.told([request()]), generator=generators(1))
    drawn, _ = told.act(observation(), told.told([asked]), generator=generators(1))
    nearer = np.abs(drawn[0, 3].numpy() - asked.planned[3]).sum()
    assert nearer < np.abs(free[0, 3].numpy() - asked.planned[3]).sum()


def test_rows_are_told_their_own_plan(policy):
    told = PrefixPolicy(policy)
    requests = [request(9, 2, seed=1), request(), request(5, 4, seed=2)]
    state = told.told(requests)
    together, forgotten = told.act(observation(3), state, generator=generators(3))
    for row in range(3):
        obs = {key: value[row : row + 1] for key, value in observation(3).items()}
        alone, _ = told.act(obs, take_rows(state, torch.tensor([row])), generator=[generators(3)[row]])
        # Products of matrices round differently for other numbers of rows; values are up to 2.5.
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
    assert not forgotten["weights"].any()
    assert not forgotten["delay"].any()


class Remembering:
    """Counts its calls."""

    obs_horizon, pred_horizon, action_horizon, action_dim = 1, 1, 1, 1

    def initial_state(self, batch):
        return {"calls": torch.zeros(batch)}

    def reset(self, state, mask):
        return state

    def act(self, obs, state, noise=None, generator=None):
        noise = torch.rand(1, generator=generator[0])
        return (state["calls"] + noise)[:, None, None], {"calls": state["calls"] + 1}


def job(episode, tick=0, executed=0):
    return Job(request(tick=tick, executed=executed), {"observation.state": np.zeros((1, 2))}, 0.0, episode)


def test_a_local_policy_remembers_within_an_episode_only():
    def calls(*episodes):
        local = LocalPolicy(Remembering(), seed=3)
        return [float(local(job(episode))[0, 0]) for episode in episodes]

    first = calls(0, 0, 1, 1)
    assert [int(value) for value in first] == [0, 1, 0, 1]
    assert calls(1, 1) == first[2:]  # an episode's noise does not depend on those before
    assert first[0] != first[2]


def test_a_local_policy_is_told_the_plan(policy):
    asked = request(6, 3)
    chunk = LocalPolicy(PrefixPolicy(policy))(Job(asked, {"observation.state": np.zeros((TO, 2), np.float32)}, 0.0, 0))
    np.testing.assert_allclose(chunk[:3], asked.planned[:3], rtol=0, atol=1e-6)  # as above
    assert chunk.shape == (USABLE, 2)


def test_a_remote_policy_says_where_the_robot_is():
    asked = []

    class Client:
        def infer(self, observation, *, reset=False, executed=None):
            asked.append((reset, executed))
            if len(asked) == 3:
                raise ConnectionError("gone")
            return SimpleNamespace(actions=np.ones((4, 2)))

    remote = RemotePolicy(Client())
    assert remote(job(0)).shape == (4, 2)
    remote(job(0, executed=3))
    with pytest.raises(ConnectionError):
        remote(job(0, executed=7))
    remote(job(0, executed=9))
    remote(job(1, executed=12))
    # What was asked in vain does not count: the server's last chunk is still that of the second request.
    assert asked == [(True, 0), (False, 3), (False, 4), (False, 6), (True, 0)]
