"""The exact properties of MoDE (spec a 3e): fusing is exact, routing sees the level alone, no cache goes stale."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dipole.diffusion import EDM
from dipole.networks.moe import MoDE, MoDEConfig
from dipole.networks.routing import Routing, load_balance
from dipole.systems.card import Claim, Margin, Measure

_SIZE: dict[str, Any] = {"embed_dim": 64, "num_layers": 4, "num_heads": 4}


def multiplications(mixture: MoDEConfig, dense: MoDEConfig) -> Claim:
    """Count the multiplications of one feed-forward layer, fused, against a dense one of all experts' size."""
    counts = []
    for config in (mixture, dense):
        network = MoDE(config, 2, 10, {"goal": (1, 16)}).requires_grad_(False).eval()
        block, noise = network.layers[0], torch.zeros(1, config.embed_dim)
        routing = block.router(noise)
        fused = block.experts.fuse(routing.selected[0], routing.weights[0])
        with FlopCounterMode(display=False) as counter:
            block._feed(torch.zeros(1, 12, config.embed_dim), fused)
        counts.append(counter.get_total_flops() / 2e6)
    return Claim(
        "multiplications of a feed-forward layer",
        "a sixteenth quoted; half possible",
        Measure(counts[0], unit="M"),
        Measure(counts[1], unit="M"),
        Margin("ratio", low=0.5, high=0.5),
        "counted by torch; baseline: dense, as large as all experts together",
    )


def exact_checks() -> list[Claim]:
    """Return one claim per property."""
    exact = Margin(high=1e-12)
    return [
        Claim(
            "fused experts equal routed ones",
            "5.7e-14",
            Measure(_fused_error()),
            None,
            exact,
            "relative, float64",
        ),
        Claim("one expert is a dense layer", "0", Measure(_dense_error()), None, exact),
        Claim("all experts, zero router: their mean", "0", Measure(_mean_error()), None, exact),
        Claim("tokens do not change the routing", "0", Measure(_token_error()), None, Margin(high=0.0)),
        Claim("load balance is k when uniform", "2", Measure(_uniform_balance()), None, Margin(low=2.0, high=2.0)),
        Claim("changed weights empty the cache", "0", Measure(_stale_error()), None, exact),
        Claim("a level not in the cache warns", "1", Measure(_warnings()), None, Margin(low=1.0)),
    ]


def _network(seed: int = 0, **options: Any) -> tuple[MoDE, Tensor, dict[str, Tensor]]:
    """Return a float64 network with sharp routers, and inputs for it."""
    torch.manual_seed(seed)
    network = MoDE(MoDEConfig(**{**_SIZE, **options}), 3, 5, {"goal": (1, 4)}).double().eval()
    with torch.no_grad():
        for block in network.layers:
            block.experts.b1.normal_(std=0.1)
            for parameter in block.router.parameters():
                parameter.mul_(40)
    return network, torch.randn(3, 5, 3).double(), {"goal": torch.randn(3, 1, 4).double()}


def _times(*sigmas: float) -> Tensor:
    return EDM().network_time(torch.tensor(sigmas, dtype=torch.float64))


@torch.no_grad()
def _fused_error() -> float:
    worst = 0.0
    for seed in range(8):
        network, x, cond = _network(seed, residual="code" if seed % 2 else "prenorm")
        prepared = network.prepare(_times(80.0, 1.0, 0.01), cond)
        for sigma in (80.0, 1.0, 0.01):
            time = _times(sigma).expand(3)
            routed = network(x, time, cond)
            worst = max(worst, float((prepared(x, time, cond) - routed).abs().max() / routed.abs().max()))
    return worst


@torch.no_grad()
def _dense_error() -> float:
    network, _, _ = _network(num_experts=1, top_k=1)
    block, x, noise = network.layers[0], torch.randn(3, 5, 64).double(), torch.randn(3, 64).double()
    u, g = F.linear(x, block.experts.w1[0], block.experts.b1[0]).chunk(2, -1)
    dense = F.linear(u * F.silu(g), block.experts.w2[0])
    return float((block.experts(x, block.router(noise)) - dense).abs().max())


@torch.no_grad()
def _mean_error() -> float:
    network, _, _ = _network(num_experts=4, top_k=4)
    block, x = network.layers[0], torch.randn(3, 5, 64).double()
    for parameter in block.router.parameters():
        nn.init.zeros_(parameter)
    mean = torch.stack([block.experts.one(expert, x) for expert in range(4)]).mean(0)
    return float((block.experts(x, block.router(torch.randn(3, 64).double())) - mean).abs().max())


@torch.no_grad()
def _token_error() -> float:
    network, x, cond = _network()
    time = _times(80.0, 1.0, 0.01)
    first, second = (network.route(scale * x, time, {"goal": scale * cond["goal"]})[1] for scale in (1.0, -3.0))
    return max(float((a.weights - b.weights).abs().max()) for a, b in zip(first, second, strict=True))


def _uniform_balance() -> float:
    selected = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]])
    routing = Routing(torch.full((4, 4), 0.25), selected, torch.full((4, 2), 0.5))
    return float(load_balance([routing]))


@torch.no_grad()
def _stale_error() -> float:
    network, x, cond = _network()
    time = _times(1.0).expand(3)
    network.prepare(time[:1])(x, time, cond)
    network.layers[0].experts.w2[:, 0, 0] += 1.0
    return float((network.prepare(time[:1])(x, time, cond) - network(x, time, cond)).abs().max())


@torch.no_grad()
def _warnings() -> float:
    network, x, cond = _network()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        network.prepare(_times(1.0))(x, _times(0.3).expand(3), cond)
    return float(len(caught))
