import json
import subprocess
import sys

import pytest

import dipole
from dipole.errors import DipoleError, MissingExtraError, unknown

EXTRAS = [
    "mujoco", "metaworld", "gym_pusht", "gymnasium_robotics", "ogbench", "minari", "h5py", "zarr", "av", "websockets",
    "msgpack", "matplotlib", "jinja2", "imageio", "tensorboard", "wandb", "ray", "huggingface_hub", "diffusers",
    "transformers", "peft", "PIL", "scipy",
]  # fmt: skip


def test_import_loads_no_extra():
    code = "import dipole, json, sys; print(json.dumps(sorted(sys.modules)))"
    modules = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))
    assert not modules & set(EXTRAS)


def test_the_library_works_without_any_extra_installed():
    # Probing whether a package is there (accelerate does) is fine; loading it is not.
    code = f"""
import importlib.machinery, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {set(EXTRAS) - {"huggingface_hub", "PIL", "scipy"}!r}:
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ModuleNotFoundError(spec.name)
    def exec_module(self, module):
        raise ModuleNotFoundError(module)
sys.meta_path.insert(0, Refuse())
import torch, dipole
import dipole.diffusion, dipole.networks, dipole.data, dipole.envs, dipole.policies, dipole.training, dipole.evaluation
process = dipole.VP.cosine(10)
x = dipole.sample(lambda x, t, cond: 0 * x, process, process.levels(5), shape=(1, 2, 3))
assert x.shape == (1, 2, 3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_load():
    for name in dipole.__all__:
        assert getattr(dipole, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dipole.no_such_name


def test_unknown_suggests_the_nearest_name():
    error = unknown("environment", "pusth", ["pusht", "metaworld/reach-v3"])
    assert isinstance(error, DipoleError)
    assert str(error) == "unknown environment 'pusth': did you mean 'pusht'?"
    assert "known: a, b" in str(unknown("thing", "zzzz", ["b", "a"]))


def test_missing_extra_names_the_install_command():
    assert "pip install 'dipole[envs]'" in str(MissingExtraError("mujoco", "envs"))
