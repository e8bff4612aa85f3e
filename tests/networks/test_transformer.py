import pytest
import torch
from torch import nn

from dipole.errors import DipoleError
from dipole.networks import TransformerConfig
from dipole.networks.transformer import DecoderLayer

T, D, TO = 6, 2, 4
DIMS = {"obs": (TO, 5), "goal": (2, 3)}


def make(**options):
    torch.manual_seed(0)
    config = TransformerConfig(num_layers=2, num_heads=2, width=16, dropout=0.0, **options)
    # float64, so that "unchanged" can be exact to 1e-12 whatever kernel attention picks.
    return config.build(D, T, DIMS).double().eval()


def inputs():
    g = torch.Generator().manual_seed(1)
    cond = {key: torch.randn(1, *shape, generator=g, dtype=torch.float64) for key, shape in DIMS.items()}
    return torch.randn(1, T, D, generator=g, dtype=torch.float64), torch.tensor([40.0]).double(), cond


def changed_positions(network, x, time, cond, x2=None, time2=None, cond2=None):
    with torch.no_grad():
        before = network(x, time, cond)
        after = network(x if x2 is None else x2, time if time2 is None else time2, cond if cond2 is None else cond2)
    return (after - before).abs().amax(dim=(0, 2)) > 1e-12


@pytest.mark.parametrize("j", range(T))
def test_actions_do_not_see_later_actions(j):
    x, time, cond = inputs()
    edited = x.clone()
    edited[:, j] += 1
    assert changed_positions(make(), x, time, cond, x2=edited).tolist() == [i >= j for i in range(T)]


@pytest.mark.parametrize("j", range(TO))
def test_actions_do_not_see_later_observations(j):
    """Action To - 1, the first one executed, sees all of them."""
    x, time, cond = inputs()
    obs = cond["obs"].clone()
    obs[:, j] += 1
    changed = changed_positions(make(), x, time, cond, cond2={**cond, "obs": obs})
    assert changed.tolist() == [i >= j for i in range(T)]


@pytest.mark.parametrize("j", range(2))
def test_every_action_sees_goals(j):
    x, time, cond = inputs()
    goal = cond["goal"].clone()
    goal[:, j] += 1
    assert changed_positions(make(), x, time, cond, cond2={**cond, "goal": goal}).all()


@pytest.mark.parametrize("j", range(T))
def test_levels_per_position_follow_the_causal_rule(j):
    x, time, cond = inputs()
    levels = time[:, None].repeat(1, T)
    edited = levels.clone()
    edited[:, j] += 100
    changed = changed_positions(make(), x, levels, cond, time2=edited)
    assert changed.tolist() == [i >= j for i in range(T)]


def test_not_causal_sees_everything():
    x, time, cond = inputs()
    network = make(causal=False)
    edited, obs = x.clone(), cond["obs"].clone()
    edited[:, -1] += 1
    obs[:, -1] += 1
    assert changed_positions(network, x, time, cond, x2=edited).all()
    assert changed_positions(network, x, time, cond, cond2={**cond, "obs": obs}).all()


@pytest.mark.parametrize("masked", [False, True])
def test_layer_is_torchs_decoder_layer(masked):
    """The same weights under the same names in torch's own pre-norm decoder layer."""
    torch.manual_seed(0)
    ours = DecoderLayer(TransformerConfig(num_heads=4, width=32, dropout=0.0)).double().eval()
    theirs = nn.TransformerDecoderLayer(
        32, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    h, memory = torch.randn(3, 5, 32, dtype=torch.float64), torch.randn(3, 4, 32, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if masked else None
    memory_mask = torch.ones(5, 4, dtype=torch.bool).tril(1) if masked else None
    out = h + ours.self_attention(h, mask)
    out = out + ours.cross_attention(out, memory, memory_mask)
    out = out + ours.feedforward(out)
    # torch's masks mark what may NOT be seen.
    expected = theirs.eval()(
        h,
        memory,
        tgt_mask=None if mask is None else ~mask,
        memory_mask=None if memory_mask is None else ~memory_mask,
    )
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


def test_dropout_acts_in_training_only():
    x, time, cond = inputs()
    network = TransformerConfig(num_layers=1, num_heads=2, width=16, dropout=0.5).build(D, T, DIMS).double()
    torch.manual_seed(0)
    assert not torch.equal(network.train()(x, time, cond), network(x, time, cond))
    assert torch.equal(network.eval()(x, time, cond), network(x, time, cond))


def test_heads_must_divide_the_width():
    with pytest.raises(DipoleError, match="multiple of 2 x num_heads = 6"):
        TransformerConfig(num_heads=3, width=16).build(D, T, DIMS)
