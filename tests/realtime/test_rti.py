"""Real-time iteration: the exact checks, the residual table, discrete actions, the calibration."""

from dataclasses import replace

import pytest
import torch
from method_helpers import STATE, D, ddpm, demonstrations, generators, observations, run, small_policy

from dipole.diffusion import VP, GaussianDenoiser
from dipole.errors import DipoleError
from dipole.policies import SamplerConfig
from dipole.realtime import Runtime, apply, method_config
from dipole.realtime.base import shifted
from dipole.realtime.rti import RTIConfig, RTIPolicy, StartLevel, residual, scale_discrete, spaced, warm_levels
from dipole.realtime.start_level import calibrate, candidates, contraction_table, fitted_std

TP, TA = 10, 4
N = 100
COSINE = VP.cosine(N)


def warm(policy, chunk, **options):
    """A policy with options, and the state in which `chunk` was the previous one."""
    policy = RTIPolicy(policy, RTIConfig(**options))
    return policy, {"chunk": chunk, "warm": torch.ones(len(chunk), dtype=torch.bool)}


def chunks(batch=2, seed=0):
    return torch.rand(batch, TP, D, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_full_list_from_noise_is_ddpm_to_the_bit():
    base = small_policy(sampler=ddpm(N))
    noise = torch.randn(2, TP, D, generator=torch.Generator().manual_seed(0))
    policy, state = warm(base, noise, levels=tuple(range(N - 1, -1, -1)), shift=0)
    obs = {STATE: observations(2, 1)[0]}
    ours, _ = policy.act(obs, state, generator=generators(1, 2))
    reference, _ = base.act(obs, {}, noise=noise, generator=generators(1, 2))
    assert torch.equal(ours, reference)
    # to relabel changes nothing where no level is skipped
    policy, _ = warm(base, noise, levels=tuple(range(N - 1, -1, -1)), shift=0, relabel_skips=True)
    assert torch.equal(policy.act(obs, state, generator=generators(1, 2))[0], reference)


def test_the_empty_list_replays_the_shifted_chunk():
    base, chunk = small_policy(), chunks()
    policy, state = warm(base, chunk, levels=())
    answer, after = policy.act({STATE: observations(2, 1)[0]}, state)
    assert torch.equal(answer, base.normalizer.denormalize("action", chunk[:, 1 + TA : 1 + 2 * TA]))
    assert torch.equal(after["chunk"], shifted(chunk, TA))
    assert policy.nfe == 0


def test_level_0_alone_is_the_clipped_prediction_of_the_guess():
    base, chunk = small_policy(sampler=ddpm(N)), chunks()
    policy, state = warm(base, chunk, levels=(0,))
    obs = {STATE: observations(2, 1)[0]}
    _, after = policy.act(obs, state)
    expected = base.denoiser(shifted(chunk, TA), 0.0, base.encode(obs)).clamp(-1, 1)
    torch.testing.assert_close(after["chunk"], expected)


def test_shift():
    chunk = chunks()
    moved = shifted(chunk, 3)
    assert torch.equal(moved[:, : TP - 3], chunk[:, 3:])
    assert torch.equal(moved[:, TP - 3 :], chunk[:, -1:].expand(-1, 3, -1))
    assert shifted(chunk, 0) is chunk
    assert torch.equal(shifted(shifted(chunk, 1), 2), moved)
    assert torch.equal(shifted(chunk, TP + 5), chunk[:, -1:].expand(-1, TP, -1))


def test_residual_table_of_the_spec():
    table = {
        0.02: (0.19, 0.11, 0.07, 0.03, 0.01, 0.00, 0.00),
        0.05: (0.59, 0.43, 0.31, 0.18, 0.07, 0.02, 0.01),
        0.10: (0.85, 0.75, 0.65, 0.48, 0.23, 0.08, 0.02),
        0.30: (0.98, 0.97, 0.95, 0.89, 0.74, 0.44, 0.17),
    }
    for std, row in table.items():
        ours = [residual(COSINE, tuple(range(k, -1, -1)), std) for k in (1, 2, 3, 5, 10, 20, 40)]
        assert ours == pytest.approx(row, abs=0.0051)  # the table is rounded to 0.01
    # "[3,1,0] leaves .43 at s=.05, [15,13,..,0] .11": with its relabelled skips
    assert residual(COSINE, (3, 1, 0), 0.05, relabel_skips=True) == pytest.approx(0.43, abs=0.0051)
    ten = (15, 13, 11, 9, 7, 5, 3, 2, 1, 0)  # ten calls from 15, as the published list for Square
    assert residual(COSINE, ten, 0.05, relabel_skips=True) == pytest.approx(0.11, abs=0.0051)
    # with honest steps the posterior means compose: a skipped list loses nothing, for a Gaussian
    assert residual(COSINE, ten, 0.05) == pytest.approx(residual(COSINE, tuple(range(15, -1, -1)), 0.05))


@pytest.mark.parametrize("relabel", [False, True])
@pytest.mark.parametrize("levels", [(2, 1, 0), (10, 5, 0), (40,)])
def test_warm_steps_with_an_exact_denoiser_leave_the_residual(levels, relabel):
    std, mean = 0.1, torch.tensor([0.2, -0.3], dtype=torch.float64)
    oracle = GaussianDenoiser(mean, std**2 * torch.eye(D, dtype=torch.float64), COSINE)
    policy = RTIPolicy(small_policy(sampler=SamplerConfig("ddim", 5)), RTIConfig())
    policy = RTIPolicy(policy.policy, RTIConfig(levels=levels, relabel_skips=relabel))
    offset = torch.tensor([[[0.05, -0.4]]], dtype=torch.float64)

    class Oracle:
        def __call__(self, x, t, cond=None):
            return torch.stack([oracle(x[:, i], t, None) for i in range(x.shape[1])], 1)

    type(policy).denoiser, saved = property(lambda self: Oracle()), RTIPolicy.__dict__.get("denoiser")
    try:
        # noise of the steps cancels between two runs with the same generator
        ends = [policy._refined(mean + sign * offset, {}, torch.Generator().manual_seed(0)) for sign in (1, -1)]
    finally:
        if saved is None:
            del RTIPolicy.denoiser
    left = (ends[0] - ends[1]) / (2 * offset)
    expected = residual(COSINE, levels, std, relabel_skips=relabel)
    torch.testing.assert_close(left, torch.full_like(left, expected), rtol=0, atol=1e-4)


def test_only_new_rows_pay_for_a_full_call():
    policy = RTIPolicy(small_policy(sampler=ddpm(20)), RTIConfig())
    sizes = []
    policy.network.register_forward_pre_hook(lambda module, inputs: sizes.append(float(inputs[1][0])))
    observed = observations(2, 3)
    run(policy, observed, generators(1, 2))
    assert len(sizes) == 20 + 3 + 3
    assert sizes[-3:] == [2.0, 1.0, 0.0]
    sizes.clear()
    together, _ = run(policy, observed, generators(1, 2), {(2, 0)})
    assert len(sizes) == 20 + 3 + 3 + 20  # the last call serves a warm and a new row
    alone, _ = run(policy, observed, generators(1, 2))
    assert torch.equal(together[:, 1], alone[:, 1])
    assert not torch.equal(together[2, 0], alone[2, 0])


def test_lists():
    assert warm_levels(RTIConfig(), COSINE) == (2, 1, 0)  # the published one of the easier tasks
    assert spaced(20, 3, COSINE) == (20, 10, 0)
    assert spaced(7, 1, COSINE) == (7,)
    flow = small_policy(process="flow").process
    start = warm_levels(RTIConfig(num_steps=2), flow)
    assert start == pytest.approx((0.058 / 1.058, 0.029 / 1.058))
    for levels in ((0, 1), (100,), (2.5,), (3, 3)):
        with pytest.raises(DipoleError, match="warm start levels"):
            warm_levels(RTIConfig(levels=levels), COSINE)
    with pytest.raises(DipoleError, match="choose from 1 to 3 steps"):
        warm_levels(RTIConfig(start_level=2, num_steps=9), COSINE)
    with pytest.raises(DipoleError, match="relabel_skips"):
        RTIPolicy(small_policy(process="flow"), RTIConfig(relabel_skips=True))
    with pytest.raises(DipoleError, match="indices of the binary actions"):
        RTIPolicy(small_policy(), RTIConfig(discrete_mode="clip"))
    with pytest.raises(DipoleError, match="actions 0 to 1"):
        RTIPolicy(small_policy(), RTIConfig(discrete_mode="clip", discrete=(2,)))


@pytest.mark.parametrize("mode", ["clip", "scale"])
def test_binary_actions(mode):
    base = small_policy(sampler=ddpm(20))
    policy, state = warm(base, chunks(), discrete=(1,), discrete_mode=mode, levels=(20, 10, 0))
    chunk, guess = policy._discrete(state["chunk"])
    size = 1.0 if mode == "clip" else 0.1
    assert torch.equal(chunk[..., 1].abs(), torch.full((2, TP), size))
    assert torch.equal(chunk[..., 1] > 0, state["chunk"][..., 1] > 0)
    assert torch.equal(chunk[..., 0], state["chunk"][..., 0])
    if mode == "clip":
        torch.testing.assert_close(guess[..., 1].abs(), torch.full((2, TP), 0.1))
    assert torch.equal(policy._discrete(chunk)[0], chunk), "snapping is idempotent"
    answer, after = policy.act({STATE: observations(2, 1)[0]}, state, generator=generators(1, 2))
    normal = base.normalizer.normalize("action", answer)
    torch.testing.assert_close(normal[..., 1].abs(), torch.full((2, TA), size), atol=1e-6, rtol=0)
    if mode == "clip":
        assert after["chunk"][..., 1].abs().max() <= 0.1 + 1e-6


def test_scaled_normalizer():
    normalizer = small_policy().normalizer
    scaled = scale_discrete(normalizer, (1,), 10.0)
    x = torch.tensor([[-3.0, 5.0], [1.0, -2.0]])
    torch.testing.assert_close(
        scaled.normalize("action", x), normalizer.normalize("action", x) * torch.tensor([1.0, 0.1])
    )
    torch.testing.assert_close(scaled.denormalize("action", scaled.normalize("action", x)), x)
    with pytest.raises(DipoleError, match="binary action 2: the actions are 0 to 1"):
        scale_discrete(normalizer, (2,))
    assert torch.equal(scaled.normalize(STATE, torch.ones(3)), normalizer.normalize(STATE, torch.ones(3)))


def test_contraction_of_a_known_network_is_measured():
    """A network whose answer contracts exactly as an exact denoiser does gives the residual, and its std back."""
    policy, std = small_policy(sampler=SamplerConfig("ddim", 5)), 0.1

    def network(x, time, cond=None):
        alpha, sigma = COSINE.alpha(time), COSINE.sigma(time)
        return (x * (sigma / (alpha**2 * std**2 + sigma**2))[:, None, None]).float()

    policy.network.forward = network
    batch = {STATE: observations(8, 1)[0], "action": torch.zeros(8, TP, D)}
    starts = candidates(COSINE)
    assert starts == (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60)
    options = RTIConfig()
    table = contraction_table(policy, batch, starts, options, generator=torch.Generator().manual_seed(0))
    for row in table:
        levels = spaced(row.level, min(3, int(row.level) + 1), COSINE)
        # float32, and displacements of 0.05: differences of 1e-7 are 1e-5 of them
        assert row.left == pytest.approx(residual(COSINE, levels, std), abs=1e-4)
        assert row.left_high == pytest.approx(row.left, abs=1e-4)
    assert fitted_std(table, options, COSINE) == pytest.approx(std, rel=0.06)  # the grid's spacing is 12 %


def test_calibration_is_kept_as_json(tmp_path):
    from dipole.realtime import read_runtime, write_runtime
    from dipole.serialization import to_dict

    policy = small_policy()
    found = calibrate(policy, demonstrations(), left=2.0, windows=16)
    assert found.levels == warm_levels(replace(found, levels=None, num_steps=2), COSINE)
    assert found.start_level == 1.0, "any level leaves less than 2"
    assert all(isinstance(row, StartLevel) for row in found.table)
    assert (
        calibrate(policy, demonstrations(), left=0.0, windows=16).start_level
        == min(found.table, key=lambda row: row.left).level
    )
    runtime = Runtime("rti", to_dict(found))
    write_runtime(runtime, tmp_path)
    assert method_config(read_runtime(tmp_path)) == found
    assert apply(policy, read_runtime(tmp_path)).levels == (*found.levels, -1.0)
