import io
import pickle
import zipfile

import numpy as np
import pytest
from data_helpers import shared

from dipole.data import Feature, load
from dipole.data.formats import npz
from dipole.errors import DipoleError
from refusals import assert_refused

RNG = np.random.default_rng(0)
PLAIN = {
    "states": RNG.normal(size=(7, 3)),
    "actions": RNG.normal(size=(7, 2)).astype(np.float32),
    "rewards": RNG.normal(size=7),
    "terminals": np.array([0, 0, 1, 0, 0, 0, 1]),
    "velocity": RNG.normal(size=(7, 2)).astype(np.float32),
    "init_qpos": np.zeros((2, 5)),
    "episode_ends": np.array([3, 7]),
}


def save(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def test_names_and_types(tmp_path):
    data = npz.read(save(tmp_path / "a.npz", **PLAIN))
    assert data.features == {
        "observation.state": Feature("float32", (3,)),
        "action": Feature("float32", (2,)),
        "next.reward": Feature("float32", (1,)),
        "next.done": Feature("bool", (1,)),
        "observation.velocity": Feature("float32", (2,)),
    }
    np.testing.assert_array_equal(data.lengths, [3, 4])
    np.testing.assert_array_equal(data.columns["observation.state"], PLAIN["states"].astype(np.float32))
    np.testing.assert_array_equal(data.columns["next.done"][:, 0], PLAIN["terminals"] == 1)
    assert data.fps == 10
    assert npz.read(tmp_path / "a.npz", fps=40).fps == 40


def test_dppo_with_lengths_channel_first_pictures_and_scaled_numbers(tmp_path):
    images = RNG.integers(0, 256, (7, 3, 12, 10), dtype=np.uint8)
    limits = {"obs_min": -np.ones(3), "obs_max": np.arange(3.0), "action_min": np.zeros(2), "action_max": np.full(2, 4)}
    states, actions = RNG.uniform(-1, 1, (7, 3)), RNG.uniform(-1, 1, (7, 2))
    save(tmp_path / "train.npz", states=states, actions=actions, images=images, traj_lengths=np.array([3, 4]))
    scaled = npz.read(tmp_path)
    np.testing.assert_array_equal(scaled.ends, [3, 7])
    np.testing.assert_array_equal(scaled.columns["observation.image"], images.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(scaled.columns["action"], actions.astype(np.float32))
    save(tmp_path / "normalization.npz", **limits)
    physical = load(tmp_path)
    np.testing.assert_allclose(physical.columns["action"], (actions + 1) * 2, rtol=1e-6)
    low, high = limits["obs_min"], limits["obs_max"]
    np.testing.assert_allclose(
        physical.columns["observation.state"], (states + 1) / 2 * (high - low) + low, rtol=1e-5, atol=1e-6
    )
    assert "observation.image" not in npz.read(tmp_path, images=False).features


@pytest.mark.parametrize(
    ("pictures", "expected"),
    [
        (np.full((2, 4, 4, 3), 200.0), 200),
        (np.full((2, 4, 4, 3), 0.2, np.float32), 51),
        (np.full((2, 4, 4, 1), 7, np.uint8), 7),
    ],
)
def test_pictures_become_uint8(pictures, expected, tmp_path):
    data = npz.read(save(tmp_path / "a.npz", img=pictures, episode_ends=np.array([2])))
    assert data.features["observation.image"] == Feature("image", pictures.shape[1:])
    assert (data.columns["observation.image"] == expected).all()


def test_large_arrays_go_to_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("DIPOLE_COLUMN_MEMORY_MB", "0.0001")  # 105 bytes
    data = npz.read(save(tmp_path / "a.npz", **PLAIN))
    np.testing.assert_array_equal(data.columns["action"], PLAIN["actions"])
    # A column of float32 is handed on as it was read.
    assert isinstance(npz.read_arrays(tmp_path / "a.npz")["states"], np.memmap)


def test_fortran_order(tmp_path):
    actions = np.asfortranarray(RNG.normal(size=(5, 3)).astype(np.float32))
    data = npz.read(save(tmp_path / "a.npz", actions=actions, episode_ends=np.array([5])))
    np.testing.assert_array_equal(data.columns["action"], actions)


def member(header_shape, data, dtype="<f4", fortran=False):
    """Return an .npy file whose header announces `header_shape`."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": fortran, "shape": header_shape})
    return file.getvalue() + data


def archive(path, **members):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return path


class Evil:
    def __reduce__(self):
        return (open, ("evil.txt", "w"))


def with_objects(path):
    objects = io.BytesIO()
    np.lib.format.write_array_header_1_0(objects, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    return archive(path, actions=objects.getvalue() + pickle.dumps([Evil()]))


def zip_field(offset, value, signature=b"PK\x01\x02"):
    """Return a damager that changes a 16-bit field of the first entry in the archive's directory (or `signature`)."""

    def make(path):
        save(path, **PLAIN)
        data = bytearray(path.read_bytes())
        place = data.index(signature) + offset
        data[place : place + 2] = value.to_bytes(2, "little")
        path.write_bytes(bytes(data))
        return path

    return make


def with_header(text):
    """Return a damager that makes an archive whose array has another header."""
    header = text.encode("latin1").ljust(117) + b"\n"
    return lambda path: archive(path, actions=b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def linked(path):
    """A folder whose archive is a link to somewhere else."""
    save(path.parent / "elsewhere.npz", **PLAIN)
    folder = path.parent / "set"
    folder.mkdir()
    (folder / "train.npz").symlink_to(path.parent / "elsewhere.npz")
    return folder


def half(path):
    save(path, **PLAIN)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def garbled(path):
    save(path, **PLAIN)
    data = bytearray(path.read_bytes())
    data[100:140] = b"\xaa" * 40
    path.write_bytes(bytes(data))
    return path


def without(*names, **changes):
    return lambda path: save(path, **{k: v for k, v in (PLAIN | changes).items() if k not in names})


NAN = np.zeros((7, 2))
NAN[4, 1] = np.nan

DAMAGES = {
    "no file": (lambda path: path, "a.npz is missing"),
    "half a file": (half, "not a whole numpy archive"),
    "garbled": (garbled, "a.npz"),
    "text": (lambda path: path.write_text("hello") and path, "not a whole numpy archive"),
    "newer zip": (zip_field(6, 255), "not a whole numpy archive .*version 25.5"),
    "encrypted zip": (zip_field(8, 1), "not a whole numpy archive .*encr"),
    "unknown compression": (zip_field(10, 77), "not a whole numpy archive"),
    "another compression": (zip_field(10, 14), "not a whole numpy archive"),
    "name not UTF-8": (zip_field(46, 0xFFFF), "not a whole numpy archive"),
    "header cut": (with_header("{'descr': '<f4', 'shape': ((("), "not a whole numpy archive"),
    "header deep": (with_header("(" * 100), "not a whole numpy archive"),
    "header of nothing": (with_header("{'descr': '<f4', 'shape': (2.5,), 'fortran_order': 0}"), "not a whole numpy"),
    "header of texts": (with_header("{'descr': '<U0', 'shape': (3,), 'fortran_order': False}"), "a.npz"),
    "shorter rows": (
        without(actions=np.zeros((6, 2)), states=np.zeros((6, 3))),
        "'action.*' has 6 rows, but the episodes have 7 frames",
    ),
    "flat frames": (without(actions=np.zeros((7, 2, 0))), "every size must be at least 1"),
    "linked": (linked, "lies outside that folder: refused"),
    "not numpy inside": (lambda path: archive(path, actions=b"hello"), "not a whole numpy archive"),
    "objects": (with_objects, "'actions' is of type object.*never Python objects"),
    "absurd size": (lambda path: archive(path, actions=member((10**9, 10**9), b"\0" * 16)), "more than the file holds"),
    "negative size": (lambda path: archive(path, actions=member((-1, 4), b"\0" * 16)), "a.npz"),
    "no ends": (without("episode_ends"), "neither 'episode_ends' nor 'traj_lengths'"),
    "ends fall": (without(episode_ends=np.array([5, 3, 7])), "do not rise"),
    "ends repeat": (without(episode_ends=np.array([0, 7])), "do not rise"),
    "ends are floats": (without(episode_ends=np.array([3.0, 7.0])), "whole numbers"),
    "no episodes": (without(episode_ends=np.array([], np.int64)), "0 frames"),
    "ends of another set": (without(episode_ends=np.array([3, 9])), "have 9 frames, but the arrays have"),
    "only ends": (lambda path: save(path, episode_ends=np.array([3])), "no array with one row per frame"),
    "two states": (without(obs=np.zeros((7, 3))), "two arrays that mean 'observation.state'"),
    "NaN": (without(actions=NAN), "'action' holds NaN or infinity, first in episode 1, frame 1"),
    "pictures of odd numbers": (without(img=np.full((7, 2, 2, 3), 12.5)), "neither whole numbers"),
    "pictures of odd type": (without(img=np.full((7, 2, 2, 3), 12)), "pictures must be uint8"),
    "texts": (without(note=np.array(["a"] * 7)), "unknown"),
}


@pytest.mark.parametrize("name", [name for name in DAMAGES if name != "texts"])
def test_damage(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = DAMAGES[name]
    path = make(tmp_path / "a.npz")
    with assert_refused(message):
        npz.read(path)
    assert not (tmp_path / "evil.txt").exists()


def test_texts_are_kept(tmp_path):
    data = npz.read(DAMAGES["texts"][0](tmp_path / "a.npz"))
    assert data.features["observation.note"].is_string


def test_wrong_limits_beside_dppo_data_are_refused(tmp_path):
    save(tmp_path / "train.npz", states=np.zeros((3, 2)), actions=np.zeros((3, 2)), traj_lengths=np.array([3]))
    save(
        tmp_path / "normalization.npz",
        obs_min=np.zeros(2),
        obs_max=np.ones(2),
        action_min=np.zeros(3),
        action_max=np.ones(3),
    )
    with pytest.raises(DipoleError, match=r"normalization.npz must hold 'action_min' of shape \(2,\)"):
        npz.read(tmp_path)


def test_real_human_door_demonstrations():
    path = shared("adroit_door/door_human_25.npz")
    data = load(path)
    assert (data.num_episodes, data.num_frames) == (25, 6729)
    assert {key: feature.shape for key, feature in data.features.items()} == {
        "observation.state": (39,),
        "action": (28,),
        "next.reward": (1,),
    }
    with np.load(path, allow_pickle=False) as raw:
        np.testing.assert_array_equal(data.columns["action"], raw["actions"])
