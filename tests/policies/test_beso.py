"""BESO as a policy: history in explicit state, rows independent of each other, guidance, samplers, bounds, goals."""

import itertools
import math

import numpy as np
import pytest
import torch

from dipole.data import Episodes, Feature, Normalizer
from dipole.data.hindsight import HindsightWindows
from dipole.diffusion import VP, LogLogistic
from dipole.errors import DipoleError
from dipole.networks.gpt import GPTConfig
from dipole.policies import load_policy, save_policy
from dipole.policies.beso import BesoConfig, BesoPolicy, make_beso
from dipole.policies.config import SamplerConfig
from dipole.training import TrainConfig, fit

STATE, GOAL, C, D, W, G = "observation.state", "observation.goal", 3, 2, 4, 2
SMALL = GPTConfig(embed_dim=16, num_layers=2, num_heads=2, attention_dropout=0.0, residual_dropout=0.0)


def play(seed=0, episodes=6, length=20):
    rng = np.random.default_rng(seed)
    columns = {
        STATE: rng.normal(size=(episodes * length, C)).astype(np.float32) * [1, 5, 0.2] + [0, 2, -1],
        "action": rng.uniform(-3, 5, size=(episodes * length, D)),
    }
    columns = {key: value.astype(np.float32) for key, value in columns.items()}
    features = {STATE: Feature("float32", (C,)), "action": Feature("float32", (D,))}
    return Episodes(features, columns, np.arange(1, episodes + 1) * length, 10.0)


def make(seed=0, episodes=None, **options):
    episodes = play() if episodes is None else episodes
    stats = episodes.stats()
    settings = {
        "observation": {STATE: Feature("float32", (C,)), GOAL: Feature("float32", (C,))},
        "action": Feature("float32", (D,)),
        "action_low": tuple(float(v) for v in stats["action"]["min"]),
        "action_high": tuple(float(v) for v in stats["action"]["max"]),
        "window": W,
        "goal_horizon": G,
        "network": SMALL,
    }
    config = BesoConfig(**{**settings, **options})
    torch.manual_seed(seed)
    policy = BesoPolicy(config, Normalizer.fit(stats, config.normalization_modes())).eval()
    for parameter in policy.parameters():  # the initial weights are so small that nothing depends on anything
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return policy


def observations(batch, steps, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(steps, batch, C, generator=g), torch.randn(batch, C, generator=g)


def run(policy, states, goal, generators, noises=None):
    """Act through `states` `[steps, B, C]` as an environment would, the first observation repeated at the start."""
    batch = states.shape[1]
    state, actions = policy.initial_state(batch), []
    history = states[:1].expand(W, -1, -1)
    for step in range(len(states)):
        history = torch.cat([history[1:], states[step : step + 1]])
        obs = {STATE: history.transpose(0, 1), GOAL: goal[:, None].expand(-1, W, -1)}
        noise = None if noises is None else noises[step]
        chunk, state = policy.act(obs, state, noise=noise, generator=generators)
        actions.append(chunk)
    return torch.cat(actions, dim=1), state


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_reference_step_by_step():
    """One row, three steps, DDIM by hand on the growing sequence, as the published sampler writes it."""
    policy = make()
    states, goal = observations(1, 3)
    noises = torch.randn(3, 1, W, D, generator=torch.Generator().manual_seed(1))
    got, _ = run(policy, states, goal, None, noises)
    n, sigmas = policy.normalizer, [1.0, math.sqrt(0.005), 0.005, 0.0]
    cond_goal = n.normalize(STATE, goal).unsqueeze(1).expand(-1, G, -1)
    seen = n.normalize(STATE, states.transpose(0, 1))
    past = torch.zeros(1, 0, D)
    for step in range(3):
        x = torch.cat([past, 1.0 * noises[step][:, -1:]], dim=1)
        for sigma, lower in itertools.pairwise(sigmas):
            c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
            inside = policy.network(
                x / math.sqrt(sigma**2 + 0.25),
                torch.tensor([250 * math.log(sigma)]),
                {"obs": seen[:, : step + 1], "goal": cond_goal},
            )
            x = lower / sigma * x + (1 - lower / sigma) * (c_skip * x + c_out * inside)
        action = x[:, -1:].clamp(-1.1, 1.1)
        past = torch.cat([past, action], dim=1)
        # float32, three network calls of a chain that feeds on itself
        torch.testing.assert_close(n.normalize("action", got[:, step : step + 1]), action, rtol=1e-4, atol=1e-4)


def test_rows_do_not_depend_on_each_other_nor_on_how_the_batch_is_split():
    policy = make(sampler=SamplerConfig("ancestral", 3, "exponential"))
    states, goal = observations(3, 6)
    together, _ = run(policy, states, goal, generators(1, 2, 3))
    for row in range(3):
        alone, _ = run(policy, states[:, row : row + 1], goal[row : row + 1], generators(row + 1))
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-4)  # float32 in another batch


def test_reset_of_a_row_is_a_fresh_episode_and_leaves_the_others():
    policy = make()
    states, goal = observations(2, 5)
    _, state = run(policy, states, goal, generators(1, 2))
    assert state["count"].tolist() == [W - 1, W - 1]
    mask = torch.tensor([True, False])
    after = policy.reset(state, mask)
    assert after["count"].tolist() == [0, W - 1]
    assert float(after["actions"][0].abs().max()) == 0
    assert torch.equal(after["actions"][1], state["actions"][1])
    obs = {STATE: torch.randn(2, W, C), GOAL: torch.randn(2, W, C)}
    noise = torch.randn(2, W, D)
    mixed, _ = policy.act(obs, after, noise=noise)
    fresh, _ = policy.act(obs, policy.initial_state(2), noise=noise)
    old, _ = policy.act(obs, state, noise=noise)
    torch.testing.assert_close(mixed[0], fresh[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], old[1], rtol=1e-4, atol=1e-4)
    assert (fresh[0] - old[0]).abs().max() > 1e-3


def test_act_is_pure():
    policy = make()
    obs = {STATE: torch.randn(2, W, C), GOAL: torch.randn(2, W, C)}
    state = policy.initial_state(2)
    copies = {key: value.clone() for key, value in state.items()}
    first, _ = policy.act(obs, state, generator=generators(1, 2))
    second, _ = policy.act(obs, state, generator=generators(1, 2))
    assert torch.equal(first, second)
    assert all(torch.equal(state[key], copies[key]) for key in state)


def test_observations_before_the_episode_are_not_looked_at():
    policy = make()
    obs = {STATE: torch.randn(1, W, C), GOAL: torch.randn(1, W, C)}
    noise = torch.randn(1, W, D)
    first, _ = policy.act(obs, policy.initial_state(1), noise=noise)
    changed = obs[STATE].clone()
    changed[:, :-1] += 10
    second, _ = policy.act({**obs, STATE: changed}, policy.initial_state(1), noise=noise)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_guidance_is_the_stated_extrapolation():
    policy = make()
    cond = {"obs": torch.randn(2, W, C), "goal": torch.randn(2, G, C)}
    none = {**cond, "goal": torch.zeros(2, G, C)}
    x = torch.randn(2, W, D)
    given, free = policy.denoiser(x, 0.3, cond), policy.denoiser(x, 0.3, none)
    for scale in (0.0, 0.5, 1.0, 2.0):
        guided = policy.with_sampler(policy.sampler, guidance_scale=scale).denoiser(x, 0.3, cond)
        torch.testing.assert_close(guided, free + scale * (given - free), rtol=1e-5, atol=1e-5)
    assert (given - free).abs().max() > 1e-3


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 2), (0.0, 2), (1.5, 4)])
def test_one_forward_pass_at_scale_0_and_1(scale, rows):
    policy = make(guidance_scale=scale)
    seen = []
    policy.network.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    policy.act({STATE: torch.randn(2, W, C), GOAL: torch.randn(2, W, C)}, policy.initial_state(2))
    assert seen == [rows] * 3


SAMPLERS = ["ddim", "euler", "ancestral", "heun", "dpm2", "dpmpp-2s", "dpmpp-2m"]


@pytest.mark.parametrize("spacing", ["exponential", "linear", "karras"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_and_schedule_makes_as_many_calls_as_it_says(name, spacing):
    policy = make(sampler=SamplerConfig(name, 4, spacing))
    calls = []
    policy.network.register_forward_pre_hook(lambda module, args: calls.append(1))
    chunk, _ = policy.act({STATE: torch.randn(2, W, C), GOAL: torch.randn(2, W, C)}, policy.initial_state(2))
    assert chunk.shape == (2, 1, D)
    assert bool(torch.isfinite(chunk).all())
    assert len(calls) == policy.sampler.nfe == (7 if name in ("heun", "dpm2", "dpmpp-2s") else 4)


def test_actions_stay_within_the_data_and_a_tenth():
    policy = make()
    with torch.no_grad():
        policy.network.head.bias.fill_(100.0)
    chunk, _ = policy.act({STATE: torch.randn(8, W, C), GOAL: torch.randn(8, W, C)}, policy.initial_state(8))
    low, high = (torch.tensor(edge) for edge in (policy.config.action_low, policy.config.action_high))
    # min-max: 1.1 in normalised units is 5 % of the range beyond the edge
    torch.testing.assert_close(chunk.amax((0, 1)), high + 0.05 * (high - low), rtol=1e-5, atol=1e-5)
    loose = make(clip=None)
    with torch.no_grad():
        loose.network.head.bias.fill_(100.0)
    chunk, _ = loose.act({STATE: torch.randn(8, W, C), GOAL: torch.randn(8, W, C)}, loose.initial_state(8))
    assert bool((chunk.amax((0, 1)) > high + (high - low)).all())


def test_bounds_are_right_for_mean_std_actions_too():
    policy = make(normalization={"observation": "mean_std", "action": "mean_std"})
    with torch.no_grad():
        policy.network.head.bias.fill_(100.0)
    chunk, _ = policy.act({STATE: torch.randn(4, W, C), GOAL: torch.randn(4, W, C)}, policy.initial_state(4))
    high = policy.normalizer.normalize("action", torch.tensor(policy.config.action_high))
    torch.testing.assert_close(policy.normalizer.normalize("action", chunk).amax((0, 1)), 1.1 * high)


def test_three_ways_with_past_actions():
    """They differ only in the past's noise, so they agree at the first step of an episode and differ later."""
    states, goal = observations(2, 3)
    noises = torch.randn(3, 2, W, D, generator=torch.Generator().manual_seed(3))
    results = {
        kind: run(make(history=kind), states, goal, None, noises)[0] for kind in ("redenoise", "hold", "renoise")
    }
    for kind in ("hold", "renoise"):
        torch.testing.assert_close(results[kind][:, 0], results["redenoise"][:, 0], rtol=1e-4, atol=1e-5)
        assert (results[kind][:, 2] - results["redenoise"][:, 2]).abs().max() > 1e-3
    assert (results["hold"][:, 2] - results["renoise"][:, 2]).abs().max() > 1e-3


def test_renoised_history_has_the_noise_of_the_level():
    policy = make(history="renoise", sampler=SamplerConfig("ddim", 2, "exponential"))
    state = {"actions": torch.full((1, W - 1, D), 0.5), "count": torch.tensor([W - 1])}
    noise = torch.randn(1, W, D)
    seen = []
    policy.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    policy.act({STATE: torch.randn(1, W, C), GOAL: torch.randn(1, W, C)}, state, noise=noise)
    for x, sigma in zip(seen, (1.0, 0.005), strict=True):
        expected = (0.5 + sigma * noise[:, :-1]) / math.sqrt(sigma**2 + 0.25)
        torch.testing.assert_close(x[:, :-1], expected, rtol=1e-5, atol=1e-5)


def test_goal_dimensions_left_open_are_zero():
    goal = Feature("float32", (2,))
    policy = make(goal_dims=(2, 0), observation={STATE: Feature("float32", (C,)), GOAL: goal})
    tokens = policy._goal({GOAL: torch.tensor([[[7.0, 9.0]]]).expand(1, W, 2)})
    state = torch.tensor([9.0, 123.0, 7.0])
    expected = policy.normalizer.normalize(STATE, state) * torch.tensor([1.0, 0, 1])
    torch.testing.assert_close(tokens, expected.expand(1, G, C))
    with pytest.raises(DipoleError, match="goal_dims"):
        make(observation={STATE: Feature("float32", (C,)), GOAL: goal})


def test_loss_sees_hindsight_goals_and_zeros_where_there_are_none():
    policy = make()
    windows = HindsightWindows(play(), [STATE], W, G)
    batch = {key: torch.from_numpy(value) for key, value in windows.batch(np.arange(64)).items()}
    assert bool(batch["goal_is_missing"].any())
    seen = []
    policy.network.register_forward_pre_hook(lambda module, args: seen.append(args[2]["goal"]))
    loss = policy.loss(batch, torch.Generator().manual_seed(0))
    assert torch.equal(loss, policy.loss(batch, torch.Generator().manual_seed(0)))
    missing = batch["goal_is_missing"]
    assert bool((seen[0][missing] == 0).all())
    expected = policy.normalizer.normalize(STATE, batch["goal." + STATE])[~missing]
    torch.testing.assert_close(seen[0][~missing], expected)


@pytest.mark.parametrize("kind", ["per_sample", "per_element"])
def test_conditioning_dropout(kind):
    policy = make(cond_dropout=0.4, cond_dropout_kind=kind).train()
    windows = HindsightWindows(play(episodes=60), [STATE], W, G)
    rows = [i for i in range(len(windows.first)) if not windows.goal_frames(np.array([i]))[1][0]]
    batch = {key: torch.from_numpy(value) for key, value in windows.batch(np.array(rows)).items()}
    seen = []
    policy.network.register_forward_pre_hook(lambda module, args: seen.append(args[2]["goal"]))
    policy.loss(batch, torch.Generator().manual_seed(0))
    zero = seen[0] == 0
    # 800 and more rows: the standard error of a share of 0.4 is 0.017
    assert abs(float(zero.float().mean()) - 0.4) < 0.07
    whole = zero.flatten(1).all(1) | ~zero.flatten(1).any(1)
    assert bool(whole.all()) == (kind == "per_sample")


def test_training_levels_follow_the_truncated_log_logistic():
    time = make().objective.time
    assert time == LogLogistic(math.log(0.5), 0.5, 0.005, 1.0)
    sigma = time.sample((20_000,), make().process, torch.Generator().manual_seed(0))
    assert 0.005 <= float(sigma.min()) <= float(sigma.max()) <= 1.0

    def cdf(s):
        return 1 / (1 + np.exp(-(np.log(s) - math.log(0.5)) / 0.5))

    for s in (0.1, 0.3, 0.5, 0.8):
        expected = (cdf(s) - cdf(0.005)) / (cdf(1.0) - cdf(0.005))
        # standard error of a share of 20 000 draws: at most 0.0035
        assert abs(float((sigma <= s).double().mean()) - expected) < 0.015


def test_ddpm_objective_is_noise_prediction_with_the_level_as_log_noise_to_signal():
    policy = make(objective="ddpm", sampler=SamplerConfig("ddim", 3, "leading", clip=1.0))
    seen = []
    policy.network.register_forward_pre_hook(lambda module, args: seen.append(float(args[1][0])))
    chunk, _ = policy.act({STATE: torch.randn(2, W, C), GOAL: torch.randn(2, W, C)}, policy.initial_state(2))
    assert bool(torch.isfinite(chunk).all())
    process = VP.cosine(100)
    assert seen == pytest.approx([250 * math.log(process.sigma(t) / process.alpha(t)) for t in (66, 33, 0)], rel=1e-5)
    assert policy.objective.prediction_type == "epsilon"
    windows = HindsightWindows(play(), [STATE], W, G)
    batch = {key: torch.from_numpy(value) for key, value in windows.batch(np.arange(8)).items()}
    assert bool(torch.isfinite(policy.loss(batch, torch.Generator().manual_seed(0))))


def test_policy_without_goals():
    episodes = play()
    policy = make(episodes=episodes, goal=None, observation={STATE: Feature("float32", (C,))})
    chunk, _ = policy.act({STATE: torch.randn(2, W, C)}, policy.initial_state(2))
    assert chunk.shape == (2, 1, D)
    batch = {
        key: torch.from_numpy(v) for key, v in HindsightWindows(episodes, [STATE], W, G).batch(np.arange(8)).items()
    }
    assert bool(torch.isfinite(policy.loss(batch)))


def test_saved_and_loaded_policy_acts_the_same(tmp_path):
    policy = make()
    save_policy(policy, tmp_path / "p")
    loaded = load_policy(tmp_path / "p")
    assert loaded.config == policy.config
    obs = {STATE: torch.randn(2, W, C), GOAL: torch.randn(2, W, C)}
    noise = torch.randn(2, W, D)
    first, _ = policy.act(obs, policy.initial_state(2), noise=noise)
    second, _ = loaded.act(obs, loaded.initial_state(2), noise=noise)
    assert torch.equal(first, second)


def test_trained_by_the_ordinary_loop_saved_and_loaded(tmp_path):
    episodes = play()
    policy = make_beso(episodes, observation=[STATE], goal=GOAL, window=3, goal_horizon=1, network=SMALL)
    windows = HindsightWindows(episodes, [STATE], window=3, goal_horizon=1)
    fit(policy, windows, None, TrainConfig(steps=3, batch_size=8, precision="fp32", device="cpu"), tmp_path / "run")
    loaded = load_policy(tmp_path / "run")
    assert loaded.config.observation[GOAL].shape == (C,)
    obs = {STATE: torch.randn(2, 3, C), GOAL: torch.randn(2, 3, C)}
    assert loaded.act(obs, loaded.initial_state(2))[0].shape == (2, 1, D)


def test_new_policies_have_the_weights_of_their_seed_and_leave_the_global_one_alone():
    episodes = play()
    before = torch.get_rng_state()
    first, second, other = (
        make_beso(episodes, observation=[STATE], goal=GOAL, goal_dims=(0,), network=SMALL, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert first.config.observation[GOAL].shape == (1,)
    assert torch.equal(first.network.head.weight, second.network.head.weight)
    assert not torch.equal(first.network.head.weight, other.network.head.weight)


def test_mistakes_are_named():
    policy = make()
    good = {STATE: torch.randn(2, W, C), GOAL: torch.randn(2, W, C)}
    with pytest.raises(DipoleError, match=r"lacks 'observation\.goal'"):
        policy.act({STATE: good[STATE]}, policy.initial_state(2))
    with pytest.raises(DipoleError, match="has shape"):
        policy.act({**good, STATE: torch.randn(2, 1, C)}, policy.initial_state(2))
    with pytest.raises(ValueError, match="noise has shape"):
        policy.act(good, policy.initial_state(2), noise=torch.zeros(2, 1, D))
    with pytest.raises(DipoleError, match="HindsightWindows"):
        policy.loss({STATE: good[STATE], "action": torch.zeros(2, W, D)})
    with pytest.raises(DipoleError, match="not among the observations"):
        make(observation={STATE: Feature("float32", (C,))})
    with pytest.raises(DipoleError, match="vectors only"):
        make(observation={STATE: Feature("uint8", (4, 4, 3)), GOAL: Feature("float32", (C,))})
