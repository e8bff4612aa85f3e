"""Micro environments: tasks in numpy, microseconds a step, with demonstrators, for tests and small experiments."""

from __future__ import annotations

from typing import Any

from dipole.envs.experts.expert import Collecting, Expert
from dipole.envs.micro import fork2d, grip2d, lanes, multi8, pendulum, play4, slot_peg, track2d, two_goal, wipe
from dipole.envs.micro.demonstrator import Demonstrator, NativeExpert
from dipole.envs.micro.task import MicroTask, NativeVector

_MODULES = (fork2d, track2d, grip2d, wipe, lanes, play4, multi8, two_goal, slot_peg, pendulum)
_MICRO: dict[str, type[MicroTask]] = {
    fork2d.NAME: fork2d.Fork2D,
    track2d.NAME: track2d.Track2D,
    grip2d.NAME: grip2d.Grip2D,
    wipe.NAME: wipe.Wipe,
    lanes.NAME: lanes.Lanes,
    play4.NAME: play4.Play4,
    multi8.NAME: multi8.Multi8,
    two_goal.NAME: two_goal.TwoGoal,
    slot_peg.NAME: slot_peg.SlotPeg,
    pendulum.NAME: pendulum.Pendulum,
}
_DEMONSTRATORS: dict[str, type[Demonstrator]] = {
    fork2d.NAME: fork2d.Fork2DExpert,
    track2d.NAME: track2d.Track2DExpert,
    grip2d.NAME: grip2d.Grip2DExpert,
    wipe.NAME: wipe.WipeExpert,
    lanes.NAME: lanes.LanesExpert,
    play4.NAME: play4.Play4Expert,
    multi8.NAME: multi8.Multi8Expert,
    two_goal.NAME: two_goal.TwoGoalExpert,
    slot_peg.NAME: slot_peg.SlotPegExpert,
    pendulum.NAME: pendulum.PendulumExpert,
}
TASKS = {module.NAME: module.TASK for module in _MODULES}
EXPERTS = frozenset(TASKS)
# Where demonstrations that miss the goal are the point, or there is no goal to miss.
COLLECTING = {
    track2d.NAME: Collecting(success_only=False, steps_after_success=None),
    wipe.NAME: Collecting(success_only=False, steps_after_success=None),
    play4.NAME: Collecting(success_only=False, options={"play": True}),
    two_goal.NAME: Collecting(success_only=False),
    slot_peg.NAME: Collecting(success_only=False),
    pendulum.NAME: Collecting(success_only=False, steps_after_success=None),
}


def build_native(name: str, num_envs: int, max_steps: int | None = None, **options: Any) -> NativeVector:
    """Return `num_envs` rows of micro environment `name`; `options` go to the task."""
    return NativeVector(_MICRO[name](**options), num_envs, max_steps)


def build_expert(env: NativeVector) -> Expert:
    """Return the demonstrator for the rows of `env`."""
    return NativeExpert(_DEMONSTRATORS[env.spec.name](), env)


def task_class(name: str) -> type[MicroTask]:
    """Return the class of `name`; its constructor takes the options."""
    return _MICRO[name]
