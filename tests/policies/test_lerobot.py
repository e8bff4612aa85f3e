"""LeRobot's checkpoints, in and out. What LeRobot 0.4.4 does with our exports is checked in benchmarks/peers."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dipole import networks
from dipole.data import Feature, Normalizer
from dipole.errors import DipoleError
from dipole.policies import (
    DiffusionPolicy,
    ObjectiveConfig,
    Policy,
    PolicyConfig,
    ProcessConfig,
    SamplerConfig,
    from_lerobot,
    load_policy,
    save_policy,
    to_lerobot,
)
from dipole.policies.lerobot_config import read_config

sys.path.insert(0, str(Path(__file__).parents[1] / "networks"))
import lerobot_golden as golden
from lerobot_golden import write_checkpoint

STATE, ENV, ACTION, IMAGE = "observation.state", "observation.environment_state", "action", "observation.image"
BEFORE = "policy_preprocessor_step_3_normalizer_processor.safetensors"
AFTER = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(golden.STATE, tmp_path / "checkpoint")


@pytest.fixture
def old_checkpoint(tmp_path):
    return write_checkpoint(golden.OLD_STATE, tmp_path / "old")


def observation(name, keys):
    io = golden.results(name)
    return {key: torch.stack([io[f"obs0.{key}"], io[f"obs1.{key}"]], dim=1) for key in keys}


def act(policy, name=golden.STATE):
    return policy.act(observation(name, policy.config.observation), {}, golden.results(name)["noise"])[0]


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path, change):
    values = load_file(path)
    change(values)
    save_file(values, path)


@pytest.mark.parametrize("name", [golden.STATE, golden.OLD_STATE, golden.IMAGE])
def test_acts_as_lerobot_did(name, tmp_path):
    """In float64 within 1e-5 of its float32, though actions in physical units reach 3.

    LeRobot's rounding, amplified by ten denoising steps: up to 9.6e-6. Ours is as large, another on every CPU.
    """
    policy = Policy.from_lerobot(write_checkpoint(name, tmp_path / "checkpoint"))
    io, obs, noise = golden.results(name), observation(name, policy.config.observation), golden.results(name)["noise"]
    chunks = {}
    for dtype in (torch.float32, torch.float64):
        policy.to(dtype)
        obs, noise = {key: value.to(dtype) for key, value in obs.items()}, noise.to(dtype)
        with torch.no_grad():
            cond = policy.encode(obs)
            assert_near(cond["obs"].flatten(1), io["global_cond"])
            assert_near(policy.denoise(cond, noise)[:, 1:9], io["chunk_normalized"])
            if "unet_at_t50" in io:
                assert_near(policy.network(noise, torch.full((3,), 50.0), cond), io["unet_at_t50"])
        chunks[dtype], state = policy.act(obs, policy.initial_state(3), noise)
        assert chunks[dtype].dtype == dtype
        assert state == {}
    assert_near(chunks[torch.float64], io["chunk"])
    assert_near(chunks[torch.float32], chunks[torch.float64], 2e-5)
    assert not policy.training


def assert_near(found, expected, atol=1e-5):
    torch.testing.assert_close(found.double(), expected.double(), atol=atol, rtol=0)


def test_settings_are_taken_over(checkpoint):
    policy = DiffusionPolicy.from_lerobot(checkpoint, fps=20, task="push")
    config = policy.config
    assert config.sampler == policy.sampler == SamplerConfig("ddim", 10, "leading", clip=1.0)
    assert config.process == ProcessConfig("vp-cosine", 100)
    assert config.objective == ObjectiveConfig("epsilon", "uniform")
    assert (config.obs_horizon, config.pred_horizon, config.action_horizon) == (2, 16, 8)
    assert (config.fps, config.task, config.source) == (20, "push", f"lerobot: {checkpoint}")

    def other(values):
        values.update(noise_scheduler_type="DDPM", num_inference_steps=None, num_train_timesteps=50)
        values.update(clip_sample_range=2.5, prediction_type="sample", beta_schedule="linear", beta_end=0.03)
        values.update(do_mask_loss_for_padding=True, n_action_steps=4)

    edit_json(checkpoint / "config.json", other)
    config = from_lerobot(checkpoint).config
    assert config.sampler == SamplerConfig("ddpm", 50, "leading", clip=2.5)
    assert config.process == ProcessConfig("vp-linear", 50, beta_end=0.03)
    assert config.objective == ObjectiveConfig("x0", "uniform", mask_padding=True)
    assert config.action_horizon == 4
    edit_json(checkpoint / "config.json", lambda values: values.update(clip_sample=False))
    assert from_lerobot(checkpoint).config.sampler.clip is None


def test_compiled_weights(checkpoint):
    before = act(from_lerobot(checkpoint))
    weights = load_file(checkpoint / "model.safetensors")
    renamed = {key.replace("diffusion.unet.", "_orig_mod.diffusion.unet._orig_mod."): v for key, v in weights.items()}
    save_file(renamed, checkpoint / "model.safetensors")
    assert torch.equal(act(from_lerobot(checkpoint)), before)


def test_run_folders_and_the_hub(checkpoint, tmp_path, monkeypatch):
    run = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    shutil.copytree(checkpoint, run)
    expected = act(from_lerobot(checkpoint))
    for folder in (run.parent, tmp_path / "run"):
        assert torch.equal(act(from_lerobot(folder)), expected)
    asked = []
    monkeypatch.setattr("dipole.data.hub.resolve", lambda *args, **kwargs: asked.append((args, kwargs)) or checkpoint)
    assert from_lerobot("me/pusht", revision="v2").config.source == "lerobot: me/pusht@v2"
    assert asked[0][0] == ("me/pusht@v2",)
    assert asked[0][1]["kind"] == "model"


def lerobot_formula(mode, stats, x, inverse):
    """LeRobot 0.4's own formulas, written out."""
    low, high = {
        "MIN_MAX": ("min", "max"),
        "QUANTILES": ("q01", "q99"),
        "QUANTILE10": ("q10", "q90"),
        "MEAN_STD": ("mean", "std"),
    }[mode]
    a, b = stats[low], stats[high]
    if mode == "MEAN_STD":
        return x * b + a if inverse else (x - a) / (b + 1e-8)
    width = torch.where(b == a, 1e-8, b - a)
    return (x + 1) / 2 * width + a if inverse else 2 * (x - a) / width - 1


def normalizer_step(values):
    return next(step["config"] for step in values["steps"] if "state_file" in step)


@pytest.mark.parametrize("mode", ["MIN_MAX", "MEAN_STD", "QUANTILES", "QUANTILE10"])
def test_normalisation_modes_and_constant_dimensions(mode, checkpoint):
    g = torch.Generator().manual_seed(0)
    low, width = torch.randn(2, 2, generator=g), torch.rand(2, 2, generator=g) + 0.5
    width[:, 1] = 0  # the second dimension of state and action never moved
    names = {"min": 0.0, "q01": 0.05, "q10": 0.1, "mean": 0.5, "q90": 0.9, "q99": 0.95, "max": 1.0}
    stats = {}
    for row, key in enumerate((STATE, ACTION)):
        stats[key] = {name: low[row] + share * width[row] for name, share in names.items()} | {"std": width[row] / 4}
    flat = {f"{key}.{name}": value.contiguous() for key, table in stats.items() for name, value in table.items()}
    modes = {"STATE": mode, "ACTION": mode, "ENV": "IDENTITY"}
    for file, json_file in ((BEFORE, "policy_preprocessor.json"), (AFTER, "policy_postprocessor.json")):
        edit_tensors(checkpoint / file, lambda values: values.update(flat))
        edit_json(checkpoint / json_file, lambda values: normalizer_step(values).update(norm_map=modes))
    policy = from_lerobot(checkpoint)
    x = stats[STATE]["mean"] + torch.rand(64, 2, generator=g) * width[0]
    y = torch.rand(64, 2, generator=g) * 2 - 1
    # 1e-6: float32 rounding. The constant dimension, whose scale is 2e8, must be exactly -1 (or 0), as it is there.
    expected = lerobot_formula(mode, stats[STATE], x, inverse=False)
    torch.testing.assert_close(policy.normalizer.normalize(STATE, x), expected, atol=1e-6, rtol=1e-6)
    expected = lerobot_formula(mode, stats[ACTION], y, inverse=True)
    torch.testing.assert_close(policy.normalizer.denormalize(ACTION, y), expected, atol=1e-6, rtol=1e-6)
    raw = torch.randn(5, 16, generator=g)
    assert torch.equal(policy.normalizer.normalize(ENV, raw), raw)
    again = from_lerobot(to_lerobot(policy, checkpoint.parent / "again"))
    normals = [p.normalizer.normalize(STATE, x) for p in (policy, again)]
    torch.testing.assert_close(*normals, atol=1e-6, rtol=1e-6)
    actions = [p.normalizer.denormalize(ACTION, y) for p in (policy, again)]
    torch.testing.assert_close(*actions, atol=1e-6, rtol=1e-6)


def test_renamed_observations(checkpoint, tmp_path):
    expected = act(from_lerobot(checkpoint))
    names = {"observation.qpos": STATE, "observation.keypoints": ENV, "observation.unused": "observation.other"}
    path = checkpoint / "policy_preprocessor.json"
    edit_json(path, lambda values: values["steps"][0]["config"].update(rename_map=names))
    policy = from_lerobot(checkpoint)
    assert list(policy.config.observation) == ["observation.qpos", "observation.keypoints"]
    io = golden.results(golden.STATE)

    def given(policy):
        raw = observation(golden.STATE, [STATE, ENV])
        return policy.act({old: raw[names[old]] for old in policy.config.observation}, {}, io["noise"])[0]

    assert torch.equal(given(policy), expected)
    save_policy(policy, tmp_path / "ours")
    assert torch.equal(given(load_policy(tmp_path / "ours")), expected)
    again = from_lerobot(to_lerobot(policy, tmp_path / "again"))
    assert again.config.roles == {"observation.qpos": STATE, "observation.keypoints": ENV}
    assert torch.equal(given(again), expected)


def test_features_that_lerobot_ignores_are_named(checkpoint):
    extra = {"observation.effort": {"type": "STATE", "shape": [3]}}
    edit_json(checkpoint / "config.json", lambda values: values["input_features"].update(extra))
    with pytest.warns(UserWarning, match=r"does not look at 'observation\.effort'"):
        policy = from_lerobot(checkpoint)
    assert list(policy.config.observation) == [STATE, ENV]


CHANGED = ("horizon", "n_action_steps", "crop_shape", "use_group_norm", "use_separate_rgb_encoder_per_camera")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (None, (16, 8, (84, 84), True, False)),  # up to 0.4.3
        ("resize_shape", (16, 8, None, True, False)),  # 0.4.4 to 0.5
        ("compile_model", (16, 8, None, True, False)),
        ("pretrained_revision", (64, 32, None, False, True)),  # 0.6.0
        ("gradient_checkpointing", (64, 32, None, False, True)),  # 0.6.1
    ],
)
def test_missing_keys_take_the_defaults_of_the_writing_version(key, expected, tmp_path):
    values = {
        name: value for name, value in golden.config(golden.OLD_STATE).items() if name not in (*CHANGED, "down_dims")
    }
    values |= {} if key is None else {key: None}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    config = read_config(path)
    assert tuple(getattr(config, name) for name in CHANGED) == expected
    assert config.down_dims == (512, 1024, 2048)


def test_configurations_of_2024(old_checkpoint):
    expected = act(from_lerobot(old_checkpoint), golden.OLD_STATE)

    def to_2024(values):
        for name in ("type", "input_features", "output_features", "normalization_mapping", "device", "use_amp"):
            del values[name]
        values["input_shapes"] = {STATE: [2], ENV: [16]}
        values["output_shapes"] = {ACTION: [2]}
        values["input_normalization_modes"] = {STATE: "min_max", ENV: "min_max"}
        values["output_normalization_modes"] = {ACTION: "min_max"}

    edit_json(old_checkpoint / "config.json", to_2024)
    assert torch.equal(act(from_lerobot(old_checkpoint), golden.OLD_STATE), expected)


@pytest.mark.parametrize(
    ("resize", "ratio", "crop", "expected"),
    [
        (None, 1.0, [84, 84], (84, 84)),
        (None, 0.5, None, None),
        ([64, 80], 0.9, [10, 10], (57, 72)),
        ([64, 80], 1.0, [10, 10], None),
    ],
)
def test_crop_and_resize(resize, ratio, crop, expected, tmp_path):
    values = golden.config(golden.IMAGE) | {"resize_shape": resize, "crop_ratio": ratio, "crop_shape": crop}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path / "config.json").crop == expected


PRE, POST, WEIGHTS = "policy_preprocessor.json", "policy_postprocessor.json", "model.safetensors"
BIAS = "diffusion.unet.final_conv.1.bias"


def step(index, file=PRE):
    """Return an editor of the configuration of one processing step."""

    def edit(change):
        return lambda folder: edit_json(folder / file, lambda values: change(values["steps"][index]["config"]))

    return edit


def tensors(file):
    """Return an editor of a safetensors file."""
    return lambda change: lambda folder: edit_tensors(folder / file, change)


DAMAGE = {
    "no preprocessor": (lambda f: (f / PRE).unlink(), r"policy_preprocessor\.json' is missing"),
    "no postprocessor": (lambda f: (f / POST).unlink(), r"policy_postprocessor\.json: no such file"),
    "no state file": (lambda f: (f / BEFORE).unlink(), rf"{BEFORE}: missing"),
    "no config": (lambda f: (f / "config.json").unlink(), r"'config\.json' is missing"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"model\.safetensors: missing"),
    "weights cut": (lambda f: (f / WEIGHTS).write_bytes(b"\x10" * 100), "not a safetensors file"),
    "weights' header absurd": (
        lambda f: (f / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + b"{}"),
        "not a safetensors file",
    ),
    "weight NaN": (tensors(WEIGHTS)(lambda v: v[BIAS].fill_(torch.nan)), f"'{BIAS}' holds NaN or infinity"),
    "weight of integers": (
        tensors(WEIGHTS)(lambda v: v.update({BIAS: torch.ones(2, dtype=torch.int64)})),
        f"'{BIAS}' is of type torch.int64",
    ),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"type": "\xff"}'), "not UTF-8|not valid JSON"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "no statistic": (tensors(BEFORE)(lambda v: v.pop(f"{ENV}.max")), f"statistic 'max' of '{ENV}' is missing"),
    "no action statistic": (
        tensors(AFTER)(lambda v: v.pop("action.min")),
        "post.*statistic 'min' of 'action' is missing",
    ),
    "infinite": (tensors(BEFORE)(lambda v: v[f"{STATE}.max"].fill_(torch.inf)), "'max' .*is not finite"),
    "other shape": (tensors(BEFORE)(lambda v: v.update({f"{STATE}.max": torch.ones(3)})), r"shape \[3\].*\[2\]"),
    "not normalised": (step(3)(lambda c: c["features"].pop(ENV)), f"'{ENV}' is not among the features"),
    "ambiguous names": (step(0)(lambda c: c.update(rename_map={"a": STATE, "b": STATE})), f"ambiguous about '{STATE}'"),
    "half precision": (step(2)(lambda c: c.update(float_dtype="half")), "float_dtype 'half'"),
    "unknown mode": (step(3)(lambda c: c["norm_map"].update(ENV="LOG")), "'LOG'"),
    "unknown option": (step(0, POST)(lambda c: c.update(clip=True)), "'clip'"),
    "unknown step": (
        lambda f: edit_json(f / PRE, lambda v: v["steps"][1].update(registry_name="delta")),
        "unknown processing step .*'delta'",
    ),
    "no normalizer": (lambda f: edit_json(f / POST, lambda v: v["steps"].pop(0)), "one step 'unnormalizer"),
    "state file elsewhere": (
        lambda f: edit_json(f / PRE, lambda v: v["steps"][3].update(state_file="../x")),
        r"state_file '\.\./x'",
    ),
    "unknown weight": (tensors(WEIGHTS)(lambda v: v.update(extra=torch.ones(1))), "unknown weight 'extra'"),
    "no weight": (tensors(WEIGHTS)(lambda v: v.pop(BIAS)), f"weight '{BIAS}' is missing"),
    "weight of another shape": (
        tensors(WEIGHTS)(lambda v: v.update({BIAS: torch.ones(3)})),
        rf"'{BIAS}' has shape \[3\], expected \[2\]",
    ),
}

CONFIG_DAMAGE = [
    ({"type": "act"}, "type 'act'"),
    ({"type": None}, "no key 'type'"),
    ({"kernel_sise": 5}, "'kernel_sise': did you mean 'kernel_size'"),
    ({"horizon": "16"}, r"horizon: expected int, found '16'"),
    ({"horizon": 17}, "pred_horizon 17"),
    ({"horizon": 10**15}, "horizon is 1000000000000000"),
    ({"num_train_timesteps": 10**12}, "num_train_timesteps is"),
    ({"down_dims": [32, 64, 10**9]}, r"down_dims\[2\]"),
    ({"down_dims": [32, 64, 999992]}, "has shape|no network can be built"),
    ({"n_groups": 7}, "multiple of 7"),
    ({"num_inference_steps": 101}, "num_inference_steps 101"),
    ({"beta_schedule": "sigmoid"}, "'sigmoid'"),
    ({"prediction_type": "v_prediction"}, "'v_prediction'"),
    ({"noise_scheduler_type": "PNDM"}, "'PNDM'"),
    ({"use_peft": True}, "use_peft"),
    ({"input_features": {STATE: {"type": "STATE", "shape": [2]}}}, "input_features must hold"),
    ({"input_features": {STATE: {"type": "TOUCH", "shape": [2]}}}, "'TOUCH'"),
    ({"output_features": {}}, "output_features must be"),
    ({"crop_ratio": 0.0}, "crop_ratio 0.0"),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_refused(damage, checkpoint):
    change, message = DAMAGE[damage]
    change(checkpoint)
    with pytest.raises(DipoleError, match=message):
        from_lerobot(checkpoint)


@pytest.mark.parametrize(("changes", "message"), CONFIG_DAMAGE)
def test_damaged_configurations_are_refused(changes, message, checkpoint):
    edit_json(checkpoint / "config.json", lambda values: values.update(changes))
    with pytest.raises(DipoleError, match=message):
        from_lerobot(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_backbone": "resnet50"}, "resnet50"),
        ({"resize_shape": [10**6, 10**6]}, "pixels"),
        (
            {"input_features": {STATE: {"type": "STATE", "shape": [2]}, IMAGE: {"type": "VISUAL", "shape": [96, 96]}}},
            IMAGE,
        ),
    ],
)
def test_damaged_image_configurations_are_refused(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(golden.config(golden.IMAGE) | changes))
    with pytest.raises(DipoleError, match=message):
        read_config(tmp_path / "config.json")


INPUTS = "normalize_inputs.buffer_observation"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[f"{INPUTS}_state.max"].fill_(torch.inf), f"{INPUTS}_state: 'max'.*finite"),
        (lambda v: v.pop(f"{INPUTS}_environment_state.min"), f"statistic 'min' of '{ENV}' is missing"),
        (lambda v: v.pop("unnormalize_outputs.buffer_action.max"), "unnormalize_outputs.*'max' of 'action'"),
        (lambda v: v.update({"normalize_inputs.so100_buffer_x.min": torch.ones(1)}), "so100_buffer_x"),
    ],
)
def test_damaged_statistics_inside_weights_are_refused(change, message, old_checkpoint):
    edit_tensors(old_checkpoint / "model.safetensors", change)
    with pytest.raises(DipoleError, match=message):
        from_lerobot(old_checkpoint)


@pytest.mark.parametrize("name", [golden.STATE, golden.OLD_STATE])
def test_saved_and_exported_policies_act_identically(name, tmp_path):
    policy = from_lerobot(write_checkpoint(name, tmp_path / "checkpoint"))
    expected = act(policy, name)
    save_policy(policy, tmp_path / "ours")
    loaded = load_policy(tmp_path / "ours")
    assert torch.equal(act(loaded, name), expected)
    assert loaded.config == policy.config
    exported = to_lerobot(loaded, tmp_path / "theirs")
    assert torch.equal(act(from_lerobot(exported), name), expected)
    with pytest.raises(DipoleError, match="exists"):
        to_lerobot(policy, exported)


def test_an_export_has_the_files_and_keys_of_lerobot(checkpoint, tmp_path):
    exported = to_lerobot(from_lerobot(checkpoint), tmp_path / "theirs")
    assert {file.name for file in exported.iterdir()} == {file.name for file in checkpoint.iterdir()}
    for file in ("config.json", "policy_preprocessor.json", "policy_postprocessor.json"):
        theirs, ours = (json.loads((folder / file).read_text()) for folder in (checkpoint, exported))
        assert list(ours) == list(theirs)
        if file == "config.json":
            # Cameras and their settings mean nothing here: this policy sees none.
            same = set(theirs) - {"normalization_mapping", "spatial_softmax_num_keypoints"}
            assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
        else:
            names = [[step["registry_name"] for step in steps["steps"]] for steps in (ours, theirs)]
            assert names[0] == names[1]


VECTOR = Feature("float32", (3,))


def make_policy(**changes):
    network = {"name": "unet1d", "down_dims": [8, 16], "step_embed_dim": 8, "n_groups": 4}
    config = PolicyConfig(
        {STATE: VECTOR, ENV: VECTOR},
        VECTOR,
        network=network,
        process=ProcessConfig("vp-cosine", 20),
        objective=ObjectiveConfig("epsilon", "uniform"),
        sampler=SamplerConfig("ddim", 5, "leading", clip=1.0),
    )
    config = replace(config, **{key: value for key, value in changes.items() if key != "network"})
    config = replace(config, network=networks.full_config({**network, **changes.get("network", {})}))
    low = np.array([-2.0, 0.5, 3.0])
    stats = {"min": low, "max": low + np.array([1.0, 4.0, 0.0]), "mean": low + 0.5, "std": np.array([0.3, 1.0, 0.0])}
    modes = {key: config.normalization_mode(key) for key in (*config.observation, ACTION)}
    return DiffusionPolicy(config, Normalizer.fit(dict.fromkeys(modes, stats), modes)).eval()


@pytest.mark.parametrize("mode", ["min_max", "mean_std", "identity"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler"])
def test_policies_of_our_own_are_exported(mode, sampler, tmp_path):
    policy = make_policy(
        normalization={"observation": mode, "action": mode}, sampler=SamplerConfig(sampler, 5, "leading", clip=None)
    )
    again = from_lerobot(to_lerobot(policy, tmp_path / "theirs"))
    obs = {key: torch.rand(2, 2, 3) for key in (STATE, ENV)}
    noise = torch.randn(2, 16, 3)
    chunks = [p.act(obs, {}, noise, torch.Generator().manual_seed(0))[0] for p in (policy, again)]
    # The same weights; the statistics went through LeRobot's float32 min and max, or mean and std.
    torch.testing.assert_close(*chunks, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process": ProcessConfig("flow"), "objective": ObjectiveConfig()}, "process 'flow'"),
        ({"objective": ObjectiveConfig("v", "uniform")}, "prediction_type 'v'"),
        ({"sampler": SamplerConfig("ddim", 5)}, "spacing 'trailing'"),
        ({"sampler": SamplerConfig("ddim", 5, "leading", eta=1.0)}, "eta 1.0"),
        ({"sampler": SamplerConfig("dpmpp-2m", 5, "leading")}, "sampler 'dpmpp-2m'"),
        ({"network": {"per_position_levels": True}}, "levels per position"),
        ({"observation": {STATE: VECTOR}}, "sees only observation.state"),
        ({"observation": {STATE: VECTOR, "observation.other": VECTOR}}, "'observation.other'"),
        ({"pred_horizon": 10}, "pred_horizon 10"),
    ],
)
def test_what_lerobot_cannot_represent_is_refused(changes, message, tmp_path):
    with pytest.raises(DipoleError, match=message):
        to_lerobot(make_policy(**changes), tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_steps_that_visit_the_same_levels_are_the_same_spacing(tmp_path):
    policy = make_policy(sampler=SamplerConfig("ddpm", 20))  # all of 20: trailing is leading
    assert from_lerobot(to_lerobot(policy, tmp_path / "theirs")).sampler == SamplerConfig("ddpm", 20, "leading")


def test_a_range_that_float32_bounds_cannot_hold_is_refused(tmp_path):
    policy = make_policy()
    part = (torch.full((3,), 1e4), torch.full((3,), -1.0))
    affine = {key: policy.normalizer.affine(key) for key in (ENV, ACTION)} | {STATE: part}
    policy.normalizer = Normalizer(affine, {STATE: torch.full((3,), 1e5)})
    with pytest.raises(DipoleError, match=f"narrow range of '{STATE}'"):
        to_lerobot(policy, tmp_path / "theirs")


def test_folders_written_before_roles_and_source_existed_still_load(tmp_path):
    policy = make_policy()
    save_policy(policy, tmp_path / "ours")
    edit_json(tmp_path / "ours" / "config.json", lambda v: [v["config"].pop(key) for key in ("roles", "source")])
    assert load_policy(tmp_path / "ours").config == policy.config
