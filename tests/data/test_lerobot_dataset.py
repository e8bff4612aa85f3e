"""LeRobotDataset: golden folders written by LeRobot 0.3.3 (v2.1) and 0.4.4 (v3.0), round trips, real data."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import FIXTURES, make_episodes, shared

from dipole.data import Episodes, Feature, load
from dipole.data.formats import lerobot, lerobot_arrow, lerobot_write
from dipole.errors import DipoleError

GOLDEN = ["lerobot_dataset_v21", "lerobot_dataset_v3"]
EXPECTED = np.array(json.loads((FIXTURES / "lerobot_dataset_expected.json").read_text())["rows"])


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    pytest.importorskip("av")
    data = lerobot.read(FIXTURES / name)
    np.testing.assert_array_equal(data.lengths, [10, 11, 12])
    assert data.fps == 10
    np.testing.assert_array_equal(data.episode_index, EXPECTED[:, 0])
    np.testing.assert_array_equal(data.frame_index, EXPECTED[:, 1])
    np.testing.assert_array_equal(data.columns["observation.state"], EXPECTED[:, 2:4].astype(np.float32))
    np.testing.assert_array_equal(data.columns["action"], EXPECTED[:, 4:6].astype(np.float32))
    wrist = data.columns["observation.images.wrist"]
    np.testing.assert_array_equal(wrist.astype(np.int64).sum((1, 2, 3)), EXPECTED[:, 6])
    assert [data.task_of(i) for i in range(3)] == ["push 0", "push 1", "push 0"]
    np.testing.assert_array_equal(data.columns["next.reward"][:, 0], 0.5 * data.episode_index)
    np.testing.assert_array_equal(data.columns["next.done"][:, 0], np.isin(np.arange(33), data.ends - 1))
    assert data.features["action"] == Feature("float32", (2,), ("dx", "dy"))
    top = data.columns["observation.images.top"]
    shade = (60 * data.episode_index + 5 * data.frame_index) % 255
    # Lossy AV1 of one flat shade: off by one at most, so every frame is told from its neighbours (5 apart).
    assert np.abs(top - shade[:, None, None, None].astype(float)).max() <= 2


@pytest.mark.parametrize("name", GOLDEN)
def test_chosen_episodes_and_features(name):
    pytest.importorskip("av")
    whole = lerobot.read(FIXTURES / name)
    keys = ["observation.images.top", "action"]
    part = lerobot.read(FIXTURES / name, episodes=[2, 0], keys=keys)
    assert list(part.features) == keys
    for key in keys:
        np.testing.assert_array_equal(part.columns[key], whole.select([2, 0]).columns[key])
    numbers = lerobot.read(FIXTURES / name, images=False)
    assert not any(feature.is_image for feature in numbers.features.values())


def test_pictures_are_decoded_to_disk_when_they_are_large(monkeypatch):
    pytest.importorskip("av")
    whole = lerobot.read(FIXTURES / "lerobot_dataset_v3")
    monkeypatch.setenv("DIPOLE_COLUMN_MEMORY_MB", "0.05")
    mapped = lerobot.read(FIXTURES / "lerobot_dataset_v3")
    for key in ("observation.images.top", "observation.images.wrist"):
        assert isinstance(mapped.columns[key], np.memmap)
        np.testing.assert_array_equal(mapped.columns[key], whole.columns[key])


def assert_equal(found, expected, but=()):
    assert (found.fps, found.tasks) == (expected.fps, expected.tasks)
    np.testing.assert_array_equal(found.ends, expected.ends)
    assert found.columns.keys() == expected.columns.keys()
    for key in found.columns.keys() - set(but):
        assert found.columns[key].dtype == expected.columns[key].dtype
        np.testing.assert_array_equal(found.columns[key], expected.columns[key])


def test_round_trip_with_png_is_exact(tmp_path):
    pytest.importorskip("av")
    data = make_episodes((5, 1, 9), cameras=["top", "wrist"])
    lerobot.write(data, tmp_path / "set")
    assert_equal(lerobot.read(tmp_path / "set"), data)


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_round_trip_with_video(codec, tmp_path):
    pytest.importorskip("av")
    y, x = np.mgrid[0:64, 0:64]
    smooth = np.stack([(2 * x + y + 8 * t) % 256 for t in range(9)])[..., None].repeat(3, -1).astype(np.uint8) // 2
    episodes = [
        {"action": np.zeros((n, 2), np.float32), "observation.image": smooth[:n] + 60 * i} for i, n in ((0, 9), (1, 4))
    ]
    data = Episodes.from_list(episodes, fps=30)
    lerobot.write(data, tmp_path / "set", pictures=codec)
    found = lerobot.read(tmp_path / "set")
    assert found.features["observation.image"].dtype == "video"
    error = np.abs(found.columns["observation.image"].astype(int) - data.columns["observation.image"])
    # Measured 1.1 (H.264) and 1.4 (AV1); a frame's neighbour differs by 4 and more.
    assert error.mean((1, 2, 3)).max() < 3
    # The second episode alone: its frames lie in the middle of the shared file.
    part = lerobot.read(tmp_path / "set", episodes=[1])
    np.testing.assert_array_equal(part.columns["observation.image"], found.columns["observation.image"][9:])


def test_round_trip_of_every_kind_of_feature(tmp_path):
    rng = np.random.default_rng(0)
    episode = {
        "action": rng.normal(size=(4, 2)),
        "observation.state": rng.normal(size=(4, 1)).astype(np.float32),
        "observation.grid": rng.normal(size=(4, 2, 3)).astype(np.float32),
        "observation.count": rng.integers(0, 9, (4, 3)),
        "observation.touch": rng.random((4, 5)) > 0.5,
        "next.success": np.array([0, 0, 0, 1], bool),
        "note": np.array(["a", "bé", "", "d d"]),
    }
    data = Episodes.from_list([episode], fps=12.5)
    lerobot.write(data, tmp_path / "set", robot_type="arm")
    found = lerobot.read(tmp_path / "set")
    assert found.tasks == (lerobot_write.DEFAULT_TASK,)
    assert found.columns.pop("task_index").sum() == 0
    found.features.pop("task_index")
    assert found.fps == 12.5
    assert found.features == data.features
    for key, column in data.columns.items():
        np.testing.assert_array_equal(found.columns[key], column)
    assert json.loads((tmp_path / "set/meta/info.json").read_text())["robot_type"] == "arm"


def test_many_files(tmp_path, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.setattr(lerobot_arrow, "DATA_FILE_MB", 1e-5)  # a new table for every episode
    monkeypatch.setattr(lerobot_write, "VIDEO_FILE_MB", 0)
    for module in (lerobot_arrow, lerobot_write):
        monkeypatch.setattr(module, "FILES_PER_CHUNK", 2)
    data = make_episodes((5, 3, 9, 2, 4), cameras=["top"])
    lerobot.write(data, tmp_path / "set", pictures="h264")
    assert len(list((tmp_path / "set/data").glob("chunk-00[012]/file-00[01].parquet"))) == 5
    assert len(list((tmp_path / "set/videos/observation.images.top").glob("chunk-00[012]/file-00[01].mp4"))) == 5
    assert_equal(lerobot.read(tmp_path / "set"), data, but=["observation.images.top"])
    part = lerobot.read(tmp_path / "set", episodes=[4, 1], images=False)
    np.testing.assert_array_equal(part.columns["action"], data.select([4, 1]).columns["action"])


def test_written_statistics(tmp_path):
    data = make_episodes((5, 1, 9), cameras=["top"])
    lerobot.write(data, tmp_path / "set")
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())
    for key, row in data.stats().items():
        for name, value in row.items():
            np.testing.assert_allclose(stats[key][name], value)
    assert stats["index"]["max"] == [14]
    table = pq.read_table(tmp_path / "set/meta/episodes/chunk-000/file-000.parquet")
    means = np.array(table.column("stats/action/mean").to_pylist())
    np.testing.assert_allclose(means, [episode["action"].mean(0, dtype=np.float64) for episode in data])
    assert table.column("dataset_from_index").to_pylist() == [0, 5, 6]


def test_written_tables_look_as_those_of_lerobot(tmp_path):
    pytest.importorskip("av")
    lerobot.write(lerobot.read(FIXTURES / "lerobot_dataset_v3"), tmp_path / "set", pictures="h264")
    for name in ("data/chunk-000/file-000.parquet", "meta/tasks.parquet"):
        ours, theirs = (pq.read_schema(root / name) for root in (tmp_path / "set", FIXTURES / "lerobot_dataset_v3"))
        assert set(ours.names) == set(theirs.names) - {"observation.images.wrist"}  # wrist: video here, PNG there
        for field in ours:
            assert str(field.type).removeprefix("large_") == str(theirs.field(field.name).type).removeprefix("large_")
    ours, theirs = (
        json.loads((root / "meta/info.json").read_text()) for root in (tmp_path / "set", FIXTURES / GOLDEN[1])
    )
    assert ours.keys() == theirs.keys()
    assert ours["features"].keys() == theirs["features"].keys()
    index = json.loads(pq.read_schema(tmp_path / "set/meta/tasks.parquet").metadata[b"pandas"])["index_columns"]
    assert index == ["__index_level_0__"]


def test_a_taken_name_is_refused_and_kept(tmp_path):
    data = make_episodes()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/mine.txt").write_text("dear")
    with pytest.raises(DipoleError, match="exists already"):
        lerobot.write(data, tmp_path / "set")
    assert (tmp_path / "set/mine.txt").read_text() == "dear"
    lerobot.write(data, tmp_path / "set", overwrite=True)
    assert not (tmp_path / "set/mine.txt").exists()
    assert lerobot.read(tmp_path / "set").num_frames == data.num_frames


def test_a_failed_write_leaves_nothing(tmp_path):
    data = make_episodes()
    data.columns["action"][3] = np.nan  # statistics refuse it, after the tables are written
    with pytest.raises(DipoleError, match="'action' holds NaN"):
        lerobot.write(data, tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("feature", "column", "options", "message"),
    [
        ("observation/state", np.zeros((3, 2)), {}, "no feature name"),
        ("../state", np.zeros((3, 2)), {}, "no feature name"),
        ("observation.deep", np.zeros((3, 1, 1, 1, 1, 1, 2)), {}, "6 axes"),
        ("observation.state", np.zeros((3, 2)), {"pictures": "gif"}, "unknown way to store pictures 'gif'"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(feature, column, options, message, tmp_path):
    with pytest.raises(DipoleError, match=message):
        lerobot.write(Episodes.from_list([{feature: column}]), tmp_path / "set", **options)


@pytest.mark.parametrize("form", ["__index_level_0__", "task"])
@pytest.mark.parametrize("as_index", [True, False])
def test_tasks_in_every_form(form, as_index, tmp_path):
    lerobot.write(make_episodes((3, 4)), tmp_path / "set")
    # Numbers with gaps, in another order than the rows of the table.
    table = pa.table({"task_index": [7, 4], form: ["push", "reach"]})
    if as_index:
        table = table.replace_schema_metadata({"pandas": json.dumps({"index_columns": [form]})})
    pq.write_table(table, tmp_path / "set/meta/tasks.parquet")
    path = tmp_path / "set/data/chunk-000/file-000.parquet"
    frames = pq.read_table(path)
    where = frames.schema.get_field_index("task_index")
    pq.write_table(frames.set_column(where, "task_index", pa.array([4] * 3 + [7] * 4)), path)
    found = lerobot.read(tmp_path / "set")
    assert found.tasks == ("reach", "push")
    assert [found.task_of(i) for i in range(2)] == ["reach", "push"]


def test_rows_in_any_order(tmp_path):
    data = make_episodes((5, 4))
    lerobot.write(data, tmp_path / "set")
    path = tmp_path / "set/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(np.random.default_rng(0).permutation(9)), path, row_group_size=2)
    assert_equal(lerobot.read(tmp_path / "set"), data)


def test_path_templates_are_honoured(tmp_path):
    data = make_episodes((5, 4))
    lerobot.write(data, tmp_path / "set")
    (tmp_path / "set/data/chunk-000/file-000.parquet").rename(tmp_path / "set/frames-00-0.parquet")
    info = tmp_path / "set/meta/info.json"
    info.write_text(info.read_text().replace(lerobot_write.DATA_PATH, "frames-{chunk_index:02d}-{file_index}.parquet"))
    assert_equal(lerobot.read(tmp_path / "set"), data)


def test_older_forms_of_the_description(tmp_path):
    lerobot.write(make_episodes((3,), cameras=["top"]), tmp_path / "set")
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    info["features"]["action"]["names"] = {"motors": ["x", "y"]}
    info["features"]["observation.state"]["names"] = [["a", "b", "c", "d"]]
    info["features"]["next.reward"]["shape"] = []
    info["features"]["observation.images.top"] |= {"shape": [3, 16, 18], "names": ["channel", "height", "width"]}
    info["features"]["language_events"] = {"dtype": "language", "shape": [1], "names": None}
    info["unheard_of"] = {}
    (tmp_path / "set/meta/info.json").write_text(json.dumps(info))
    found = lerobot.read(tmp_path / "set")
    assert found.features["action"].names == ("x", "y")
    assert found.features["observation.state"].names == ("a", "b", "c", "d")
    assert found.features["next.reward"].shape == (1,)
    assert found.features["observation.images.top"].shape == (16, 18, 3)
    assert "language_events" not in found.features


def test_plain_lists_as_in_older_tables(tmp_path):
    data = make_episodes((5, 4))
    lerobot.write(data, tmp_path / "set")
    path = tmp_path / "set/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    where = table.schema.get_field_index("action")
    lists = pa.array(table.column("action").to_pylist(), pa.list_(pa.float64()))
    pq.write_table(table.set_column(where, "action", lists), path)
    assert_equal(lerobot.read(tmp_path / "set"), data)


def test_a_snapshot_of_links_into_the_cache_is_read(tmp_path):
    data = make_episodes((5, 4))
    cache = tmp_path / "datasets--org--name"
    lerobot.write(data, cache / "whole")
    root = cache / "snapshots" / "abc"
    for number, file in enumerate(path for path in (cache / "whole").rglob("*") if path.is_file()):
        (cache / "blobs").mkdir(exist_ok=True)
        link = root / file.relative_to(cache / "whole")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.rename(cache / "blobs" / str(number)))
    assert_equal(lerobot.read(root), data)


def test_real_humanoid_data():
    data = load(shared("g1_lowdim"), images=False)
    assert (data.num_episodes, data.num_frames, data.fps) == (100, 35965, 30)
    assert data.features["action"].names[0] == "kLeftShoulderPitch"
    lines = (shared("g1_lowdim") / "meta/episodes_stats.jsonl").read_text().splitlines()
    for index in (0, 57, 99):
        theirs = json.loads(lines[index])["stats"]["action"]
        # float64 over float32 numbers; they store what numpy gave them
        np.testing.assert_allclose(data.episode(index)["action"].mean(0, dtype=np.float64), theirs["mean"], rtol=1e-5)
        np.testing.assert_array_equal(data.episode(index)["action"].max(0), np.float32(theirs["max"]))
