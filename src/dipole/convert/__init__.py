"""Foreign checkpoints (pickles) turned into safetensors and JSON; see `convert_checkpoint`."""

from __future__ import annotations

from pathlib import Path

from dipole.errors import DipoleError, unknown

FRAMEWORKS = ("diffusion_policy", "robomimic", "dppo")


def convert_checkpoint(
    path: Path,
    out: Path,
    framework: str | None = None,
    weights: str | None = None,
    normalization: Path | None = None,
    memory_gib: float = 6.0,
) -> dict[str, object]:
    """Write the weights, the normalisation statistics and the configuration of a foreign checkpoint into a new folder.

    Args:
        path: Checkpoint of diffusion_policy, robomimic or DPPO/ReinFlow.
        out: Folder to create; see `dipole.convert.checkpoint` for what it holds.
        framework: One of `FRAMEWORKS`; None tells it from the checkpoint's content.
        weights: Which weights to take, by the framework's own name; None takes the EMA weights where there are some.
        normalization: DPPO's `normalization.npz`.
        memory_gib: Most address space that reading may take.

    Returns:
        What `source.json` says.

    Raises:
        DipoleError: See `dipole.convert.foreign.read_foreign`; or the checkpoint is of no known framework.
    """
    from dipole.convert import diffusion_policy, dppo, foreign, robomimic

    modules = {module.NAME: module for module in (diffusion_policy, robomimic, dppo)}
    if framework is not None and framework not in modules:
        raise unknown("framework", framework, modules)
    path, out = Path(path), Path(out)
    if out.exists():
        raise DipoleError(f"'{out}' exists: give a new folder")
    with foreign.read_foreign(path, memory_gib) as checkpoint:
        name = framework or next((n for n, m in modules.items() if m.matches(checkpoint.value)), None)
        if name is None:
            raise DipoleError(f"'{path.name}' is not recognised: choose --from {' | '.join(FRAMEWORKS)}")
        if normalization is not None and name != dppo.NAME:
            raise DipoleError(f"a {name} checkpoint carries its own statistics: leave out --normalization")
        extra = {"normalization": normalization} if name == dppo.NAME else {}
        converted = modules[name].convert(checkpoint, weights, **extra)
    converted.write(out)
    return dict(converted.source)
