"""The loop: every method runs, loads as a policy and resumes to the bit; what does not fit is refused in one line."""

import dataclasses

import numpy as np
import pytest
import torch
from rl_helpers import ENV, demonstrations, tiny_policy

from dipole.envs import make
from dipole.errors import DipoleError
from dipole.evaluation.rollout import rollout
from dipole.policies import DiffusionPolicy, load_policy, make_config, make_policy
from dipole.rl import finetune as loop
from dipole.rl.base import Base
from dipole.rl.finetune import finetune
from dipole.rl.methods import METHODS
from dipole.rl.methods import make_config as method_config
from dipole.rl.settings import FinetuneConfig
from dipole.training import read_metrics

SMALL = {
    "dppo": {"decisions": 4, "batch_size": 8, "tuned_steps": 2, "epochs": 2, "kl_weight": 0.01},
    "ddpo": {"decisions": 4, "batch_size": 8},
    "reinflow": {"decisions": 4, "batch_size": 8, "epochs": 2, "entropy_weight": 0.01},
    "dsrl": {"hidden": [8, 8], "warmup": 2, "decisions": 3, "batch_size": 8, "updates": 2, "distill_updates": 1},
    "expo": {"hidden": [8, 8], "warmup": 2, "decisions": 3, "batch_size": 8, "updates": 2, "samples": 2, "critics": 3},
    "find": {"hidden": [8, 8], "decisions": 4, "batch_size": 8},
    "resip": {"hidden": [8, 8], "steps": 6, "epochs": 2, "actor_warmup": 1},
}
RUN = FinetuneConfig(env_steps=150, num_envs=3, eval_episodes=2, save_seconds=0.0)


def start(method, out, policy=None, config=RUN, **options):
    settings = method_config(method, options.pop("settings", SMALL[method]))
    offline = demonstrations() if method == "expo" else None
    return finetune(policy or tiny_policy(), ENV, method, settings, config, out, offline=offline, **options)


def weights(folder):
    return dict(load_policy(folder).state_dict())


def test_the_list_of_methods_is_tested():
    assert set(SMALL) == set(METHODS)


@pytest.mark.parametrize("method", SMALL)
def test_a_stopped_run_ends_with_the_weights_of_an_uninterrupted_one(method, tmp_path, monkeypatch):
    whole = start(method, tmp_path / "whole")
    assert whole.env_steps >= 150
    assert whole.before is not None

    made = loop.make_learner

    def stopping(*arguments):
        learner = made(*arguments)
        iterate = learner.iterate

        def stop_after_two(iteration):
            if iteration == 2:
                raise KeyboardInterrupt  # a kill: the newest state is that of iteration 2's beginning
            return iterate(iteration)

        learner.iterate = stop_after_two
        return learner

    monkeypatch.setattr(loop, "make_learner", stopping)
    with pytest.raises(KeyboardInterrupt):
        start(method, tmp_path / "cut")
    monkeypatch.setattr(loop, "make_learner", made)
    resumed = start(method, tmp_path / "cut", resume=True)
    assert resumed.env_steps == whole.env_steps
    assert resumed.episodes == whole.episodes
    first, second = (
        weights(tmp_path / "whole" / "checkpoints" / "last"),
        weights(tmp_path / "cut" / "checkpoints" / "last"),
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(tmp_path / name)]
        for name in ("whole", "cut")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("method", SMALL)
def test_checkpoint_acts_as_the_policy_in_memory_and_the_base_is_left_as_it_was(method, tmp_path):
    policy = tiny_policy()
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    result = start(method, tmp_path / "run", policy)
    assert all(torch.equal(before[key], value) for key, value in policy.state_dict().items())
    loaded = load_policy(tmp_path / "run" / "checkpoints" / "last")
    env, seeds = make(ENV, 4), [100_000, 100_001, 100_002, 100_003]
    played = [rollout(p, env, seeds, block=4, keep_trajectories=True) for p in (result.policy, loaded)]
    for one, other in zip(played[0].episodes, played[1].episodes, strict=True):
        assert np.array_equal(one.trajectory.actions, other.trajectory.actions)


def test_tuning_every_step_leaves_an_ordinary_policy(tmp_path):
    settings = {**SMALL["dppo"], "tuned_steps": None}
    start("dppo", tmp_path / "run", settings=settings)
    assert type(load_policy(tmp_path / "run")) is DiffusionPolicy


def test_figures_and_trackers(tmp_path):
    start("resip", tmp_path / "run", config=dataclasses.replace(RUN, track=("tensorboard",)))
    rows = read_metrics(tmp_path / "run")
    assert rows[0]["step"] == 0
    assert rows[0]["eval/low"] <= rows[0]["eval/score"] <= rows[0]["eval/high"]
    assert rows[0]["eval/score"] == rows[0]["eval/success"]
    assert any("train/env_steps" in row and "value_error" in row for row in rows)
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_resumption_is_refused_with_another_method_or_setting(tmp_path):
    start("resip", tmp_path / "run")
    with pytest.raises(DipoleError, match=r"was started with method 'resip', not 'dsrl': use another --out"):
        start("dsrl", tmp_path / "run", resume=True)
    with pytest.raises(DipoleError, match=r"data.settings.clip was 0.2, now 0.3"):
        start("resip", tmp_path / "run", resume=True, settings={**SMALL["resip"], "clip": 0.3})
    other = tiny_policy()
    other.network.head.bias.data.add_(1)
    with pytest.raises(DipoleError, match=r"policy.digest was"):
        start("resip", tmp_path / "run", other, resume=True)
    with pytest.raises(DipoleError, match="the output folder is not empty: go on with --resume"):
        start("resip", tmp_path / "run")
    with pytest.raises(DipoleError, match="nothing to resume"):
        start("resip", tmp_path / "none", resume=True)


def test_a_finished_run_goes_on_with_more_env_steps(tmp_path):
    long = start("resip", tmp_path / "long", config=dataclasses.replace(RUN, env_steps=200))
    start("resip", tmp_path / "short", config=dataclasses.replace(RUN, env_steps=80))
    more = start("resip", tmp_path / "short", config=dataclasses.replace(RUN, env_steps=200), resume=True)
    assert more.env_steps == long.env_steps
    first, second = (weights(tmp_path / name / "checkpoints" / "last") for name in ("long", "short"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_unknown_method_and_setting():
    with pytest.raises(DipoleError, match="unknown fine-tuning method 'dpo': did you mean"):
        method_config("dpo", {})
    with pytest.raises(DipoleError, match="unknown key in dppo: 'epoch': did you mean 'epochs'"):
        method_config("dppo", {"epoch": 3})
    with pytest.raises(DipoleError, match=r"dppo.epochs: expected int"):
        method_config("dppo", {"epochs": "many"})
    with pytest.raises(DipoleError, match="num_envs is 0"):
        FinetuneConfig(num_envs=0)


def test_a_base_that_does_not_fit_the_environment():
    policy = tiny_policy()
    with pytest.raises(DipoleError, match=r"needs 'observation.state', but|of shape"):
        Base(policy, make("micro/grip2d", 1))
    with pytest.raises(DipoleError, match=r"actions of 2 components|of shape"):
        Base(policy, make("micro/slot_peg", 1))
    with pytest.raises(DipoleError, match=r"executes Ta=4 actions per chunk, episodes of 'micro/two_goal' last 3"):
        Base(policy, make(ENV, 1, max_steps=3))


def test_a_base_normalised_for_other_units():
    """Trained on pixels, run in metres."""
    episodes = demonstrations()
    columns = {**episodes.columns, "action": 100 + 50 * episodes.columns["action"]}
    pixels = dataclasses.replace(episodes, columns=columns)
    policy = make_policy(make_config(pixels, network={"name": "mlp", "width": 16}, pred_horizon=16), pixels)
    with pytest.raises(DipoleError, match=r"normalised to .* in component 0, 'micro/two_goal' takes -1.5..1.5"):
        Base(policy, make(ENV, 1))


def test_a_policy_with_memory_is_refused():
    class Remembering:
        obs_horizon, pred_horizon, action_horizon, action_dim = 1, 4, 4, 2

        def initial_state(self, batch):
            return {"history": torch.zeros(batch, 3)}

    with pytest.raises(DipoleError, match="keeps something in memory between chunks"):
        Base(Remembering(), make(ENV, 1))


@pytest.mark.parametrize("method", ["dppo", "reinflow", "expo"])
def test_methods_that_train_the_network_refuse_a_remote_policy(method, tmp_path):
    class Remote:
        obs_horizon, pred_horizon, action_horizon, action_dim = 1, 4, 4, 2

        def initial_state(self, batch):
            return {}

        def act(self, obs, state, noise=None, generator=None):
            return torch.zeros(len(obs["observation.state"]), 4, 2), {}

    with pytest.raises(DipoleError, match="use dsrl|reinflow is for flow policies"):
        start(method, tmp_path / "run", Remote())


def test_divergence_is_reported(tmp_path):
    settings = {**SMALL["resip"], "critic_lr": float("inf")}
    with pytest.raises(DipoleError, match="lower the learning rate"):
        start("resip", tmp_path / "run", settings=settings, config=dataclasses.replace(RUN, env_steps=2000))


def test_images_are_seen_through_the_frozen_encoder():
    from dipole.data import Episodes, Feature

    rng = np.random.default_rng(0)
    frames = 12
    columns = {
        "observation.image": rng.integers(0, 255, (frames, 96, 96, 3), dtype=np.uint8),
        "observation.state": rng.normal(size=(frames, 39)).astype(np.float32),
        "action": rng.uniform(-1, 1, (frames, 4)).astype(np.float32),
    }
    features = {
        "observation.image": Feature("image", (96, 96, 3)),
        "observation.state": Feature("float32", (39,)),
        "action": Feature("float32", (4,)),
    }
    episodes = Episodes(features, columns, np.array([frames]), 10.0)
    policy = make_policy(make_config(episodes, network={"name": "mlp", "width": 16}, obs_horizon=1), episodes).eval()

    class Spec:
        """Stands in for a simulator with a camera."""

        from dipole.envs.spec import EnvSpec

        num_envs = 1
        spec = EnvSpec(
            "camera", {k: f for k, f in features.items() if k != "action"}, features["action"],
            -np.ones(4, np.float32), np.ones(4, np.float32), 100, 10.0, "look",
        )  # fmt: skip

    base = Base(policy, Spec())
    obs = {key: torch.from_numpy(columns[key][:3, None]) for key in base.keys}
    seen = base.features(obs)
    assert seen.shape == (3, base.feature_dim)
    assert base.feature_dim > 39
    cond = policy.encode(obs)
    assert torch.equal(base.cond(seen)["obs"], cond["obs"])
    noise = torch.randn(3, 16, 4)
    assert torch.equal(base.chunk(seen, noise), policy.denoise(cond, noise))
