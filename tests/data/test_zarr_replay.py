"""diffusion_policy's ReplayBuffer: a golden folder written by zarr 2.18, and zarr 2 stores written by zarr 3."""

import importlib
import json
import pickle
import shutil
import sys
import types
import zipfile

import numpy as np
import pytest
from data_helpers import FIXTURES, make_episodes

from dipole.data import Episodes, Feature, load, pusht
from dipole.data.formats import zarr_chunks, zarr_replay
from dipole.errors import DipoleError
from refusals import assert_refused

zarr = pytest.importorskip("zarr")
GOLDEN = FIXTURES / "replay_buffer.zarr"


def write(path, ends=(3, 7), **arrays):
    group = zarr.open_group(path, mode="w", zarr_format=2)
    for name, array in arrays.items():
        kept = group.create_array(f"data/{name}", shape=array.shape, dtype=array.dtype, chunks=(2, *array.shape[1:]))
        kept[:] = array
    stored = group.create_array("meta/episode_ends", shape=(len(ends),), dtype="int64")
    stored[:] = np.array(ends)
    return path


def test_golden():
    data = zarr_replay.read(GOLDEN)
    np.testing.assert_array_equal(data.ends, [10, 20])
    assert data.features["observation.image"] == Feature("image", (96, 96, 3))
    assert data.features["observation.state"] == Feature("float32", (5,))
    # the chunk is Blosc-packed float32: read by zarr itself
    np.testing.assert_array_equal(data.columns["action"], zarr.open_group(GOLDEN, mode="r")["data/action"][:])
    assert data.columns["action"].std() > 0.2


def test_many_chunks_large_and_zipped(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = {
        "action": rng.normal(size=(7, 2)).astype(np.float32),
        "force": rng.normal(size=(7, 6)),
        "side_view": rng.integers(0, 256, (7, 12, 10, 3), dtype=np.uint8),
        "img": rng.integers(1, 256, (7, 12, 10, 3)).astype(np.float32),
    }
    path = write(tmp_path / "a.zarr", **arrays)
    monkeypatch.setattr(zarr_replay, "_READ_BYTES", 100)
    whole = zarr_replay.read(path)
    assert set(whole.columns) == {"action", "observation.force", "observation.images.side_view", "observation.image"}
    np.testing.assert_array_equal(whole.columns["observation.images.side_view"], arrays["side_view"])
    np.testing.assert_array_equal(whole.columns["observation.image"], arrays["img"])
    np.testing.assert_array_equal(whole.columns["observation.force"], arrays["force"].astype(np.float32))
    assert set(zarr_replay.read(path, images=False).columns) == {"action", "observation.force"}
    with zipfile.ZipFile(tmp_path / "a.zarr.zip", "w") as file:
        for part in sorted(path.rglob("*")):
            file.write(part, part.relative_to(path))
    zipped = load(tmp_path / "a.zarr.zip", episodes=[1])
    for key, column in zipped.columns.items():
        np.testing.assert_array_equal(column, whole.episode(1)[key])
    monkeypatch.setenv("DIPOLE_COLUMN_MEMORY_MB", "0.0001")
    mapped = zarr_replay.read(path)
    assert isinstance(mapped.columns["observation.images.side_view"].base, np.memmap) or isinstance(
        mapped.columns["observation.images.side_view"], np.memmap
    )
    np.testing.assert_array_equal(mapped.columns["observation.images.side_view"], arrays["side_view"])


def test_pusht_gets_the_simulators_observation(tmp_path):
    rng = np.random.default_rng(0)
    state = rng.uniform(0, 500, (7, 5)).astype(np.float32)
    arrays = {
        "state": state,
        "action": rng.uniform(0, 500, (7, 2)).astype(np.float32),
        "keypoint": np.ones((7, 9, 2), np.float32),
        "n_contacts": np.ones((7, 1), np.float32),
    }
    data = zarr_replay.read(write(tmp_path / "a.zarr", **arrays))
    assert set(data.features) == {"observation.state", "observation.environment_state", "action", "task_index"}
    np.testing.assert_array_equal(data.columns["observation.environment_state"], pusht.block_corners(state[:, 2:]))
    pictures = rng.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    array = zarr.create_array(str(tmp_path / "img.zarr"), shape=pictures.shape, dtype="uint8", zarr_format=2)
    array[:] = pictures
    both = pusht.with_images(data, tmp_path / "img.zarr")
    np.testing.assert_array_equal(both.columns["observation.image"], pictures)
    with pytest.raises(DipoleError, match=r"it must be uint8 \[3, H, W, 3\], a picture per frame"):
        pusht.with_images(data.select([0]), tmp_path / "img.zarr")
    with pytest.raises(DipoleError, match="single array and does not say where episodes end.*with_images"):
        load(tmp_path / "img.zarr")


class Evil:
    def __reduce__(self):
        return (open, ("evil.txt", "w"))


def pickled(root):
    """An array of Python objects behind numcodecs' pickle filter."""
    description = json.loads((root / "data/action/.zarray").read_text())
    description |= {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 5}], "compressor": None, "fill_value": None}
    (root / "data/action/.zarray").write_text(json.dumps(description))
    (root / "data/action/0.0").write_bytes(pickle.dumps(np.array([Evil()], object)))


def change(path, **changes):
    def damage(root):
        value = json.loads((root / path).read_text())
        (root / path).write_text(json.dumps(value | changes))

    return damage


def garble(root):
    chunk = root / "data/action/0.0"
    chunk.write_bytes(b"\xaa" * len(chunk.read_bytes()))


def group_for_an_array(root):
    shutil.rmtree(root / "meta/episode_ends")
    shutil.copytree(root / "data", root / "meta/episode_ends")


def link_chunk(root):
    shutil.move(root / "data/action/0.0", root.parent / "elsewhere")
    (root / "data/action/0.0").symlink_to(root.parent / "elsewhere")


def link_group(root):
    shutil.move(root / "data", root.parent / "elsewhere")
    (root / "data").symlink_to(root.parent / "elsewhere")


DAMAGES = {
    "ends are a group": (group_for_an_array, "'meta/episode_ends' is a group, an array was expected"),
    "chunks of no size": (
        change("data/action/.zarray", chunks=[0, 2]),
        r"announces shape .* chunks of \(0, 2\)|cannot",
    ),
    "absurd chunks": (change("data/action/.zarray", chunks=[10**9, 10**9]), "announces shape .* in chunks of"),
    "absurdly many chunks": (change("data/action/.zarray", shape=[10**13, 2], chunks=[1, 2]), "lacks .* chunk files"),
    "ends are floats": (change("meta/episode_ends/.zarray", dtype="<f8"), "whole numbers|cannot be unpacked"),
    "texts for numbers": (change("data/action/.zarray", dtype="<U4"), "only numbers are read|cannot"),
    "description not UTF-8": (
        lambda root: (root / "data/action/.zarray").write_bytes(b'{"a": "\xff"}'),
        "cannot be read",
    ),
    "link out of the folder": (link_chunk, "lies outside that folder: refused"),
    "linked group": (link_group, "lies outside that folder: refused"),
    "no group": (lambda root: (root / ".zgroup").unlink(), "not a whole zarr group"),
    "group garbled": (lambda root: (root / ".zgroup").write_text("{"), "not a whole zarr group"),
    "no data": (lambda root: shutil.rmtree(root / "data"), "has no 'data'"),
    "no ends": (lambda root: shutil.rmtree(root / "meta"), "has no 'meta/episode_ends'"),
    "a chunk missing": (lambda root: (root / "data/img/1.0.0.0").unlink(), "'data/img' lacks 1 of its 2 chunk files"),
    "a chunk garbled": (garble, "chunk 'data/action/0.0' unpacks to more than the 160 bytes announced"),
    "a chunk cut": (lambda root: (root / "data/action/0.0").write_bytes(b"\x02"), "'data/action' cannot be unpacked"),
    "description garbled": (lambda root: (root / "data/action/.zarray").write_text("{"), "cannot be read"),
    "rows of another set": (
        change("data/action/.zarray", shape=[15, 2], chunks=[20, 2]),
        "'action' has 15 rows, .* 20",
    ),
    "absurd size": (change("data/action/.zarray", shape=[10**12, 10**6], chunks=[20, 2]), "lacks .* chunk files"),
    "unknown codec": (change("data/action/.zarray", compressor={"id": "imagecodecs_jpeg2k"}), "cannot be read.*codec"),
    "objects": (pickled, "cannot be read"),
    "a codec that announces nothing": (
        change("data/action/.zarray", compressor={"id": "lzma"}),
        "packed with lzma: write it again with one of blosc, zstd, lz4",
    ),
    "filters": (
        change("data/action/.zarray", filters=[{"id": "delta", "dtype": "<f4"}]),
        "packed with blosc after delta: write it again",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage, message = DAMAGES[name]
    root = shutil.copytree(GOLDEN, tmp_path / "a.zarr")
    zarr_replay.read(root)
    damage(root)
    with assert_refused(message):
        zarr_replay.read(root)
    assert not (tmp_path / "evil.txt").exists()


def test_nan_is_refused(tmp_path):
    action = np.zeros((7, 2), np.float32)
    action[5] = np.nan
    path = write(tmp_path / "a.zarr", action=action + 1)
    with pytest.raises(DipoleError, match="'action' holds NaN or infinity, first in episode 1, frame 2"):
        load(path)
    assert load(path, allow_nan=True).num_frames == 7


def test_a_broken_zip_is_refused(tmp_path):
    (tmp_path / "a.zarr.zip").write_bytes(b"PK no zip")
    with pytest.raises(DipoleError, match="not a whole zarr group"):
        load(tmp_path / "a.zarr.zip")


def test_made_data_are_not_taken_for_pusht():
    data = make_episodes()
    assert isinstance(data, Episodes)
    assert not pusht.is_pusht({"state": np.zeros((3, 5)), "action": np.zeros((3, 2))})


def test_pictures_packed_by_imagecodecs(tmp_path, monkeypatch):
    """Its JPEG 2000 is stood in for by zlib under the same name: what is checked is that zarr gets to know it."""
    numcodecs = pytest.importorskip("numcodecs")
    name = "imagecodecs_jpeg2k"

    class StandIn(numcodecs.Zlib):
        codec_id = name

    asked = []

    def register_codecs(codecs=None, *, force=False, verbose=True):
        asked.append(codecs)
        numcodecs.register_codec(StandIn, name)

    module = types.ModuleType("imagecodecs.numcodecs")
    module.register_codecs = register_codecs
    monkeypatch.setitem(sys.modules, "imagecodecs", types.ModuleType("imagecodecs"))
    monkeypatch.setitem(sys.modules, "imagecodecs.numcodecs", module)
    monkeypatch.setattr(numcodecs.registry, "codec_registry", dict(numcodecs.registry.codec_registry))
    img = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    path = write(tmp_path / "a.zarr", action=np.ones((7, 2), np.float32))
    group = zarr.open_group(path, mode="a", zarr_format=2)
    kept = group.create_array("data/img", shape=img.shape, dtype="uint8", chunks=(1, 8, 8, 3), compressors=StandIn())
    kept[:] = img
    numcodecs.registry.codec_registry.pop(name, None)
    np.testing.assert_array_equal(zarr_replay.read(path).columns["observation.image"], img)
    assert asked == [[name]]


def test_pictures_packed_as_jpeg_2000(tmp_path):
    codecs = pytest.importorskip("imagecodecs.numcodecs")
    img = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    path = write(tmp_path / "a.zarr", action=np.ones((7, 2), np.float32))
    group = zarr.open_group(path, mode="a", zarr_format=2)
    packer = codecs.Jpeg2k(level=0, reversible=True)
    kept = group.create_array("data/img", shape=img.shape, dtype="uint8", chunks=(1, 8, 8, 3), compressors=packer)
    kept[:] = img
    np.testing.assert_array_equal(zarr_replay.read(path).columns["observation.image"], img)


def test_a_picture_larger_than_its_chunk_is_refused(tmp_path):
    """The stand-in's registration is not needed: the size in the header is looked at before the codec is."""
    image = pytest.importorskip("PIL.Image")
    if not importlib.import_module("PIL.features").check("jpg_2000"):
        pytest.skip("Pillow without JPEG 2000")
    for name, picture, size in (
        ("a.j2k", image.new("RGB", (96, 64)), 96 * 64 * 3),
        ("a.jp2", image.new("L", (33, 40)), 33 * 40),
        ("b.jp2", image.new("I;16", (20, 30)), 20 * 30 * 2),
    ):
        picture.save(tmp_path / name)
        with (tmp_path / name).open("rb") as file:
            assert zarr_chunks._jpeg2000(file, 0) == size
