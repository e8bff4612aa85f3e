"""MoDE: routing, experts, load balance and the exact expert cache (spec a 3e)."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dipole.diffusion import DPM2, EDM, NetworkDenoiser, sample
from dipole.errors import DipoleError
from dipole.networks.expert_cache import PreparedMoDE, fingerprint
from dipole.networks.moe import Experts, MoDE, MoDEConfig
from dipole.networks.routing import Router, Routing, load_balance

D, T = 3, 5
COND = {"goal": (1, 4), "obs": (2, 6)}
# Scale of router weights in tests: with the initial 0.02 all experts are nearly equally likely at every level.
SHARP = 40.0


def make(dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    settings = {"embed_dim": 16, "num_layers": 3, "num_heads": 2, **options}
    network = MoDE(MoDEConfig(**settings), D, T, COND).to(dtype).eval()
    with torch.no_grad():
        for block in network.blocks:
            for parameter in block.router.parameters():
                parameter.mul_(SHARP)
            block.experts.b1.normal_(std=0.1)  # zero biases would hide a mistake in how they are fused
    return network


def inputs(batch=3, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, T, D, generator=g, dtype=dtype)
    return x, {key: torch.randn(batch, *shape, generator=g, dtype=dtype) for key, shape in COND.items()}


def times(*sigmas, dtype=torch.float64):
    return EDM().network_time(torch.tensor(sigmas)).to(dtype)


LEVELS = EDM(0.001, 80.0).levels(10, "exponential")


def reference_block(block, x, noise):
    """One block in plain loops over rows and experts, from the equations of the module's docstring."""
    x = x + block.attention(block.norm_attention(x) + noise[:, None])
    normed = block.norm_experts(x)
    p = block.router.logits(noise).softmax(-1)
    out = []
    for row in range(len(x)):
        best = sorted(range(p.shape[1]), key=lambda e: -p[row, e])[: block.router.top_k]
        total = sum(p[row, e] for e in best)
        mixed = torch.zeros_like(x[row])
        for e in best:
            hidden = F.linear(normed[row], block.experts.w1[e], block.experts.b1[e])
            half = hidden.shape[-1] // 2
            u, g = hidden[:, :half], hidden[:, half:]
            mixed = mixed + p[row, e] / total * F.linear(u * g * torch.sigmoid(g), block.experts.w2[e])
        out.append((x[row] if block.residual == "prenorm" else normed[row]) + mixed)
    return torch.stack(out)


@pytest.mark.parametrize("residual", ["prenorm", "code"])
@pytest.mark.parametrize("router", ["mlp", "linear"])
def test_network_equals_brute_force(residual, router):
    network = make(residual=residual, router=router)
    x, cond = inputs()
    time = times(0.01, 0.5, 20.0)
    noise = network.embed_noise(time[:, None] / 1000)
    tokens = [network.embed_cond["goal"](cond["goal"]), network.embed_cond["obs"](cond["obs"]), network.embed_action(x)]
    h = torch.cat([noise[:, None], torch.cat(tokens, 1) + network.position], dim=1)
    for block in network.blocks:
        h = reference_block(block, h, noise)
    expected = network.head(network.norm(h[:, -T:]))
    torch.testing.assert_close(network(x, time, cond), expected, rtol=1e-11, atol=1e-12)  # float64 rounding


def test_prenorm_and_code_residuals_differ():
    x, cond = inputs()
    outputs = [make(residual=residual)(x, times(1.0).expand(3), cond) for residual in ("prenorm", "code")]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_experts_and_their_gradients_equal_a_loop_over_rows():
    experts = make(num_experts=4, top_k=2).blocks[0].experts
    chosen = torch.tensor([[0, 2], [2, 0], [1, 2], [0, 1], [2, 1]])  # nobody takes the last expert
    inputs = [torch.randn(5, T, 16, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)]
    slope = torch.randn(5, T, 16, dtype=torch.float64)
    found = []
    for grouped in (True, False):
        x, weights = (value.clone().requires_grad_() for value in inputs)
        if grouped:
            out = experts(x, Routing(torch.zeros(5, 4), chosen, weights))
        else:
            rows = [[weights[b, k] * experts.one(e, x[b]) for k, e in enumerate(chosen[b].tolist())] for b in range(5)]
            out = torch.stack([sum(parts) for parts in rows])
        leaves = (x, weights, experts.w1, experts.b1, experts.w2)
        found.append([out.detach(), *torch.autograd.grad((slope * out).sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)  # float64 rounding


def test_trains_in_bfloat16_without_warnings():
    network, (x, cond) = make(torch.float32).train(), inputs(dtype=torch.float32)
    time = times(0.01, 0.5, 20.0, dtype=torch.float32)
    for block in network.blocks:  # dropout would hide the rounding
        block.attention.attention_dropout = 0.0
        block.attention.dropout.p = block.experts.dropout.p = 0.0
    out, slopes = [], []
    for enabled in (False, True):
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            warnings.simplefilter("error")
            out.append(network.route(x, time, cond, torch.Generator().manual_seed(0))[0].float())
            slopes.append(torch.autograd.grad(out[-1].sum(), network.blocks[0].experts.w1)[0])
    # bfloat16 has 8 bits, so 0.4 % per operation, and there are a dozen in a row
    assert 0 < (out[0] - out[1]).abs().max() < 0.05 * out[0].abs().max()
    assert (slopes[0] - slopes[1]).norm() < 0.1 * slopes[0].norm()


def test_one_expert_is_a_dense_block():
    network = make(num_experts=1, top_k=1)
    experts = network.blocks[0].experts
    normed = torch.randn(3, T, 16, dtype=torch.float64)
    routing = network.blocks[0].router(torch.randn(3, 16, dtype=torch.float64))
    u, g = F.linear(normed, experts.w1[0], experts.b1[0]).chunk(2, -1)
    torch.testing.assert_close(experts(normed, routing), F.linear(u * F.silu(g), experts.w2[0]), rtol=0, atol=1e-15)
    assert torch.equal(routing.weights, torch.ones(3, 1, dtype=torch.float64))


def test_all_experts_with_a_zero_router_are_averaged():
    network = make(num_experts=4, top_k=4)
    block = network.blocks[0]
    with torch.no_grad():
        for parameter in block.router.parameters():
            parameter.zero_()
    x = torch.randn(2, T, 16, dtype=torch.float64)
    mean = torch.stack([block.experts.one(e, x) for e in range(4)]).mean(0)
    routing = block.router(torch.randn(2, 16, dtype=torch.float64))
    torch.testing.assert_close(block.experts(x, routing), mean, rtol=0, atol=1e-15)


@settings(deadline=None, max_examples=25)
@given(
    experts=st.integers(1, 6),
    top_k=st.integers(1, 6),
    residual=st.sampled_from(["prenorm", "code"]),
    router=st.sampled_from(["mlp", "linear"]),
    seed=st.integers(0, 10_000),
)
def test_fused_equals_routed(experts, top_k, residual, router, seed):
    network = make(
        num_experts=experts, top_k=min(top_k, experts), residual=residual, router=router, seed=seed, num_layers=2
    )
    x, cond = inputs(seed=seed)
    with torch.no_grad():
        fused = network.prepare(EDM().network_time(LEVELS[:-1]), cond)
        assert isinstance(fused, PreparedMoDE)
        for level in LEVELS[:-1]:
            time = EDM().network_time(level).expand(3)
            # the spec computed 5.7e-14 in float64; outputs here are of order 1, and a sum of 2 x 64 terms
            # may be reordered, so 1e-12 leaves a factor of about twenty
            torch.testing.assert_close(fused(x, time, cond), network(x, time, cond), rtol=0, atol=1e-12)


def test_fused_equals_routed_in_float32():
    network = make(dtype=torch.float32)
    x, cond = inputs(dtype=torch.float32)
    with torch.no_grad():
        fused = network.prepare(times(0.5), cond)
        time = times(0.5, dtype=torch.float32).expand(3)
        routed = network(x, time, cond)
        # spec: 1e-6 relative; ours is relative to the largest output, as small entries are differences of large ones
        assert (fused(x, time, cond) - routed).abs().max() < 1e-6 * routed.abs().max() * 4


def test_sampling_through_the_cache_equals_sampling_without_it():
    network = make()
    _, cond = inputs()
    process = EDM(0.001, 80.0)
    denoiser = NetworkDenoiser(network, process, "edm")
    start = 80.0 * torch.randn(3, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cached = sample(denoiser, process, LEVELS, cond=cond, init=start)
        plain = sample(lambda x, t, cond: denoiser(x, t, cond), process, LEVELS, cond=cond, init=start)
        assert network._cache is not None
    torch.testing.assert_close(cached, plain, rtol=1e-10, atol=1e-10)  # rounding of ten float64 network calls


def test_cache_is_reused_and_follows_the_list_of_levels():
    network = make()
    with torch.no_grad():
        first = network.prepare(times(0.5, 0.1)).cache
        level = first.at(network, times(0.5))
        assert network.prepare(times(0.5, 0.1)).cache is first
        assert first.at(network, times(0.5)) is level
        assert network.prepare(times(0.5, 0.2)).cache is not first
        network.clear_cache()
        again = network.prepare(times(0.5, 0.1)).cache
        assert again is not first
        for a, b in zip(level.experts, again.at(network, times(0.5)).experts, strict=True):
            assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


def test_a_level_told_in_another_precision_is_still_that_level_and_exact():
    network = make()
    x, cond = inputs()
    with torch.no_grad():
        prepared = network.prepare(times(0.3, 0.1, dtype=torch.float32))
        time = times(0.3).expand(3)
        assert float(times(0.3, dtype=torch.float32)) != float(times(0.3))
        torch.testing.assert_close(prepared(x, time, cond), network(x, time, cond), rtol=0, atol=1e-12)


def _fused_optimizer_step(network):
    _optimizer_step(network, fused=True)


def _optimizer_step(network, fused=False):
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=fused)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _one_expert(network):
    with torch.no_grad():
        network.blocks[1].experts.w2[2, 0, 0] += 1.0


def _data_write(network):
    for parameter in network.parameters():  # as some EMA code does; version counters do not move
        parameter.data.lerp_(torch.ones_like(parameter), 0.01)


def _load(network):
    network.load_state_dict(make(seed=7).state_dict())


def _replace(network):
    network.blocks[0].experts.b1 = torch.nn.Parameter(network.blocks[0].experts.b1.detach() + 1)


def _cast(network):
    network.float().double()


CHANGES = [_optimizer_step, _fused_optimizer_step, _one_expert, _data_write, _load, _replace, _cast]


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_the_weights_invalidates_the_cache(change):
    network = make()
    x, cond = inputs()
    levels, time = times(0.5, 0.1), times(0.5).expand(3)
    with torch.no_grad():
        before = network.prepare(levels)
        before(x, time, cond)
    change(network)
    with torch.no_grad():
        after = network.prepare(levels)
        assert after.cache is not before.cache
        torch.testing.assert_close(after(x, time, cond), network(x, time, cond), rtol=0, atol=1e-12)


def test_copies_do_not_share_a_stale_cache():
    network = make()
    x, cond = inputs()
    with torch.no_grad():
        time = times(0.5).expand(3)
        network.prepare(times(0.5))(x, time, cond)
        twin = copy.deepcopy(network)
        _one_expert(twin)
        torch.testing.assert_close(twin.prepare(times(0.5))(x, time, cond), twin(x, time, cond), rtol=0, atol=1e-12)


def test_cache_is_not_part_of_the_weights():
    network = make()
    keys = set(network.state_dict())
    with torch.no_grad():
        network.prepare(times(0.5))
    assert set(network.state_dict()) == keys


def test_level_not_in_the_cache_warns_and_routes():
    network = make()
    x, cond = inputs()
    time = times(0.3).expand(3)
    with torch.no_grad():
        prepared = network.prepare(times(0.5))
        with pytest.warns(RuntimeWarning, match="expert cache missed"):
            out = prepared(x, time, cond)
        assert torch.equal(out, network(x, time, cond))


def test_level_not_in_the_cache_raises_where_asked():
    network = make(cache_miss="raise")
    x, cond = inputs()
    with torch.no_grad(), pytest.raises(DipoleError, match="expert cache missed"):
        network.prepare(times(0.5))(x, times(0.3).expand(3), cond)


def test_rows_at_different_levels_are_a_miss():
    network = make()
    x, cond = inputs(batch=2)
    with torch.no_grad():
        prepared = network.prepare(times(0.5, 0.1))
        with pytest.warns(RuntimeWarning, match="missed"):
            out = prepared(x, times(0.5, 0.1), cond)
        assert torch.equal(out, network(x, times(0.5, 0.1), cond))


def test_midpoint_solver_falls_back_loudly_and_euler_is_silent():
    network = make()
    _, cond = inputs()
    process = EDM(0.001, 80.0)
    denoiser = NetworkDenoiser(network, process, "edm")
    start = torch.randn(3, T, D, dtype=torch.float64)
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match="missed"):
            sample(denoiser, process, process.levels(3, "exponential"), DPM2(), cond=cond, init=start)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sample(denoiser, process, process.levels(3, "exponential"), cond=cond, init=start)


def test_no_cache_in_training_or_where_gradients_of_weights_are_wanted():
    network = make()
    assert network.prepare(times(0.5)) is network  # gradients are enabled here
    network.train()
    with torch.no_grad():
        assert network.prepare(times(0.5)) is network
    frozen = make().requires_grad_(False)
    assert isinstance(frozen.prepare(times(0.5)), PreparedMoDE)


def test_guidance_can_differentiate_through_a_cache_made_in_inference_mode():
    network = make()
    x, cond = inputs()
    with torch.inference_mode():
        prepared = network.prepare(times(0.5))
        level = prepared.cache.at(network, times(0.5))
    assert not any(tensor.requires_grad or tensor.is_inference() for fused in level.experts for tensor in fused)
    leaf = x.clone().requires_grad_()
    prepared(leaf, times(0.5).expand(3), cond).sum().backward()
    other = x.clone().requires_grad_()
    network(other, times(0.5).expand(3), cond).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=0, atol=1e-12)


def test_routing_depends_on_the_level_only():
    network = make()
    time = times(0.01, 0.5, 20.0)
    x, cond = inputs()
    _, first = network.route(x, time, cond)
    _, second = network.route(x * 3 + 1, time, {key: value * -2 for key, value in cond.items()})
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.selected, b.selected)
        assert torch.equal(a.weights, b.weights)


def test_different_levels_use_different_experts():
    """With sharp routers the noisiest and the cleanest level do not share all experts in at least one block."""
    network = make()
    x, cond = inputs(batch=2)
    _, routings = network.route(x, times(0.001, 80.0), cond)
    assert any(set(r.selected[0].tolist()) != set(r.selected[1].tolist()) for r in routings)


def test_evaluation_takes_the_most_likely_and_renormalises():
    router = make().blocks[0].router
    noise = torch.randn(5, 16, dtype=torch.float64)
    routing = router(noise)
    p = router.logits(noise).softmax(-1)
    expected = p.sort(dim=-1, descending=True)
    assert torch.equal(routing.selected, expected.indices[:, :2])
    torch.testing.assert_close(routing.weights, expected.values[:, :2] / expected.values[:, :2].sum(-1, keepdim=True))
    torch.testing.assert_close(routing.probabilities.sum(-1), torch.ones(5, dtype=torch.float64))


def test_training_draws_without_replacement_in_proportion():
    torch.manual_seed(0)
    router = Router(MoDEConfig(embed_dim=4, num_experts=3, top_k=2, router="linear")).train()
    noise = torch.tensor([[1.0, 0, 0, 0]])
    with torch.no_grad():
        router.logits.weight.zero_()
        router.logits.weight[:, 0] = torch.tensor([0.6, 0.3, 0.1]).log()
    n = 20_000
    routing = router(noise.expand(n, -1), generator=torch.Generator().manual_seed(0))
    assert bool((routing.selected[:, 0] != routing.selected[:, 1]).all())
    first = torch.bincount(routing.selected[:, 0], minlength=3) / n
    # P(first, second) = p_i p_j / (1 - p_i); standard error of a share of 20 000 draws is at most 0.0035
    torch.testing.assert_close(first, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.015)
    pair = ((routing.selected[:, 0] == 0) & (routing.selected[:, 1] == 1)).float().mean()
    torch.testing.assert_close(pair, torch.tensor(0.6 * 0.3 / 0.4), rtol=0, atol=0.015)
    same = router(noise.expand(n, -1), generator=torch.Generator().manual_seed(0))
    assert torch.equal(same.selected, routing.selected)


@pytest.mark.parametrize("kind", ["full", "selected"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load_balance_is_k_at_uniform_routing(kind, top_k):
    experts, rows = 6, 12
    selected = torch.stack([(torch.arange(rows) * top_k + j) % experts for j in range(top_k)], dim=1)
    uniform = torch.full((rows, experts), 1 / experts)
    routing = Routing(uniform, selected, torch.full((rows, top_k), 1 / top_k))
    torch.testing.assert_close(load_balance([routing, routing], kind), torch.tensor(float(top_k)))


def test_load_balance_brute_force_and_its_two_kinds():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    selected = torch.tensor([[0, 1], [2, 1]])
    weights = torch.tensor([[7 / 9, 2 / 9], [2 / 3, 1 / 3]])
    share = torch.tensor([0.5, 1.0, 0.5])
    full = 3 * (share * torch.tensor([0.4, 0.25, 0.35])).sum()
    chosen = 3 * (share * torch.tensor([7 / 18, (2 / 9 + 1 / 3) / 2, 1 / 3])).sum()
    routing = Routing(p, selected, weights)
    torch.testing.assert_close(load_balance([routing]), full)
    torch.testing.assert_close(load_balance([routing], "selected"), chosen)


def test_load_balance_pushes_a_collapsed_router_apart():
    torch.manual_seed(0)
    router = Router(MoDEConfig(embed_dim=4, num_experts=4, top_k=1, router="linear")).train()
    noise = torch.tensor([[1.0, 0, 0, 0]]).expand(256, -1)
    with torch.no_grad():
        router.logits.weight.zero_()
        router.logits.weight[0, 0] = 3.0
    optimizer = torch.optim.SGD(router.parameters(), lr=0.3)
    g = torch.Generator().manual_seed(0)
    start = router(noise, g).probabilities.max()
    for _ in range(40):
        optimizer.zero_grad()
        load_balance([router(noise, g)]).backward()
        optimizer.step()
    assert router(noise, g).probabilities.max() < start - 0.3


def test_gradients_reach_router_and_chosen_experts_only():
    torch.manual_seed(0)
    config = MoDEConfig(embed_dim=8, num_experts=4, top_k=2, expert_dropout=0.0)
    experts, router = Experts(config).double(), Router(config).double().eval()
    noise = torch.randn(1, 8, dtype=torch.float64)
    routing = router(noise)
    experts(torch.randn(1, T, 8, dtype=torch.float64), routing).square().sum().backward()
    used = {e for e in range(4) if experts.w1.grad[e].abs().sum() > 0}
    assert used == set(routing.selected[0].tolist())
    assert router.logits[0].weight.grad.abs().sum() > 0


def test_half_precision_weights_take_float32_times():
    network = make(dtype=torch.bfloat16)
    x, cond = inputs(dtype=torch.bfloat16)
    time = times(0.5, dtype=torch.float32).expand(3)
    routed = network(x, time, cond)
    assert routed.dtype == torch.bfloat16
    with torch.no_grad():
        # bfloat16 has eight bits: a few hundredths of outputs of order one
        torch.testing.assert_close(network.prepare(time[:1])(x, time, cond), routed, rtol=0.1, atol=0.05)


def test_fingerprint_is_stable():
    network = make()
    assert fingerprint(network) == fingerprint(network)


def test_causality_and_row_independence():
    network = make()
    x, cond = inputs()
    time = times(0.01, 0.5, 20.0)
    base = network(x, time, cond)
    edited = x.clone()
    edited[:, 3] += 5
    after = network(edited, time, cond)
    torch.testing.assert_close(after[:, :3], base[:, :3], rtol=0, atol=0)
    assert (after[:, 3:] - base[:, 3:]).abs().max() > 1e-4
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in cond.items()}
        torch.testing.assert_close(
            network(x[row : row + 1], time[row : row + 1], one), base[row : row + 1], rtol=1e-11, atol=1e-12
        )


def test_impossible_top_k_is_refused():
    with pytest.raises(DipoleError, match="top_k=3 must be between 1 and num_experts=2"):
        make(num_experts=2, top_k=3)


def test_hook_sees_every_branch_routed_or_fused():
    network = make()
    x, cond = inputs()
    time = times(0.5).expand(3)
    for call in (network, network.requires_grad_(False).prepare(times(0.5))):
        seen = []
        out = call(x, time, cond, lambda name, compute: (seen.append(name), compute())[1])  # noqa: B023
        assert tuple(seen) == network.branches
        torch.testing.assert_close(out, network(x, time, cond), rtol=0, atol=1e-12)
