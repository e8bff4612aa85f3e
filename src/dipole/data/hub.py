"""Datasets and checkpoints by name: a local path, or `organisation/name[@revision]` on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dipole.errors import DipoleError, MissingExtraError

_NAME = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w][\w./-]*))?")


def resolve(
    name: str | Path, kind: Literal["dataset", "model"] = "dataset", ignore: Sequence[str] | None = None
) -> Path:
    """Return the folder or file that `name` means. Anything that exists locally wins.

    A name on the Hub is downloaded into Hugging Face's cache (`HF_HOME`); what is there already is not loaded again.

    Args:
        name: A path, or `organisation/name`, or `organisation/name@revision`.
        kind: What to look for on the Hub.
        ignore: Patterns of files to leave out of the download.

    Raises:
        DipoleError: There is no such path and no such repository, or the network fails.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    match = _NAME.fullmatch(str(name))
    if match is None:
        raise DipoleError(f"there is no {name}: give an existing path, or organisation/name[@revision] of a {kind}")
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub") from None
    repo, revision = match["repo"], match["revision"]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, repo_type=kind, revision=revision, ignore_patterns=list(ignore) if ignore else None
            )
        )
    except Exception as error:  # its HTTP client, its cache and the file system each have their own errors
        reason = " ".join(str(error).split())[:160]
        raise DipoleError(
            f"there is no local path {name}, and the {kind} '{repo}' could not be downloaded "
            f"({type(error).__name__}: {reason}): check name, revision and network"
        ) from None
