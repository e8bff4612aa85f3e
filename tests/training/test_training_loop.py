"""The whole loop on a tiny policy: exact resumption, checkpoints, logs, and what goes wrong."""

import errno
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_standin import make_episodes, make_standin

from dipole.data import Episodes, Feature
from dipole.errors import DipoleError, MissingExtraError
from dipole.policies import make_config, make_policy
from dipole.training import TrainConfig, checkpoint, fit, read_metrics, train
from dipole.training import plan as plan_module
from dipole.training import trainer as trainer_module
from dipole.training.checkpoint import load_state
from dipole.training.precision import time_product

SCRIPT = Path(__file__).with_name("training_standin.py")


def settings(**options):
    return TrainConfig(
        **{
            "steps": 40,
            "batch_size": 16,
            "precision": "fp32",
            "num_threads": 1,
            "log_every": 5,
            "device": "cpu",
            **options,
        }
    )


def run(out, *, policy=None, episodes=None, resume=False, evaluate=None, progress=None, policy_options=None, **options):
    episodes = make_episodes() if episodes is None else episodes
    policy = make_standin(episodes, **(policy_options or {})) if policy is None else policy
    return train(policy, episodes, settings(**options), out, resume=resume, evaluate=evaluate, progress=progress)


def weights(out):
    """Everything a run ends with: raw weights, moments, EMA and both policy folders."""
    state = load_state(Path(out) / "training_state")
    tensors = {f"{group}/{name}": value for group, entries in state.tensors.items() for name, value in entries.items()}
    for kind in ("best", "last"):
        path = Path(out) / "checkpoints" / kind / "model.safetensors"
        if path.exists():
            tensors |= {f"{kind}/{name}": value for name, value in load_file(path).items()}
    return tensors


def assert_same_run(left, right):
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), [name for name in a if not torch.equal(a[name], b[name])]
    curves = [
        [{key: row.get(key) for key in ("step", "loss", "val_loss", "grad_norm", "lr")} for row in read_metrics(out)]
        for out in (left, right)
    ]
    assert curves[0] == curves[1]


# --- an ordinary run


def test_training_learns_and_leaves_a_complete_folder(tmp_path):
    result = run(tmp_path / "run", steps=300, lr=1e-2, policy_options={"width": 64})
    rows = read_metrics(tmp_path / "run")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])  # seeded: 0.6 here
    assert result.steps == 300
    assert result.resumed_from == 0
    assert result.precision == "fp32"
    assert result.loss == losses[-1]
    validated = [row for row in rows if "val_loss" in row]
    assert len(validated) == 20
    assert result.val_loss == validated[-1]["val_loss"]
    assert result.best is None  # the held-out loss does not choose
    logged = next(row for row in rows if row["step"] == 10 and "loss" in row)
    assert set(logged) == {"step", "loss", "grad_norm", "lr", "epoch", "seconds", "samples_per_s", "data_wait"}
    assert 0 <= logged["data_wait"] < 1
    assert result.samples_per_s > 0
    names = {path.relative_to(result.out).as_posix() for path in result.out.rglob("*")}
    assert {f"checkpoints/last/{name}" for name in ("config.json", "model.safetensors")} <= names
    assert not [name for name in names if "/." in name or name.startswith(".")]  # no leftovers


def test_checkpoints_hold_the_ema_weights(tmp_path):
    run(tmp_path, steps=7)
    last = load_file(tmp_path / "checkpoints" / "last" / "model.safetensors")
    state = load_state(tmp_path / "training_state").tensors
    assert all(torch.equal(value, state["ema"][name]) for name, value in last.items())
    assert not torch.equal(state["model"]["layers.0.weight"], state["ema"]["layers.0.weight"])


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    run(tmp_path / "a")
    torch.randn(7)  # the global generator has moved on: it must not matter
    run(tmp_path / "b", prefetch=2, save_every=3)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    run(tmp_path / "c", seed=1)
    assert not torch.equal(
        weights(tmp_path / "a")["model/layers.0.weight"], weights(tmp_path / "c")["model/layers.0.weight"]
    )


def test_without_held_out_episodes_there_is_no_held_out_loss(tmp_path):
    result = run(tmp_path, val_fraction=0.0)
    assert result.val_loss is None
    assert result.best is None
    assert not (tmp_path / "checkpoints" / "best").exists()


def test_the_score_of_the_environment_chooses_the_best(tmp_path):
    scores = iter([0.2, 0.9, 0.9, 0.1])
    seen = []

    def evaluate(policy):
        seen.append(policy.layers[0].weight.clone())
        assert not policy.training
        return {"score": next(scores), "length": 12.0}

    result = run(tmp_path, evaluate=evaluate, eval_every=10)
    assert (result.best.score, result.best.step) == (0.9, 20)
    best = load_file(tmp_path / "checkpoints" / "best" / "model.safetensors")
    assert torch.equal(best["layers.0.weight"], seen[1])
    rows = [row for row in read_metrics(tmp_path) if "eval/score" in row]
    assert [(row["step"], row["eval/score"], row["eval/length"]) for row in rows] == [
        (10, 0.2, 12.0), (20, 0.9, 12.0), (30, 0.9, 12.0), (40, 0.1, 12.0),
    ]  # fmt: skip


# --- resumption


def stop_at(step, number):
    """Return an evaluation that sends this process a signal at a given update."""

    def evaluate(policy):
        evaluate.calls += 1
        if evaluate.calls == step:
            os.kill(os.getpid(), number)
        return {"score": 0.0}

    evaluate.calls = 0
    return evaluate


@pytest.mark.parametrize(("step", "number"), [(1, signal.SIGINT), (13, signal.SIGTERM), (40, signal.SIGINT)])
def test_ctrl_c_saves_and_resumption_is_exact(tmp_path, step, number):
    # Dropout and clipping on: everything random or stateful takes part. Update 13 is within a log interval.
    options = {"policy_options": {"dropout": 0.3}, "eval_every": 1, "ema": "power"}
    run(tmp_path / "whole", evaluate=lambda policy: {"score": 0.0}, **options)
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", evaluate=stop_at(step, number), **options)
    assert signal.getsignal(number) is handler
    assert load_state(tmp_path / "cut" / "training_state").step == step
    result = run(tmp_path / "cut", evaluate=lambda policy: {"score": 0.0}, resume=True, **options)
    assert result.resumed_from == step
    assert result.steps == 40
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = run(tmp_path)
    before = weights(tmp_path)
    again = run(tmp_path, resume=True)
    assert (again.steps, again.resumed_from) == (40, 40)
    assert (again.loss, again.val_loss, again.best) == (first.loss, first.val_loss, first.best)
    after = weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def _launch(out, **options):
    words = [f"{key}={json.dumps(value)}" for key, value in options.items()]
    return subprocess.Popen([sys.executable, str(SCRIPT), str(out), *words], stderr=subprocess.PIPE, text=True)


def _wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.002)


def test_kill_9_at_a_random_moment_then_resume_is_exact(tmp_path):
    # Saving at every update makes it likely that the kill lands inside a save; saves change no weight.
    cut = tmp_path / "cut"
    process = _launch(cut, steps=200, save_every=1, val_every=7)
    _wait_for(lambda: (cut / "training_state" / "step-000000005").exists(), process)
    time.sleep(0.5 * random.Random(time.time_ns()).random())  # really at random: any moment must do
    process.kill()
    assert process.wait() == -signal.SIGKILL  # it had not finished
    process.stderr.close()
    killed_at = load_state(cut / "training_state").step
    run(tmp_path / "whole", steps=200, val_every=7)
    assert run(cut, resume=True, steps=200, val_every=7).resumed_from == killed_at >= 5
    assert_same_run(tmp_path / "whole", cut)


def test_killed_before_the_first_save_it_begins_again(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*args):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(trainer_module, "save_state", die)
        with pytest.raises(Killed):
            run(tmp_path / "cut")
    assert run(tmp_path / "cut", resume=True).resumed_from == 0
    run(tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_disk_full_then_resume(tmp_path, monkeypatch):
    saves = []
    real = checkpoint._write

    def fill(path, data):
        saves.append(path.parent.name)
        if len(set(saves)) == 3:  # the state of update 20
            path.write_bytes(data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_write", fill)
        with pytest.raises(DipoleError, match="No space left on device"):
            run(tmp_path / "cut", save_every=10)
    assert load_state(tmp_path / "cut" / "training_state").step == 10
    run(tmp_path / "cut", save_every=10, resume=True)
    run(tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_really_full_disk(tmp_path):
    # The kernel refuses to let any file grow beyond 9000 bytes: more than each checkpoint file, less than the log.
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    command = [sys.executable, str(SCRIPT), str(tmp_path / "cut"), "steps=60", "log_every=1", "save_every=10"]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    # A line cut short is a full disk, a line refused the limit: the same to the user.
    reason = "(No space left on device|File too large)"
    message = rf"\S+metrics.jsonl: cannot be written \({reason}\): free some space and go on with --resume\n"
    assert re.fullmatch(message, done.stderr)
    assert run(tmp_path / "cut", resume=True, steps=60, log_every=1).resumed_from in (20, 30, 40)
    run(tmp_path / "whole", steps=60, log_every=1)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 1e-4}, r"train.lr was 0.001, now 0.0001"),
        ({"steps": 50, "seed": 3}, r"train.seed was 0, now 3; train.steps was 40, now 50"),
        ({"policy_options": {"width": 8}}, r"policy.width was 16, now 8"),
        ({"episodes": make_episodes(seed=1)}, r"data.checksums.action was \d+, now \d+"),
        ({"episodes": make_episodes(count=7)}, r"data.checksums.action.*data.episodes was 6, now 7"),
    ],
)
def test_resuming_with_other_settings_names_them(tmp_path, change, message):
    run(tmp_path, steps=40)
    with pytest.raises(DipoleError, match=message):
        run(tmp_path, resume=True, **change)


def test_settings_that_change_no_weight_may_differ(tmp_path):
    done = run(tmp_path)
    again = run(tmp_path, resume=True, log_every=3, save_every=9, prefetch=1)
    assert (again.steps, again.resumed_from) == (done.steps, done.steps)


# --- folders


def test_the_output_folder_must_be_free(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(DipoleError, match=r"full: the output folder is not empty: choose another --out"):
        run(tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]
    with pytest.raises(DipoleError, match="is a file"):
        run(tmp_path / "full" / "thesis.tex")
    with pytest.raises(DipoleError, match="nothing to resume"):
        run(tmp_path / "full", resume=True)
    run(tmp_path / "run", steps=2)
    with pytest.raises(DipoleError, match="go on with --resume"):
        run(tmp_path / "run", steps=2)


# --- bad input


def test_demonstrations_that_cannot_train_the_policy(tmp_path):
    good = make_episodes()
    policy = make_standin(good)
    nan = {key: column.copy() for key, column in good.columns.items()}
    nan["action"][int(good.ends[0]) + 4, 1] = np.nan
    broken = Episodes(good.features, nan, good.ends, good.fps)
    with pytest.raises(DipoleError, match="'action' is not finite in 1 frames, first in episode 1 at frame 4"):
        run(tmp_path / "run", policy=policy, episodes=broken)
    with pytest.raises(DipoleError, match="episode 0 has 7 frames, fewer than the prediction horizon 8"):
        run(tmp_path / "run", policy=policy, episodes=make_episodes(length=7))
    wide = np.zeros((good.num_frames, 5), np.float32)
    other = Episodes(
        good.features | {"observation.state": Feature("float32", (5,))},
        good.columns | {"observation.state": wide},
        good.ends,
        good.fps,
    )
    with pytest.raises(DipoleError, match=r"'observation.state' has shape \[5\] in the dataset, \[3\] in the policy"):
        run(tmp_path / "run", policy=policy, episodes=other)
    with pytest.raises(DipoleError, match="the dataset has no 'observation.state'"):
        run(tmp_path / "run", policy=policy, episodes=good.select(range(6), ["action"]))
    assert not (tmp_path / "run").exists()  # nothing half written


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    episodes = make_episodes()
    policy = make_standin(episodes)
    healthy = policy.loss
    policy.forward = lambda batch, generator: (
        healthy(batch, generator) * (math.inf if calls.append(0) or len(calls) > 12 else 1)
    )
    calls = []
    with pytest.raises(DipoleError, match=r"training loss is (inf|nan) at update 15: lower the learning rate"):
        run(tmp_path, policy=policy, episodes=episodes, save_every=10)
    state = load_state(tmp_path / "training_state")
    assert state.step == 10
    assert all(value.isfinite().all() for value in state.tensors["ema"].values())


# --- measured decisions


def test_minutes_become_a_number_of_updates_that_is_stored(tmp_path, monkeypatch):
    timings = iter([0.4, 0.2])
    monkeypatch.setattr(plan_module, "time_updates", lambda *args: next(timings))
    options = {"steps": None, "minutes": 1.0, "precision": "auto", "val_fraction": 0.0}
    first = run(tmp_path, **options)
    assert first.precision == "bf16"
    # 300 updates of 0.2 s fit in a minute; preparing the measurement took some of it, surely less than ten seconds.
    assert 250 <= first.steps <= 300
    record = json.loads((tmp_path / "train.json").read_text())
    assert record["plan"] == {
        "steps": first.steps, "precision": "bf16", "seconds_per_update": {"fp32": 0.4, "bf16": 0.2},
    }  # fmt: skip
    again = run(tmp_path, resume=True, **options)  # measures nothing: the iterator is exhausted
    assert (again.steps, again.precision) == (first.steps, "bf16")


def test_measuring_leaves_the_weights_alone(tmp_path, monkeypatch):
    run(tmp_path / "fixed")
    monkeypatch.setattr(plan_module, "faster", lambda seconds: "fp32")
    run(tmp_path / "measured", precision="auto", compare_precision_seconds=0.01)
    record = json.loads((tmp_path / "measured" / "train.json").read_text())
    assert set(record["plan"]["seconds_per_update"]) == {"fp32", "bf16"}
    assert_same_run(tmp_path / "fixed", tmp_path / "measured")


def test_bf16_trains_and_keeps_fp32_weights(tmp_path):
    run(tmp_path, precision="bf16")
    state = load_state(tmp_path / "training_state").tensors
    assert {value.dtype for group in ("model", "ema", "optimizer") for value in state[group].values()} == {
        torch.float32
    }


def test_the_threads_of_the_caller_are_given_back(tmp_path):
    before = torch.get_num_threads()
    run(tmp_path, num_threads=2, steps=2)
    assert torch.get_num_threads() == before


# --- figures


def test_metrics_survive_a_torn_last_line(tmp_path):
    run(tmp_path, steps=10)
    whole = read_metrics(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    assert read_metrics(tmp_path) == whole
    run(tmp_path, steps=10, resume=True)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == whole


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, steps=10, track=("tensorboard",), val_every=5)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "val_loss"):
        expected = [(row["step"], row[name]) for row in read_metrics(tmp_path) if name in row]
        # event files hold single precision
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (s, pytest.approx(v, rel=1e-6)) for s, v in expected
        ]


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"'wandb' is not installed.*dipole\[track\]"):
        run(tmp_path / "run", track=("wandb",))
    with pytest.raises(DipoleError, match="did you mean 'tensorboard'"):
        run(tmp_path / "run", track=("tensorbord",))
    assert not (tmp_path / "run").exists()


def test_weights_and_biases_gets_every_figure(tmp_path, monkeypatch):
    class Stub:
        logged, finished = [], False

        def init(self, **options):
            self.options = options
            return self

        def log(self, values, step):
            self.logged.append({"step": step, **values})

        def finish(self):
            self.finished = True

    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    run(tmp_path / "peg", steps=10, track=("wandb",))
    assert stub.logged == read_metrics(tmp_path / "peg")
    assert stub.finished
    assert stub.options["name"] == "peg"
    assert stub.options["config"]["train"]["steps"] == 10


def test_progress_is_shown_on_stderr_only_when_wanted(tmp_path, capsys):
    run(tmp_path / "quiet", steps=5)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    run(tmp_path / "shown", steps=5, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "5/5" in captured.err


def test_any_source_of_batches_will_do(tmp_path):
    episodes = make_episodes()

    class Noise:
        def __len__(self):
            return 32

        def batch(self, indices):
            rng = np.random.default_rng(int(indices[0]))
            shapes = {"observation.state": (2, 3), "action": (8, 2)}
            made = {k: rng.normal(size=(len(indices), *s)).astype(np.float32) for k, s in shapes.items()}
            return made | {"action_is_pad": np.zeros((len(indices), 8), bool)}

    result = fit(make_standin(episodes), Noise(), None, settings(), tmp_path)
    assert result.steps == 40


@pytest.mark.slow  # compiles a network
def test_a_compiled_network_trains_alike(tmp_path):
    episodes, results = make_episodes(), []
    for value in (False, True):
        torch.manual_seed(0)
        config = make_config(episodes, network={"name": "mlp", "width": 16, "num_blocks": 1})
        policy = make_policy(config, episodes)
        results.append(
            run(tmp_path / str(value), policy=policy, episodes=episodes, steps=4, log_every=1, compile=value)
        )
    plain, compiled = results
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-4)  # other order of sums
    ours, theirs = weights(tmp_path / "True"), weights(tmp_path / "False")
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("wanted", [False, True])
def test_the_network_is_compiled_where_that_is_asked_for(wanted, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: calls.append(options))
    episodes = make_episodes()
    policy = make_policy(make_config(episodes, network={"name": "mlp", "width": 16, "num_blocks": 1}), episodes)
    run(tmp_path / "run", policy=policy, episodes=episodes, steps=1, compile=wanted)
    assert calls == ([{"dynamic": False, "options": {"cpp_wrapper": True}}] if wanted else [])


@pytest.mark.parametrize(("bf16", "precision"), [(1.0, "bf16"), (2.0, "fp32")])
def test_products_decide_the_precision_of_a_compiled_network(bf16, precision, tmp_path, monkeypatch):
    happened, product = [], {"fp32": 2.0, "bf16": bf16}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: happened.append("compiled"))
    monkeypatch.setattr(plan_module, "time_product", lambda name: happened.append(name) or product[name])
    monkeypatch.setattr(plan_module, "time_updates", lambda *args: happened.append("timed") or 0.1)
    episodes = make_episodes()
    policy = make_policy(make_config(episodes, network={"name": "mlp", "width": 16, "num_blocks": 1}), episodes)
    options = {"steps": None, "minutes": 0.1, "precision": "auto", "compile": True, "val_fraction": 0.0}
    result = run(tmp_path, policy=policy, episodes=episodes, **options)
    assert happened == ["fp32", "bf16", "compiled", "timed", "compiled"]
    assert result.precision == precision
    assert json.loads((tmp_path / "train.json").read_text())["plan"]["seconds_per_update"] == {precision: 0.1}


def test_a_product_is_timed_in_either_precision():
    assert all(time_product(name) > 0 for name in ("fp32", "bf16"))


def test_nothing_to_compile(tmp_path):
    with pytest.raises(DipoleError, match="no network of its own to compile: train it without --compile"):
        run(tmp_path / "run", compile=True)
