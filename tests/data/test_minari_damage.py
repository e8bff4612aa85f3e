"""Damaged and hostile Minari datasets: one clear line each, nothing followed, nothing allocated beyond the file."""

import io
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dipole.data.formats import minari
from refusals import assert_refused

GOLDEN = Path(__file__).parents[1] / "fixtures" / "minari" / "toy"
MAIN = "data/main_data.hdf5"
FIRST, SECOND = "episode_0", "episode_1"


def edit(action):
    """Return a damager that opens the HDF5 file of the set."""

    def damage(folder):
        with h5py.File(folder / MAIN, "a") as file:
            action(file)

    return damage


def drop(name):
    return edit(lambda file: file.__delitem__(name))


def put(name, value, **options):
    """Return a damager that stores something else at `name`: an array, a link, or (None) a group."""

    def action(file):
        del file[name]
        if value is None:
            file.create_group(name)
        elif isinstance(value, h5py.SoftLink | h5py.ExternalLink):
            file[name] = value
        else:
            file.create_dataset(name, data=value, **options)

    return edit(action)


def poke(name, where, value):
    return edit(lambda file: file[name].__setitem__(where, value))


def declare(name, shape, dtype, chunks):
    """Return a damager that announces an array without storing any of it."""

    def action(file):
        del file[name]
        file.create_dataset(name, shape, dtype, chunks=chunks)

    return edit(action)


def note(**changes):
    """Return a damager that changes metadata.json; None removes a key, a function maps the old value."""

    def damage(folder):
        path = folder / "data" / "metadata.json"
        metadata = json.loads(path.read_text())
        for key, change in changes.items():
            if change is None:
                del metadata[key]
            else:
                metadata[key] = change(metadata[key]) if callable(change) else change
        path.write_text(json.dumps(metadata))

    return damage


def file_bytes(name, change):
    """Return a damager that replaces the bytes of a file by `change(bytes)`; None removes the file."""

    def damage(folder):
        path = folder / name
        data = path.read_bytes()
        path.unlink()
        if change is not None:
            path.write_bytes(change(data))

    return damage


def jpeg(size, colour=True):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((size, size, 3) if colour else (size, size), np.uint8)).save(buffer, "JPEG")
    return np.stack([np.frombuffer(buffer.getvalue(), np.uint8)] * 6)


def secret(folder):
    path = folder.parent / "secret.hdf5"
    with h5py.File(path, "w") as file:
        file["numbers"] = np.zeros((5, 2), np.float32)
    return path


def external_link(folder):
    put(f"{FIRST}/actions", h5py.ExternalLink(secret(folder), "/numbers"))(folder)


def external_group(folder):
    with h5py.File(secret(folder), "a") as file:
        file["observations/state"] = np.zeros((6, 3), np.float32)
    put(f"{FIRST}/observations", h5py.ExternalLink(secret(folder), "/observations"))(folder)


def virtual_dataset(folder):
    layout = h5py.VirtualLayout((5, 2), np.float32)
    layout[:] = h5py.VirtualSource(secret(folder), "numbers", (5, 2))
    drop(f"{FIRST}/actions")(folder)
    edit(lambda file: file.create_virtual_dataset(f"{FIRST}/actions", layout))(folder)


def external_storage(folder):
    raw = folder.parent / "raw.bin"
    raw.write_bytes(bytes(40))
    drop(f"{FIRST}/actions")(folder)
    edit(lambda file: file.create_dataset(f"{FIRST}/actions", (5, 2), "f4", external=[(str(raw), 0, 40)]))(folder)


def plug_in(folder):
    """Announce a filter (blosc, 32001) that HDF5 would look for on the disk; optional, so that writing works."""
    drop(f"{FIRST}/actions")(folder)

    def action(file):
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((5, 2))
        plist.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple((5, 2))
        h5py.h5d.create(file[FIRST].id, b"actions", h5py.h5t.NATIVE_FLOAT, space, plist)

    edit(action)(folder)


def non_utf8_attribute(file):
    file[FIRST].attrs.create("options/name", np.bytes_(b"\xff\xfe"), dtype=h5py.string_dtype("utf-8", 2))


def reference_attribute(file):
    file[FIRST].attrs.create("options/name", file.ref, dtype=h5py.ref_dtype)


def compound(file):
    del file[f"{FIRST}/infos/success"]
    file.create_dataset(f"{FIRST}/infos/success", data=np.zeros(6, [("a", "f4")]))


def cyclic_infos(file):
    file[f"{FIRST}/infos/again"] = file[f"{FIRST}/infos"]


def doubled_infos(file):
    file.create_dataset(f"{FIRST}/infos/a.b", data=np.zeros(6))
    file.create_dataset(f"{FIRST}/infos/a/b", data=np.zeros(6))


def contradicting_options(file):
    file[FIRST].attrs["options"] = 1
    file[FIRST].attrs["options/a"] = 1


def linked_file(folder):
    shutil.move(folder / MAIN, folder.parent / "elsewhere.hdf5")
    (folder / MAIN).symlink_to(folder.parent / "elsewhere.hdf5")


ACTIONS, REWARDS = f"{FIRST}/actions", f"{FIRST}/rewards"
STATE, IMAGE = f"{FIRST}/observations/state", f"{FIRST}/observations/image"
FORM = "store all in the same form"
ELSEWHERE = "link to somewhere else: refused"
HUGE = "more than a file of .* bytes can hold"

HDF5_DAMAGE = {
    # files
    "truncated": (file_bytes(MAIN, lambda b: b[:20_000]), "not a whole HDF5 file"),
    "empty file": (file_bytes(MAIN, lambda b: b""), "not a whole HDF5 file"),
    "text file": (file_bytes(MAIN, lambda b: b"hello" * 1000), "not a whole HDF5 file"),
    "no main file": (file_bytes(MAIN, None), "is missing"),
    "no metadata": (file_bytes("data/metadata.json", None), "is missing"),
    "metadata not JSON": (file_bytes("data/metadata.json", lambda b: b[:-5]), "not valid JSON"),
    "metadata not UTF-8": (file_bytes("data/metadata.json", lambda b: b'{"a": "\xff"}'), "not UTF-8"),
    # metadata
    "no space": (note(action_space=None), "no 'action_space'"),
    "other space": (
        note(action_space=lambda s: s.replace("[2]", "[3]")),
        r"is float32 \(2,\), its space says .* \(3,\)",
    ),
    "space no JSON": (note(observation_space="{"), "'observation_space' is not the JSON text"),
    "unknown storage": (note(data_format="pickle"), "data_format is 'pickle'"),
    "too few episodes": (note(total_episodes=3), "it is incomplete"),
    "too few steps": (note(total_steps=11), "it is incomplete"),
    # missing parts
    "missing column": (drop(f"{SECOND}/actions"), "has no '/episode_1/actions'"),
    "missing observation": (drop(STATE), "has no '/episode_0/observations/state'"),
    "missing info": (drop(f"{SECOND}/infos/success"), "has no '/episode_1/infos/success'"),
    "missing episode": (drop(FIRST), "it is incomplete"),
    "foreign group": (edit(lambda file: file.create_group("episode_one")), "no 'episode_<number>'"),
    # types and shapes
    "wrong dtype": (put(ACTIONS, np.zeros((5, 2), np.int32)), "'action' is int32"),
    "other dtype later": (put(f"{SECOND}/actions", np.zeros((5, 2))), FORM),
    "texts for numbers": (put(ACTIONS, ["a"] * 5), "numbers were expected"),
    "complex numbers": (put(REWARDS, np.zeros(5, complex)), "numbers were expected"),
    "structures": (edit(compound), "numbers were expected"),
    "wrong shape": (put(f"{SECOND}/actions", np.zeros((5, 3), np.float32)), FORM),
    "rewards of two axes": (put(REWARDS, np.zeros((5, 2))), r"rewards of shape \(5, 2\)"),
    "scalar rewards": (put(REWARDS, 1.0), "rewards of shape"),
    "no rewards": (put(REWARDS, np.zeros(0)), "rewards of shape"),
    "no data space": (put(REWARDS, h5py.Empty("f8")), "is empty"),
    "T observations": (put(STATE, np.zeros((5, 3), np.float32)), "has 5 rows, 6 are needed"),
    "actions too long": (put(ACTIONS, np.zeros((6, 2), np.float32)), "has 6 rows, 5 are needed"),
    "flags as numbers": (put(f"{FIRST}/terminations", np.zeros(5)), FORM),
    "group for an array": (put(ACTIONS, None), "is a group, an array"),
    "array for a group": (put(f"{FIRST}/observations", np.zeros((6, 3))), "is an array, a group"),
    # values
    "NaN": (poke(f"{SECOND}/actions", (2, 1), np.nan), "'action' holds NaN or infinity, first in episode 1, frame 2"),
    "NaN at the end": (poke(STATE, (5, 1), np.inf), r"'observation.state \(last\)' holds NaN or infinity"),
    "damaged JPEG": (poke(IMAGE, (1, slice(None)), 7), "damaged JPEG at row 1"),
    "JPEG cut short": (poke(IMAGE, (2, slice(300, None)), 0), "damaged JPEG at row 2"),
    "picture of another size": (put(IMAGE, jpeg(64)), "has a picture of"),
    "gray picture": (put(IMAGE, jpeg(32, colour=False)), "its space says"),
    "pictures as numbers": (put(IMAGE, np.zeros((6, 8))), "encoded pictures expected"),
    "attribute not UTF-8": (edit(non_utf8_attribute), "not UTF-8"),
    "attribute of odd type": (edit(reference_attribute), "neither number nor text"),
    "options that contradict": (edit(contradicting_options), "contradicts another"),
    "infos of one name": (edit(doubled_infos), "two infos would both be named 'info.a.b'"),
    # pointing elsewhere
    "external link": (external_link, ELSEWHERE),
    "external group": (external_group, ELSEWHERE),
    "soft link": (put(ACTIONS, h5py.SoftLink(f"/{SECOND}/actions")), ELSEWHERE),
    "dangling link": (put(ACTIONS, h5py.SoftLink("/nowhere")), ELSEWHERE),
    "virtual dataset": (virtual_dataset, "data in other files: refused"),
    "external storage": (external_storage, "data in other files: refused"),
    "plug-in": (plug_in, "needs the HDF5 plug-in 32001"),
    "link out of the folder": (linked_file, "lies outside that folder: refused"),
    # absurd sizes
    "absurd length": (declare(REWARDS, (10**12,), "f8", (1024,)), HUGE),
    "absurd row": (declare(STATE, (6, 10**9, 3), "f4", (1, 1024, 3)), HUGE),
    "absurd axes": (declare(REWARDS, (2**40, 2**20), "f8", (1, 1024)), HUGE),
    "infos that hold themselves": (edit(cyclic_infos), "nested deeper"),
}


def assert_damage_is_refused(name, damage, words, tmp_path):
    shutil.copytree(GOLDEN / name, tmp_path / "set")
    damage(tmp_path / "set")
    with assert_refused(words):
        minari.read(tmp_path / "set")


@pytest.mark.parametrize("name", HDF5_DAMAGE)
def test_damaged_hdf5(name, tmp_path):
    assert_damage_is_refused("pick-hdf5-v0", *HDF5_DAMAGE[name], tmp_path)


PART = "data/0/part-0.arrow"


def table(action):
    """Return a damager that rewrites the first episode's table."""

    def damage(folder):
        with pa.ipc.open_file(folder / PART) as reader:
            changed = action(reader.read_all())
        (folder / PART).unlink()
        with pa.OSFile(str(folder / PART), "wb") as sink, pa.ipc.new_file(sink, changed.schema) as writer:
            writer.write_table(changed)

    return damage


def column(name, values, kind=None):
    array = pa.array(values, kind)
    return table(lambda t: t.set_column(t.schema.get_field_index(name), name, array))


def offsets_out_of_bounds(folder):
    """Let the second JPEG of an Arrow file end two gigabytes behind its buffer."""
    data = bytearray((folder / PART).read_bytes())
    offsets = np.arange(0, 7 * 643, 643, dtype="<i4").tobytes()  # where the JPEG rows start
    where = data.find(offsets)
    assert where > 0
    data[where + 4 : where + 8] = b"\xff\xff\xff\x7f"
    (folder / PART).unlink()
    (folder / PART).write_bytes(data)


def link_to_elsewhere(folder):
    shutil.move(folder / "data" / "0", folder.parent / "elsewhere")
    (folder / "data" / "0").symlink_to(folder.parent / "elsewhere")


FLOATS = pa.list_(pa.float32())
FRAME = {"image": b"x", "state": [0.0] * 3}

ARROW_DAMAGE = {
    "truncated": (file_bytes(PART, lambda b: b[:3000]), "is damaged"),
    "empty file": (file_bytes(PART, lambda b: b""), "is damaged"),
    "no file": (file_bytes(PART, None), "is missing"),
    "no metadata": (file_bytes("data/0/metadata.json", None), "is missing"),
    "missing episode": (lambda folder: shutil.rmtree(folder / "data" / "1"), "it is incomplete"),
    "two parts": (lambda folder: shutil.copy(folder / PART, folder / "data/0/part-1.arrow"), "several parts"),
    "missing column": (table(lambda t: t.drop_columns(["actions"])), "'actions' is missing"),
    "missing part": (column("observations", [{"state": [0.0] * 3}] * 6), "'observations.image' is missing"),
    "wrong dtype": (column("rewards", ["a"] * 6), "numbers were expected"),
    "wrong shape": (column("actions", [[1.0] * 3] * 6, pa.list_(pa.float32(), 3)), "its space says"),
    "double precision later": (column("actions", [[1.0] * 2] * 6, pa.list_(pa.float64(), 2)), FORM),
    "empty cells": (column("rewards", [None, *[1.0] * 5]), "empty cells"),
    "ragged lists": (column("actions", [[1.0]] * 5 + [[1.0, 2.0]], FLOATS), "its space says"),
    "texts for pictures": (column("observations", [FRAME | {"image": "x"}] * 6), "encoded pictures were expected"),
    "no JPEG": (column("observations", [FRAME] * 6), "damaged JPEG at row 0"),
    "NaN": (
        column("rewards", [1.0, np.nan, *[1.0] * 4]),
        "'next.reward' holds NaN or infinity, first in episode 0, frame 1",
    ),
    "offsets out of bounds": (offsets_out_of_bounds, "is damaged"),
    "no rows": (table(lambda t: t.slice(0, 0)), "is missing"),
    "one row": (table(lambda t: t.slice(0, 1)), "rewards of shape"),
    "link out of the folder": (link_to_elsewhere, "lies outside that folder: refused"),
}


@pytest.mark.parametrize("name", ARROW_DAMAGE)
def test_damaged_arrow(name, tmp_path):
    assert_damage_is_refused("pick-arrow-v0", *ARROW_DAMAGE[name], tmp_path)


@pytest.mark.parametrize("name", ["pick-hdf5-v0", "pick-arrow-v0"])
def test_the_undamaged_sets_are_read(name, tmp_path):
    # The control: the helpers above leave a set readable when they change nothing.
    shutil.copytree(GOLDEN / name, tmp_path / "set")
    (edit(lambda file: None) if "hdf5" in name else table(lambda t: t))(tmp_path / "set")
    assert minari.read(tmp_path / "set").num_frames == 10
