"""Freed memory stays with a training process: asking for it again brings no page faults."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Ten times over, 24 blocks of 2 MiB.
SCRIPT = """
import resource, torch
from dipole.allocator import keep_freed_memory
keep_freed_memory()
def blocks(): return [torch.ones(2**19) for _ in range(24)]
blocks()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): blocks()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
BLOCKS = 24 * 2 * 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults as glibc makes them")
def test_blocks_asked_for_again_bring_no_page_faults() -> None:
    pages = BLOCKS // os.sysconf("SC_PAGE_SIZE")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}

    def faults(**more: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env={**environment, **more}
        )
        return int(done.stdout)

    assert faults() < pages  # once at most in ten times
    assert faults(MALLOC_TRIM_THRESHOLD_="131072") > 5 * pages, "what a user has chosen is left as it is"
