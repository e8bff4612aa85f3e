"""What the tests of environments share."""

import importlib.util

import numpy as np
import pytest

from dipole.envs.rendering import can_render


def needs(*packages):
    """Skip, visibly, where a simulator is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def needs_rendering():
    if not can_render():
        pytest.skip("MuJoCo cannot render here (no EGL)")


def episode(env, row, seed, steps, action_seed=0, render_every=0):
    """Return everything that random actions of `action_seed` make the episode of `seed` yield: a list of arrays."""
    rng = np.random.default_rng(action_seed)
    obs = env.reset([row], [seed])
    seen = list(obs.values())
    for k in range(steps):
        action = rng.uniform(env.spec.action_low, env.spec.action_high)[None]
        result = env.step(action, [row])
        seen += [*result.obs.values(), result.reward, result.terminated, result.success]
        if render_every and k % render_every == 0:
            env.render(row)
        if result.done[0]:
            break
    return seen


def same(first, second):
    return len(first) == len(second) and all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
