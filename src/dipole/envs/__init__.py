"""Environments: micro environments in numpy and adapters to real simulators behind one batched protocol.

`make(name, num_envs)` returns a `VectorEnv`: rows are reset one by one with explicit seeds (there is no autoreset), and
an episode is determined by its seed alone.
"""

from dipole.envs.collect import collect
from dipole.envs.registry import has_expert, make, make_expert, names
from dipole.envs.seeds import COLLECT_SEED, EVAL_SEED, SELECT_SEED
from dipole.envs.spec import EnvSpec, SingleEnv, StepResult, Transition, VectorEnv

__all__ = [
    "COLLECT_SEED",
    "EVAL_SEED",
    "SELECT_SEED",
    "EnvSpec",
    "SingleEnv",
    "StepResult",
    "Transition",
    "VectorEnv",
    "collect",
    "has_expert",
    "make",
    "make_expert",
    "names",
]
