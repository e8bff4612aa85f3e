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
from dipole.realtime.packed import PackedNetwork, packed_body

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Compiled against captured, relative to the largest action: rounding is 1e-6 and 2e-2.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
_MAX_CALLS = 30


class ChunkGraph(nn.Module):
    """`chunk(start, *noise, *cond) -> x0`: all steps of a plan.

    Args:
        network: `network(x, time, cond)`; or a packed one's body.
        plan: The steps.
        names: Of the conditioning sets, in the order of the arguments.
    """

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
        self._plans: dict[Any, Plan] = {}
        self._graphs: dict[Any, Callable[..., Tensor]] = {}

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
        if (denoiser.denoiser if isinstance(denoiser, ProcessView) else denoiser) != self.denoiser:
            raise DipoleError("back end 'whole-chunk' compiles the bare network, not a guided one: use 'packed'")
        if options:
            chunk: Tensor = sample(
                denoiser, process, levels, kernel, cond=cond, init=init, generator=generator, **options
            )
            return chunk
        key = (process, tuple(levels.tolist()), kernel)
        if key not in self._plans:
            self._plans[key] = plan_of(self.denoiser, process, levels, kernel)
        plan = self._plans[key]
        # The graph reads memory as it was laid out when it was compiled, and does not look how it is now.
        arguments = [argument.contiguous() for argument in (init, *_noise(plan, init, generator), *self._sets(cond))]
        layout = (key, torch.get_num_threads(), *((argument.shape[1:], argument.dtype) for argument in arguments))
        if layout not in self._graphs:
            first = tuple(argument[:1] for argument in arguments)
            self._graphs[layout] = compiled(ChunkGraph(self.network, plan, self.names), first, self.dtype)
        graph = self._graphs[layout]
        if len(init) == 1:
            return graph(*arguments)
        return torch.cat([graph(*(argument[row : row + 1] for argument in arguments)) for row in range(len(init))])

    def _sets(self, cond: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(cond[name] for name in self.names)


def _noise(plan: Plan, init: Tensor, generator: Random) -> tuple[Tensor, ...]:
    """Return the noise of all steps that draw any, `[B, S, Tp, Da]`, drawn as they would draw it one by one."""
    random = [step for step in plan.steps if step.std > 0]
    drawn = [randn(tuple(init.shape), generator, like=init) for _ in random]
    return (torch.stack(drawn, dim=1),) if drawn else ()


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
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not error <= _TOLERANCE[dtype]:
        raise DipoleError(
            f"back end 'whole-chunk' differs from the policy by {error:.1e} of its actions with this torch "
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
    calls = len(make_plan(policy).steps)
    if calls > _MAX_CALLS:
        raise DipoleError(
            f"back end 'whole-chunk' compiles up to {_MAX_CALLS} network calls (each takes seconds), sampler "
            f"'{policy.sampler.name}' makes {calls}: use fewer steps, or 'packed'"
        )
    return WholeChunk(policy, DTYPES[precision])
