"""Every accelerator against DDIM with as many network calls per env step, on real simulators.

Push-T with the human demonstrations and peg insertion of Meta-World; `equal_calls_bases` trains, `equal_calls_ways`
runs, this compares. The margin of every comparison is that the accelerator is on average no worse; its note says what
the interval of the difference says: it wins (all above 0), loses (all below) or ties.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from dipole.data import Episodes
from dipole.envs import collect
from dipole.envs.seeds import COLLECT_SEED
from dipole.systems.card import Card, Claim, Margin, Measure, Source
from dipole.systems.equal_calls_bases import (
    REACH,
    SEEDS,
    STUDENT,
    TA,
    TASKS,
    Task,
    demos_of,
    folder_of,
    recipe,
    train_all,
    untrained,
)
from dipole.systems.equal_calls_bf16 import bf16_claims, compare_precisions
from dipole.systems.equal_calls_ways import (
    EPISODES,
    GROUPS,
    PAIRS,
    WAYS,
    Way,
    cached,
    counted,
    entry,
    measure,
    measure_cache,
    running,
)
from dipole.systems.experiment import listed, observations
from dipole.systems.run import Job, Run
from dipole.training.student import make_student

CARD = Card(
    name="equal-calls",
    title="Every accelerator against DDIM at equal network calls",
    source=Source("Denoising Diffusion Implicit Models", 2020, "2010.02502"),
    axis="start and levels",
    summary=(
        "DPM-Solver++, flow matching, BESO, MoDE, distillation, streaming, warm starts, temporal ensembling and the "
        "block cache, each against DDIM that may call the network as often per env step. Push-T from human "
        "demonstrations and peg insertion of Meta-World, three trainings of everything; and a large U-Net in bf16 "
        "against fp32."
    ),
    claim="The accelerators' papers compare with 100-step DDPM; few compare with DDIM in as many calls.",
    spec_section="a9",
    needs_extras=("envs",),
)

RESAMPLES = 4000
CACHE_PAIRS = (
    ("transformer ddpm-100 cached", "transformer ddim, equal cost", 0.0),
    ("transformer ddpm-100 cached", "transformer ddpm-100", -0.02),
)
LINES = {
    "DDPM-100": ("ddpm-100",),
    "DDIM": ("ddim-1", "ddim-2", "ddim-5", "ddim-8", "ddim-24"),
    "DPM-Solver++": ("dpmpp-2m-2", "dpmpp-2m-5"),
    "flow": ("flow-1", "flow-2", "flow-5"),
    "distilled": ("distilled-1",),
    "BESO": ("beso-1", "beso-2", "beso-5"),
    "MoDE": ("mode-1", "mode-2", "mode-5"),
    "streaming": ("streaming-1", "streaming-2", "streaming-5"),
    "warm start": ("rti-2",),
    "DDIM every step": ("ddim-1 every step", "ddim-3 every step"),
    "warm start every step": ("rti-1 every step", "rti-3 every step"),
    "renoised warm start": ("renoised rti-2",),
    "renoised, every step": ("renoised rti-1 every step", "renoised rti-3 every step"),
    "ensemble every step": ("ensemble of ddim-3",),
    "transformer": ("transformer ddim, equal cost", "transformer ddpm-100"),
    "transformer, cached": ("transformer ddpm-100 cached",),
}
Found = dict[str, list[dict[str, Any]]]
"""Name of a way -> what `measure` returns, for each training seed."""


def gpu(run: Run) -> list[Claim]:
    """Train all policies and play them in every way; processor cores are used, the GPU is not."""
    trained = train_all(run)
    jobs = [job for seed in SEEDS for task in TASKS for job in _jobs(run, task, seed)]
    unet = folder_of(run, REACH, "unet", 0)
    precisions = {"policy": recipe("unet", REACH, 0), "episodes": EPISODES}
    jobs.append(("bf16", precisions, partial(compare_precisions, demos_of(run, REACH), unet)))
    *results, bf16 = run.parts(jobs)
    parts = iter(results)
    found: dict[str, Found] = {task.name: {} for task in TASKS}
    for _ in SEEDS:
        for task in TASKS:
            for _ in _jobs(run, task, 0):
                for name, result in next(parts).items():
                    found[task.name].setdefault(name, []).append(result)
    for task in TASKS:
        _plot(run, task, found[task.name])
    parameters = trained[f"train-{REACH.name}-unet-0"]["parameters"]
    return [claim for task in TASKS for claim in _claims(task, found[task.name])] + bf16_claims(bf16, parameters)


def _jobs(run: Run, task: Task, seed: int) -> list[Job]:
    """Return the parts that play the policies of a task and training seed."""
    demos = demos_of(run, task)
    jobs: list[Job] = []
    for group, ways in GROUPS.items():
        kinds = sorted({way.kind for way in ways})
        folders = {kind: folder_of(run, task, kind, seed) for kind in kinds}
        config = {"policies": [recipe(kind, task, seed) for kind in kinds], "episodes": EPISODES}
        jobs.append((f"{task.name}-{group}-{seed}", config, partial(measure, group, task, seed, demos, folders)))
    config = {"policies": [recipe("transformer", task, seed)], "episodes": EPISODES}
    folder = folder_of(run, task, "transformer", seed)
    jobs.append((f"{task.name}-cache-{seed}", config, partial(measure_cache, task, seed, demos, folder)))
    return jobs


def _claims(task: Task, found: Found) -> list[Claim]:
    pairs: list[tuple[str, str, float]] = [(*pair, 0.0) for pair in PAIRS]
    pairs += [("ddim-8", "ddpm-100", -0.02), *CACHE_PAIRS]
    return [_against(task, found, *pair) for pair in pairs]


def _against(task: Task, found: Found, ours: str, baseline: str, low: float) -> Claim:
    """Return the claim that a way is no worse than another."""
    apart = _scores(found, ours) - _scores(found, baseline)
    measured = mean_of(apart)
    return Claim(
        f"{task.name}: {ours} against {baseline}",
        "",
        measured,
        None,
        Margin(low=low),
        f"{outcome(measured)}; {_described(found, ours)}; {_described(found, baseline)}; difference "
        f"{listed(apart.mean(axis=1).tolist())}",
    )


def _described(found: Found, name: str) -> str:
    return f"{name}: score {_scores(found, name).mean():.3f}, {_calls(found, name):.3g} calls per env step"


def _scores(found: Found, name: str) -> np.ndarray:
    """Return the scores `[seeds, episodes]`."""
    return np.array([part["score"] for part in found[name]])


def _calls(found: Found, name: str) -> float:
    return float(np.mean([part["calls"] for part in found[name]]))


def mean_of(values: np.ndarray) -> Measure:
    """Return the mean of `[seeds, episodes]` with the 95 % interval of a two-level bootstrap.

    Training seeds are drawn again, and within each of them its episodes: the interval is for other trainings, too,
    as far as three of them can tell.
    """
    rng, (seeds, episodes) = np.random.default_rng(0), values.shape
    drawn = rng.integers(0, seeds, (RESAMPLES, seeds, 1))
    means = values[drawn, rng.integers(0, episodes, (RESAMPLES, seeds, episodes))].mean(axis=(1, 2))
    low, high = np.quantile(means, (0.025, 0.975))
    return Measure(float(values.mean()), float(low), float(high))


def outcome(difference: Measure) -> str:
    """Return what the interval of a difference says."""
    if difference.low is not None and difference.low > 0:
        return "wins"
    return "loses" if difference.high is not None and difference.high < 0 else "ties"


def _plot(run: Run, task: Task, found: Found) -> None:
    with run.plot(task.name, 8.0, 5.0) as axes:
        for index, (label, names) in enumerate(LINES.items()):
            measured = {name: mean_of(_scores(found, name)) for name in names}
            x, y = [_calls(found, name) for name in measured], [each.value for each in measured.values()]
            ends = [(each.low, each.high) for each in measured.values()]
            style = {"color": f"C{index % 10}", "marker": "os^D"[index // 5], "label": label}
            axes.plot(x, y, **style)
            axes.vlines(x, *np.array(ends, dtype=float).T, color=style["color"], alpha=0.4)
        axes.set_title(f"{task.name}: {len(SEEDS)} trainings, {EPISODES} episodes each, 95 % intervals")
        axes.set_xscale("log")
        axes.set_xlabel("network calls per env step")
        axes.set_ylabel("largest coverage" if task.env == "pusht" else "success")
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))


def ci(run: Run) -> list[Claim]:
    """Count the network calls of every way on untrained policies."""
    task = Task("micro/fork2d", 1, options={})
    episodes = collect(task.env, 4, seed=COLLECT_SEED)
    kinds = sorted({way.kind for way in WAYS.values()} - {"student"})
    policies = {kind: untrained(kind, episodes, 0).eval() for kind in kinds}
    policies["student"] = make_student(policies["base"], STUDENT).eval()
    runner, equal, cost = cached(policies["transformer"], episodes, 1)
    plain = [way for way in WAYS.values() if way.runtime.method != "block-cache"]
    off = [_miscounted(way, policies[way.kind], task, episodes) for way in plain]
    obs = observations(runner, episodes, 1)
    per_step = [[WAYS[name].calls / WAYS[name].steps for name in pair] for pair in PAIRS]
    zero = Margin(low=0.0, high=0.0)
    return [
        Claim(
            f"network calls of {len(plain)} ways, counted",
            "as booked",
            Measure(float(max(off))),
            None,
            zero,
            "largest difference over the first two chunks of an episode; counted at the network",
        ),
        Claim(
            f"calls per env step of {len(PAIRS)} accelerators and of DDIM beside them",
            "equal",
            Measure(max(abs(ours - baseline) for ours, baseline in per_step)),
            None,
            zero,
            "largest difference, from the second chunk of an episode on",
        ),
        Claim(
            "first chunk of a warm start",
            "DDIM's calls for 8 env steps",
            Measure(max(abs(way.first - way.calls * TA / way.steps) for way in plain if way.first is not None)),
            None,
            zero,
            "largest difference",
        ),
        Claim(
            "multiplications of the block cache, in whole network calls, less DDIM's beside it",
            "rounded",
            Measure(abs(cost.cached(runner.options) / cost.call - equal)),
            None,
            Margin(high=0.5),
            f"DDIM-{equal}; the cached network is entered {counted(runner, runner.network, obs, 1)[0]} times",
        ),
    ]


def _miscounted(way: Way, policy: Any, task: Task, episodes: Episodes) -> int:
    """Return by how much the counted network calls of two chunks differ from what the way says."""
    runner = running(way, policy, task, episodes)
    counts = counted(runner, entry(policy), observations(policy, episodes, 1), 2)
    booked = [way.calls if way.first is None else way.first, way.calls]
    return max(abs(a - b) for a, b in zip(counts, booked, strict=True))


TIERS = {"ci": ci, "gpu": gpu}
