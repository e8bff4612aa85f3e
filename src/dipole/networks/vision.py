"""Image encoders: ResNet with spatial softmax, and a small CNN for training without a GPU.

Source: Chi et al. 2023, "Diffusion Policy" (section on visual encoders: ResNet-18, spatial softmax instead of average
pooling, group norm instead of batch norm so that EMA weights work); He et al. 2016 (ResNet); Finn et al. 2016 (spatial
softmax). Parameter names and the order resize, crop, backbone, softmax, linear, ReLU are LeRobot's, so that its
checkpoints load as they are. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from dipole.errors import DipoleError, unknown

BackboneName = Literal["small-cnn", "resnet18", "resnet34"]
# Basic blocks in each of the four stages.
RESNET_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


@dataclass(frozen=True)
class VisionConfig:
    """An image encoder.

    Attributes:
        name: Backbone. `small-cnn` has about 0.25 million parameters and takes a seventh of `resnet18`'s
            arithmetic.
        resize_shape: (H, W) images are first resized to.
        crop_shape: (H, W) cropped from them: at random in training mode, from the centre otherwise.
        crop_random: Whether training crops are random.
        norm: `group` (C/16 groups) or `batch` (only for weights that came with it: EMA spoils its statistics).
        num_keypoints: Of the spatial softmax; each camera and step gives twice as many features.
        separate: One encoder per camera instead of one for all.
    """

    name: BackboneName = "small-cnn"
    resize_shape: tuple[int, int] | None = None
    crop_shape: tuple[int, int] | None = None
    crop_random: bool = True
    norm: Literal["group", "batch"] = "group"
    num_keypoints: int = 32
    separate: bool = False

    def build(self, shapes: Mapping[str, tuple[int, ...]]) -> CameraEncoder:
        """Return the encoder of cameras with these image shapes (H, W, C)."""
        return CameraEncoder(self, shapes)


def _norm(config: VisionConfig, channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 16, channels) if config.norm == "group" else nn.BatchNorm2d(channels)


class BasicBlock(nn.Module):
    """Residual block of ResNet-18 and -34."""

    def __init__(self, config: VisionConfig, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = _norm(config, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = _norm(config, channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), _norm(config, channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, C', H', W']`."""
        skip = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + skip)


def _resnet(config: VisionConfig, channels: int) -> nn.Sequential:
    """Return the ResNet without pooling and classifier, its children in torchvision's order."""
    stages, width_in = [], 64
    for stage, blocks in enumerate(RESNET_BLOCKS[config.name]):
        width, stride = 64 * 2**stage, 1 if stage == 0 else 2
        first = BasicBlock(config, width_in, width, stride)
        stages.append(nn.Sequential(first, *(BasicBlock(config, width, width, 1) for _ in range(blocks - 1))))
        width_in = width
    stem = nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False)
    backbone = nn.Sequential(stem, _norm(config, 64), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1), *stages)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def _small_cnn(config: VisionConfig, channels: int) -> nn.Sequential:
    """Return four convolutions that reduce the image eight times: 84 x 84 -> 11 x 11, finer than a ResNet's 3 x 3."""
    layers: list[nn.Module] = []
    for width, kernel, stride in ((32, 5, 2), (64, 3, 2), (128, 3, 2), (128, 3, 1)):
        layers += [nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False), _norm(config, width)]
        layers.append(nn.ReLU())
        channels = width
    return nn.Sequential(*layers)


class SpatialSoftmax(nn.Module):
    """Expected image coordinates of a softmax over each channel: `[B, C, H, W]` -> `[B, K, 2]`, (x, y) in [-1, 1].

    Args:
        shape: (C, H, W) of the feature map.
        num_keypoints: K; a 1x1 convolution brings C channels to K.
    """

    pos_grid: Tensor

    def __init__(self, shape: tuple[int, int, int], num_keypoints: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.nets = nn.Conv2d(channels, num_keypoints, kernel_size=1)
        # Through numpy in float64, as in the published weights: torch.linspace rounds differently.
        x, y = np.meshgrid(np.linspace(-1.0, 1.0, width), np.linspace(-1.0, 1.0, height))
        grid = np.stack([x.ravel(), y.ravel()], axis=1)
        self.register_buffer("pos_grid", torch.from_numpy(grid).float())

    def forward(self, features: Tensor) -> Tensor:
        """Return the keypoints `[B, K, 2]`."""
        attention: Tensor = self.nets(features).flatten(2).softmax(dim=-1)
        return attention @ self.pos_grid


class ImageEncoder(nn.Module):
    """One encoder: `[N, C, H, W]` -> `[N, 2 num_keypoints]`, after any resizing and cropping.

    Args:
        config: Which encoder.
        shape: (C, H, W) of its input.
    """

    def __init__(self, config: VisionConfig, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.backbone = _small_cnn(config, shape[0]) if config.name == "small-cnn" else _resnet(config, shape[0])
        self.pool = SpatialSoftmax(_output_shape(self.backbone, shape), config.num_keypoints)
        self.out = nn.Linear(2 * config.num_keypoints, 2 * config.num_keypoints)

    def forward(self, image: Tensor) -> Tensor:
        """Return the features of `image` `[N, C, H, W]`."""
        return F.relu(self.out(self.pool(self.backbone(image)).flatten(1)))


def _output_shape(backbone: nn.Module, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    # Convolution shapes without computing them: a copy of nothing but shapes.
    training = backbone.training
    with torch.device("meta"), torch.no_grad():
        meta = torch.func.functional_call(
            backbone.eval(),
            {key: torch.empty_like(value, device="meta") for key, value in backbone.state_dict().items()},
            torch.empty(1, *shape),
        )
    backbone.train(training)
    return tuple(meta.shape[1:])


class CameraEncoder(nn.Module):
    """Encodes all cameras of an observation: `{camera: [B, To, C, H, W]}` -> `[B, To, out_dim]`, camera by camera.

    Attributes:
        rgb_encoder: An `ImageEncoder`, or a list of them, one per camera.
        out_dim: Features per observed step.

    Raises:
        DipoleError: The shapes differ though one encoder serves all cameras, or the crop is larger than the image.
    """

    def __init__(self, config: VisionConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.config, self.cameras = config, tuple(shapes)
        inputs = {camera: _input_shape(config, camera, shape) for camera, shape in shapes.items()}
        if config.separate:
            self.rgb_encoder: nn.Module = nn.ModuleList(ImageEncoder(config, shape) for shape in inputs.values())
        elif len(set(inputs.values())) == 1:
            self.rgb_encoder = ImageEncoder(config, next(iter(inputs.values())))
        else:
            raise DipoleError(
                f"one image encoder for cameras of different shapes ({inputs}): give resize_shape, or set separate=True"
            )
        self.out_dim = 2 * config.num_keypoints * len(self.cameras)

    def forward(self, images: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        """Return the features `[B, To, out_dim]`.

        Args:
            images: Per camera float `[B, To, C, H, W]`, or uint8 `[B, To, H, W, C]` (brought to [0, 1]).
            generator: Source of the random crops in training mode; None for torch's global one.
        """
        parts = [self._prepared(images[camera], generator) for camera in self.cameras]
        if isinstance(self.rgb_encoder, nn.ModuleList):
            features = [encoder(part) for encoder, part in zip(self.rgb_encoder, parts, strict=True)]
        else:
            together = self.rgb_encoder(torch.cat(parts) if len(parts) > 1 else parts[0])
            # Not `chunk`: with a symbolic batch its number of parts would be one more thing to prove.
            features = list(together.unflatten(0, (len(parts), -1)).unbind(0))
        joined = torch.cat(features, dim=-1) if len(features) > 1 else features[0]
        return joined.view(*images[self.cameras[0]].shape[:2], -1)

    def _prepared(self, image: Tensor, generator: Generator | None) -> Tensor:
        """Return `[B To, C, H, W]`, resized and cropped."""
        if image.dtype == torch.uint8:
            image = image.movedim(-1, -3).float() / 255
        image = image.flatten(0, 1)
        if self.config.resize_shape is not None:
            image = resize(image, self.config.resize_shape)
        if self.config.crop_shape is None:
            return image
        if self.training and self.config.crop_random:
            return random_crop(image, self.config.crop_shape, generator)
        return center_crop(image, self.config.crop_shape)


def _input_shape(config: VisionConfig, camera: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return (C, H, W) of what reaches the backbone for images (H, W, C)."""
    if config.name not in ("small-cnn", *RESNET_BLOCKS):
        raise unknown("image encoder", config.name, ("small-cnn", *RESNET_BLOCKS))
    height, width, channels = shape
    height, width = config.resize_shape or (height, width)
    if config.crop_shape is not None:
        if config.crop_shape[0] > height or config.crop_shape[1] > width:
            raise DipoleError(f"crop_shape {config.crop_shape} is larger than '{camera}', {height} x {width}")
        height, width = config.crop_shape
    return channels, height, width


def resize(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return `[N, C, H, W]` images resized to `shape` (bilinear, antialiased), as torchvision's `Resize` does."""
    if tuple(image.shape[-2:]) == tuple(shape):
        return image
    return F.interpolate(image, size=tuple(shape), mode="bilinear", align_corners=False, antialias=True)


def center_crop(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the central `shape` of `[N, C, H, W]`; half-pixel offsets round to even, as torchvision's do."""
    top, left = (round((size - crop) / 2) for size, crop in zip(image.shape[-2:], shape, strict=True))
    return image[..., top : top + shape[0], left : left + shape[1]]


def random_crop(image: Tensor, shape: tuple[int, int], generator: Generator | None = None) -> Tensor:
    """Return a crop of `shape` at an independent uniform place of each of the images `[N, C, H, W]`."""
    number = image.shape[0]
    device = image.device if generator is None else generator.device
    places = []
    for size, crop in zip(image.shape[-2:], shape, strict=True):
        first = torch.randint(size - crop + 1, (number, 1), generator=generator, device=device).to(image.device)
        places.append(first + torch.arange(crop, device=image.device))
    rows, columns = places
    batch = torch.arange(number, device=image.device)[:, None, None]
    # Indexing puts the channels last, which convolutions like; only the view is turned back.
    return image[batch, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
