import numpy as np
import pytest
from data_helpers import make_episodes

from dipole.data import Episodes, Feature
from dipole.data.features import single_precision
from dipole.data.storage import MEMORY_LIMIT_VARIABLE
from dipole.errors import DipoleError


def test_layout():
    data = make_episodes((5, 1, 9))
    assert (data.num_episodes, data.num_frames) == (3, 15)
    np.testing.assert_array_equal(data.ends, [5, 6, 15])
    np.testing.assert_array_equal(data.starts, [0, 5, 6])
    np.testing.assert_array_equal(data.lengths, [5, 1, 9])
    np.testing.assert_array_equal(data.episode_index, [0] * 5 + [1] + [2] * 9)
    np.testing.assert_array_equal(data.frame_index, [*range(5), 0, *range(9)])
    np.testing.assert_allclose(data.timestamp[6:], np.arange(9) / 10, rtol=1e-6)
    assert [data.task_of(i) for i in range(3)] == ["reach", "push", "reach"]


def test_an_episode_is_a_view():
    data = make_episodes()
    data.episode(2)["action"][0] = 7
    assert (data.columns["action"][6] == 7).all()
    assert sum(len(episode["action"]) for episode in data) == data.num_frames


def test_select_copies_in_the_given_order_and_may_repeat():
    data = make_episodes()
    chosen = data.select([2, 0, 2], keys=["action"])
    assert list(chosen.features) == ["action"]
    np.testing.assert_array_equal(chosen.lengths, [9, 5, 9])
    np.testing.assert_array_equal(chosen.episode(0)["action"], data.episode(2)["action"])
    np.testing.assert_array_equal(chosen.episode(1)["action"], data.episode(0)["action"])
    chosen.columns["action"][:] = 0
    assert (data.columns["action"] != 0).all()


def test_selecting_one_whole_dataset_copies_too():
    data = make_episodes((5,))
    data.select([0]).columns["action"][:] = 0
    assert (data.columns["action"] != 0).all()


def test_from_list_takes_numbers_without_an_axis():
    data = Episodes.from_list([{"action": np.zeros((3, 2)), "next.reward": np.arange(3.0)}])
    assert data.columns["next.reward"].shape == (3, 1)
    assert data.features["next.reward"] == Feature("float64", (1,))


def test_pictures_are_recognised():
    data = make_episodes((2,), cameras=["top"])
    assert data.features["observation.images.top"] == Feature("image", (16, 18, 3))


def test_concatenate_merges_tasks():
    first = make_episodes((3, 4), tasks=("reach", "push"))
    second = make_episodes((2, 2), seed=1, tasks=("push", "lift"))
    both = Episodes.concatenate([first, second])
    assert both.tasks == ("reach", "push", "lift")
    assert [both.task_of(i) for i in range(4)] == ["reach", "push", "push", "lift"]
    np.testing.assert_array_equal(both.episode(3)["action"], second.episode(1)["action"])


def test_concatenate_refuses_different_data():
    first = make_episodes((3,))
    with pytest.raises(DipoleError, match=r"dataset 1 .* 'observation.images.top'"):
        Episodes.concatenate([first, make_episodes((3,), cameras=["top"])])
    other = Episodes(first.features, first.columns, first.ends, 20.0, first.tasks)
    with pytest.raises(DipoleError, match=r"20\.0 fps.*10"):
        Episodes.concatenate([first, other])


def test_large_columns_live_on_disk_and_equal_small_ones(monkeypatch):
    small = make_episodes((40, 50), cameras=["top"])
    monkeypatch.setenv(MEMORY_LIMIT_VARIABLE, "0.05")  # 50 kB: the pictures (78 kB) are above, the rest below
    large = Episodes.concatenate([small.select([0]), small.select([1])])
    assert isinstance(large.columns["observation.images.top"], np.memmap)
    assert not isinstance(large.columns["action"], np.memmap)
    for key, column in small.columns.items():
        np.testing.assert_array_equal(large.columns[key], column)


def test_what_does_not_fit_on_the_disk_is_refused(monkeypatch):
    from dipole.data.storage import allocate

    with pytest.raises(DipoleError, match=r"camera needs .* GiB .* free"):
        allocate((10**9, 10**9), np.dtype(np.uint8), "camera")
    monkeypatch.setenv(MEMORY_LIMIT_VARIABLE, "much")
    with pytest.raises(DipoleError, match="'much' is not a number"):
        allocate((1,), np.dtype(np.uint8))


ONE = {"action": np.zeros((4, 2), np.float32)}
FEATURE = {"action": Feature("float32", (2,))}


@pytest.mark.parametrize(
    ("features", "columns", "ends", "fps", "message"),
    [
        (FEATURE, ONE, [], 10, "no episodes"),
        (FEATURE, ONE, [2, 2, 4], 10, "no frames"),
        (FEATURE, ONE, [0, 4], 10, "no frames"),
        (FEATURE, ONE, [4], 0, "fps is 0.0"),
        (FEATURE, ONE, [4], float("nan"), "fps is nan"),
        (FEATURE, ONE, [5], 10, "'action' has 4 frames, but the episodes have 5"),
        ({}, ONE, [4], 10, "features and columns differ: action"),
        ({"action": Feature("float32", (3,))}, ONE, [4], 10, r"float32 \(2,\) per frame.*\(3,\)"),
        ({"action": Feature("float64", (2,))}, ONE, [4], 10, "is float32"),
        ({"index": Feature("int64", (1,))}, {"index": np.zeros((4, 1), np.int64)}, [4], 10, "implicit"),
        (
            {"task_index": Feature("int64", (1,))},
            {"task_index": np.full((4, 1), -1)},
            [4],
            10,
            "task_index runs from -1",
        ),
    ],
)
def test_inconsistent_data_is_refused(features, columns, ends, fps, message):
    with pytest.raises(DipoleError, match=message):
        Episodes(features, columns, np.array(ends), fps)


def test_a_task_number_without_a_sentence_is_refused():
    data = make_episodes()
    with pytest.raises(DipoleError, match="to 1, but there are 1 tasks"):
        Episodes(data.features, data.columns, data.ends, data.fps, ("reach",))


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        ([], "no episodes"),
        ([{"a": np.zeros(3)}, {"b": np.zeros(3)}], "episode 1 has no 'a'"),
        ([{"a": np.zeros(3), "b": np.zeros(4)}], "different lengths"),
        ([{"a": np.zeros((3, 2))}, {"a": np.zeros((3, 5))}], "'a' changes its shape"),
    ],
)
def test_inconsistent_lists_are_refused(episodes, message):
    with pytest.raises(DipoleError, match=message):
        Episodes.from_list(episodes)


def test_unknown_names_are_refused():
    data = make_episodes()
    with pytest.raises(DipoleError, match="no 'observation.velocity'.*observation.state"):
        data.feature("observation.velocity")
    with pytest.raises(DipoleError, match="no episode 3"):
        data.episode(3)
    with pytest.raises(DipoleError, match="no episode -1"):
        data.select([-1])
    with pytest.raises(DipoleError, match="no episode was selected"):
        data.select([])


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        ("float99", (2,), "unknown feature dtype 'float99'"),
        ("object", (2,), "unknown feature dtype"),
        ("image", (3,), "height, width, channels"),
        ("float32", (0,), "at least 1"),
    ],
)
def test_impossible_features_are_refused(dtype, shape, message):
    with pytest.raises(DipoleError, match=message):
        Feature(dtype, shape)


def test_single_precision_leaves_all_but_float64_alone():
    value = single_precision(np.array([0.1, 1e-50]))
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, np.array([0.1, 0.0], np.float32))
    for kept in (np.zeros(2, np.uint8), np.zeros(2, np.int64), np.zeros(2, np.float16), np.array(["a"])):
        assert single_precision(kept) is kept
