"""How a trained policy is run: method, sampler, back end, precision. A small file, `runtime.json`, beside its weights.

Nothing here changes weights: the same checkpoint can be run in many ways, and a `Runtime` names one of them.
`load` obeys the file, and so does every command that loads a run in order to act with it.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from dipole.errors import DipoleError, unknown
from dipole.policies.checkpoint import find_policy, load_policy
from dipole.policies.config import SamplerConfig, check_horizons
from dipole.serialization import from_dict, read_json, to_dict, write_json

FILE = "runtime.json"
FORMAT = 1

METHODS: dict[str, tuple[str, str, str]] = {
    "rti": ("dipole.realtime.rti", "RTIConfig", "RTIPolicy"),
    "streaming": ("dipole.realtime.streaming", "StreamingConfig", "StreamingPolicy"),
    "chunking": ("dipole.realtime.chunking", "ChunkingConfig", "ChunkingPolicy"),
    "ensemble": ("dipole.realtime.ensemble", "EnsembleConfig", "EnsemblePolicy"),
    "block-cache": ("dipole.realtime.block_cache", "BlockCacheConfig", "BlockCachePolicy"),
}
"""Method -> (module, configuration class, policy class); imported when used. `plain` needs none."""

WHOLE_CHUNK_METHODS = ("plain", "ensemble")
"""Methods that make no steps of their own and guide none: those the back end `whole-chunk` is for."""


@dataclass(frozen=True)
class Runtime:
    """How a trained policy is run.

    Attributes:
        method: `plain`, or a name of `METHODS`.
        options: Fields of the method's configuration class; those left out take their defaults.
        sampler: How to denoise; None for the policy's own sampler.
        backend: What computes the network: `eager`, `compile`, ... (see `dipole.realtime.backends`).
        precision: `fp32`, `bf16` or `int8`.
        action_horizon: Ta, how many actions of a chunk are executed; None for the policy's own.
    """

    # Fields that files written before they existed lack, with what that meant.
    LATER_FIELDS: ClassVar[dict[str, Any]] = {}

    method: str = "plain"
    options: dict[str, Any] = field(default_factory=dict)
    sampler: SamplerConfig | None = None
    backend: str = "eager"
    precision: str = "fp32"
    action_horizon: int | None = None

    def __post_init__(self) -> None:
        if self.method != "plain" and self.method not in METHODS:
            raise unknown("method", self.method, ["plain", *METHODS])
        if self.backend == "whole-chunk" and self.method not in WHOLE_CHUNK_METHODS:
            raise DipoleError(
                f"back end 'whole-chunk' compiles plain sampling, method '{self.method}' makes steps of its own: "
                "use the back end 'packed'"
            )
        if self.method == "plain" and self.options:
            raise DipoleError(f"method 'plain' has no options, found '{next(iter(self.options))}'")


def method_config(runtime: Runtime) -> Any:
    """Return the configuration object of a runtime's method; None for `plain`.

    Raises:
        DipoleError: An option is unknown or of the wrong type.
    """
    if runtime.method == "plain":
        return None
    module, config, _ = METHODS[runtime.method]
    cls = getattr(importlib.import_module(module), config)
    return from_dict(cls, {**to_dict(cls()), **runtime.options}, f"options of method '{runtime.method}'")


def apply(policy: Any, runtime: Runtime) -> Any:
    """Return the policy run that way; weights are shared, the policy passed in stays as it is.

    Args:
        policy: A trained policy.
        runtime: How to run it.

    Raises:
        DipoleError: The runtime does not fit the policy.
    """
    from dipole.realtime.backends import prepare

    if runtime.sampler is not None:
        runtime.sampler.build()  # an unknown name is reported here
        policy = policy.with_sampler(runtime.sampler)
    if runtime.action_horizon is not None:
        if runtime.method == "streaming":
            raise DipoleError("method 'streaming': the action_horizon is part of the training, leave it as it is")
        policy = _with_action_horizon(policy, runtime.action_horizon)
    policy = prepare(policy, runtime.backend, runtime.precision)
    options = method_config(runtime)
    if options is None:
        running = copy.copy(policy)
    else:
        module, _, name = METHODS[runtime.method]
        running = getattr(importlib.import_module(module), name)(policy, options)
        if hasattr(running, "eval"):
            running = running.train(policy.training)
    running.runtime = runtime  # what a report says about it
    return running


def _with_action_horizon(policy: Any, action_horizon: int) -> Any:
    if not hasattr(policy.config, "action_horizon"):
        raise DipoleError(f"a policy of kind '{policy.type_name}' has no action_horizon: leave it out of the runtime")
    check_horizons(policy.obs_horizon, policy.pred_horizon, action_horizon)
    other = copy.copy(policy)
    other.config = replace(policy.config, action_horizon=action_horizon)
    return other


def default_runtime(policy: Any) -> Runtime:
    """Return how a policy is run when nothing was chosen: `streaming` if it was trained for that, else `plain`."""
    return Runtime("streaming") if getattr(policy.config, "streaming", None) is not None else Runtime()


def _file(path: str | Path) -> Path:
    return Path(path) if Path(path).suffix == ".json" else Path(path) / FILE


def read_runtime(path: str | Path) -> Runtime:
    """Return the runtime in a file (`*.json`), or in the `runtime.json` of a folder.

    Raises:
        DipoleError: The file is missing, of another format, or has unknown or wrong entries.
    """
    file = _file(path)
    table = read_json(file)
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise DipoleError(f"{file}: not a runtime of format {FORMAT}: write it again with `dipole accelerate`")
    values = {key: value for key, value in table.items() if key != "format"}
    runtime = from_dict(Runtime, {**to_dict(Runtime()), **Runtime.LATER_FIELDS, **values}, str(file))
    try:
        method_config(runtime)
    except DipoleError as error:
        raise DipoleError(f"{file}: {error}") from None
    return runtime


def write_runtime(runtime: Runtime, path: str | Path) -> Path:
    """Write a runtime atomically to a file (`*.json`), or to the `runtime.json` of a folder; return the file.

    Raises:
        DipoleError: An option is unknown, or the file cannot be written.
    """
    method_config(runtime)  # never write what cannot be read
    file = _file(path)
    write_json(file, {"format": FORMAT, **to_dict(runtime)})
    return file


def find_runtime(path: str | Path) -> Path | None:
    """Return the `runtime.json` that holds for a run or checkpoint folder; None where none was chosen.

    The one in the folder itself comes first, then the one of the checkpoint that a run folder stands for.
    """
    for folder in (Path(path), find_policy(path)):
        if (folder / FILE).is_file():
            return folder / FILE
    return None


def load(path: str | Path, device: Any = "cpu", runtime: Runtime | str | None = "stored") -> Any:
    """Load a policy to act with.

    Args:
        path: Run folder or checkpoint folder.
        device: Where it computes.
        runtime: How to run it: a `Runtime`, the name of a method with its default options, `stored` for the
            `runtime.json` of the folder (without one: how the policy was trained to be run), or None for the bare
            policy.

    Raises:
        DipoleError: The folder or the runtime is at fault.
    """
    policy = load_policy(path, device)
    if runtime is None:
        return policy
    if runtime == "stored":
        file = find_runtime(path)
        runtime = default_runtime(policy) if file is None else read_runtime(file)
    elif isinstance(runtime, str):
        runtime = Runtime(runtime)
    return apply(policy, runtime)
