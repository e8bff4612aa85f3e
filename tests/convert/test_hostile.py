"""Hostile and damaged checkpoint files: each is refused with one line, and nothing happens."""

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from dipole.convert import convert_checkpoint
from dipole.convert.archive import Archive, is_torch_zip
from dipole.convert.foreign import read_foreign
from dipole.errors import DipoleError
from refusals import assert_refused


class Call:
    """Pickles as "call this with these arguments": the classic attack."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class WithState:
    """Pickles as an allowed class whose state is the attack, for an unpickler that calls `__setstate__`."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return dict, (), self.state


def payloads(marker: Path) -> dict[str, object]:
    touch = f"touch {marker}"
    write = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": (Call(os.system, touch), "posix.system"),
        "builtins.eval": (Call(eval, write), "__builtin__.eval"),
        "builtins.exec": (Call(exec, write), "__builtin__.exec"),
        "builtins.open": (Call(open, str(marker), "w"), "io.open"),
        "subprocess": (Call(subprocess.check_call, touch, None, None), "check_call"),
        "getattr": (Call(getattr, os, "system"), "builtins.getattr|cannot pickle"),
        "torch.hub": (Call(torch.hub.load, str(marker.parent), "entry"), "torch.hub.load"),
        "torch.load": (Call(torch.load, str(marker)), "torch.serialization.load"),
        "storage from bytes": (Call(torch.storage._load_from_bytes, b"x"), "torch.storage._load_from_bytes"),
        "pickle in a pickle": (Call(pickle.loads, pickle.dumps(Call(os.system, touch))), "pickle.loads"),
        "nested reduce": ({"a": [(Call(dict, [(1, Call(os.system, touch))]),)]}, "posix.system"),
        "inside a state": (WithState({"x": Call(os.system, touch)}), "posix.system"),
        "as a dictionary key": ({Call(os.system, touch): 1}, "posix.system"),
        "import of a module": (Call(__import__, "antigravity"), "__builtin__.__import__"),
        "partial": (Call(__import__("functools").partial, os.system, touch), "functools.partial"),
    }


PAYLOADS = [name for name in payloads(Path("x")) if name != "getattr"]  # modules cannot be pickled: see CRAFTED


def crafted(marker: Path) -> dict[str, bytes]:
    """Return pickles that no pickler writes; each would create `marker` (or more) in Python's own unpickler."""
    touch = f"touch {marker}".encode()
    unicode = b"X" + struct.pack("<I", len(touch)) + touch
    return {
        "old instance": b"(" + unicode + b"ios\nsystem\n.",
        "old object": b"(cos\nsystem\n" + unicode + b"o.",
        "getattr on a module": b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n(X\x02\x00\x00\x00ostR"
        + b"X\x06\x00\x00\x00systemtR("
        + unicode
        + b"tR.",
        "dotted global": b"\x80\x04\x8c\x05torch\x8c\x0d_utils.os.sys\x93.",
        "setstate of a class": b"\x80\x02ccollections\nOrderedDict\n}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb.",
        "state with slots": b"\x80\x02c__builtin__\ndict\n)R}X\x01\x00\x00\x00acos\nsystem\ns}\x86b.",
        "defaultdict factory": b"\x80\x02ccollections\ndefaultdict\ncos\nsystem\n\x85R.",
        "newobj": b"\x80\x02cos\nsystem\n" + unicode + b"\x85\x81.",
        "newobj_ex": b"\x80\x04cos\nsystem\n" + unicode + b"\x85}\x92.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + unicode + b"\x85R.",
        "extension": b"\x80\x02\x82\x01.",
        "set of calls": b"\x80\x04\x8f(cos\nsystem\n" + unicode + b"\x85R\x90.",
        "tensor through a type": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n("
        + unicode
        + b"tNtR.",
    }


def torch_zip(path: Path, data: bytes, storages: dict[str, bytes] | None = None, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", data)
        for key, content in (storages or {}).items():
            file.writestr(f"archive/data/{key}", content)
        file.writestr("archive/version", "3\n")
    return path


def assert_conversion_is_refused(path: Path, out: Path, words: str) -> str:
    with assert_refused(words) as caught:
        convert_checkpoint(path, out)
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_are_refused_by_name_and_do_nothing(name, tmp_path):
    marker = tmp_path / "marker"
    value, words = payloads(marker)[name]
    torch.save({"state_dicts": {"model": {"w": torch.ones(2)}}, "cfg": value}, tmp_path / "bad.ckpt")
    assert_conversion_is_refused(tmp_path / "bad.ckpt", tmp_path / "out", words)
    assert not marker.exists()


@pytest.mark.parametrize("name", crafted(Path("x")))
def test_crafted_pickles_are_refused_and_do_nothing(name, tmp_path):
    marker = tmp_path / "marker"
    assert_conversion_is_refused(torch_zip(tmp_path / "bad.ckpt", crafted(marker)[name]), tmp_path / "out", "refused")
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "nested reduce", "pickle in a pickle", "inside a state"]
)
def test_the_payloads_are_live(name, tmp_path):
    """The control: in Python's own unpickler (in a process of its own) these payloads do create the file."""
    marker = tmp_path / "marker"
    (tmp_path / "payload").write_bytes(pickle.dumps(payloads(marker)[name][0]))
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "payload")], check=False, stderr=subprocess.DEVNULL)
    assert marker.exists()


def test_a_payload_in_a_nested_pickle_of_diffusion_policy_is_refused(tmp_path):
    marker = tmp_path / "marker"
    inner = pickle.dumps(Call(os.system, f"touch {marker}"))
    torch.save({"cfg": {}, "state_dicts": {}, "pickles": {"epoch": inner}}, tmp_path / "bad.ckpt")
    assert_conversion_is_refused(tmp_path / "bad.ckpt", tmp_path / "out", "posix.system")
    assert not marker.exists()


def good(path: Path) -> Path:
    torch.save({"cfg": {}, "state_dicts": {"model": {"w": torch.arange(1000.0)}}}, path)
    return path


def test_the_undamaged_file_converts(tmp_path):
    convert_checkpoint(good(tmp_path / "good.ckpt"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def truncated(tmp_path):
    path = good(tmp_path / "bad.ckpt")
    path.write_bytes(path.read_bytes()[:-300])
    return path


def flipped_storage_byte(tmp_path):
    path = good(tmp_path / "bad.ckpt")
    data = bytearray(path.read_bytes())
    where = data.find(struct.pack("<3f", 10.0, 11.0, 12.0))
    data[where] ^= 1
    path.write_bytes(data)
    return path


def zip_bomb(tmp_path):
    return torch_zip(tmp_path / "bad.ckpt", b"N." * 2**22, compression=zipfile.ZIP_DEFLATED)


def bomb_in_a_storage(tmp_path):
    data = b"\x80\x02}."
    return torch_zip(tmp_path / "bad.ckpt", data, {"0": bytes(2**26)}, compression=zipfile.ZIP_DEFLATED)


def overlapping_members(tmp_path):
    """Let 300 names in the directory point at the bytes of one member."""
    path = torch_zip(tmp_path / "bad.ckpt", b"N.", {f"{i:03d}": b"" for i in range(300)} | {"zzz": bytes(10_000)})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        big = file.getinfo("archive/data/zzz")
        start = file.start_dir
    while data[start : start + 4] == b"PK\x01\x02":
        lengths = struct.unpack_from("<3H", data, start + 28)
        if data[start + 46 : start + 46 + lengths[0]].startswith(b"archive/data/"):
            struct.pack_into("<3I", data, start + 16, big.CRC, big.file_size, big.file_size)
            struct.pack_into("<I", data, start + 42, big.header_offset)
        start += 46 + sum(lengths)
    path.write_bytes(data)
    return path


def storage_larger_than_its_bytes(tmp_path):
    path = tmp_path / "bad.ckpt"
    torch.save({"cfg": {}, "state_dicts": {"model": {"w": torch.zeros(100)}}}, path)
    with zipfile.ZipFile(path) as file:
        data = file.read("bad/data.pkl")
    assert data.count(b"K\x64") == 2  # the storage's and the tensor's number of elements
    return torch_zip(
        tmp_path / "bad2.ckpt", data.replace(b"K\x64", b"\x8a\x06" + (2**40).to_bytes(6, "little")), {"0": bytes(400)}
    )


def tensor_beyond_its_storage(tmp_path):
    path = tmp_path / "bad.ckpt"
    torch.save({"cfg": {}, "state_dicts": {"model": {"w": torch.zeros(100)}}}, path)
    with zipfile.ZipFile(path) as file:
        data = file.read("bad/data.pkl")
    head, _, tail = data.rpartition(b"K\x64")
    return torch_zip(tmp_path / "bad2.ckpt", head + b"J" + struct.pack("<i", 2**30) + tail, {"0": bytes(400)})


def expanded_tensor(tmp_path):
    path = tmp_path / "bad.ckpt"
    torch.save({"cfg": {}, "state_dicts": {"model": {"w": torch.zeros(1).expand(2**38)}}}, path)
    return path


def missing_storage(tmp_path):
    source = good(tmp_path / "good.ckpt")
    with zipfile.ZipFile(source) as file:
        return torch_zip(tmp_path / "bad.ckpt", file.read("good/data.pkl"))


def torch_script(tmp_path):
    path = torch_zip(tmp_path / "bad.ckpt", b"N.")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/constants.pkl", b"N.")
    return path


def two_members_of_one_name(tmp_path):
    path = torch_zip(tmp_path / "bad.ckpt", b"N.")
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data.pkl", b"K\x01.")
    return path


def big_endian(tmp_path):
    path = torch_zip(tmp_path / "bad.ckpt", b"N.")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/byteorder", b"big")
    return path


def legacy(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "bad.ckpt", _use_new_zipfile_serialization=False)
    return tmp_path / "bad.ckpt"


def bare_pickle(tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(pickle.dumps({"w": 1}))
    return tmp_path / "bad.ckpt"


def other_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.ckpt", "w") as file:
        file.writestr("a/b.txt", "x")
    return tmp_path / "bad.ckpt"


def path_traversal(tmp_path):
    source = good(tmp_path / "good.ckpt")
    with zipfile.ZipFile(source) as file:
        data = file.read("good/data.pkl")
    changed = data.replace(b"X\x01\x00\x00\x000", b"X\x0b\x00\x00\x00/etc/passwd")
    assert changed != data
    return torch_zip(tmp_path / "bad.ckpt", changed)


def empty(tmp_path):
    (tmp_path / "bad.ckpt").touch()
    return tmp_path / "bad.ckpt"


def folder(tmp_path):
    (tmp_path / "bad.ckpt").mkdir()
    return tmp_path / "bad.ckpt"


DAMAGED = {
    truncated: "damaged or truncated",
    flipped_storage_byte: "is damaged in",
    zip_bomb: "zip bomb",
    bomb_in_a_storage: "zip bomb",
    overlapping_members: "zip bomb|damaged",
    storage_larger_than_its_bytes: "claims 1099511627776 elements of F32, but the file holds 400 bytes",
    tensor_beyond_its_storage: "reaches beyond its storage",
    expanded_tensor: "far more than the file holds",
    missing_storage: "has no storage '0'",
    torch_script: "TorchScript",
    two_members_of_one_name: "two members of the same name",
    big_endian: "big-endian",
    legacy: "not a zip file",
    bare_pickle: "not a zip file",
    other_zip: "0 pickles",
    path_traversal: "has no storage '/etc/passwd'",
    empty: "not a zip file",
    folder: "is not a file",
}


@pytest.mark.parametrize("make", DAMAGED, ids=lambda make: make.__name__)
def test_damaged_files_give_one_clear_line(make, tmp_path):
    assert_conversion_is_refused(make(tmp_path), tmp_path / "out", DAMAGED[make])


def test_too_many_instructions_are_refused(tmp_path, monkeypatch):
    from dipole.convert import unpickle

    monkeypatch.setattr(unpickle, "MAX_OPCODES", 1000)
    with pytest.raises(DipoleError, match="more than 1000 instructions"):
        unpickle.unpickle(b"N0" * 600 + b"N.")


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited by Linux only")
def test_a_pickle_that_eats_memory_is_stopped(tmp_path):
    # A tuple of 8 MB copied 1000 times and kept: 8 GB.
    numbers = b"(" + b"K\x01" * 1_000_000 + b"t" + b"q\x00"
    copies = b"ctorch\nSize\nh\x00\x85R" * 1000
    path = torch_zip(tmp_path / "bad.ckpt", b"\x80\x02" + numbers + copies + b".")
    with pytest.raises(DipoleError, match=r"more than 0\.5 GiB of memory"), read_foreign(path, memory_gib=0.5):
        pass


def test_a_pickle_that_takes_too_long_is_stopped(tmp_path):
    path = torch_zip(tmp_path / "bad.ckpt", b"\x80\x02" + b"N0" * 8_000_000 + b"N.")
    with pytest.raises(DipoleError, match="or 1 s|took longer than 4 s"), read_foreign(path, cpu_seconds=1):
        pass


def test_is_torch_zip(tmp_path):
    assert is_torch_zip(good(tmp_path / "good.ckpt"))
    assert not is_torch_zip(other_zip(tmp_path))
    assert not is_torch_zip(tmp_path / "absent")
    assert not is_torch_zip(bare_pickle(tmp_path))


def test_archive_reads_what_torch_wrote(tmp_path):
    archive = Archive(good(tmp_path / "good.ckpt"))
    assert archive.storage("0").tobytes() == torch.arange(1000.0).numpy().tobytes()
    assert archive.storage_bytes("0") == 4000
