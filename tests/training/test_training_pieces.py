"""The pieces of the training loop, each alone."""

import itertools
import math
import threading
import time

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from torch import nn
from training_standin import make_episodes, make_standin

from dipole.data import Windows
from dipole.diffusion import Beta, DenoisingObjective, Flow
from dipole.errors import DipoleError
from dipole.training.batches import EpochOrder, Loader, Subset, shard, to_tensors
from dipole.training.config import TrainConfig
from dipole.training.draws import ShardedDraws
from dipole.training.ema import EMA, decay_at
from dipole.training.imitation import split_windows
from dipole.training.optim import clip, learning_rate, make_optimizer, set_learning_rate
from dipole.training.plan import _updates_that_fit
from dipole.training.precision import autocast, candidates, faster, time_updates
from dipole.training.seeding import derive, generator, seed_global
from dipole.training.update import make_accelerator
from dipole.training.validation import HeldOutLoss, is_due, validation_interval

CPU = torch.device("cpu")


class Numbers:
    """A source whose sample i is the number i; says when the n-th batch is asked for."""

    def __init__(self, count):
        self.count, self.asked = count, [threading.Event() for _ in range(count)]

    def __len__(self):
        return self.count

    def batch(self, indices):
        next((event for event in self.asked if not event.is_set()), threading.Event()).set()
        return {"number": np.asarray(indices)}


# --- devices


def test_a_process_may_train_on_the_cpu_after_another_device():
    first = make_accelerator(TrainConfig(steps=1, device="cpu"))
    gpu = torch.device("meta")  # stands for one
    first.state._shared_state["device"] = PartialState._shared_state["device"] = gpu
    assert make_accelerator(TrainConfig(steps=1, device="cpu")).device == CPU


# --- EMA


@pytest.mark.parametrize("schedule", ["constant", "power"])
def test_ema_after_one_update_is_the_model_exactly(schedule):
    model = nn.Linear(3, 2)
    ema = EMA(model, schedule, 0.999)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    ema.update()
    for average, parameter in zip(ema.module.parameters(), model.parameters(), strict=True):
        assert torch.equal(average, parameter)


def test_ema_is_the_weighted_mean_of_the_weights_seen():
    model, decay = nn.Linear(1, 1, bias=False).double(), 0.15
    ema, expected = EMA(model, "constant", decay), 0.0
    # decay: 0, then 1/10 (the ramp), then 0.15
    for value, d in zip((3.0, -1.0, 4.0, 1.0), (0.0, 0.1, 0.15, 0.15), strict=True):
        nn.init.constant_(model.weight, value)
        ema.update()
        expected = d * expected + (1 - d) * value
        assert float(ema.module.weight) == pytest.approx(expected, abs=1e-15)  # float64


def test_decay_schedules():
    assert decay_at(0, "power", 0.9999) == 0
    assert decay_at(1, "power", 0.9999) == pytest.approx(1 - 2**-0.75, rel=1e-15)
    assert decay_at(10**7, "power", 0.9999) == 0.9999
    assert [decay_at(k, "constant", 0.999) for k in (0, 1, 91, 10**6)] == [0, 0.1, 0.91, 0.999]


def test_ema_follows_buffers_and_needs_no_gradient():
    model = nn.BatchNorm1d(2)
    ema = EMA(model)
    model(torch.randn(8, 2))
    ema.update()
    assert torch.equal(ema.module.running_mean, model.running_mean)
    assert not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())


# --- optimizer


def test_learning_rate_warms_up_then_follows_a_cosine():
    config = TrainConfig(steps=100, lr=2.0, warmup=10, min_lr=0.5)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([2.0 * (k + 1) / 11 for k in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.25)  # half way between 10 and 100: the mean of peak and end
    assert rates[99] == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_warmup_as_a_share_and_runs_shorter_than_it():
    config = TrainConfig(steps=50, warmup=0.1, lr=1.0)
    assert learning_rate(5, 50, config) == 1.0 > learning_rate(4, 50, config)
    assert learning_rate(0, 1, TrainConfig(steps=1, warmup=500, lr=1.0)) == 1.0


def test_weight_decay_touches_matrices_only():
    layer = nn.Linear(3, 3)
    config = TrainConfig(weight_decay=0.5, lr=0.1)
    optimizer = make_optimizer(layer, config)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    torch.testing.assert_close(layer.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, before["bias"])


def test_fused_adamw_agrees_with_the_plain_one():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    config = TrainConfig(lr=1e-2, weight_decay=0.1)
    fused = make_optimizer(layers[0], config)
    assert fused.defaults["fused"]
    plain = torch.optim.AdamW(
        [{"params": [layers[1].weight], "weight_decay": 0.1}, {"params": [layers[1].bias], "weight_decay": 0.0}],
        lr=1e-2,
        betas=config.betas,
    )
    for _ in range(5):
        x = torch.randn(8, 5)
        for layer, optimizer in zip(layers, (fused, plain), strict=True):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    # Two orders of the same fp32 operations, five updates of 1e-2.
    torch.testing.assert_close(layers[0].weight, layers[1].weight, rtol=0, atol=1e-6)


def test_clip_returns_the_norm_before_and_bounds_it_after():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert float(clip([parameter], None)) == 5
    assert torch.equal(parameter.grad, torch.tensor([3.0, 4.0]))
    assert float(clip([parameter], 1.0)) == 5
    assert float(parameter.grad.norm()) == pytest.approx(1.0, abs=1e-5)  # torch divides by norm + 1e-6


# --- seeds


def test_seeds_are_pinned_and_differ_by_path():
    # A changed value would silently change every run that is resumed with a newer version.
    assert derive(0, "noise", 0) == 7057086449576365129
    paths = [(seed, use, step) for seed in range(3) for use in ("noise", "dropout") for step in range(50)]
    assert len({derive(*path) for path in paths}) == len(paths)
    assert derive(1, 23) != derive(12, 3)


def test_global_seeding_reaches_dropout():
    drop, x = nn.Dropout(0.5), torch.ones(64)
    draws = []
    for step in (1, 2, 1):
        seed_global(CPU, 0, "dropout", step)
        draws.append(drop(x))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


# --- order and loading


@pytest.mark.parametrize("batch_size", [1, 4, 10, 25])
def test_every_epoch_is_a_permutation_however_it_is_cut(batch_size):
    order = EpochOrder(10, batch_size, seed=3)
    steps = 100 // batch_size
    flat = np.concatenate([order.indices(step) for step in range(steps)])
    epochs = flat.reshape(-1, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # 10! orders: a repeat would be a bug


def test_order_is_a_function_of_seed_and_step_alone():
    order = EpochOrder(50, 8, seed=1)
    forwards = [order.indices(step) for step in range(40)]
    backwards = [EpochOrder(50, 8, seed=1).indices(step) for step in reversed(range(40))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert not np.array_equal(forwards, [EpochOrder(50, 8, seed=2).indices(step) for step in range(40)])
    assert order.epoch(25) == 4.0


def test_shards_make_up_the_batch():
    rows = [shard(12, process, 3) for process in range(3)]
    assert [list(range(12))[r] for r in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(DipoleError, match="batch_size 10 cannot be divided among 4 processes"):
        shard(10, 0, 4)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_loader_gives_the_ordered_batches_of_its_rows(prefetch):
    order = EpochOrder(20, 6, seed=0)
    loader = Loader(Numbers(20), order, slice(2, 4), CPU, start=5, stop=11, prefetch=prefetch)
    got = [batch["number"].tolist() for batch in loader]
    assert got == [order.indices(step)[2:4].tolist() for step in range(5, 11)]


def test_prefetching_gathers_while_a_batch_is_used():
    for prefetch in (0, 2):
        source = Numbers(9)
        batches = iter(Loader(source, EpochOrder(9, 3, 0), slice(0, 3), CPU, stop=3, prefetch=prefetch))
        next(batches)
        # The consumer holds the first batch and asks for nothing: only a thread can ask for the second.
        # A minute is no time limit to be met, it only ends a test that fails.
        assert source.asked[1].wait(60 if prefetch else 0) == (prefetch > 0)
        assert len(list(batches)) == 2


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_while_loading_reaches_the_consumer(prefetch):
    class Broken(Numbers):
        def batch(self, indices):
            raise DipoleError("frame 7 is damaged")

    with pytest.raises(DipoleError, match="frame 7"):
        next(iter(Loader(Broken(5), EpochOrder(5, 2, 0), slice(0, 2), CPU, prefetch=prefetch)))


def test_subset_and_empty_source():
    subset = Subset(Numbers(10), np.array([7, 8, 9]))
    assert len(subset) == 3
    assert subset.batch(np.array([2, 0]))["number"].tolist() == [9, 7]
    with pytest.raises(DipoleError, match="no training windows"):
        EpochOrder(0, 4, 0)


def test_whole_episodes_are_held_out():
    episodes = make_episodes(count=10)
    windows = Windows(episodes, ["observation.state"], obs_horizon=2, pred_horizon=8, action_horizon=4)
    training, held_out = split_windows(windows, 0.2, seed=0)
    assert len(training) + len(held_out) == len(windows)
    number = episodes.episode_index
    ours, theirs = (set(number[windows.frames[part.chosen]]) for part in (training, held_out))
    assert len(theirs) == 2
    assert ours | theirs == set(range(10))
    assert not ours & theirs
    assert split_windows(windows, 0.0, seed=0)[1] is None
    one = Windows(make_episodes(count=1), ["observation.state"], obs_horizon=2, pred_horizon=8, action_horizon=4)
    assert split_windows(one, 0.2, seed=0)[1] is None


# --- draws


def _draw_everything(rows, source):
    return {
        "randn": torch.randn((rows, 3), generator=source, dtype=torch.float64),
        "numbers": torch.randn(rows, 2, generator=source),
        "rand": torch.rand(size=(rows,), generator=source),
        "randint": torch.randint(0, 100, (rows * 2, 2), generator=source),
        "high": torch.randint(7, (rows,), generator=source),
        "gamma": torch._standard_gamma(torch.full((rows,), 1.5), generator=source),
        "shared": torch.randn((1, 5), generator=source),
    }


def test_shards_of_draws_are_rows_of_the_whole():
    whole = _draw_everything(12, generator(0, "x"))
    parts = []
    for process in range(3):
        source = generator(0, "x")
        with ShardedDraws(source, process, 3, rows=4):
            parts.append(_draw_everything(4, source))
    shared = whole.pop("shared")
    for name, value in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value), name
    assert all(torch.equal(part["shared"], shared) for part in parts)


def test_other_draws_are_left_alone():
    source, other = generator(0, "x"), generator(0, "y")
    with ShardedDraws(source, 1, 2, rows=4):
        drawn = torch.randn((4, 2), generator=other)
    assert torch.equal(drawn, torch.randn((4, 2), generator=generator(0, "y")))


@pytest.mark.parametrize("distribution", [Beta(), Beta(a=2.0, b=2.0)])
def test_loss_over_shards_averages_to_the_loss_of_the_batch(distribution):
    objective = DenoisingObjective(Flow(), "velocity", distribution)
    x0 = torch.randn(8, 5, 2, dtype=torch.float64, generator=generator(1))

    def network(x, time, cond):
        return x * torch.sin(time)[:, None, None]

    whole = objective(network, x0, generator=generator(0, "noise", 7))
    parts = []
    for process in range(2):
        source = generator(0, "noise", 7)
        with ShardedDraws(source, process, 2, rows=4):
            parts.append(objective(network, x0[process * 4 : process * 4 + 4], generator=source))
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-13, atol=0)  # float64, order of a sum


# --- precision


def test_the_faster_precision_is_chosen_and_ties_stay_exact():
    assert faster({"fp32": 1.0, "bf16": 0.5}) == "bf16"
    assert faster({"fp32": 1.0, "bf16": 0.97}) == "fp32"  # within the noise of a measurement
    assert faster({"fp32": 1.0}) == "fp32"
    assert faster({"bf16": 1.0}) == "bf16"
    assert list(candidates("auto")) == ["fp32", "bf16"]


def test_timing_measures_the_update():
    calls = []

    def update():
        calls.append(None)
        time.sleep(0.01)

    seconds = time_updates(update, 0.1, CPU)
    assert 0.01 <= seconds < 0.03  # sleep is never short; twice that much is a loaded machine
    assert 2 + 3 <= len(calls) <= 2 + 10
    calls.clear()
    time_updates(update, 0.0, CPU, agree=lambda count: count + 1)
    assert len(calls) == 2 + 4


def test_autocast_only_for_bf16():
    layer, x = nn.Linear(2, 2), torch.randn(1, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(CPU, precision):
            assert layer(x).dtype == dtype


# --- settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": None}, "either a number of steps or of minutes"),
        ({"steps": 10, "minutes": 1.0}, "either a number of steps or of minutes"),
        ({"steps": 0}, "steps=0 must be between 1 and"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"ema_decay": 1.5}, "ema_decay"),
    ],
)
def test_settings_out_of_range_are_named(options, message):
    with pytest.raises(DipoleError, match=message):
        TrainConfig(**options)


# --- validation


def test_held_out_loss_is_the_same_every_time_and_changes_nothing():
    episodes = make_episodes()
    policy = make_standin(episodes).eval()
    windows = Windows(episodes, ["observation.state"], obs_horizon=2, pred_horizon=8, action_horizon=4)
    measure = HeldOutLoss(windows, 40, 16, seed=0, device=CPU, precision="fp32")
    assert [len(batch) for batch in measure.batches] == [16, 16, 8]
    spread = np.concatenate(measure.batches)
    assert spread[0] == 0
    assert spread[-1] == len(windows) - 1
    state = torch.get_rng_state()
    first = measure(policy)
    assert torch.equal(torch.get_rng_state(), state)
    assert measure(policy) == first
    expected, count = 0.0, 0
    for number, indices in enumerate(measure.batches):
        batch = {key: torch.from_numpy(value) for key, value in windows.batch(indices).items()}
        expected += policy.loss(batch, generator(0, "validation", number)).item() * len(indices)
        count += len(indices)
    assert first == expected / count
    assert HeldOutLoss(windows, 10**6, 64, 0, CPU, "fp32").batches[-1][-1] == len(windows) - 1


def test_measuring_takes_a_twentieth_of_the_time_at_most():
    config = TrainConfig(batch_size=512)
    assert validation_interval(config, 10_000, 8) == 500
    assert validation_interval(TrainConfig(val_every=3), 10_000, 8) == 3
    for steps in (100, 1000, 10_000):
        for batches in (1, 8, 40):
            every = validation_interval(config, steps, batches)
            measured = [step for step in range(1, steps + 1) if is_due(step, steps, every)]
            assert measured[-1] == steps
            assert len(measured) <= 21
            # all but the final one, which is always wanted
            assert (len(measured) - 1) * batches / 3 <= steps / 20


def test_no_measurement_just_before_the_last():
    assert [step for step in range(1, 94) if is_due(step, 93, 20)] == [20, 40, 60, 80, 93]
    assert [step for step in range(1, 88) if is_due(step, 87, 20)] == [20, 40, 60, 87]
    assert [step for step in range(1, 41) if is_due(step, 40, 10)] == [10, 20, 30, 40]
    assert is_due(1, 1, 500)


def test_time_for_the_held_out_loss_is_set_aside():
    config = TrainConfig(batch_size=512)
    assert _updates_that_fit(1000.9, config, 0) == 1000
    # every 56th update: 17 + 1 measurements of 8 batches, each a third of an update
    assert _updates_that_fit(1000.0, config, 4096) == 1000 - 48
    assert _updates_that_fit(0.2, config, 4096) == 1


def test_double_precision_becomes_single():
    """robomimic and Minari keep float64, which no network takes; other types stay."""
    batch = {"a": np.full((2, 3), 1 / 3), "b": np.arange(2), "c": np.ones(2, bool), "d": np.ones(2, np.uint8)}
    tensors = to_tensors(batch, CPU)
    assert [tensors[key].dtype for key in "abcd"] == [torch.float32, torch.int64, torch.bool, torch.uint8]
    assert torch.equal(tensors["a"], torch.full((2, 3), 1 / 3))
    episodes = make_episodes()
    for key in ("observation.state", "action"):
        episodes.columns[key] = episodes.columns[key].astype(np.float64)
    windows = Windows(episodes, ["observation.state"], obs_horizon=2, pred_horizon=8, action_horizon=4)
    loss = make_standin(episodes).loss(to_tensors(windows.batch(np.arange(4)), CPU))
    assert loss.dtype == torch.float32
