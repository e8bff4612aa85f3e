import numpy as np
import pytest
from data_helpers import make_episodes

from dipole.data import Episodes, statistics
from dipole.errors import DipoleError


def test_numbers_equal_numpy(monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 200)  # several chunks, the last one shorter
    rng = np.random.default_rng(0)
    # A large mean and a small spread: the pooled variance must not cancel.
    action = (1e4 + rng.normal(size=(101, 2, 3))).astype(np.float32)
    stats = Episodes.from_list([{"action": action}]).stats()["action"]
    exact = action.astype(np.float64)
    for name, value in {"min": exact.min(0), "max": exact.max(0), "mean": exact.mean(0)}.items():
        np.testing.assert_allclose(stats[name], value, rtol=1e-14)
    np.testing.assert_allclose(stats["std"], exact.std(0), rtol=1e-9)
    np.testing.assert_allclose(stats["q01"], np.quantile(exact, 0.01, axis=0), rtol=1e-14)
    np.testing.assert_allclose(stats["q99"], np.quantile(exact, 0.99, axis=0), rtol=1e-14)
    assert stats["count"] == [101]
    assert stats["mean"].shape == (2, 3)


def test_pictures_are_counted_per_channel_on_zero_to_one():
    data = make_episodes((30,), cameras=["top"])
    stats = data.stats()["observation.images.top"]
    # 30 frames are fewer than the 100 always sampled, so the numbers are exact.
    exact = data.columns["observation.images.top"] / 255.0
    for name, value in {
        "min": exact.min((0, 1, 2)),
        "max": exact.max((0, 1, 2)),
        "mean": exact.mean((0, 1, 2)),
    }.items():
        np.testing.assert_allclose(stats[name].ravel(), value, rtol=1e-12)
    np.testing.assert_allclose(stats["std"].ravel(), exact.std((0, 1, 2)), rtol=1e-12)
    # A histogram gives quantiles to the next of 256 levels.
    np.testing.assert_allclose(stats["q50"].ravel(), np.quantile(exact, 0.5, axis=(0, 1, 2)), atol=1 / 255)
    assert stats["mean"].shape == (3, 1, 1)


def test_a_single_shade_has_itself_as_every_statistic():
    column = np.full((3, 2, 2, 1), 51, np.uint8)
    stats = Episodes.from_list([{"observation.image": column}]).stats()["observation.image"]
    for name in ("min", "max", "mean", "q01", "q99"):
        np.testing.assert_allclose(stats[name], 0.2, rtol=1e-12)
    np.testing.assert_allclose(stats["std"], 0, atol=1e-12)


def test_many_pictures_are_sampled():
    column = np.zeros((2000, 2, 2, 1), np.uint8)
    stats = Episodes.from_list([{"observation.image": column}]).stats()["observation.image"]
    assert stats["count"] == [int(2000**0.75)]


def test_flags_and_numbers_of_tasks_have_statistics_texts_do_not():
    data = Episodes.from_list([{"note": np.array(["a", "b"])[:, None], "next.done": np.array([False, True])}])
    assert list(data.stats()) == ["next.done"]
    assert data.stats()["next.done"]["mean"] == [0.5]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(value):
    action = np.zeros((4, 2))
    action[2, 1] = value
    with pytest.raises(DipoleError, match="'action' holds NaN or infinity"):
        Episodes.from_list([{"action": action}]).stats()
