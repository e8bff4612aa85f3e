"""PNG and video, the pictures inside datasets."""

import numpy as np
import pytest
from data_helpers import make_episodes

from dipole.data.formats import lerobot, lerobot_v21_write, png, video
from dipole.errors import DipoleError

av = pytest.importorskip("av")


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (7, 33), (96, 96)])
def test_png_round_trip_is_exact(size, channels):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, *size, channels), dtype=np.uint8)
    decoder = png.Decoder(pictures.shape[1:])
    # Several in a row: a decoder that keeps state would add each to the one before.
    for picture in pictures:
        np.testing.assert_array_equal(decoder.decode(png.encode(picture)), picture)


def test_png_is_read_by_others():
    image = pytest.importorskip("PIL.Image")
    import io

    picture = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(image.open(io.BytesIO(png.encode(picture)))), picture)


def test_png_with_every_filter_is_read():
    # Other writers choose a filter per row; a smooth picture with noise makes Pillow use several.
    image = pytest.importorskip("PIL.Image")
    import io

    y, x = np.mgrid[0:64, 0:64]
    noise = np.random.default_rng(0).integers(0, 9, (64, 64, 3))
    picture = (np.stack([x, y, x + y], -1) + noise).astype(np.uint8)
    file = io.BytesIO()
    image.fromarray(picture).save(file, "png", optimize=True)
    np.testing.assert_array_equal(png.Decoder(picture.shape).decode(file.getvalue()), picture)


def test_jpeg_is_read():
    image = pytest.importorskip("PIL.Image")
    import io

    picture = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    file = io.BytesIO()
    image.fromarray(picture).save(file, "jpeg", quality=95)
    # JPEG is lossy and decoders differ in rounding: a few levels.
    assert np.abs(png.Decoder(picture.shape).decode(file.getvalue()).astype(int) - picture).max() <= 4


PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
DATA = png.encode(PICTURE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "neither PNG nor JPEG"),
        (b"GIF89a" + b"\0" * 60, "neither PNG nor JPEG"),
        (DATA[:30], "neither PNG nor JPEG"),
        (DATA[:200], "damaged"),
        (DATA[:60] + b"\xaa" * 40 + DATA[100:], "damaged"),
        (png.encode(PICTURE[:8]), "size 8 x 16"),
        (b"\xff\xd8\xff" + b"\0" * 60, "damaged"),
    ],
)
def test_damaged_pictures_are_refused(data, message):
    with pytest.raises(DipoleError, match=message):
        png.Decoder(PICTURE.shape).decode(data)


def test_odd_channels_are_refused():
    with pytest.raises(DipoleError, match="2 channels"):
        png.encode(np.zeros((4, 4, 2), np.uint8))
    with pytest.raises(DipoleError, match="2 channels"):
        png.Decoder((4, 4, 2))


def shades(count):
    """Return flat pictures, each 8 levels brighter than the one before."""
    return np.repeat(np.arange(count, dtype=np.uint8) * 8, 32 * 32 * 3).reshape(count, 32, 32, 3)


@pytest.mark.parametrize("codec", list(video.CODECS))
@pytest.mark.parametrize("fps", [10, 30, 29.97, 12.5])
def test_every_frame_of_a_video_is_found_by_its_time(codec, fps, tmp_path):
    pictures = shades(25)
    video.write_frames(tmp_path / "a.mp4", pictures, fps, codec)
    for first, last in ((0, 25), (7, 8), (11, 25)):
        out = np.zeros_like(pictures[first:last])
        # Times come from float32 tables.
        video.read_frames(tmp_path / "a.mp4", np.float32(np.arange(first, last) / fps).astype(float), out)
        # Half the distance between neighbours: the right frame, not the next.
        assert np.abs(out.astype(int) - pictures[first:last]).max() < 4


def test_frames_may_be_skipped_and_repeated(tmp_path):
    pictures = shades(12)
    video.write_frames(tmp_path / "a.mp4", pictures, 10, "h264")
    wanted = np.array([1, 1, 5, 11])
    out = np.zeros((4, 32, 32, 3), np.uint8)
    video.read_frames(tmp_path / "a.mp4", wanted / 10, out)
    assert np.abs(out.astype(int) - pictures[wanted]).max() < 4


@pytest.mark.parametrize(
    ("times", "shape", "message"),
    [
        ([0.05], (32, 32, 3), r"no frame at 0\.0500 s"),
        ([0.1, 0.1002], (32, 32, 3), r"no frame at 0\.1002 s"),
        ([1.1, 1.2], (32, 32, 3), r"ends before 1\.2000 s"),
        ([0.0], (32, 30, 3), "frames of 32 x 32"),
    ],
)
def test_times_without_a_frame_are_refused(times, shape, message, tmp_path):
    video.write_frames(tmp_path / "a.mp4", shades(12), 10, "h264")
    with pytest.raises(DipoleError, match=message):
        video.read_frames(tmp_path / "a.mp4", np.array(times), np.zeros((len(times), *shape), np.uint8))


def test_pictures_a_codec_cannot_hold_are_refused(tmp_path):
    with pytest.raises(DipoleError, match="encoding with libx264 failed"):
        video.write_frames(tmp_path / "a.mp4", np.zeros((3, 31, 31, 3), np.uint8), 10, "h264")


@pytest.mark.parametrize("codec", list(video.CODECS))
def test_key_frames_are_where_they_are_wanted(codec, tmp_path):
    starts = {0, 5, 12, 17, 18, 33}
    video.write_frames(tmp_path / "a.mp4", shades(31).repeat(2, axis=0)[:40], 10, codec, starts)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.pts is not None]
        keys = {round(packet.pts * stream.time_base * 10) for packet in packets if packet.is_keyframe}
    assert len(packets) == 40
    assert starts <= keys


@pytest.mark.parametrize("codec", list(video.CODECS))
def test_every_episode_of_a_shared_video_can_be_cut_out(codec, tmp_path):
    # Odd lengths: with key frames at every second frame of the file alone, half of the cuts would need encoding.
    data = make_episodes((5, 1, 7, 3), cameras=["top"])
    lerobot.write(data, tmp_path / "v3", pictures=codec)
    report = lerobot_v21_write.from_v3(tmp_path / "v3", tmp_path / "v21")
    assert (report.videos_copied, report.videos_encoded) == (4, [])
    key = "observation.images.top"
    whole, parts = lerobot.read(tmp_path / "v3"), lerobot.read(tmp_path / "v21")
    np.testing.assert_array_equal(parts.columns[key], whole.columns[key])
