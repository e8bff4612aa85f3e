"""Updates recorded as a CUDA graph: the same draws everywhere, the same training on a machine with an NVIDIA GPU."""

import pytest
import torch
from torch import nn
from training_standin import make_episodes

from dipole.data import Windows
from dipole.policies import make_config, make_policy
from dipole.training import TrainConfig
from dipole.training.batches import Loader
from dipole.training.recorded import NotRecordable, RecordedDraws
from dipole.training.seeding import generator
from dipole.training.update import Updater, make_accelerator

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
CPU = torch.device("cpu")


def draw(noise):
    """Draw in all the ways that losses do."""
    return [
        torch.randn((4, 3), generator=noise, dtype=torch.float64, device=noise.device),
        torch.randint(100, (4,), generator=noise),
        torch.empty(4, 2).normal_(generator=noise),
        torch.bernoulli(torch.full((4, 1), 0.5), generator=noise),
    ]


def test_recorded_draws_are_the_draws():
    draws, noise = RecordedDraws(CPU), generator(0, "noise", 0)
    with draws.recording(noise):
        recorded = draw(noise)
    for ours, expected in zip(recorded, draw(generator(0, "noise", 0)), strict=True):
        assert torch.equal(ours, expected)


def test_refilled_buffers_hold_the_draws_of_the_next_update():
    draws, noise = RecordedDraws(CPU), generator(0, "noise", 0)
    with draws.recording(noise):
        draw(noise)
    with draws.reading(noise):
        buffers = draw(noise)
    for step in (1, 2):
        draws.refill(generator(0, "noise", step))
        for buffer, expected in zip(buffers, draw(generator(0, "noise", step)), strict=True):
            assert torch.equal(buffer, expected)


def test_a_draw_that_was_not_recorded_is_an_error():
    draws, noise = RecordedDraws(CPU), generator(0, "noise", 0)
    with draws.recording(noise):
        torch.randn(3, generator=noise)
    with draws.reading(noise):
        torch.randn(3, generator=noise)
        with pytest.raises(NotRecordable, match="more"):
            torch.randn(3, generator=noise)


def trained(network, cuda_graph, updates=12, change=None):
    """Return losses and gradient norms, the averaged weights, and whether a graph was recorded, on the GPU."""
    episodes = make_episodes()
    torch.manual_seed(0)
    policy = make_policy(make_config(episodes, network=network), episodes)
    if change is not None:
        change(policy)
    config = TrainConfig(steps=updates, batch_size=32, cuda_graph=cuda_graph)
    accelerator = make_accelerator(config)
    updater = Updater(accelerator, policy, config, "fp32")
    horizons = (policy.obs_horizon, policy.pred_horizon, policy.action_horizon)
    windows = Windows(episodes, list(policy.config.observation), "action", *horizons)
    figures = []
    for step, batch in enumerate(Loader.of(windows, config, accelerator, 0, updates)):
        figures.append(torch.stack(updater.update(batch, step, updates)))
    recorded = updater._recorded is not None and updater._recorded._graph is not None
    return torch.stack(figures).cpu(), [p.detach().cpu() for p in updater.ema.module.parameters()], recorded


@needs_gpu
@pytest.mark.parametrize("network", ["mlp", {"name": "unet1d", "down_dims": [16, 32]}, "transformer"])
def test_recorded_updates_train_as_others_do(network):
    graph_losses, graph_weights, recorded = trained(network, cuda_graph=True)
    losses, weights, not_recorded = trained(network, cuda_graph=False)
    assert recorded
    assert not not_recorded
    torch.testing.assert_close(graph_losses, losses, rtol=1e-3, atol=1e-5)
    for ours, expected in zip(graph_weights, weights, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


class Reading(nn.Module):
    """A network that reads a value back from the GPU."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, time, cond=None):
        return self.network(x, time, cond) * (1 if float(x.abs().max()) >= 0 else 2)


def read_back(policy):
    policy.network = Reading(policy.network)


@needs_gpu
def test_a_policy_that_waits_for_the_gpu_is_trained_without():
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph"):
        graph_losses, graph_weights, recorded = trained("mlp", cuda_graph=True, change=read_back)
    losses, weights, _ = trained("mlp", cuda_graph=False, change=read_back)
    assert not recorded
    torch.testing.assert_close(graph_losses, losses, rtol=1e-4, atol=1e-6)
    for ours, expected in zip(graph_weights, weights, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
