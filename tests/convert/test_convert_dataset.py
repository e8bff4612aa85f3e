"""`dipole convert` on datasets: what goes in comes out, and what is lost is said."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dipole.cli import convert as command
from dipole.convert.dataset import convert_dataset
from dipole.data import Episodes, load
from dipole.data.formats import lerobot, minari
from dipole.errors import DipoleError

FIXTURES = Path(__file__).parents[1] / "fixtures"
MINARI = FIXTURES / "minari" / "toy" / "pick-hdf5-v0"
V3, V21 = FIXTURES / "lerobot_dataset_v3", FIXTURES / "lerobot_dataset_v21"


def assert_same_columns(found, expected, keys=None):
    for key in expected.columns if keys is None else keys:
        np.testing.assert_array_equal(found.columns[key], expected.columns[key], err_msg=key)
        assert found.features[key] == expected.features[key]
    np.testing.assert_array_equal(found.ends, expected.ends)


@pytest.mark.parametrize("between", ["lerobot-v3", "lerobot-v2.1"])
def test_minari_to_lerobot_to_minari_is_lossless(between, tmp_path):
    first = convert_dataset(MINARI, tmp_path / "lerobot", to=between)
    assert first == {"format": "minari", "episodes": 2, "frames": 10, "notes": []}
    second = convert_dataset(tmp_path / "lerobot", tmp_path / "minari", to="minari")
    assert (second["format"], second["notes"]) == ("lerobot", [])
    before, extras = minari.read_with_extras(MINARI)
    after, more = minari.read_with_extras(tmp_path / "minari")
    assert_same_columns(after, before)
    assert list(after.features) == list(before.features)
    for key, values in extras.finals.items():
        np.testing.assert_array_equal(more.finals[key], values)
        assert more.finals[key].dtype == values.dtype
    assert more.episodes == extras.episodes
    changed = {"data_format", "jpeg_encoding", "dataset_size"}  # the form on disk, not what is in it
    kept = extras.metadata.keys() - changed
    assert {key: more.metadata[key] for key in kept} == {key: extras.metadata[key] for key in kept}
    assert_same_columns(lerobot.read(tmp_path / "lerobot"), before)


def test_minari_with_another_name(tmp_path):
    convert_dataset(MINARI, tmp_path / "out", to="minari", dataset_id="mine/pick-v3")
    assert json.loads((tmp_path / "out" / "data" / "metadata.json").read_text())["dataset_id"] == "mine/pick-v3"


def test_lerobot_v3_to_v21_and_back(tmp_path):
    pytest.importorskip("av")
    there = convert_dataset(V3, tmp_path / "v21", to="lerobot-v2.1")
    assert there == {"format": "lerobot", "episodes": 3, "frames": 33, "videos_copied": 3, "notes": []}
    convert_dataset(tmp_path / "v21", tmp_path / "v3")
    assert_same_columns(lerobot.read(tmp_path / "v3"), lerobot.read(V3))


def test_lerobot_to_minari_says_what_is_lost(tmp_path):
    pytest.importorskip("av")
    result = convert_dataset(V3, tmp_path / "out", to="minari")
    assert any("the last one was repeated" in note for note in result["notes"])
    assert any("no place for tasks" in note for note in result["notes"])
    expected = lerobot.read(V3)
    found = minari.read(tmp_path / "out")
    for key in ("observation.state", "observation.images.wrist", "observation.images.top", "action", "next.done"):
        np.testing.assert_array_equal(found.columns[key], expected.columns[key])


def make_robomimic(path):
    with h5py.File(path, "w") as file:
        for number, length in enumerate((3, 4)):
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"] = np.full((length, 2), number, np.float32)
            demo["obs/state"] = np.random.default_rng(number).normal(size=(length, 3))
            demo["states"] = np.zeros((length, 5))
        file["mask/train"] = np.array([b"demo_1"])
    return path


def test_robomimic_and_zarr_and_npz(tmp_path):
    source = make_robomimic(tmp_path / "demo.hdf5")
    convert_dataset(source, tmp_path / "all")
    assert_same_columns(load(tmp_path / "all"), load(source))
    assert convert_dataset(source, tmp_path / "train", filter_key="train")["episodes"] == 1
    np.testing.assert_array_equal(load(tmp_path / "train").columns["action"], np.ones((4, 2)))
    notes = convert_dataset(source, tmp_path / "minari", to="minari")["notes"]
    assert any("no place for simulator.state" in note for note in notes)
    np.savez(tmp_path / "demo.npz", state=np.zeros((4, 2)), action=np.ones((4, 2)), episode_ends=np.array([2, 4]))
    convert_dataset(tmp_path / "demo.npz", tmp_path / "npz")
    assert_same_columns(load(tmp_path / "npz"), load(tmp_path / "demo.npz"))
    pytest.importorskip("zarr")
    convert_dataset(FIXTURES / "replay_buffer.zarr", tmp_path / "zarr", to="lerobot-v2.1")
    assert_same_columns(load(tmp_path / "zarr"), load(FIXTURES / "replay_buffer.zarr"))


def test_pictures_as_video_are_named_as_a_loss(tmp_path):
    pytest.importorskip("av")
    result = convert_dataset(MINARI, tmp_path / "out", pictures="h264")
    assert "with a small loss" in result["notes"][0]
    assert load(tmp_path / "out").features["observation.image"].dtype == "video"


def test_errors_a_user_can_mend(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for arguments, words in [
        ((tmp_path / "absent", tmp_path / "out"), "there is no"),
        ((tmp_path / "taken", tmp_path / "out"), "no dataset that dipole knows"),
        ((MINARI, tmp_path / "taken"), "exists already"),
        ((MINARI, tmp_path / "out", "lerobot-v4"), "did you mean 'lerobot-v3'"),
        ((MINARI, tmp_path / "out", "minari", "png", "train"), "filter keys are robomimic's"),
        ((V3, tmp_path / "out"), "already"),
        ((V21, tmp_path / "out", "lerobot-v2.1"), "already"),
    ]:
        with pytest.raises(DipoleError, match=words):
            convert_dataset(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# The command ---------------------------------------------------------------------------------------------------------


def run(source, out, **options):
    command.run(command.Args(str(source), Path(out), **options))


def test_the_command_converts_a_dataset(tmp_path, capsys):
    run(MINARI, tmp_path / "out")
    assert capsys.readouterr().out.strip().endswith("minari dataset, 2 episodes, 10 frames")
    run(tmp_path / "out", tmp_path / "again", to="minari", json=True)
    printed = json.loads(capsys.readouterr().out)
    assert (printed["format"], printed["frames"], printed["notes"]) == ("lerobot", 10, [])


def test_the_command_converts_a_checkpoint(tmp_path, capsys):
    fixture = Path(__file__).parent / "fixtures" / "diffusion_policy.ckpt"
    run(fixture, tmp_path / "out", framework="diffusion_policy")
    assert "diffusion_policy checkpoint, 'ema_model' weights" in capsys.readouterr().out
    run(fixture, tmp_path / "raw", weights="model", json=True)
    assert json.loads(capsys.readouterr().out)["weights"] == "model"
    assert (tmp_path / "raw" / "model.safetensors").is_file()


def test_the_command_tells_datasets_from_checkpoints(tmp_path):
    source = make_robomimic(tmp_path / "demo.hdf5")
    run(source, tmp_path / "a", framework="robomimic")  # an HDF5 file is a dataset, whatever --from says
    assert load(tmp_path / "a").num_episodes == 2
    torch.save({"itr": 1, "model": {"w": torch.ones(2)}}, tmp_path / "state.bin")
    run(tmp_path / "state.bin", tmp_path / "b")  # a checkpoint without a telling name
    assert (tmp_path / "b" / "model.safetensors").is_file()
    shutil.copytree(FIXTURES / "replay_buffer.zarr", tmp_path / "r.zarr")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    for arguments, options, words in [
        ((tmp_path / "text.ckpt", tmp_path / "c"), {}, "is not a zip file"),
        ((V21, tmp_path / "c"), {"framework": "dppo"}, "--from reads a checkpoint file"),
        ((V21, tmp_path / "c"), {"weights": "ema"}, "--weights is for checkpoints"),
        ((V21, tmp_path / "c"), {"normalization": Path("x")}, "--normalization is for checkpoints"),
    ]:
        with pytest.raises(DipoleError, match=words):
            run(*arguments, **options)


def test_texts_and_many_axes_survive(tmp_path):
    episodes = Episodes.from_list(
        [
            {
                "observation.state": np.arange(6.0).reshape(3, 2),
                "observation.word": np.array([["a"], ["é"], [""]]),
                "observation.grid": np.arange(36, dtype=np.int16).reshape(3, 3, 4),
                "action": np.zeros((3, 1), np.float32),
            }
        ]
    )
    lerobot.write(episodes, tmp_path / "v3")
    convert_dataset(tmp_path / "v3", tmp_path / "v21", to="lerobot-v2.1")
    convert_dataset(tmp_path / "v21", tmp_path / "minari", to="minari")
    found = minari.read(tmp_path / "minari")
    for key in episodes.columns:
        np.testing.assert_array_equal(found.columns[key], episodes.columns[key])
