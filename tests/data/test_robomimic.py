"""robomimic files: layout, order, masks and metadata; damaged and hostile files."""

import json

import h5py
import numpy as np
import pytest

from dipole.data import load
from dipole.data.features import Feature
from dipole.data.formats import robomimic
from dipole.errors import DipoleError
from refusals import assert_refused

ENV = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 25}, "env_version": "1.4.1"}


def arrays(number, length):
    """What a demonstration holds; every value tells which demonstration it is of."""
    rng = np.random.default_rng(number)
    return {
        "obs/object": rng.normal(size=(length, 10)),
        "obs/gripper": rng.normal(size=length).astype(np.float32),
        "obs/agentview_image": rng.integers(0, 256, (length, 8, 9, 3), dtype=np.uint8),
        "obs/depth": rng.normal(size=(length, 8, 9, 1)).astype(np.float32),
        "next_obs/object": rng.normal(size=(length, 10)),
        "actions": np.full((length, 7), number / 100, np.float64),
        "actions_abs": rng.normal(size=(length, 7)),
        "action_dict/rel_pos": rng.normal(size=(length, 3)).astype(np.float32),
        "rewards": (np.arange(length) == length - 1).astype(np.float64),
        "dones": (np.arange(length) == length - 1).astype(np.int64),
        "states": rng.normal(size=(length, 32)),
    }


def make(path, lengths=None, compression=None):
    lengths = {number: 3 + number % 4 for number in (0, 1, 2, 10, 11, 9)} if lengths is None else lengths
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(lengths.values())
        data.attrs["env_args"] = json.dumps(ENV)
        for number, length in lengths.items():
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = length
            demo.attrs["model_file"] = f"<mujoco model='{number}'/>"
            demo.attrs["ep_meta"] = json.dumps({"layout": number})
            for name, values in arrays(number, length).items():
                demo.create_dataset(name, data=values, compression=compression)
        file["mask/train"] = np.array([b"demo_10", b"demo_2", b"demo_0"])  # as robomimic writes them
        file["mask/valid"] = ["demo_1", "demo_11"]  # as texts
    return path


@pytest.fixture
def path(tmp_path):
    return make(tmp_path / "low_dim.hdf5")


def test_all_demonstrations_in_the_order_of_their_numbers(path):
    episodes = load(path)
    order = [0, 1, 2, 9, 10, 11]
    assert episodes.lengths.tolist() == [3 + number % 4 for number in order]
    assert episodes.fps == 25.0
    for index, number in enumerate(order):
        expected, found = arrays(number, 3 + number % 4), episodes.episode(index)
        for key, name in {
            "observation.object": "obs/object",
            "observation.gripper": "obs/gripper",
            "observation.images.agentview_image": "obs/agentview_image",
            "observation.depth": "obs/depth",
            "action": "actions",
            "action_abs": "actions_abs",
            "action_dict.rel_pos": "action_dict/rel_pos",
            "next.reward": "rewards",
            "next.done": "dones",
            "simulator.state": "states",
        }.items():
            values = expected[name][:, None] if expected[name].ndim == 1 else expected[name]
            np.testing.assert_array_equal(found[key], values, err_msg=key)
    assert len(episodes.features) == 10
    assert episodes.features["observation.images.agentview_image"] == Feature("image", (8, 9, 3))
    assert episodes.features["observation.object"] == Feature("float64", (10,))
    assert episodes.features["next.done"] == Feature("bool", (1,))


def test_masks(path):
    train = robomimic.read(path, filter_key="train")
    # 2 before 10, although the mask and the alphabet say otherwise.
    assert [round(100 * train.episode(i)["action"][0, 0]) for i in range(3)] == [0, 2, 10]
    valid = robomimic.read(path, filter_key="valid", episodes=[1], keys=["action"])
    assert round(100 * valid.episode(0)["action"][0, 0]) == 11
    with pytest.raises(DipoleError, match="did you mean 'train'"):
        robomimic.read(path, filter_key="trian")


def test_selections(path):
    some = robomimic.read(path, episodes=[4, 0], keys=["next.reward", "action"])
    assert list(some.features) == ["next.reward", "action"]
    assert [round(100 * some.episode(i)["action"][0, 0]) for i in range(2)] == [10, 0]
    assert "observation.images.agentview_image" not in robomimic.read(path, images=False).features
    for options, words in [
        ({"episodes": [6]}, "episode 6 was asked for: there are 0 to 5"),
        ({"episodes": []}, "no episode"),
        ({"keys": ["observation.nothing"]}, "no feature 'observation.nothing'"),
    ]:
        with pytest.raises(DipoleError, match=words):
            robomimic.read(path, **options)


def test_metadata(path):
    metadata = robomimic.read_metadata(path)
    assert metadata.env_args == ENV
    assert metadata.demos == ("demo_0", "demo_1", "demo_2", "demo_9", "demo_10", "demo_11")
    assert metadata.masks == {"train": ("demo_0", "demo_2", "demo_10"), "valid": ("demo_1", "demo_11")}
    assert metadata.model_files["demo_9"] == "<mujoco model='9'/>"
    assert metadata.episode_metas["demo_10"] == {"layout": 10}


@pytest.mark.parametrize("compression", ["gzip", "lzf"])
def test_compressed_files(compression, tmp_path):
    plain, small = make(tmp_path / "a.hdf5"), make(tmp_path / "b.hdf5", compression=compression)
    for key, column in load(plain).columns.items():
        np.testing.assert_array_equal(load(small).columns[key], column)


def test_a_file_of_the_first_version_has_less(tmp_path):
    with h5py.File(tmp_path / "old.h5", "w") as file:
        demo = file.create_group("data/demo_1")
        demo["actions"], demo["obs/state"] = np.zeros((4, 2)), np.zeros((4, 3))
    episodes = load(tmp_path / "old.h5")
    assert (list(episodes.features), episodes.fps) == (["action", "observation.state"], 20.0)
    metadata = robomimic.read_metadata(tmp_path / "old.h5")
    assert (metadata.env_args, metadata.masks, metadata.model_files) == ({}, {}, {})


def test_without_a_control_frequency(path):
    for arguments in ({}, {"control_freq": 0}, {"control_freq": "20"}, {"control_freq": True}, None):
        with h5py.File(path, "a") as file:
            file["data"].attrs["env_args"] = json.dumps(ENV | {"env_kwargs": arguments})
        assert robomimic.read(path, keys=["action"]).fps == 20.0
    assert robomimic.read(path, keys=["action"], fps=5).fps == 5


# Damage --------------------------------------------------------------------------------------------------------------


def put(name, value):
    def action(file):
        if name in file:
            del file[name]
        if value is None:
            return
        if isinstance(value, h5py.SoftLink | h5py.ExternalLink):
            file[name] = value
        else:
            file.create_dataset(name, data=value)

    return action


def declare(name, shape, chunks):
    def action(file):
        del file[name]
        file.create_dataset(name, shape, "f8", chunks=chunks)

    return action


def attribute(node, name, value):
    return lambda file: file[node].attrs.create(name, value)


def poke(name, where, value):
    return lambda file: file[name].__setitem__(where, value)


def no_demos(file):
    del file["data"]
    file.create_group("data")


def external_link(file):
    with h5py.File(file.filename + ".secret", "w") as other:
        other["actions"] = np.zeros((3, 7))
    put("data/demo_0/actions", h5py.ExternalLink(file.filename + ".secret", "/actions"))(file)


def external_data(file):
    with h5py.File(file.filename + ".secret", "w") as other:
        other["data/demo_0/actions"] = np.zeros((3, 7))
    put("data", h5py.ExternalLink(file.filename + ".secret", "/data"))(file)


def virtual(file):
    layout = h5py.VirtualLayout((3, 7), np.float64)
    layout[:] = h5py.VirtualSource(file.filename + ".secret", "actions", (3, 7))
    del file["data/demo_0/actions"]
    file.create_virtual_dataset("data/demo_0/actions", layout)


def mask_not_utf8(file):
    put("mask/train", np.array([b"demo_\xff"]))(file)


ACTIONS = "data/demo_0/actions"
DAMAGE = {
    "missing actions": (put(ACTIONS, None), "'demo_0' has no 'actions'"),
    "missing actions later": (put("data/demo_2/actions", None), "has no '/data/demo_2/actions'"),
    "missing observations": (put("data/demo_0/obs", None), "dataset_states_to_obs"),
    "missing observation later": (put("data/demo_1/obs/object", None), "has no '/data/demo_1/obs/object'"),
    "no data": (put("data", None), "no group 'data'"),
    "no demonstrations": (no_demos, "no demonstrations"),
    "odd name": (lambda file: file.create_group("data/demo_x"), "which is no 'demo_<number>'"),
    "wrong dtype": (put("data/demo_1/actions", np.zeros((4, 7), np.int64)), "store all in the same form"),
    "wrong shape": (put("data/demo_1/actions", np.zeros((4, 6))), "store all in the same form"),
    "too short": (put("data/demo_1/obs/object", np.zeros((3, 10))), "has 3 rows, but there are 4 actions"),
    "scalar": (put("data/demo_1/rewards", 1.0), "has 0 rows"),
    "no actions": (put(ACTIONS, np.zeros((0, 7))), "'demo_0' has no actions"),
    "wrong count": (attribute("data/demo_0", "num_samples", 5), "notes num_samples = 5"),
    "texts for numbers": (put("data/demo_0/obs/object", ["a"] * 3), "unknown feature dtype|numbers were expected"),
    "structures": (put("data/demo_0/obs/object", np.zeros(3, [("a", "f4")])), "unknown feature dtype"),
    "empty observation": (put("data/demo_0/obs/object", np.zeros((3, 0))), "every size must be at least 1"),
    "NaN": (poke("data/demo_1/actions", (2, 3), np.nan), "'action' holds NaN .* episode 1, frame 2"),
    "env_args no JSON": (attribute("data", "env_args", "{"), "'env_args' is not a JSON object"),
    "env_args a number": (attribute("data", "env_args", 3), "'env_args' is not a JSON object"),
    "env_args not UTF-8": (attribute("data", "env_args", np.bytes_(b"\xff")), "not UTF-8"),
    "group for an array": (lambda file: (put(ACTIONS, None)(file), file.create_group(ACTIONS)), "is a group, an array"),
    "array for a group": (put("data/demo_1", np.zeros(3)), "is an array, a group"),
    "external link": (external_link, "link to somewhere else: refused"),
    "external data": (external_data, "link to somewhere else: refused"),
    "soft link": (put(ACTIONS, h5py.SoftLink("/data/demo_1/actions")), "link to somewhere else: refused"),
    "dangling link": (put(ACTIONS, h5py.SoftLink("/nowhere")), "link to somewhere else: refused"),
    "virtual dataset": (virtual, "data in other files: refused"),
    "absurd length": (declare("data/demo_1/actions", (10**13, 7), (1024, 7)), "notes num_samples|can hold"),
    "absurd row": (declare("data/demo_1/obs/object", (4, 10**12), (1, 1024)), "more than a file of .* bytes can hold"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(name, path):
    action, words = DAMAGE[name]
    with h5py.File(path, "a") as file:
        action(file)
    with assert_refused(words):
        robomimic.read(path)


MASK_DAMAGE = {
    "unknown demonstration": (put("mask/train", np.array([b"demo_77"])), "names 'demo_77', which is not in the file"),
    "path for a name": (put("mask/train", np.array([b"../data/demo_0"])), "which is not in the file"),
    "numbers": (put("mask/train", np.zeros(3)), "names were expected"),
    "two axes": (put("mask/train", np.array([[b"demo_0"]])), "a list of texts was expected"),
    "not UTF-8": (mask_not_utf8, "utf-8"),
    "empty": (put("mask/train", np.array([], "S6")), "'train' is empty"),
}


@pytest.mark.parametrize("name", MASK_DAMAGE)
def test_damaged_masks(name, path):
    action, words = MASK_DAMAGE[name]
    with h5py.File(path, "a") as file:
        action(file)
    with assert_refused(words):
        robomimic.read(path, filter_key="train")


def test_long_texts_that_share_their_bytes_are_refused(path, monkeypatch):
    # A mask of long texts: what they take as an array is counted before it is made.
    with h5py.File(path, "a") as file:
        put("mask/train", ["x" * 100_000, *["demo_0"] * 5000])(file)
    monkeypatch.setattr("dipole.data.formats.hdf5.ALLOWANCE", 2**20)
    with assert_refused("bytes can hold"):
        robomimic.read(path, filter_key="train")


@pytest.mark.parametrize("keep", [0, 100, 2000, -100])
def test_truncated_files(keep, path):
    path.write_bytes(path.read_bytes()[:keep])
    with assert_refused("not a whole HDF5 file"):
        robomimic.read(path)


def test_missing_file(tmp_path):
    with assert_refused("is missing"):
        robomimic.read(tmp_path / "absent.hdf5")
