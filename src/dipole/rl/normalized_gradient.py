"""Directions of steepest ascent from few trajectories: normalised steps, momentum without its bias.

Source: Fatkhullin et al., "Stochastic Policy Gradient Methods: Improved Sample Complexity for Fisher-non-degenerate
Policies" (ICML 2023). Momentum averages gradients of parameters that are no longer the present ones. N-PG-IGT (implicit
gradient transport) samples at an extrapolated point, so that the average is the present gradient as far as the
gradient is linear; N-HARPG corrects the old average by the Hessian times the last step, from a second trajectory:

    N-PG-IGT   th~ = th_t + (1 - eta)/eta (th_t - th_{t-1}),  tau ~ pi_th~,  d_t = (1 - eta) d_{t-1} + eta g(tau, th~)
    (N-)HARPG  th^ = q th_t + (1 - q) th_{t-1}, q ~ U[0, 1],  tau^ ~ pi_th^,  tau ~ pi_th_t
               d_t = (1 - eta) (d_{t-1} + B(tau^, th^) (th_t - th_{t-1})) + eta g(tau, th_t)
    th_{t+1} = th_t + gamma_t d_t / ||d_t||        (HARPG: gamma_t d_t)

with g = grad Phi, B = grad Phi (grad log p)^T + Hess Phi of each trajectory's Phi = sum_h (reward from h on) log pi_h.

Unlike the authors' code: both terms of B have the same sign, and log p is that of a whole trajectory, multiplied
trajectory by trajectory (theirs: the first term's sign is turned, and means over the pooled batch are multiplied).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dipole.errors import DipoleError, unknown

Transport = Literal["none", "igt", "hessian"]
Decay = Literal["constant", "linear", "root"]


@dataclass(frozen=True)
class DirectionConfig:
    """How the direction is averaged and how far a step goes; see `PRESETS` for the published methods.

    Attributes:
        transport: How old gradients are brought to the present parameters.
        normalized: Every step has length gamma_t, whatever the gradient's.
        length: gamma_0.
        decay: gamma_t = gamma_0 (constant), gamma_0 2/(t + 2) (linear), or gamma_0 sqrt(eta_t) (root).
        eta: Weight of the newest gradient; None for the schedule (2/(t + 2))^power. With 1 nothing is averaged.
        power: Of the schedule.
        reach: Longest extrapolation; None for any. (1 - eta)/eta grows, so a large step is extrapolated far.
    """

    transport: Transport = "igt"
    normalized: bool = True
    length: float = 0.1
    decay: Decay = "linear"
    eta: float | None = None
    power: float = 0.8
    reach: float | None = None

    def __post_init__(self) -> None:
        if self.eta is not None and not 0 < self.eta <= 1:
            raise DipoleError(f"eta {self.eta:g}: the newest gradient's weight must lie in (0, 1]")
        if self.length <= 0:
            raise DipoleError(f"length {self.length:g}: a step must be longer than 0")

    def weight(self, t: int) -> float:
        """Return eta_t, t = 0, 1, ...; the first gradient always has weight 1 (d_0 = g)."""
        if t == 0:
            return 1.0
        return (2 / (t + 2)) ** self.power if self.eta is None else self.eta

    def step_length(self, t: int) -> float:
        """Return gamma_t."""
        factor = {"constant": 1.0, "linear": 2 / (t + 2), "root": math.sqrt(self.weight(t))}
        return self.length * factor[self.decay]


PRESETS = {
    "pg": DirectionConfig("none", normalized=False, eta=1.0, decay="constant"),
    "npg": DirectionConfig("none"),
    "npg-igt": DirectionConfig("igt"),
    "n-harpg": DirectionConfig("hessian", power=1.0),
    "harpg": DirectionConfig("hessian", normalized=False, power=1.0, decay="root"),
}
"""Policy gradient, its normalised form with momentum, and the published methods."""


def preset(name: str, **changes: Any) -> DirectionConfig:
    """Return a method of `PRESETS` with some settings changed."""
    if name not in PRESETS:
        raise unknown("direction", name, PRESETS)
    return replace(PRESETS[name], **changes)


class Track(NamedTuple):
    """Where an ascent is. Leading dimensions are independent ascents.

    Attributes:
        theta: `[..., P]` parameters th_t.
        previous: `[..., P]` th_{t-1}.
        direction: `[..., P]` d_{t-1}.
        t: Steps taken.
    """

    theta: Tensor
    previous: Tensor
    direction: Tensor
    t: int

    @classmethod
    def start(cls, theta: Tensor) -> Track:
        """Return the track before the first step."""
        return cls(theta, theta, torch.zeros_like(theta), 0)

    @property
    def displacement(self) -> Tensor:
        """Return th_t - th_{t-1}."""
        return self.theta - self.previous

    def between(self, q: Tensor | float) -> Tensor:
        """Return th^ = q th_t + (1 - q) th_{t-1}, where the Hessian's trajectory is sampled."""
        return q * self.theta + (1 - q) * self.previous


def sampling_point(config: DirectionConfig, track: Track) -> Tensor:
    """Return the parameters at which the next gradient is to be sampled: th~ with `igt`, else th_t."""
    if config.transport != "igt":
        return track.theta
    eta = config.weight(track.t)
    shift = (1 - eta) / eta * track.displacement
    if config.reach is not None:
        norm = torch.linalg.vector_norm(shift, dim=-1, keepdim=True)
        shift = shift * (config.reach / norm.clamp(min=config.reach))
    return track.theta + shift


def advance(config: DirectionConfig, track: Track, gradient: Tensor, correction: Tensor | None = None) -> Track:
    """Take one step.

    Args:
        config: Settings.
        track: Before the step.
        gradient: `[..., P]` estimate of grad J at `sampling_point(config, track)`.
        correction: `[..., P]` B v for v = `track.displacement`; needed by `hessian` after the first step.
    """
    eta = config.weight(track.t)
    old = track.direction
    if config.transport == "hessian" and track.t:
        if correction is None:
            raise ValueError("the direction needs the Hessian's correction")
        old = old + correction
    direction = (1 - eta) * old + eta * gradient
    step = direction
    if config.normalized:
        norm = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        step = direction / torch.where(norm > 0, norm, torch.ones_like(norm))
    theta = track.theta + config.step_length(track.t) * step
    return Track(theta, track.theta, direction, track.t + 1)


def hessian_term(
    phi: Tensor, log_prob: Tensor, parameters: Sequence[Tensor], vector: Sequence[Tensor], keep: bool = False
) -> tuple[Tensor, ...]:
    """Return B v, averaged over the trajectories (the last dimension); its expectation is Hess J v.

        B v = mean_n [grad Phi_n (grad log p_n . v) + Hess Phi_n v]

    Args:
        phi: `[..., N]` Phi of each trajectory, a function of `parameters`.
        log_prob: `[..., N]` log-probability of each trajectory, up to what the policy does not change.
        parameters: What both depend on; of several ascents at once, one tensor `[..., P]`.
        vector: v, in the shapes of `parameters`.
        keep: Keep the graph, to differentiate the same Phi again.
    """
    dummy = torch.ones_like(log_prob, requires_grad=True)
    pulled = torch.autograd.grad(log_prob, parameters, dummy, create_graph=True)
    along = sum((a * b).sum() for a, b in zip(pulled, vector, strict=True))
    # Pulling back is linear in `dummy`: the gradient by it is each trajectory's grad log p . v.
    (slope,) = torch.autograd.grad(along, dummy, retain_graph=True)  # type: ignore[arg-type]
    first = torch.autograd.grad((slope.detach() * phi).mean(-1).sum(), parameters, retain_graph=True)
    gradient = torch.autograd.grad(phi.mean(-1).sum(), parameters, create_graph=True)
    dotted: Any = sum((a * b).sum() for a, b in zip(gradient, vector, strict=True))
    if not dotted.requires_grad:  # Phi is linear in the parameters
        return tuple(first)
    second = torch.autograd.grad(dotted, parameters, retain_graph=keep, allow_unused=True, materialize_grads=True)
    return tuple(a + b for a, b in zip(first, second, strict=True))


class DirectedOptimizer(Optimizer):
    """The same as an optimiser of a network's parameters, all of them together one vector.

    Between steps the parameters are at the point where the next gradient is to be sampled (`igt`: not where the ascent
    is; `centre` says that). As everywhere in torch, `grad` is that of a loss: the ascent follows its opposite.

    Args:
        parameters: What to train.
        config: Settings.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: DirectionConfig) -> None:
        super().__init__(list(parameters), {})
        self.config = config

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters."""
        return [p for group in self.param_groups for p in group["params"]]

    def track(self) -> Track:
        """Return where the ascent is, `[P]`."""
        own = self.parameters
        if own[0] not in self.state:
            return Track.start(_flat(own))
        centre, previous, direction = (
            _flat([self.state[p][key] for p in own]) for key in ("centre", "previous", "direction")
        )
        return Track(centre, previous, direction, int(self.state[own[0]]["step"]))

    def centre(self) -> list[Tensor]:
        """Return th_t, in the parameters' shapes: the weights to deploy."""
        return [self.state[p]["centre"] if p in self.state else p.detach() for p in self.parameters]

    def displacement(self) -> list[Tensor]:
        """Return v = th_t - th_{t-1}, in the parameters' shapes."""
        return _shaped(self.track().displacement, self.parameters)

    def move_between(self, q: float) -> None:
        """Put the parameters at th^, to sample the Hessian's trajectories."""
        _write(self.parameters, self.track().between(q))

    def move_back(self) -> None:
        """Put the parameters where gradients are sampled."""
        _write(self.parameters, sampling_point(self.config, self.track()))

    @torch.no_grad()
    def step(self, closure: Any = None, correction: Sequence[Tensor] | None = None) -> None:  # type: ignore[override]
        """Take a step along the direction and move on to the next sampling point.

        Args:
            closure: Not used.
            correction: B v of what is maximised, in the parameters' shapes.
        """
        own = self.parameters
        gradient = -_flat([torch.zeros_like(p) if p.grad is None else p.grad for p in own])
        track = advance(self.config, self.track(), gradient, None if correction is None else _flat(correction))
        for name, vector in (("centre", track.theta), ("previous", track.previous), ("direction", track.direction)):
            for p, part in zip(own, _shaped(vector, own), strict=True):
                self.state[p][name] = part.clone()
        for p in own:
            self.state[p]["step"] = torch.tensor(track.t, dtype=torch.int64)
        _write(own, sampling_point(self.config, track))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _shaped(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(vector, [tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


@torch.no_grad()
def _write(parameters: Sequence[Tensor], vector: Tensor) -> None:
    for tensor, part in zip(parameters, _shaped(vector, parameters), strict=True):
        tensor.copy_(part)
