"""The FiLM-MLP with its constants computed once per chunk: see `dipole.realtime.packed`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipole.networks.embedding import flatten_cond
from dipole.networks.hooks import BlockHook, branch
from dipole.networks.mlp import MLP, FiLMBlock
from dipole.realtime.packed import PackedLinear, frozen


class Constants(NamedTuple):
    """What a step needs besides the chunk: the conditioning's part of the stem and each block's scale and shift."""

    stem: Tensor
    films: list[tuple[Tensor, Tensor]]


class PackedMLP:
    """The function of an `MLP`, packed.

    Args:
        network: The original; its small encoders are used as they are, everything else is copied.
        dtype: Of weights and activations.
        rows: See `pack`.
    """

    def __init__(self, network: MLP, dtype: torch.dtype, rows: int) -> None:
        def packed(linear: nn.Linear, columns: slice = slice(None), bias: bool = True) -> PackedLinear:
            return PackedLinear(linear.weight[:, columns], linear.bias if bias else None, dtype, rows)

        self.dtype, self.cond_names, self.branches = dtype, network.cond_names, network.branches
        self.step_encoder, self.cond_encoder = network.step_encoder, network.cond_encoder
        chunk = network.head.out_features
        self.stem = packed(network.stem, slice(chunk), bias=False)
        self.stem_cond, self.stem_bias = network.stem.weight[:, chunk:].detach(), network.stem.bias.detach()
        blocks = [block for block in network.blocks if isinstance(block, FiLMBlock)]
        self.film = torch.cat([block.film.weight for block in blocks]).detach()
        self.film_bias = torch.cat([block.film.bias for block in blocks]).detach()
        self.width = network.stem.out_features
        self.blocks = [(packed(block.inner), packed(block.outer)) for block in blocks]
        self.norm_weight, self.norm_bias = frozen(network.norm.weight, dtype), frozen(network.norm.bias, dtype)
        self.head = packed(network.head)

    def constants(self, times: Tensor, cond: Mapping[str, Tensor] | None) -> list[Constants]:
        """Return the constants of each of `times` (`[K]`, `[K, B]` or `[K, B, T]`)."""
        count = len(times)
        context = self.step_encoder(times.reshape(-1, *times.shape[2:]) if times.dim() > 1 else times)
        context = context.view(count, -1, context.shape[-1])
        flat, stem = flatten_cond(cond, self.cond_names), self.stem_bias
        if flat is not None and self.cond_encoder is not None:
            context = context + self.cond_encoder(flat)
            stem = F.linear(flat, self.stem_cond, stem)
        stem = stem.to(self.dtype)
        films = F.linear(F.mish(context), self.film, self.film_bias).to(self.dtype)
        constants = []
        for one in films:
            pairs = (pair.chunk(2, dim=-1) for pair in one.split(2 * self.width, dim=-1))
            constants.append(Constants(stem, [(1 + scale, shift) for scale, shift in pairs]))
        return constants

    def step(self, x: Tensor, constants: Constants, hook: BlockHook | None = None) -> Tensor:
        """Return the network's output `[B, T, D]` for `x` `[B, T, D]` and one entry of `constants`."""
        h = self.stem(x.flatten(1).to(self.dtype)) + constants.stem
        for name, block, film in zip(self.branches, self.blocks, constants.films, strict=True):
            h = h + branch(hook, name, self._branch, h, block, film)
        out = self.head(F.layer_norm(h, (self.width,), self.norm_weight, self.norm_bias))
        return out.to(x.dtype).view_as(x)

    def _branch(self, h: Tensor, block: tuple[PackedLinear, PackedLinear], film: tuple[Tensor, Tensor]) -> Tensor:
        inner, outer = block
        normed = torch.addcmul(film[1], F.layer_norm(h, (self.width,)), film[0])
        return outer(F.mish(inner(normed)))
