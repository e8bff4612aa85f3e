"""Configuration of DiffusionDrive: everything that `config.json` of its checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dipole.data.features import Feature
from dipole.errors import DipoleError
from dipole.networks.cascade import CascadeConfig
from dipole.policies.config import NormalizationMode, ProcessConfig

Motion = Literal["waypoints", "increments"]
Levels = Literal["published", "consistent"]
Select = Literal["argmax", "sample"]


@dataclass(frozen=True)
class DiffusionDriveConfig:
    """A DiffusionDrive planner; the defaults are the paper's.

    Attributes:
        observation: Features it sees: the view and vectors.
        action: The feature it produces, one per point of the plan.
        view: The feature that is the bird's-eye view, `(X, Y, channels)`, cells along x and y.
        view_low: The view's corner of smallest x and y in metres; the ego vehicle is at the origin, heading along x.
        view_cell: Size of a cell along x and y in metres.
        pred_horizon: T, points of a plan.
        action_horizon: Ta, actions executed before the next plan.
        motion: What an action is: the waypoint (x, y) itself, in the frame of the plan, or the increment (dx, dy,
            dheading) from the pose before it, in that pose's frame.
        num_anchors: K, candidate paths; their centres are found by k-means and kept with the weights.
        network: Shape of the decoder.
        process: Its levels; the prediction is of the clean path.
        train_levels: The truncation: training noises the anchors to a level in 0 .. train_levels - 1.
        start_level: The level anchors are noised to at run time.
        num_steps: Decoder calls per plan.
        levels: What the passes are told. `published`: noise at `start_level`, but told 20 (n - 1) / n, .., 0, and a
            DDIM step that goes down a single level between passes. `consistent`: told the level the paths are at,
            evenly spaced from `start_level` to 0.
        select: Which candidate is carried out: the one of highest score, or one drawn by its score.
        score_loss: `focal` (the published code) or `bce` (the paper).
        score_weight: Weight of the score's loss.
        path_weight: Weight of the positive path's L1 distance.
        normalization: Mode of the observed vectors.
        fps: Points of a plan per second.
        task: What it was trained to do, in words.
    """

    observation: dict[str, Feature]
    action: Feature
    view: str = "observation.scene"
    view_low: tuple[float, float] = (-32.0, -32.0)
    view_cell: tuple[float, float] = (0.5, 0.5)
    pred_horizon: int = 8
    action_horizon: int = 8
    motion: Motion = "waypoints"
    num_anchors: int = 20
    network: CascadeConfig = field(default_factory=CascadeConfig)
    process: ProcessConfig = field(default_factory=lambda: ProcessConfig("vp-scaled-linear", 1000))
    train_levels: int = 50
    start_level: int = 8
    num_steps: int = 2
    levels: Levels = "published"
    select: Select = "argmax"
    score_loss: Literal["focal", "bce"] = "focal"
    score_weight: float = 10.0
    path_weight: float = 8.0
    normalization: NormalizationMode = "mean_std"
    fps: float = 2.0
    task: str = ""

    def __post_init__(self) -> None:
        if self.view not in self.observation:
            raise DipoleError(f"the view '{self.view}' is not among the observations: {', '.join(self.observation)}")
        if len(self.observation[self.view].shape) != 3:
            raise DipoleError(f"the view '{self.view}' has shape {self.observation[self.view].shape}, not (X, Y, C)")
        if not self.state_keys or any(len(self.observation[key].shape) != 1 for key in self.state_keys):
            raise DipoleError("beside the view, DiffusionDrive sees vectors, and needs at least one")
        wanted = {"waypoints": 2, "increments": 3}[self.motion]
        if self.action.shape != (wanted,):
            raise DipoleError(f"motion '{self.motion}' needs actions of shape ({wanted},), not {self.action.shape}")
        if not 1 <= self.action_horizon <= self.pred_horizon:
            raise DipoleError(f"action_horizon {self.action_horizon} is not in 1..{self.pred_horizon} (pred_horizon)")
        if not 0 <= self.start_level < self.train_levels <= self.process.num_steps:
            raise DipoleError(
                f"start_level {self.start_level} must lie below train_levels {self.train_levels}, and that must not "
                f"exceed the process's {self.process.num_steps} levels"
            )
        if self.num_steps < 1 or self.num_anchors < 1:
            raise DipoleError("num_steps and num_anchors must be at least 1")

    @property
    def state_keys(self) -> list[str]:
        """Return the vectors it sees."""
        return [key for key in self.observation if key != self.view]

    def schedule(self) -> list[tuple[int, int, int]]:
        """Return, for every pass, the level it is told, and the levels its DDIM step goes from and to (-1: clean)."""
        if self.levels == "published":
            told = [(20 * k) // self.num_steps for k in reversed(range(self.num_steps))]
            return [(level, level, level - 1) for level in told]
        ends = [round(self.start_level * k / max(self.num_steps - 1, 1)) for k in reversed(range(self.num_steps))]
        ends[0] = self.start_level
        return [(t, t, s) for t, s in zip(ends, [*ends[1:], -1], strict=True)]
