import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from dipole.errors import DipoleError
from dipole.serialization import from_dict, read_json, to_dict, write_json
from refusals import assert_refused


@dataclass(frozen=True)
class Inner:
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer:
    rate: float = 1.0
    name: str | None = None
    inner: Inner = field(default_factory=Inner)
    table: dict[str, Inner] = field(default_factory=dict)
    pair: tuple[int, str] = (1, "x")
    flag: bool = False


def test_round_trip_through_json():
    config = Outer(2, "n", Inner("b", (3,)), {"k": Inner()}, (4, "y"), True)
    again = from_dict(Outer, json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert isinstance(again.rate, float)
    assert isinstance(again.inner.sizes, tuple)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rat": 1}, "did you mean 'rate'"),
        ({"rate": "fast"}, "config.rate: expected float, found 'fast'"),
        ({"rate": True}, "config.rate: expected float"),
        ({"inner": {"kind": "c", "sizes": []}}, "config.inner.kind"),
        ({"inner": 3}, "config.inner: expected a table"),
        ({"inner": {"kind": "a", "sizes": [1.5]}}, r"config.inner.sizes\[0\]: expected int"),
        ({"pair": [1]}, "expected 2 values"),
        ({"flag": 1}, "config.flag: expected bool"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(DipoleError, match=message):
        from_dict(Outer, {**to_dict(Outer()), **change})


def test_missing_key_is_named():
    values = to_dict(Outer())
    del values["flag"]
    with pytest.raises(DipoleError, match="missing key 'flag'"):
        from_dict(Outer, values)


def test_damaged_json_is_one_line(tmp_path):
    path = tmp_path / "config.json"
    for content in (b"{", b"\xff\xfe\x00", b""):
        path.write_bytes(content)
        with assert_refused("config.json: not valid JSON"):
            read_json(path)
    with pytest.raises(DipoleError, match="no such file"):
        read_json(tmp_path / "none.json")


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DipoleError, match="No space left"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
