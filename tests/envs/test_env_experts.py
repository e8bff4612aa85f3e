"""Scripted experts of the simulators, and the search that leads through mazes."""

import numpy as np
import pytest
from envs_helpers import needs

from dipole.envs import make, make_expert
from dipole.envs.experts.maze import Maze
from dipole.errors import DipoleError

CELLS = [
    [1, 1, 1, 1, 1],
    [1, 0, 0, 0, 1],
    [1, 1, 1, 0, 1],
    [1, 0, 0, 0, 1],
    [1, 1, 1, 1, 1],
]


def solve(name, seeds, noise=0.0, **options):
    """Return which of `seeds` the expert solves."""
    with make(name, **options) as env:
        expert = make_expert(env)
        solved = []
        for seed in seeds:
            rng = np.random.default_rng(seed)
            obs = env.reset([0], [seed])
            expert.reset([0], [seed], obs)
            success = False
            for _ in range(env.spec.max_steps):
                action = expert.act(obs, [0])
                result = env.step(action + noise * rng.standard_normal(action.shape), [0])
                obs, success = result.obs, success or bool(result.success[0])
                if result.done[0]:
                    break
            solved.append(success)
        return solved


@pytest.mark.parametrize("down", [True, False])
def test_maze_cells_and_centres_are_inverse(down):
    maze = Maze(CELLS, 2.0, (-4.0, 3.0), down)
    for cell in maze.free_cells():
        assert maze.cell(maze.centre(cell)) == cell
        assert maze.cell(np.add(maze.centre(cell), (0.9, -0.9))) == cell
    assert (maze.centre((1, 0))[1] < maze.centre((0, 0))[1]) == down
    assert len(maze.free_cells()) == 7


def test_maze_distances_are_shortest():
    """Against relaxing all cells until nothing changes (Bellman-Ford)."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        cells = (rng.uniform(size=(7, 8)) < 0.35).astype(int)
        cells[[0, -1]], cells[:, [0, -1]] = 1, 1
        free = [(int(i), int(j)) for i, j in np.argwhere(cells == 0)]
        goal = free[0]
        length = {cell: 0.0 if cell == goal else np.inf for cell in free}
        for _ in free:
            for i, j in free:
                near = [length[c] for c in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)) if c in length]
                length[i, j] = min([length[i, j], *(value + 1 for value in near)])
        found = Maze(cells.tolist(), 1.0, (0, 0), down=True).distances(goal)
        assert found == {cell: value for cell, value in length.items() if np.isfinite(value)}


def test_following_waypoints_keeps_off_the_walls():
    maze = Maze(CELLS, 1.0, (0.0, 0.0), down=True)
    xy, goal = np.add(maze.centre((1, 1)), (0.2, 0.3)), maze.centre((3, 1))
    for _ in range(400):
        way = maze.waypoint(xy, goal) - xy
        xy = xy + way * min(1.0, 0.05 / max(np.linalg.norm(way), 1e-9))
        assert maze.cell(xy) in maze.free_cells()
        if np.linalg.norm(xy - goal) < 0.05:
            return
    pytest.fail("the goal was not reached in 400 steps of 0.05")


# Measured on 20 seeds: all solved, every one of them.
@pytest.mark.parametrize(
    ("name", "count"), [("pointmaze/UMaze", 5), ("fetch/Reach", 5), ("fetch/PickAndPlace", 4), ("fetch/Push", 4)]
)
@needs("gymnasium_robotics")
def test_gymnasium_robotics_experts(name, count):
    assert all(solve(name, range(count)))


@needs("gymnasium_robotics")
def test_pointmaze_expert_bears_noise():
    assert all(solve("pointmaze/Medium", range(3), noise=0.5))


@needs("ogbench")
def test_ogbench_point_expert_with_the_benchmarks_and_with_random_goals():
    assert all(solve("ogbench/pointmaze-medium-v0", range(3)))
    assert all(solve("ogbench/pointmaze-medium-v0", range(3), random_goals=True))


@pytest.mark.slow  # compiling the model and 200 steps a second
@needs("ogbench")
def test_ogbench_cube_expert():
    assert sum(solve("ogbench/cube-single-v0", range(5))) >= 4
    assert sum(solve("ogbench/cube-single-v0", range(3), random_goals=True)) >= 2


@needs("ogbench")
def test_ogbench_poses_its_five_tasks_in_turn():
    with make("ogbench/pointmaze-medium-v0") as env:
        goals = [env.reset([0], [seed])["observation.goal"][0] for seed in range(6)]
        assert env.step(np.zeros((1, 2)), [0]).info[0]["task_index"] == 0
    # The same task has the same goal cell (cells are 4 wide), other tasks other ones.
    assert np.abs(goals[0] - goals[5]).max() < 2.1
    assert all(np.abs(goals[0] - goal).max() > 3 for goal in goals[1:4])


def test_no_expert_is_said():
    pytest.importorskip("gym_pusht")
    with make("pusht") as env, pytest.raises(DipoleError, match="has no scripted expert"):
        make_expert(env)
