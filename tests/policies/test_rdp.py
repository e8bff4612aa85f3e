"""RDP as a policy: exact properties, two rates with explicit state, no leaks, two stages, options, saving."""

import numpy as np
import pytest
import torch

from dipole.data import Episodes, Feature
from dipole.data.fast_windows import FastWindows
from dipole.errors import DipoleError
from dipole.policies import load_policy, save_policy
from dipole.policies.rdp import make_rdp
from dipole.systems.experiment import train
from dipole.systems.rdp_checks import FORCE, STATE, drive, exact_checks, felt, tiny_rdp
from dipole.training.config import TrainConfig

NETWORK = {"name": "mlp", "width": 16, "num_blocks": 1, "context_width": 8, "step_embed_dim": 8}


def episodes(count=6, length=40, seed=0):
    rng = np.random.default_rng(seed)
    force = rng.normal(size=(count * length, 1)).astype(np.float32)
    columns = {
        STATE: rng.normal(size=(count * length, 3)).astype(np.float32),
        FORCE: force,
        "action": np.concatenate([0.1 * force, rng.uniform(-1, 1, (count * length, 1))], 1).astype(np.float32),
    }
    features = {key: Feature("float32", value.shape[1:]) for key, value in columns.items()}
    return Episodes(features, columns, np.arange(1, count + 1) * length, 24.0)


def windows(data=None):
    return FastWindows(episodes() if data is None else data, (STATE, FORCE), (FORCE,), 3, 16, 6)


def make(**options):
    return make_rdp(windows(), **{"network": NETWORK, "latency": 2, **options})


def test_exact_properties():
    assert [claim.claim for claim in exact_checks() if claim.verdict != "passed"] == []


def test_windows_hold_the_force_of_every_tick_of_the_chunk():
    data, w = episodes(), windows()
    batch = w.batch(np.arange(len(w)))
    assert batch["fast." + FORCE].shape == (len(w), 16, 1)
    k = int(np.flatnonzero(w.windows.frames == 60)[0])  # frame 20 of the second episode
    np.testing.assert_array_equal(batch["fast." + FORCE][k], data.columns[FORCE][58:74])
    np.testing.assert_array_equal(batch["action"][k], data.columns["action"][58:74])
    np.testing.assert_array_equal(batch[FORCE][k], data.columns[FORCE][58:61])


def test_plans_are_made_on_time_and_reactions_at_once():
    policy = tiny_rdp(offset=2, latency=1)
    ticks, noise = 20, torch.randn(1, *policy.codec.latent_shape, generator=torch.Generator().manual_seed(0))
    signals = felt(ticks, 1)
    before = drive(policy, signals, noise)
    for tick in (5, 9):
        changed = {key: value.clone() for key, value in signals.items()}
        changed[FORCE][:, tick] += 1
        difference = (drive(policy, changed, noise) - before).abs().amax((0, 2))
        assert difference[:tick].max() == 0
        assert difference[tick] > 1e-5  # felt in the very tick
        changed = {key: value.clone() for key, value in signals.items()}
        changed[STATE][:, tick] += 1
        difference = (drive(policy, changed, noise) - before).abs().amax((0, 2))
        # Plans are made at ticks 0, 2, 8, 14 from three ticks of observations and used one tick later.
        first = next(plan for plan in (2, 8, 14) if tick <= plan) + 1
        seen = tick > first - 1 - policy.obs_horizon
        assert difference[:first].max() == 0
        assert (difference[first] > 1e-6) == seen


@pytest.mark.parametrize("latency", [0, 2])
def test_rows_do_not_leak(latency):
    """A batch whose rows are reset at different ticks acts as each row would alone."""
    policy, ticks, batch = tiny_rdp(latency=latency), 24, 3
    signals = felt(ticks + 2, batch)
    resets = {0: [0, 7], 1: [0, 13], 2: [0]}
    actions = torch.zeros(batch, ticks, 2)
    state = policy.initial_state(batch)
    generators = [torch.Generator().manual_seed(k) for k in range(batch)]
    for tick in range(ticks):
        state = policy.reset(state, torch.tensor([tick in resets[row] for row in range(batch)]))
        for row in range(batch):
            if tick in resets[row]:
                generators[row].manual_seed(100 * row + tick)
        obs = {key: value[:, tick : tick + 3] for key, value in signals.items()}
        chunk, state = policy.act(obs, state, generator=generators)
        actions[:, tick] = chunk[:, 0]
    for row, starts in resets.items():
        for start, end in zip(starts, [*starts[1:], ticks], strict=True):
            own, generator = policy.initial_state(1), [torch.Generator().manual_seed(100 * row + start)]
            for tick in range(start, end):
                obs = {key: value[row : row + 1, tick : tick + 3] for key, value in signals.items()}
                chunk, own = policy.act(obs, own, generator=generator)
                # products of other sizes may round differently
                torch.testing.assert_close(chunk[0, 0], actions[row, tick], atol=1e-5, rtol=1e-5)


def test_state_is_not_changed_in_place():
    policy, obs = tiny_rdp(), felt(3)
    state = policy.initial_state(2)
    kept = {key: value.clone() for key, value in state.items()}
    _, after = policy.act(obs, state, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    assert set(after) == set(state)
    assert {key: value.dtype for key, value in after.items()} == {key: value.dtype for key, value in state.items()}


def test_stages_train_one_part_each():
    policy, w = make(), windows()
    codec = {key: value.clone() for key, value in policy.codec.state_dict().items()}
    first = train(policy, w, TrainConfig(steps=3, batch_size=16, precision="fp32", ema_decay=0.0))
    assert any(not torch.equal(value, codec[key]) for key, value in first.codec.state_dict().items())
    codec = {key: value.clone() for key, value in first.codec.state_dict().items()}
    network = {key: value.clone() for key, value in first.network.state_dict().items()}
    second = train(first.begin_latents(w), w, TrainConfig(steps=3, batch_size=16, precision="fp32"))
    assert all(torch.equal(value, codec[key]) for key, value in second.codec.state_dict().items())
    assert any(not torch.equal(value, network[key]) for key, value in second.network.state_dict().items())


def test_latents_of_the_demonstrations_fill_the_range():
    policy, w = make(latent_sample="mean"), windows()
    policy.begin_latents(w)
    batch = {key: torch.from_numpy(value) for key, value in w.batch(np.arange(len(w))).items()}
    targets = policy._targets(policy.chunks(batch), None)
    # float32 rounding of a range shifted and stretched
    torch.testing.assert_close(targets.amin(0), -torch.ones(4, 16), atol=1e-4, rtol=0)
    torch.testing.assert_close(targets.amax(0), torch.ones(4, 16), atol=1e-4, rtol=0)


def test_what_the_slow_policy_learns_is_an_option():
    w = windows()
    batch = {key: torch.from_numpy(value) for key, value in w.batch(np.arange(4)).items()}
    targets = {}
    for kind in ("sample", "mean"):
        policy = make(latent_sample=kind)
        chunks = policy.chunks(batch)
        draws = [policy._latent(chunks, torch.Generator().manual_seed(k)) for k in (0, 1)]
        targets[kind] = torch.equal(*draws)
        assert torch.equal(policy._latent(chunks, torch.Generator().manual_seed(0)), draws[0])
    assert targets == {"sample": False, "mean": True}


def test_absolute_actions_are_learned_relative_to_where_the_tool_was_seen():
    data = episodes()
    data.columns["action"] += 100 * data.columns[STATE][:, [0, 2]]
    policy = make_rdp(windows(data), network=NETWORK, latency=2, base=STATE, base_dims=(0, 2))
    w = windows(data)
    batch = {key: torch.from_numpy(value) for key, value in w.batch(np.arange(len(w))).items()}
    chunks = policy.chunks(batch)
    assert chunks.min() >= -1 - 1e-5
    assert chunks.max() <= 1 + 1e-5
    obs = {key: batch[key][:1] for key in (STATE, FORCE)}
    noise = torch.randn(1, *policy.codec.latent_shape)
    moved = {**obs, STATE: obs[STATE] + torch.tensor([5.0, 0.0, 7.0])}
    policy.network.requires_grad_(False)
    for parameter in policy.network.parameters():  # the plan itself shall not depend on the place
        parameter.zero_()
    (here, _), (there, _) = (policy.act(o, policy.initial_state(1), noise) for o in (obs, moved))
    torch.testing.assert_close(there - here, torch.tensor([[[5.0, 7.0]]]), atol=1e-3, rtol=0)


def test_a_saved_policy_acts_the_same(tmp_path):
    policy = make(offset=1).begin_latents(windows()).eval()
    save_policy(policy, tmp_path / "p")
    loaded = load_policy(tmp_path / "p")
    assert loaded.config == policy.config
    assert torch.equal(loaded.latent_low, policy.latent_low)
    signals, noise = felt(15), torch.randn(2, *policy.codec.latent_shape)
    # weights that need gradients take another path through the decoder, which rounds differently
    torch.testing.assert_close(drive(loaded, signals, noise), drive(policy, signals, noise), atol=1e-5, rtol=1e-5)


def test_mistakes_are_answered():
    with pytest.raises(DipoleError, match="is 11; raise pred_horizon"):  # 3 - 1 + 2 + 7
        tiny_rdp(pred_horizon=10, period=7)
    with pytest.raises(DipoleError, match="latency 6 must be in 0..5"):
        tiny_rdp(latency=6)
    with pytest.raises(DipoleError, match="at least one fast feature"):
        tiny_rdp(fast=())
    with pytest.raises(DipoleError, match="'observation.touch' is not among"):
        tiny_rdp(fast=("observation.touch",))
    with pytest.raises(DipoleError, match="one component of 'observation.state' per action component"):
        tiny_rdp(base=STATE)
    with pytest.raises(DipoleError, match="lacks 'observation.force'"):
        tiny_rdp().act({STATE: torch.zeros(1, 3, 3)}, {})
    with pytest.raises(DipoleError, match=r"has shape \[1, 2, 1\]"):
        tiny_rdp().act({STATE: torch.zeros(1, 3, 3), FORCE: torch.zeros(1, 2, 1)}, {})
