"""k-means: separated clusters are found, seeds repeat, impossible requests are answered."""

import numpy as np
import pytest

from dipole.data.kmeans import kmeans
from dipole.errors import DipoleError


def test_separated_clusters_are_found():
    rng = np.random.default_rng(0)
    centres = np.array([[-10.0, 0], [0, 10], [10, -5]])
    points = (centres[:, None] + rng.normal(0, 0.1, (3, 50, 2))).reshape(-1, 2)
    for seed in range(5):
        found = kmeans(rng.permutation(points), 3, seed)
        # The exact answer: the mean of each cloud, sorted by the first component.
        np.testing.assert_allclose(found, points.reshape(3, 50, 2).mean(1), atol=1e-12)


def test_it_depends_on_the_seed_alone():
    points = np.random.default_rng(1).normal(size=(200, 4))
    np.testing.assert_array_equal(kmeans(points, 7, 3), kmeans(points, 7, 3))
    assert np.abs(kmeans(points, 7, 3) - kmeans(points, 7, 4)).max() > 1e-3


def test_as_many_centres_as_points():
    points = np.array([[2.0], [1.0], [1.0], [5.0]])
    np.testing.assert_array_equal(kmeans(points, 3), [[1.0], [2.0], [5.0]])
    for count in (0, 4):
        with pytest.raises(DipoleError, match="ask for 1 to 3"):
            kmeans(points, count)


def test_no_step_of_lloyd_could_improve_it():
    points = np.random.default_rng(2).normal(size=(300, 2))
    centres = kmeans(points, 8)
    owner = ((points[:, None] - centres) ** 2).sum(-1).argmin(1)
    np.testing.assert_allclose(centres, [points[owner == k].mean(0) for k in range(8)], atol=1e-12)
