import json

import numpy as np
import pytest

from dipole.cli import main
from dipole.data.formats import lerobot
from dipole.envs import collect
from dipole.policies import load_policy


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A policy trained for a moment, and the demonstrations it remembers."""
    folder = tmp_path_factory.mktemp("distill")
    lerobot.write(collect("micro/fork2d", 3, seed=0), folder / "demos")
    words = ["--data", folder / "demos", "--network", "width=16", "num_blocks=1", "--steps", 2, "--batch-size", 8]
    main([str(word) for word in ["train", *words, "--out", folder / "run", "--device", "cpu", "--precision", "fp32"]])
    return folder / "run"


def distill(*words):
    main(["distill", *(str(word) for word in words)])


@pytest.mark.parametrize("method", ["consistency", "shortcut", "progressive"])
def test_what_comes_out_is_a_run_like_any_other(run, tmp_path, method, capsys):
    out = tmp_path / "one"
    words = [run, "--out", out, "--method", method, "--teacher-steps", 4, "--steps", 4, "--batch-size", 8, "--json"]
    distill(*words, "--device", "cpu")
    found = json.loads(capsys.readouterr().out)
    assert found["next"].endswith(f"--distilled {out}")
    policy = load_policy(out)
    assert policy.sampler.num_steps == 1
    assert policy.sampler.name == ("consistency" if method == "consistency" else "ddim")
    main(["eval", str(out), "--env", "micro/fork2d", "--episodes", "2", "--max-steps", "8", "--json"])
    assert json.loads(capsys.readouterr().out)["policy"]["nfe"] == 1


def test_mistakes_are_told_in_one_line(run, tmp_path, capsys):
    for words, message in (
        ([run, "--out", tmp_path / "a", "--nfe", 3], "power of two"),
        ([run / "checkpoints" / "last", "--out", tmp_path / "b"], "give them with --data"),
        ([tmp_path / "nothing", "--out", tmp_path / "c"], "no such folder"),
        ([run, "--out", tmp_path / "d", "--resume", "--steps", 2], "nothing to resume"),
    ):
        with pytest.raises(SystemExit) as error:
            distill(*words)
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    assert not np.any([(tmp_path / name).exists() for name in "abc"])
