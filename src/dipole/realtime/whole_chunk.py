"""Back end `whole-chunk`: all denoising steps of a chunk compiled into one graph, without Python between them.

The graph is that of an export (`export_plan`, `export_graphs`) for one row, compiled for this processor when the first
chunk is asked for, which takes a quarter of a minute or more, and kept in memory. Several rows go through it one after
the other: a row's chunk does not depend on the batch it is in, and there is never another size to wait for. U-Nets and
MLPs are captured in their packed form (`dipole.realtime.packed`), in which what depends on the level alone is a
constant of the graph. Noise that the steps draw is drawn before, from the same generators in the same order. Weights
are copied: prepare again after they change.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dipole.compiler import need_compiler
from dipole.diffusion import Denoiser, Kernel, Process, sample
from dipole.diffusion.process_view import ProcessView
from dipole.diffusion.solvers import Solver
from dipole.diffusion.tensors import Random, randn
from dipole.errors import DipoleError
from dipole.policies.diffusion_policy import DiffusionPolicy
from dipole.realtime.export_graphs import at_level, capture, first_line, quiet, run_plan
from dipole.realtime.export_plan import Plan, make_plan, plan_of
from dipole.realtime.packed import DTYPES, TOLERANCE, PackedNetwork, packed_body

_MAX_CALLS = 30


class ChunkGraph(nn.Module):
    """`chunk(start, *noise, *cond) -> x0`: all steps of a plan.

    Args:
        network: `network(x, time, cond)`; or a packed one's body.
        plan: The steps.
        names: Of the conditioning sets, in the order of the arguments.
    """

    times: Tensor

    def __init__(self, network: nn.Module | PackedNetwork, plan: Plan, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.plan, self.names = network, plan, names
        self.register_buffer("times", torch.tensor([step.time for step in plan.steps]), persistent=False)

    def forward(self, start: Tensor, *rest: Tensor) -> Tensor:
        """Return `[B, Tp, Da]` from sample 0, the noise `[B, S, Tp, Da]` if steps draw any, and conditioning sets."""
        noise = None if self.plan.deterministic else rest[0]
        cond = dict(zip(self.names, rest[-len(self.names) :], strict=True))
        return run_plan(self.plan, self.calls(cond), start, noise)

    def calls(self, cond: dict[str, Tensor]) -> Callable[[int, Tensor], Tensor]:
        """Return `call(k, x)`, the network's output `[B, Tp, Da]` at the level of step k."""
        network = self.network
        if isinstance(network, nn.Module):
            # `forward` itself: hooks that count calls would count the capturing.
            return lambda k, x: at_level(network.forward, x, self.plan.steps[k].time, cond)
        constants = network.constants(self.times, cond)
        return lambda k, x: network.step(x, constants[k])


class WholeChunk:
    """Stands in for `sample` in a policy; see the module's docstring.

    Args:
        policy: The policy whose network is compiled.
        dtype: Of weights and activations; float32 unless the network can be packed.

    Calls of several threads must not overlap while a graph is made.
    """

    def __init__(self, policy: DiffusionPolicy, dtype: torch.dtype) -> None:
        self.denoiser, self.dtype = policy.denoiser, dtype
        self.names = tuple(policy.encoder.cond_dims)
        self.network = packed_body(policy.network, dtype, 0) or policy.network
        self._programs: dict[Any, _Program] = {}

    def __call__(
        self,
        denoiser: Denoiser,
        process: Process,
        levels: Tensor,
        kernel: Kernel | Solver,
        *,
        cond: dict[str, Tensor],
        init: Tensor,
        generator: Random = None,
        **options: Any,
    ) -> Tensor:
        """Return what `sample` returns; with `options`, which look between the steps, `sample` itself is called.

        Raises:
            DipoleError: The denoiser is guided, or the graph cannot be compiled.
        """
        bare = denoiser.denoiser if isinstance(denoiser, ProcessView) else denoiser
        if bare is not self.denoiser and bare != self.denoiser:
            raise DipoleError("back end 'whole-chunk' compiles the bare network, not a guided one: use 'packed'")
        if options:
            chunk: Tensor = sample(
                denoiser, process, levels, kernel, cond=cond, init=init, generator=generator, **options
            )
            return chunk
        # The graph reads memory as it was laid out when it was compiled, and does not look how it is now.
        inputs = [init.contiguous(), *[cond[name].contiguous() for name in self.names]]
        layout = [(value.shape[1:], value.dtype) for value in inputs]
        key = (process, kernel, torch.get_num_threads(), *levels.tolist(), *layout)
        program = self._programs.get(key)
        if program is None:
            plan = _limited(plan_of(self.denoiser, process, levels, kernel))
            program = _Program(ChunkGraph(self.network, plan, self.names), self.dtype)
            self._programs[key] = program
        return program(inputs, generator)


class _Program:
    """A graph, compiled when it is called first, and what it takes to call it.

    Args:
        graph: The graph.
        dtype: What it computes in.
    """

    def __init__(self, graph: ChunkGraph, dtype: torch.dtype) -> None:
        self.graph, self.dtype = graph, dtype
        self.draws = sum(step.std > 0 for step in graph.plan.steps)
        self.run: Callable[..., Tensor] | None = None

    def __call__(self, inputs: list[Tensor], generator: Random) -> Tensor:
        """Return `[B, Tp, Da]` for the start `[B, Tp, Da]` and conditioning sets, one row after the other."""
        start = inputs[0]
        if self.draws:
            # As the steps would draw one by one.
            noise = [randn(tuple(start.shape), generator, like=start) for _ in range(self.draws)]
            inputs = [start, torch.stack(noise, dim=1), *inputs[1:]]
        if self.run is None:
            self.run = compiled(self.graph, tuple(value[:1] for value in inputs), self.dtype)
        if len(start) == 1:
            return self.run(*inputs)
        return torch.cat([self.run(*[value[row : row + 1] for value in inputs]) for row in range(len(start))])


def compiled(graph: nn.Module, arguments: tuple[Tensor, ...], dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return a graph compiled for arguments of these shapes.

    Raises:
        DipoleError: It cannot be compiled, or computes something else then.
    """
    try:
        with quiet(), torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            # Constants of inference mode could not be captured.
            examples = tuple(argument.clone() for argument in arguments)
            program = capture(graph, examples, symbolic=False)
            package = torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(Path(folder) / "chunk.pt2"),
                # Weights are laid out for this processor, and what they alone decide is computed now.
                inductor_configs={"freezing": True},
            )
            run: Callable[..., Tensor] = torch._inductor.aoti_load_package(package)
            expected, found = graph(*examples), run(*examples)
    except Exception as error:  # capturing and compiling have errors of many kinds
        raise DipoleError(
            f"back end 'whole-chunk' cannot compile this policy: {first_line(error)} (use 'packed' or 'eager')"
        ) from None
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not difference <= TOLERANCE[dtype]:
        raise DipoleError(
            f"back end 'whole-chunk' differs from the policy by {difference:.1e} of its actions with this torch "
            f"({torch.__version__}): use the back end 'eager' and report it"
        )
    return run


def whole_chunk(policy: Any, precision: str) -> WholeChunk:
    """Return what makes the steps of a policy in one graph.

    Raises:
        DipoleError: The policy, its device or its precision is not for this back end, or there is no C++ compiler.
    """
    if type(policy) is not DiffusionPolicy:
        kind = getattr(policy, "type_name", type(policy).__name__)
        raise DipoleError(f"back end 'whole-chunk' is for plain diffusion policies, not for kind '{kind}': use 'eager'")
    parameter = next(policy.network.parameters())
    if parameter.device.type != "cpu":
        raise DipoleError(f"back end 'whole-chunk' is for CPUs, the policy is on {parameter.device}: use 'cuda-graph'")
    if parameter.dtype != torch.float32:
        raise DipoleError(f"back end 'whole-chunk' compiles float32 weights, these are {parameter.dtype}: use 'eager'")
    if precision not in DTYPES or (precision == "bf16" and packed_body(policy.network, torch.bfloat16, 0) is None):
        raise DipoleError(f"back end 'whole-chunk' has no {precision} for this network: use fp32")
    need_compiler("back end 'whole-chunk'", "use the back end 'packed' or 'eager'")
    _limited(make_plan(policy))  # a sampler that cannot make its steps is reported here
    return WholeChunk(policy, DTYPES[precision])


def _limited(plan: Plan) -> Plan:
    """Return a plan that can be compiled in a time worth waiting for."""
    if len(plan.steps) > _MAX_CALLS:
        raise DipoleError(
            f"back end 'whole-chunk' compiles up to {_MAX_CALLS} network calls (each takes seconds), the sampler makes "
            f"{len(plan.steps)}: use fewer steps, or 'packed'"
        )
    return plan
