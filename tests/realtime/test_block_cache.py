import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dipole.data import Feature, Normalizer
from dipole.errors import DipoleError
from dipole.evaluation.latency import count_network_calls
from dipole.networks import MLPConfig, TransformerConfig, UNet1DConfig, full_config
from dipole.policies import DiffusionPolicy, PolicyConfig, SamplerConfig, save_policy
from dipole.policies.config import ObjectiveConfig, ProcessConfig
from dipole.realtime import Runtime, apply, load, write_runtime
from dipole.realtime.backends import with_network
from dipole.realtime.block_cache import BlockCacheConfig, BlockCachePolicy, CachedNetwork
from dipole.realtime.block_calibration import calibrate, load_calibration
from dipole.realtime.block_schedule import (
    ScheduleOptions,
    adaptive,
    bubbling_union,
    cut,
    feed_forward,
    make_schedule,
    options_table,
    segment_values,
    share_computed,
)
from dipole.realtime.cost import REST, chunk_cost

CALLS = 12
NETWORKS = {
    "transformer": TransformerConfig(width=32, num_layers=2, num_heads=2, dropout=0.0),
    "unet": UNet1DConfig(down_dims=(16, 32), kernel_size=3, step_embed_dim=16),
    "mlp": MLPConfig(width=32, num_blocks=3),
}


def make(network, sampler="ddpm", steps=CALLS, seed=0):
    vector = Feature("float32", (2,))
    config = PolicyConfig(
        {"observation.state": vector}, vector, 2, 8, 4, network=full_config(NETWORKS[network]),
        process=ProcessConfig("vp-cosine", CALLS), objective=ObjectiveConfig("epsilon", "uniform"),
        sampler=SamplerConfig(sampler, steps, clip=1.0),
    )  # fmt: skip
    stats = {"min": np.full(2, -1.5, np.float32), "max": np.full(2, 1.5, np.float32)}
    keys = ("observation.state", "action")
    torch.manual_seed(seed)
    policy = DiffusionPolicy(config, Normalizer.fit(dict.fromkeys(keys, stats), dict.fromkeys(keys, "min_max")))
    # Untrained heads begin near zero: without this the branches would hardly matter to the chunk.
    for parameter in policy.network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return policy.eval()


def observe(rows, seed=0):
    return {"observation.state": torch.randn(rows, 2, 2, generator=torch.Generator().manual_seed(seed))}


def act(policy, obs, seeds=None):
    rows = len(obs["observation.state"])
    generators = [torch.Generator().manual_seed(s) for s in (seeds or range(rows))]
    return policy.act(obs, policy.initial_state(rows), generator=generators)[0]


def likeness(count, seed):
    half = np.random.default_rng(seed).uniform(size=(count, count))
    return (half + half.T) / 2


@pytest.fixture(scope="module", params=NETWORKS)
def calibrated(request):
    policy = make(request.param)
    return policy, calibrate(policy, observe(3))


def test_with_every_call_computed_nothing_changes(calibrated):
    policy, calibration = calibrated
    schedule = make_schedule(calibration, ScheduleOptions(CALLS, bubble=0))
    assert torch.equal(act(BlockCachePolicy(policy, schedule), observe(3)), act(policy, observe(3)))


def test_fewer_calls_change_the_chunk(calibrated):
    policy, calibration = calibrated
    cached = BlockCachePolicy(policy, make_schedule(calibration, ScheduleOptions(3, bubble=0)))
    assert not torch.equal(act(cached, observe(3)), act(policy, observe(3)))


def test_one_reused_call_leaves_all_calls_before_it_as_they_were(calibrated):
    policy, calibration = calibrated
    schedule = make_schedule(calibration, ScheduleOptions(CALLS - 1, shared=True, bubble=0))
    (skipped,) = set(range(CALLS)) - set(next(iter(schedule.steps.values())))
    outputs = []
    for chosen in (replace(schedule, steps={n: tuple(range(CALLS)) for n in schedule.steps}), schedule):
        seen = []
        network = CachedNetwork(policy.network, {name: frozenset(steps) for name, steps in chosen.steps.items()})
        network.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        act(with_network(policy, network), observe(2))
        outputs.append(seen)
    same = [torch.equal(a, b) for a, b in zip(*outputs, strict=True)]
    assert same[:skipped] == [True] * skipped
    assert not same[skipped]


def test_nothing_leaks_between_calls_and_rows(calibrated):
    policy, calibration = calibrated
    cached = BlockCachePolicy(policy, make_schedule(calibration, ScheduleOptions(3)))
    first = act(cached, observe(3))
    act(cached, observe(3, seed=1))
    assert torch.equal(act(cached, observe(3)), first)
    mixed = {k: torch.cat([v[:1], observe(3, seed=1)[k][1:]]) for k, v in observe(3).items()}
    assert torch.equal(act(cached, mixed)[0], first[0])
    alone = torch.cat([act(cached, {k: v[i : i + 1] for k, v in observe(3).items()}, [i]) for i in range(3)])
    # a batch rounds its matrix products differently from single rows: float32, 12 steps
    assert torch.allclose(alone, first, atol=1e-4)


def test_a_changed_batch_size_raises():
    policy = make("transformer")
    network = CachedNetwork(policy.network, dict.fromkeys(policy.network.branches, frozenset([0])))
    cond = {"obs": torch.zeros(2, 2, 2)}
    network(torch.zeros(2, 8, 2), torch.zeros(2), cond)
    with pytest.raises(ValueError, match="batch of 2"):
        network(torch.zeros(1, 8, 2), torch.zeros(1), {"obs": cond["obs"][:1]})


@pytest.mark.parametrize("objective", ["anchor", "adjacent"])
@pytest.mark.parametrize("budget", [1, 2, 4, 11, 12])
def test_the_programme_finds_the_best_of_all_schedules(objective, budget):
    for seed in range(5):
        matrix = likeness(12, seed)
        values = segment_values(matrix, objective)

        def total(starts, values=values):
            return sum(values[a, b] for a, b in itertools.pairwise((*starts, 12)))

        best = max(total((0, *rest)) for rest in itertools.combinations(range(1, 12), budget - 1))
        found = adaptive(matrix, ScheduleOptions(budget, objective=objective))
        assert len(found) == budget
        assert found[0] == 0
        assert total(found) == pytest.approx(best, abs=1e-12)


def test_segment_values_are_the_sums_of_the_two_objectives():
    matrix = likeness(7, 0)
    for first, end in ((0, 7), (2, 5), (3, 4), (6, 7)):
        inside = range(first + 1, end)
        assert segment_values(matrix, "anchor")[first, end] == pytest.approx(sum(matrix[first, t] for t in inside))
        assert segment_values(matrix, "adjacent")[first, end] == pytest.approx(sum(matrix[t, t - 1] for t in inside))


def test_the_papers_objective_cuts_where_neighbours_are_least_alike():
    # It adds up to a constant minus the entries at the cuts, so that choosing them one by one is optimal.
    for seed in range(20):
        matrix = likeness(14, seed)
        smallest = 1 + np.argsort(np.diagonal(matrix, 1))[:4]
        found = adaptive(matrix, ScheduleOptions(5, objective="adjacent"))
        assert found == (0, *sorted(smallest.tolist()))


def test_the_two_objectives_disagree():
    both = (ScheduleOptions(4), ScheduleOptions(4, objective="adjacent"))
    different = sum(len({adaptive(likeness(12, seed), options) for options in both}) == 2 for seed in range(10))
    assert different >= 8  # random matrices: they agree by accident only


def test_differences_are_minimised_and_likeness_maximised():
    matrix = likeness(10, 0)
    assert adaptive(1 - matrix, ScheduleOptions(3, metric="mse")) == adaptive(matrix, ScheduleOptions(3))


def test_ties_are_cut_early_and_always_alike():
    assert cut(np.zeros((5, 6)), 3) == cut(np.zeros((5, 6)), 3)


def layers(count):
    return [f"layer{i}.{kind}" for i in range(count) for kind in ("sa", "ca", "ffn")]


def test_the_union_takes_over_the_calls_of_feed_forward_branches_after():
    names = layers(3)
    steps = {name: (0, i + 1) for i, name in enumerate(names)}
    errors = dict.fromkeys(names, 0.0) | {"layer1.ca": 2.0, "layer0.ffn": 1.0}
    united = bubbling_union(steps, errors, 2)
    assert united["layer1.ca"] == (0, 5, 6, 9)  # its own, and those of the feed-forward branches of layers 1 and 2
    assert united["layer0.ffn"] == (0, 3, 6, 9)
    assert all(united[name] == steps[name] for name in names if errors[name] == 0)
    assert bubbling_union(united, errors, 2) == united
    assert bubbling_union(steps, errors, 0) == steps
    assert list(united) == names


def test_without_attention_every_later_block_counts():
    assert feed_forward(layers(1)) == {"layer0.ffn"}
    assert feed_forward(["block0.attention", "block0.mlp"]) == {"block0.mlp"}
    assert feed_forward(["down0.0", "mid.0"]) == {"down0.0", "mid.0"}
    united = bubbling_union(
        {"down0.0": (0,), "mid.0": (0, 3), "up0.0": (0, 5)}, {"down0.0": 0, "mid.0": 1, "up0.0": 0}, 1
    )
    assert united == {"down0.0": (0,), "mid.0": (0, 3, 5), "up0.0": (0, 5)}


def test_the_last_call_can_be_forced(calibrated):
    _, calibration = calibrated
    plain, forced = (make_schedule(calibration, ScheduleOptions(2, bubble=0, force_last=f)) for f in (False, True))
    assert any(CALLS - 1 not in steps for steps in plain.steps.values())
    for name, steps in forced.steps.items():
        assert set(steps) == {*plain.steps[name], CALLS - 1}


def test_uniform_and_shared_schedules(calibrated):
    _, calibration = calibrated
    uniform = make_schedule(calibration, ScheduleOptions(4, mode="uniform", bubble=0))
    assert set(uniform.steps.values()) == {(0, 3, 6, 9)}
    assert share_computed(uniform) == 4 / 12
    assert len(set(make_schedule(calibration, ScheduleOptions(4, shared=True, bubble=0)).steps.values())) == 1


def test_calibration_measures_what_it_says(calibrated):
    policy, calibration = calibrated
    name = policy.network.branches[-1]
    outputs = []

    def hook(branch, compute):
        out = compute()
        if branch == name:
            outputs.append(out.flatten().double())
        return out

    class Watched(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x, time, cond=None):
            return self.network(x, time, cond, hook)

    one = calibrate(policy, observe(1))
    act(with_network(policy, Watched(policy.network)), observe(1), [0])
    a, b = outputs[2], outputs[7]
    cosine = float(a @ b / a.norm() / b.norm())
    assert one.matrices["cosine"][name][2, 7] == pytest.approx(cosine, abs=1e-9)
    assert one.matrices["mse"][name][7, 2] == pytest.approx(float((a - b).square().mean()), rel=1e-6)
    assert one.matrices["l1"][name][2, 7] == pytest.approx(float((a - b).abs().mean()), rel=1e-9)
    assert calibration.branches == tuple(policy.network.branches)
    # the average of three observations, in one go or one by one
    again = calibrate(policy, observe(3), rows=1)
    for metric, part in calibration.matrices.items():
        for branch, matrix in part.items():
            assert np.allclose(matrix, again.matrices[metric][branch], rtol=1e-3, atol=1e-6)


def test_calibration_survives_the_disk(calibrated, tmp_path):
    _, calibration = calibrated
    assert calibration.save(tmp_path).name == "block_cache.json"
    loaded = load_calibration(tmp_path)
    assert loaded.levels == calibration.levels
    # stored with six digits, in which these random outputs have no ties
    assert make_schedule(loaded).steps == make_schedule(calibration).steps
    table = json.loads((tmp_path / "block_cache.json").read_text())
    (tmp_path / "block_cache.json").write_text(json.dumps({**table, "num_calls": 3}))
    with pytest.raises(DipoleError, match="calibrate again"):
        load_calibration(tmp_path)


def test_the_ledger_adds_up():
    cost = chunk_cost(make("transformer"), observe(1))
    width, rows, memory = 32, 8, 3
    feed = 2 * rows * width * 4 * width
    own = rows * width * 3 * width + rows * width * width + 2 * rows * rows * width
    cross = rows * width * width + memory * width * 2 * width + rows * width * width + 2 * rows * memory * width
    assert cost.macs["layer0.ffn"] == feed
    assert cost.macs["layer1.sa"] == own
    assert cost.macs["layer0.ca"] == cross
    assert cost.calls == CALLS
    assert cost.total == CALLS * (cost.macs[REST] + 2 * (feed + own + cross))
    schedule = BlockCacheConfig(dict.fromkeys(layers(2), (0, 4)))
    assert cost.cached(schedule) == CALLS * cost.macs[REST] + 2 * 2 * (feed + own + cross)
    assert cost.equal_calls(cost.call * 3) == 3
    assert cost.equal_calls(1) == 1


def test_network_calls_are_still_counted():
    policy = make("unet")
    cached = BlockCachePolicy(policy, make_schedule(calibrate(policy, observe(1)), ScheduleOptions(3)))
    assert count_network_calls(cached, observe(1)) == CALLS


def test_two_calls_per_step_are_scheduled_one_by_one():
    policy = make("mlp", "heun", 4)
    calibration = calibrate(policy, observe(2))
    assert calibration.num_calls == 7
    schedule = make_schedule(calibration, ScheduleOptions(7, bubble=0))
    assert torch.equal(act(BlockCachePolicy(policy, schedule), observe(2)), act(policy, observe(2)))


def test_the_schedule_is_kept_beside_the_weights_and_obeyed(tmp_path):
    policy = make("transformer")
    schedule = make_schedule(calibrate(policy, observe(2)), ScheduleOptions(3))
    save_policy(policy, tmp_path / "run")
    write_runtime(Runtime("block-cache", options_table(schedule)), tmp_path / "run")
    expected = act(BlockCachePolicy(policy, schedule), observe(2))
    assert torch.equal(act(load(tmp_path / "run"), observe(2)), expected)


def test_what_does_not_fit_is_refused(calibrated):
    policy, calibration = calibrated
    schedule = make_schedule(calibration, ScheduleOptions(3))
    with pytest.raises(DipoleError, match="needs a schedule"):
        apply(policy, Runtime("block-cache"))
    with pytest.raises(DipoleError, match="another sampler"):
        BlockCachePolicy(policy.with_sampler(SamplerConfig("ddim", 5)), schedule)
    name = next(iter(policy.network.branches))
    with pytest.raises(DipoleError, match=f"branch '{name}'"):
        BlockCachePolicy(policy, replace(schedule, steps={k: v for k, v in schedule.steps.items() if k != name}))
    with pytest.raises(DipoleError, match="step 0"):
        BlockCachePolicy(policy, replace(schedule, steps=schedule.steps | {name: (1,)}))
    with pytest.raises(DipoleError, match="other weights"):
        BlockCachePolicy(policy, replace(schedule, weights="0" * 16))
    with pytest.raises(DipoleError, match="choose from 1 to 12"):
        make_schedule(calibration, ScheduleOptions(13))
    with pytest.raises(DipoleError, match="one sampler only"):
        BlockCachePolicy(policy, schedule).with_sampler(SamplerConfig("ddim", 5))
    with pytest.raises(DipoleError, match="compiled"):
        apply(policy, Runtime("block-cache", options_table(schedule), backend="compile"))
