"""Trained policies in real time: warm starts, streaming, overlap between chunks, caches, back ends.

`Runtime` says how a policy is run, `apply` does it, `runtime.json` keeps it beside the weights, `load` obeys it.
"""

from dipole.realtime.backends import prepare
from dipole.realtime.runtime import (
    METHODS,
    Runtime,
    apply,
    default_runtime,
    find_runtime,
    load,
    method_config,
    read_runtime,
    write_runtime,
)

__all__ = [
    "METHODS",
    "Runtime",
    "apply",
    "default_runtime",
    "find_runtime",
    "load",
    "method_config",
    "prepare",
    "read_runtime",
    "write_runtime",
]
