"""Exact checks of Reactive Diffusion Policy: what must hold for any weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dipole.data.features import Feature
from dipole.data.normalizer import Normalizer
from dipole.networks.action_codec import ActionCodec, CodecConfig, Posterior
from dipole.policies.rdp import RdpConfig, RdpPolicy
from dipole.systems.card import Claim, Margin, Measure

STATE, FORCE = "observation.state", "observation.force"
_NETWORK = {"name": "mlp", "width": 16, "num_blocks": 1, "context_width": 8, "step_embed_dim": 8, "dropout": 0.0}


def tiny_rdp(seed: int = 0, **options: Any) -> RdpPolicy:
    """Return a small policy with random weights: two actions, three numbers of state, one of force."""
    config = RdpConfig(
        observation={STATE: Feature("float32", (3,)), FORCE: Feature("float32", (1,))},
        action=Feature("float32", (2,)),
        **{
            "fast": (FORCE,),
            "obs_horizon": 3,
            "pred_horizon": 16,
            "period": 6,
            "latency": 2,
            "network": {**_NETWORK, "per_position_levels": False},
            **options,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        affine = {STATE: torch.ones(3), FORCE: torch.full((1,), 0.5), "action": torch.full((2,), 2.0)}
        return RdpPolicy(config, Normalizer({key: (scale, scale - 1) for key, scale in affine.items()})).eval()


def felt(ticks: int, batch: int = 2, seed: int = 3) -> dict[str, Tensor]:
    """Return random observations of some ticks, each `[B, ticks, ...]`."""
    g = torch.Generator().manual_seed(seed)
    return {STATE: torch.randn(batch, ticks, 3, generator=g), FORCE: torch.randn(batch, ticks, 1, generator=g)}


@torch.no_grad()
def drive(policy: RdpPolicy, signals: dict[str, Tensor], noise: Tensor) -> Tensor:
    """Return the actions `[B, ticks, Da]` of an episode that observes `signals` (the first one repeated before it)."""
    to, ticks = policy.obs_horizon, signals[FORCE].shape[1]
    padded = {key: torch.cat([value[:, :1].expand(-1, to - 1, -1), value], dim=1) for key, value in signals.items()}
    state, actions = policy.initial_state(len(noise)), []
    for tick in range(ticks):
        chunk, state = policy.act({key: value[:, tick : tick + to] for key, value in padded.items()}, state, noise)
        actions.append(chunk[:, 0])
    return torch.stack(actions, dim=1)


def codec_and_inputs(**options: Any) -> tuple[ActionCodec, Tensor, Tensor, Tensor]:
    """Return a codec, chunks `[5, 32, 2]`, fast sensors `[5, 32, 3]` and latents."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = ActionCodec(CodecConfig(**options), 2, 32, 3).eval()
        return codec, torch.randn(5, 32, 2), torch.randn(5, 32, 3), torch.randn(5, *codec.latent_shape)


@torch.no_grad()
def causality_error(tick: int = 11) -> float:
    """Return how much force felt later changes actions up to `tick`."""
    codec, _, fast, latent = codec_and_inputs()
    other = fast.clone()
    other[:, tick + 1 :] += 1.0
    change = (codec.decode(latent, fast)[0] - codec.decode(latent, other)[0]).abs().amax((0, 2))
    if float(change[tick + 1 :].min()) == 0:
        return float("nan")  # the check would show nothing
    return float(change[: tick + 1].max())


@torch.no_grad()
def streaming_error() -> float:
    """Return how far the carried decoder is from running it again over the growing prefix."""
    codec, _, fast, latent = codec_and_inputs()
    hidden, worst = None, 0.0
    for tick in range(32):
        now, hidden = codec.decode(latent, fast[:, tick : tick + 1], hidden)
        again, _ = codec.decode(latent, fast[:, : tick + 1])
        worst = max(worst, float((now[:, 0] - again[:, -1]).abs().max()))
    return worst


@torch.no_grad()
def open_loop_error() -> float:
    """Return how much force changes the actions when its weights are zero: the chunk is replayed."""
    codec, _, fast, latent = codec_and_inputs()
    weight: Any = codec.gru.weight_ih_l0
    weight[:, -codec.fast_dim :] = 0
    return float((codec.decode(latent, fast)[0] - codec.decode(latent, torch.zeros_like(fast))[0]).abs().max())


def encoder_gradient() -> float:
    """Return the largest gradient of the latent's moments with respect to the force."""
    policy = tiny_rdp()
    obs = felt(16)
    force = obs[FORCE].requires_grad_()
    batch = {STATE: obs[STATE][:, :3], FORCE: force[:, :3], "fast." + FORCE: force, "action": torch.randn(2, 16, 2)}
    posterior = policy.codec.encode(policy.chunks(batch))
    gradient = torch.autograd.grad(posterior.mean.sum() + posterior.log_variance.sum() + 0 * force.sum(), force)[0]
    return float(gradient.abs().max())


def certain_posterior_error() -> float:
    """Return how far a sample of a posterior of variance exp(-200) is from its mean."""
    mean = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0))
    drawn = Posterior(mean, torch.full_like(mean, -200.0)).sample(torch.Generator().manual_seed(1))
    return float((drawn - mean).abs().max())


@torch.no_grad()
def metric_error() -> float:
    """Return how far the training loss without KL is from the L1 distance of decode(encode(x)) and x."""
    codec, chunks, fast, _ = codec_and_inputs(kl_weight=0.0)
    loss = codec.loss(chunks, fast, torch.Generator().manual_seed(2))
    latent = codec.encode(chunks).sample(torch.Generator().manual_seed(2))
    return float((loss - F.l1_loss(codec.decode(latent, fast)[0], chunks)).abs())


@torch.no_grad()
def relative_error() -> float:
    """Return how far absolute poses are from themselves after being made relative to a base and back."""
    policy = tiny_rdp(base=STATE, base_dims=(0, 2))
    obs, action = felt(3), torch.randn(2, 16, 2, generator=torch.Generator().manual_seed(4))
    chunks = policy.chunks({**obs, "action": action})
    back = policy.normalizer.denormalize("action", chunks) + obs[STATE][:, -1, None, [0, 2]]
    return float((back - action).abs().max())


@torch.no_grad()
def latency_error(latency: int) -> float:
    """Return how far the first action of the second plan is from index To - 1 + latency of that plan."""
    policy = tiny_rdp(latency=latency)
    signals, noise = felt(14), torch.randn(2, *policy.codec.latent_shape, generator=torch.Generator().manual_seed(5))
    to, period = policy.obs_horizon, policy.config.period
    actions = drive(policy, signals, noise)
    seen = {key: value[:, period - to + 1 : period + 1] for key, value in signals.items()}
    latent = policy.plan(seen, noise)
    force = policy.fast({FORCE: signals[FORCE][:, period - to + 1 :]})
    whole = policy.normalizer.denormalize("action", policy.codec.decode(latent, force)[0])
    return float((actions[:, period + latency] - whole[:, to - 1 + latency]).abs().max())


def exact_checks() -> list[Claim]:
    """Return the claims of tier `ci`."""
    exact, close = Margin(low=0.0, high=0.0), Margin(high=1e-6)
    return [
        Claim("force felt later does not change earlier actions", "0", Measure(causality_error()), None, exact),
        Claim("carrying the decoder's state equals running it again", "0", Measure(streaming_error()), None, close),
        Claim("without weights on force a plan is replayed", "0", Measure(open_loop_error()), None, exact),
        Claim("gradient of the latent with respect to force", "0", Measure(encoder_gradient()), None, exact),
        Claim("a posterior without variance gives its mean", "0", Measure(certain_posterior_error()), None, exact),
        Claim("the training loss is the distance after decoding", "0", Measure(metric_error()), None, close),
        Claim("relative poses and back", "0", Measure(relative_error()), None, close),
        *(
            Claim(
                f"latency {k}: the first action is number To - 1 + {k} of the plan",
                "0",
                Measure(latency_error(k)),
                None,
                close,
            )
            for k in (0, 2, 5)
        ),
    ]
