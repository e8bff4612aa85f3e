"""Pictures decoded when asked for: the same numbers as from memory, bounded memory, and errors that name the file."""

import shutil
import threading

import numpy as np
import pytest
import torch
from data_helpers import FIXTURES, make_episodes

from dipole.data import Streaming, Windows, load
from dipole.data.formats import lerobot, video, video_index
from dipole.data.streaming import PictureCache, StreamedColumn
from dipole.errors import DipoleError
from refusals import assert_refused

av = pytest.importorskip("av")
VIDEO = "videos/observation.images.top/chunk-000/file-000.mp4"
TOP = "observation.images.top"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Return a folder with the same episodes as pictures in tables, as H.264 with long groups, and as AV1."""
    root = tmp_path_factory.mktemp("streaming")
    episodes = make_episodes((23, 1, 17, 30), cameras=["top", "side"])
    for name in ("png", "h264", "av1"):
        lerobot.write(episodes, root / name, pictures=name)
    with pytest.MonkeyPatch.context() as patch:
        # As other programs write videos: few key frames, and frames that refer to later ones.
        patch.setitem(video.CODECS, "h264", ("libx264", {"g": "12", "bf": "3", "forced-idr": "1"}))
        lerobot.write(episodes, root / "long", pictures="h264")
    return root


@pytest.mark.parametrize("name", ["png", "h264", "av1", "long"])
def test_windows_are_those_from_memory(name, sets):
    whole, streamed = lerobot.read(sets / name), load(sets / name, stream=Streaming(workers=3))
    assert streamed.is_streamed
    assert not whole.is_streamed
    keys = ["observation.state", TOP, "observation.images.side"]
    windows = [Windows(episodes, keys, obs_horizon=3) for episodes in (whole, streamed)]
    assert len(windows[0]) == len(windows[1])
    rng = np.random.default_rng(0)
    for _ in range(4):
        indices = rng.integers(0, len(windows[0]), 7)  # with repetitions
        expected, found = (w.batch(indices) for w in windows)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value)
    streamed.close()


@pytest.mark.parametrize("name", ["lerobot_dataset_v3", "lerobot_dataset_v21"])
def test_golden_sets_of_both_versions(name):
    whole = load(FIXTURES / name)
    streamed = load(FIXTURES / name, stream=True)
    for key, column in whole.columns.items():
        np.testing.assert_array_equal(np.asarray(streamed.columns[key]), column)
    assert list(streamed.columns) == list(whole.columns)
    expected, found = whole.stats(), streamed.stats()
    for key, row in expected.items():
        for statistic, value in row.items():
            np.testing.assert_array_equal(found[key][statistic], value)
    streamed.close()


def test_a_column_is_indexed_as_an_array(sets):
    whole, streamed = (load(sets / "long", stream=stream).columns[TOP] for stream in (False, True))
    assert isinstance(streamed, StreamedColumn)
    assert (streamed.shape, len(streamed), streamed.nbytes) == (whole.shape, len(whole), whole.nbytes)
    np.testing.assert_array_equal(streamed[-1], whole[-1])
    np.testing.assert_array_equal(streamed[[5, 2, 5]], whole[[5, 2, 5]])
    np.testing.assert_array_equal(streamed[np.array([[70, 0], [1, 1]])], whole[np.array([[70, 0], [1, 1]])])
    np.testing.assert_array_equal(streamed[10:60:7][2:4], whole[10:60:7][2:4])
    np.testing.assert_array_equal(np.stack(list(streamed[30:65])), whole[30:65])
    assert streamed[:0].shape == (0, 16, 18, 3)
    assert np.asarray(streamed[:0]).shape == (0, 16, 18, 3)
    with pytest.raises(IndexError):
        streamed[71]


def test_choices_of_episodes_stay_in_their_files(sets):
    whole = load(sets / "av1", episodes=[3, 0])
    streamed = load(sets / "av1", episodes=[3, 0], stream=True)
    np.testing.assert_array_equal(np.asarray(streamed.columns[TOP]), whole.columns[TOP])
    picked = streamed.select([1, 0, 1])
    assert picked.is_streamed
    np.testing.assert_array_equal(np.asarray(picked.columns[TOP]), whole.select([1, 0, 1]).columns[TOP])
    # Joined with pictures from elsewhere, they are decoded.
    joined = type(whole).concatenate([whole, streamed])
    np.testing.assert_array_equal(joined.columns[TOP], np.concatenate([whole.columns[TOP]] * 2))


def test_it_is_chosen_by_size(sets, monkeypatch):
    decoded = 71 * 16 * 18 * 3 * 2
    assert not load(sets / "png", stream=None).is_streamed
    assert not load(sets / "png", stream=None, memory=decoded).is_streamed
    assert load(sets / "png", stream=None, memory=decoded - 1).is_streamed
    assert not load(sets / "png", episodes=[1], stream=None, memory=decoded // 2).is_streamed
    assert not load(sets / "png", keys=["action"], stream=None, memory=0).is_streamed


def test_random_access_decodes_from_the_nearest_key_frame(sets, monkeypatch):
    path = sets / "long" / VIDEO
    index = video_index.read_index(path)
    seconds = index.pts[np.unique(index.start)] * index.time_base[0] / index.time_base[1]
    # Every episode begins with a key frame.
    assert {0, 23, 24, 41} <= set((seconds * 10).round().astype(int).tolist())
    decoded = []
    frames = video_index._frames

    def counted(av, context, index, file, first, last):
        decoded.append(last + 1 - first)
        return frames(av, context, index, file, first, last)

    monkeypatch.setattr(video_index, "_frames", counted)
    data = load(sets / "long", stream=Streaming(workers=1, cache_mb=0))
    data.columns[TOP][[70]]
    # The last frame of the last episode lies at most a group of 12 behind its key frame, not 70 frames.
    assert len(decoded) == 1
    assert decoded[0] <= 12
    data.columns[TOP][[70]]
    assert len(decoded) == 2
    # Frames of one group are decoded in one go; those far from each other are not.
    decoded.clear()
    data.columns[TOP][[45, 44]]
    assert len(decoded) == 1
    decoded.clear()
    data.columns[TOP][[0, 69]]
    assert len(decoded) == 2
    assert sum(decoded) <= 13


def test_pictures_in_the_cache_are_not_decoded_again(sets, monkeypatch):
    data = load(sets / "h264", stream=True)
    first = data.columns[TOP][[4, 9]]
    monkeypatch.setattr(data.columns[TOP].source, "decode", lambda frames, put: pytest.fail("decoded again"))
    np.testing.assert_array_equal(data.columns[TOP][[9, 4, 4]], first[[1, 0, 0]])


def test_the_cache_keeps_to_its_limit():
    cache, source = PictureCache(100), object()
    out = np.zeros(30, np.uint8)
    for frame in range(5):
        cache.add(source, frame, np.full(30, frame, np.uint8))
        cache.copy_to(source, 0, out)  # the first stays in use
    assert cache.nbytes == 90
    assert [cache.copy_to(source, frame, out) for frame in range(5)] == [True, False, False, True, True]
    assert out[0] == 4
    assert not cache.copy_to(object(), 0, out)
    cache.add(source, 9, np.zeros(101, np.uint8))
    assert cache.nbytes == 90


def test_indices_keep_to_their_limit(sets):
    paths = [sets / name / VIDEO for name in ("h264", "av1", "long")]
    size = video_index.read_index(paths[0]).nbytes
    assert size == 71 * 28
    cache = video_index.IndexCache(2 * size)
    for path in [*paths, paths[0]]:
        assert cache.get(path).path == path
    assert cache.nbytes == 2 * size


def cut(path):
    path.write_bytes(path.read_bytes()[:-400])


DAMAGES = {
    "no file": (lambda path: path.unlink(), "file-000.mp4 is missing"),
    "cut": (cut, "file-000.mp4 cannot be decoded"),
    "empty": (lambda path: path.write_bytes(b""), "file-000.mp4 cannot be decoded"),
    "text": (lambda path: path.write_text("no video " * 100), "file-000.mp4 cannot be decoded"),
    "another size": (
        lambda path: video.write_frames(path, np.zeros((71, 32, 32, 3), np.uint8), 10, "h264"),
        "file-000.mp4 has frames of 32 x 32, its feature says",
    ),
    "too short": (
        lambda path: video.write_frames(path, np.zeros((60, 16, 18, 3), np.uint8), 10, "h264"),
        "file-000.mp4 ends before 6.0000 s",
    ),
    "another rate": (
        lambda path: video.write_frames(path, np.zeros((90, 16, 18, 3), np.uint8), 11, "h264"),
        "file-000.mp4 has no frame at 0.1000 s",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_found_by_a_worker_names_the_file(name, sets, tmp_path):
    damage, message = DAMAGES[name]
    root = shutil.copytree(sets / "h264", tmp_path / "set")
    data = load(root, stream=Streaming(workers=2))
    windows = Windows(data, [TOP])
    damage(root / VIDEO)
    for _ in range(2):  # an error does not leave the decoders in disorder
        with assert_refused(message):
            windows.batch(np.arange(len(windows)))
    # The other camera is whole.
    assert data.columns["observation.images.side"][[3]].any()


def test_noise_in_a_video_is_an_error_or_other_pictures(sets, tmp_path):
    root = shutil.copytree(sets / "h264", tmp_path / "set")
    index = video_index.read_index(root / VIDEO)
    data = bytearray((root / VIDEO).read_bytes())
    place = int(index.position[40])
    data[place : place + int(index.size[40])] = b"\xff" * int(index.size[40])
    (root / VIDEO).write_bytes(bytes(data))
    with pytest.raises(DipoleError, match="file-000.mp4 cannot be decoded"):
        load(root, stream=True).columns[TOP][[40]]


def test_damaged_pictures_in_a_table_name_it(sets, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = shutil.copytree(sets / "png", tmp_path / "set")
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index(TOP)
    pictures = table.column(TOP).to_pylist()
    pictures[50] = {"bytes": pictures[50]["bytes"][:80], "path": None}
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, pa.array(pictures, field.type)), path)
    data = load(root, stream=True)
    assert data.columns[TOP][[49, 51]].any()
    with pytest.raises(DipoleError, match=f"file-000.parquet: '{TOP}' holds a damaged picture"):
        data.columns[TOP][[49, 50]]


def test_closing_ends_the_threads(sets):
    data = load(sets / "av1", stream=Streaming(workers=2))
    data.columns[TOP][np.arange(40)]
    threads = set(data.columns[TOP].decoders._pool._threads)
    assert 1 <= len(threads) <= 2
    assert all(thread.is_alive() for thread in threads)
    data.close()
    data.close()
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(DipoleError, match="the dataset was closed"):
        data.columns[TOP][0]


def test_many_threads_may_ask_at_once(sets):
    whole, data = load(sets / "long"), load(sets / "long", stream=Streaming(workers=2, cache_mb=0.01))
    wrong = []

    def ask(seed):
        frames = np.random.default_rng(seed).integers(0, 71, 20)
        if not np.array_equal(data.columns[TOP][frames], whole.columns[TOP][frames]):
            wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("options", [{"workers": 0}, {"cache_mb": -1.0}, {"cache_mb": float("nan")}])
def test_odd_options_are_refused(options):
    with pytest.raises(DipoleError, match=next(iter(options))):
        Streaming(**options)


def test_a_streamed_set_is_written_again(sets, tmp_path):
    lerobot.write(load(sets / "png", stream=True), tmp_path / "copy")
    whole, copy = lerobot.read(sets / "png"), lerobot.read(tmp_path / "copy")
    np.testing.assert_array_equal(copy.columns[TOP], whole.columns[TOP])


def test_training_sees_the_same_batches(sets):
    from dipole.training.batches import EpochOrder, Loader

    batches = []
    for stream in (False, True):
        windows = Windows(load(sets / "av1", stream=stream), [TOP])
        order = EpochOrder(len(windows), 8, seed=3)
        loader = Loader(windows, order, slice(0, 8), torch.device("cpu"), stop=5, prefetch=2)
        batches.append(list(loader))
    for expected, found in zip(*batches, strict=True):
        for key, value in expected.items():
            assert value.equal(found[key])


def test_a_streamed_run_ends_with_the_same_weights(sets, tmp_path, capsys):
    from dipole.cli import main

    words = ["--steps", "2", "--batch-size", "4", "--precision", "fp32", "--network", "width=32"]
    words += ["--pred-horizon", "8", "--action-horizon", "4"]
    weights = []
    lerobot.write(lerobot.read(sets / "h264").select([0, 2, 3]), tmp_path / "set", pictures="h264")
    for name, memory in (("whole", []), ("streamed", ["--memory", "0"])):
        main(["train", "--data", str(tmp_path / "set"), "--out", str(tmp_path / name), *words, *memory])
        assert ("streamed from their files" in capsys.readouterr().err) == (name == "streamed")
        weights.append((tmp_path / name / "checkpoints" / "last" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
