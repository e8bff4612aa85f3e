"""The program beside a robot: a policy that takes its time, a network that fails, and a robot that stays safe.

A point is to follow a circle at 20 Hz. Chunks are computed in a thread, late; for a while there are none at all. The
loop goes on executing what it has, the watchdog holds the robot when that is too old, and the guard sees every action.
Run it:  python examples/robot_side.py                                  (with a stand-in for the policy)
         python examples/robot_side.py --server ws://127.0.0.1:8000     (with `dipole serve RUN` and a robot of yours)
"""

import argparse
import time
from collections.abc import Mapping

import numpy as np

from dipole.realtime.execution import MODES
from dipole.realtime.robot import LoopConfig, RobotLoop
from dipole.realtime.worker import Infer, Job, ThreadWorker
from dipole.safety import Limits, OutputGuard

FPS, CHUNK = 20.0, 16


class PointRobot:
    """Your robot goes here: `observe` reads its sensors, `send` commands it. Both must return quickly."""

    def __init__(self) -> None:
        self.position = np.array([1.0, 0.0])
        self.actions: list[np.ndarray] = []

    def observe(self) -> Mapping[str, np.ndarray]:
        """Return the newest observation, by the names that the policy was trained with."""
        return {"observation.state": self.position.astype(np.float32)}

    def send(self, action: np.ndarray) -> None:
        """Move to the commanded position."""
        self.actions.append(action)
        self.position = self.position + np.clip(action - self.position, -0.2, 0.2)


class StandIn:
    """In place of a policy: the next positions on the circle, after 120 ms; the network fails between two times."""

    def __init__(self, fails: tuple[float, float]) -> None:
        self.begin, self.fails = time.monotonic(), fails

    def __call__(self, job: Job) -> np.ndarray:
        """Return a chunk `[CHUNK, 2]`, its first action being for the moment of the observation."""
        time.sleep(0.12)
        if self.fails[0] < time.monotonic() - self.begin < self.fails[1]:
            raise ConnectionError("the network is down")
        x, y = job.obs["observation.state"][-1]
        angle = np.arctan2(y, x) + 0.1 * np.arange(1, CHUNK + 1)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def server(url: str) -> Infer:
    """Return what asks a policy server."""
    from dipole.realtime.remote import RemotePolicy
    from dipole.serving.client import PolicyClient

    return RemotePolicy(PolicyClient(url, give_up_s=1.0))


def main() -> None:
    """Drive the robot for some seconds and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="address of a policy server")
    parser.add_argument("--fast", action="store_true", help="for a shorter time")
    args = parser.parse_args()
    seconds = 3.0 if args.fast else 10.0

    infer = StandIn(fails=(seconds * 0.3, seconds * 0.7)) if args.server is None else server(args.server)
    config = LoopConfig(fps=FPS, action_dim=2, every=6, execution=MODES["async-blend"], timeout_ms=500)
    guard = OutputGuard(Limits(low=(-1.1, -1.1), high=(1.1, 1.1), max_change=(0.15, 0.15)))
    robot, worker = PointRobot(), ThreadWorker(infer)
    try:
        report = RobotLoop(config, worker, guard).run(robot, ticks=int(seconds * FPS))
    finally:
        worker.close()

    rate, delay, dog = report["rate"], report["delay_ms"], report["watchdog"]
    print(f"{len(robot.actions)} actions sent in {rate['ticks']} ticks, {rate['missed']} ticks missed")
    print(f"jitter p50 {rate['jitter_ms']['p50']:.2f} ms, p99 {rate['jitter_ms']['p99']:.2f} ms")
    print(f"chunks came after {delay['p50']:.0f} ms (p50), {delay['max']:.0f} ms (max); {report['execution']}")
    print(f"watchdog: fell back {dog['trips']} times, recovered {dog['recoveries']} times; now {dog['state']}")
    print(f"guard: {report['violations']}; last error: {report['last_error'] or 'none'}")


if __name__ == "__main__":
    main()
