import pytest
import torch
from torch import nn

from dipole.envs.seeds import COLLECT_SEED, EVAL_SEED, SELECT_SEED
from dipole.errors import DipoleError
from dipole.evaluation.blocks import BlockCaller, acting, assign, device_of
from dipole.evaluation.seeds import BLOCK_SIZE, episode_seeds, first_seed, policy_generator


class Echo:
    """Answers with row-wise mathematics only, through a matrix product of awkward size."""

    def __init__(self, width):
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(width, width), nn.Mish(), nn.Linear(width, 6))

    def act(self, obs, state, noise=None, generator=None):
        assert len(obs["x"]) == len(state["s"]) == len(generator)
        draw = torch.stack([torch.randn(6, generator=g) for g in generator])
        chunk = self.layer(obs["x"]) + draw
        return chunk.reshape(-1, 3, 2), {"s": state["s"] + chunk}


def test_assign_fills_few_blocks_and_keeps_slots():
    assert assign([3, 0, 3, 1, 3]) == [{3: 0, 0: 1, 1: 3}, {3: 2}, {3: 4}]
    assert assign([]) == []


@pytest.mark.parametrize("width", [33, 64, 300])  # 33: on AVX-512 a row's place in the block does change its rounding
def test_a_row_does_not_depend_on_its_company(width):
    policy = Echo(width)
    caller = BlockCaller(policy, 16, torch.device("cpu"))
    x, s = torch.randn(40, width), torch.randn(40, 6)
    slots = [i % 16 for i in range(40)]

    def ask(rows):
        with torch.no_grad():
            chunks, state = caller.act(
                {"x": x[rows]}, {"s": s[rows]}, [slots[r] for r in rows], [policy_generator(r) for r in rows]
            )
        return chunks, state["s"]

    together, state = ask(list(range(40)))
    assert together.shape == (40, 3, 2)
    for rows in ([7], [39, 23, 7], [5, 21, 37], list(range(39, -1, -3))):
        chunks, states = ask(rows)
        assert torch.equal(chunks, together[rows])
        assert torch.equal(states, state[rows])


def test_only_the_generators_of_the_rows_advance():
    caller = BlockCaller(Echo(4), 4, torch.device("cpu"))
    mine = policy_generator(5)
    with torch.no_grad():
        caller.act({"x": torch.randn(1, 4)}, {"s": torch.zeros(1, 6)}, [2], [mine])
    expected = policy_generator(5)
    torch.randn(6, generator=expected)
    assert torch.equal(mine.get_state(), expected.get_state())


def test_a_block_needs_a_row():
    with pytest.raises(ValueError, match="at least 1"):
        BlockCaller(Echo(4), 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="no rows"):
        BlockCaller(Echo(4), 4, torch.device("cpu")).act({}, {}, [], [])


def test_acting_restores_the_mode_after_an_error():
    net = nn.Dropout()

    def fail():
        assert not net.training
        assert not torch.is_grad_enabled()
        raise KeyError

    with pytest.raises(KeyError), acting(net):
        fail()
    assert net.training
    assert torch.is_grad_enabled()
    assert device_of(net) == device_of(object()) == torch.device("cpu")


def test_seeds_of_different_blocks_and_uses_are_disjoint():
    assert first_seed(0) == EVAL_SEED > SELECT_SEED > COLLECT_SEED
    blocks = [set(episode_seeds(first_seed(k), BLOCK_SIZE)) for k in range(3)]
    assert not blocks[0] & blocks[1]
    assert not blocks[1] & blocks[2]
    assert episode_seeds(EVAL_SEED, 10) == episode_seeds(EVAL_SEED, 50)[:10]
    with pytest.raises(DipoleError, match="out of range"):
        first_seed(-1)
    with pytest.raises(DipoleError, match="choose from 1 to"):
        episode_seeds(EVAL_SEED, 0)


def test_policy_noise_differs_between_neighbouring_seeds():
    draws = torch.stack([torch.randn(1000, generator=policy_generator(s)) for s in range(5)])
    # Independent draws correlate by 1/sqrt(1000) = 0.03; 0.15 is five standard deviations.
    assert (torch.corrcoef(draws) - torch.eye(5)).abs().max() < 0.15
