"""What goes wrong in `dipole finetune`, through the command: one line with what, where and how to mend it; exit 2."""

import json
import os
import signal
import socket
import sys
from functools import partial

import numpy as np
import pytest
import torch
from cli_helpers import refused

import dipole.rl.finetune as loop
from dipole.cli import main
from dipole.cli.finetune import _config, _merged
from dipole.data import Episodes, Feature
from dipole.envs import collect, make
from dipole.policies import SamplerConfig, make_config, make_policy, save_policy
from dipole.training import read_metrics

ENV = "micro/two_goal"
SMALL = ["--num-envs", "2", "--eval-episodes", "2", "--env-steps", "40", "--threads", "1"]
SMALL += ["--report-episodes", "0"]
RESIP = ["--set", "steps=6", "epochs=1", "hidden=[8,8]"]


def policy_of(episodes, folder, horizon=4, **options):
    torch.manual_seed(0)
    config = make_config(
        episodes, network={"name": "mlp", "width": 16, "num_blocks": 1}, obs_horizon=1, pred_horizon=horizon,
        action_horizon=horizon, process="vp-cosine", sampler=SamplerConfig("ddim", 2), **options,
    )  # fmt: skip
    return save_policy(make_policy(config, episodes), folder)


@pytest.fixture(scope="module")
def demonstrations():
    return collect(ENV, 6)


@pytest.fixture(scope="module")
def base(demonstrations, tmp_path_factory):
    return policy_of(demonstrations, tmp_path_factory.mktemp("base") / "policy")


def finetune(*words):
    main(["finetune", *(str(word) for word in words)])


error = partial(refused, "finetune")


def test_a_chunk_longer_than_an_episode(demonstrations, tmp_path, capsys):
    long = policy_of(demonstrations, tmp_path / "long", horizon=40)
    text = error(capsys, "resip", long, "--env", ENV, "--out", tmp_path / "run", *SMALL)
    assert "executes Ta=40 actions per chunk, episodes of 'micro/two_goal' last 32: give it a smaller action" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("env", "complaint"),
    [
        (
            "micro/play4",
            "gives 'observation.state' of shape [6], the policy was trained on [2]: is it for another task?",
        ),
        ("micro/multi8", "needs 'observation.state', but environment 'micro/multi8' gives only observation.language"),
    ],
)
def test_spaces_that_do_not_fit(base, env, complaint, tmp_path, capsys):
    text = error(capsys, "dsrl", base, "--env", env, "--out", tmp_path / "run", *SMALL)
    assert complaint in text


def test_actions_of_another_number(tmp_path, capsys):
    rng = np.random.default_rng(0)
    columns = {"observation.state": rng.normal(size=(20, 2)).astype(np.float32), "action": rng.uniform(-1, 1, (20, 3))}
    columns["action"] = columns["action"].astype(np.float32)
    features = {"observation.state": Feature("float32", (2,)), "action": Feature("float32", (3,))}
    other = policy_of(Episodes(features, columns, np.array([10, 20]), 10.0), tmp_path / "other")
    text = error(capsys, "resip", other, "--env", ENV, "--out", tmp_path / "run", *SMALL)
    assert "actions of 3 components, environment 'micro/two_goal' takes 2: is the policy for another task?" in text


def test_actions_in_other_units(demonstrations, tmp_path, capsys):
    columns = {**demonstrations.columns, "action": 100 + 50 * demonstrations.columns["action"]}
    pixels = Episodes(demonstrations.features, columns, demonstrations.ends, demonstrations.fps, demonstrations.tasks)
    other = policy_of(pixels, tmp_path / "pixels")
    text = error(capsys, "resip", other, "--env", ENV, "--out", tmp_path / "run", *SMALL)
    assert "component 0, 'micro/two_goal' takes -1.5..1.5: was it trained on data in other units?" in text


@pytest.mark.parametrize("method", ["dsrl", "find"])
def test_a_stochastic_sampler_where_the_noise_is_chosen(method, base, tmp_path, capsys):
    text = error(capsys, method, base, "--env", ENV, "--out", tmp_path / "run", *SMALL, "--sampler", "ddpm")
    assert f"{method} chooses the initial noise, and the sampler 'ddpm' adds more on the way: choose a deter" in text


class Wrapped:
    """Training environments with something wrong: `spoil(env, step count, result or None)` before or after a step."""

    def __init__(self, env, spoil):
        self.env, self.spec, self.num_envs, self.spoil = env, env.spec, env.num_envs, spoil
        self.reset, self.close = env.reset, env.close

    def step(self, actions, rows):
        self.spoil(self.env, None)
        result = self.env.step(actions, rows)
        self.spoil(self.env, result)
        return result


def spoil_training(monkeypatch, spoil):
    """Wrap what the loop trains in (not what it evaluates in, which it makes with two arguments)."""

    def made(name, num_envs, *mode, **options):
        env = make(name, num_envs, *mode, **options)
        return Wrapped(env, spoil) if mode else env

    monkeypatch.setattr(loop, "make", made)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite(bad, base, tmp_path, capsys, monkeypatch):
    def spoil(env, result):
        if result is not None:
            result.reward[-1] = bad

    spoil_training(monkeypatch, spoil)
    text = error(capsys, "resip", base, "--env", ENV, "--out", tmp_path / "run", *SMALL, *RESIP)
    assert f"'micro/two_goal' gave a reward that is not finite ({bad}) in the episode with seed " in text
    assert "at env step 0: correct it there, or have success paid instead (--reward success)" in text


def test_success_is_paid_whatever_the_reward(base, tmp_path, monkeypatch):
    def spoil(env, result):
        if result is not None:
            result.reward[:] = np.nan

    spoil_training(monkeypatch, spoil)
    finetune("resip", base, "--env", ENV, "--out", tmp_path / "run", *SMALL, *RESIP, "--reward", "success")
    figures = [value for row in read_metrics(tmp_path / "run") for key, value in row.items() if "loss" in key]
    assert figures
    assert np.isfinite(figures).all()


def test_an_environment_that_breaks_again_and_again(base, tmp_path, capsys, monkeypatch):
    def spoil(env, result):
        if result is None:
            raise RuntimeError("the joint exploded\nsomewhere deep")

    spoil_training(monkeypatch, spoil)
    text = error(capsys, "resip", base, "--env", ENV, "--out", tmp_path / "run", *SMALL, *RESIP)
    assert "environments died 6 times in a row: the joint exploded somewhere deep" in text


def test_a_killed_worker_process_costs_its_episodes_only(tmp_path, capsys, monkeypatch):
    """A real process of a real simulator, killed in the middle of a run."""
    pytest.importorskip("gym_pusht")
    spec = make("pusht").spec
    rng = np.random.default_rng(0)
    features = {"observation.state": spec.observation["observation.state"], "action": spec.action}
    columns = {key: rng.uniform(0, 512, (20, 2)).astype(np.float32) for key in features}
    base = policy_of(Episodes(features, columns, np.array([10, 20]), 10.0), tmp_path / "base")
    killed = []

    def spoil(env, result):
        killed.append(None)
        if len(killed) == 21:  # before the eleventh step: five of the second decision's steps are done
            os.kill(env._workers[0].process.pid, signal.SIGKILL)
            env._workers[0].process.join()

    spoil_training(monkeypatch, spoil)
    words = ["resip", base, "--env", "pusht", "--mode", "async", "--num-workers", 2, *SMALL, *RESIP, "--json"]
    finetune(*words, "--out", tmp_path / "run", "--eval-episodes", 0)
    result = json.loads(capsys.readouterr().out)
    assert result["lost"] == {"workers": 1, "episodes": 2, "env_steps": 20}
    assert result["env_steps"] >= 40


def test_resumption_with_another_method(base, tmp_path, capsys):
    out = tmp_path / "run"
    finetune("resip", base, "--env", ENV, "--out", out, *SMALL, *RESIP)
    capsys.readouterr()
    text = error(capsys, "dppo", base, "--env", ENV, "--out", out, "--resume")
    assert f"{out}: was started with method 'resip', not 'dppo': use another --out" in text


def test_ray_is_not_installed(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    text = error(capsys, "resip", base, "--env", ENV, "--out", tmp_path / "run", *SMALL, "--rollouts", "ray")
    assert text == "dipole: 'ray' is not installed: run  pip install 'dipole[ray]'\n"
    assert not (tmp_path / "run").exists()


def test_ray_is_not_reached(base, tmp_path, capsys):
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    words = ["resip", base, "--env", ENV, "--out", tmp_path / "run", *SMALL, "--rollouts", "ray"]
    text = error(capsys, *words, "--ray-address", address)
    assert f"no Ray cluster at '{address}' ([Errno" in text
    assert "start one with `ray start --head`" in text


def test_places_that_exclude_each_other(base, tmp_path, capsys):
    words = ["resip", base, "--env", ENV, "--out", tmp_path / "run", *SMALL]
    text = error(capsys, *words, "--rollouts", "ray", "--mode", "async")
    assert "--mode async is for environments on this machine: not with --rollouts ray" in text
    assert "a Ray address is for rollouts on ray" in error(capsys, *words, "--ray-address", "head:6379")
    assert "num_workers is for environments in workers" in error(capsys, *words, "--num-workers", "2")
    assert "num_workers is 0: it must be at least 1" in error(capsys, *words, "--rollouts", "ray", "--num-workers", "0")


def test_on_resumption_places_are_chosen_as_a_whole():
    before = {"env": ENV, "mode": "async", "num_workers": 4}
    ray = _merged(before, {"rollouts": "ray", "ray_address": "head:6379"})
    assert (_config(ray).mode, _config(ray).num_workers, _config(ray).ray_address) == ("ray", None, "head:6379")
    assert _config(_merged(ray, {})) == _config(ray)
    back = _merged(ray, {"rollouts": "local", "seed": 3})
    assert (_config(back).mode, _config(back).ray_address, _config(back).seed) == (None, None, 3)
    assert _config(_merged(back, {"mode": "sync"})).mode == "sync"


def test_options_of_the_environment(base, tmp_path, capsys):
    out, words = tmp_path / "run", ["--env", ENV, *SMALL, *RESIP]
    assert "unknown option" in error(capsys, "resip", base, "--out", out, *words, "--env-options", "height=2")
    assert not out.exists()
    finetune("resip", base, "--out", out, *words, "--env-options", "max_steps=9")
    assert json.loads((out / "finetune.json").read_text())["data"]["options"] == {"max_steps": 9}
    assert [row["train/length"] for row in read_metrics(out) if "train/length" in row][-1] <= 9
    finetune("resip", base, "--out", out, "--resume", "--env-steps", "60")
    assert [row["train/length"] for row in read_metrics(out) if "train/length" in row][-1] <= 9
    other = error(capsys, "resip", base, "--out", out, "--resume", "--env-options", "max_steps=8", "--env-steps", "80")
    assert "max_steps" in other
