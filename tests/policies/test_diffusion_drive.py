"""DiffusionDrive as a policy: exact properties, levels, selection, both kinds of motion, training, saving."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dipole.data import Episodes, Feature, Windows
from dipole.data.poses import compose
from dipole.errors import DipoleError
from dipole.networks.cascade import CascadeConfig
from dipole.policies import load_policy, save_policy
from dipole.policies.config import ProcessConfig
from dipole.policies.diffusion_drive import DiffusionDriveConfig, make_diffusion_drive, plans, sigmoid_focal
from dipole.systems.diffusiondrive_checks import (
    anchors_come_back,
    last_step_matters,
    permutation_error,
    tiny_policy,
    tiny_scene,
)
from dipole.systems.experiment import train
from dipole.training.config import TrainConfig

SMALL = CascadeConfig(width=16, num_heads=2, feedforward=32, point_embed=8, agent_queries=2, bev_hidden=(8,))


def episodes(motion="waypoints", count=40, length=12, seed=0, speeds=(2, 4)):
    """Drives straight on or in a curve to the left: increments, or waypoints of the first frame's frame."""
    rng = np.random.default_rng(seed)
    turn = rng.choice([0.0, 0.1], (count, 1)).repeat(length, 1)
    speed = rng.uniform(*speeds, (count, 1)).repeat(length, 1)
    steps = np.stack([speed, np.zeros_like(speed), turn], axis=-1)
    path = compose(torch.from_numpy(steps)).numpy()
    action = (steps if motion == "increments" else path[..., :2]).reshape(count * length, -1).astype(np.float32)
    columns = {
        "observation.state": np.stack([speed, turn], -1).reshape(-1, 2).astype(np.float32),
        "observation.scene": rng.random((count * length, 8, 8, 1)).astype(np.float32),
        "action": action,
    }
    features = {key: Feature("float32", value.shape[1:]) for key, value in columns.items()}
    return Episodes(features, columns, np.arange(1, count + 1) * length, 2.0)


def make(motion="waypoints", data=None, **options):
    data = episodes(motion) if data is None else data
    windows = Windows(data, ("observation.state", "observation.scene"), "action", 1, 8, 8)
    view = {"view_low": (-4.0, -16.0), "view_cell": (4.0, 4.0)}
    settings = {"network": SMALL, "num_anchors": 4, "motion": motion, **view, **options}
    return make_diffusion_drive(windows, **settings), windows


def test_exact_properties():
    assert anchors_come_back() < 1e-5  # float32 rounding of metres
    assert permutation_error() < 1e-5
    assert last_step_matters() < 1e-4


def test_one_anchor_without_score_is_a_plain_regressor():
    policy = tiny_policy(num_anchors=1, score_weight=0.0)
    obs, g = tiny_scene(4), torch.Generator
    action = torch.randn(4, 8, 2, generator=g().manual_seed(0)).cumsum(1)
    batch = {**obs, "action": action, "action_is_pad": torch.zeros(4, 8, dtype=torch.bool)}
    loss = policy.loss(batch, g().manual_seed(5))
    random = g().manual_seed(5)
    level = torch.randint(50, (4,), generator=random)
    x = policy._noised(level, 4, random)
    wanted = plans(action, "waypoints")
    found = policy.decode(x, level, policy.encode(obs))
    expected = 12 * 8 * sum((stage.poses[:, 0] - wanted).abs().mean() for stage in found)
    torch.testing.assert_close(loss, expected)


def test_the_positive_is_the_clean_anchor_nearest_to_the_demonstration():
    policy = tiny_policy(score_weight=0.0)
    obs, wanted = tiny_scene(2), policy.anchors[[3, 1]] + 0.01
    batch = {**obs, "action": wanted, "action_is_pad": torch.zeros(2, 8, dtype=torch.bool)}
    loss = policy.loss(batch, torch.Generator().manual_seed(5))
    random = torch.Generator().manual_seed(5)
    level = torch.randint(50, (2,), generator=random)
    found = policy.decode(policy._noised(level, 2, random), level, policy.encode(obs))
    full = plans(wanted, "waypoints")
    expected = 96 * sum((stage.poses[[0, 1], [3, 1]] - full).abs().mean() for stage in found)
    torch.testing.assert_close(loss, expected)


def test_padded_points_do_not_count():
    policy = tiny_policy()
    obs, action = tiny_scene(2), torch.rand(2, 8, 2).cumsum(1)
    pad = torch.zeros(2, 8, dtype=torch.bool)
    pad[:, 5:] = True
    other = action.clone()
    other[:, 5:] = 77.0
    losses = [
        policy.loss({**obs, "action": a, "action_is_pad": pad}, torch.Generator().manual_seed(0)).item()
        for a in (action, other)
    ]
    assert losses[0] == losses[1]


def test_focal_loss():
    logits, target = torch.tensor([0.0, 3.0, -3.0]), torch.tensor([1.0, 1.0, 0.0])
    p = logits.sigmoid()
    expected = torch.stack(
        [
            0.25 * 0.5**2 * math.log(2) * torch.ones(()),
            -0.25 * (1 - p[1]) ** 2 * p[1].log(),
            -0.75 * p[2] ** 2 * (1 - p[2]).log(),
        ]
    )
    torch.testing.assert_close(sigmoid_focal(logits, target), expected)


def test_score_losses_differ_by_option():
    obs = tiny_scene(2)
    batch = {**obs, "action": torch.rand(2, 8, 2).cumsum(1), "action_is_pad": torch.zeros(2, 8, dtype=torch.bool)}
    losses = {}
    for kind in ("focal", "bce"):
        policy = tiny_policy(score_loss=kind, path_weight=0.0)
        losses[kind] = policy.loss(batch, torch.Generator().manual_seed(0))
        level = torch.randint(50, (2,), generator=(random := torch.Generator().manual_seed(0)))
        found = policy.decode(policy._noised(level, 2, random), level, policy.encode(obs))
        wanted = plans(batch["action"], "waypoints")[:, None, :, :2]
        positive = (wanted - policy.anchors).norm(dim=-1).mean(-1).argmin(1)
        target = F.one_hot(positive, 5).float()
        score = (
            sigmoid_focal
            if kind == "focal"
            else (lambda a, b: F.binary_cross_entropy_with_logits(a, b, reduction="none"))
        )
        expected = 120 * sum(score(stage.logits, target).mean() for stage in found)
        torch.testing.assert_close(losses[kind], expected)
    assert losses["focal"] < losses["bce"]


@pytest.mark.parametrize(
    ("levels", "steps", "expected"),
    [
        ("published", 2, [(10, 10, 9), (0, 0, -1)]),
        ("published", 1, [(0, 0, -1)]),
        ("published", 4, [(15, 15, 14), (10, 10, 9), (5, 5, 4), (0, 0, -1)]),
        ("consistent", 2, [(8, 8, 0), (0, 0, -1)]),
        ("consistent", 1, [(8, 8, -1)]),
        ("consistent", 3, [(8, 8, 4), (4, 4, 0), (0, 0, -1)]),
    ],
)
def test_levels_of_the_passes(levels, steps, expected):
    assert tiny_policy(levels=levels, num_steps=steps).config.schedule() == expected


def test_the_options_of_the_levels_matter_only_so_much():
    obs, noise = tiny_scene(), torch.randn(3, 5, 8, 2, generator=torch.Generator().manual_seed(0))
    plans_ = [tiny_policy(levels=levels).propose(obs, noise).poses for levels in ("published", "consistent")]
    assert not torch.equal(*plans_)
    clean = [
        tiny_policy(levels=levels, start_level=0).with_options(num_steps=1) for levels in ("published", "consistent")
    ]
    assert torch.equal(clean[0].propose(obs, noise).poses, clean[1].propose(obs, noise).poses)


def test_act_takes_the_best_and_is_pure():
    policy, obs = tiny_policy(action_horizon=3), tiny_scene()
    noise = torch.randn(3, 5, 8, 2, generator=torch.Generator().manual_seed(0))
    chunk, state = policy.act(obs, policy.initial_state(3), noise)
    found = policy.propose(obs, noise)
    assert state == {}
    assert torch.equal(chunk, found.poses[torch.arange(3), found.logits.argmax(1), :3, :2])
    assert torch.equal(policy.act(obs, {}, noise)[0], chunk)


def test_rows_do_not_depend_on_the_batch():
    policy, obs = tiny_policy(select="sample"), tiny_scene()
    generators = [torch.Generator().manual_seed(k) for k in range(3)]
    together, _ = policy.act(obs, {}, generator=generators)
    for k in range(3):
        one = {key: value[k : k + 1] for key, value in obs.items()}
        alone, _ = policy.act(one, {}, generator=[torch.Generator().manual_seed(k)])
        torch.testing.assert_close(alone[0], together[k], atol=1e-5, rtol=1e-5)  # products of other sizes


def test_sampling_follows_the_scores():
    policy = tiny_policy(select="sample")
    for stage in policy.network.stages:
        torch.nn.init.zeros_(stage.score[-1].weight)  # all scores alike: every candidate is drawn
    obs = {key: value[:1].expand(400, *value.shape[1:]) for key, value in tiny_scene(1).items()}
    noise = torch.zeros(400, 5, 8, 2)
    chunk, _ = policy.act(obs, {}, noise, torch.Generator().manual_seed(0))
    ends = policy.propose(obs, noise).poses[0, :, -1, :2]
    counts = torch.bincount(torch.cdist(chunk[:, -1], ends).argmin(1), minlength=5)
    assert (counts - 80).abs().max() < 40  # five standard deviations of 400 draws at 1/5


def test_plans_of_increments_come_back_as_increments():
    policy, windows = make("increments")
    batch = {key: torch.from_numpy(value) for key, value in windows.batch(np.arange(5)).items()}
    obs = {key: batch[key] for key in windows.obs_keys}
    chunk, _ = policy.act(obs, {}, generator=torch.Generator().manual_seed(0))
    assert chunk.shape == (5, 8, 3)
    found = policy.propose(obs, generator=torch.Generator().manual_seed(0))
    best = found.poses[torch.arange(5), found.logits.argmax(1)]
    torch.testing.assert_close(compose(chunk), best, atol=1e-4, rtol=1e-4)  # float32, metres


def test_anchors_are_centres_of_whole_demonstrations():
    data = episodes("increments", speeds=(2.9, 3.1))
    policy, _ = make("increments", data, num_anchors=2)
    # Two kinds of drives, of about three metres a step: one bends to the left, one does not.
    sideways = policy.anchors[:, -1, 1].sort().values
    assert sideways[0].abs() < 0.5
    assert sideways[1] > 4


def test_training_lowers_the_loss_and_a_saved_policy_plans_the_same(tmp_path):
    policy, windows = make("increments")
    batch = {key: torch.from_numpy(value) for key, value in windows.batch(np.arange(32)).items()}
    before = policy.loss(batch, torch.Generator().manual_seed(0)).item()
    config = TrainConfig(steps=40, batch_size=32, lr=3e-3, ema_decay=0.5, precision="fp32")
    trained = train(policy, windows, config)
    assert trained.loss(batch, torch.Generator().manual_seed(0)).item() < 0.7 * before
    save_policy(trained, tmp_path / "p")
    loaded = load_policy(tmp_path / "p")
    assert loaded.config == trained.config
    obs = {key: batch[key][:3] for key in windows.obs_keys}
    noise = torch.randn(3, 4, 8, 2, generator=torch.Generator().manual_seed(1))
    # torch's attention takes another path for weights that need gradients, and rounds differently
    torch.testing.assert_close(loaded.act(obs, {}, noise)[0], trained.act(obs, {}, noise)[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(loaded.anchors, trained.anchors)


def test_mistakes_are_answered():
    with pytest.raises(DipoleError, match=r"needs actions of shape \(3,\)"):
        make("increments", episodes("waypoints"))
    with pytest.raises(DipoleError, match="ask for 1 to"):
        make(num_anchors=5000)
    with pytest.raises(DipoleError, match="start_level 60 must lie below train_levels 50"):
        tiny_policy(start_level=60)
    with pytest.raises(DipoleError, match="cannot be changed after training"):
        tiny_policy().with_options(num_anchors=3)
    with pytest.raises(DipoleError, match="lacks 'observation.scene'"):
        tiny_policy().act({"observation.state": torch.zeros(1, 1, 3)}, {})
    with pytest.raises(DipoleError, match=r"has shape \[1, 2, 3\]"):
        tiny_policy().act({**tiny_scene(1), "observation.state": torch.zeros(1, 2, 3)}, {})
    view = {"observation.scene": Feature("float32", (4, 4, 1))}
    with pytest.raises(DipoleError, match="needs at least one"):
        DiffusionDriveConfig(view, Feature("float32", (2,)))
    with pytest.raises(DipoleError, match="exceed the process's 20 levels"):
        tiny_policy(process=ProcessConfig("vp-scaled-linear", 20))
