"""One network, several processes: sample a flow as a DDPM, score the chain, compose a flow with a diffusion model.

All Gaussian processes are one up to scale at equal noise-to-signal ratio. `ProcessView` uses that, so a model trained
as a flow gets the stochastic samplers of DDPM, and two models trained in different processes can be combined. Here the
models are closed forms, so every answer is known. Run it:  python examples/view_flow_as_ddpm.py
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from dipole.diffusion import (
    DDIM,
    DDPM,
    VP,
    Denoiser,
    Flow,
    GaussianDenoiser,
    ProcessView,
    sample,
    sample_chain,
    score_chain,
)


@dataclass(frozen=True)
class Sum:
    """Composition: a weighted sum of denoisers of one process, as a denoiser. Wrappers like this one nest."""

    parts: tuple[Denoiser, ...]
    weights: tuple[float, ...]

    def __call__(self, x: Tensor, t: float, cond: object = None) -> Tensor:
        """Return the combined x0_hat."""
        return sum(w * part(x, t, cond) for part, w in zip(self.parts, self.weights, strict=True))


def show(name: str, x: Tensor) -> None:
    """Print mean and standard deviation of samples `[B, 2]`."""
    mean, std = x.mean(0).tolist(), x.std(0).tolist()
    print(f"{name:38s} mean ({mean[0]:+.2f}, {mean[1]:+.2f})  std ({std[0]:.2f}, {std[1]:.2f})")


def main() -> None:
    """View, score, compose."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="fewer samples")
    count = 1000 if parser.parse_args().fast else 10_000
    g = torch.Generator().manual_seed(0)
    flow, vp = Flow(), VP.cosine(100)

    print("A model trained as a flow; its data have mean (1, 0) and std (0.3, 0.6):")
    trained = GaussianDenoiser(torch.tensor([1.0, 0.0]), torch.diag(torch.tensor([0.3, 0.6]) ** 2), flow)
    seen = ProcessView(trained, own=flow, other=vp)
    show("flow, Euler, 20 steps", sample(trained, flow, flow.levels(20), DDIM(), shape=(count, 2), generator=g))
    show("the same seen as VP, DDIM, 20 steps", sample(seen, vp, vp.levels(20), DDIM(), shape=(count, 2), generator=g))
    show(
        "the same seen as VP, DDPM, 100 steps", sample(seen, vp, vp.levels(100), DDPM(), shape=(count, 2), generator=g)
    )

    print("\nThe kernel that drew a chain also scores it, so a policy-gradient ratio is 1 before the first update:")
    kernel = DDIM(eta=1.0)
    chain = sample_chain(seen, vp, vp.levels(10), kernel, shape=(4, 2), generator=g)
    drawn = range(9)  # the last step, to the clean level, adds no noise: it has no density
    before = score_chain(seen, vp, kernel, chain, reduce="sum", steps=drawn)
    again = score_chain(seen, vp, kernel, chain, reduce="sum", steps=drawn)
    shifted = GaussianDenoiser(torch.tensor([1.1, 0.0]), trained.cov, flow)
    after = score_chain(ProcessView(shifted, flow, vp), vp, kernel, chain, reduce="sum", steps=drawn)
    print(f"log-probabilities {list(before.shape)}: ratio {(again - before).exp().mean():.6f} for the same model,")
    print(f"{(after - before).sum(0).exp().mean():.3f} for one whose mean has moved by 0.1")

    print("\nA flow and a DDPM-trained model combined, level by level, at equal noise-to-signal ratio:")
    other = GaussianDenoiser(torch.tensor([-1.0, 0.0]), trained.cov, vp)
    for weight in (0.0, 0.5, 1.0):
        both = Sum((seen, other), (weight, 1 - weight))
        x = sample(both, vp, vp.levels(50), DDIM(), shape=(count, 2), generator=g)
        show(f"{weight:.1f} x flow + {1 - weight:.1f} x diffusion", x)


if __name__ == "__main__":
    main()
