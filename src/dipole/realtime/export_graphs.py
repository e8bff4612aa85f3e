"""The graphs of an exported policy: its encoder and its denoising network, or the whole sampler in one.

`torch.export` captures them with a symbolic batch; the result is stored as it is, translated to ONNX, or compiled ahead
of time.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dipole.compiler import need_compiler
from dipole.errors import DipoleError, MissingExtraError
from dipole.policies.diffusion_policy import DiffusionPolicy
from dipole.realtime.export_plan import Plan

Format = Literal["onnx", "torch-export", "aoti"]
FORMATS: tuple[Format, ...] = ("onnx", "torch-export", "aoti")
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2"}


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
        cond = self.encoder(*features)

        def call(k: int, x: Tensor) -> Tensor:
            return at_level(self.denoiser, x, self.plan.steps[k].time, *cond)

        return run_plan(self.plan, call, noise * self.plan.prior_std)


def at_level(network: Callable[..., Tensor], x: Tensor, time: float, *cond: Any) -> Tensor:
    """Return `network(x, time, *cond)` with every row of `x` `[B, T, D]` at one level."""
    return network(x, torch.full_like(x[:, 0, 0], time), *cond)


def run_plan(plan: Plan, call: Callable[[int, Tensor], Tensor], start: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return the last sample of a plan's steps, `[B, T, D]`.

    Args:
        plan: The steps.
        call: `call(k, x) -> output`: step k's network call.
        start: Sample 0.
        noise: `[B, S, T, D]`, the standard normal noise of the S steps that draw any, in order.
    """
    samples, x0s, drawn, clip = [start], [], 0, plan.clip
    for k, step in enumerate(plan.steps):
        x = samples[-1]
        x0s.append(x * step.c_x + call(k, x * step.c_in) * step.c_out)
        terms = [samples[j] * weight for j, weight in step.samples]
        terms += [x0s[j].clamp(-clip, clip) * weight for j, weight in step.clipped] if clip is not None else []
        terms += [x0s[j] * weight for j, weight in step.x0s]
        if step.std > 0 and noise is not None:
            terms.append(noise[:, drawn] * step.std)
            drawn += 1
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
    if form == "aoti":
        need_compiler("--format aoti", "choose torch-export or onnx")


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
    target = path.with_suffix(SUFFIXES[form])
    try:
        with quiet(), torch.no_grad():
            program = capture(graph, arguments)
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
        raise DipoleError(f"the {path.name} cannot be exported as {form}: {first_line(error)}") from None


def capture(graph: nn.Module, arguments: tuple[Tensor, ...], *, symbolic: bool = True) -> Any:
    """Return what `torch.export` makes of a graph; `symbolic`: for any number of rows, else for that of `arguments`."""
    shapes = None
    if symbolic:
        named = [p for p in signature(graph.forward).parameters.values() if p.kind is not Parameter.VAR_POSITIONAL]
        axes = [{0: torch.export.Dim("batch")}] * len(arguments)
        # Positional arguments of a *args forward are one tuple.
        shapes = (*axes[: len(named)], tuple(axes[len(named) :]))
    return torch.export.export(graph.eval(), arguments, dynamic_shapes=shapes)


def first_line(error: Exception) -> str:
    """Return what one line can say about an error of torch's exporters and compilers."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' progress reports from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
