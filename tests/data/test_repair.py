"""`dipole inspect --fix`: a new set without spoilt episodes, the old one untouched, every change listed."""

import json

import numpy as np
import pytest
from data_helpers import make_episodes

from dipole.cli import main
from dipole.data import load, repair
from dipole.data.formats import lerobot
from dipole.errors import DipoleError

TOP = "observation.images.top"


def spoilt():
    """Return episodes of which 1 holds NaN, 3 is a copy of 0, and 4 has other pictures but the numbers of 2."""
    data = make_episodes((5, 6, 7), cameras=["top"]).select([0, 1, 2, 0, 2])
    data.columns["action"][7, 1] = np.nan
    data.columns["observation.state"][8] = np.inf
    data.columns[TOP][25, 0, 0, 0] ^= 1
    return data


def test_spoilt_episodes_are_found():
    changes = repair.plan(spoilt())
    assert [(change.kind, change.episode) for change in changes] == [("dropped_not_finite", 1), ("dropped_copy", 3)]
    expected = "episode 1 dropped: NaN or infinity: observation.state in 1 of 6 frames; action in 1 of 6 frames"
    assert changes[0].text == expected
    assert changes[1].text == "episode 3 dropped: a copy of episode 0"


def test_a_new_set_is_written_and_the_old_one_left_alone(tmp_path):
    pytest.importorskip("av")
    data = spoilt()
    repair.repair(data, tmp_path / "new")
    mended = lerobot.read(tmp_path / "new")
    expected = data.select([0, 2, 4])
    for key, column in expected.columns.items():
        np.testing.assert_array_equal(mended.columns[key], column)
    assert repair.repair(mended, tmp_path / "again") == []
    assert not (tmp_path / "again").exists()


def test_nothing_is_written_where_nothing_is_left(tmp_path):
    data = make_episodes((5,))
    data.columns["action"][:] = np.nan
    with pytest.raises(DipoleError, match="nothing left to write"):
        repair.repair(data, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_command_says_what_it_changed(tmp_path, capsys):
    pytest.importorskip("av")
    path = tmp_path / "a.npz"
    data = spoilt()
    names = {"observation.state": "state", "action": "action", TOP: "top"}
    np.savez(path, episode_ends=data.ends, **{new: data.columns[old] for old, new in names.items()})
    before = path.read_bytes()
    main(["inspect", str(path), "--fix", str(tmp_path / "new"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [change["episode"] for change in report["fix"]["changes"]] == [1, 3]
    assert report["fix"]["out"] == str(tmp_path / "new")
    assert load(tmp_path / "new").num_episodes == 3
    assert path.read_bytes() == before
    main(["inspect", str(tmp_path / "new"), "--fix", str(tmp_path / "newer")])
    assert "nothing was written" in capsys.readouterr().out
    main(["inspect", str(path), "--fix", str(tmp_path / "third")])
    out = capsys.readouterr().out
    assert "episode 3 dropped: a copy of episode 0" in out
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(path), "--fix", str(tmp_path / "new")])
    assert stopped.value.code == 2
