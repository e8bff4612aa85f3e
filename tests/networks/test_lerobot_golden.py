"""Networks against what LeRobot 0.4.4 and 0.3.3 computed with the same weights.

Tolerance 1e-5 throughout: values are of order one, computed in float32 by two sequences of operations.
"""

import math

import lerobot_golden as golden
import pytest
import torch

from dipole.networks import UNet1DConfig, VisionConfig


def make_unet(name):
    config, io = golden.config(name), golden.results(name)
    network = UNet1DConfig(
        down_dims=tuple(config["down_dims"]),
        kernel_size=config["kernel_size"],
        n_groups=config["n_groups"],
        step_embed_dim=config["diffusion_step_embed_dim"],
        film_scale=config["use_film_scale_modulation"],
    ).build(2, config["horizon"], {"obs": (1, io["global_cond"].shape[1])})
    network.load_state_dict(golden.weights(name, "diffusion.unet."), strict=True)
    return network.eval(), io, {"obs": io["global_cond"][:, None]}


@pytest.mark.parametrize("name", [golden.IMAGE, golden.STATE])
def test_unet_output(name):
    network, io, cond = make_unet(name)
    with torch.no_grad():
        output = network(io["noise"], torch.full((3,), 50.0), cond)
    torch.testing.assert_close(output, io["unet_at_t50"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [golden.IMAGE, golden.STATE])
def test_unet_output_one_row_at_a_time(name):
    """A batch of one takes the matrix-product path of `Conv1d`."""
    network, io, cond = make_unet(name)
    with torch.no_grad():
        rows = [
            network(io["noise"][i : i + 1], torch.tensor([50.0]), {"obs": cond["obs"][i : i + 1]}) for i in range(3)
        ]
    torch.testing.assert_close(torch.cat(rows), io["unet_at_t50"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [golden.OLD_STATE, golden.STATE, golden.IMAGE])
def test_ten_ddim_steps_written_out(name):
    """The executed slice of DDIM-10 as `diffusers` does it: clip x0, keep the predicted noise."""
    network, io, cond = make_unet(name)
    f = [math.cos((i / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(101)]
    alpha_bar = torch.cumprod(torch.tensor([1 - min(1 - f[i + 1] / f[i], 0.999) for i in range(100)]), 0)
    x = io["noise"]
    with torch.no_grad():
        for t in range(90, -1, -10):
            before = alpha_bar[t - 10] if t >= 10 else torch.ones(())
            eps = network(x, torch.full((3,), float(t)), cond)
            x0 = ((x - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()).clamp(-1, 1)
            x = before.sqrt() * x0 + (1 - before).sqrt() * eps
    # Ten steps, the first of which divides by sqrt(alpha_bar) of about 0.15: the tolerance is ten times the others'.
    torch.testing.assert_close(x[:, 1:9], io["chunk_normalized"], atol=1e-4, rtol=0)


def test_image_encoder():
    config, io, stats = golden.config(golden.IMAGE), golden.results(golden.IMAGE), golden.stats(golden.IMAGE)
    encoder = VisionConfig(
        name=config["vision_backbone"],
        crop_shape=tuple(config["crop_shape"]),
        num_keypoints=config["spatial_softmax_num_keypoints"],
    ).build({"observation.image": (96, 96, 3)})
    encoder.rgb_encoder.load_state_dict(golden.weights(golden.IMAGE, "diffusion.rgb_encoder."), strict=True)

    def steps(key):
        return torch.stack([io[f"obs0.{key}"], io[f"obs1.{key}"]], dim=1)

    image = (steps("observation.image") - stats["observation.image.mean"]) / (stats["observation.image.std"] + 1e-8)
    low, high = stats["observation.state.min"], stats["observation.state.max"]
    state = 2 * (steps("observation.state") - low) / (high - low) - 1
    with torch.no_grad():
        features = encoder.eval()({"observation.image": image})
    cond = torch.cat([state, features], dim=-1).flatten(1)
    torch.testing.assert_close(cond, io["global_cond"], atol=1e-5, rtol=1e-5)


def test_keypoint_grid_is_bit_identical():
    encoder = VisionConfig(name="resnet18", crop_shape=(84, 84), num_keypoints=16).build({"camera": (96, 96, 3)})
    grid = golden.weights(golden.IMAGE, "diffusion.rgb_encoder.pool.")["pos_grid"]
    assert torch.equal(encoder.rgb_encoder.pool.pos_grid, grid)


# Counts of LeRobot's own networks, and of diffusion_policy's for PushT (state: 2 x 20 numbers; image: 2 x 66).
@pytest.mark.parametrize(
    ("dims", "embed", "obs", "millions"),
    [
        ((256, 512, 1024), 256, 20, 65.8),
        ((512, 1024, 2048), 128, 66, 251.5),
        ((64, 128, 256), 128, 18, 4.5),
        ((256, 512, 1024), 128, 18, 63.5),
        ((512, 1024, 2048), 128, 18, 248.8),
    ],
)
def test_published_parameter_counts(dims, embed, obs, millions):
    with torch.device("meta"):
        network = UNet1DConfig(down_dims=dims, step_embed_dim=embed).build(2, 16, {"obs": (2, obs)})
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions
