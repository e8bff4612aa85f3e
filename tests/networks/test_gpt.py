"""BESO's network: the token layout of spec a 2b, causality, and sizes."""

import math

import pytest
import torch
from torch.nn import functional as F

from dipole.diffusion import EDM
from dipole.errors import DipoleError
from dipole.networks.gpt import GPT, CausalSelfAttention, GPTConfig, sigma_feature

SMALL = GPTConfig(embed_dim=16, num_layers=2, num_heads=2)
W, G, C, D = 4, 2, 5, 3


@pytest.fixture
def network():
    torch.manual_seed(0)
    return GPT(SMALL, D, W, {"obs": (W, C), "goal": (G, C)}).double().eval()


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    x, obs, goal = (torch.randn(2, n, c, generator=g, dtype=torch.float64) for n, c in [(W, D), (W, C), (G, C)])
    return x, EDM().network_time(torch.tensor([0.3, 0.7])), {"obs": obs, "goal": goal}


def test_sigma_feature_is_quarter_log_sigma():
    sigma = torch.tensor([0.01, 0.5, 1.0])
    torch.testing.assert_close(sigma_feature(EDM().network_time(sigma)), sigma.double().log().unsqueeze(-1) / 4)


def test_per_position_levels_are_refused(network, inputs):
    x, _, cond = inputs
    with pytest.raises(DipoleError, match="one noise level per row"):
        network(x, torch.zeros(2, W, dtype=torch.float64), cond)


def test_matches_token_by_token_construction(network, inputs):
    """The same tokens laid out one after the other by hand: [sigma, goals, s1, a1, ...], a_i at the position of s_i."""
    x, time, cond = inputs
    tokens = [network.embed_sigma(time[:, None] / 1000)]
    tokens += [network.embed_obs(cond["goal"][:, j]) + network.position[j] for j in range(G)]
    for i in range(W):
        tokens.append(network.embed_obs(cond["obs"][:, i]) + network.position[G + i])
        tokens.append(network.embed_action(x[:, i]) + network.position[G + i])
    h = torch.stack(tokens, dim=1)
    for block in network.blocks:
        h = block(h)
    expected = torch.stack([network.head(network.norm(h[:, 1 + G + 2 * i + 1])) for i in range(W)], dim=1)
    # float64 rounding only
    torch.testing.assert_close(network(x, time, cond), expected, rtol=1e-12, atol=1e-12)


def test_attention_is_textbook_causal_attention():
    torch.manual_seed(2)
    attention = CausalSelfAttention(8, 2, 0.0, 0.0).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, v = attention.qkv(x)[0].split(8, dim=-1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        score = q[:, part] @ k[:, part].T / math.sqrt(4)
        score = score.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        heads.append(score.softmax(-1) @ v[:, part])
    expected = attention.out(torch.cat(heads, -1))
    torch.testing.assert_close(attention(x)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("key", ["obs", "action"])
def test_an_output_never_sees_later_tokens(network, inputs, key):
    x, time, cond = inputs
    before = network(x, time, cond)
    for i in range(1, W):
        edited = x.clone() if key == "action" else cond["obs"].clone()
        edited[:, i] += 10
        after = network(edited, time, cond) if key == "action" else network(x, time, {**cond, "obs": edited})
        torch.testing.assert_close(after[:, :i], before[:, :i], rtol=0, atol=0)
        assert (after[:, i] - before[:, i]).abs().min() > 1e-6


def test_shorter_history_equals_history_padded_at_the_end(network, inputs):
    x, time, cond = inputs
    full = network(x, time, cond)
    for length in range(1, W):
        short = network(x[:, :length], time, {**cond, "obs": cond["obs"][:, :length]})
        # not bitwise: the kernels sum a shorter sequence in another order
        torch.testing.assert_close(short, full[:, :length], rtol=1e-12, atol=1e-12)


def test_goal_sigma_and_obs_all_matter(network, inputs):
    x, time, cond = inputs
    base = network(x, time, cond)
    assert not torch.allclose(base, network(x, time + 50, cond))
    assert not torch.allclose(base, network(x, time, {**cond, "goal": cond["goal"] + 1}))


def test_goal_free_network_and_wrong_shapes(inputs):
    x, time, cond = inputs
    network = GPT(SMALL, D, W, {"obs": (W, C)}).double()
    assert network(x, time, {"obs": cond["obs"]}).shape == x.shape
    with pytest.raises(DipoleError, match="'obs' is missing"):
        network(x, time, {})
    with pytest.raises(DipoleError, match="at most 4"):
        network(F.pad(x, (0, 0, 0, 1)), time, {"obs": F.pad(cond["obs"], (0, 0, 0, 1))})
    with pytest.raises(DipoleError, match="must equal Tp"):
        GPT(SMALL, D, W + 1, {"obs": (W, C)})
    with pytest.raises(DipoleError, match="embedded as observations"):
        GPT(SMALL, D, W, {"obs": (W, C), "goal": (1, C + 1)})
    with pytest.raises(DipoleError, match="do not divide"):
        GPT(GPTConfig(embed_dim=16, num_layers=1, num_heads=3), D, W, {"obs": (W, C)})


def test_number_of_parameters_of_the_kitchen_network():
    """12 d^2 + 13 d per block (GPT), plus embeddings, position table, final norm and head."""
    d, layers, action_dim, obs_dim = 360, 6, 9, 30
    network = GPT(GPTConfig(), action_dim, 4, {"obs": (4, obs_dim), "goal": (2, obs_dim)})
    outside = 2 * d + (obs_dim + 1) * d + (action_dim + 1) * d + 6 * d + 2 * d + (d + 1) * action_dim
    assert sum(p.numel() for p in network.parameters()) == layers * (12 * d**2 + 13 * d) + outside


def test_hook_sees_every_branch_once_and_can_silence_it(network, inputs):
    x, time, cond = inputs
    seen = []

    def hook(name, compute):
        seen.append(name)
        return compute()

    torch.testing.assert_close(network(x, time, cond, hook), network(x, time, cond), rtol=0, atol=0)
    assert tuple(seen) == network.branches
    silent = network(x, time, cond, lambda name, compute: torch.zeros_like(compute()))
    edited = network(x + 1, time, {**cond, "goal": cond["goal"] + 1}, lambda name, compute: 0 * compute())
    # without branches nothing is mixed: only the action's own embedding reaches the output
    assert not torch.allclose(silent, edited)
    other = {**cond, "goal": cond["goal"] + 1}
    torch.testing.assert_close(silent, network(x, time, other, lambda name, compute: 0 * compute()), rtol=0, atol=0)
