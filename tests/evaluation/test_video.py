import base64

import numpy as np
import pytest

from dipole.errors import DipoleError
from dipole.evaluation.video import BAD, GOOD, embed, enlarge, shrink, tile, write_mp4


def test_shrink_averages_by_a_whole_factor():
    frame = np.zeros((300, 520, 3), np.uint8)
    frame[::3] = 90
    small = shrink(frame, 256)
    assert small.shape == (100, 173, 3)
    assert (small == 30).all()
    same = shrink(small, 256)
    assert same is not small
    np.testing.assert_array_equal(same, small)
    with pytest.raises(ValueError, match="uint8"):
        shrink(frame.astype(float))


def test_enlarge_repeats_pixels():
    frames = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    big = enlarge(frames, 7)
    assert big.shape == (2, 9, 12, 3)
    np.testing.assert_array_equal(big[:, ::3, ::3], frames)
    assert enlarge(big, 7) is big


def test_tile_holds_the_last_frame_and_marks_the_outcome():
    videos = [np.full((n, 96, 96, 3), 10 * n, np.uint8) for n in (2, 5, 3)]
    grid = tile(videos, [True, False, True])
    assert grid.shape == (6, 192, 192, 3)
    assert (grid[1, :96, :96] == 20).all()
    for when in (2, 5):
        assert tuple(grid[when, 0, 0]) == GOOD
        assert (grid[when, 10:80, 10:80] == 20).all()
    assert (grid[4, :96, 96:] == 50).all()
    assert tuple(grid[5, 95, 191]) == BAD
    assert (grid[:, 96:, 96:] == 0).all()
    assert tile(videos, columns=3).shape == (6, 96, 288, 3)
    with pytest.raises(ValueError, match="no videos"):
        tile([])


def test_a_file_that_plays(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = np.zeros((12, 95, 97, 3), np.uint8)
    for k in range(12):
        frames[k, :, : 8 * k] = (200, 40, 40)
    path = tmp_path / "new" / "clip.mp4"
    write_mp4(path, frames, fps=10)
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    decoded = np.stack([np.frombuffer(f, np.uint8).reshape(meta["size"][1], meta["size"][0], 3) for f in reader])
    assert meta["codec"] == "h264"
    assert meta["fps"] == 10
    assert "yuv420p" in meta["pix_fmt"]  # what browsers play
    assert decoded.shape == (12, 284, 290, 3)  # three times as large, an odd side loses a pixel
    difference = np.abs(decoded.astype(int) - enlarge(frames)[:, :284, :290])
    assert difference.mean() < 5  # of 255: lossy, but the same pictures in the same order
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]
    assert base64.b64decode(embed(path).removeprefix("data:video/mp4;base64,")) == path.read_bytes()


def test_a_folder_that_cannot_be_written(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DipoleError, match="could not be written"):
        write_mp4(tmp_path / "file" / "clip.mp4", np.zeros((2, 8, 8, 3), np.uint8), 10)
