"""Back end `packed-compiled`: the step of a packed network as one compiled graph, its weights part of it.

What `packed` leaves are two hundred small operations, and matrix products with 4 to 16 rows, for which general
libraries are not made. Here torch's inductor fuses the operations, and for every product writes kernels of its own,
times them against the library's and keeps the faster. The first chunk of each batch size takes minutes (tens of seconds
once the kernels are in inductor's cache on disk), so this is for programs that run for long.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dipole.compiler import need_compiler
from dipole.realtime.packed import PackedNetwork

_OPTIONS: dict[str, Any] = {
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
    "max_autotune_report_choices_stats": False,
}


class CompiledNetwork:
    """A packed network whose steps are compiled, once for each shape and number of threads.

    Args:
        body: The packed network, its weights in torch's own layout.

    Raises:
        DipoleError: There is no C++ compiler.
    """

    def __init__(self, body: PackedNetwork) -> None:
        need_compiler("back end 'packed-compiled'", "use the back end 'packed'")
        self._body = body
        self._graphs: dict[Any, Any] = {}

    def constants(self, times: Tensor, cond: Mapping[str, Tensor] | None) -> list[Any]:
        """See `PackedNetwork`."""
        return self._body.constants(times, cond)

    def step(self, x: Tensor, constants: Any, hook: Any = None) -> Tensor:
        """Return the network's output `[B, T, D]`; with a hook, which looks inside, without the graph."""
        if hook is not None:
            return self._body.step(x, constants, hook)
        values, structure = pytree.tree_flatten(constants)
        inputs = (x.contiguous(), *values)
        key = (torch.get_num_threads(), *((value.dtype, value.shape, value.stride()) for value in inputs))
        if key not in self._graphs:
            self._graphs[key] = self._compile(inputs, structure)
        out: Tensor = self._graphs[key](*inputs)[0]
        return out

    def _compile(self, inputs: tuple[Tensor, ...], structure: pytree.TreeSpec) -> Any:
        from torch._inductor import compile as compile_graph
        from torch._inductor import select_algorithm
        from torch.fx.experimental.proxy_tensor import make_fx

        def step(x: Tensor, *values: Tensor) -> tuple[Tensor]:
            return (self._body.step(x, pytree.tree_unflatten(list(values), structure)),)

        # Traced as it is rather than by torch.compile, which before every call looks whether any weight has changed:
        # for the small U-Net that took as long as the network.
        loud, select_algorithm.PRINT_AUTOTUNE = select_algorithm.PRINT_AUTOTUNE, False
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # inductor's about itself
                return compile_graph(make_fx(step)(*inputs), list(inputs), options=_OPTIONS)
        finally:
            select_algorithm.PRINT_AUTOTUNE = loud
