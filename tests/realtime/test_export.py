"""Exported policies: the plan of every sampler to the last digit, and the runner against the policy."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dipole import networks
from dipole.cli import main
from dipole.data import Feature, Normalizer
from dipole.errors import DipoleError
from dipole.policies import (
    DiffusionPolicy,
    ObjectiveConfig,
    PolicyConfig,
    ProcessConfig,
    SamplerConfig,
    save_policy,
)
from dipole.realtime import export_runner
from dipole.realtime.export import export
from dipole.realtime.export_graphs import DenoiserGraph, EncoderGraph, SamplerGraph
from dipole.realtime.export_plan import make_plan
from dipole.realtime.export_runner import Runner, recorded

MLP = {"name": "mlp", "width": 16, "num_blocks": 1, "context_width": 8, "step_embed_dim": 8}
SIZE = (20, 20)


def make(network=MLP, vision=None, sampler=None, normalization=None, **changes):
    observation = {"observation.state": Feature("float32", (3,))}
    stats = {"min": np.array([-1.0, 0, 2]), "max": np.array([1.0, 3, 4])}
    tables = dict.fromkeys(("observation.state", "action"), stats)
    if vision is not None:
        observation["observation.image"] = Feature("image", (*SIZE, 3))
        tables["observation.image"] = {"min": np.zeros((3, 1, 1)), "max": np.ones((3, 1, 1))}
        vision = networks.full_vision_config(vision)
    config = PolicyConfig(
        observation,
        Feature("float32", (3,)),
        pred_horizon=8,
        action_horizon=4,
        network=networks.full_config(network),
        vision=vision,
        sampler=sampler or SamplerConfig("euler", 3),
        **changes,
    )
    torch.manual_seed(0)
    return DiffusionPolicy(config, Normalizer.fit(tables, dict.fromkeys(tables, "min_max"))).eval()


VP = {"process": ProcessConfig("vp-cosine", 20), "objective": ObjectiveConfig("epsilon", "uniform")}
EDM = {"process": ProcessConfig("edm"), "objective": ObjectiveConfig("edm", "log-logistic")}
X0 = {"process": ProcessConfig("vp-linear", 20), "objective": ObjectiveConfig("x0", "uniform")}
PLANS = [
    *(({}, SamplerConfig(name, 4)) for name in ("euler", "ancestral", "heun", "dpm2", "dpmpp-2m", "dpmpp-2s")),
    *(({}, SamplerConfig(name, 4)) for name in ("flow-sde", "cps", "consistency")),
    *((VP, SamplerConfig(name, 5, "leading", clip=1.0)) for name in ("ddim", "ddpm", "ancestral")),
    (VP, SamplerConfig("ddim", 5, eta=0.5, clip=0.7)),
    *((X0, SamplerConfig(name, 5)) for name in ("ddim", "heun", "dpmpp-2m")),
    *((EDM, SamplerConfig(name, 5)) for name in ("euler", "heun", "dpmpp-2m", "dpmpp-2s")),
    # Trained as a flow, sampled in another process.
    ({}, SamplerConfig("ddim", 5, clip=1.0, process=ProcessConfig("vp-cosine", 20))),
    ({}, SamplerConfig("heun", 4, process=ProcessConfig("edm", sigma_max=10.0))),
]


@pytest.mark.parametrize(("changes", "sampler"), PLANS, ids=lambda v: getattr(v, "name", None))
def test_a_plan_is_what_the_sampler_does(changes, sampler):
    """In float64, so that only a wrong coefficient can make a difference above 1e-9 (times the largest sample)."""
    policy = make(sampler=sampler, **changes).double()
    plan = make_plan(policy)
    cond = policy.encode({"observation.state": torch.rand(2, 2, 3, dtype=torch.float64)})
    noise = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        expected = policy.denoise(cond, noise, torch.Generator().manual_seed(2))
        generator = torch.Generator().manual_seed(2)
        samples, x0s = [plan.prior_std * noise], []
        for step in plan.steps:
            x = samples[-1]
            output = policy.network(step.c_in * x, torch.full((2,), step.time, dtype=torch.float64), cond)
            x0s.append(step.c_x * x + step.c_out * output)
            following = sum(weight * samples[j] for j, weight in step.samples) + torch.zeros_like(x)
            following += sum(weight * x0s[j].clamp(-plan.clip, plan.clip) for j, weight in step.clipped)
            following += sum(weight * x0s[j] for j, weight in step.x0s)
            if step.std > 0:
                fresh = torch.empty(2, 8, 3, dtype=torch.float64).normal_(generator=generator)
                following += step.std * fresh
            samples.append(following)
    scale = max(float(x.abs().max()) for x in samples)
    assert len(plan.steps) <= sampler.nfe
    torch.testing.assert_close(samples[-1], expected, rtol=0, atol=1e-9 * scale)


def test_deterministic_samplers_are_known():
    assert make_plan(make()).deterministic
    assert make_plan(make(sampler=SamplerConfig("heun", 3))).deterministic
    assert not make_plan(make(sampler=SamplerConfig("ancestral", 3))).deterministic


NETWORKS = {
    "mlp": MLP,
    "unet1d": {"name": "unet1d", "down_dims": [8, 16], "step_embed_dim": 8, "n_groups": 4},
    "transformer": {"name": "transformer", "width": 8, "num_layers": 1, "num_heads": 2},
}


@pytest.mark.parametrize("network", NETWORKS)
def test_graphs_compute_what_the_policy_does(network):
    """Before any export: the modules that are captured, with the normalising left out."""
    policy = make(NETWORKS[network], vision="small-cnn")
    observation = {"observation.state": torch.rand(2, 2, 3), "observation.image": torch.rand(2, 2, 3, *SIZE)}
    features = [policy.normalizer.normalize(key, value) for key, value in observation.items()]
    noise = torch.randn(2, 8, 3)
    with torch.no_grad():
        cond = policy.encode(observation)
        (encoded,) = EncoderGraph(policy)(*features)
        assert torch.equal(encoded, cond["obs"])
        time = torch.tensor([3.0, 500.0])
        assert torch.equal(DenoiserGraph(policy)(noise, time, encoded), policy.network(noise, time, cond))
        # 1e-6: the steps' products are taken in another order than by the sampler.
        found = SamplerGraph(policy, make_plan(policy))(noise, *features)
        torch.testing.assert_close(found, policy.denoise(cond, noise), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One folder for the tests that only read it: capturing a graph takes seconds."""
    folder = tmp_path_factory.mktemp("export") / "policy"
    policy = make(sampler=SamplerConfig("ancestral", 3))
    return policy, folder, export(policy, folder, "torch-export")


def test_the_runner_acts_as_the_policy(exported):
    policy, folder, parity = exported
    # 1e-5: float32 in another order; the folder's own tolerance is ten times that.
    assert parity["max_difference"] < 1e-5
    assert json.loads((folder / "policy.json").read_text())["parity"] == parity
    observation, options, expected = recorded(folder)
    assert expected.shape == (3, 4, 3)
    np.testing.assert_allclose(Runner(folder, threads=1).act(observation, **options), expected, rtol=0, atol=1e-5)
    for batch in (1, 5):  # a batch that was never seen
        state = torch.rand(batch, 2, 3)
        noise = torch.randn(batch, 8, 3)
        generator = torch.Generator().manual_seed(3)
        fresh = [torch.randn(batch, 8, 3, generator=generator).numpy() for _ in range(2)]
        chunk, _ = policy.act({"observation.state": state}, {}, noise, torch.Generator().manual_seed(3))
        found = Runner(folder).act({"observation.state": state.numpy()}, noise.numpy(), step_noise=fresh)
        np.testing.assert_allclose(found, chunk.numpy(), rtol=0, atol=1e-5)


def test_the_runner_imports_nothing_of_dipole():
    imports = re.findall(r"^\s*(?:import|from) (\w+)", Path(export_runner.__file__).read_text(), re.MULTILINE)
    # `runner` is in its own docstring; torch and onnxruntime are imported by the graphs that need them.
    standard = {"__future__", "collections", "json", "pathlib", "sys", "time", "typing"}
    assert set(imports) == standard | {"numpy", "onnxruntime", "torch", "runner"}


@pytest.mark.slow  # a new interpreter imports torch
def test_the_runner_runs_by_itself(exported):
    _, folder, _ = exported
    code = "import sys; sys.argv = ['runner.py']; import runner; status = runner.main(); "
    code += "assert not [name for name in sys.modules if name.startswith('dipole')]; sys.exit(status)"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    assert "largest difference from the recorded chunk" in done.stdout


def test_the_runner_draws_reproducibly_and_names_mistakes(exported):
    _, folder, _ = exported
    runner = Runner(folder)
    observation = {"observation.state": np.zeros((2, 2, 3))}
    chunks = [runner.act(observation, rng=np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(chunks[0], chunks[1])
    assert not np.array_equal(chunks[0], chunks[2])
    with pytest.raises(ValueError, match=r"lacks 'observation\.state'"):
        runner.act({})
    with pytest.raises(ValueError, match="has shape"):
        runner.act({"observation.state": np.zeros((2, 3))})
    with pytest.raises(ValueError, match="noise has shape"):
        runner.act(observation, noise=np.zeros((2, 7, 3)))


def test_a_changed_folder_is_noticed_by_its_runner(exported, tmp_path):
    _, folder, _ = exported
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "policy.json"
    values = json.loads(path.read_text())
    values["steps"][0]["c_out"] *= 1.01
    path.write_text(json.dumps(values))
    spec = importlib.util.spec_from_file_location("copied_runner", tmp_path / "copy" / "runner.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() == 1


def test_above_the_tolerance_nothing_is_written(tmp_path, monkeypatch):
    def broken(graph, arguments, names, path, form):
        pass

    monkeypatch.setattr("dipole.realtime.export.write_graph", broken)

    def act(self, observation, noise=None, rng=None, step_noise=None):
        return np.zeros((len(noise), 4, 3), np.float32)

    monkeypatch.setattr("dipole.realtime.export_runner.Runner.__init__", lambda self, folder: None)
    monkeypatch.setattr("dipole.realtime.export_runner.Runner.act", act)
    with pytest.raises(DipoleError, match=r"differs from the original by .* above the tolerance of 0\.0001"):
        export(make(), tmp_path / "new", "onnx")
    assert not list(tmp_path.iterdir())


def test_mistakes(tmp_path, monkeypatch, capsys):
    with pytest.raises(DipoleError, match="leave --unroll out"):
        export(make(sampler=SamplerConfig("ancestral", 3)), tmp_path / "new", unroll=True)
    with pytest.raises(DipoleError, match="did you mean 'onnx'"):
        export(make(), tmp_path / "new", "onxx")
    with pytest.raises(DipoleError, match="kind 'object' cannot be exported"):
        export(object(), tmp_path / "new")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(DipoleError, match="needs a C\\+\\+ compiler, and 'no-such-compiler' was not found"):
        export(make(), tmp_path / "new", "aoti")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    save_policy(make(), tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "run"), "--format", "onnx", "--out", str(tmp_path / "new")])
    assert "dipole[export]" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


ONNX = {
    "state": (make, {"sampler": SamplerConfig("heun", 3)}, False),
    "one graph": (make, {"sampler": SamplerConfig("heun", 2)}, True),
    "unet": (make, {"network": NETWORKS["unet1d"], "sampler": SamplerConfig("ddim", 3, clip=1.0), **VP}, False),
    "image": (make, {"network": NETWORKS["transformer"], "vision": "small-cnn"}, False),
    "resize": (make, {"vision": {"name": "resnet18", "resize_shape": [18, 18], "crop_shape": [16, 16]}}, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ONNX)
def test_onnx(case, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    maker, options, unroll = ONNX[case]
    parity = export(maker(**options), tmp_path / "new", "onnx", unroll=unroll)
    assert parity["max_difference"] < 1e-5  # float32 in another order
    subprocess.run([sys.executable, "runner.py"], cwd=tmp_path / "new", check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_ahead_of_time(tmp_path, capsys):
    save_policy(make(), tmp_path / "run")
    main(["export", str(tmp_path / "run"), "--format", "aoti", "--out", str(tmp_path / "new"), "--json"])
    assert json.loads(capsys.readouterr().out)["parity"]["max_difference"] < 1e-5
