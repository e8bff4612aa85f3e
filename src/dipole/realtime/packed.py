"""Back end `packed`: the same networks, laid out for one small batch on a CPU.

A chunk is denoised by calling one network a few times with the same observation, at levels known before. So what
depends on the observation or the level alone is computed once per chunk for all levels (FiLM projections, step
encodings), convolutions over 4-16 positions become one matrix product each, and large weights are stored in the order
in which oneDNN reads them. At batch 1 a step then costs little more than reading the weights once; in bfloat16 half
of that. Weights are copied: pack again after they change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipole.errors import DipoleError

# Smaller products cost more in their call than they save in reading (measured with AVX-512).
_PACK_FROM = 60_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Packed against original on random input, relative to the largest output: rounding is 1e-6 and 2e-2.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}


class PackedLinear:
    """`y = x W^T + b` with `W` `[out, in]` stored as oneDNN reads it fastest (`x`: `[rows, in]`).

    Args:
        weight: `[out, in]`.
        bias: `[out]`, or None.
        dtype: float32 or bfloat16.
        rows: Rows of `x` to expect; the layout suits others as well. 0 to leave the layout to a compiler.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int) -> None:
        self.weight = frozen(weight, dtype)
        self.bias = None if bias is None else frozen(bias, dtype)
        self.packed = rows > 0 and can_pack() and self.weight.numel() >= _PACK_FROM
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """Return `[rows, out]`."""
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return out
        return F.linear(x, self.weight, self.bias)


def frozen(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy that a compiler takes for a constant."""
    return nn.Parameter(weight.detach().to(dtype, copy=True).contiguous(), requires_grad=False)


def can_pack() -> bool:
    """Return whether this build of torch has oneDNN's packed products (they are what torch.compile uses)."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class PackedNetwork(Protocol):
    """What a packed network is made of: constants per level and conditioning first, then the steps."""

    def constants(self, times: Tensor, cond: Mapping[str, Tensor] | None) -> list[Any]:
        """Return for each of `times` (`[K]`, or `[K, ...]` with levels per position) what `step` needs besides `x`."""

    def step(self, x: Tensor, constants: Any, hook: Any = None) -> Tensor:
        """Return the network's output `[B, T, D]`."""


class Packed(nn.Module):
    """A packed network with the call of an ordinary one.

    Args:
        body: The packed network.
        branches: Names of its residual branches, for hooks.
    """

    def __init__(self, body: PackedNetwork, branches: tuple[str, ...]) -> None:
        super().__init__()
        self.body = body
        self.branches = branches

    def forward(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor] | None = None, hook: Any = None) -> Tensor:
        """Return what the original network returns, `[B, T, D]`.

        Args:
            x: `[B, T, D]` noisy chunk.
            time: `[B]` level of each sample, or `[B, T]` of each position.
            cond: Name -> `[B, N, C]`.
            hook: See `dipole.networks.hooks`.
        """
        with torch.no_grad():
            return self.body.step(x, self.body.constants(time.unsqueeze(0), cond)[0], hook)

    def prepare(self, times: Tensor, cond: Mapping[str, Tensor] | None) -> Any:
        """Return a network for these levels `[K]` and this conditioning only; levels per row or position: itself."""
        if times.dim() != 1:
            return self
        with torch.no_grad():
            times = times.to(torch.float32)
            return _Prepared(self, dict(zip(times.tolist(), self.body.constants(times, cond), strict=True)))


class _Prepared:
    """A packed network that has computed the constants of the levels it will be called at."""

    def __init__(self, network: Packed, constants: dict[float, Any]) -> None:
        self.network, self.constants, self.branches = network, constants, network.branches

    def __call__(self, x: Tensor, time: Tensor, cond: Any = None, hook: Any = None) -> Tensor:
        # Samplers tell a level shared by all rows as one number, expanded.
        shared = time.dim() == 1 and (len(time) == 1 or time.stride(0) == 0 or bool((time == time[0]).all()))
        constants = self.constants.get(float(time[0])) if shared else None
        if constants is None:
            out: Tensor = self.network(x, time, cond, hook)
            return out
        with torch.no_grad():
            return self.network.body.step(x, constants, hook)


def pack(network: nn.Module, dtype: torch.dtype = torch.float32, rows: int = 4, compiled: bool = False) -> Packed:
    """Return a network packed for inference on a CPU.

    Args:
        network: A `UNet1D` or an `MLP`.
        dtype: float32 or bfloat16, of weights and activations.
        rows: Rows of a typical matrix product: batch times positions for a U-Net, batch for an MLP.
        compiled: Compile the steps (`dipole.realtime.packed_compiled`).

    Raises:
        DipoleError: The network is of another kind, or not on a CPU, or the packed one computes something else.
    """
    from dipole.realtime.packed_compiled import CompiledNetwork

    parameter = next(network.parameters())
    if parameter.device.type != "cpu":
        raise DipoleError(f"back end 'packed' is for CPUs, the policy is on {parameter.device}: use 'compile'")
    if parameter.dtype != torch.float32:
        raise DipoleError(f"back end 'packed' packs float32 weights, these are {parameter.dtype}: load them as float32")
    body = packed_body(network, dtype, 0 if compiled else rows)
    if body is None:
        raise DipoleError(
            f"back end 'packed' knows U-Nets and MLPs, not {type(network).__name__}: use 'eager' or 'compile'"
        )
    branches: Any = network.branches
    return Packed(CompiledNetwork(body) if compiled else body, branches).eval()


def packed_body(network: nn.Module, dtype: torch.dtype, rows: int) -> PackedNetwork | None:
    """Return the packed form of a network, None if it has none; `rows`: see `pack`, 0 for a compiler to lay out."""
    from dipole.networks.mlp import MLP
    from dipole.networks.unet1d import UNet1D
    from dipole.realtime.packed_mlp import PackedMLP
    from dipole.realtime.packed_unet1d import PackedUNet1D

    kinds: dict[type[nn.Module], Callable[..., PackedNetwork]] = {UNet1D: PackedUNet1D, MLP: PackedMLP}
    return kinds[type(network)](network, dtype, rows) if type(network) in kinds else None


def check(packed: Packed, network: nn.Module, dtype: torch.dtype, shape: tuple[int, ...], cond: Any) -> float:
    """Return the largest relative difference between a packed network and its original on random input.

    The packed products are no public interface of torch: a build in which they mean something else must be noticed
    before a robot moves.

    Args:
        packed: The packed network.
        network: The original.
        dtype: What it was packed in.
        shape: `[B, T, D]`.
        cond: Conditioning of these rows.

    Raises:
        DipoleError: They differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    x, time = torch.randn(shape, generator=generator), torch.full(shape[:1], 300.0)
    with torch.no_grad():
        expected = network(x, time, cond)
        error = float((packed(x, time, cond) - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not error <= TOLERANCE[dtype]:
        raise DipoleError(
            f"back end 'packed' differs from the network by {error:.1e} of its output with this torch "
            f"({torch.__version__}): use the back end 'eager' and report it"
        )
    return error
