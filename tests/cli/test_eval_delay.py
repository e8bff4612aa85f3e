"""`dipole eval` with late chunks. An untrained policy on a micro environment of 10 Hz: a tick is 100 ms."""

import json

import numpy as np
import pytest
import torch

from dipole.cli import main
from dipole.data import Feature
from dipole.data.normalizer import Normalizer
from dipole.policies import DiffusionPolicy, PolicyConfig, save_policy

ENV = "micro/fork2d"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    vector = Feature("float32", (2,))
    network = {"name": "mlp", "width": 24, "num_blocks": 1}
    config = PolicyConfig({"observation.state": vector}, vector, 2, 8, 4, network=network)
    stats = {"min": np.full(2, -1.5, np.float32), "max": np.full(2, 1.5, np.float32)}
    keys = ("observation.state", "action")
    torch.manual_seed(0)
    normalizer = Normalizer.fit(dict.fromkeys(keys, stats), dict.fromkeys(keys, "min_max"))
    save_policy(DiffusionPolicy(config, normalizer), path / "checkpoints" / "best")
    return path


def document(capsys, run, out, *words):
    main([str(word) for word in ("eval", run, "--env", ENV, "--episodes", 10, "--json", "--out", out, *words)])
    return json.loads(capsys.readouterr().out)


def test_latency_zero_and_sync_is_the_normal_evaluation(run, tmp_path, capsys):
    plain = document(capsys, run, tmp_path)
    same = document(capsys, run, tmp_path, "--latency-ms", 0, "--execution", "sync")
    episodes = {key: value for key, value in same["episodes"].items() if not key.startswith("execution.")}
    assert episodes == plain["episodes"]
    assert same["success"] == plain["success"]
    assert same["score"] == plain["score"]


def test_a_delayed_evaluation_is_repeatable_and_says_how_late_it_was(run, tmp_path, capsys):
    words = ("--latency-ms", 80, "--jitter", 20, "--drop", 0.1, "--execution", "async-drop")
    first = document(capsys, run, tmp_path, *words, "--num-envs", 3)
    second = document(capsys, run, tmp_path, *words, "--num-envs", 10)
    assert first["fingerprint"] == second["fingerprint"]
    assert first["settings"]["delay"] == {
        "mode": "async-drop",
        "link": {"latency_ms": 80.0, "jitter_ms": 20.0, "drop": 0.1},
        "fallback": "hold",
        "timeout_ms": None,
    }
    assert sum(first["episodes"]["execution.lost"]) > 0
    assert first["fingerprint"] != document(capsys, run, tmp_path)["fingerprint"]


def test_it_says_what_the_delay_did_and_leaves_the_normal_evaluation_alone(run, tmp_path, capsys):
    document(capsys, run, tmp_path)
    before = (tmp_path / "evaluation.json").read_bytes()
    words = ("--latency-ms", "200", "--drop", "0.1", "--episodes", "3", "--out", str(tmp_path))
    main(["eval", str(run), "--env", ENV, *words])
    printed = capsys.readouterr().out
    assert "200 ms (± 0), 10 % lost; sync: without a plan in" in printed
    assert str(tmp_path / "evaluation_delayed.json") in printed
    assert (tmp_path / "evaluation.json").read_bytes() == before


def test_several_latencies_and_modes_make_a_table_and_a_picture(run, tmp_path, capsys):
    rows = document(capsys, run, tmp_path, "--latency-ms", "0,200", "--execution", "sync,async-drop,rtc")
    assert [(row["mode"], row["latency_ms"]) for row in rows] == [
        (mode, latency) for mode in ("sync", "async-drop", "rtc") for latency in (0.0, 200.0)
    ]
    assert json.loads((tmp_path / "delays.json").read_text()) == {"env": ENV, "results": rows}
    pytest.importorskip("matplotlib")
    assert "async-drop" in (tmp_path / "delays.svg").read_text()


def test_the_table_is_printed(run, tmp_path, capsys):
    main(["eval", str(run), "--env", ENV, "--episodes", "2", "--latency-ms", "0,100", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "sync" in printed
    assert "delays.json" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drop", "0.1"], "add --latency-ms"),
        (["--latency-ms", "soon"], "write milliseconds"),
        (["--latency-ms", "80", "--execution", "asynk"], "unknown execution mode 'asynk'"),
        (["--latency-ms", "80", "--sweep", "ddim:1"], "not both at once"),
        (["--latency-ms", "80", "--drop", "1"], "below 1"),
    ],
)
def test_mistakes_are_reported_before_anything_is_loaded(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        main(["eval", str(tmp_path / "missing"), "--env", ENV, *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
