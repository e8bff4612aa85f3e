"""Evaluation: rollouts reproducible to the digit, honest statistics, latency, videos and a report page."""

from dipole.evaluation.compare import Comparison, compare
from dipole.evaluation.episode import Episode, Rollouts, Trajectory
from dipole.evaluation.evaluate import Evaluation, evaluate, load_evaluation
from dipole.evaluation.latency import Latency, measure_latency
from dipole.evaluation.report import write_report
from dipole.evaluation.rollout import rollout
from dipole.evaluation.seeds import episode_seeds, first_seed
from dipole.evaluation.statistics import Estimate, bootstrap, mcnemar, required_episodes, required_pairs, wilson
from dipole.evaluation.sweep import SamplerResult, sweep

__all__ = [
    "Comparison",
    "Episode",
    "Estimate",
    "Evaluation",
    "Latency",
    "Rollouts",
    "SamplerResult",
    "Trajectory",
    "bootstrap",
    "compare",
    "episode_seeds",
    "evaluate",
    "first_seed",
    "load_evaluation",
    "mcnemar",
    "measure_latency",
    "required_episodes",
    "required_pairs",
    "rollout",
    "sweep",
    "wilson",
    "write_report",
]
