"""`dipole train`: from a dataset on disk to a run folder, and every way to get it wrong."""

import json
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from cli_helpers import refused
from safetensors.torch import load_file

from dipole.cli import main
from dipole.cli.train import Args, _given
from dipole.data import Episodes
from dipole.data.formats import lerobot
from dipole.envs import make
from dipole.envs.seeds import SELECT_SEED
from dipole.errors import DipoleError
from dipole.policies import load_policy
from dipole.training import read_metrics, trainer

TINY = ["--network", "width=16", "num_blocks=1", "--batch-size", "16", "--precision", "fp32", "--threads", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    made = []
    for length in (30, 25, 40):
        state = rng.normal(size=(length, 3)).astype(np.float32)
        made.append({"observation.state": state, "action": np.tanh(state[:, :2])})
    folder = tmp_path_factory.mktemp("data") / "demos"
    lerobot.write(Episodes.from_list(made, fps=10.0), folder)
    return str(folder)


def train(*words):
    main(["train", *(str(word) for word in words)])


error = partial(refused, "train")


def test_a_run_from_the_command_line(data, tmp_path, capsys):
    out = tmp_path / "run"
    train("--data", data, "--out", out, "--steps", 20, "--val-fraction", 0.4, *TINY)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("20 updates in ")
    assert printed[0].endswith(f"-> {out}")
    assert "held-out loss" in printed[0]
    assert printed[1] == f"next:  dipole eval {out} --env ENV"
    policy = load_policy(out)
    assert policy.config.network["width"] == 16
    assert policy.config.process.name == "flow"
    chunk, _ = policy.act({"observation.state": torch.zeros(2, 2, 3)}, policy.initial_state(2))
    assert chunk.shape == (2, 8, 2)


@pytest.mark.parametrize(
    ("words", "network", "process", "rate"),
    [
        (["--policy", "mlp", "width=16"], "mlp", "flow", 2e-3),
        (["--policy", "unet", "down_dims=[8,16]", "n_groups=2", "--process", "vp-cosine"], "unet1d", "vp-cosine", 3e-4),
        (["--policy", "transformer", "width=16", "num_heads=2", "--process", "edm"], "transformer", "edm", 3e-4),
    ],
)
def test_each_network_trains(data, tmp_path, capsys, words, network, process, rate):
    options = [*words[:2], "--network", *words[2:]]
    train("--data", data, "--out", tmp_path / "run", "--steps", 2, "--batch-size", 8, "--precision", "fp32", *options)
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert record["policy"]["network"]["name"] == network
    assert record["policy"]["process"]["name"] == process
    assert record["train"]["lr"] == rate


@pytest.mark.parametrize(
    ("process", "prediction", "time"), [("vp-cosine", "x0", "uniform"), ("flow", "v", "logit-normal")]
)
def test_what_is_predicted(data, tmp_path, process, prediction, time):
    train("--data", data, "--out", tmp_path / "run", "--process", process, "--prediction", prediction, *TINY)
    objective = json.loads((tmp_path / "run" / "train.json").read_text())["policy"]["objective"]
    assert (objective["prediction_type"], objective["time"]) == (prediction, time)


def test_json_summary(data, tmp_path, capsys):
    train("--data", data, "--out", tmp_path / "run", "--steps", 2, "--json", *TINY)
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == 2
    assert summary["out"] == str(tmp_path / "run")
    assert summary["next"].startswith("dipole eval")


def test_interrupted_it_says_how_to_go_on_and_does_exactly(data, tmp_path, capsys, monkeypatch):
    words = ["--data", data, "--steps", 12, "--seed", 5, *TINY]
    train(*words, "--out", tmp_path / "whole")
    before = trainer.Trainer._after_update

    def press(self, *args):
        before(self, *args)
        if self.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "_after_update", press)
        with pytest.raises(SystemExit) as stopped:
            train(*words, "--out", tmp_path / "cut")
    assert stopped.value.code == 130
    line = capsys.readouterr().err
    command = f"dipole train --out {tmp_path / 'cut'} --resume"
    assert line == f"dipole: interrupted and saved after update 7; go on with:  {command}\n"
    train(*command.split()[2:])  # all other options come from the run
    weights = [load_file(tmp_path / run / "checkpoints" / "last" / "model.safetensors") for run in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resuming_with_another_option_names_it(data, tmp_path, capsys):
    out = tmp_path / "run"
    train("--data", data, "--out", out, "--steps", 2, *TINY)
    text = error(capsys, "--out", out, "--resume", "--lr", 1e-5, "--pred-horizon", 12)
    assert "policy.pred_horizon was 16, now 12" in text
    assert "train.lr was 0.002, now 1e-05" in text


def test_compile_is_a_flag_that_resumption_keeps(data, tmp_path, monkeypatch):
    """Without compiling: only what the training loop is told."""
    told = []

    def stop(policy, episodes, config, out, **options):
        told.append((config.compile, options["command"].get("compile")))
        raise DipoleError("enough")

    monkeypatch.setattr("dipole.training.train", stop)
    for words in (["--compile"], []):
        with pytest.raises(SystemExit):
            train("--data", data, "--out", tmp_path / "run", "--seed", 0, *words, *TINY)
    assert told == [(True, True), (False, None)]
    assert _given(Args(out=tmp_path, seed=0)) == {"seed": 0}


def test_evaluation_in_the_environment_uses_the_seeds_set_aside(tmp_path, capsys, monkeypatch):
    from dipole.envs import collect

    lerobot.write(collect("micro/fork2d", 4, seed=0), tmp_path / "demos")
    seen = []
    real = make

    def watched(*args, **options):
        env = real(*args, **options)
        reset = env.reset
        env.reset = lambda rows, seeds: seen.extend(seeds) or reset(rows, seeds)
        return env

    monkeypatch.setattr("dipole.envs.make", watched)
    words = ["--env", "micro/fork2d", "--steps", 4, "--eval-every", 2, "--eval-episodes", 3]
    train("--data", tmp_path / "demos", "--out", tmp_path / "run", *words, *TINY)
    assert set(seen) == {SELECT_SEED, SELECT_SEED + 1, SELECT_SEED + 2}
    rows = [row for row in read_metrics(tmp_path / "run") if "eval/score" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert "score" in capsys.readouterr().out


def test_bad_input_is_one_line_and_writes_nothing(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert "give --data" in error(capsys, "--out", out)
    assert "nowhere" in error(capsys, "--out", out, "--data", tmp_path / "nowhere")
    base = ["--out", out, "--data", data]
    assert "did you mean 'unet'" in error(capsys, *base, "--policy", "unett")
    assert "did you mean 'vp-cosine'" in error(capsys, *base, "--process", "vp-cosin")
    assert "did you mean 'width'" in error(capsys, *base, "--network", "widht=3")
    assert "expected key=value" in error(capsys, *base, "--network", "width")
    assert "observation.states" in error(capsys, *base, "--features", "observation.states")
    assert "do not fit" in error(capsys, *base, "--action-horizon", 16)
    assert "fewer than the prediction horizon 32" in error(capsys, *base, "--pred-horizon", 32)
    assert "not both" in error(capsys, *base, "--steps", 3, "--minutes", 1)
    assert "did you mean 'micro/fork2d'" in error(capsys, *base, "--env", "micro/fork2")
    assert "nothing to resume" in error(capsys, "--out", out, "--resume")
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").touch()
    assert "not empty" in error(capsys, *base)
    assert os.listdir(out) == ["notes.txt"]


def test_help_tells_defaults_and_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        train("--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "dipole train --data runs/demos --out runs/peg --minutes 1" in text
    assert "(default: 2e-3 for mlp, else 3e-4)" in text
