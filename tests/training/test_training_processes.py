"""Two processes must train as one does, on the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_standin import make_episodes, make_standin

from dipole.training import TrainConfig, read_metrics, train
from dipole.training.checkpoint import load_state

SCRIPT = Path(__file__).with_name("training_standin.py")
# The mean of two means of halves is summed in another order than the mean of the whole: 1e-7 relative per update in
# fp32. Adam's division lets it grow; over 40 updates of these runs it stays below 1e-6 in the losses.
TOLERANCE = 1e-5


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _options(tmp_path, **options):
    # Padding is masked: the two processes then have different numbers of actions to average over.
    settings = {"steps": 40, "mask_padding": True, **options}
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    return [str(tmp_path / "two"), *words], environment


def _train_alone(out):
    config = TrainConfig(steps=40, batch_size=16, precision="fp32", num_threads=1, log_every=5, device="cpu")
    episodes = make_episodes()
    train(make_standin(episodes, mask_padding=True), episodes, config, out)


def _assert_same_curves(one, two):
    assert len(read_metrics(one)) == 11  # 8 lines of the log, 3 held-out losses
    for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
        assert a["step"] == b["step"]
        figures = [{key: row[key] for key in ("loss", "val_loss", "grad_norm") if key in row} for row in (a, b)]
        assert figures[0] == pytest.approx(figures[1], rel=TOLERANCE)
    weights = [load_state(out / "training_state").tensors["ema"] for out in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=TOLERANCE, atol=TOLERANCE)


def test_two_processes_give_the_curve_of_one(tmp_path):
    words, environment = _options(tmp_path, processes=2)
    subprocess.run([sys.executable, str(SCRIPT), *words], env=environment, check=True, timeout=200)
    _train_alone(tmp_path / "one")
    _assert_same_curves(tmp_path / "one", tmp_path / "two")


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    words, environment = _options(tmp_path, processes=2, batch_size=15)
    done = subprocess.run([sys.executable, str(SCRIPT), *words], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "batch_size 15 cannot be divided among 2 processes" in done.stderr
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
def test_accelerate_launch_and_resumption_by_one_process(tmp_path):
    words, environment = _options(tmp_path, save_every=10)
    # accelerate's --multi_gpu means torch.distributed on one machine; without a GPU it takes gloo on the CPU.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no"]
    command = [sys.executable, "-m", *launch, "--num_processes=2", "--dynamo_backend=no", "--main_process_port"]
    command += [environment["MASTER_PORT"], str(SCRIPT), *words]
    subprocess.run(command, env=environment, check=True, timeout=280)
    _train_alone(tmp_path / "one")
    _assert_same_curves(tmp_path / "one", tmp_path / "two")
    # A single process can go on from what two have written.
    newest = tmp_path / "two" / "training_state" / "step-000000040"
    (newest / "state.json").unlink()
    subprocess.run([sys.executable, str(SCRIPT), *words, "resume=true"], env=environment, check=True, timeout=280)
    _assert_same_curves(tmp_path / "one", tmp_path / "two")
