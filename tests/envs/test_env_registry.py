"""Names, options and what is said when something is missing."""

import subprocess
import sys

import numpy as np
import pytest
from envs_helpers import needs

from dipole.envs import COLLECT_SEED, EVAL_SEED, SELECT_SEED, has_expert, make, make_expert, names
from dipole.envs.registry import tasks
from dipole.errors import DipoleError, MissingExtraError


def test_names_of_the_design_are_known():
    wanted = {"metaworld/peg-insert-side-v3", "pusht", "pusht-image", "pointmaze/UMaze", "fetch/Reach", "gym/Hopper-v5"}
    assert wanted | {"ogbench/cube-single-v0", "micro/fork2d", "antmaze/UMaze"} <= set(names())
    assert len(names()) == len(set(names()))
    assert sum(name.startswith("metaworld/") for name in names()) == 50
    assert all(sentence.endswith(".") for sentence in tasks().values())


def test_listing_names_imports_no_simulator():
    code = (
        "import sys; from dipole.envs import names; names(); "
        "print([m for m in ('mujoco', 'metaworld', 'gym_pusht', 'gymnasium_robotics', 'ogbench') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_unknown_names_and_options_are_answered():
    with pytest.raises(DipoleError, match="did you mean 'micro/fork2d'"):
        make("micro/fork2")
    with pytest.raises(DipoleError, match="unknown option of environment 'micro/fork2d' 'images'"):
        make("micro/fork2d", images=True)
    with pytest.raises(DipoleError, match="unknown option of environment 'pusht' 'image'"):
        make("pusht", image=True)
    with pytest.raises(DipoleError, match="at least 1"):
        make("micro/fork2d", 0)
    with pytest.raises(DipoleError, match="'sync' or 'async'"):
        make("pusht", mode="native")
    with pytest.raises(DipoleError, match="mode 'native'"):
        make("micro/fork2d", mode="async")


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("metaworld/reach-v3", "metaworld.env_dict", "metaworld"),
        ("pusht", "gym_pusht.envs.pusht", "gym-pusht"),
        ("fetch/Reach", "gymnasium_robotics", "gymnasium-robotics"),
        ("pointmaze/UMaze", "gymnasium_robotics", "gymnasium-robotics"),
        ("ogbench/cube-single-v0", "ogbench", "ogbench"),
        ("gym/Hopper-v5", "mujoco", "mujoco"),
    ],
)
def test_a_missing_simulator_names_its_extra(monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail as if it were not installed
    with pytest.raises(MissingExtraError, match=rf"'{package}' is not installed: run  pip install 'dipole\[envs\]'"):
        make(name)


def test_max_steps_can_be_set():
    env = make("micro/fork2d", max_steps=2)
    env.reset([0], [0])
    stay = np.array([[0.0, -1.0]])
    assert not env.step(stay, [0]).truncated[0]
    assert env.step(stay, [0]).truncated[0]


@needs("gym_pusht")
def test_max_steps_of_a_simulator():
    with make("pusht", max_steps=1) as env:
        env.reset([0], [0])
        assert env.spec.max_steps == 1
        assert env.step(np.zeros((1, 2)), [0]).truncated[0]


def test_experts_are_announced():
    assert has_expert("micro/fork2d")
    assert has_expert("metaworld/peg-insert-side-v3")
    assert not has_expert("pusht")
    with make("micro/fork2d") as env:
        assert make_expert(env) is not None


def test_seed_ranges_are_disjoint():
    # Room for 50,000 episodes in each of the first two before the next range begins.
    assert COLLECT_SEED == 0
    assert SELECT_SEED - COLLECT_SEED >= 50_000
    assert EVAL_SEED - SELECT_SEED >= 50_000
