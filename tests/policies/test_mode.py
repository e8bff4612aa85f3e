"""The MoDE policy: cached and routed agree, rows are independent, the loss holds both terms."""

import numpy as np
import pytest
import torch

from dipole.data import Feature, Normalizer
from dipole.errors import DipoleError
from dipole.networks.moe import MoDEConfig
from dipole.networks.routing import load_balance
from dipole.policies import load_policy, save_policy
from dipole.policies.config import SamplerConfig
from dipole.policies.mode import ModeConfig, ModePolicy

STATE, OTHER, GOAL, T, D = "observation.state", "observation.wrist", "observation.language", 6, 2
OBSERVATION = {GOAL: Feature("float32", (5,)), STATE: Feature("float32", (3,)), OTHER: Feature("float32", (4,))}


def make(seed=0, **options):
    settings = {
        "observation": OBSERVATION,
        "action": Feature("float32", (D,)),
        "goal": GOAL,
        "pred_horizon": T,
        "action_horizon": T,
        "network": MoDEConfig(embed_dim=16, num_layers=2, num_heads=2),
    }
    config = ModeConfig(**{**settings, **options})
    stats = {
        key: {"min": np.full(f.shape, -2.0), "max": np.full(f.shape, 3.0), "mean": np.zeros(f.shape)}
        for key, f in [*config.observation.items(), ("action", config.action)]
    }
    torch.manual_seed(seed)
    modes = {key: config.normalization_mode(key) for key in stats}
    policy = ModePolicy(config, Normalizer.fit(stats, modes)).eval()
    for parameter in policy.parameters():  # the initial weights are so small that nothing depends on anything
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return policy


def observe(batch=3, seed=1, horizon=1):
    g = torch.Generator().manual_seed(seed)
    return {key: torch.randn(batch, horizon, *f.shape, generator=g) for key, f in OBSERVATION.items()}


def window(batch=8, seed=2):
    return {**observe(batch, seed), "action": torch.randn(batch, T, D, generator=torch.Generator().manual_seed(seed))}


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_chunks_through_the_expert_cache_equal_those_without():
    policy = make()
    routed = policy.with_sampler(policy.sampler, expert_cache=False)
    obs, noise = observe(), torch.randn(3, T, D)
    first, state = policy.act(obs, {}, noise=noise)
    assert state == {}
    assert policy.network._cache is not None
    second, _ = routed.act(obs, {}, noise=noise)
    assert first.shape == (3, T, D)
    # ten float32 network calls; actions are of order one
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_routed_policy_makes_no_cache():
    policy = make()
    policy.with_sampler(policy.sampler, expert_cache=False).act(observe(), {})
    assert policy.network._cache is None


def test_rows_do_not_depend_on_how_the_batch_is_split():
    policy = make(sampler=SamplerConfig("ancestral", 4, "exponential"))
    obs = observe()
    together, _ = policy.act(obs, {}, generator=generators(1, 2, 3))
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in obs.items()}
        alone, _ = policy.act(one, {}, generator=generators(row + 1))
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-4)  # float32, another batch


def test_every_token_matters():
    policy = make()
    obs, noise = observe(), torch.randn(3, T, D)
    base, _ = policy.act(obs, {}, noise=noise)
    for key in OBSERVATION:
        changed, _ = policy.act({**obs, key: obs[key] + 1}, {}, noise=noise)
        assert (changed - base).abs().max() > 1e-4, key


def test_chunk_starts_at_now_and_is_in_physical_units():
    policy = make(obs_horizon=2, action_horizon=3)
    noise = torch.randn(2, T, D)
    obs = observe(2, horizon=2)
    chunk, _ = policy.act(obs, {}, noise=noise)
    assert chunk.shape == (2, 3, D)
    longer = make(obs_horizon=2, action_horizon=5)
    other, _ = longer.act(obs, {}, noise=noise)
    torch.testing.assert_close(other[:, :3], chunk)
    with torch.no_grad():
        policy.network.head.weight.zero_()
        policy.network.head.bias.zero_()
    zero = policy.with_sampler(SamplerConfig("ddim", 1, "exponential"))
    chunk, _ = zero.act(obs, {}, noise=torch.zeros(2, T, D))
    torch.testing.assert_close(chunk, torch.full((2, 3, D), 0.5))  # the middle of [-2, 3]


def test_loss_is_denoising_plus_weighted_balance():
    batch, g = window(), torch.Generator
    for weight, kind in ((0.0, "full"), (0.5, "full"), (0.5, "selected")):
        policy = make(balance=weight, balance_kind=kind)
        parts = policy.losses(batch, g().manual_seed(0))
        loss = policy.loss(batch, g().manual_seed(0))
        torch.testing.assert_close(loss, parts["denoising"] + weight * parts["balance"])
    assert float(parts["balance"].detach()) > 0
    full = make(balance_kind="full").losses(batch, g().manual_seed(0))["balance"]
    assert float((full - parts["balance"]).detach().abs()) > 1e-5


def test_balance_is_that_of_the_routings_used():
    policy = make().train()
    seen = []
    route = policy.network.route

    def spy(*args, **kwargs):
        out = route(*args, **kwargs)
        seen.append(out[1])
        return out

    policy.network.route = spy
    parts = policy.losses(window(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(parts["balance"], load_balance(seen[0]))


def test_training_draws_come_from_the_generator():
    policy = make(network=MoDEConfig(16, 2, 2, attention_dropout=0.0, residual_dropout=0.0, expert_dropout=0.0)).train()
    batch = window()
    first, second, third = (policy.loss(batch, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_goals_are_dropped_in_training_only():
    policy = make(cond_dropout=0.5)
    seen = []
    policy.network.embed_cond["goal"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    policy.loss(window(400), torch.Generator().manual_seed(0))
    policy.train().loss(window(400), torch.Generator().manual_seed(0))
    shares = [float((goal == 0).all(-1).float().mean()) for goal in seen]
    assert shares[0] == 0
    assert abs(shares[1] - 0.5) < 0.1  # 400 rows: standard error 0.025


def test_training_lowers_the_loss_and_refreshes_the_cache():
    policy = make()
    obs, noise = observe(), torch.randn(3, T, D)
    before, _ = policy.act(obs, {}, noise=noise)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        policy.train().loss(window(), torch.Generator().manual_seed(step)).backward()
        optimizer.step()
    policy.eval()
    after, _ = policy.act(obs, {}, noise=noise)
    routed, _ = policy.with_sampler(policy.sampler, expert_cache=False).act(obs, {}, noise=noise)
    torch.testing.assert_close(after, routed, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-3


def test_saved_and_loaded_policy_acts_the_same(tmp_path):
    policy = make()
    save_policy(policy, tmp_path / "p")
    loaded = load_policy(tmp_path / "p")
    assert loaded.config == policy.config
    obs, noise = observe(), torch.randn(3, T, D)
    assert torch.equal(policy.act(obs, {}, noise=noise)[0], loaded.act(obs, {}, noise=noise)[0])


def test_without_a_goal():
    features = {STATE: OBSERVATION[STATE]}
    policy = make(observation=features, goal=None)
    batch = {STATE: torch.randn(4, 1, 3), "action": torch.randn(4, T, D)}
    assert bool(torch.isfinite(policy.train().loss(batch)))
    assert policy.eval().act({STATE: torch.randn(2, 1, 3)}, {})[0].shape == (2, T, D)


def test_mistakes_are_named():
    policy = make()
    with pytest.raises(DipoleError, match=r"lacks 'observation\.wrist'"):
        policy.act({key: value for key, value in observe().items() if key != OTHER}, {})
    with pytest.raises(DipoleError, match="has shape"):
        policy.act(observe(horizon=2), {})
    with pytest.raises(ValueError, match="noise has shape"):
        policy.act(observe(), {}, noise=torch.zeros(3, 1, D))
    with pytest.raises(DipoleError, match="not among the observations"):
        make(goal="observation.goal")
    with pytest.raises(DipoleError, match="configure an image encoder"):
        make(observation={**OBSERVATION, "observation.image": Feature("image", (8, 8, 3))})
