"""Compose policies at test time: mix the scores of two or more, search the weights, judge on episodes never searched.

Nothing is trained. Parents may differ in process (diffusion, flow), observations (state, images), chunk length and
units of the action; not in the robot or its control rate. The result is a folder for `dipole eval` and `dipole serve`
that names the parents' folders: keep those where they are.

Examples:
  dipole compose runs/a runs/b --env pusht
  dipole compose runs/state runs/image --env pusht-image --env-options keypoints=true --weights 0.4 0.6
  dipole compose runs/a runs/b runs/c --env pusht --divisions 5 --search-episodes 10
  dipole compose runs/a runs/b --env pusht --operator and --sampler ddim:20
  dipole compose runs/a runs/b --env pusht --json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dipole.cli.words import env_options

if TYPE_CHECKING:
    from dipole.evaluation.weight_search import SearchResult, Verdict


@dataclass
class Args:
    """Options of `dipole compose`."""

    parents: tyro.conf.Positional[tuple[Path, ...]]
    """Two or more run or checkpoint folders; the first gives the sampler and the units of the action."""
    env: str
    """Environment to search and judge in (see `dipole env list`)."""
    weights: tuple[float, ...] = ()
    """One weight per parent, their sum 1; left out: searched in the environment."""
    operator: Literal["convex", "and", "or"] = "convex"
    """Mean of the scores, or superposition: as likely under all (and), likely under one (or)."""
    out: Path = Path("runs/composed")
    """Folder of the composed policy."""
    sampler: str | None = None
    """Sampler in place of the first parent's, written name:steps, e.g. ddim:10."""
    action_horizon: int | None = None
    """Actions executed per chunk; default the fewest of the parents'."""
    tolerance: float = 1e-3
    """Accept parents whose normalisations differ between components of the action by up to this fraction."""
    divisions: int = 10
    """Weights searched: the multiples of one part in so many."""
    search_episodes: int = 20
    """Episodes of every weight in the first round; the better half gets as many again, and so on."""
    rounds: int = 3
    """Rounds of the search."""
    episodes: int = 100
    """Episodes of the verdict."""
    seed: int = 0
    """Which block of evaluation seeds the verdict is on."""
    num_envs: int = 16
    """Environments run at once. Does not change the result."""
    max_steps: int | None = None
    """Longest episode in env steps, in place of the environment's own."""
    env_options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Options of the environment, e.g. keypoints=true for a Push-T with pictures and the numbers."""
    mode: Literal["sync", "async", "native"] | None = None
    """How environments run at once."""
    device: str = "cpu"
    """Where the policies run: cpu or cuda."""
    json: bool = False
    """Print one JSON document and nothing else."""


def run(args: Args) -> None:
    """Compose, search, judge, save."""
    from dipole.envs import make
    from dipole.errors import DipoleError
    from dipole.evaluation.seeds import episode_seeds, first_seed
    from dipole.evaluation.weight_search import WeightSearch
    from dipole.policies import save_policy
    from dipole.policies.composed import compose

    seed = first_seed(args.seed)
    episode_seeds(seed, args.episodes)  # impossible numbers are reported before policies are loaded
    config = WeightSearch(args.divisions, args.search_episodes, args.rounds)
    options = env_options(args.env_options, args.env)
    if args.operator == "and" and args.weights:
        raise DipoleError("operator 'and' has no weights: leave --weights out")
    policy = compose(
        args.parents,
        args.weights or None,
        operator=args.operator,
        action_horizon=args.action_horizon,
        tolerance=args.tolerance,
    ).to(args.device)
    if args.sampler is not None:
        from dipole.evaluation.sweep import parse_sampler

        policy = policy.with_sampler(parse_sampler(args.sampler, policy.sampler))
    env = make(args.env, num_envs=max(1, args.num_envs), mode=args.mode, **options)
    found = None
    try:
        if not args.weights and args.operator == "convex":
            found = _search(args, policy, env, config)
            policy = policy.with_weights(found.best)
        verdict = _judge(args, policy, env, found, seed)
    finally:
        env.close()
    save_policy(policy, args.out)
    verdict.composed.save(args.out / "evaluation.json")
    document = _document(args, policy, found, verdict)
    from dipole.serialization import write_json

    write_json(args.out / "composition.json", document)
    if args.json:
        import json

        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        _print(args, policy, found, verdict)


def _search(args: Args, policy: Any, env: Any, config: Any) -> SearchResult:
    from dipole.evaluation.progress import EpisodeBar
    from dipole.evaluation.weight_search import planned, search_weights

    with EpisodeBar(planned(config, len(args.parents)), "search") as bar:
        return search_weights(policy, env, config, max_steps=args.max_steps, progress=bar)


def _judge(args: Args, policy: Any, env: Any, found: SearchResult | None, seed: int) -> Verdict:
    from dipole.evaluation.progress import EpisodeBar
    from dipole.evaluation.weight_search import judge

    best = None if found is None else found.best_parent
    with EpisodeBar(args.episodes * (len(args.parents) + 1), "verdict") as bar:
        return judge(policy, env, best, args.episodes, seed, max_steps=args.max_steps, progress=bar)


def _document(args: Args, policy: Any, found: SearchResult | None, verdict: Verdict) -> dict[str, Any]:
    from dipole.serialization import to_dict

    def short(evaluation: Any) -> dict[str, Any]:
        return {"success": to_dict(evaluation.success), "score": to_dict(evaluation.score)}

    return {
        "env": args.env,
        "env_options": env_options(args.env_options, args.env),
        "parents": [str(parent) for parent in args.parents],
        "operator": args.operator,
        "weights": list(policy.weights),
        "search": None if found is None else to_dict(found),
        "episodes": args.episodes,
        "first_seed": verdict.composed.settings["first_seed"],
        "composed": short(verdict.composed),
        "alone": [short(parent) for parent in verdict.parents],
        "against": str(args.parents[verdict.against]),
        "comparison": to_dict(verdict.comparison),
        "fingerprint": verdict.composed.fingerprint,
        "saved": str(args.out),
    }


def _print(args: Args, policy: Any, found: SearchResult | None, verdict: Verdict) -> None:
    from dipole.evaluation.wording import number, percent

    def weights(values: Any) -> str:
        return " ".join(f"{value:g}" for value in values)

    if found is not None:
        print(f"search      {found.episodes} episodes, seeds from {found.config.seed}, score by weights:")
        for trial in found.trials:
            mark = "  <- chosen" if trial.weights == found.best else ""
            print(f"  {weights(trial.weights):16s}{number(trial.score):>8s}  ({trial.episodes} episodes){mark}")
    rows = [(f"composed ({args.operator} {weights(policy.weights)})", verdict.composed)]
    rows += [(str(path), parent) for path, parent in zip(args.parents, verdict.parents, strict=True)]
    print(f"verdict     {args.episodes} episodes, seeds from {verdict.composed.settings['first_seed']}:")
    for label, evaluation in rows:
        success, score = evaluation.success, evaluation.score
        interval = f"({percent(success.low)} to {percent(success.high)})"
        extra = "" if evaluation.score_name == "success" else f"  {evaluation.score_name} {number(score.value)}"
        print(f"  {percent(success.value):>4s} % {interval:14s}{extra}  {label}")
    print(f"A = {args.parents[verdict.against]}, B = composed. {verdict.comparison.verdict}")
    print(f"saved in {args.out}")
