"""The graphs of an exported policy: its encoder and its denoising network, or the whole sampler in one.

`torch.export` captures them with a symbolic batch; the result is stored as it is, translated to ONNX, or compiled ahead
of time.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dipole.errors import DipoleError, MissingExtraError
from dipole.policies.diffusion_policy import DiffusionPolicy
from dipole.realtime.export_plan import Plan

Format = Literal["onnx", "torch-export", "aoti"]
FORMATS: tuple[Format, ...] = ("onnx", "torch-export", "aoti")
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2"}
COMPILERS = ("g++", "clang++", "c++")


class _AsItIs:
    """Stands in for the normalizer inside a graph: what comes in is normalised already."""

    def normalize(self, key: str, x: Tensor) -> Tensor:
        return x


class EncoderGraph(nn.Module):
    """`encoder(*features) -> cond`: normalised features, in the configuration's order, to the conditioning sets."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.names = tuple(policy.config.observation)
        self.encoder = policy.encoder

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        """Return the conditioning sets `[B, N, C]`."""
        cond = self.encoder(dict(zip(self.names, features, strict=True)), _AsItIs())
        # A graph's output may not be its input, which it is for a policy that sees one vector.
        return tuple(value.clone() for value in cond.values())


class DenoiserGraph(nn.Module):
    """`denoiser(x, time, *cond) -> output`: one call of the network."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.names = tuple(policy.encoder.cond_dims)
        self.network = policy.network

    def forward(self, x: Tensor, time: Tensor, *cond: Tensor) -> Tensor:
        """Return `[B, Tp, Da]` from `x` `[B, Tp, Da]` and `time` `[B]`."""
        output: Tensor = self.network(x, time, dict(zip(self.names, cond, strict=True)))
        return output


class SamplerGraph(nn.Module):
    """`sampler(noise, *features) -> chunk`: encoder and all steps of a deterministic sampler, unrolled."""

    def __init__(self, policy: DiffusionPolicy, plan: Plan) -> None:
        super().__init__()
        self.encoder, self.denoiser, self.plan = EncoderGraph(policy), DenoiserGraph(policy), plan

    def forward(self, noise: Tensor, *features: Tensor) -> Tensor:
        """Return the whole normalised chunk `[B, Tp, Da]`."""
        cond, clip = self.encoder(*features), self.plan.clip
        samples, x0s = [noise * self.plan.prior_std], []
        for step in self.plan.steps:
            x = samples[-1]
            output = self.denoiser(x * step.c_in, torch.full_like(x[:, 0, 0], step.time), *cond)
            x0s.append(x * step.c_x + output * step.c_out)
            terms = [samples[j] * weight for j, weight in step.samples]
            terms += [x0s[j].clamp(-clip, clip) * weight for j, weight in step.clipped] if clip is not None else []
            terms += [x0s[j] * weight for j, weight in step.x0s]
            samples.append(sum(terms[1:], terms[0]))
        return samples[-1]


def check_tools(form: str) -> None:
    """Raise a DipoleError when a format's packages or tools are missing."""
    if form == "onnx":
        for package in ("onnx", "onnxruntime", "onnxscript"):
            try:
                __import__(package)
            except ImportError:
                raise MissingExtraError(package, "export") from None
    if form == "aoti" and not any(shutil.which(name) for name in COMPILERS):
        raise DipoleError(
            f"--format aoti needs a C++ compiler, and none of {', '.join(COMPILERS)} was found: install one, "
            "or choose torch-export or onnx"
        )


def write_graph(
    graph: nn.Module, arguments: tuple[Tensor, ...], names: tuple[list[str], list[str]], path: Path, form: str
) -> None:
    """Capture a graph with a symbolic batch (first axis of every argument) and write it.

    Args:
        graph: A module.
        arguments: Examples, batch 2 (a batch of 1 would be taken for a constant).
        names: Of the inputs and of the outputs.
        path: File without suffix.
        form: One of `FORMATS`.

    Raises:
        DipoleError: The network cannot be captured, or the format cannot represent it.
    """
    batch = torch.export.Dim("batch")
    # Positional arguments of a *args forward are one tuple.
    shapes = _dynamic_shapes(graph, arguments, batch)
    target = path.with_suffix(SUFFIXES[form])
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(graph.eval(), arguments, dynamic_shapes=shapes)
            if form == "torch-export":
                torch.export.save(program, target)
            elif form == "aoti":
                torch._inductor.aoti_compile_and_package(program, package_path=str(target))
            else:
                onnx: Any = torch.onnx.export(program, (), input_names=names[0], output_names=names[1], dynamo=True)
                onnx.save(str(target), external_data=False)
    except DipoleError:
        raise
    except Exception as error:  # each of the three exporters has errors of its own kind
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()[:200]
        raise DipoleError(f"the {path.name} cannot be exported as {form}: {reason}") from None


def _dynamic_shapes(graph: nn.Module, arguments: tuple[Tensor, ...], batch: Any) -> tuple[Any, ...]:
    named = {EncoderGraph: 0, DenoiserGraph: 2, SamplerGraph: 1}[type(graph)]  # arguments before *rest
    axes = [{0: batch}] * len(arguments)
    return (*axes[:named], tuple(axes[named:]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress reports from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
