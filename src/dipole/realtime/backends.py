"""What computes a policy's network: eager torch, torch.compile, ... A back end never changes weights or state keys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

from dipole.compiler import need_compiler
from dipole.errors import DipoleError, unknown
from dipole.realtime.cuda_graph import CudaGraphs

PRECISIONS = ("fp32", "bf16", "int8")


def prepare(policy: Any, backend: str = "eager", precision: str = "fp32") -> Any:
    """Return a policy whose network is computed by `backend`; weights are shared, `policy` stays as it is.

    Args:
        policy: A policy module with `network`.
        backend: A name of `BACKENDS`.
        precision: `fp32`, `bf16` or `int8`; not every back end has every one.

    Raises:
        DipoleError: Unknown back end or precision, or a pair that does not exist.
    """
    if backend not in BACKENDS:
        raise unknown("back end", backend, BACKENDS)
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if backend == "eager" and precision == "fp32":
        return policy
    if not isinstance(getattr(policy, "network", None), nn.Module):
        raise DipoleError(f"back end '{backend}': the policy has no network of its own to hand to it")
    return BACKENDS[backend](policy, precision)


def _eager(policy: Any, precision: str) -> Any:
    return with_network(policy, _cast(policy.network, precision, "eager"))


def _compile(policy: Any, precision: str) -> Any:
    network = _cast(policy.network, precision, "compile")
    if _device(network).type == "cuda":  # compiled kernels are launched one by one as well
        network.forward = CudaGraphs(torch.compile(network.forward, dynamic=False))
    else:
        need_compiler("back end 'compile'", "use the back end 'packed' or 'eager'")
        network.compile(dynamic=False)
    return with_network(policy, network)


def _cuda_graph(policy: Any, precision: str) -> Any:
    device = _device(policy.network)
    if device.type != "cuda":
        raise DipoleError(f"back end 'cuda-graph' is for NVIDIA GPUs, the policy is on {device}: use --device cuda")
    network = _cast(policy.network, precision, "cuda-graph")
    network.forward = CudaGraphs(network.forward)
    return with_network(policy, network)


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _packed(policy: Any, precision: str, compiled: bool = False) -> Any:
    from dipole.realtime.packed import DTYPES, check, pack

    if precision not in DTYPES:
        raise DipoleError(f"back end 'packed' has no {precision}: use fp32 or bf16")
    packed = pack(policy.network, DTYPES[precision], compiled=compiled)
    generator = torch.Generator().manual_seed(0)
    cond = {key: torch.randn((1, *size), generator=generator) for key, size in policy.encoder.cond_dims.items()}
    check(packed, policy.network, DTYPES[precision], (1, policy.pred_horizon, policy.action_dim), cond)
    return with_network(policy, packed)


def _whole_chunk(policy: Any, precision: str) -> Any:
    from dipole.realtime.whole_chunk import whole_chunk

    other = copy.copy(policy)
    other.run_sampler = whole_chunk(policy, precision)
    return other


def _cast(network: nn.Module, precision: str, backend: str) -> nn.Module:
    """Return a shallow copy of a network (same parameters) that computes in `precision`."""
    if precision == "int8":
        raise DipoleError(f"back end '{backend}' has no {precision}: use fp32 or bf16")
    network = copy.copy(network)
    if precision == "bf16":
        # An instance's own `forward` comes before its class's, and is no part of the state dict.
        network.forward = _autocast(network.forward)
    return network


def _autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def cast(x: Any, *args: Any, **options: Any) -> Any:
        with torch.autocast(x.device.type, torch.bfloat16):
            return forward(x, *args, **options)

    return cast


def with_network(policy: Any, network: nn.Module) -> Any:
    """Return a shallow copy of a policy with another network in it."""
    other = copy.copy(policy)
    # A shallow copy shares the table of submodules: without a table of its own, the old policy would change as well.
    other._modules = dict(policy._modules)
    other.network = network
    return other


BACKENDS: dict[str, Callable[[Any, str], Any]] = {
    "eager": _eager,
    "compile": _compile,
    "packed": _packed,
    "packed-compiled": partial(_packed, compiled=True),
    "whole-chunk": _whole_chunk,
    "cuda-graph": _cuda_graph,
}
"""Name -> `(policy, precision) -> policy`."""

_ELSEWHERE = {"cpu": ("cuda-graph",), "cuda": ("packed", "packed-compiled", "whole-chunk")}


def faster_backends(device: str) -> list[str]:
    """Return the back ends worth trying on a device (`cpu`, `cuda`, `cuda:0`), besides eager torch."""
    return [name for name in BACKENDS if name not in ("eager", *_ELSEWHERE.get(device.partition(":")[0], ()))]
