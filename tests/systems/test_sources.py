"""Which sources a finished part of an experiment depends on."""

import importlib
import sys

import pytest

from dipole import systems
from dipole.systems import sources
from dipole.systems.run import Run

FILES = {
    "__init__.py": '_EXPORTS = {"a": "dipole.a"}',
    "systems/__init__.py": '_MODULES = ("one", "two")',
    "systems/one.py": "from dipole.rl.method import train\n"
    "from dipole.maths import (\n    one as other,\n    function,\n)",
    "systems/two.py": "import dipole.maths",
    "rl/__init__.py": "from dipole.rl.settings import Settings",
    "rl/settings.py": "",
    "rl/method.py": '"""See "dipole.serving".\n\n    from dipole.serving import Client\n"""\n'
    "def train():\n    from dipole import maths\n    from dipole.rl import method  # itself",
    "maths/__init__.py": 'KINDS = {"one": "dipole.maths.one"}',
    "maths/one.py": 'import_module(f"dipole.maths.kinds.{name}")',
    "maths/kinds/a.py": "",
    "maths/unused.py": "",
    "serving/__init__.py": "",
}
ONE = ("rl", "rl.method", "rl.settings", "maths", "maths.one", "maths.kinds.a", "systems.one")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in the place of dipole."""
    monkeypatch.setattr(sources, "PACKAGE", tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def fresh(module):
    return sources.digest.__wrapped__(module)  # as another process sees it


def test_imports_are_followed(package):
    assert sources.followed(["dipole.systems.one"]) == {f"dipole.{name}" for name in ONE}


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".py")])
def test_an_edit_counts_where_the_module_is_imported(package, name):
    before = fresh("dipole.systems.one")
    (package / name).write_text(FILES[name] + "\nEDITED = True")
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert (fresh("dipole.systems.one") != before) == (module in ONE)


def test_in_one_process_the_digest_stays(package):
    before = sources.digest("dipole.systems.two")
    (package / "maths/__init__.py").write_text("EDITED = True")
    assert sources.digest("dipole.systems.two") == before != fresh("dipole.systems.two")
    sources.digest.cache_clear()


def test_a_module_of_somebody_else(package, tmp_path_factory, monkeypatch):
    mine = tmp_path_factory.mktemp("mine") / "experiment_of_mine.py"
    mine.write_text("if False:\n    from dipole.maths import one\n")
    monkeypatch.syspath_prepend(mine.parent)
    importlib.import_module("experiment_of_mine")
    before = fresh("experiment_of_mine")
    (package / "maths/one.py").write_text("EDITED = True")
    imported = fresh("experiment_of_mine")
    mine.write_text(mine.read_text() + "EDITED = True")
    assert len({before, imported, fresh("experiment_of_mine")}) == 3
    sys.modules.pop("experiment_of_mine")


def test_the_systems_of_dipole():
    for name in systems.names():
        found = sources.followed([f"dipole.systems.{name.replace('-', '_')}"])
        # An hour of finished parts does not depend on how policies are served or commands are read.
        assert not {module.split(".")[1] for module in found} & {"cli", "convert", "safety", "serving"}
    found = sources.followed(["dipole.systems.dppo"])
    direct, registry = {"dipole.rl.dppo", "dipole.diffusion.kernels"}, {"dipole.envs.micro.two_goal"}
    assert found >= direct | registry
    assert not found & {"dipole.systems.beso", "dipole.systems.run", "dipole.systems"}


def test_parts_are_computed_again_when_the_sources_are_others(tmp_path, monkeypatch):
    state = {"digest": "old", "computed": 0}
    monkeypatch.setattr("dipole.systems.run.digest", lambda module: state["digest"])

    def compute():
        state["computed"] += 1
        return state["computed"]

    assert [Run(tmp_path).part("one", {}, compute) for _ in range(2)] == [1, 1]
    state["digest"] = "new"
    assert [Run(tmp_path).part("one", {}, compute) for _ in range(2)] == [2, 2]
