"""DPPO's diffusion MLPs become policies: exact foreign names, random weights, against network and chain written out."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dipole.cli import main
from dipole.convert import read_checkpoint
from dipole.convert.policy import to_policy
from dipole.errors import DipoleError
from dipole.policies import load_policy
from refusals import assert_refused

DO, DA, TP, LEVELS, STEP, WIDTH = 5, 3, 4, 20, 8, 16
GENERATOR = torch.Generator().manual_seed(5)
OBS = torch.tensor([[-1, 0, 2, -3, -0.5], [1, 0, 5, 4, 0.5]], dtype=torch.float64)
ACTION = torch.tensor([[-1, -2, 0], [1, 3, 0.5]], dtype=torch.float64)
# 1e-5: the same weights and operations; values are below 10.
NEAR = {"atol": 1e-5, "rtol": 1e-5}
YAML = """
date: 2024-06-28
action_dim: 3
obs_dim: 5
denoising_steps: 20
horizon_steps: 4
cond_steps: 1
train: {learning_rate: 1e-4, never: .nan}
model:
  _target_: model.diffusion.diffusion.DiffusionModel
  predict_epsilon: True
  denoised_clip_value: 1.0
  network:
    _target_: model.diffusion.mlp_diffusion.DiffusionMLP
    cond_dim: ${eval:'${obs_dim} * ${cond_steps}'}
    residual_style: True
    activation_type: ReLU
  denoising_steps: ${denoising_steps}
"""


def linear(out, into):
    return {
        "weight": torch.randn(out, into, generator=GENERATOR) / math.sqrt(into),
        "bias": torch.randn(out, generator=GENERATOR),
    }


def network(blocks=1, norms=False, encoder=()):
    """The names and shapes of DiffusionMLP's weights with residual_style."""
    layers = {"time_embedding.1": linear(2 * STEP, STEP), "time_embedding.3": linear(STEP, 2 * STEP)}
    widths = (DO, *encoder)
    for number in range(len(encoder)):
        layers[f"cond_mlp.moduleList.{number}.linear_1"] = linear(widths[number + 1], widths[number])
    layers["mlp_mean.layers.0"] = linear(WIDTH, TP * DA + STEP + widths[-1])
    for number in range(1, blocks + 1):
        for part in ("l1", "l2"):
            layers[f"mlp_mean.layers.{number}.{part}"] = linear(WIDTH, WIDTH)
        for part in ("norm1", "norm2") if norms else ():
            values = linear(WIDTH, WIDTH)
            layers[f"mlp_mean.layers.{number}.{part}"] = {"weight": values["weight"][0], "bias": values["bias"]}
    layers[f"mlp_mean.layers.{blocks + 1}"] = linear(TP * DA, WIDTH)
    return {f"network.{name}.{part}": value for name, layer in layers.items() for part, value in layer.items()}


def run_network(w, x, time, state, f):
    """DiffusionMLP, written out; `state` normalised `[B, DO]`."""

    def apply(name, h):
        return F.linear(h, w[f"network.{name}.weight"], w[f"network.{name}.bias"])

    def norm(name, h):
        if f"network.{name}.weight" not in w:
            return h
        return F.layer_norm(h, (WIDTH,), w[f"network.{name}.weight"], w[f"network.{name}.bias"], 1e-6)

    angle = time[:, None] * torch.exp(torch.arange(STEP // 2) * -(math.log(10000) / (STEP // 2 - 1)))
    step = apply("time_embedding.3", F.mish(apply("time_embedding.1", torch.cat((angle.sin(), angle.cos()), -1))))
    number = 0
    while f"network.cond_mlp.moduleList.{number}.linear_1.bias" in w:
        state = apply(f"cond_mlp.moduleList.{number}.linear_1", state if number == 0 else f(state))
        number += 1
    h = apply("mlp_mean.layers.0", torch.cat((x.flatten(1), step, state), dim=-1))
    number = 1
    while f"network.mlp_mean.layers.{number}.l1.bias" in w:
        name = f"mlp_mean.layers.{number}"
        inner = apply(f"{name}.l1", f(norm(f"{name}.norm1", h)))
        h = h + apply(f"{name}.l2", f(norm(f"{name}.norm2", inner)))
        number += 1
    return apply(f"mlp_mean.layers.{number}", h).view_as(x)


def run_chain(w, x, state, f, noises):
    """DPPO's DDPM: clipped x0, the posterior's mean, its deviation of at least 1e-3, none at the last step."""
    steps = np.linspace(0, LEVELS + 1, LEVELS + 1) / (LEVELS + 1)
    bar = np.cos((steps + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = torch.tensor(np.clip(1 - bar[1:] / bar[:-1], 0, 0.999))
    after = torch.cumprod(1 - beta, 0)
    before = torch.cat((torch.ones(1), after[:-1]))
    variance = beta * (1 - before) / (1 - after)
    assert variance[1:].sqrt().min() > 1e-3  # so that their least deviation, which ours lacks, is never reached
    for t, noise in zip(reversed(range(LEVELS)), noises, strict=True):
        epsilon = run_network(w, x, torch.full((len(x),), float(t)), state, f)
        x0 = ((x - (1 - after[t]).sqrt() * epsilon) / after[t].sqrt()).clamp(-1, 1)
        mean = beta[t] * before[t].sqrt() / (1 - after[t]) * x0
        mean = mean + (1 - before[t]) * (1 - beta[t]).sqrt() / (1 - after[t]) * x
        x = (mean + (variance[t].sqrt() * noise if t else 0)).float()
    return x


@pytest.fixture
def files(tmp_path):
    return lambda weights, **changes: write(tmp_path, weights, **changes)


def write(folder, weights, replace=(), normalization=None):
    text = YAML
    for old, new in replace:
        assert old in text
        text = text.replace(old, new)
    (folder / "run.yaml").write_text(text)
    limits = {"obs_min": OBS[0], "obs_max": OBS[1], "action_min": ACTION[0], "action_max": ACTION[1]}
    np.savez(folder / "normalization.npz", **(limits | (normalization or {})))
    model = {key: value + 1 for key, value in weights.items()}
    torch.save({"epoch": 5000, "model": model, "ema": weights}, folder / "state_5000.pt")
    return folder / "state_5000.pt"


def take_over(path, names=None):
    converted = read_checkpoint(
        path, None, None, path.with_name("normalization.npz"), config=path.with_name("run.yaml")
    )
    return to_policy(converted, names or {})


def normalized(obs):
    return (2 * ((obs.double() - OBS[0]) / (OBS[1] - OBS[0] + 1e-6) - 0.5)).float()


VARIANTS = {
    "as for Gym": ({}, (), F.relu),
    "as for furniture": (
        {"blocks": 3, "norms": True, "encoder": (12, 6)},
        [("activation_type: ReLU", "use_layernorm: True")],
        F.mish,
    ),
}
NAMES = {"state": "observation.state:2,observation.environment_state:3"}


@pytest.mark.parametrize("names", [{}, NAMES])
@pytest.mark.parametrize("variant", VARIANTS)
def test_network_and_chain(variant, names, files):
    shape, replace, f = VARIANTS[variant]
    w = network(**shape)
    policy = take_over(files(w, replace=replace), names)
    g = torch.Generator().manual_seed(3)
    obs, x, time = torch.randn(2, DO, generator=g), torch.randn(2, TP, DA, generator=g), torch.tensor([17.0, 2.0])
    obs[:, 1] = 0.0  # this one never varied: its scale is 2e6
    given = {"observation.state": obs[:, None]}
    if names:
        given = {"observation.state": obs[:, None, :2], "observation.environment_state": obs[:, None, 2:]}
    assert {key: feature.shape for key, feature in policy.config.observation.items()} == {
        key: tuple(value.shape[2:]) for key, value in given.items()
    }
    with torch.no_grad():
        expected = run_network(w, x, time, normalized(obs), f)
        torch.testing.assert_close(policy.network(x, time, policy.encode(given)), expected, **NEAR)
        assert expected.std() > 0.1
        g.manual_seed(4)
        chunk, _ = policy.act(given, {}, x, g)
        g.manual_seed(4)
        noises = [torch.randn(x.shape, generator=g) for _ in range(LEVELS)]
        x0 = run_chain(w, x, normalized(obs), f, noises)
    expected = (x0.double() + 1) / 2 * (ACTION[1] - ACTION[0]) + ACTION[0]
    torch.testing.assert_close(chunk, expected.float(), **NEAR)
    assert (policy.obs_horizon, policy.pred_horizon, policy.action_horizon) == (1, TP, TP)


def test_import_on_the_command_line_also_of_a_converted_folder(files, tmp_path, capsys):
    path = files(network(), replace=[("horizon_steps: 4", "horizon_steps: 4\nact_steps: 2")])
    beside = ("--config", tmp_path / "run.yaml", "--normalization", tmp_path / "normalization.npz")

    def command(*words):
        main([str(word) for word in words])

    command("import", path, *beside, "--out", tmp_path / "one")
    command("convert", path, *beside, "--out", tmp_path / "plain")
    assert json.loads((tmp_path / "plain/config.json").read_text())["config"]["date"] == "2024-06-28"
    command("import", tmp_path / "plain", "--out", tmp_path / "two")
    capsys.readouterr()
    chunks = [
        load_policy(tmp_path / name).act({"observation.state": torch.zeros(1, 1, DO)}, {}, torch.zeros(1, TP, DA), g)[0]
        for name in ("one", "two")
        for g in [torch.Generator().manual_seed(0)]
    ]
    assert chunks[0].shape == (1, 2, DA)
    assert torch.equal(*chunks)
    for words in (("import", tmp_path / "plain", *beside), ("import", "org/name", *beside[:2])):
        with pytest.raises(SystemExit) as caught:
            command(*words, "--out", tmp_path / "three")
        assert caught.value.code == 2
        assert "leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (("diffusion.DiffusionModel", "flow.ReFlow"), "model._target_ is .*ReFlow"),
        (("mlp_diffusion.DiffusionMLP", "unet.Unet1D"), "model.network._target_ is 'model.diffusion.unet.Unet1D'"),
        (("residual_style: True", "residual_style: False"), "residual_style is False: only True"),
        (("activation_type: ReLU", "activation_type: Tanh"), "activation_type is 'Tanh': only Mish, ReLU"),
        (("predict_epsilon: True", "predict_epsilon: False"), "predict_epsilon is False"),
        (("denoised_clip_value: 1.0", "denoised_clip_value: -1"), "denoised_clip_value is -1"),
        (("predict_epsilon: True", "use_ddim: True"), "use_ddim is True"),
        (("cond_steps: 1", "cond_steps: 2"), "cond_steps is 2: only 1"),
        (("horizon_steps: 4", "horizon_steps: 5"), r"'network.stem.weight' has shape \[16, 25\], expected \[16, 28\]"),
        (("horizon_steps: 4", "horizon_steps: ${eval:'2*2'}"), "'horizon_steps' is .* not computed here"),
        (("denoising_steps: 20", "denoising_steps: many"), "'num_train_timesteps' is \"many\""),
        ((YAML, "a: [1, 2"), "not a readable YAML file"),
        ((YAML, "- 1"), "holds no table"),
        ((YAML, "a: &x [1]\nb: *x"), "has YAML aliases"),
        ((YAML, "a" * 2**21), "larger than 1048576 bytes"),
        ((YAML, "{" * 5000), "not a readable YAML file"),
    ],
)
def test_what_cannot_be_taken_over_is_named(replace, message, files):
    with assert_refused(message):
        take_over(files(network(), replace=[replace]))


def test_weights_and_limits_that_do_not_fit(files):
    few = network()
    del few["network.mlp_mean.layers.1.l2.bias"]
    for weights, message in (
        (network() | {"network.extra.weight": torch.ones(1)}, "unknown weight 'network.extra.weight'"),
        (network() | {"actor_ft.mlp_mean.layers.0.weight": torch.ones(1)}, "fine-tuned DPPO policy is two networks"),
        (few, "missing weight 'network.blocks.0.l2.bias'"),
        ({"network.backbone.weight": torch.ones(1)}, "lacks the weight 'mlp_mean.layers.0.weight'"),
    ):
        with pytest.raises(DipoleError, match=message):
            take_over(files(weights))
    for normalization, message in (
        ({"obs_min": OBS[0] / 0}, "limits of 'observation.state' are not finite"),
        ({"action_min": ACTION[1]}, "an action has one value only"),
        ({"action_min": ACTION[1], "action_max": ACTION[0]}, "not in order"),
        ({"action_max": torch.ones(2)}, "limits of 'action' are not finite, or not in order"),
    ):
        with pytest.raises(DipoleError, match=message):
            take_over(files(network(), normalization=normalization))


def test_what_is_not_in_the_checkpoint_is_asked_for(files, tmp_path):
    path = files(network())
    with pytest.raises(DipoleError, match=r"give the YAML file of its training run, --config pre_diffusion_mlp\.yaml"):
        to_policy(read_checkpoint(path))
    with pytest.raises(DipoleError, match="give --normalization"):
        to_policy(read_checkpoint(path, config=tmp_path / "run.yaml"))
    with pytest.raises(DipoleError, match=r"absent\.yaml' does not exist"):
        read_checkpoint(path, config=tmp_path / "absent.yaml")
    torch.save({"state_dicts": {"ema_model": {"w": torch.ones(1)}}, "cfg": {}}, tmp_path / "other.ckpt")
    with pytest.raises(DipoleError, match="carries its own configuration: leave out --config"):
        read_checkpoint(tmp_path / "other.ckpt", "diffusion_policy", config=tmp_path / "run.yaml")
