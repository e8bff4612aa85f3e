import json
import math

import numpy as np
import pytest
import torch

from dipole.envs.seeds import EVAL_SEED
from dipole.errors import DipoleError, MissingExtraError
from dipole.evaluation.compare import compare
from dipole.evaluation.describe import digest
from dipole.evaluation.evaluate import evaluate, load_evaluation
from dipole.evaluation.latency import count_network_calls, measure_latency
from dipole.evaluation.statistics import bootstrap, wilson


def assess(toys, num_envs=4, score="success", policy=None, env=None, **options):
    options = {"episodes": 20, "latency_calls": 2, **options}
    return evaluate(policy or toys.Policy(), env or toys.Env(num_envs, score=score), **options)


def result(evaluation):
    """Everything but the wall clock, as text: equal to the last digit or not at all."""
    values = evaluation.to_json()
    del values["timing"]
    return json.dumps(values)


def test_the_document_is_the_same_to_the_digit_whatever_the_number_of_environments(toys):
    documents = {result(assess(toys, n)) for n in (1, 3, 16)}
    assert len(documents) == 1
    assert result(assess(toys, 3, seed=EVAL_SEED + 100)) not in documents


def test_the_numbers_are_those_of_the_episodes(toys):
    evaluation = assess(toys, score="max_reward")
    success = evaluation.column("success")
    assert evaluation.success == wilson(int(success.sum()), 20)
    assert evaluation.score == bootstrap(evaluation.column("max_reward"))
    assert evaluation.column("score").tolist() == evaluation.column("max_reward").tolist()
    assert evaluation.length.value == evaluation.column("length").mean()
    assert evaluation.episodes["seed"] == list(range(EVAL_SEED, EVAL_SEED + 20))
    assert assess(toys).score == assess(toys).success
    assert assess(toys, score="return").score.value == pytest.approx(
        assess(toys, score="return").column("return").mean()
    )


def test_a_longer_evaluation_begins_with_the_same_episodes(toys):
    short, long = assess(toys, episodes=9), assess(toys, episodes=20)
    assert long.episodes["return"][:9] == short.episodes["return"]


def test_saved_and_read_back(toys, tmp_path):
    evaluation = assess(toys)
    evaluation.save(tmp_path / "evaluation.json")
    assert load_evaluation(tmp_path / "evaluation.json") == evaluation
    (tmp_path / "evaluation.json").write_text('{"env": 3}')
    with pytest.raises(DipoleError, match="missing key"):
        load_evaluation(tmp_path / "evaluation.json")


def test_what_was_evaluated_is_recorded(toys):
    policy = toys.Policy()
    evaluation = assess(toys, policy=policy)
    assert evaluation.policy["digest"] == digest(policy) == digest(toys.Policy())
    assert evaluation.policy["digest"] != digest(toys.Policy(width=34))
    policy.network[0].bias.data[0] += 1e-6
    assert digest(policy) != evaluation.policy["digest"]
    assert evaluation.policy["nfe"] == 1
    assert {"torch", "numpy", "python", "dipole"} <= set(evaluation.versions)
    assert evaluation.machine["cores"] >= 1
    assert evaluation.settings["stop_on_success"] is True


def test_a_reward_that_is_not_finite_is_reported(toys):
    env = toys.Env(2)
    step = env.step

    def broken(actions, rows):
        got = step(actions, rows)
        got.reward[:] = np.nan
        return got

    env.step = broken
    with pytest.raises(DipoleError, match="reward that is not finite in the episode with seed"):
        assess(toys, env=env)


def test_environments_are_made_by_name_and_closed(toys, monkeypatch):
    env = toys.Env(2)
    calls = []
    env.close = lambda: calls.append("closed")
    monkeypatch.setattr("dipole.envs.make", lambda name, **options: calls.append((name, options)) or env)
    evaluate(toys.Policy(), "toy", 2, num_envs=16, env_options={"a": 1}, latency_calls=0)
    assert calls == [("toy", {"num_envs": 2, "mode": None, "a": 1}), "closed"]


def test_videos_of_the_first_episodes(toys, tmp_path):
    evaluation = assess(toys, videos=3, folder=tmp_path)
    assert [video["seed"] for video in evaluation.videos] == evaluation.episodes["seed"][:3]
    assert sorted(p.name for p in (tmp_path / "videos").iterdir()) == [
        "episode_000.mp4", "episode_001.mp4", "episode_002.mp4", "grid.mp4",
    ]  # fmt: skip
    assert evaluation.notes == ()
    assert result(assess(toys)) != result(evaluation)
    assert assess(toys).fingerprint == evaluation.fingerprint


def test_no_encoder_is_said_and_not_fatal(toys, tmp_path, monkeypatch):
    def missing(*args):
        raise MissingExtraError("imageio-ffmpeg", "report")

    monkeypatch.setitem(evaluate.__globals__, "write_mp4", missing)
    evaluation = assess(toys, videos=2, folder=tmp_path)
    assert evaluation.videos == ()
    assert "no videos: 'imageio-ffmpeg' is not installed" in evaluation.notes[0]


def test_latency_is_measured_in_milliseconds_at_batch_one(toys, monkeypatch):
    policy, clock = toys.Policy(memory=True), iter(range(1000))
    monkeypatch.setattr("dipole.evaluation.latency.time.perf_counter", lambda: next(clock) ** 2 / 1000)
    obs = {"observation.state": torch.zeros(1, 2, 3)}
    (latency,) = measure_latency(policy, obs, calls=5, warmup=2, threads=[1])
    assert policy.batches == [1] * 7
    # After two reads in the warm-up the k-th and (k+1)-th read of the clock are 2k + 1 ms apart: k = 2, 4, 6, 8, 10.
    assert (latency.p50_ms, latency.mean_ms) == pytest.approx((13, 13))
    assert latency.p95_ms == pytest.approx(np.percentile([5, 9, 13, 17, 21], 95))
    assert (latency.calls, latency.threads, latency.device) == (5, 1, "cpu")


def test_latency_restores_the_number_of_threads(toys):
    before = torch.get_num_threads()
    measured = measure_latency(toys.Policy(), {"observation.state": torch.zeros(1, 2, 3)}, calls=2, threads=[2, 1])
    assert [m.threads for m in measured] == [2, 1]
    assert torch.get_num_threads() == before


def test_network_calls_are_counted(toys):
    policy, obs = toys.Policy(), {"observation.state": torch.zeros(1, 2, 3)}
    act = policy.act

    def thrice(*args, **kwargs):
        policy.network(torch.zeros(1, 18))
        policy.network(torch.zeros(1, 18))
        return act(*args, **kwargs)

    assert count_network_calls(policy, obs) == 1
    policy.act = thrice
    assert count_network_calls(policy, obs) == 3
    policy.network = None
    policy.act, policy.sampler = lambda *a, **k: None, type("S", (), {"nfe": 9})
    assert count_network_calls(policy, obs) == 9


class TestCompare:
    def with_columns(self, toys, success, score=None, score_name="success"):
        from dataclasses import replace

        base = assess(toys, episodes=len(success))
        score = [float(s) for s in success] if score is None else score
        return replace(
            base, score_name=score_name, episodes={**base.episodes, "success": success, "score": score},
            success=wilson(sum(success), len(success)),
        )  # fmt: skip

    def test_a_difference_is_found(self, toys):
        a = self.with_columns(toys, [True] * 4 + [False] * 16)
        b = self.with_columns(toys, [True] * 3 + [False] + [True] * 13 + [False] * 3)
        found = compare(a, b)
        assert (found.both, found.only_a, found.only_b, found.neither) == (3, 1, 13, 3)
        assert found.better == "B"
        assert found.success_p == pytest.approx(2 * (1 + 14) / 2**14)
        assert found.verdict.startswith("B succeeds more often: B - A = +60 points (95 % interval +")
        assert "exact McNemar p = 0.002 on 20 paired episodes" in found.verdict
        assert compare(b, a).better == "A"
        assert compare(b, a).verdict.startswith("A succeeds more often: B - A = -60 points")

    def test_no_difference_says_how_many_episodes_it_would_take(self, toys):
        a = self.with_columns(toys, [True] * 10 + [False] * 10)
        b = self.with_columns(toys, [True] * 12 + [False] * 8)
        found = compare(a, b)
        assert found.better is None
        assert found.verdict.startswith("No difference in success was found: B - A = +10 points")
        # Connor with 0.1 discordant, 0.1 difference
        needed = math.ceil(((1.959964 * math.sqrt(0.1) + 0.841621 * math.sqrt(0.1 - 0.01)) / 0.1) ** 2)
        assert f"about {needed} episodes would show it" in found.verdict
        assert "would show" not in compare(a, a).verdict

    def test_scores_are_compared_pair_by_pair(self, toys):
        noise = np.random.default_rng(0).normal(0, 5, 20)
        a = self.with_columns(toys, [False] * 20, noise.tolist(), "return")
        b = self.with_columns(toys, [False] * 20, (noise + np.linspace(0.1, 0.3, 20)).tolist(), "return")
        found = compare(a, b)  # far smaller than the spread between episodes, yet the same sign in each
        assert found.better == "B"
        assert found.score_difference.value == pytest.approx(0.2)
        assert found.verdict.startswith("B has the higher return: B - A = +0.2 (95 % interval +0.1")
        assert "p < 0.001" in found.verdict
        assert compare(a, a).verdict.startswith("No difference in return was found: B - A = +0 ")

    def test_only_the_same_episodes_can_be_paired(self, toys):
        with pytest.raises(DipoleError, match="different seeds"):
            compare(assess(toys), assess(toys, seed=7))
        with pytest.raises(DipoleError, match="different time limits"):
            compare(assess(toys), assess(toys, max_steps=9))
