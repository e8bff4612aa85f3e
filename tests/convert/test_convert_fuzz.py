"""Damaged checkpoints, at random: an error of ours or a value, and nothing else (see tests/data/test_fuzz.py)."""

import contextlib
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from dipole.convert.archive import Archive
from dipole.convert.tree import Renderer
from dipole.convert.unpickle import unpickle
from dipole.errors import DipoleError

FIXTURE = Path(__file__).parent / "fixtures" / "diffusion_policy.ckpt"
place = st.floats(0, 1, exclude_max=True)
edits = st.lists(st.tuples(place, st.binary(min_size=1, max_size=6)), min_size=1, max_size=6)


def damaged(data, edits):
    changed = bytearray(data)
    for where, value in edits:
        at = int(where * len(changed))
        changed[at : at + len(value)] = value[: len(changed) - at]
    return bytes(changed)


@given(edits=edits)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_pickles(edits):
    """The pickle inside, without the checksum of the zip file that would notice most damage first."""
    archive = Archive(FIXTURE)
    with contextlib.suppress(DipoleError):
        renderer = Renderer()
        renderer.render(unpickle(damaged(archive.pickle(), edits), archive))
        for tensor in renderer.tensors:
            assert tensor.materialise(archive).nbytes == tensor.nbytes


@given(edits=edits, end=st.none() | place)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_files(tmp_path_factory, edits, end):
    data = damaged(FIXTURE.read_bytes(), edits)
    path = tmp_path_factory.getbasetemp() / "damaged.ckpt"
    path.write_bytes(data if end is None else data[: int(end * len(data))])
    message = ""
    try:
        archive = Archive(path)
        unpickle(archive.pickle(), archive)
    except DipoleError as error:  # anything else fails
        message = str(error)
    assert "\n" not in message
