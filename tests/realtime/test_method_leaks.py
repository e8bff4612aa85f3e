"""No method lets rows of a batch see each other: with resets row by row, a batch acts as its rows do alone."""

import pytest
import torch
from method_helpers import STATE, ddpm, generators, observations, run, small_policy

from dipole.evaluation.blocks import BlockCaller
from dipole.policies import SamplerConfig
from dipole.policies.policy import put_rows, take_rows
from dipole.realtime import Runtime, apply

HORIZONS = (2, 10, 4)
# Every stateful method, with the options that change what is remembered or drawn.
CASES = {
    "rti": ("rti", {}, {}),
    "rti-skips": ("rti", {"levels": [20, 9, 0], "relabel_skips": True, "renoise": True}, {}),
    "rti-discrete": ("rti", {"discrete": [1], "discrete_mode": "clip"}, {}),
    "rti-flow": ("rti", {"num_steps": 2}, {"process": "flow"}),
    "streaming": ("streaming", {}, {"streaming": True}),
    "streaming-denoise": ("streaming", {"primer": "denoise", "overlap_noise": False}, {"streaming": True}),
    "streaming-flow": ("streaming", {"primer": "constant"}, {"streaming": True, "process": "flow"}),
    "chunking": ("chunking", {"delay": 2}, {"sampler": SamplerConfig("ddim", 4, clip=1.0)}),
    "chunking-flow": ("chunking", {"delay": 1}, {"process": "flow"}),
    "chunking-replace": ("chunking", {"delay": 2, "guidance": "replace"}, {}),
    "chunking-none": ("chunking", {"delay": 2, "guidance": "none"}, {}),
    "ensemble": ("ensemble", {}, {}),
}


def make(case):
    method, options, kind = CASES[case]
    if "process" not in kind:
        kind = {"sampler": ddpm(20), **kind}
    return apply(small_policy(horizons=HORIZONS, **kind), Runtime(method, options))


@pytest.mark.parametrize("case", CASES)
def test_a_batch_with_resets_is_its_rows_alone(case):
    policy = make(case).double()  # a product rounds differently for another number of rows, and clipping is a kink
    batch, calls = 3, 5
    resets = {(1, 2), (2, 0), (4, 0), (4, 1)}
    observed = observations(batch, calls).double()
    together, _ = run(policy, observed, generators(1, 2, 3), resets)
    for row in range(batch):
        own = {(call, 0) for call, owner in resets if owner == row}
        alone, _ = run(policy, observed[:, row : row + 1], generators(row + 1), own)
        torch.testing.assert_close(together[:, row], alone[:, 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_in_blocks_of_one_size_the_answer_is_the_same_to_the_bit(case):
    """What `rollout` relies on: other rows at other stages of their episodes change nothing."""
    policy = make(case)
    observed = observations(3, 4)
    answers = []
    for resets in (set(), {(2, 0), (1, 2), (3, 2)}):
        caller = BlockCaller(policy, 3, torch.device("cpu"))
        state, rngs, chunks = policy.initial_state(3), generators(1, 2, 3), []
        for call, obs in enumerate(observed):
            state = policy.reset(state, torch.tensor([(call, row) in resets for row in range(3)]))
            rows = [0, 1, 2] if call != 1 else [1, 2]  # a row waits: its state must wait too
            index = torch.tensor(rows)
            part = take_rows(state, index)
            chunk, part = caller.act({STATE: obs[index]}, part, rows, [rngs[row] for row in rows])
            state = put_rows(state, index, part)
            chunks.append(chunk[rows.index(1)])
        answers.append(torch.stack(chunks))
    assert torch.equal(*answers)


@pytest.mark.parametrize("case", CASES)
def test_reset_leaves_other_rows_untouched(case):
    policy = make(case)
    _, state = run(policy, observations(3, 2), generators(1, 2, 3))
    mask = torch.tensor([False, True, False])
    after, initial = policy.reset(state, mask), policy.initial_state(3)
    for key, value in state.items():
        assert torch.equal(after[key][~mask], value[~mask])
        assert torch.equal(after[key][1], initial[key][1])
    # and there is something to forget
    assert any(not torch.equal(state[key][1], initial[key][1]) for key in state)


@pytest.mark.parametrize("case", CASES)
def test_acting_is_pure(case):
    policy = make(case)
    _, state = run(policy, observations(2, 2), generators(1, 2))
    kept = {key: value.clone() for key, value in state.items()}
    obs = {STATE: observations(2, 1, seed=9)[0]}
    first, _ = policy.act(obs, state, generator=generators(7, 8))
    second, _ = policy.act(obs, state, generator=generators(7, 8))
    assert torch.equal(first, second)
    assert all(torch.equal(kept[key], value) for key, value in state.items())
