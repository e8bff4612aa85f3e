"""Seeds of evaluation episodes: fixed, and disjoint from those of demonstrations and of other evaluations."""

from __future__ import annotations

import numpy as np
import torch

from dipole.envs.seeds import EVAL_SEED
from dipole.errors import DipoleError

BLOCK_SIZE = 100_000
"""Seeds per block: the most episodes one evaluation can have."""

_NUM_BLOCKS = (2**31 - EVAL_SEED) // BLOCK_SIZE  # simulators take 31-bit seeds
_POLICY_STREAM = 0x70_6F_6C  # keeps the policy's noise apart from the environment's, which has the same seed


def first_seed(block: int = 0) -> int:
    """Return the first seed of a block of evaluation seeds; block 0 begins at `EVAL_SEED`.

    Blocks do not overlap, so that evaluations on different blocks share no episode.

    Raises:
        DipoleError: The block is out of range.
    """
    if not 0 <= block < _NUM_BLOCKS:
        raise DipoleError(f"evaluation seed {block} is out of range: choose one from 0 to {_NUM_BLOCKS - 1}")
    return EVAL_SEED + block * BLOCK_SIZE


def episode_seeds(first: int = EVAL_SEED, episodes: int = 50) -> list[int]:
    """Return the seeds `first, first + 1, ...` of an evaluation's episodes; a longer evaluation begins with the same.

    Raises:
        DipoleError: The number of episodes is out of range.
    """
    if not 1 <= episodes <= BLOCK_SIZE:
        raise DipoleError(f"{episodes} evaluation episodes: choose from 1 to {BLOCK_SIZE}")
    return list(range(first, first + episodes))


def policy_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the generator of the policy's noise in the episode with this seed."""
    state = np.random.SeedSequence([seed, _POLICY_STREAM]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))
