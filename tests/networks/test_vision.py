import math

import numpy as np
import pytest
import torch

from dipole import networks
from dipole.errors import DipoleError
from dipole.networks import VisionConfig
from dipole.networks.vision import SpatialSoftmax, center_crop, random_crop, resize


def coded(number, height, width):
    """Images whose pixel (r, c) of image n is n 10^4 + 100 r + c, in each of two channels (the second negated)."""
    value = 100.0 * torch.arange(height)[:, None] + torch.arange(width) + 1e4 * torch.arange(number)[:, None, None]
    return torch.stack([value, -value], dim=1)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 3), (1, 4)])
@pytest.mark.parametrize("peak", [0.0, 2.0, 50.0])
def test_spatial_softmax_of_a_one_hot_map(row, column, peak):
    """One pixel at v, the rest at 0: as the grid sums to zero, E[xy] = (e^v - 1) / (e^v + HW - 1) of that pixel's."""
    height, width = 3, 5
    pool = SpatialSoftmax((2, height, width), num_keypoints=2).double()
    with torch.no_grad():
        pool.nets.weight.copy_(torch.eye(2)[:, :, None, None])
        pool.nets.bias.copy_(torch.tensor([0.3, -7.0]))  # a constant cannot matter
        features = torch.zeros(1, 2, height, width, dtype=torch.float64)
        features[0, 1, row, column] = peak
        keypoints = pool(features)
    place = torch.tensor([-1 + 2 * column / (width - 1), -1 + 2 * row / (height - 1)], dtype=torch.float64)
    share = (math.exp(peak) - 1) / (math.exp(peak) + height * width - 1)
    # The grid is stored in float32, as in published weights.
    torch.testing.assert_close(keypoints[0, 1], share * place, atol=1e-7, rtol=0)
    torch.testing.assert_close(keypoints[0, 0], torch.zeros(2, dtype=torch.float64), atol=1e-7, rtol=0)


def test_keypoint_grid_order():
    grid = SpatialSoftmax((1, 2, 3), 1).pos_grid
    assert grid.tolist() == [[-1, -1], [0, -1], [1, -1], [-1, 1], [0, 1], [1, 1]]


def test_random_crops_are_windows_of_their_own_image():
    images = coded(50, 9, 12)
    crops = random_crop(images, (4, 5), torch.Generator().manual_seed(0))
    offsets = set()
    for n, crop in enumerate(crops):
        top, left = divmod(int(crop[0, 0, 0]) - 10000 * n, 100)
        assert torch.equal(crop, images[n, :, top : top + 4, left : left + 5])
        offsets.add((top, left))
    assert len(offsets) > 20  # 50 draws among 6 x 8 places: fewer than 21 different ones has odds below 1e-5


def test_random_crops_reach_every_place():
    crops = random_crop(coded(1, 5, 6).expand(500, -1, -1, -1), (4, 4), torch.Generator().manual_seed(0))
    corners = {divmod(int(crop[0, 0, 0]), 100) for crop in crops}
    # 6 places; one of them is missed by 500 draws with odds of 6 (5/6)^500 < 1e-38.
    assert corners == {(top, left) for top in range(2) for left in range(3)}


def test_random_crops_come_from_the_generator():
    images = coded(8, 9, 12)
    first, second = (random_crop(images, (4, 5), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, random_crop(images, (4, 5), torch.Generator().manual_seed(4)))
    state = torch.get_rng_state()
    random_crop(images, (4, 5), torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("size", "first"), [(4, 0), (6, 1), (7, 2), (5, 0), (9, 2)])
def test_centre_crop_rounds_half_to_even(size, first):
    crop = center_crop(coded(1, size, 4), (4, 4))
    assert int(crop[0, 0, 0, 0]) == 100 * first


def test_resize_by_half_is_the_antialiasing_triangle():
    """Bilinear with antialiasing, twice smaller: each output is (1, 3, 3, 1)/8 of its neighbourhood, in both axes."""
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = torch.tensor([1, 3, 3, 1], dtype=torch.float64) / 8
    small = resize(image, (4, 4))
    for i, j in ((1, 1), (1, 2), (2, 1)):
        window = image[0, 0, 2 * i - 1 : 2 * i + 3, 2 * j - 1 : 2 * j + 3]
        torch.testing.assert_close(small[0, 0, i, j], kernel @ window @ kernel, atol=1e-12, rtol=0)
    assert resize(image, (8, 8)) is image


SHAPES = {"observation.images.top": (40, 48, 3), "observation.images.wrist": (40, 48, 3)}


def make(seed=0, shapes=SHAPES, **options):
    torch.manual_seed(seed)
    return VisionConfig(num_keypoints=4, **options).build(shapes)


def images(batch=2, steps=3, shapes=SHAPES, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.rand(batch, steps, c, h, w, generator=g) for k, (h, w, c) in shapes.items()}


backbones = pytest.mark.parametrize("name", ["small-cnn", "resnet18"])


@backbones
@pytest.mark.parametrize("separate", [False, True])
def test_features_are_camera_by_camera(name, separate):
    encoder, seen = make(name=name, separate=separate).eval(), images()
    with torch.no_grad():
        features = encoder(seen)
        assert features.shape == (2, 3, encoder.out_dim) == (2, 3, 16)
        for n, camera in enumerate(SHAPES):
            own = encoder.rgb_encoder[n] if separate else encoder.rgb_encoder
            for step in range(3):
                part = features[:, step, 8 * n : 8 * n + 8]
                # Convolutions of batches of different sizes round differently.
                torch.testing.assert_close(part, own(seen[camera][:, step]), atol=1e-5, rtol=1e-5)


def test_a_separate_encoder_has_its_own_weights():
    keys = make(separate=True).state_dict().keys()
    assert {key.split(".")[1] for key in keys} == {"0", "1"}
    assert {key.split(".")[1] for key in make().state_dict()} == {"backbone", "pool", "out"}


@backbones
def test_uint8_images_are_float_images(name):
    encoder = make(name=name).eval()
    bytes_ = {
        key: torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 1, *shape), dtype=np.uint8))
        for key, shape in SHAPES.items()
    }
    floats = {key: value.permute(0, 1, 4, 2, 3).float().contiguous() / 255 for key, value in bytes_.items()}
    with torch.no_grad():
        # The memory layouts differ, and with them the order of the convolutions' sums.
        torch.testing.assert_close(encoder(bytes_), encoder(floats), atol=1e-5, rtol=1e-5)


def test_crops_are_random_in_training_and_central_otherwise():
    encoder, seen = make(crop_shape=(32, 36)), images()

    def run(seed):
        with torch.no_grad():
            return encoder(seen, generator=torch.Generator().manual_seed(seed))

    encoder.train()
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    encoder.eval()
    assert torch.equal(run(0), run(1))
    central = {key: value[..., 4:36, 6:42] for key, value in seen.items()}
    uncropped = make(shapes=dict.fromkeys(SHAPES, (32, 36, 3))).eval()
    uncropped.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(uncropped(central), run(0), atol=1e-5, rtol=1e-5)
    fixed = make(crop_shape=(32, 36), crop_random=False).train()
    with torch.no_grad():
        assert torch.equal(fixed(seen), fixed(seen))


def test_resize_comes_before_the_crop():
    encoder, seen = make(resize_shape=(20, 24), crop_shape=(16, 16)).eval(), images()
    plain = make(shapes=dict.fromkeys(SHAPES, (16, 16, 3))).eval()
    plain.load_state_dict(encoder.state_dict())
    small = {
        key: torch.stack([center_crop(resize(step, (20, 24)), (16, 16)) for step in value.unbind(1)], 1)
        for key, value in seen.items()
    }
    with torch.no_grad():
        torch.testing.assert_close(encoder(seen), plain(small))


@backbones
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_gradient_reaches_every_parameter(name, norm):
    encoder = make(name=name, norm=norm).train()
    encoder(images(batch=4)).square().sum().backward()
    assert [k for k, p in encoder.named_parameters() if p.grad is None or not bool((p.grad != 0).any())] == []


@pytest.mark.parametrize(("name", "backbone"), [("resnet18", 11_176_512), ("resnet34", 21_284_672)])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_resnets_have_the_published_number_of_parameters(name, backbone, norm):
    """torchvision's 11,689,512 and 21,797,672, less the classifier's 513,000."""
    with torch.device("meta"):
        encoder = VisionConfig(name=name, norm=norm).build({"camera": (96, 96, 3)})
    assert sum(p.numel() for p in encoder.rgb_encoder.backbone.parameters()) == backbone


def test_small_cnn_is_small():
    encoder = VisionConfig(crop_shape=(84, 84)).build({"camera": (96, 96, 3)})
    assert sum(p.numel() for p in encoder.parameters()) < 300_000
    assert encoder.rgb_encoder.pool.pos_grid.shape == (11 * 11, 2)


def test_building_draws_the_same_weights_whatever_the_image_size():
    """The shape of the feature map is found without touching the random state or batch statistics."""
    small, large = (make(norm="batch", shapes={"camera": (size, size, 3)}) for size in (32, 64))
    for key in ("backbone.0.weight", "out.weight"):
        assert torch.equal(small.rgb_encoder.get_parameter(key), large.rgb_encoder.get_parameter(key))
    assert bool((small.rgb_encoder.get_buffer("backbone.1.running_mean") == 0).all())


@pytest.mark.parametrize(
    ("options", "shapes", "message"),
    [
        ({"crop_shape": (41, 10)}, SHAPES, "larger than 'observation.images.top', 40 x 48"),
        ({"resize_shape": (20, 20), "crop_shape": (24, 24)}, SHAPES, "larger than"),
        ({}, {"a": (32, 32, 3), "b": (32, 40, 3)}, "resize_shape, or set separate=True"),
        ({"name": "vgg"}, SHAPES, "unknown image encoder 'vgg'"),
    ],
)
def test_impossible_encoders(options, shapes, message):
    with pytest.raises(DipoleError, match=message):
        VisionConfig(**options).build(shapes)


def test_cameras_of_different_shapes():
    shapes = {"a": (32, 32, 3), "b": (32, 40, 1)}
    separate = make(shapes=shapes, separate=True).eval()
    assert separate(images(shapes=shapes)).shape == (2, 3, 16)
    shapes["b"] = (32, 40, 3)
    assert make(shapes=shapes, resize_shape=(24, 24)).eval()(images(shapes=shapes)).shape == (2, 3, 16)


def test_tables():
    full = networks.full_vision_config("resnet18")
    assert full["norm"] == "group"
    assert networks.full_vision_config(full) == full
    encoder = networks.build_vision({**full, "crop_shape": [24, 24]}, {"camera": (32, 32, 3)})
    assert encoder.config == VisionConfig(name="resnet18", crop_shape=(24, 24))
    with pytest.raises(DipoleError, match="did you mean 'crop_shape'"):
        networks.full_vision_config({"name": "resnet18", "crop": [24, 24]})
