"""The packed back end computes the same function: every network shape, batch, level form, hook, precision."""

import numpy as np
import pytest
import torch

from dipole import networks
from dipole.data import Episodes, Feature
from dipole.errors import DipoleError
from dipole.policies import SamplerConfig, make_config, make_policy
from dipole.realtime import Runtime, apply
from dipole.realtime.packed import PackedLinear, can_pack, check, pack

# float32 rounding of a few dozen products of order one; the largest seen is 2e-6.
ROUNDING = 1e-5
UNETS = (
    {"down_dims": (16, 32)},
    {"down_dims": (64, 128, 256)},  # has weights large enough for oneDNN's layout
    {"down_dims": (16,), "kernel_size": 3},
    {"down_dims": (16, 32, 48), "film_scale": False, "n_groups": 4},
    {"down_dims": (16, 32), "per_position_levels": True},
)
MLPS = ({}, {"width": 64, "num_blocks": 2}, {"per_position_levels": True})


def build(name, options, cond=True, seed=0):
    torch.manual_seed(seed)
    dims = {"obs": (2, 5), "goal": (1, 3)} if cond else {}
    network = networks.build(networks.full_config({"name": name, **options}), 3, 16, dims).eval()
    with torch.no_grad():  # norms and heads start at one, zero or almost zero: make every parameter count
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.abs().mean().clamp(min=0.1))
    return network


def batch(size, cond=True):
    generator = torch.Generator().manual_seed(size)
    shapes = {"obs": (2, 5), "goal": (1, 3)} if cond else {}
    values = {key: torch.randn(size, *shape, generator=generator) for key, shape in shapes.items()}
    return torch.randn(size, 16, 3, generator=generator), 1000 * torch.rand(size, generator=generator), values


CASES = [*(("unet1d", options) for options in UNETS), *(("mlp", options) for options in MLPS)]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("size", [1, 5])
@torch.no_grad()
def test_same_function(name, options, size):
    network = build(name, options)
    x, time, cond = batch(size)
    packed = pack(network)
    expected = network(x, time, cond)
    assert (packed(x, time, cond) - expected).abs().max() <= ROUNDING * expected.abs().max()
    # Prepared for some levels, called at one of them, told as one number for all rows.
    times = torch.tensor([900.0, 300.0, 10.0], dtype=torch.float64)
    ready = packed.prepare(times, cond)
    shared = torch.tensor(300.0).expand(size)
    expected = network(x, shared, cond)
    assert (ready(x, shared, cond) - expected).abs().max() <= ROUNDING * expected.abs().max()
    # At rows' own levels, or one it was not prepared for, it computes the constants then.
    for other in (time, torch.full((size,), 77.0)):
        expected = network(x, other, cond)
        assert (ready(x, other, cond) - expected).abs().max() <= ROUNDING * expected.abs().max()


@torch.no_grad()
def test_without_conditioning_and_with_a_level_per_position():
    network = build("unet1d", {"down_dims": (16, 32)}, cond=False)
    x, time, _ = batch(2, cond=False)
    torch.testing.assert_close(pack(network)(x, time), network(x, time), atol=ROUNDING, rtol=ROUNDING)
    for name, options in (("unet1d", UNETS[4]), ("mlp", MLPS[2])):
        network = build(name, options)
        x, _, cond = batch(2)
        levels = 1000 * torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
        expected = network(x, levels, cond)
        assert (pack(network)(x, levels, cond) - expected).abs().max() <= ROUNDING * expected.abs().max()


@pytest.mark.parametrize(("name", "options"), [("unet1d", UNETS[0]), ("mlp", MLPS[1])])
@torch.no_grad()
def test_hooks_see_the_same_branches(name, options):
    network = build(name, options)
    x, time, cond = batch(1)

    def recording(seen):
        def hook(branch, compute):
            value = compute()
            # The U-Net's features are [B, C, T], the packed ones [B, T, C].
            seen[branch] = value.sum()
            return torch.zeros_like(value) if branch.endswith("1") else value

        return hook

    plain, packed = {}, {}
    expected = network(x, time, cond, recording(plain))
    output = pack(network)(x, time, cond, recording(packed))
    assert list(plain) == list(packed) == list(network.branches)
    torch.testing.assert_close(output, expected, atol=ROUNDING, rtol=1e-4)
    for branch, value in plain.items():
        torch.testing.assert_close(packed[branch], value, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_bfloat16_is_close():
    network = build("unet1d", UNETS[1])
    x, time, cond = batch(1)
    expected = network(x, time, cond)
    output = pack(network, torch.bfloat16)(x, time, cond)
    assert output.dtype == torch.float32
    # 8 bits of mantissa through thirty layers.
    assert (output - expected).abs().max() <= 0.05 * expected.abs().max()


def test_packed_linear_in_both_layouts():
    generator = torch.Generator().manual_seed(0)
    for size in (32, 512):
        weight, bias = torch.randn(size, size, generator=generator), torch.randn(size, generator=generator)
        linear = PackedLinear(weight, bias, torch.float32, 4)
        assert linear.packed == (can_pack() and size == 512)
        for rows in (1, 4, 70):
            x = torch.randn(rows, size, generator=generator)
            torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, weight, bias), atol=1e-3, rtol=1e-5)


@pytest.fixture(scope="module")
def policy():
    rng = np.random.default_rng(0)
    features = {"observation.state": Feature("float32", (4,)), "action": Feature("float32", (2,))}
    episodes = [{key: rng.random((30, *f.shape), dtype=np.float32) for key, f in features.items()} for _ in range(3)]
    data = Episodes.from_list(episodes, features, 10.0, ())
    return make_policy(make_config(data, network={"name": "unet1d", "down_dims": [16, 32]}), data).eval()


@pytest.mark.parametrize("sampler", [SamplerConfig("euler", 5), SamplerConfig("heun", 3), SamplerConfig("flow-sde", 4)])
def test_a_policy_acts_the_same(policy, sampler):
    obs = {"observation.state": torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(1))}
    policy = policy.with_sampler(sampler)
    packed = apply(policy, Runtime(backend="packed"))
    expected, _ = policy.act(obs, {}, generator=torch.Generator().manual_seed(2))
    chunk, _ = packed.act(obs, {}, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(chunk, expected, atol=1e-4, rtol=1e-4)
    assert type(policy.network).__name__ == "UNet1D"  # the original stays


def test_what_cannot_be_packed_is_refused(policy):
    with pytest.raises(DipoleError, match="knows U-Nets and MLPs, not Transformer"):
        pack(networks.build(networks.full_config({"name": "transformer"}), 3, 16, {"obs": (2, 5)}))
    with pytest.raises(DipoleError, match="packs float32 weights, these are torch.float64"):
        pack(build("mlp", MLPS[1]).double())
    with pytest.raises(DipoleError, match="has no int8: use fp32 or bf16"):
        apply(policy, Runtime(backend="packed", precision="int8"))


def test_a_wrong_packing_is_noticed():
    network = build("mlp", MLPS[1])
    packed = pack(network)
    x, _, cond = batch(1)
    assert check(packed, network, torch.float32, tuple(x.shape), cond) < 1e-5
    packed.body.blocks[0][0].weight.mul_(1.1)
    with pytest.raises(DipoleError, match="differs from the network by"):
        check(packed, network, torch.float32, tuple(x.shape), cond)


COMPILED = [
    ("mlp", {"width": 32, "num_blocks": 1}),
    ("mlp", {"width": 32, "num_blocks": 1, "per_position_levels": True}),
    ("unet1d", {"down_dims": (16,), "kernel_size": 3}),
]


@pytest.mark.slow  # compiling takes half a minute for an MLP, more for a U-Net
@pytest.mark.parametrize(("name", "options"), COMPILED, ids=str)
@torch.no_grad()
def test_compiled_steps(name, options, capfd):
    network = build(name, options)
    x, time, cond = batch(2)
    compiled = pack(network, compiled=True)
    expected = network(x, time, cond)
    assert (compiled(x, time, cond) - expected).abs().max() <= ROUNDING * expected.abs().max()
    ready = compiled.prepare(torch.tensor([900.0, 300.0]), cond)
    for level in (900.0, 300.0):  # the same graph with other constants
        shared = torch.tensor(level).expand(2)
        expected = network(x, shared, cond)
        assert (ready(x, shared, cond) - expected).abs().max() <= ROUNDING * expected.abs().max()
    seen = []
    hooked = compiled(x, time, cond, hook=lambda branch, compute: seen.append(branch) or compute())
    assert tuple(seen) == network.branches
    assert (hooked - network(x, time, cond)).abs().max() <= ROUNDING * expected.abs().max()
    assert capfd.readouterr().err == ""  # inductor's own reports are not for users


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DipoleError, match="needs a C\\+\\+ compiler.*use the back end 'packed'"):
        pack(build("mlp", {}), compiled=True)
