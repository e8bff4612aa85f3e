"""The micro environments: their rules, their demonstrators, and SlotPeg's exact ceilings."""

import gymnasium
import numpy as np
import pytest

from dipole.envs import make, make_expert, names
from dipole.envs.experts.paths import min_jerk, min_jerk_via, ornstein_uhlenbeck
from dipole.envs.micro import lanes, multi8, slot_peg, wipe
from dipole.envs.micro.demonstrator import NativeExpert
from dipole.envs.micro.fork2d import segment_distance
from dipole.envs.registry import collecting

MICRO = [name for name in names() if name.startswith("micro/")]


def demonstrate(name, count, expert=None, first_seed=0, **options):
    """Return, per episode, success, length and return, and the infos of all steps."""
    env = make(name, count, **{**collecting(name).options, **options})
    expert = make_expert(env) if expert is None else NativeExpert(expert, env)
    rows = np.arange(count)
    seeds = rows + first_seed
    obs = env.reset(rows, seeds)
    expert.reset(rows, seeds, obs)
    success, length, total = np.zeros(count, dtype=bool), np.zeros(count, dtype=int), np.zeros(count)
    infos = [[] for _ in range(count)]
    while len(rows):
        actions = expert.act(obs, rows)
        assert (actions >= env.spec.action_low).all()
        assert (actions <= env.spec.action_high).all()
        result = env.step(actions, rows)
        for k, row in enumerate(rows):
            infos[row].append(result.info[k])
        success[rows] |= result.success
        length[rows] += 1
        total[rows] += result.reward
        obs = {key: value[~result.done] for key, value in result.obs.items()}
        rows = rows[~result.done]
    return success, length, total, infos


@pytest.mark.parametrize("name", MICRO)
def test_spec_observation_and_picture(name):
    env = make(name, 2)
    obs = env.reset([0, 1], [3, 4])
    assert set(obs) == set(env.spec.observation)
    for key, feature in env.spec.observation.items():
        assert feature.accepts(obs[key]), key
    result = env.step(np.zeros((1, len(env.spec.action_low))), [1])
    assert all(value.shape[0] == 1 for value in result.obs.values())
    assert result.reward.dtype == np.float32
    picture = env.render(1)
    assert picture.dtype == np.uint8
    assert picture.shape == (192, 192, 3)
    assert picture.std() > 0


# All of 200 succeed in our runs; the margin leaves room for one unlucky scene.
@pytest.mark.parametrize("name", [f"micro/{key}" for key in ("fork2d", "grip2d", "lanes", "multi8", "play4", "wipe")])
def test_demonstrators_succeed(name):
    success, *_ = demonstrate(name, 200)
    assert success.mean() >= 0.995


def test_fork2d_both_sides_are_shown_equally():
    _, length, _, infos = demonstrate("micro/fork2d", 400)
    sides = np.array([np.sign(sum(step["side"] for step in episode)) for episode in infos])
    assert set(sides) == {-1.0, 1.0}
    assert abs((sides > 0).mean() - 0.5) < 0.1  # four standard deviations of 400 coins
    assert 20 <= length.mean() <= 32


def test_fork2d_disc_goal_and_reach():
    env = make("micro/fork2d", 2)
    env.reset([0, 1], [0, 1])
    # Straight ahead leads into the disc, and ends the episode without success.
    for _ in range(20):
        result = env.step(np.array([[0.0, 1.0]]), [0])
        if result.done[0]:
            break
    assert result.terminated[0]
    assert not result.success[0]
    assert result.info[0]["crash"]
    # However far the target, a step reaches 0.12 along each axis.
    before = env.state([1])["p"][0]
    env.step(np.array([[1.5, -1.5]]), [1])
    np.testing.assert_allclose(env.state([1])["p"][0] - before, [0.12, -0.12])


def test_the_way_between_two_points_counts():
    start, end = np.array([[-1.0, 0.1], [-1.0, 0.1], [0.5, 0.5]]), np.array([[1.0, 0.1], [-0.5, 0.1], [0.5, 0.5]])
    np.testing.assert_allclose(segment_distance(start, end, np.zeros(2)), [0.1, np.hypot(0.5, 0.1), np.hypot(0.5, 0.5)])


def test_track2d_scores_the_ten_steps_after_the_jump():
    _, _, total, infos = demonstrate("micro/track2d", 50)
    for value, episode in zip(total, infos, strict=True):
        scored = [step["distance"] for step in episode if step["scored"]]
        assert len(scored) == 10
        assert value == pytest.approx(-np.mean(scored), rel=1e-5)
    # Standing still after the jump would leave the whole way to go.
    assert total.mean() > -0.8


def test_track2d_goal_jumps_once_and_is_observed():
    env = make("micro/track2d")
    obs = env.reset([0], [4])
    goals = [obs["observation.environment_state"][0]]
    for _ in range(44):
        goals.append(env.step(np.zeros((1, 2)), [0]).obs["observation.environment_state"][0])
    changes = np.flatnonzero(np.abs(np.diff(np.stack(goals), axis=0)).sum(1))
    assert len(changes) == 1
    assert 8 <= changes[0] + 1 < 25
    assert abs(goals[-1][0]) <= 0.5


def test_grip2d_must_close_at_the_object():
    env = make("micro/grip2d")
    obs = env.reset([0], [0])
    item = obs["observation.environment_state"][0]
    # Closed from the start, it takes nothing when it comes by.
    for _ in range(15):
        result = env.step(np.array([[*item, 1.0]]), [0])
    np.testing.assert_array_equal(result.obs["observation.environment_state"][0], item)
    assert not result.info[0]["holding"]
    # Opened and closed again there, it holds, and the object moves along.
    env.step(np.array([[*item, -1.0]]), [0])
    assert env.step(np.array([[*item, 1.0]]), [0]).info[0]["holding"]
    result = env.step(np.array([[0.0, 0.0, 1.0]]), [0])
    np.testing.assert_array_equal(
        result.obs["observation.environment_state"][0], result.obs["observation.state"][0, :2]
    )
    # Dropped elsewhere than in the bin: no success.
    result = env.step(np.array([[0.0, 0.0, -1.0]]), [0])
    assert not result.success[0]
    assert not result.info[0]["holding"]


def test_wipe_sees_slowly_and_late_but_feels_at_once():
    env = make("micro/wipe")
    obs = env.reset([0], [2])
    assert obs["observation.force"][0, 0] == pytest.approx(1.0, abs=1e-5)
    seen = [obs["observation.state"][0]]
    for _ in range(100):
        seen.append(env.step(np.array([[1 / 128, 0.0]]), [0]).obs["observation.state"][0])
    changes = np.flatnonzero(np.abs(np.diff(np.stack(seen), axis=0)).sum(1)) + 1
    assert changes.tolist() == [20, 36, 52, 68, 84, 100]
    # What arrives at tick 20 is the place of tick 16.
    assert seen[20][0] == pytest.approx(16 / 128)
    # The force follows the law at every tick.
    state = {key: value[0] for key, value in env.state([0]).items()}
    delta = state["jump"] if state["clock"] >= state["tick"] else 0.0
    force = 50 * max(0.0, float(wipe.surface(state["x"], state["waves"])) + delta - float(state["z"]))
    assert float(wipe.force_now(state)) == pytest.approx(force)


def test_wipe_needs_the_force():
    """Sweeping blind fails after the jump, the force controller does not."""
    _, _, share, infos = demonstrate("micro/wipe", 100)
    assert share.mean() > 0.9
    after = [step["in_band"] for episode in infos for step in episode if step["after_jump"]]
    assert np.mean(after) > 0.85
    env = make("micro/wipe", 50)
    rows = list(range(50))
    env.reset(rows, rows)
    blind = [
        info["in_band"]
        for _ in range(128)
        for info in env.step(np.tile([[1 / 128, 0.0]], (50, 1)), rows).info
        if info["after_jump"]
    ]
    assert np.mean(blind) < 0.2


def test_play4_ends_after_as_many_visits_as_pads_were_asked_for():
    env = make("micro/play4", 200)
    rows = np.arange(200)
    obs = env.reset(rows, rows)
    goal = obs["observation.goal"]
    assert (goal[:, 2:].sum(1) == 2).all()
    # A policy that goes to the asked pads, the last one last, gets them all.
    from dipole.envs.micro.play4 import PADS

    final = np.abs(goal[:, None, :2] - PADS).sum(-1).argmin(1)
    asked = goal[:, 2:].astype(bool)
    others = asked.copy()
    others[rows, final] = False
    first = others.argmax(1)
    while len(rows):
        there = obs["observation.state"][:, 2:][np.arange(len(rows)), first[rows]] > 0.5
        target = np.where(there[:, None], PADS[final[rows]], PADS[first[rows]])
        result = env.step(target, rows)
        assert (result.terminated == np.array([info["reward"] == 2 for info in result.info])).all()
        obs = {key: value[~result.done] for key, value in result.obs.items()}
        if result.done.any():
            assert all(info["result"] == 2 for info, done in zip(result.info, result.done, strict=True) if done)
        rows = rows[~result.done]


def test_play4_demonstrations_light_all_pads_in_every_order():
    success, length, _, infos = demonstrate("micro/play4", 100)
    assert success.all()
    assert all(episode[-1]["reward"] == 4 for episode in infos)
    assert length.max() < 100


def test_multi8_shows_everything_needed():
    """The view and the code determine the task: the place to touch can be computed from the observation."""
    env = make("micro/multi8", 64)
    rows = list(range(64))
    obs = env.reset(rows, rows)
    state = env.state(rows)
    seen = np.arctanh(np.clip(obs["observation.static"].astype(np.float64), -1 + 1e-7, 1 - 1e-7))
    scene = seen @ np.linalg.pinv(multi8._STATIC)
    task = ((obs["observation.language"][:, None] - multi8.LANGUAGE) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(task, state["task"])
    place = multi8.place_to_touch(scene[:, :8].reshape(-1, 4, 2), task)
    # float32 of a tanh near one costs some digits.
    np.testing.assert_allclose(place, multi8.place_to_touch(state["discs"], state["task"]), atol=1e-3)
    assert len(env.spec.tasks) == 8
    assert len(np.unique(task)) == 8


def test_pendulum_is_gymnasiums():
    env, theirs = make("micro/pendulum"), gymnasium.make("Pendulum-v1").unwrapped
    obs = env.reset([0], [5])["observation.state"][0]
    theirs.reset(seed=0)
    state = env.state([0])
    theirs.state = np.array([state["angle"][0], state["speed"][0]])
    rng = np.random.default_rng(0)
    for _ in range(50):
        torque = rng.uniform(-2.5, 2.5, 1)
        wanted, reward, *_ = theirs.step(torque)
        result = env.step(torque[None], [0])
        obs = result.obs["observation.state"][0]
        # ours is stored in single precision
        assert np.allclose(obs, wanted, atol=1e-5)
        assert result.reward[0] == pytest.approx(reward, rel=1e-5)


def test_pendulum_demonstrator_is_weak():
    _, length, total, _ = demonstrate("micro/pendulum", 64)
    assert (length == 200).all()
    # the pole hangs in most episodes: far from the -150 of one that is held up
    assert total.mean() < -600


def test_two_goal_demonstrations_split_four_to_one():
    success, length, _, infos = demonstrate("micro/two_goal", 2000)
    sides = np.array([episode[-1]["side"] for episode in infos])
    assert (np.abs(sides) == 1).all()
    assert length.max() <= 32
    assert abs(success.mean() - 0.2) < 0.036  # four standard deviations of 2000 draws
    np.testing.assert_array_equal(success, sides > 0)


@pytest.mark.parametrize(("chunk", "theory"), [(16, 0.3829), (1, 0.9545)])
def test_slot_peg_reaches_its_ceiling_exactly(chunk, theory):
    assert slot_peg.ceiling(chunk) == pytest.approx(theory, abs=1e-4)
    success, length, _, _ = demonstrate("micro/slot_peg", 4000, expert=slot_peg.SlotPegExpert(chunk))
    assert (length == 32).all()
    # Four standard deviations of 4000 draws: 0.031 and 0.013.
    assert abs(success.mean() - theory) < 4 * np.sqrt(theory * (1 - theory) / 4000)


def test_slot_peg_cannot_be_cheated_by_dodging_the_noise():
    """The noise of the crossing step comes after the last action: steering to the slot leaves a spread of 0.01."""
    _, _, _, infos = demonstrate("micro/slot_peg", 4000, expert=slot_peg.SlotPegExpert(1))
    misses = np.array([episode[-1]["miss"] for episode in infos])
    assert misses.std() == pytest.approx(0.01, rel=0.05)  # the spread of a spread of 4000: 1.1 %
    assert abs(misses.mean()) < 0.001


def test_lanes_rules():
    road, empty = np.array([False, True, True]), np.full((2, 2), lanes.NONE)
    paths, legal = lanes.legal_paths(road, empty, 9.0)
    assert dict(zip(lanes.MANOEUVRES, legal, strict=True)) == {
        "keep": True,
        "brake": True,
        "left": True,
        "right": False,  # there is no lane at -3.5
    }
    np.testing.assert_allclose(paths[0, -1], [36.0, 0.0])
    np.testing.assert_allclose(paths[2, -1], [36.0, 3.5])
    assert paths[1, -1, 0] < paths[0, -1, 0]
    # A car ahead forbids keeping on, and braking stops short of it.
    ahead = np.array([[25.0, 0.0], [lanes.NONE, 0.0]])
    paths, legal = lanes.legal_paths(road, ahead, 9.0)
    assert legal.tolist() == [False, True, True, False]
    assert paths[1, -1, 0] + lanes.EGO[0] < 25.0 - lanes.CAR[0]


def test_lanes_view_shows_lanes_and_obstacles():
    view = lanes.rasterise(np.array([False, True, True]), np.array([[20.0, 0.0], [30.0, 3.5]]))
    assert view.shape == (32, 32, 2)
    cell = ((np.array([20.0, 0.0]) - lanes.VIEW_LOW) / lanes.VIEW_CELL).astype(int)
    assert view[*cell, 1] == 1
    assert view[*cell, 0] == 1
    assert view[:, : int((-2.0 - lanes.VIEW_LOW[1]) / lanes.VIEW_CELL[1]), 0].sum() == 0  # no lane on the right
    assert view[:4, :, 1].sum() == 0


def test_lanes_driving_into_things_fails():
    env = make("micro/lanes", 100)
    rows = np.arange(100)
    env.reset(rows, rows)
    state = env.state(rows)
    blocked = rows[(state["obstacles"][:, 0, 0] < 30)]
    alive = blocked
    for k in range(8):
        if not len(alive):
            break
        result = env.step(np.tile([[5.0 * (k + 1), 0.0]], (len(alive), 1)), alive)
        assert not result.success.any()
        alive = alive[~result.done]
    assert len(blocked) > 10
    assert len(alive) == 0


def test_lanes_demonstrations_use_every_manoeuvre():
    env = make("micro/lanes", 300)
    rows = np.arange(300)
    expert = make_expert(env)
    obs = env.reset(rows, rows)
    expert.reset(rows, rows, obs)
    ends = expert._memory["path"][:, -1]
    assert (ends[:, 1] > 3).mean() > 0.1
    assert (ends[:, 1] < -3).mean() > 0.1
    assert (np.abs(ends[:, 1]) < 0.1).mean() > 0.3


def test_minimum_jerk_paths():
    start, via, goal = np.array([0.0, -1.0]), np.array([0.55, 0.0]), np.array([0.0, 1.0])
    path = min_jerk_via(start, via, goal, 100)
    np.testing.assert_allclose(path[[0, 50, 100]], [start, via, goal], atol=1e-12)
    speed = np.linalg.norm(np.diff(path, axis=0), axis=1)
    assert speed[0] < 1e-4
    assert speed[-1] < 1e-4
    assert speed[50] > 0.01
    # The fourth derivative is continuous at the via point: no step of it is more than a few of the 400th parts.
    fourth = np.diff(min_jerk_via(start, via, goal, 400), n=4, axis=0)
    assert np.abs(np.diff(fourth, axis=0)).max() < 0.05 * np.abs(fourth).max()
    straight = min_jerk(start, goal, 10)
    np.testing.assert_allclose(straight[5], (start + goal) / 2)
    # A via point on the way between start and goal changes nothing about the line.
    np.testing.assert_allclose(min_jerk_via(start, np.zeros(2), goal, 10)[:, 0], 0, atol=1e-12)


def test_ornstein_uhlenbeck_has_the_spread_and_memory_asked_for():
    noise = ornstein_uhlenbeck(np.random.default_rng(0), 20_000, 2, std=0.3, decay=0.8)
    assert noise.shape == (20_000, 2)
    # 20,000 steps hold about 4,400 independent ones: 2 % on a spread.
    np.testing.assert_allclose(noise.std(0), 0.3, rtol=0.06)
    np.testing.assert_allclose((noise[1:] * noise[:-1]).mean(0) / noise.var(0), 0.8, atol=0.03)
