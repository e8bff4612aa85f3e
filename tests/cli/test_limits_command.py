import json

import numpy as np
import pytest

from dipole.cli import main
from dipole.data import Episodes, Feature
from dipole.data.formats import lerobot
from dipole.safety import Limits, read_limits


@pytest.fixture
def data(tmp_path):
    actions = np.array([[0.0, 1.0], [2.0, 1.5], [3.0, 1.0]], dtype=np.float32)
    features = {"observation.state": Feature("float32", (2,)), "action": Feature("float32", (2,))}
    episode = {"observation.state": actions, "action": actions}
    lerobot.write(Episodes.from_list([episode, episode], features, 10.0), tmp_path / "data")
    return tmp_path / "data"


def test_limits_are_found_printed_and_written(data, tmp_path, capsys):
    out = tmp_path / "limits.json"
    main(["limits", str(data), "--margin", "0", "--out", str(out)])
    assert "0 to 3" in capsys.readouterr().out
    # From 3 to 0 between the episodes is nobody's motion.
    assert read_limits(out) == Limits(low=(0.0, 1.0), high=(3.0, 1.5), max_change=(2.0, 0.5))
    main(["limits", str(data), "--margin", "0", "--out", str(out), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())


def test_a_missing_dataset_is_reported(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["limits", str(tmp_path / "none"), "--out", str(tmp_path / "limits.json")])
    assert caught.value.code == 2
    assert not (tmp_path / "limits.json").exists()
