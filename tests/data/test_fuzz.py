"""Damaged datasets, at random: an error of ours or a dataset, and nothing else.

A small, fixed sample (`derandomize`): the suite must not depend on luck. `benchmarks/fuzz_readers.py` looks further, in
processes that may crash.
"""

import contextlib
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dipole.data import Episodes
from dipole.data.formats import minari, robomimic
from dipole.errors import DipoleError

GOLDEN = Path(__file__).parents[1] / "fixtures" / "minari" / "toy"
EXAMPLES = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

place = st.floats(0, 1, exclude_max=True)
edits = st.lists(st.tuples(place, st.binary(min_size=1, max_size=8)), min_size=1, max_size=6)
end = st.none() | place


def damaged(data, edits, end):
    changed = bytearray(data)
    for where, value in edits:
        at = int(where * len(changed))
        changed[at : at + len(value)] = value[: len(changed) - at]
    return bytes(changed if end is None else changed[: int(end * len(changed))])


def check(read, path, victim, edits, end):
    whole = victim.read_bytes()
    try:
        victim.write_bytes(damaged(whole, edits, end))
        with contextlib.suppress(DipoleError):
            assert isinstance(read(path), Episodes)
    finally:
        victim.write_bytes(whole)


@pytest.fixture(params=["pick-hdf5-v0", "pick-arrow-v0"])
def minari_set(request, tmp_path):
    return Path(shutil.copytree(GOLDEN / request.param, tmp_path / "set"))


@EXAMPLES
@given(edits=edits, end=end, which=st.integers(0, 10))
def test_minari(minari_set, edits, end, which):
    files = sorted(path for path in minari_set.rglob("*") if path.is_file())
    check(minari.read, minari_set, files[which % len(files)], edits, end)
    assert minari.read(minari_set).num_frames == 10  # repaired: the next example starts from a whole set


@pytest.fixture
def robomimic_file(tmp_path):
    path = tmp_path / "demo.hdf5"
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 10}})
        for number in range(2):
            demo = file.create_group(f"data/demo_{number}")
            demo.create_dataset("actions", data=np.zeros((5, 2)), compression="gzip")
            demo["obs/image"] = np.zeros((5, 4, 4, 3), np.uint8)
        file["mask/train"] = np.array([b"demo_1"])
    return path


@EXAMPLES
@given(edits=edits, end=end)
def test_robomimic(robomimic_file, edits, end):
    check(lambda path: robomimic.read(path, filter_key="train"), robomimic_file, robomimic_file, edits, end)
    assert robomimic.read(robomimic_file).num_episodes == 2
