"""The cascade decoder: what a stage looks at, how stages and queries depend on one another."""

from dataclasses import replace

import pytest
import torch

from dipole.networks.cascade import CascadeConfig, CascadeDecoder, PointEmbedding, SceneEncoder, sample_view

CONFIG = CascadeConfig(width=16, num_heads=2, feedforward=32, point_embed=8, agent_queries=3, bev_hidden=(8,))
LOW, SIZE = (-4.0, -12.0), (64.0, 24.0)


def build(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return CascadeDecoder(config, 6, LOW, SIZE).eval(), SceneEncoder(config, (16, 16, 2), 3).eval()


def inputs(batch=2, paths=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    points = torch.randn(batch, paths, 6, 2, generator=g) * 5 + torch.tensor([20.0, 0.0])
    return points, torch.randn(batch, 16, 16, 2, generator=g), torch.randn(batch, 3, generator=g)


def test_shapes_and_bounds():
    decoder, encoder = build()
    points, view, state = inputs()
    scene = encoder(view, state)
    assert scene.view.shape == (2, 16, 8, 8)
    assert scene.agents.shape == (2, 3, 16)
    stages = decoder(points, torch.tensor([8.0, 0.0]), scene)
    assert len(stages) == 2
    for poses, logits in stages:
        assert poses.shape == (2, 4, 6, 3)
        assert logits.shape == (2, 4)
        assert poses[..., 2].abs().max() < torch.pi


def test_outside_the_view_there_is_nothing():
    features = torch.ones(1, 2, 4, 4)
    low, size = torch.tensor(LOW), torch.tensor(SIZE)
    points = torch.tensor([[[[20.0, 0.0], [500.0, 0.0], [0.0, 500.0]]]])
    assert sample_view(features, points, low, size)[0, 0].tolist() == [[1, 1], [0, 0], [0, 0]]


def test_the_view_is_read_where_the_path_is():
    features = torch.zeros(1, 1, 4, 4)
    features[0, 0, 3, 1] = 1.0  # x in 44..60, y in -6..0
    low, size = torch.tensor(LOW), torch.tensor(SIZE)
    points = torch.tensor([[[[52.0, -3.0], [52.0, 3.0], [12.0, -3.0]]]])
    torch.testing.assert_close(sample_view(features, points, low, size).flatten(), torch.tensor([1.0, 0.0, 0.0]))


def test_paths_do_not_see_one_another():
    decoder, encoder = build()
    points, view, state = inputs()
    scene, time = encoder(view, state), torch.tensor([8.0, 0.0])
    alone = decoder(points[:, :1], time, scene)[-1]
    together = decoder(points, time, scene)[-1]
    # batched products may round differently
    torch.testing.assert_close(alone.poses, together.poses[:, :1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone.logits, together.logits[:, :1], atol=1e-5, rtol=1e-5)


def test_the_second_stage_gets_detached_points():
    decoder, encoder = build()
    points, view, state = inputs()
    second = decoder(points, torch.zeros(2), encoder(view, state))[1]
    second.poses.sum().backward()
    assert decoder.stages[0].move[-1].weight.grad is None
    assert decoder.stages[1].move[-1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("features", "reached"), [("same", False), ("chained", True)])
def test_what_the_second_stage_starts_from(features, reached):
    decoder, encoder = build(replace(CONFIG, features=features))
    points, view, state = inputs()
    decoder(points, torch.zeros(2), encoder(view, state))[1].logits.sum().backward()
    assert (decoder.stages[0].film[1].weight.grad is not None) == reached


@pytest.mark.parametrize("field", ["bev_sampling", "agent_attention"])
def test_ablations_do_not_look(field):
    decoder, encoder = build(replace(CONFIG, **{field: False}))
    points, view, state = inputs()
    scene = encoder(view, state)
    part = "view" if field == "bev_sampling" else "agents"
    other = scene._replace(**{part: torch.randn_like(getattr(scene, part))})
    time = torch.zeros(2)
    assert torch.equal(decoder(points, time, scene)[-1].poses, decoder(points, time, other)[-1].poses)
    full, encoder = build()
    assert not torch.equal(full(points, time, scene)[-1].poses, full(points, time, other)[-1].poses)


def test_embedding_tells_near_points_apart():
    embed = PointEmbedding(16)
    points = torch.tensor([[10.0, 0.0], [10.1, 0.0], [10.0, 0.1], [0.0, 10.0]])
    distance = torch.cdist(embed(points), embed(points))
    assert (distance + torch.eye(4) > 0.05).all()
