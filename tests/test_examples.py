"""The examples run as they stand, each in a process of its own, in the short form `--fast`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What each must have said by its end: an example that stops early or prints nothing is broken.
SAYS = {
    "bring_your_own_env": "success",
    "robot_side": "actions sent in",
    "sample_a_mixture": "x held at 0: x is 0e+00",
    "train_fork": "passed the disc on the right",
    "view_flow_as_ddpm": "ratio 1.000000 for the same model",
}


def test_every_example_is_listed():
    assert sorted(SAYS) == [path.stem for path in EXAMPLES]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path):
    # A clean folder: an example must not need files of the repository, nor leave any there.
    done = subprocess.run(
        [sys.executable, str(path), "--fast"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,  # takes 3 to 8 seconds of processor time; the machine may be shared
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert SAYS[path.stem] in done.stdout
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_can_be_read_top_to_bottom(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith('"""')
    assert len(lines) < 100  # a page or two; longer ones belong into the library
