import json

import numpy as np
import pytest
import torch

from dipole.cli import main
from dipole.data import Feature
from dipole.data.normalizer import Normalizer
from dipole.policies import DiffusionPolicy, PolicyConfig, save_policy
from dipole.realtime import load, read_runtime
from dipole.realtime.block_calibration import load_calibration

ENV = "micro/fork2d"
SMALL = ("--env", ENV, "--episodes", "16", "--max-steps", "12", "--backends", "packed")


def policy_folder(path, seed=0):
    vector = Feature("float32", (2,))
    config = PolicyConfig(
        {"observation.state": vector}, vector, 2, 8, 4, network={"name": "mlp", "width": 24, "num_blocks": 2}
    )
    stats = {"min": np.full(2, -1.5, np.float32), "max": np.full(2, 1.5, np.float32)}
    keys = ("observation.state", "action")
    torch.manual_seed(seed)
    save_policy(
        DiffusionPolicy(config, Normalizer.fit(dict.fromkeys(keys, stats), dict.fromkeys(keys, "min_max"))), path
    )
    return path


@pytest.fixture
def run(tmp_path):
    policy_folder(tmp_path / "run" / "checkpoints" / "best")
    return tmp_path / "run"


def command(*words):
    main(["accelerate", *(str(word) for word in words)])


def test_a_search_ends_with_a_runtime_that_is_obeyed(run, tmp_path, capsys):
    other = policy_folder(tmp_path / "distilled", seed=1)
    command(run, *SMALL, "--samplers", "euler:1", "heun:2", "--distilled", other, "--json")
    document = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in document["rows"]}
    assert document["reference"] == "as trained"
    assert {"as trained", "euler:1", "heun:2", "rti:3", "block-cache 2 of 5", "distilled distilled (euler:5)"} <= set(
        rows
    )
    assert {row["nfe"] for name, row in rows.items() if name.startswith("euler:1")} == {1}
    assert all(row["episodes"] == 16 for name, row in rows.items() if "+" not in name and not row["problem"])
    chosen = rows[document["chosen"]]
    allowed = rows["as trained"]["score"]["value"] - 0.02
    assert chosen["score"]["value"] >= allowed
    assert chosen["p50_ms"] == min(row["p50_ms"] for row in rows.values() if _able(row, allowed))
    place = run / "checkpoints" / "best" if chosen["run"] == str(run) else other
    assert document["runtime"] == str(place / "runtime.json")
    runtime = read_runtime(place)
    assert runtime.method == chosen["runtime"]["method"]
    policy = load(chosen["run"])
    assert policy.runtime == runtime
    assert load_calibration(run / "checkpoints" / "best").observations == 8
    files = {path.name for path in (run / "accelerate").iterdir()}
    assert {"accelerate.json", "front.html", "candidates"} <= files
    page = (run / "accelerate" / "front.html").read_text()
    assert "block-cache 2 of 5" in page
    assert "http" not in page


def _able(row, allowed):
    return row["episodes"] == 16 and row["score"]["value"] >= allowed and not row["problem"]


def test_it_goes_on_where_it_was(run, capsys):
    words = [run, *SMALL, "--samplers", "euler:1", "--no-confirm", "--json"]
    command(*words)
    first = json.loads(capsys.readouterr().out)
    stored = {path: path.stat().st_mtime_ns for path in (run / "accelerate" / "candidates").iterdir()}
    command(*words)
    second = json.loads(capsys.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in stored} == stored
    assert [_timeless(row) for row in first["rows"]] == [_timeless(row) for row in second["rows"]]
    assert second["chosen"] == first["chosen"]
    # half of a candidate's episodes are lost: only they are played again, and come out the same
    path = run / "accelerate" / "candidates" / "euler-1.json"
    whole = json.loads(path.read_text())
    half = {**whole, **{name: whole[name][:8] for name in ("scores", "successes", "lengths")}}
    path.write_text(json.dumps(half))
    command(*words)
    assert json.loads(path.read_text())["lengths"] == whole["lengths"]


def _timeless(row):
    return {key: value for key, value in row.items() if key in ("name", "episodes", "score", "success", "nfe")}


def test_another_policy_does_not_inherit_results(run, capsys):
    words = [run, *SMALL, "--samplers", "euler:1", "--no-confirm", "--json"]
    command(*words)
    path = run / "accelerate" / "candidates" / "euler-1.json"
    before = json.loads(path.read_text())["key"]
    policy_folder(run / "checkpoints" / "best", seed=5)
    command(*words)
    assert json.loads(path.read_text())["key"] != before


def test_a_table_for_people(run, capsys):
    (run / "accelerate" / "candidates").mkdir(parents=True)
    (run / "accelerate" / "candidates" / "euler-1.json").write_text("{")
    command(run, *SMALL, "--samplers", "euler:1", "--no-confirm", "--fresh")  # else the damaged file would be reported
    out = capsys.readouterr().out
    assert "as trained" in out
    assert "saved in" in out


def test_a_time_nobody_keeps_to_changes_nothing(run, capsys):
    with pytest.raises(SystemExit) as error:
        command(run, *SMALL, "--samplers", "euler:1", "--target-ms", "0.0001")
    assert error.value.code == 2
    assert "no candidate keeps to 0.0001 ms" in capsys.readouterr().err
    assert not (run / "checkpoints" / "best" / "runtime.json").exists()
    assert (run / "accelerate" / "accelerate.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--env", "micro/fork3d"], "did you mean 'micro/fork2d'"),
        (["--env", ENV, "--episodes", "3"], "at least 16"),
        (["--env", ENV, "--samplers", "eulr:2"], "did you mean 'euler'"),
        (["--env", ENV, "--distilled", "nowhere"], "no such folder"),
        (["--env", "micro/grip2d"], "observation"),
    ],
)
def test_mistakes_are_told_in_one_line(run, words, message, capsys):
    with pytest.raises(SystemExit) as error:
        command(run, *words)
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text
