"""What learners from a replay buffer share: when they collect and learn, and the batches they learn from."""

from __future__ import annotations

from typing import Any

from torch import Generator, Tensor

from dipole.rl.buffers import Groups, ReplayBuffer, sample_mixed
from dipole.rl.experience import Decision
from dipole.rl.learner import Setting
from dipole.rl.rollouts import Collector
from dipole.training.seeding import generator


class OffPolicy:
    """A learner that learns after every decision of all rows together, once the warm-up is over.

    Attributes:
        setting: Where it works.
        config: `decisions`, `warmup`, `batch_size`, `offline_share`, as the methods describe them.
        collector: Its source of experience.
        buffers: `online`: what it collected.
        offline: Recorded experience, or None.
        values: `updates` (batches drawn) and `vector_steps` (decisions of all rows together) so far.
    """

    setting: Setting
    config: Any
    collector: Collector
    buffers: dict[str, ReplayBuffer]
    offline: ReplayBuffer | None
    values: dict[str, Any]

    def decide(self, features: Tensor, random: Generator) -> Decision:
        """Return what to do in every row; counts `vector_steps`."""
        raise TypeError(f"{type(self).__name__} does not say how it decides")

    def learn(self) -> dict[str, float]:
        """Make the updates that follow a decision of all rows together; return figures."""
        raise TypeError(f"{type(self).__name__} does not say how it learns")

    def iterate(self, iteration: int) -> dict[str, float]:
        """Take `decisions` decisions in all rows, learning after each; return the mean of the figures."""
        sums: dict[str, list[float]] = {}
        for _ in range(self.config.decisions):
            self.buffers["online"].add(self.collector.collect(self.decide, 1).flat())
            if self.values["vector_steps"] < self.config.warmup:
                continue
            for key, value in self.learn().items():
                sums.setdefault(key, []).append(value)
        return {key: sum(values) / len(values) for key, values in sums.items()}

    def batch(self) -> Groups:
        """Draw transitions to learn from: recorded ones, where there are any, and collected ones."""
        self.values["updates"] += 1
        share, size = self.config.offline_share, self.config.batch_size
        return sample_mixed(self.buffers["online"], self.offline, size, share, self.random("batch"))

    def random(self, use: str) -> Generator:
        """Return the source of randomness for one use in the present update."""
        return generator(self.setting.seed, use, self.values["updates"])


def recorded(setting: Setting, chunks: bool = False) -> ReplayBuffer | None:
    """Return the recorded experience of a setting, with the executed actions `[n, Ta Da]`; None where there is none.

    Args:
        setting: The setting.
        chunks: Keep the whole chunks `[n, Tp, Da]` as well.
    """
    found = setting.offline_transitions()
    if found is None:
        return None
    found["action"] = setting.base.executed(found["chunk"] if chunks else found.pop("chunk")).flatten(1)
    buffer = ReplayBuffer(len(found["reward"]))
    buffer.add(found)
    return buffer
