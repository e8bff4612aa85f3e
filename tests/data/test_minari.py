"""Minari datasets: what the real package wrote is read as the package reads it, and what we write it reads as well."""

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import h5py
import numpy as np
import pytest
from gymnasium import spaces

from dipole.data import load
from dipole.data.episodes import Episodes
from dipole.data.features import Feature
from dipole.data.formats import lerobot, minari
from dipole.data.formats.minari_extras import MinariExtras
from dipole.data.formats.minari_spaces import box, leaves, nested, parse
from dipole.errors import DipoleError

real = pytest.importorskip("minari")
GOLDEN = Path(__file__).parents[1] / "fixtures" / "minari" / "toy"
STORAGES = ["hdf5", "arrow", "parquet"]


def observation_space():
    return spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (40, 48, 3), np.uint8),
            "gray": spaces.Box(0, 255, (32, 36), np.uint8),
            "tile": spaces.Box(0, 255, (4, 4, 3), np.uint8),  # too small to be a picture for Minari
            "pose": spaces.Dict({"position": spaces.Box(-1, 1, (3,)), "grip": spaces.Discrete(3)}),
            "pair": spaces.Tuple((spaces.Box(-1, 1, (2, 2), np.float64), spaces.MultiBinary(4))),
            "word": spaces.Text(8),
        }
    )


def action_space():
    return spaces.Dict({"arm": spaces.Box(-1, 1, (2,)), "mode": spaces.MultiDiscrete([3, 4])})


def smooth_picture(rng, shape):
    """A picture that JPEG keeps recognisable; no two are alike."""
    grid = np.linspace(0, 3, shape[0])[:, None] + np.linspace(0, 2, shape[1])[None] + rng.uniform(0, 6)
    base = (127 + 120 * np.sin(grid)).astype(np.uint8)
    return base if len(shape) == 2 else np.stack([base, 255 - base, base // 2], -1)


def make_buffers(seed=0, lengths=(3, 5, 4)):
    rng = np.random.default_rng(seed)
    buffers = []
    for number, length in enumerate(lengths):
        n = length + 1
        observations = {
            "camera": [smooth_picture(rng, (40, 48, 3)) for _ in range(n)],
            "gray": [smooth_picture(rng, (32, 36)) for _ in range(n)],
            "tile": rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8),
            "pose": {"position": rng.uniform(-1, 1, (n, 3)).astype(np.float32), "grip": rng.integers(0, 3, n)},
            "pair": (rng.uniform(-1, 1, (n, 2, 2)), rng.integers(0, 2, (n, 4), dtype=np.int8)),
            "word": [f"w{i}é" for i in range(n)],
        }
        actions = {"arm": rng.uniform(-1, 1, (length, 2)).astype(np.float32), "mode": rng.integers(0, 3, (length, 2))}
        buffers.append(
            real.data_collector.EpisodeBuffer(
                id=number,
                seed=None if number == 1 else 40 + number,
                options={"start": number, "nested": {"gain": 0.5}} if number else None,
                observations=observations,
                actions=actions,
                rewards=rng.normal(size=length).tolist(),
                terminations=[False] * (length - 1) + [number != 1],
                truncations=[False] * (length - 1) + [number == 1],
                infos={"success": [i == length for i in range(n)], "deep": {"force": rng.normal(size=(n, 2))}},
            )
        )
    return buffers


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))

    def create(storage="hdf5", jpeg=True, buffers=None, **options):
        options = {"observation_space": observation_space(), "action_space": action_space()} | options
        with pytest.warns(UserWarning, match="set to None"):  # authors and the like are not given
            dataset = real.create_dataset_from_buffers(
                f"toy/rich-{storage}-v0", buffers or make_buffers(), data_format=storage, jpeg_encoding=jpeg, **options
            )
        return Path(dataset.storage.data_path).parent, dataset

    return create


def flat(value, name):
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}").items()}
    if isinstance(value, tuple):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}.{i}").items()}
    return {name: np.asarray(value)}


def assert_reads_the_same(episodes, extras, dataset):
    """Compare with what the real package returns for every episode."""
    for number, expected in enumerate(dataset.iterate_episodes()):
        found = episodes.episode(number)
        length = len(expected)
        for key, values in flat(expected.observations, "observation").items():
            feature = episodes.features[key]
            np.testing.assert_array_equal(found[key], values[:length].reshape(length, *feature.shape))
            final = np.asarray(extras.finals[key][number]).reshape(values[length].shape)
            np.testing.assert_array_equal(final, values[length])
            assert found[key].dtype.kind == values.dtype.kind
        for key, values in flat(expected.actions, "action").items():
            np.testing.assert_array_equal(found[key], values.reshape(found[key].shape))
        np.testing.assert_array_equal(found["next.reward"][:, 0], expected.rewards)
        np.testing.assert_array_equal(found["next.done"][:, 0], expected.terminations)
        np.testing.assert_array_equal(found["next.truncated"][:, 0], expected.truncations)
        assert found["next.reward"].dtype == np.float64


@pytest.mark.parametrize("jpeg", [True, False], ids=["jpeg", "raw"])
@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_and_space_is_read_as_minari_reads_it(storage, jpeg, make):
    path, dataset = make(storage, jpeg)
    episodes, extras = minari.read_with_extras(path)
    assert_reads_the_same(episodes, extras, dataset)
    assert episodes.lengths.tolist() == [3, 5, 4]
    expected = {
        "observation.camera": Feature("image", (40, 48, 3)),
        "observation.gray": Feature("image", (32, 36, 1)),
        "observation.tile": Feature("uint8", (4, 4, 3)),
        "observation.pose.position": Feature("float32", (3,)),
        "observation.pose.grip": Feature("int64", (1,)),
        "observation.pair.0": Feature("float64", (2, 2)),
        "observation.pair.1": Feature("int8", (4,)),
        "observation.word": Feature("string", (1,)),
        "action.arm": Feature("float32", (2,)),
        "action.mode": Feature("int64", (2,)),
        "info.success": Feature("bool", (1,)),
        "info.deep.force": Feature("float64", (2,)),
        "next.success": Feature("bool", (1,)),
    }
    assert {key: episodes.features[key] for key in expected} == expected
    assert [e.get("seed") for e in extras.episodes] == [40, None, 42]
    assert extras.episodes[2]["options"] == {"start": 2, "nested": {"gain": 0.5}}
    for number, buffer in enumerate(make_buffers()):  # the package itself cannot return these from tables
        force = buffer.infos["deep"]["force"]
        np.testing.assert_array_equal(episodes.episode(number)["info.deep.force"], force[:-1])
        np.testing.assert_array_equal(extras.finals["info.deep.force"][number], force[-1])
    # The success after the last step belongs to the last step.
    assert episodes.columns["next.success"][:, 0].tolist() == (np.isin(np.arange(12), episodes.ends - 1)).tolist()


def episode_dicts(dataset):
    keep = ("observations", "actions", "rewards", "terminations", "truncations", "infos")
    return [
        {k: v for name in keep for k, v in flat(getattr(e, name), name).items()} for e in dataset.iterate_episodes()
    ]


@pytest.mark.parametrize("through_lerobot", [False, True], ids=["direct", "through LeRobot v3"])
@pytest.mark.parametrize("storage", ["hdf5", "parquet"])
def test_round_trip_is_lossless_for_the_real_package(storage, through_lerobot, make, tmp_path):
    buffers = make_buffers()
    if storage != "hdf5":
        for buffer in buffers:  # Minari 0.5.4 writes nested infos to tables, but returns them as dictionaries per row
            del buffer.infos["deep"]
    path, dataset = make(storage, jpeg=True, buffers=buffers)
    episodes, extras = minari.read_with_extras(path)
    if through_lerobot:
        lerobot.write(episodes, tmp_path / "v3")
        extras.save(tmp_path / "v3" / "meta" / "minari")
        episodes, extras = load(tmp_path / "v3"), MinariExtras.load(tmp_path / "v3" / "meta" / "minari")
    minari.write(episodes, tmp_path / "again", extras)
    again = real.MinariDataset(tmp_path / "again" / "data")
    for before, after in zip(episode_dicts(dataset), episode_dicts(again), strict=True):
        assert before.keys() == after.keys()
        for key, values in before.items():
            np.testing.assert_array_equal(after[key], values, err_msg=key)
            assert after[key].dtype.kind == values.dtype.kind, key
            assert after[key].shape == values.shape, key
    assert again.observation_space == dataset.observation_space
    assert again.action_space == dataset.action_space
    notes = [[*d.storage.get_episode_metadata(range(3))] for d in (dataset, again)]
    for before, after in zip(*notes, strict=True):
        assert {k: v for k, v in before.items() if k != "seed" or v is not None} == after
    for key in ("dataset_id", "minari_version", "total_steps", "total_episodes"):
        assert again.storage.metadata[key] == dataset.storage.metadata[key]


@pytest.mark.parametrize("name", ["pick-hdf5-v0", "pick-arrow-v0"])
def test_golden(name, tmp_path):
    path = GOLDEN / name
    metadata = json.loads((path / "data" / "metadata.json").read_text())
    episodes, extras = minari.read_with_extras(path)
    assert (episodes.num_episodes, episodes.num_frames) == (metadata["total_episodes"], metadata["total_steps"])
    assert episodes.features["observation.image"] == Feature("image", (32, 32, 3))
    with h5py.File(GOLDEN / "pick-hdf5-v0" / "data" / "main_data.hdf5") as file:
        for number in range(2):
            group = file[f"episode_{number}"]
            found = episodes.episode(number)
            state = group["observations/state"][()]
            np.testing.assert_array_equal(found["observation.state"], state[:-1])
            np.testing.assert_array_equal(extras.finals["observation.state"][number], state[-1])
            np.testing.assert_array_equal(found["action"], group["actions"][()])
            np.testing.assert_array_equal(found["next.reward"][:, 0], group["rewards"][()])
            np.testing.assert_array_equal(found["next.done"][:, 0], group["terminations"][()])
            np.testing.assert_array_equal(found["next.truncated"][:, 0], group["truncations"][()])
    assert [episode["seed"] for episode in extras.episodes] == [0, 1]
    assert extras.episodes[1]["options"] == {"a": 1}
    minari.write(episodes, tmp_path / "again", extras)
    again, more = minari.read_with_extras(tmp_path / "again")
    for key, column in episodes.columns.items():
        np.testing.assert_array_equal(again.columns[key], column)
        assert again.features[key] == episodes.features[key]
    for key, values in extras.finals.items():
        np.testing.assert_array_equal(more.finals[key], values)


def test_pictures_of_different_jpeg_sizes(make):
    # Noise and a blank differ in size as JPEG: Minari then stores rows of different lengths.
    rng = np.random.default_rng(0)
    pictures = [np.zeros((32, 32, 3), np.uint8), *rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)]
    buffer = real.data_collector.EpisodeBuffer(
        observations=pictures, actions=np.zeros((3, 1), np.float32), rewards=[0.0] * 3, terminations=[False] * 3,
        truncations=[False, False, True],
    )  # fmt: skip
    path, dataset = make(
        buffers=[buffer],
        observation_space=spaces.Box(0, 255, (32, 32, 3), np.uint8),
        action_space=spaces.Box(-1, 1, (1,)),
    )
    with h5py.File(path / "data" / "main_data.hdf5") as file:
        assert h5py.check_vlen_dtype(file["episode_0/observations"].dtype) == np.uint8
    episodes, extras = minari.read_with_extras(path)
    assert episodes.features["observation.image"].shape == (32, 32, 3)
    assert episodes.features["action"].shape == (1,)
    assert_reads_the_same_root(episodes, extras, dataset)


def assert_reads_the_same_root(episodes, extras, dataset):
    (expected,) = dataset.iterate_episodes()
    np.testing.assert_array_equal(episodes.columns["observation.image"], expected.observations[:-1])
    np.testing.assert_array_equal(extras.finals["observation.image"][0], expected.observations[-1])
    np.testing.assert_array_equal(episodes.columns["action"], expected.actions)


def test_selections(make):
    path, _ = make()
    whole = minari.read(path)
    some = minari.read(path, episodes=[2, 0], keys=["action.arm", "observation.pose.grip"])
    assert list(some.features) == ["action.arm", "observation.pose.grip"]
    assert some.lengths.tolist() == [4, 3]
    np.testing.assert_array_equal(some.columns["action.arm"], whole.select([2, 0]).columns["action.arm"])
    blind = load(path, images=False)
    assert not [key for key, feature in blind.features.items() if feature.is_image]
    assert load(path).features == whole.features
    for options, words in [
        ({"episodes": [7]}, "episode 7 was asked"),
        ({"episodes": []}, "no episode"),
        ({"keys": ["x"]}, "no feature 'x'"),
    ]:
        with pytest.raises(DipoleError, match=words):
            minari.read(path, **options)


def plain_episodes():
    rng = np.random.default_rng(1)
    features = {
        "observation.state": Feature("float32", (3,)),
        "observation.images.top": Feature("image", (40, 40, 3)),
        "action": Feature("float32", (2,)),
        "next.success": Feature("bool", (1,)),
        "task_index": Feature("int64", (1,)),
    }
    columns = {
        "observation.state": rng.normal(size=(7, 3)).astype(np.float32),
        "observation.images.top": rng.integers(0, 256, (7, 40, 40, 3), dtype=np.uint8),
        "action": rng.normal(size=(7, 2)).astype(np.float32),
        "next.success": np.array([[0], [0], [1], [0], [0], [0], [0]], bool),
        "task_index": np.zeros((7, 1), np.int64),
    }
    return Episodes(features, columns, np.array([3, 7]), 10.0, ("push",))


def test_episodes_of_other_origin_are_written_for_the_real_package(tmp_path):
    episodes = plain_episodes()
    minari.write(episodes, tmp_path / "push-demo")
    dataset = real.MinariDataset(tmp_path / "push-demo" / "data")
    assert dataset.spec.dataset_id == "push-demo-v0"
    first, second = dataset.iterate_episodes()
    np.testing.assert_array_equal(first.observations["state"][:3], episodes.columns["observation.state"][:3])
    np.testing.assert_array_equal(first.observations["state"][3], episodes.columns["observation.state"][2])  # repeated
    np.testing.assert_array_equal(
        second.observations["images"]["top"][:4], episodes.columns["observation.images.top"][3:]
    )
    frame = {"state": first.observations["state"][0], "images": {"top": first.observations["images"]["top"][0]}}
    assert dataset.observation_space.contains(frame)
    assert first.truncations.tolist() == [False, False, True]
    assert first.infos["success"].tolist() == [False, False, False, True]
    again = minari.read(tmp_path / "push-demo")
    for key in ("observation.state", "observation.images.top", "action", "next.success"):
        np.testing.assert_array_equal(again.columns[key], episodes.columns[key])
        assert again.features[key] == episodes.features[key]


def test_write_errors(tmp_path):
    episodes = plain_episodes()
    extras = MinariExtras({}, [{}], {})
    only_action = episodes.select([0], ["action"])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    golden, golden_extras = minari.read_with_extras(GOLDEN / "pick-hdf5-v0")
    odd = MinariExtras(golden_extras.metadata, [{"options": {"x": None}}, {}], golden_extras.finals)
    few = MinariExtras(golden_extras.metadata, golden_extras.episodes, {"observation.state": np.zeros((1, 3))})
    for arguments, words in [
        ((only_action, tmp_path / "a"), "no 'observation.*' feature"),
        ((episodes, tmp_path / "b", extras), "'observation_space' is not"),
        ((golden.select([0]), tmp_path / "c", golden_extras), "are of 2"),
        ((episodes, tmp_path / "taken"), "exists already"),
        ((golden, tmp_path / "d", odd), "only numbers and texts"),
        ((golden, tmp_path / "e", few), "1 last values"),
        ((episodes, tmp_path / "f", golden_extras), "no 'observation.image'"),
    ]:
        with pytest.raises(DipoleError, match=words):
            minari.write(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_extras_survive_the_disk(tmp_path):
    finals = {"a": np.arange(3.0), "b": np.array(["x", "yé"]), "c": np.zeros((2, 4, 4, 3), np.uint8)}
    extras = MinariExtras({"k": 1}, [{"options": {"goal": np.array([1, 2], np.float32)}}, {"seed": 3}], finals)
    extras.save(tmp_path / "x")
    again = MinariExtras.load(tmp_path / "x")
    assert again.metadata == {"k": 1}
    assert again.episodes[1] == {"seed": 3}
    assert again.episodes[0]["options"]["goal"].dtype == np.float32
    for key, values in finals.items():
        np.testing.assert_array_equal(again.finals[key], values)
    (tmp_path / "x" / "minari.safetensors").write_bytes(b"damaged")
    with pytest.raises(DipoleError, match="damaged"):
        MinariExtras.load(tmp_path / "x")


def test_spaces():
    source = Path("x")
    assert [
        leaf.key for leaf in leaves(parse('{"type": "Discrete", "n": 3, "start": 0}', "s", source), "action", source)
    ] == ["action"]
    one = nested({("images", "top"): box(Feature("image", (2, 2, 3))), ("state",): box(Feature("float32", (3,)))})
    assert [leaf.path for leaf in leaves(one, "observation", source)] == [("images", "top"), ("state",)]
    with pytest.raises(DipoleError, match="rename one"):
        nested({("a",): {"type": "Box"}, ("a", "b"): {"type": "Box"}})
    with pytest.raises(DipoleError, match="rename one"):
        nested({("a", "b"): {"type": "Box"}, ("a",): {"type": "Box"}})
    for text, words in [
        ("{", "not the JSON text"),
        ("[1]", "not the JSON text"),
        ('{"type": "Graph"}', "is a 'Graph'"),
        ('{"type": "Box"}', "damaged"),
        ('{"type": "Box", "dtype": "object", "shape": [2]}', "damaged|unknown feature"),
        ('{"type": "Box", "dtype": "float32", "shape": [-2]}', "damaged"),
        ('{"type": "Box", "dtype": "float32", "shape": "ab"}', "damaged"),
        ('{"type": "Box", "dtype": "uint8", "shape": [64, 64, 3], "low": [[0], [0, 1]], "high": 255}', "damaged"),
        ('{"type": "Dict", "subspaces": {}}', "empty"),
        ('{"type": "Dict", "subspaces": [1]}', "is a 'Dict'"),
        ('{"type": "Tuple", "subspaces": [1]}', "damaged"),
        ('{"type":"Tuple","subspaces":[' * 20 + '{"type":"Discrete"}' + "]}" * 20, "nested too deeply"),
        (
            '{"type": "Dict", "subspaces": {"a.b": {"type": "Discrete"}, '
            '"a": {"type": "Dict", "subspaces": {"b": {"type": "Discrete"}}}}}',
            "both be named",
        ),
    ]:
        with pytest.raises(DipoleError, match=words):
            leaves(parse(text, "s", source), "observation", source)


def test_nan_passes_when_asked_for(tmp_path):
    shutil.copytree(GOLDEN / "pick-hdf5-v0", tmp_path / "set")
    with h5py.File(tmp_path / "set" / "data" / "main_data.hdf5", "a") as file:
        file["episode_1/actions"][2, 1] = np.nan
    with pytest.raises(DipoleError, match="NaN"):
        minari.read(tmp_path / "set")
    assert np.isnan(minari.read(tmp_path / "set", allow_nan=True).columns["action"]).sum() == 1


def test_infos_of_single_columns_and_ordered_dicts(make):
    buffers = make_buffers(lengths=(2,))
    buffers[0].infos.update(
        column=np.arange(3.0)[:, None], ordered=[OrderedDict(a=i) for i in range(3)], text=["a", "b", "c"]
    )
    path, dataset = make(buffers=buffers)
    episodes, extras = minari.read_with_extras(path)
    (expected,) = dataset.iterate_episodes()
    assert expected.infos["column"].shape == (3, 1)
    np.testing.assert_array_equal(episodes.columns["info.column"], expected.infos["column"][:-1])
    np.testing.assert_array_equal(episodes.columns["info.ordered.a"][:, 0], [0, 1])
    assert episodes.columns["info.text"][:, 0].tolist() == ["a", "b"]
    assert extras.finals["info.column"].shape == (1, 1)
    assert extras.finals["info.ordered.a"].tolist() == [2]
