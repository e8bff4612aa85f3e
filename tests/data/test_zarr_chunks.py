"""Chunks that unpack to far more than their array announces: refused with one line and little memory, before zarr."""

import bz2
import gzip
import io
import json
import shutil
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from data_helpers import FIXTURES

from dipole.data.formats import zarr_chunks, zarr_replay
from refusals import assert_refused

zarr = pytest.importorskip("zarr")
numcodecs = pytest.importorskip("numcodecs")
GOLDEN = FIXTURES / "replay_buffer.zarr"
SIZE = 2**25
# Reading the golden buffer and the 1 MiB pieces take about 4 MB; unpacked, each bomb has 34 MB.
MOST = SIZE // 4
REFUSED = "chunk 'data/action/0.0' unpacks to more than the 160 bytes announced: refused"
# lz4 shrinks only 255 times: its bombs are too large as files already.
TOO_LARGE = r"chunk 'data/action/0.0' has \d+ bytes for 160 announced: it is damaged"


def zstd_without_a_size():
    """256 blocks of 128 KiB of one byte each, in a frame that announces no size (RFC 8878)."""
    block = struct.pack("<I", 1 << 1 | 2**17 << 3)[:3] + b"\0"
    last = bytes([block[0] | 1]) + block[1:]
    return b"\x28\xb5\x2f\xfd" + b"\x00" + b"\x58" + block * (SIZE // 2**17 - 1) + last


def zeros():
    return np.zeros(SIZE, np.uint8)


BOMBS = {
    "zlib": ("zlib", lambda: zlib.compress(bytes(SIZE), 9)),
    # Members and streams in a row: none of them is large.
    "gzip": ("gzip", lambda: gzip.compress(bytes(2**22)) * (SIZE // 2**22)),
    "bz2": ("bz2", lambda: bz2.compress(bytes(2**20)) * (SIZE // 2**20)),
    "blosc with lz4": ("blosc", lambda: numcodecs.Blosc("lz4").encode(zeros())),
    "blosc with zstd": ("blosc", lambda: numcodecs.Blosc("zstd", shuffle=0).encode(zeros())),
    "lz4": ("lz4", lambda: numcodecs.LZ4().encode(zeros())),
    "zstd": ("zstd", lambda: numcodecs.Zstd().encode(zeros())),
    "zstd without a size": ("zstd", zstd_without_a_size),
}


def packed_with(root, codec, chunk=None):
    """Say that the action's one chunk is packed with `codec`, and pack it so or put `chunk` there."""
    array, file = root / "data/action/.zarray", root / "data/action/0.0"
    values = zarr.open_group(GOLDEN, mode="r")["data/action"][:]
    array.write_text(json.dumps(json.loads(array.read_text()) | {"compressor": {"id": codec}}))
    file.write_bytes(bytes(numcodecs.get_codec({"id": codec}).encode(values)) if chunk is None else bytes(chunk))


def zipped(root, packing=zipfile.ZIP_STORED):
    path = root.with_suffix(".zarr.zip")
    with zipfile.ZipFile(path, "w", packing) as file:
        for part in sorted(root.rglob("*")):
            file.write(part, part.relative_to(root))
    return path


def assert_refused_cheaply(path, message):
    tracemalloc.start()
    try:
        with assert_refused(message):
            zarr_replay.read(path)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


@pytest.fixture
def root(tmp_path):
    zarr_replay.read(GOLDEN)  # what is imported on first use is no part of the memory measured
    return shutil.copytree(GOLDEN, tmp_path / "a.zarr")


@pytest.mark.parametrize("name", BOMBS)
def test_bomb(name, root):
    codec, make = BOMBS[name]
    bomb = make()
    assert len(bomb) < SIZE // 100
    assert len(numcodecs.get_codec({"id": codec}).decode(bomb)) == SIZE  # it is a real one
    packed_with(root, codec, bomb)
    message = TOO_LARGE if "lz4" in name else REFUSED
    assert_refused_cheaply(root, message)
    assert_refused_cheaply(zipped(root), message)


@pytest.mark.parametrize("codec", ["zlib", "gzip", "bz2", "lz4", "zstd", "blosc"])
def test_what_keeps_its_word_is_read(codec, root):
    packed_with(root, codec)
    expected = zarr_replay.read(GOLDEN).columns["action"]
    np.testing.assert_array_equal(zarr_replay.read(root).columns["action"], expected)
    deflated = zipped(root, zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(zarr_replay.read(deflated).columns["action"], expected)
    # a byte more than announced is refused: nothing is rounded
    values = np.ascontiguousarray(expected).tobytes()
    packed_with(root, codec, numcodecs.get_codec({"id": codec}).encode(values + b"\0"))
    assert_refused_cheaply(root, REFUSED)


@pytest.mark.parametrize("size_bytes", [1, 2, 4, 8])
def test_zstd_sizes(size_bytes):
    """Each width of the field Frame_Content_Size, with and without a window and a dictionary (RFC 8878, 3.1.1.1)."""
    size = {1: 200, 2: 256 + 60_000, 4: 2**30, 8: 2**40}[size_bytes]
    field = (size - (256 if size_bytes == 2 else 0)).to_bytes(size_bytes, "little")
    flag = {1: 0, 2: 1, 4: 2, 8: 3}[size_bytes] << 6
    for one_segment in (1,) if size_bytes == 1 else (0, 1):
        for dictionary, width in enumerate((0, 1, 2, 4)):
            head = bytes([flag | one_segment << 5 | dictionary]) + b"\x58" * (1 - one_segment) + b"\x07" * width + field
            assert zarr_chunks._zstd(io.BytesIO(b"\x28\xb5\x2f\xfd" + head + bytes(20)), 0) == size


def test_a_raw_chunk_too_large_is_refused(root):
    """A sparse file takes no room on the disk, and all of it in memory."""
    array = root / "data/action/.zarray"
    array.write_text(json.dumps(json.loads(array.read_text()) | {"compressor": None}))
    with (root / "data/action/0.0").open("wb") as file:
        file.truncate(2**40)
    assert_refused_cheaply(root, "chunk 'data/action/0.0' has 1099511627776 bytes for 160 announced: it is damaged")


def test_zip_members(root):
    """Packed twice: the chunk itself is a bomb of the zip file."""
    assert_refused_cheaply(zipped(root, zipfile.ZIP_LZMA), "packed neither stored nor deflated: unpack it with unzip")
    (root / "data/action/0.0").write_bytes(bytes(SIZE))
    path = zipped(root, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < SIZE // 100
    assert_refused_cheaply(path, f"has {SIZE} bytes for 160 announced")
    # Its directory says 160 bytes: no more is unpacked.
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", SIZE), struct.pack("<I", 160)))
    assert_refused_cheaply(path, "'data/action' cannot be unpacked")


def test_descriptions(root, monkeypatch):
    monkeypatch.setattr(zarr_chunks, "_DESCRIPTION_BYTES", 2**20)
    (root / "data/.zattrs").write_text(json.dumps({"comment": "x" * 2**20}))
    for path in (root, zipped(root, zipfile.ZIP_DEFLATED)):
        assert_refused_cheaply(path, r"'data/.zattrs' has \d+ bytes: this is no description of an array")


def test_version_3(tmp_path):
    """The newer layout is read where its chunks are packed plainly; sharded ones would be looked up by other names."""
    for name, options in {"plain": {}, "sharded": {"shards": (8, 2)}}.items():
        group = zarr.open_group(tmp_path / f"{name}.zarr", mode="w", zarr_format=3)
        kept = group.create_array("data/action", shape=(8, 2), dtype="float32", chunks=(4, 2), **options)
        kept[:] = np.arange(16).reshape(8, 2)
        ends = group.create_array("meta/episode_ends", shape=(1,), dtype="int64")
        ends[:] = 8
    np.testing.assert_array_equal(
        zarr_replay.read(tmp_path / "plain.zarr").columns["action"], np.arange(16).reshape(8, 2)
    )
    assert_refused_cheaply(tmp_path / "sharded.zarr", "packed with sharding_indexed: write it again")
    (tmp_path / "plain.zarr/data/action/c/0/0").write_bytes(numcodecs.Zstd().encode(zeros()))
    assert_refused_cheaply(tmp_path / "plain.zarr", "unpacks to more than the 32 bytes announced")
