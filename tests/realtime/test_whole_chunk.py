"""Back end `whole-chunk`: what is captured is what the policy does, and so is what is compiled; who is refused."""

import shutil

import pytest
import torch
from method_helpers import STATE, C, ddpm, generators, observations, small_policy

from dipole.errors import DipoleError
from dipole.evaluation.describe import digest
from dipole.policies import DiffusionPolicy, ProcessConfig, SamplerConfig
from dipole.realtime import Runtime, apply, prepare, whole_chunk
from dipole.realtime.candidates import Candidate, on_backends

UNET = {"name": "unet1d", "down_dims": (16, 32), "step_embed_dim": 8, "n_groups": 4}
TRANSFORMER = {"name": "transformer", "width": 8, "num_layers": 1, "num_heads": 2}
HORIZONS = (2, 8, 4)
# Of the largest action: float32 in another order.
ROUNDING = 1e-5


@pytest.fixture
def captured(monkeypatch):
    """The graph as it is captured, not compiled: the same function in a hundredth of the time. Lists what was made."""
    made = []

    def as_it_is(graph, arguments, dtype):
        made.append(len(arguments[0]))
        return graph

    monkeypatch.setattr(whole_chunk, "compiled", as_it_is)
    return made


def differ(policy, other, batch):
    obs = {STATE: observations(batch, 1)[0]}
    chunks = [p.act(obs, {}, generator=generators(*range(batch)))[0] for p in (policy, other)]
    return float((chunks[0] - chunks[1]).abs().max() / chunks[0].abs().max())


SAMPLERS = [
    ("vp-cosine", SamplerConfig("ddim", 5, clip=1.0)),
    ("vp-cosine", SamplerConfig("ddim", 5, eta=0.5, clip=1.0)),
    ("vp-cosine", ddpm(6)),
    ("flow", SamplerConfig("dpmpp-2m", 5)),
    ("flow", SamplerConfig("euler", 5)),
    ("flow", SamplerConfig("heun", 3)),
    ("flow", SamplerConfig("ancestral", 3)),
    ("flow", SamplerConfig("ddim", 4, clip=1.0, process=ProcessConfig("vp-cosine", 20))),
    ("edm", SamplerConfig("dpmpp-2s", 3)),
]


@pytest.mark.parametrize(("process", "sampler"), SAMPLERS, ids=lambda v: getattr(v, "name", v))
def test_it_acts_as_the_policy_and_draws_as_it_does(captured, process, sampler):
    policy = small_policy(process=process, sampler=sampler)
    other = prepare(policy, "whole-chunk")
    for batch in (1, 3):
        assert differ(policy, other, batch) <= ROUNDING
    one = [torch.Generator().manual_seed(7) for _ in range(2)]
    obs = {STATE: observations(2, 1)[0]}
    for p, generator in zip((policy, other), one, strict=True):
        p.act(obs, {}, generator=generator)
    assert torch.equal(torch.rand(3, generator=one[0]), torch.rand(3, generator=one[1]))


@pytest.mark.parametrize("network", [UNET, TRANSFORMER], ids=lambda v: v["name"])
def test_every_network(captured, network):
    policy = small_policy(sampler=SamplerConfig("ddim", 3, clip=1.0), network=network, horizons=HORIZONS)
    assert differ(policy, prepare(policy, "whole-chunk"), 3) <= ROUNDING


def test_one_graph_for_any_number_of_rows(captured):
    policy = small_policy(sampler=SamplerConfig("ddim", 3, clip=1.0))
    other = prepare(policy, "whole-chunk")
    for batch in (2, 1, 5):
        assert differ(policy, other, batch) <= ROUNDING
    assert captured == [1]
    # A row's chunk is the same to the last bit, whatever the batch it is in.
    obs = observations(3, 1)[0]
    together = other.act({STATE: obs}, {}, generator=generators(0, 1, 2))[0]
    alone = [other.act({STATE: obs[i : i + 1]}, {}, generator=generators(i))[0] for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    # Another sampler is another graph, of the same weights; the policy itself never changes.
    longer = SamplerConfig("ddim", 4, clip=1.0)
    assert differ(policy.with_sampler(longer), other.with_sampler(longer), 1) <= ROUNDING
    assert captured == [1, 1]
    assert digest(other) == digest(policy)
    assert "run_sampler" not in vars(policy)


def test_looking_between_the_steps_runs_them_one_by_one(captured):
    policy = small_policy(sampler=SamplerConfig("ddim", 3, clip=1.0))
    obs = {STATE: observations(1, 1)[0]}
    chains = [p.denoising_chain(obs, generators(0))[1] for p in (policy, prepare(policy, "whole-chunk"))]
    assert torch.equal(*chains)
    assert captured == []


def test_methods(captured):
    policy = small_policy(sampler=SamplerConfig("ddim", 3, clip=1.0))
    plain, fast = (apply(policy, Runtime("ensemble", backend=name)) for name in ("eager", "whole-chunk"))
    obs = {STATE: observations(1, 1)[0]}
    chunks = [p.act(obs, p.initial_state(1), generator=generators(0))[0] for p in (plain, fast)]
    torch.testing.assert_close(*chunks, rtol=0, atol=8 * ROUNDING)  # actions are 8 wide
    for method in ("rti", "chunking", "streaming", "block-cache"):
        with pytest.raises(DipoleError, match=f"method '{method}' makes steps of its own: use the back end 'packed'"):
            Runtime(method, backend="whole-chunk")
    names = [c.runtime.backend for c in on_backends(Candidate("c", "run", Runtime("rti")), ["packed", "whole-chunk"])]
    assert names == ["packed"]
    guided = prepare(policy, "whole-chunk")
    with pytest.raises(DipoleError, match="not a guided one: use 'packed'"):
        guided.denoise(policy.encode(obs), guide=lambda denoiser, process: lambda x, t, cond=None: denoiser(x, t, cond))


def test_who_is_refused(monkeypatch):
    class Other(torch.nn.Module):
        type_name = "other"
        network = torch.nn.Linear(1, 1)

    policy = small_policy(sampler=ddpm(5))
    with pytest.raises(DipoleError, match="not for kind 'other': use 'eager'"):
        prepare(Other(), "whole-chunk")
    with pytest.raises(DipoleError, match="compiles float32 weights, these are torch.float64"):
        prepare(small_policy().double(), "whole-chunk")
    with pytest.raises(DipoleError, match="the sampler makes 100: use fewer steps, or 'packed'"):
        prepare(small_policy(sampler=ddpm(100)), "whole-chunk")
    with pytest.raises(DipoleError, match="has no int8 for this network: use fp32"):
        prepare(policy, "whole-chunk", "int8")
    transformer = small_policy(sampler=ddpm(5), network=TRANSFORMER)
    with pytest.raises(DipoleError, match="has no bf16 for this network: use fp32"):
        prepare(transformer, "whole-chunk", "bf16")
    monkeypatch.setenv("CXX", "no-such-compiler")
    for backend in ("whole-chunk", "compile"):
        with pytest.raises(DipoleError, match=f"'{backend}' needs a C.. compiler, and 'no-such-compiler' was not"):
            prepare(policy, backend)


def test_a_graph_that_computes_something_else_is_noticed(monkeypatch):
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda program, **options: "")
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: lambda x, *rest: x)
    other = prepare(small_policy(sampler=SamplerConfig("ddim", 2, clip=1.0)), "whole-chunk")
    with pytest.raises(DipoleError, match="differs from the policy by .* use the back end 'eager' and report it"):
        other.act({STATE: observations(1, 1)[0]}, {}, generator=generators(0))


def test_a_failed_compilation_is_one_line(monkeypatch):
    def fail(program, **options):
        raise RuntimeError("the first line\nand a hundred more")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    other = prepare(small_policy(sampler=SamplerConfig("ddim", 2, clip=1.0)), "whole-chunk")
    with pytest.raises(DipoleError, match=r"cannot compile this policy: the first line \(use 'packed' or 'eager'\)$"):
        other.act({STATE: observations(1, 1)[0]}, {}, generator=generators(0))


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.slow  # compiles a graph
@pytest.mark.parametrize("network", [None, UNET, TRANSFORMER], ids=["mlp", "unet1d", "transformer"])
def test_compiled(network):
    policy = small_policy(sampler=SamplerConfig("ddim", 3, clip=1.0), network=network, horizons=HORIZONS)
    other = prepare(policy, "whole-chunk")
    assert isinstance(other, DiffusionPolicy)
    for batch in (3, 1):
        assert differ(policy, other, batch) <= ROUNDING
    # Conditioning that is not contiguous: a compiled graph would read it as if it were.
    noise, cond = torch.randn(1, 8, 2), {"obs": torch.randn(1, C, 2).transpose(1, 2)}
    torch.testing.assert_close(other.denoise(cond, noise), policy.denoise(cond, noise), rtol=0, atol=ROUNDING)
    with torch.inference_mode():
        assert differ(policy, other, 1) <= ROUNDING


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.slow  # compiles a graph: 12 s of CPU
def test_compiled_with_noise_drawn_before():
    policy = small_policy(process="flow", sampler=SamplerConfig("ancestral", 2))
    assert differ(policy, prepare(policy, "whole-chunk"), 1) <= ROUNDING
