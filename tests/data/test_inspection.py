import json

import numpy as np
import pytest
from data_helpers import FIXTURES, make_episodes

from dipole.data import Episodes
from dipole.data.inspection import BINS, inspect


def kinds(episodes):
    return {finding["kind"]: finding for finding in inspect(episodes)["findings"]}


def test_counts_ranges_and_histograms():
    data = make_episodes((20, 30, 17))
    report = inspect(data)
    assert (report["num_episodes"], report["num_frames"], report["fps"]) == (3, 67, 10)
    assert report["seconds"] == 6.7
    assert report["lengths"] == {"min": 17, "median": 20, "mean": 67 / 3, "max": 30}
    assert report["tasks"] == {"reach": 37, "push": 30}
    assert report["success"] is None
    action = data.columns["action"]
    np.testing.assert_allclose(report["features"]["action"]["min"], action.min(0))
    for i, row in enumerate(report["actions"]):
        assert (len(row["counts"]), sum(row["counts"])) == (BINS, 67)
        np.testing.assert_array_equal(row["counts"], np.histogram(action[:, i].astype(float), BINS)[0])
    assert report["findings"] == []
    json.dumps(report)


def test_successes_are_counted_by_episode():
    success = [np.array([0, 1, 1]), np.array([0, 0, 0])]
    data = Episodes.from_list([{"next.success": flags.astype(bool)} for flags in success])
    assert inspect(data)["success"] == 1


def test_not_finite_values_are_found_and_left_out_of_the_ranges():
    data = make_episodes((20, 30))
    data.columns["action"][25, 1] = np.nan
    data.columns["action"][26, 0] = np.inf
    finding = kinds(data)["not_finite"]
    assert finding["level"] == "error"
    assert finding["text"] == "action: 2 frames with NaN or infinity, first in episode 1, frame 5"
    assert np.isfinite(inspect(data)["features"]["action"]["max"]).all()


def test_constant_dimensions_are_found():
    data = make_episodes((20, 30))
    data.columns["observation.state"][:, 2] = 5 + 1e-6 * np.arange(50)
    assert "constant in dimensions 2 of 4" in kinds(data)["constant"]["text"]


def test_outliers_are_found():
    data = make_episodes((200, 300))
    data.columns["action"][123, 1] = 100
    assert "outliers in dimensions 1:" in kinds(data)["outliers"]["text"]


def test_repeated_frames_are_found_within_episodes_only():
    data = make_episodes((20, 30))
    for key in ("observation.state", "action"):
        data.columns[key][20] = data.columns[key][19]  # first of an episode as the last of the one before
    assert "repeated_frames" not in kinds(data)
    for key in ("observation.state", "action"):
        data.columns[key][31:34] = data.columns[key][30]
    assert kinds(data)["repeated_frames"]["text"].startswith("3 frames (6.0%) repeat")


def test_repeated_episodes_are_found():
    data = make_episodes((20, 30))
    assert "first 2 of 0" in kinds(data.select([0, 1, 0]))["repeated_episodes"]["text"]


def test_short_episodes_are_found():
    assert kinds(make_episodes((20, 15, 16)))["short_episodes"]["text"].endswith("(the usual pred_horizon): 1")


@pytest.mark.parametrize(("shade", "kind"), [(lambda t: 90, "still_camera"), (lambda t: t % 250, "blank_camera")])
def test_dead_cameras_are_found(shade, kind):
    data = make_episodes((20, 30), cameras=["top"])
    data.columns["observation.images.top"][:] = np.array([shade(t) for t in range(50)], np.uint8)[:, None, None, None]
    assert kind in kinds(data)
    assert kind not in kinds(make_episodes((20, 30), cameras=["top"]))


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from dipole.data.plots import plot

    data = make_episodes((20, 30), cameras=["top"])
    drawn = plot(data, inspect(data), tmp_path / "new" / "plots")
    assert [file.name for file in drawn] == ["lengths.png", "actions.png", "trajectories.png", "cameras.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in drawn)
    assert not plot(data.select([0], keys=["next.reward"]), inspect(data.select([0], keys=["next.reward"])), tmp_path)[
        1:
    ]


def test_the_golden_set_has_a_blank_camera():
    pytest.importorskip("av")
    from dipole.data import load

    assert set(kinds(load(FIXTURES / "lerobot_dataset_v3"))) == {"short_episodes", "blank_camera"}
