"""Streaming: the exact checks of the Streaming Diffusion Policy."""

import pytest
import torch
from method_helpers import STATE, D, ddpm, demonstrations, generators, observations, run, small_policy

from dipole.diffusion import DDPM, VP, Flow, Uniform, add_noise, sample
from dipole.diffusion.tensors import randn
from dipole.errors import DipoleError
from dipole.policies import SamplerConfig
from dipole.policies.streaming import StreamingTraining, num_pieces, pieces, rungs
from dipole.realtime import Runtime, apply
from dipole.realtime.streaming import StreamingConfig, StreamingPolicy

TO, TP, TA = 2, 10, 4  # two pieces, one action left over
N = 100


def streaming(policy=None, **options):
    return StreamingPolicy(policy or small_policy(streaming=True), StreamingConfig(**options))


@pytest.mark.parametrize(
    ("horizons", "levels", "expected"),
    [
        ((2, 16, 8), 100, [99] * 16),
        ((2, 20, 8), 100, [49] * 9 + [99] * 11),
        ((2, 16, 5), 99, [32] * 6 + [65] * 5 + [98] * 5),
        ((2, 28, 8), 99, [32] * 9 + [65] * 8 + [98] * 11),
        ((2, 16, 1), 105, [6, 6, *range(13, 105, 7)]),
    ],
)
def test_ladders(horizons, levels, expected):
    # the spec's, with N divisible by h where its own table has N = 100
    assert rungs(pieces(*horizons), num_pieces(*horizons), VP.cosine(levels)).tolist() == expected


def test_levels_of_a_flow_are_the_same_ladder_in_continuous_time():
    assert rungs(pieces(TO, TP, TA), 2, Flow()).tolist() == [0.5] * 5 + [1.0] * 5


def test_one_piece_is_ddpm_from_the_same_noise_to_the_bit():
    plain = small_policy(streaming=True).with_sampler(ddpm(N))
    plain.config = small_policy(streaming=True, horizons=(2, 10, 4)).config
    object.__setattr__(plain.config, "action_horizon", 9)  # h = 1: all of the chunk but the past
    policy = streaming(plain)
    assert policy.ladder.tolist() == [[99.0] * TP]
    noise = torch.randn(3, TP, D, generator=torch.Generator().manual_seed(0))
    obs = {STATE: observations(3, 1)[0]}
    state = {"buffer": noise, "primed": torch.ones(3, dtype=torch.bool)}
    chunk, _ = policy.act(obs, state, generator=generators(1, 2, 3))
    reference, _ = plain.act(obs, {}, noise=noise, generator=generators(1, 2, 3))
    # levels per position reach the same float32 coefficients as one level for all, and draw the same noise
    assert torch.equal(chunk, reference)


def test_step_per_position_with_equal_levels_is_the_step_with_one():
    process, g = VP.cosine(N), torch.Generator().manual_seed(0)
    x, x0 = torch.randn(2, 3, TP, D, generator=g)
    for t in (99, 40, 1, 0):
        one = DDPM(clip=1.0).step(x, x0, float(t), t - 1.0, process)
        each = DDPM(clip=1.0).step(x, x0, torch.full((3, TP), float(t)), torch.full((3, TP), t - 1.0), process)
        assert torch.equal(one.mean, each.mean)
        assert torch.equal(torch.as_tensor(one.std, dtype=torch.float32).expand_as(x), each.std.expand_as(x))


@pytest.mark.parametrize("horizons", [(2, 10, 4), (1, 12, 3), (3, 12, 2), (2, 11, 1)])
def test_a_call_ends_on_the_ladder_of_the_next_one(horizons):
    to, _, ta = horizons
    count = num_pieces(*horizons)
    policy = streaming(small_policy(streaming=True, horizons=horizons))
    end, ladder = policy.levels[-1, 0], policy.ladder[0]
    kept = to - 1 + (count - 1) * ta
    assert (end[: to - 1 + ta] == -1).all()
    assert torch.equal(end[to - 1 + ta : ta + kept], ladder[to - 1 : kept])
    assert (ladder[kept:] == N - 1).all()
    assert (policy.levels[:-1] >= 0).all(), "nothing clean is denoised further"
    assert len(policy.levels) - 1 == N / count


def test_every_vector_of_levels_at_run_time_was_trained():
    policy = small_policy(streaming=True)
    scheme = StreamingTraining(constant=0.0)
    drawn = scheme.draw(4000, (TO, TP, TA), policy.process, Uniform(), torch.Generator().manual_seed(0))
    trained = {tuple(row) for row in drawn.tolist()}
    met = {tuple(row[0]) for row in streaming(policy).levels[:-1].tolist()}
    assert met == trained  # 50 vectors, and 4000 draws miss none of them (chance of missing one: 50 * 0.98^4000)


def test_calls_with_fewer_steps_stay_on_trained_levels():
    policy = small_policy(streaming=True)
    few = {tuple(row[0]) for row in streaming(policy.with_sampler(ddpm(20))).levels[:-1].tolist()}
    assert few < {tuple(row[0]) for row in streaming(policy).levels[:-1].tolist()}
    assert len(few) == 10


def test_network_calls_per_chunk_are_n_over_h(monkeypatch):
    policy = streaming()
    calls = []
    policy.network.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[1].shape))
    run(policy, observations(2, 3), generators(1, 2))
    assert len(calls) == 3 * N // 2
    assert set(calls) == {(2, TP)}


def test_the_buffer_moves_up_and_the_past_is_noised_again():
    """Two calls by hand."""
    policy = streaming()
    observed, g = observations(1, 2), torch.Generator().manual_seed(4)
    chunks, state = run(policy, observed, [g])
    g = torch.Generator().manual_seed(4)
    process, ladder = policy.process, policy.ladder

    def noise(count):
        return randn((1, count, D), [g], like=observed)

    buffer = add_noise(torch.zeros(1, TP, D), noise(TP), ladder, process)
    for call in range(2):
        cond = policy.policy.encode({STATE: observed[call]})
        x = sample(policy.denoiser, process, policy.levels, DDPM(clip=1.0), cond=cond, init=buffer, generator=[g])
        expected = policy.normalizer.denormalize("action", x[:, TO - 1 : TO - 1 + TA])
        assert torch.equal(chunks[call], expected)
        fresh = noise(1 + TP - 5)
        past = add_noise(x[:, TA : TA + 1], fresh[:, :1], ladder[:, :1], process)
        buffer = torch.cat([past, x[:, TA + 1 : TA + 5], fresh[:, 1:]], 1)
    assert torch.equal(state["buffer"], buffer)
    published = streaming(overlap_noise=False)
    _, kept = run(published, observed[:1], generators(4))
    _, first = run(policy, observed[:1], generators(4))
    # without that noise the past position holds a clean, clipped action; all else is the same
    assert kept["buffer"][0, 0].abs().max() <= 1
    assert torch.equal(kept["buffer"][:, 1:], first["buffer"][:, 1:])
    assert not torch.equal(kept["buffer"][:, 0], first["buffer"][:, 0])


def test_primers_begin_on_the_same_ladder():
    obs, noise = {STATE: observations(2, 1)[0]}, torch.zeros(2, TP, D)
    cond = streaming().encode(obs)
    buffers = {}
    for primer in ("zero", "constant"):
        buffers[primer] = streaming(primer=primer)._primed(obs, cond, noise, None)
    assert torch.equal(buffers["zero"], noise)
    held = streaming().normalizer.normalize("action", obs[STATE][:, -1, :D])
    expected = add_noise(held[:, None].expand(-1, TP, -1), noise, streaming().ladder, VP.cosine(N))
    torch.testing.assert_close(buffers["constant"], expected)
    policy = streaming(primer="denoise")
    primed = policy._primed(obs, cond, None, generators(1, 2))
    rng = generators(1, 2)
    clean = policy.policy.denoise(cond, None, rng)
    again = add_noise(clean, randn(clean.shape, rng, like=clean), policy.ladder, policy.process)
    assert torch.equal(primed, again)


def test_schemes_of_training_levels():
    g, process = torch.Generator().manual_seed(0), VP.cosine(N)
    options = {"chunk_wise": 0.0, "constant": 0.0}
    draw = {"batch": 500, "horizons": (TO, TP, TA), "process": process, "time": Uniform(), "generator": g}
    constant = StreamingTraining(**options | {"constant": 1.0}).draw(**draw)
    assert (constant == constant[:, :1]).all()
    linear = StreamingTraining(**options, linear=1.0).draw(**draw)
    assert (linear.diff(dim=1) >= 0).all()
    assert linear.max() < N
    independent = StreamingTraining(**options, independent=1.0).draw(**draw)
    assert abs(torch.corrcoef(independent[:, :2].T)[0, 1]) < 0.15  # 500 pairs: three standard errors are 0.13
    mixed = StreamingTraining().draw(**draw)
    share = (mixed == mixed[:, :1]).all(1).double().mean()
    assert abs(share - 0.2) < 0.06  # three standard errors of a share of 500 are 0.054
    per_batch = [
        (levels == levels[:, :1]).all(1)
        for levels in (StreamingTraining(scheme_per="batch").draw(**draw | {"batch": 8}) for _ in range(20))
    ]
    assert all(row.all() or not row.any() for row in per_batch)
    assert {bool(row.all()) for row in per_batch} == {True, False}


def test_training_uses_these_levels():
    policy = small_policy(streaming=True)
    seen = []
    policy.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    batch = {
        STATE: observations(16, 1)[0],
        "action": torch.zeros(16, TP, D),
        "action_is_pad": torch.zeros(16, TP, dtype=torch.bool),
    }
    policy.loss(batch, torch.Generator().manual_seed(0)).backward()
    steps = seen[0].diff(dim=1)
    assert seen[0].shape == (16, TP)
    # between the two pieces the level rises by N/h = 50, or not at all in the constant scheme
    assert set(steps[:, TO - 2 + TA].tolist()) == {0.0, 50.0}


def test_what_cannot_work_is_said():
    with pytest.raises(DipoleError, match="trained with a noise level for every position"):
        apply(small_policy(), Runtime("streaming"))
    with pytest.raises(DipoleError, match="h=2 pieces, which must divide the 25 steps"):
        streaming(small_policy(streaming=True).with_sampler(ddpm(25)))
    with pytest.raises(DipoleError, match="h=3 pieces, which must divide the 100 noise levels"):
        small_policy(streaming=True, horizons=(2, 13, 4))
    with pytest.raises(DipoleError, match="gains nothing: raise pred_horizon to 17"):
        small_policy(streaming=True, horizons=(2, 16, 8))
    with pytest.raises(DipoleError, match="not 'edm'"):
        small_policy(streaming=True, process="edm").loss(
            {STATE: observations(1, 1)[0], "action": torch.zeros(1, TP, D), "action_is_pad": torch.zeros(1, TP).bool()}
        )
    with pytest.raises(DipoleError, match="spacing 'leading'"):
        streaming(small_policy(streaming=True).with_sampler(SamplerConfig("ddim", 20, "leading")))
    with pytest.raises(DipoleError, match="cannot step every position"):
        streaming(small_policy(streaming=True).with_sampler(SamplerConfig("dpmpp-2m", 20)))
    with pytest.raises(DipoleError, match="part of the training"):
        apply(small_policy(streaming=True), Runtime("streaming", action_horizon=2))
    policy = streaming(primer="constant", constant_from="observation.hand")
    with pytest.raises(DipoleError, match="under 'observation.hand'"):
        run(policy, observations(1, 1), generators(1))


@pytest.mark.parametrize("name", ["unet1d", "transformer"])
def test_other_networks_take_levels_per_position(name):
    tables = {
        "unet1d": {"name": "unet1d", "down_dims": [16, 32], "step_embed_dim": 8},
        "transformer": {"name": "transformer", "num_layers": 1, "num_heads": 2, "width": 16},
    }
    policy = small_policy(streaming=True, network=tables[name], sampler=ddpm(4))
    chunks, _ = run(streaming(policy), observations(2, 2), generators(1, 2))
    assert chunks.shape == (2, 2, TA, D)
    assert torch.isfinite(chunks).all()


def test_demonstrations_train_it_from_end_to_end():
    from dipole.data import Windows
    from dipole.systems.experiment import train
    from dipole.training.config import TrainConfig

    policy = small_policy(streaming=True)
    windows = Windows(demonstrations(), [STATE], "action", TO, TP, TA)
    trained = train(policy, windows, TrainConfig(steps=3, batch_size=8, precision="fp32"))
    assert torch.isfinite(run(streaming(trained), observations(1, 1), generators(1))[0]).all()
