"""LeRobotDataset v3.0 <-> v2.1: rows, pictures, statistics and video packets come out as they went in."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_helpers import FIXTURES

from dipole.data.formats import (
    lerobot,
    lerobot_convert,
    lerobot_v3_convert,
    lerobot_v21_write,
    lerobot_write,
    video,
    video_copy,
)
from dipole.errors import DipoleError

av = pytest.importorskip("av")
V3, V21 = FIXTURES / "lerobot_dataset_v3", FIXTURES / "lerobot_dataset_v21"


def assert_same_data(found, expected):
    assert found.features == expected.features
    assert list(found.features) == list(expected.features)
    np.testing.assert_array_equal(found.ends, expected.ends)
    assert (found.fps, found.tasks) == (expected.fps, expected.tasks)
    for key, column in expected.columns.items():
        np.testing.assert_array_equal(found.columns[key], column, err_msg=key)  # video frames too: packets are copied


def info(path):
    return json.loads((path / "meta" / "info.json").read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_golden_v3_to_v21_has_the_form_of_lerobots_own(tmp_path):
    report = lerobot_v21_write.from_v3(V3, tmp_path / "v21")
    assert (report.videos_copied, report.videos_encoded, report.stats_computed) == (3, [], False)
    assert_same_data(lerobot.read(tmp_path / "v21"), lerobot.read(V3))
    # The same episodes, as LeRobot 0.3.3 wrote them: same files, same tables, same lines.
    files = sorted(path.relative_to(V21) for path in V21.rglob("*") if path.is_file())
    assert (
        sorted(path.relative_to(tmp_path / "v21") for path in (tmp_path / "v21").rglob("*") if path.is_file()) == files
    )
    assert info(tmp_path / "v21") == info(V21)
    for name in ("episodes.jsonl", "tasks.jsonl"):
        assert lines(tmp_path / "v21" / "meta" / name) == lines(V21 / "meta" / name)
    for number in range(3):
        place = f"data/chunk-000/episode_{number:06d}.parquet"
        found, expected = pq.read_table(tmp_path / "v21" / place), pq.read_table(V21 / place)
        assert found.schema.names == expected.schema.names
        assert found.schema.types == expected.schema.types
        # The golden set was written with `datasets` 4; older ones, which LeRobot 0.3 allows, do not know "List".
        notes = expected.schema.metadata[b"huggingface"].replace(b'"List"', b'"Sequence"')
        assert json.loads(found.schema.metadata[b"huggingface"])["info"] == json.loads(notes)["info"]
    found, expected = (lines(path / "meta" / "episodes_stats.jsonl") for path in (tmp_path / "v21", V21))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["episode_index"] == theirs["episode_index"]
        assert ours["stats"].keys() == theirs["stats"].keys()
        for key, stats in theirs["stats"].items():
            assert ours["stats"][key].keys() == stats.keys()
            for name, value in stats.items():
                assert np.shape(ours["stats"][key][name]) == np.shape(value)
                if "images" not in key:
                    # float32 sums in another order. Pictures are left out: the video was encoded twice, and LeRobot
                    # 0.4.4 notes a standard deviation of 0 for the pictures of an episode.
                    np.testing.assert_allclose(ours["stats"][key][name], value, rtol=1e-5, atol=1e-6)


def test_golden_v3_to_v21_to_v3_is_lossless(tmp_path):
    lerobot_v21_write.from_v3(V3, tmp_path / "v21")
    report = lerobot_v3_convert.to_v3(tmp_path / "v21", tmp_path / "v3")
    assert (report.episodes, report.videos_copied, report.videos_encoded) == (3, 3, [])
    assert_same_data(lerobot.read(tmp_path / "v3"), lerobot.read(V3))
    assert info(tmp_path / "v3") == info(V3)
    place = "data/chunk-000/file-000.parquet"
    # Time stamps, PNG bytes and notes too.
    assert pq.read_table(tmp_path / "v3" / place).equals(pq.read_table(V3 / place), check_metadata=True)
    found, expected = (
        pq.read_table(path / "meta/episodes/chunk-000/file-000.parquet") for path in (tmp_path / "v3", V3)
    )
    # Quantiles are not part of v2.1.
    names = [name for name in expected.schema.names if "/q" not in name]
    assert sorted(found.schema.names) == sorted(names)
    for name in names:
        assert found.column(name).to_pylist() == expected.column(name).to_pylist(), name
        assert found.schema.field(name).type == expected.schema.field(name).type, name
    found, expected = (json.loads((path / "meta" / "stats.json").read_text()) for path in (tmp_path / "v3", V3))
    assert found.keys() == expected.keys()
    for key, stats in expected.items():
        for name in ("min", "max", "mean", "std", "count"):
            np.testing.assert_allclose(found[key][name], stats[name], rtol=1e-7)  # LeRobot pools float32 sums
    tables = [pq.read_table(path / "meta" / "tasks.parquet") for path in (tmp_path / "v3", V3)]
    assert tables[0].to_pydict() == tables[1].to_pydict()


def test_golden_v21_to_v3(tmp_path):
    lerobot_v3_convert.to_v3(V21, tmp_path / "v3")
    assert_same_data(lerobot.read(tmp_path / "v3"), lerobot.read(V21))


def packets(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [(float(p.pts * stream.time_base), bytes(p)) for p in container.demux(stream) if p.pts is not None]


def test_video_packets_are_copied_bit_by_bit(tmp_path):
    lerobot_v21_write.from_v3(V3, tmp_path / "v21")
    whole = packets(V3 / "videos/observation.images.top/chunk-000/file-000.mp4")
    first = 0
    for number, length in enumerate((10, 11, 12)):
        part = packets(tmp_path / f"v21/videos/chunk-000/observation.images.top/episode_{number:06d}.mp4")
        assert [data for _, data in part] == [data for _, data in whole[first : first + length]]
        np.testing.assert_allclose([time for time, _ in part], np.arange(length) / 10, atol=1e-6)
        first += length


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_stretches_that_start_between_key_frames_are_encoded_again_and_named(codec, tmp_path):
    # dipole's own files have a key frame every second frame: the episode that starts at frame 5 has none.
    episodes = small_episodes()
    lerobot_write.write(episodes, tmp_path / "v3", codec)
    report = lerobot_v21_write.from_v3(tmp_path / "v3", tmp_path / "v21")
    before, after = lerobot.read(tmp_path / "v3"), lerobot.read(tmp_path / "v21")
    for key, column in before.columns.items():
        difference = np.abs(after.columns[key].astype(float) - column.astype(float))
        # Smooth shades, encoded once more: a few levels.
        assert difference.max() <= (12 if key == "observation.images.top" else 0), key
    assert report.videos_copied + len(report.videos_encoded) == 2
    assert all(name == "observation.images.top, episode 1" for name in report.videos_encoded)


def small_episodes():
    from dipole.data import Episodes, Feature

    shade = (np.arange(11) * 9)[:, None, None, None]
    slope = np.linspace(0, 100, 48)[None, None, :, None]
    pictures = np.broadcast_to(shade + slope, (11, 32, 48, 3)).astype(np.uint8)
    columns = {"observation.images.top": pictures, "action": np.arange(22, dtype=np.float32).reshape(11, 2)}
    features = {"observation.images.top": Feature("video", (32, 48, 3)), "action": Feature("float32", (2,), ("x", "y"))}
    return Episodes(features, columns, np.array([5, 11]), 10.0)


def test_write_v21_from_episodes(tmp_path):
    episodes = small_episodes()
    lerobot_v21_write.write(episodes, tmp_path / "v21", robot_type="arm")
    found = lerobot.read(tmp_path / "v21")
    np.testing.assert_array_equal(found.columns["observation.images.top"], episodes.columns["observation.images.top"])
    np.testing.assert_array_equal(found.columns["action"], episodes.columns["action"])
    assert found.features["action"].names == ("x", "y")
    written = info(tmp_path / "v21")
    assert (written["codebase_version"], written["robot_type"], written["total_videos"]) == ("v2.1", "arm", 0)
    assert written["video_path"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["v21"]  # nothing temporary stays


def make_v20(path):
    """v2.0 has one file of statistics for the whole set, and none per episode."""
    shutil.copytree(V21, path)
    (path / "meta" / "episodes_stats.jsonl").unlink()
    (path / "meta" / "stats.json").write_text(json.dumps({}))
    changed = info(path) | {"codebase_version": "v2.0"}
    (path / "meta" / "info.json").write_text(json.dumps(changed))
    return path


@pytest.mark.parametrize("target", ["v3", "v21"])
def test_statistics_that_v20_lacks_are_computed(target, tmp_path):
    source = make_v20(tmp_path / "v20")
    convert = lerobot_v3_convert.to_v3 if target == "v3" else lerobot_v21_write.from_v3
    report = convert(source, tmp_path / "out")
    assert report.stats_computed
    assert_same_data(lerobot.read(tmp_path / "out"), lerobot.read(V21))
    stats = lerobot_convert.episode_stats(lerobot_convert.open_source(tmp_path / "out"), report)
    for ours, theirs in zip(stats, lines(V21 / "meta" / "episodes_stats.jsonl"), strict=True):
        assert ours.keys() == theirs["stats"].keys()
        for key, expected in theirs["stats"].items():
            # Pictures: the levels of the decoded AV1 differ a little from those before encoding.
            tolerance = 0.01 if "images" in key else 1e-5
            np.testing.assert_allclose(ours[key]["mean"], expected["mean"], atol=tolerance)
            np.testing.assert_allclose(ours[key]["std"], expected["std"], atol=tolerance)


def test_gaps_in_the_numbers_of_episodes_are_closed(tmp_path):
    shutil.copytree(V21, tmp_path / "gap")
    for path in (tmp_path / "gap").rglob("episode_000001.*"):
        path.unlink()
    meta = tmp_path / "gap" / "meta"
    for name in ("episodes.jsonl", "episodes_stats.jsonl"):
        kept = [line for line in (meta / name).read_text().splitlines() if json.loads(line)["episode_index"] != 1]
        (meta / name).write_text("\n".join(kept) + "\n")
    (meta / "info.json").write_text(json.dumps(info(tmp_path / "gap") | {"total_episodes": 2, "total_frames": 22}))
    lerobot_v3_convert.to_v3(tmp_path / "gap", tmp_path / "v3")
    found = lerobot.read(tmp_path / "v3")
    expected = lerobot.read(V21).select([0, 2])
    for key, column in expected.columns.items():
        np.testing.assert_array_equal(found.columns[key], column)
    table = pq.read_table(tmp_path / "v3" / "data/chunk-000/file-000.parquet")
    assert table.column("index").to_pylist() == list(range(22))
    assert table.column("episode_index").to_pylist() == [0] * 10 + [1] * 12
    assert info(tmp_path / "v3")["splits"] == {"train": "0:2"}


def test_large_sets_are_split_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr("dipole.data.formats.lerobot_arrow.DATA_FILE_MB", 0.001)
    monkeypatch.setattr(lerobot_v3_convert, "VIDEO_FILE_MB", 1e-6)
    lerobot_v3_convert.to_v3(V21, tmp_path / "v3")
    assert len(list((tmp_path / "v3" / "data").rglob("*.parquet"))) == 3
    assert len(list((tmp_path / "v3" / "videos").rglob("*.mp4"))) == 3
    assert_same_data(lerobot.read(tmp_path / "v3"), lerobot.read(V21))


def test_minari_side_files_go_along(tmp_path):
    shutil.copytree(V3, tmp_path / "v3")
    (tmp_path / "v3" / "meta" / "minari").mkdir()
    (tmp_path / "v3" / "meta" / "minari" / "minari.json").write_text("{}")
    lerobot_v21_write.from_v3(tmp_path / "v3", tmp_path / "v21")
    assert (tmp_path / "v21" / "meta" / "minari" / "minari.json").read_text() == "{}"


def test_errors_a_user_can_mend(tmp_path):
    with pytest.raises(DipoleError, match=r"of version 3\.0 already"):
        lerobot_v3_convert.to_v3(V3, tmp_path / "out")
    with pytest.raises(DipoleError, match=r"of version 2\.1 already"):
        lerobot_v21_write.from_v3(V21, tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(DipoleError, match="exists already"):
        lerobot_v21_write.from_v3(V3, tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


VIDEO = "videos/chunk-000/observation.images.top/episode_000001.mp4"
STATS = "meta/episodes_stats.jsonl"
DAMAGED = {
    "video cut short": (VIDEO, lambda b: b[:600], "holds no video|cannot be joined"),
    "video of text": (VIDEO, lambda b: b"hello" * 100, "cannot be joined"),
    "video of another episode": (VIDEO, "episode_000000", "has 10 frames"),
    "table cut short": ("data/chunk-000/episode_000001.parquet", lambda b: b[:-400], "not a whole parquet"),
    "stats no JSON": (STATS, lambda b: b[:-40], "not valid JSON"),
    "stats without numbers": (STATS, lambda b: b.replace(b'"stats"', b'"status"'), "must hold"),
    "stats of other shapes": (STATS, lambda b: b.replace(b'"max": [', b'"max": [[0], ', 1), "differ in form"),
    "fewer rows": ("meta/episodes.jsonl", lambda b: b.replace(b": 11", b": 10"), "total_frames"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_sources_leave_nothing_behind(name, tmp_path):
    place, change, words = DAMAGED[name]
    shutil.copytree(V21, tmp_path / "set")
    target = tmp_path / "set" / place
    if isinstance(change, str):
        shutil.copy(target.with_name(f"{change}.mp4"), target)
    else:
        target.write_bytes(change(target.read_bytes()))
    with pytest.raises(DipoleError, match=words):
        lerobot_v3_convert.to_v3(tmp_path / "set", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_joining_refuses_videos_of_another_form(tmp_path):
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    video.write_frames(tmp_path / "a.mp4", iter(frames), 10, "h264")
    video.write_frames(tmp_path / "b.mp4", iter(np.zeros((4, 32, 64, 3), np.uint8)), 10, "h264")
    with video_copy.Joiner(tmp_path / "out.mp4", 10) as joiner:
        assert joiner.append(tmp_path / "a.mp4", 4)
        assert not joiner.append(tmp_path / "b.mp4", 4)
        assert joiner.append(tmp_path / "a.mp4", 4)
    assert len(packets(tmp_path / "out.mp4")) == 8


def test_h264_with_frames_out_of_order_is_cut_and_joined(tmp_path):
    """B frames are stored before frames that are shown earlier: times of decoding and showing differ."""
    wide = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    for name in ("a", "b"):
        with av.open(str(tmp_path / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=10, options={"g": "6", "crf": "10"})
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            stream.codec_context.max_b_frames = 2
            for number in range(12):
                picture = np.ascontiguousarray(wide[:, number : number + 64] // (1 if name == "a" else 2))
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    with video_copy.Joiner(tmp_path / "joined.mp4", 10) as joiner:
        assert joiner.append(tmp_path / "a.mp4", 12)
        assert joiner.append(tmp_path / "b.mp4", 12)
    times = [time for time, _ in packets(tmp_path / "joined.mp4")]
    assert times != sorted(times)  # else this test shows nothing
    joined = np.empty((24, 64, 64, 3), np.uint8)
    video.read_frames(tmp_path / "joined.mp4", np.arange(24) / 10, joined)
    for number, name in enumerate(("a", "b")):
        expected = np.empty((12, 64, 64, 3), np.uint8)
        video.read_frames(tmp_path / f"{name}.mp4", np.arange(12) / 10, expected)
        np.testing.assert_array_equal(joined[12 * number : 12 * number + 12], expected)
        assert video_copy.cut(tmp_path / "joined.mp4", 1.2 * number, 12, 10, tmp_path / "part.mp4")
        part = np.empty_like(expected)
        video.read_frames(tmp_path / "part.mp4", np.arange(12) / 10, part)
        np.testing.assert_array_equal(part, expected)
    # Frames 1 to 6: no key frame at the start; the next key frame comes before frames that are shown earlier.
    assert not video_copy.cut(tmp_path / "joined.mp4", 0.1, 6, 10, tmp_path / "part.mp4")
