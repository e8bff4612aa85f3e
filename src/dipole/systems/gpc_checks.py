"""The exact checks of composition: closed forms of Gaussians in float64, and a micro environment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dipole.data import Feature
from dipole.data.normalizer import Normalizer
from dipole.diffusion import DDIM, DDPM, ContinuousVP, Flow, GaussianDenoiser, sample, to_epsilon, to_score, to_x0
from dipole.diffusion.guidance import And, Composition, Or
from dipole.diffusion.prediction import PREDICTION_TYPES, to_output
from dipole.diffusion.process_view import ProcessView
from dipole.networks import MLPConfig, full_config
from dipole.policies import DiffusionPolicy, PolicyConfig, SamplerConfig
from dipole.policies.composed import compose
from dipole.systems.card import Claim, Margin, Measure
from dipole.systems.experiment import play

FLOW, VP = Flow(), ContinuousVP()
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
OTHER = torch.diag(torch.tensor([0.3, 0.6], dtype=torch.float64))
M1, M2 = torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([-0.6, 0.4], dtype=torch.float64)
PARENTS = (GaussianDenoiser(M1, COV, FLOW), GaussianDenoiser(M2, OTHER, FLOW))
ROUNDING = Margin(high=1e-9)


def checks() -> list[Claim]:
    """Return the claims."""
    return [*_ends(), _types(), _equal_covariance(), _product(), _mixed_processes(), *_likelihoods(), _and(), *_or()]


def _points(rows: int = 32) -> Tensor:
    return torch.randn(rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _gap(a: Tensor, b: Tensor) -> Measure:
    return Measure(float((a - b).abs().max()))


def _policy(seed: int) -> DiffusionPolicy:
    vector = Feature("float32", (2,))
    config = PolicyConfig(
        {"observation.state": vector}, vector, 1, 4, 4, network=full_config(MLPConfig(width=16, num_blocks=1)),
        sampler=SamplerConfig("euler", 3),
    )  # fmt: skip
    one = torch.full((2,), 0.8), torch.zeros(2)
    torch.manual_seed(seed)
    policy = DiffusionPolicy(config, Normalizer({"observation.state": one, "action": one})).eval()
    for parameter in policy.network.parameters():  # a new network answers 0
        torch.nn.init.normal_(parameter, std=0.3)
    return policy


def _ends() -> list[Claim]:
    """All the weight on a parent, and a parent with itself, in episodes of `micro/two_goal`."""
    parents = [_policy(0), _policy(1)]

    def actions(policy: object) -> Tensor:
        runs = play(policy, "micro/two_goal", 4, keep_trajectories=True)
        return torch.cat([torch.from_numpy(e.trajectory.actions) for e in runs.episodes if e.trajectory is not None])

    zero, same = Margin(high=0.0), actions(parents[0])
    ends = _gap(actions(compose(parents, (1.0, 0.0))), same).value
    ends = max(ends, _gap(actions(compose(parents, (0.0, 1.0))), actions(parents[1])).value)
    twin = _gap(actions(compose([parents[0]] * 2, (0.3, 0.7))), same)
    note = "largest difference of actions in episodes of micro/two_goal"
    return [
        Claim("all the weight on a parent is the parent", "0", Measure(ends), None, zero, note),
        Claim("a parent with itself is itself", "0", twin, None, zero, note),
    ]


def _types() -> Claim:
    worst, x, t, weights = 0.0, _points(), 0.4, (0.3, 0.7)
    answers = [parent(x, t) for parent in PARENTS]
    composed = Composition(PARENTS, weights)(x, t)
    for kind in PREDICTION_TYPES:
        outputs = [to_output(answer, x, t, FLOW, kind) for answer in answers]  # type: ignore[arg-type]
        mixed = weights[0] * outputs[0] + weights[1] * outputs[1]
        worst = max(worst, _gap(to_x0(mixed, x, t, FLOW, kind), composed).value)  # type: ignore[arg-type]
    return Claim("mixing eps, x0, v or velocity is the same step", "0", Measure(worst), None, ROUNDING)


def _equal_covariance() -> Claim:
    parents = (PARENTS[0], GaussianDenoiser(M2, COV, FLOW))
    between = GaussianDenoiser(0.3 * M1 + 0.7 * M2, COV, FLOW)
    runs = [sample(d, FLOW, FLOW.levels(30), init=_points()) for d in (Composition(parents, (0.3, 0.7)), between)]
    return Claim("Gaussians of equal covariance give N(w m1 + (1 - w) m2, S)", "0", _gap(*runs), None, ROUNDING)


def _product() -> Claim:
    x, t, w = _points(), 1e-5, 0.3
    precision = w * torch.linalg.inv(COV) + (1 - w) * torch.linalg.inv(OTHER)
    pull = w * torch.linalg.solve(COV, M1) + (1 - w) * torch.linalg.solve(OTHER, M2)
    gap = _gap(to_score(Composition(PARENTS, (w, 1 - w))(x, t), x, t, FLOW), pull - x @ precision)
    # alpha = 1 - t moves scores of order 10 by 1e-4
    return Claim("without noise the score is that of p1^w p2^(1-w)", "0", gap, None, Margin(high=1e-3))


def _mixed_processes() -> Claim:
    """A flow seen at the log-SNR of a variance-preserving process."""
    x, worst = _points(), 0.0
    seen, direct = ProcessView(PARENTS[0], FLOW, VP), GaussianDenoiser(M1, COV, VP)
    for t in (0.05, 0.5, 0.9):
        worst = max(worst, _gap(to_epsilon(seen(x, t), x, t, VP), to_epsilon(direct(x, t), x, t, VP)).value)
    return Claim("flow and VP agree on eps at equal log-SNR", "0", Measure(worst), None, ROUNDING)


def _exact(x: Tensor, t: float) -> Tensor:
    """Return log-likelihoods relative to pure noise, `[M, B]`."""
    pure = -0.5 * (x / t).square().sum(-1) - 2 * math.log(t) - math.log(2 * math.pi)
    return torch.stack([parent.log_prob(x, t) for parent in PARENTS]) - pure


def _likelihoods() -> list[Claim]:
    claims = []
    for name, kernel, stochastic, steps, high in (
        # the trapezoidal rule along the ODE is of order 2, Ito's formula along the noisy chain of order 1/2
        ("along the ODE, with traces", DDIM(), False, 200, 0.01),
        ("along the ancestral chain, without (Ito)", DDPM(), True, 1000, 0.15),
    ):
        levels = torch.linspace(1, 0.2, steps + 1, dtype=torch.float64)
        follower = Or(PARENTS, FLOW, stochastic, probes=0).prepare(levels, None)
        seen: list[tuple[Tensor, float]] = []
        sample(
            follower, FLOW, levels, kernel, init=_points(), generator=torch.Generator().manual_seed(1),
            callback=lambda info, seen=seen: seen.append((info.x, float(info.t))),  # type: ignore[misc]
        )  # fmt: skip
        assert follower.likelihood is not None
        error = Measure(float((follower.likelihood - _exact(*seen[-1])).abs().mean()))
        claims.append(
            Claim(f"log-likelihood {name}", "0", error, None, Margin(high=high), f"{steps} steps, mean error")
        )
    return claims


def _and() -> Claim:
    levels = torch.linspace(0.8, 0.1, 801, dtype=torch.float64)
    init = _points()
    before = _exact(init, 0.8)
    changes = []
    for denoiser in (And(PARENTS, FLOW, probes=0), PARENTS[0]):
        after = _exact(sample(denoiser, FLOW, levels, init=init), 0.1)
        changes.append(float(((after - before)[0] - (after - before)[1]).abs().mean()))
    margin = Margin("ratio", high=0.05)
    note = "mean change of log q1 - log q2; baseline: the first parent alone; Euler, 800 steps"
    return Claim("AND keeps log q1 - log q2", "0", Measure(changes[0]), Measure(changes[1]), margin, note)


def _or() -> list[Claim]:
    levels = torch.linspace(1, 0.2, 11, dtype=torch.float64)
    follower = Or((PARENTS[0],) * 3, FLOW, probes=0).prepare(levels, None)
    sample(follower, FLOW, levels, init=_points())
    assert follower.kappa is not None
    gap = _gap(follower.kappa, torch.full_like(follower.kappa, 1 / 3))
    return [Claim("OR of equal parents has weights 1/M", "0", gap, None, Margin(high=1e-12))]
