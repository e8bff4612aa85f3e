"""Every damage to a LeRobotDataset is refused with a line that names the file and the key."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import FIXTURES, make_episodes

from dipole.data.formats import lerobot
from dipole.errors import DipoleError
from refusals import assert_refused

INFO = "meta/info.json"
FRAMES = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
TASKS = "meta/tasks.parquet"
VIDEO = "videos/observation.images.top/chunk-000/file-000.mp4"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    pytest.importorskip("av")
    root = tmp_path_factory.mktemp("lerobot")
    lerobot.write(make_episodes((5, 4), cameras=["top"]), root / "png")
    lerobot.write(make_episodes((5, 4), cameras=["top"]), root / "video", pictures="h264")
    return root


def remove(path):
    return lambda root: (root / path).unlink()


def cut(path, keep=0.5):
    def damage(root):
        data = (root / path).read_bytes()
        (root / path).write_bytes(data[: int(len(data) * keep)])

    return damage


def garble(path, start, length=40):
    def damage(root):
        data = bytearray((root / path).read_bytes())
        data[start : start + length] = b"\xaa" * length
        (root / path).write_bytes(bytes(data))

    return damage


def text(path, content):
    return lambda root: (root / path).write_text(content)


def info(**changes):
    """Change keys of info.json; None removes one, `a__b` is the key b of a, `DOT` stands for a dot."""

    def damage(root):
        value = json.loads((root / INFO).read_text())
        for name, new in changes.items():
            *outer, last = [part.replace("DOT", ".") for part in name.split("__")]
            target = value
            for part in outer:
                target = target[part]
            if new is None:
                del target[last]
            else:
                target[last] = new
        (root / INFO).write_text(json.dumps(value))

    return damage


def column(path, key, values=None):
    """Replace a column of a table; None removes it."""

    def damage(root):
        table = pq.read_table(root / path)
        where = table.schema.get_field_index(key)
        table = table.remove_column(where)
        if values is not None:
            table = table.add_column(where, key, pa.array(values))
        pq.write_table(table, root / path)

    return damage


def rows(path, keep):
    return lambda root: pq.write_table(pq.read_table(root / path).take(keep), root / path)


def link_away(root):
    outside = root.parent / "outside.parquet"
    shutil.move(root / FRAMES, outside)
    (root / FRAMES).symlink_to(outside)


def link_meta_away(name):
    def damage(root):
        outside = root.parent / "outside"
        shutil.move(root / name, outside)
        (root / name).symlink_to(outside)

    return damage


def rename_column_to_noise(root):
    """A name in the table's own description that is no UTF-8."""
    data = (root / FRAMES).read_bytes()
    assert data.count(b"next.reward") > 1
    (root / FRAMES).write_bytes(data.replace(b"next.reward", b"next\xff\xfeeward"))


STATES = [[0.0] * 4] * 9
NAN = [[0.0] * 4] * 6 + [[0.0, float("nan"), 0.0, 0.0]] + [[0.0] * 4] * 2
PNG = {"bytes": b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "path": None}

DAMAGES = {
    "no description": (remove(INFO), "info.json is missing"),
    "description cut": (cut(INFO), "info.json is not valid JSON"),
    "description empty": (text(INFO, ""), "info.json is not valid JSON"),
    "description a list": (text(INFO, "[]"), "info.json holds list, not a JSON object"),
    "description deep": (text(INFO, "[" * 100_000), "info.json is not valid JSON"),
    "description not text": (lambda root: (root / INFO).write_bytes(b"\xff\xfe\xff"), "info.json is not UTF-8"),
    "version missing": (info(codebase_version=None), "info.json has no 'codebase_version'"),
    "version unknown": (info(codebase_version="v1.6"), "is of version v1.6: v3.0, v2.1 and v2.0"),
    "fps missing": (info(fps=None), "info.json has no 'fps'"),
    "fps text": (info(fps="10"), "'fps' is '10', it must be float"),
    "fps flag": (info(fps=True), "'fps' is True"),
    "fps zero": (info(fps=0), "'fps' is 0.0"),
    "features missing": (info(features=None), "no 'features'"),
    "feature not described": (info(features__action=3), "feature 'action' is not described"),
    "feature without shape": (info(features__action__shape=None), "no 'shape'"),
    "feature of no size": (info(features__action__shape=[0]), r"'action': .*\(0,\)"),
    "feature of odd size": (info(features__action__shape=["2"]), "'action' has shape"),
    "feature of unknown type": (info(features__action__dtype="object"), "'action': unknown feature dtype 'object'"),
    "feature wider than table": (info(features__action__shape=[3]), r"'action' holds rows of 2, .* float32 \(3,\)"),
    "feature of other type": (info(features__action__dtype="int64"), "'action' holds float, .* int64"),
    "feature not in table": (
        info(features__observationDOTforce={"dtype": "float32", "shape": [1], "names": None}),
        "file-000.parquet has no column 'observation.force'",
    ),
    "more episodes announced": (info(total_episodes=3), "'total_episodes' is 3, but .* 2"),
    "more frames announced": (info(total_frames=10**15), "'total_frames' is 1000000000000000, but .* 9"),
    "no template": (info(data_path=None), "no 'data_path'"),
    "template of another version": (info(data_path="data/{episode_chunk:03d}.parquet"), "asks for 'episode_chunk'"),
    "template with code": (info(data_path="data/{chunk_index.__class__}"), "is not understood"),
    "template upwards": (info(data_path="../{chunk_index}/x.parquet"), "outside that folder: refused"),
    "template absolute": (info(data_path="/etc/passwd"), "outside that folder: refused"),
    "link out of the folder": (link_away, "outside that folder: refused"),
    "description linked": (link_meta_away(INFO), "outside that folder: refused"),
    "tasks linked": (link_meta_away(TASKS), "outside that folder: refused"),
    "episodes linked": (link_meta_away(EPISODES), "outside that folder: refused"),
    "mixed rates": (
        column(FRAMES, "timestamp", pa.array([*(t / 10 for t in range(5)), *(t / 20 for t in range(4))], pa.float32())),
        r"frames of episode 1 are 0.0500 s apart, but 'fps' in .*info.json is 10",
    ),
    "names not UTF-8": (rename_column_to_noise, "file-000.parquet"),
    "no table": (remove(FRAMES), "file-000.parquet is missing"),
    "table cut": (cut(FRAMES), "not a whole parquet file"),
    "table empty": (text(FRAMES, ""), "not a whole parquet file"),
    "table garbled": (garble(FRAMES, 200, 2000), "file-000.parquet"),
    "no column of states": (column(FRAMES, "observation.state"), "has no column 'observation.state'"),
    "no column of times": (column(FRAMES, "timestamp"), "has no column 'timestamp'"),
    "states are text": (column(FRAMES, "observation.state", ["a"] * 9), "'observation.state' holds string"),
    "states are lists of text": (
        column(FRAMES, "observation.state", [["a"] * 4] * 9),
        "'observation.state' holds string",
    ),
    "states are ragged": (column(FRAMES, "observation.state", [[0.0] * 3, *STATES[1:]]), "holds rows of 3"),
    "states have holes": (column(FRAMES, "observation.state", [None, *STATES[1:]]), "'observation.state' has 1 empty"),
    "states have inner holes": (column(FRAMES, "observation.state", [[None] * 4, *STATES[1:]]), "empty values"),
    "states are NaN": (
        column(FRAMES, "observation.state", NAN),
        "'observation.state' holds NaN or infinity, first in episode 1, frame 1",
    ),
    "times are NaN": (column(FRAMES, "timestamp", [float("nan")] * 9), "'timestamp' holds NaN"),
    "episode numbers are floats": (column(FRAMES, "episode_index", [0.0] * 9), "'episode_index' is double"),
    "frame numbers too large": (column(FRAMES, "frame_index", [5, *range(1, 9)]), "'frame_index' lies outside"),
    "frame numbers negative": (column(FRAMES, "frame_index", [-1, *range(1, 9)]), "'frame_index' lies outside"),
    "frames missing": (rows(FRAMES, list(range(8))), "has 8 rows, but its episodes should have 9"),
    "frames missing, others twice": (rows(FRAMES, [*range(8), 0]), "lacks frames of episode 1"),
    "frames twice": (rows(FRAMES, [*range(9), 0]), "hold 1 frames twice"),
    "pictures are numbers": (column(FRAMES, "observation.images.top", [1.0] * 9), "'observation.images.top' is double"),
    "pictures are files": (
        column(FRAMES, "observation.images.top", [{"bytes": None, "path": "a.png"}] * 8 + [PNG]),
        "names picture files",
    ),
    "pictures are noise": (
        column(FRAMES, "observation.images.top", [{"bytes": b"noise" * 20, "path": None}] * 9),
        "'observation.images.top' holds a picture that is neither PNG nor JPEG",
    ),
    "pictures of another size": (column(FRAMES, "observation.images.top", [PNG] * 9), "a picture of size 0 x 0"),
    "no table of episodes": (remove(EPISODES), "holds no parquet file"),
    "table of episodes cut": (cut(EPISODES), "not a whole parquet file"),
    "no lengths": (column(EPISODES, "length"), "has no column 'length'"),
    "lengths are text": (column(EPISODES, "length", ["5", "4"]), "'length' is string"),
    "lengths have holes": (column(EPISODES, "length", [5, None]), "'length' has an empty cell"),
    "lengths are absurd": (column(EPISODES, "length", [2**62, 4]), "has length"),
    "lengths are negative": (column(EPISODES, "length", [-5, 14]), "has length -5"),
    "no episodes": (rows(EPISODES, pa.array([], pa.int64())), "has no episodes"),
    "episode numbers repeat": (column(EPISODES, "episode_index", [1, 1]), "repeat or are absurd"),
    "episode numbers are absurd": (column(EPISODES, "episode_index", [0, 2**39]), "repeat or are absurd"),
    "no tasks": (remove(TASKS), "tasks.parquet is missing"),
    "tasks cut": (cut(TASKS), "not a whole parquet file"),
    "tasks without sentences": (column(TASKS, "__index_level_0__"), "must have 'task_index' and the sentences"),
    "tasks are numbers": (column(TASKS, "__index_level_0__", [1, 2]), "a number and a sentence"),
    "task numbers repeat": (column(TASKS, "task_index", [1, 1]), "occurs twice"),
    "task unknown": (column(TASKS, "task_index", [0, 8]), "task_index 1 is not in the table of tasks"),
}

VIDEO_DAMAGES = {
    "no video": (remove(VIDEO), r"file-000.mp4 is missing: .*images=False"),
    "video cut": (cut(VIDEO, 0.7), "file-000.mp4"),
    "video empty": (text(VIDEO, ""), "file-000.mp4 cannot be decoded"),
    "video is text": (text(VIDEO, "no video " * 100), "file-000.mp4 cannot be decoded"),
    "video of another size": (info(features__observationDOTimagesDOTtop__shape=[16, 20, 3]), "frames of 16 x 18"),
    "video of another rate": (
        column(FRAMES, "timestamp", [t / 10 + 0.05 for t in (*range(5), *range(4))]),
        "has no frame at",
    ),
    "video too short": (
        column(EPISODES, "videos/observation.images.top/from_timestamp", [0.0, 0.7]),
        "ends before",
    ),
    "video not placed": (column(EPISODES, "videos/observation.images.top/file_index"), "has no column 'videos/"),
    "video upwards": (info(video_path="../{video_key}.mp4"), "outside that folder: refused"),
    "video linked": (link_meta_away(VIDEO), "outside that folder: refused"),
    "video template missing": (info(video_path=None), "no 'video_path'"),
    "depth": (
        info(features__observationDOTimagesDOTtop__info={"video.is_depth_map": True}),
        "depth video, which is not supported",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(name, whole, tmp_path):
    damage, message = DAMAGES[name]
    assert_damage_is_refused(shutil.copytree(whole / "png", tmp_path / "set"), damage, message)


@pytest.mark.parametrize("name", VIDEO_DAMAGES)
def test_damage_to_video(name, whole, tmp_path):
    damage, message = VIDEO_DAMAGES[name]
    assert_damage_is_refused(shutil.copytree(whole / "video", tmp_path / "set"), damage, message)


def assert_damage_is_refused(root, damage, message):
    lerobot.read(root)  # it is whole before
    damage(root)
    with assert_refused(message):
        lerobot.read(root)


def test_nan_can_be_let_through(whole, tmp_path):
    root = shutil.copytree(whole / "png", tmp_path / "set")
    column(FRAMES, "observation.state", NAN)(root)
    found = lerobot.read(root, allow_nan=True)
    assert np.isnan(found.columns["observation.state"]).sum() == 1
    # an episode without NaN can be had in any case
    assert lerobot.read(root, episodes=[0]).num_frames == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": [2]}, "has no episode 2"),
        ({"episodes": [0, 0]}, "asked for twice"),
        ({"episodes": []}, "no episode was asked for"),
        ({"keys": ["observation.force"]}, "no feature 'observation.force': it has observation.state"),
    ],
)
def test_impossible_choices_are_refused(options, message, whole):
    with pytest.raises(DipoleError, match=message):
        lerobot.read(whole / "png", **options)


def line(path, number, change):
    """Change one JSON line of a file."""

    def damage(root):
        lines = (root / path).read_text().splitlines()
        lines[number] = change if isinstance(change, str) else json.dumps(json.loads(lines[number]) | change)
        (root / path).write_text("\n".join(lines))

    return damage


OLD_FRAMES = "data/chunk-000/episode_000001.parquet"
OLD_VIDEO = "videos/chunk-000/observation.images.top/episode_000001.mp4"


def short_video(root):
    from dipole.data.formats import video

    video.write_frames(root / OLD_VIDEO, np.zeros((3, 64, 64, 3), np.uint8), 10, "h264")


def title_not_text(root):
    """Put a title into a video that is no UTF-8, which no one reads: no damage."""
    data = (root / OLD_VIDEO).read_bytes()
    assert b"Lavf" in data
    (root / OLD_VIDEO).write_bytes(data.replace(b"Lavf", b"\xff\xfevf"))


def state_column(values):
    return lambda root: column(OLD_FRAMES, "observation.state", values(pq.read_table(root / OLD_FRAMES)))(root)


OLD_DAMAGES = {
    "a table cut": (cut(OLD_FRAMES), "episode_000001.parquet is not a whole parquet file"),
    "a column missing": (column(OLD_FRAMES, "observation.state"), "episode_000001.parquet has no column"),
    "states are text": (state_column(lambda t: ["a"] * len(t)), "'observation.state' holds string"),
    "states are ragged": (state_column(lambda t: [[0.0]] * len(t)), "holds rows of 1"),
    "states are NaN": (
        lambda root: state_column(lambda t: [[float("nan")] * len(row) for row in t["observation.state"]])(root),
        "'observation.state' holds NaN or infinity, first in episode 1, frame 0",
    ),
    "mixed rates": (
        lambda root: column(
            OLD_FRAMES, "timestamp", pa.array([i / 25 for i in range(pq.read_table(root / OLD_FRAMES).num_rows)], "f4")
        )(root),
        "frames of episode 1 are 0.0400 s apart|has no frame at",
    ),
    "a video too short": (short_video, "episode_000001.mp4 ends before"),
    "a video cut": (cut(OLD_VIDEO), "episode_000001.mp4"),
    "tasks not text": (lambda root: (root / "meta/tasks.jsonl").write_bytes(b'{"task": "\xff"}'), "is not UTF-8"),
    "template upwards": (info(data_path="../{episode_chunk}/{episode_index}.parquet"), "outside that folder: refused"),
    "video template upwards": (info(video_path="/etc/{video_key}"), "outside that folder: refused"),
    "link out of the folder": (link_meta_away(OLD_FRAMES), "outside that folder: refused"),
    "video linked": (link_meta_away(OLD_VIDEO), "outside that folder: refused"),
    "an absurd length": (line("meta/episodes.jsonl", 1, {"length": 2**62}), "has length"),
    "an absurd number": (line("meta/episodes.jsonl", 1, {"episode_index": 2**39}), "repeat or are absurd"),
    "no episodes listed": (remove("meta/episodes.jsonl"), "episodes.jsonl is missing"),
    "an episode cut": (line("meta/episodes.jsonl", 1, '{"episode_index": 1, "len'), "episodes.jsonl is not valid JSON"),
    "an episode is a number": (line("meta/episodes.jsonl", 1, "17"), "one JSON object per line"),
    "an episode without length": (line("meta/episodes.jsonl", 1, "{}"), "no 'episode_index'"),
    "an episode too long": (line("meta/episodes.jsonl", 1, {"length": 12}), "'total_frames' is 33, but .* 34"),
    "no file of an episode": (remove("data/chunk-000/episode_000001.parquet"), "episode_000001.parquet is missing"),
    "no video of an episode": (
        remove("videos/chunk-000/observation.images.top/episode_000001.mp4"),
        "episode_000001.mp4 is missing",
    ),
    "no tasks": (remove("meta/tasks.jsonl"), "tasks.jsonl is missing"),
    "a task without number": (line("meta/tasks.jsonl", 0, '{"task": "push"}'), "no 'task_index'"),
    "chunks of nothing": (info(chunks_size=0), "'chunks_size' is 0"),
    "episodes in another file": (
        lambda root: shutil.copy(
            root / "data/chunk-000/episode_000002.parquet", root / "data/chunk-000/episode_000001.parquet"
        ),
        "episode_000001.parquet lacks frames of episode 1",
    ),
}


@pytest.mark.parametrize("name", OLD_DAMAGES)
def test_damage_to_version_2(name, tmp_path):
    pytest.importorskip("av")
    damage, message = OLD_DAMAGES[name]
    assert_damage_is_refused(shutil.copytree(FIXTURES / "lerobot_dataset_v21", tmp_path / "set"), damage, message)


def test_version_2_0_is_read(tmp_path):
    # v2.0 differs from v2.1 in its files of statistics, which are not read.
    root = shutil.copytree(FIXTURES / "lerobot_dataset_v21", tmp_path / "set")
    (root / "meta/episodes_stats.jsonl").unlink()
    info(codebase_version="v2.0")(root)
    assert lerobot.read(root, images=False).num_frames == 33


def test_a_title_that_is_no_text_does_no_harm(tmp_path):
    pytest.importorskip("av")
    root = shutil.copytree(FIXTURES / "lerobot_dataset_v21", tmp_path / "set")
    title_not_text(root)
    assert lerobot.read(root).num_frames == 33
