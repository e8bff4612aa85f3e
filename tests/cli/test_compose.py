import json

import pytest
from test_eval import policy_folder

from dipole.cli import main
from dipole.policies import load_policy

ENV = "micro/fork2d"


@pytest.fixture
def parents(tmp_path):
    return [policy_folder(tmp_path / name, seed) for seed, name in enumerate("ab")]


def compose(tmp_path, parents, *words):
    main(["compose", *map(str, parents), "--env", ENV, "--out", str(tmp_path / "out"), "--episodes", "4", *words])


def test_search_verdict_and_a_folder_that_can_be_evaluated(parents, tmp_path, capsys):
    words = ["--divisions", "2", "--search-episodes", "2", "--rounds", "2", "--json"]
    compose(tmp_path, parents, *words)
    document = json.loads(capsys.readouterr().out)
    assert len(document["search"]["trials"]) == 3
    assert document["weights"] == document["search"]["best"]
    assert document["first_seed"] == 100_000
    assert len(document["alone"]) == 2
    assert list(load_policy(tmp_path / "out").weights) == document["weights"]
    main(["eval", str(tmp_path / "out"), "--env", ENV, "--episodes", "4", "--json"])
    assert json.loads(capsys.readouterr().out)["fingerprint"] == document["fingerprint"]
    compose(tmp_path, parents, *words)
    assert json.loads(capsys.readouterr().out) == document


def test_given_weights_are_only_judged(parents, tmp_path, capsys):
    compose(tmp_path, parents, "--weights", "0.25", "0.75", "--sampler", "ddim:2")
    out = capsys.readouterr().out
    assert "search" not in out
    assert "convex 0.25 0.75" in out
    assert "paired episodes" in out
    assert load_policy(tmp_path / "out").sampler.num_steps == 2


def test_operators(parents, tmp_path, capsys):
    compose(tmp_path, parents, "--operator", "or", "--max-steps", "5")
    assert "(or 0.5 0.5)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--weights", "0.5", "0.6"], "sum to 1"),
        (["--weights", "1"], "1 weights"),
        (["--operator", "and", "--weights", "0.5", "0.5"], "no weights"),
        (["--rounds", "0"], "at least 1"),
        (["--operator", "and", "--sampler", "ddpm:3"], "adds noise"),
        (["--env-options", "keypoints=true"], "keypoints"),
    ],
)
def test_bad_input_is_one_line(parents, tmp_path, capsys, words, says):
    with pytest.raises(SystemExit) as exit_:
        compose(tmp_path, parents, *words)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_parents_that_do_not_fit(parents, tmp_path, capsys):
    path = parents[1] / "config.json"
    header = json.loads(path.read_text())
    header["config"]["fps"] = 30.0
    path.write_text(json.dumps(header))
    with pytest.raises(SystemExit):
        compose(tmp_path, parents)
    assert "30 Hz" in capsys.readouterr().err
