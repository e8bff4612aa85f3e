import json
from pathlib import Path

import numpy as np
import pytest

from dipole.cli import main

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def archive(tmp_path):
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(40, 2)).astype(np.float32)
    np.savez(tmp_path / "a.npz", state=rng.normal(size=(40, 12)), actions=actions, episode_ends=np.array([18, 40]))
    return tmp_path / "a.npz"


def test_for_people(archive, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["inspect", str(archive)])
    text = capsys.readouterr().out
    assert "2 episodes, 40 frames, 10 fps" in text
    assert "frames per episode: 18 to 22, mean 20.0, median 20" in text
    assert "observation.state float32 12" in " ".join(text.split())
    assert any(bar in text for bar in "▂▃▄▅▆▇")
    assert "no defects found" in text


def test_for_programs(archive, capsys):
    main(["inspect", str(archive), "--json"])
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["num_frames"] == 40
    assert report["features"]["action"]["shape"] == [2]
    assert len(report["features"]["action"]["q99"]) == 2


def test_defects_are_shown_and_do_not_stop(archive, capsys):
    arrays = dict(np.load(archive, allow_pickle=False))
    arrays["actions"][20] = np.nan
    np.savez(archive, **arrays)
    main(["inspect", str(archive)])
    text = " ".join(capsys.readouterr().out.split())
    assert "error: action: 1 frames with NaN or infinity, first in episode 1, frame 2" in text
    main(["inspect", str(archive), "--json"])
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # no NaN in the document


def test_golden_set_with_plots(tmp_path, capsys):
    pytest.importorskip("av")
    pytest.importorskip("matplotlib")
    main(["inspect", str(FIXTURES / "lerobot_dataset_v21"), "--plot", str(tmp_path / "plots"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["tasks"] == {"push 0": 22, "push 1": 11}
    assert [Path(file).name for file in report["plots"]] == [
        "lengths.png",
        "actions.png",
        "trajectories.png",
        "cameras.png",
    ]
    assert all(Path(file).is_file() for file in report["plots"])


def test_without_pictures(capsys):
    main(["inspect", str(FIXTURES / "lerobot_dataset_v3"), "--no-images", "--json"])
    assert "observation.images.top" not in json.loads(capsys.readouterr().out)["features"]


def test_a_mistake_gives_one_line_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(tmp_path / "nothing")])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().startswith("dipole: there is no ")
    assert len(captured.err.strip().splitlines()) == 1


def test_all_values_missing(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", actions=np.full((3, 1), np.nan), episode_ends=np.array([3]))
    main(["inspect", str(tmp_path / "a.npz")])
    assert "3 frames with NaN" in capsys.readouterr().out


@pytest.fixture
def robomimic_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "demo.hdf5", "w") as file:
        file["data/demo_0/actions"] = np.zeros((20, 2))
        file["data/demo_0/obs/state"] = np.random.default_rng(0).normal(size=(20, 3))
    return tmp_path / "demo.hdf5"


@pytest.mark.parametrize(
    ("name", "episodes", "frames"),
    [
        ("lerobot_dataset_v3", 3, 33),
        ("lerobot_dataset_v21", 3, 33),
        ("minari/toy/pick-hdf5-v0", 2, 10),
        ("minari/toy/pick-arrow-v0", 2, 10),
        ("replay_buffer.zarr", 2, 20),
        ("robomimic", 1, 20),
        ("npz", 2, 40),
    ],
)
def test_every_format(name, episodes, frames, archive, robomimic_file, capsys):
    path = {"robomimic": robomimic_file, "npz": archive}.get(name, FIXTURES / name)
    main(["inspect", str(path), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["num_episodes"], report["num_frames"]) == (episodes, frames)
    assert "action" in report["features"]
    assert report["lengths"]["max"] <= frames
