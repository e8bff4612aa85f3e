"""What works on our own policies works on one that came through LeRobot's format, unchanged: of state, and of images.

Tiny policies with random weights go out with `to_lerobot` and come in with `dipole import`; fine-tuning has tests of
its own in tests/rl/test_imported_policies.py.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from dipole import networks
from dipole.cli import main
from dipole.data import Episodes, Feature, Normalizer
from dipole.data.formats import lerobot
from dipole.envs import make
from dipole.errors import DipoleError
from dipole.evaluation.rollout import rollout
from dipole.policies import (
    DiffusionPolicy,
    ObjectiveConfig,
    Policy,
    PolicyConfig,
    ProcessConfig,
    SamplerConfig,
    from_lerobot,
    load_policy,
    to_lerobot,
)
from dipole.realtime import load
from dipole.realtime.backends import prepare
from dipole.realtime.block_calibration import calibrate
from dipole.realtime.block_schedule import ScheduleOptions, make_schedule
from dipole.realtime.runtime import METHODS, Runtime, write_runtime
from dipole.rl.finetune import finetune
from dipole.rl.methods import make_config
from dipole.rl.settings import FinetuneConfig
from dipole.safety import Limits, OutputGuard
from dipole.serialization import to_dict

pytest.importorskip("gym_pusht")

STATE, SCENE, IMAGE, ACTION = "observation.state", "observation.environment_state", "observation.image", "action"
VECTOR = Feature("float32", (2,))
KINDS = {
    "state": ("pusht", {STATE: VECTOR, SCENE: Feature("float32", (16,))}),
    "image": ("pusht-image", {STATE: VECTOR, IMAGE: Feature("image", (96, 96, 3))}),
}
VISION = {"name": "resnet18", "resize_shape": [32, 32]}
STEPS = 20  # of an episode: three chunks
# Denoising has 4 steps: 2 of them are computed in full.
HALF = ScheduleOptions(budget=2)


def tiny(kind, seed=0):
    """A policy LeRobot can represent, whose actions depend on what it sees."""
    observation = KINDS[kind][1]
    config = PolicyConfig(
        observation,
        VECTOR,
        network=networks.full_config({"name": "unet1d", "down_dims": [16, 32], "n_groups": 4, "step_embed_dim": 16}),
        vision=networks.full_vision_config(VISION) if IMAGE in observation else None,
        process=ProcessConfig("vp-cosine", 100),
        objective=ObjectiveConfig("epsilon", "uniform"),
        sampler=SamplerConfig("ddim", 4, "leading", clip=1.0),
        normalization={"observation": "min_max", "image": "mean_std", "action": "min_max"},
    )
    stats = {key: {"min": np.zeros(f.shape), "max": np.full(f.shape, 512.0)} for key, f in observation.items()}
    stats[IMAGE] = {"mean": np.full((3, 1, 1), 0.5), "std": np.full((3, 1, 1), 0.25)}
    stats[ACTION] = {"min": np.zeros(2), "max": np.full(2, 512.0)}
    modes = {key: "mean_std" if key == IMAGE else "min_max" for key in [*observation, ACTION]}
    torch.manual_seed(seed)
    return DiffusionPolicy(config, Normalizer.fit(stats, modes)).eval()


def imported_to(folder, kind, seed=0):
    """Write a policy in LeRobot's format, take it over; return the folder of the imported one."""
    to_lerobot(tiny(kind, seed), folder / "lerobot")
    main(["import", str(folder / "lerobot"), "--out", str(folder / "policy")])
    return folder / "policy"


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def imported(kind, tmp_path_factory):
    return imported_to(tmp_path_factory.mktemp(kind), kind)


@pytest.fixture(scope="module")
def env(kind):
    vector = make(KINDS[kind][0], 1, max_steps=STEPS)
    yield vector
    vector.close()


def seen(kind, batch=3, seed=0):
    """Return raw observations `[B, 2, ...]` under LeRobot's feature names."""
    g = torch.Generator().manual_seed(seed)
    return {
        key: torch.randint(0, 256, (batch, 2, *f.shape), generator=g, dtype=torch.uint8)
        if f.is_image
        else 512 * torch.rand(batch, 2, *f.shape, generator=g)
        for key, f in KINDS[kind][1].items()
    }


def played(policy, env, **options):
    """Return the actions of one episode."""
    episode = rollout(policy, env, [100_000], keep_trajectories=True, **options).episodes[0]
    actions = episode.trajectory.actions
    assert np.isfinite(actions).all()
    return actions


def refusal(capsys, *words):
    """Return the one line with which a command refuses."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert error[-1].startswith("dipole: ")
    return error[-1]


def test_the_call_of_the_readme(kind, tmp_path):
    """`Policy.from_lerobot`, then `act` on raw tensors, as users are told to write it."""
    ours = tiny(kind)
    policy = Policy.from_lerobot(to_lerobot(ours, tmp_path / "lerobot"))
    obs, batch = seen(kind), 3
    chunk, state = policy.act(obs, policy.initial_state(batch), noise=None)
    assert chunk.shape == (batch, 8, 2)
    assert state == {}
    assert 0 <= float(chunk.min()) < float(chunk.max()) <= 512  # physical units: clip=1 is the range of the statistics
    noise = torch.randn(batch, 16, 2, generator=torch.Generator().manual_seed(0))
    there, here = (p.act(obs, p.initial_state(batch), noise)[0] for p in (policy, ours))
    torch.testing.assert_close(there, here, rtol=0, atol=1e-3)  # statistics once more through float32, of 512 units


def _block_cache(policy, kind):
    schedule = make_schedule(calibrate(policy, seen(kind)), HALF)
    return to_dict(schedule)


# Method -> its options for a policy; `streaming` needs training of its own.
RUNTIMES = {
    "plain": lambda policy, kind: {},
    "rti": lambda policy, kind: {"num_steps": 2},
    "chunking": lambda policy, kind: {"delay": 2},
    "ensemble": lambda policy, kind: {},
    "block-cache": _block_cache,
}


def test_every_method_is_tried():
    assert {*RUNTIMES, "streaming"} == {"plain", *METHODS}


@pytest.mark.parametrize("method", RUNTIMES)
def test_a_method_runs_it_as_runtime_json_says(method, kind, imported, env, tmp_path):
    folder = shutil.copytree(imported, tmp_path / "policy")
    write_runtime(Runtime(method, RUNTIMES[method](load_policy(folder), kind)), folder)
    actions = played(load(folder), env)
    assert np.array_equal(actions, played(load(folder), env))
    plain = played(load_policy(folder), env)
    assert len(actions) == len(plain) == STEPS
    assert np.array_equal(actions, plain) == (method == "plain")  # or the method would do nothing


def test_streaming_is_refused_for_want_of_training(imported, env, capsys):
    error = refusal(capsys, "eval", imported, "--env", env.spec.name, "--episodes", 1, "--method", "streaming")
    assert "streaming" in error
    assert "train" in error


@pytest.mark.parametrize("backend", ["packed", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_back_end_computes_the_same(backend, kind, imported):
    policy = load_policy(imported)
    noise = torch.randn(3, 16, 2, generator=torch.Generator().manual_seed(0))
    cond = policy.encode(seen(kind))
    with torch.no_grad():
        fast, eager = (p.denoise(cond, noise) for p in (prepare(policy, backend), policy))
    torch.testing.assert_close(fast, eager, rtol=0, atol=1e-4)  # normalised actions; the bound of issue and benchmark


def test_it_is_evaluated_with_late_chunks(imported, env, tmp_path, capsys):
    words = ["eval", imported, "--env", env.spec.name, "--episodes", 1, "--max-steps", STEPS, "--json"]
    late = ["--latency-ms", "0,200", "--execution", "sync,async-drop,rtc", "--out", tmp_path]
    main([str(word) for word in [*words, *late]])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["mode"], row["latency_ms"]) for row in rows] == [
        (mode, latency) for mode in ("sync", "async-drop", "rtc") for latency in (0.0, 200.0)
    ]
    assert all(0 <= row["score"] <= 1 for row in rows)


def test_it_is_served_and_guarded(kind, imported):
    """Over a real socket; the guard's limits are tighter than the policy's actions."""
    pytest.importorskip("websockets")
    pytest.importorskip("msgpack")
    from dipole.evaluation.seeds import policy_generator
    from dipole.serving.background import serving
    from dipole.serving.client import PolicyClient
    from dipole.serving.models import ModelStore, Source, load_model

    policy, obs = load_policy(imported), seen(kind, batch=1)
    expected = policy.act(obs, policy.initial_state(1), generator=[policy_generator(7)])[0].numpy()
    limits = Limits(low=(200.0, 200.0), high=(300.0, 300.0), max_change=(5.0, 5.0))
    boxed, found = OutputGuard(limits).check(expected)
    assert {violation.rule for violation in found} == {"limits", "rate"}
    sent = {key: value[0].numpy() for key, value in obs.items()}
    for guard, want in ((None, expected), (OutputGuard(limits), boxed)):
        model = load_model(Source("m", imported), guard)
        with serving(ModelStore([model])) as server, PolicyClient(server.url) as client:
            reply = client.infer(sent, seed=7)
        np.testing.assert_array_equal(reply.actions, want[0])
        assert bool(reply.violations) == (guard is not None)


def recorded(kind, frames=24):
    """Return an episode of noise, as demonstrations of the environment would look."""
    rng = np.random.default_rng(0)
    features = {**KINDS[kind][1], ACTION: VECTOR}
    columns = {
        key: rng.integers(0, 256, (frames, *f.shape), dtype=np.uint8)
        if f.is_image
        else rng.uniform(0, 512, (frames, *f.shape)).astype(np.float32)
        for key, f in features.items()
    }
    return Episodes(features, columns, np.array([frames]), 10.0, ())


DISTILLED = [
    *(("state", method) for method in ("consistency", "shortcut", "progressive")),
    ("image", "consistency"),
    *(pytest.param("image", method, marks=pytest.mark.slow) for method in ("shortcut", "progressive")),
]


@pytest.mark.parametrize(("kind", "method"), DISTILLED, indirect=["kind"])
def test_it_is_distilled(method, kind, imported, env, tmp_path, capsys):
    lerobot.write(recorded(kind), tmp_path / "demos")
    words = ["--method", method, "--data", tmp_path / "demos", "--teacher-steps", 4, "--steps", 2, "--batch-size", 4]
    main([str(word) for word in ["distill", imported, "--out", tmp_path / "one", *words, "--json"]])
    capsys.readouterr()
    student = load_policy(tmp_path / "one")
    assert student.sampler.num_steps == 1
    assert student.config.observation == load_policy(imported).config.observation
    assert len(played(student, env)) == STEPS


def test_two_of_them_are_composed(kind, imported, env, tmp_path, capsys):
    other = imported_to(tmp_path / "other", kind, seed=1)
    capsys.readouterr()
    words = ["--env", env.spec.name, "--weights", 0.5, 0.5, "--episodes", 1, "--max-steps", STEPS, "--json"]
    main([str(word) for word in ["compose", imported, other, "--out", tmp_path / "both", *words]])
    assert json.loads(capsys.readouterr().out)["weights"] == [0.5, 0.5]
    composed = load_policy(tmp_path / "both")
    actions = played(composed, env)
    assert not any(np.array_equal(actions, played(load_policy(folder), env)) for folder in (imported, other))


def test_one_that_sees_states_and_one_that_sees_images_are_composed(tmp_path):
    from dipole.policies.composed import compose

    parents = [from_lerobot(to_lerobot(tiny(kind), tmp_path / kind)) for kind in KINDS]
    obs = {**seen("state"), **seen("image")}
    noise = torch.randn(3, 16, 2, generator=torch.Generator().manual_seed(0))
    for i, weights in enumerate([(1.0, 0.0), (0.0, 1.0)]):
        alone = parents[i].act(obs, {}, noise)[0]
        assert torch.equal(compose(parents, weights).act(obs, {}, noise)[0], alone)
    assert torch.isfinite(compose(parents).act(obs, {}, noise)[0]).all()


# Capturing the graphs of a ResNet takes ten seconds.
@pytest.mark.parametrize("kind", ["state", pytest.param("image", marks=pytest.mark.slow)], indirect=True)
def test_it_is_exported_for_a_robot_without_dipole(imported, tmp_path, capsys):
    main(["export", str(imported), "--format", "torch-export", "--out", str(tmp_path / "graphs"), "--json"])
    parity = json.loads(capsys.readouterr().out)["parity"]
    assert parity["max_difference"] < 1e-4  # in normalised actions; the command's own bound


def test_it_is_published_with_its_origin(imported, env, tmp_path, capsys):
    folder = shutil.copytree(imported, tmp_path / "policy")
    words = ["--env", env.spec.name, "--episodes", "1", "--max-steps", str(STEPS)]
    main(["eval", str(folder), *words])
    main(["push", str(folder), f"{tmp_path}/published", "--license", "mit"])
    card = (tmp_path / "published" / "README.md").read_text()
    for text in ("lerobot: ", f"| environment | `{env.spec.name}` |", "| max reward |", "| sampler | ddim, 4 steps |"):
        assert text in card, text
    main(["pull", f"{tmp_path}/published", "--out", str(tmp_path / "pulled")])
    assert np.array_equal(played(load_policy(tmp_path / "pulled"), env), played(load_policy(imported), env))


# dppo, dsrl, expo and resip are in tests/rl/test_imported_policies.py; ddpo is dppo without a critic.
TUNED = {
    "ddpo": {"decisions": 1, "batch_size": 2, "epochs": 1, "tuned_steps": 2},
    "find": {"decisions": 1, "batch_size": 2, "updates": 1, "hidden": [8], "calibration_updates": 1},
}


@pytest.mark.parametrize("method", TUNED)
def test_it_is_finetuned_and_acts_as_the_learner_left_it(method, imported, env, tmp_path):
    settings = FinetuneConfig(env_steps=16, num_envs=2, eval_episodes=0, save_seconds=1000.0)
    config = make_config(method, TUNED[method])
    out, options = tmp_path / "run", {"max_steps": 8}
    result = finetune(load_policy(imported), env.spec.name, method, config, settings, out, env_options=options)
    assert result.env_steps >= 16
    loaded = load_policy(out / "checkpoints" / "last")
    assert type(loaded) is type(result.policy)
    assert np.array_equal(played(loaded, env), played(result.policy, env))


def test_reinflow_is_for_flow_policies(imported, env, tmp_path, capsys):
    words = ["--env", env.spec.name, "--out", tmp_path / "run", "--env-steps", 16, "--num-envs", 1]
    error = refusal(capsys, "finetune", "reinflow", imported, *words)
    assert error == "dipole: reinflow is for flow policies: use dppo, or sample this one in a flow"


def test_a_policy_kind_lerobot_lacks_is_named(tmp_path):
    with pytest.raises(DipoleError, match="LeRobot cannot represent"):
        to_lerobot(tiny("state").with_sampler(SamplerConfig("heun", 4)), tmp_path / "new")
