from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dipole.data import Feature
from dipole.errors import DipoleError
from dipole.evaluation.rollout import first_observation, rollout

SEEDS = range(100, 123)  # more than a block of 16, and no multiple of any number of rows below


def facts(rollouts):
    return [
        (e.index, e.seed, e.success, e.return_, e.max_reward, e.length, e.terminated, e.truncated, e.chunks)
        for e in rollouts.episodes
    ]


@pytest.mark.parametrize("memory", [False, True])
def test_results_are_the_same_to_the_last_bit_whatever_the_number_of_environments(toys, memory):
    policy = toys.Policy(memory=memory)
    runs = {n: rollout(policy, toys.Env(n), SEEDS, keep_trajectories=True) for n in (1, 2, 7, 16, 40)}
    for run in runs.values():
        assert facts(run) == facts(runs[1])
        for episode, alone in zip(run.episodes, runs[1].episodes, strict=True):
            np.testing.assert_array_equal(episode.trajectory.actions, alone.trajectory.actions)
    assert len({e.length for e in runs[1].episodes}) > 3  # rows ended at different times, or nothing was tested
    assert len({e.success for e in runs[1].episodes}) == 2


def test_nothing_leaks_from_one_episode_into_the_next(toys):
    # Alone in a fresh environment, at its own place of the block: what the episode is without any past.
    policy = toys.Policy(memory=True)
    together = rollout(policy, toys.Env(3), SEEDS)
    for index in (0, 5, 19):
        seeds = [0] * (index % 16) + [SEEDS[index]]
        alone = rollout(policy, toys.Env(len(seeds)), seeds)
        assert facts(alone)[-1][2:] == facts(together)[index][2:]


def test_a_forgotten_reset_would_be_noticed(toys):
    # The check above must be able to fail: without reset the memory does change the result.
    policy = toys.Policy(memory=True)
    good = facts(rollout(policy, toys.Env(3), SEEDS))
    policy.reset = lambda state, mask: state
    assert facts(rollout(policy, toys.Env(3), SEEDS)) != good


def test_a_policy_by_hand_gives_the_same_episode(toys):
    """One episode spelled out: To frames with the first repeated, Ta actions per chunk, clipping, stop at success."""
    from dipole.evaluation.seeds import policy_generator

    policy = toys.Policy(memory=True)
    seed, slot = 104, 2
    env, g = toys.Env(1, max_steps=30), policy_generator(seed)
    spare = [policy_generator(0) for _ in range(16)]
    obs = env.reset([0], [seed])["observation.state"][0]
    frames, state, total, length, done = [obs, obs], torch.zeros(1, 5), 0.0, 0, False
    while not done:
        batch = torch.from_numpy(np.stack(frames[-2:])).expand(16, 2, 3)
        with torch.no_grad():
            generators = [g if k == slot else spare[k] for k in range(16)]
            chunk, new = policy.act({"observation.state": batch}, {"memory": state.expand(16, 5)}, generator=generators)
        state = new["memory"][slot : slot + 1]
        for action in chunk[slot].numpy():
            result = env.step(np.clip(action, -1, 1)[None], [0])
            frames.append(result.obs["observation.state"][0])
            total, length = total + float(result.reward[0]), length + 1
            done = bool(result.terminated[0] | result.truncated[0] | result.success[0])
            if done:
                break
    run = rollout(policy, toys.Env(2), [102, 103, 104])
    assert run.episodes[2].length == length
    assert run.episodes[2].return_ == pytest.approx(total, rel=1e-12)  # the order of the sum may differ


def test_the_policy_always_sees_blocks_of_the_same_size(toys):
    policy = toys.Policy()
    rollout(policy, toys.Env(5), SEEDS, block=7)
    assert set(policy.batches) == {7}


def test_rows_take_the_next_seed_as_they_become_free(toys):
    env = toys.Env(4)
    run = rollout(toys.Policy(), env, SEEDS)
    started = [seed for _, _, seeds in env.log for seed in seeds]
    assert started == list(SEEDS)
    assert [e.seed for e in run.episodes] == list(SEEDS)
    assert env.log[0][1] == [0, 1, 2, 3]
    assert len(env.log) > 4  # rows were refilled one by one, not all at once


def test_fewer_episodes_than_environments(toys):
    assert len(rollout(toys.Policy(), toys.Env(8), [5, 6]).episodes) == 2


def test_the_time_limit_truncates(toys):
    run = rollout(toys.Policy(), toys.Env(2), SEEDS, max_steps=2, stop_on_success=False)
    assert all(e.length == 2 and e.truncated and not e.terminated for e in run.episodes)


def test_success_ends_an_episode_where_success_is_the_score(toys):
    policy = toys.Policy()
    stopped = rollout(policy, toys.Env(3), SEEDS).episodes
    played = rollout(policy, toys.Env(3, score="return"), SEEDS).episodes
    assert [e.success for e in stopped] == [e.success for e in played]
    assert any(a.length < b.length for a, b in zip(stopped, played, strict=True))
    assert all(a.length == b.length for a, b in zip(stopped, played, strict=True) if not a.success)


def test_trajectories_are_complete(toys):
    episode = rollout(toys.Policy(), toys.Env(3), SEEDS, keep_trajectories=True).episodes[4]
    assert episode.trajectory.observations["observation.state"].shape == (episode.length + 1, 3)
    assert episode.trajectory.actions.shape == (episode.length, 2)
    assert episode.trajectory.rewards.sum() == episode.return_
    start = toys.Env(1).reset([0], [episode.seed])["observation.state"][0]
    np.testing.assert_array_equal(episode.trajectory.observations["observation.state"][0], start)


def test_filmed_episodes_have_every_frame(toys):
    run = rollout(toys.Policy(), toys.Env(3), SEEDS, film=[0, 2])
    assert [e.index for e in run.episodes if e.frames is not None] == [0, 2]
    frames = run.episodes[2].frames
    assert frames.shape == (run.episodes[2].length + 1, 20, 24, 3)
    assert frames[:, 0, 0, 0].tolist() == list(range(run.episodes[2].length + 1))


def test_without_graphics_the_evaluation_goes_on_and_says_so(toys):
    run = rollout(toys.Policy(), toys.Env(3, render=False), SEEDS, film=[0, 2])
    assert facts(run) == facts(rollout(toys.Policy(), toys.Env(3), SEEDS))
    assert run.notes == ("no videos: rendering failed (RuntimeError: no graphics here)",)
    assert all(e.frames is None for e in run.episodes)


def test_an_action_that_is_not_finite_names_the_episode(toys):
    policy = toys.Policy()
    act = policy.act

    def broken(obs, state, noise=None, generator=None):
        chunk, state = act(obs, state, noise, generator)
        chunk[3, 1, 0] = torch.nan
        return chunk, state

    policy.act = broken
    with pytest.raises(DipoleError, match=r"episode 3 \(seed 103\) of 'toy' at env step 0: .* not finite"):
        rollout(policy, toys.Env(16), SEEDS)


def test_a_policy_for_another_task_is_refused(toys):
    policy = toys.Policy()
    act = policy.act
    policy.act = lambda *a, **k: (torch.zeros(16, 4, 7), act(*a, **k)[1])
    with pytest.raises(DipoleError, match=r"shape \[4, 7\], not \[Ta, 2\]"):
        rollout(policy, toys.Env(2), SEEDS)


@pytest.mark.parametrize(
    ("observation", "action_dim", "message"),
    [
        (
            {"observation.image": (8, 8, 3)},
            2,
            "needs 'observation.image', but environment 'toy' gives only observation.state",
        ),
        ({"observation.state": (4,)}, 2, r"'observation.state' of shape \[3\], the policy was trained on \[4\]"),
        ({"observation.state": (3,)}, 7, "actions of 7 components, environment 'toy' takes 2"),
    ],
)
def test_a_policy_that_does_not_fit_is_told_so_before_anything_runs(toys, observation, action_dim, message):
    policy, env = toys.Policy(), toys.Env(2)
    features = {key: Feature("float32", shape) for key, shape in observation.items()}
    policy.config, policy.action_dim = SimpleNamespace(observation=features), action_dim
    with pytest.raises(DipoleError, match=message):
        rollout(policy, env, SEEDS)
    assert env.log == []


def test_the_policy_is_put_back_in_training_mode(toys):
    policy = toys.Policy().train()
    rollout(policy, toys.Env(2), [1])
    assert policy.training


def test_progress_hears_of_every_episode(toys):
    heard = []
    rollout(toys.Policy(), toys.Env(3), SEEDS, progress=heard.append)
    assert sorted(e.index for e in heard) == list(range(len(SEEDS)))


def test_the_first_observation_is_what_a_policy_sees_at_the_start(toys):
    policy, seen = toys.Policy(), []
    act = policy.act
    policy.act = lambda obs, state, **options: seen.append(obs) or act(obs, state, **options)
    rollout(policy, toys.Env(1), [104], block=1)
    (found,) = first_observation(policy, toys.Env(1), 104).values()
    assert found.shape == (1, policy.obs_horizon, 3)
    torch.testing.assert_close(found, seen[0]["observation.state"], rtol=0, atol=0)
