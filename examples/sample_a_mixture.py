"""Processes, samplers and guidance without any training: the denoiser is the closed form of a known mixture.

Eight equal modes on a circle. We sample them in three processes with several samplers, then steer: push to one side,
ask for certain modes, fix a coordinate. Run it:  python examples/sample_a_mixture.py
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from dipole.diffusion import (
    DDIM,
    DDPM,
    EDM,
    VP,
    ClassifierFree,
    DPMSolverPP2M,
    Flow,
    GradientGuidance,
    Heun,
    Inpaint,
    LinearLabel,
    MixtureDenoiser,
    Process,
    sample,
)
from dipole.diffusion.guidance import gradient_of

STD = 0.1
ANGLES = torch.arange(8) * torch.pi / 4
MODES = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1).double()


def mixture(process: Process, modes: Tensor = MODES) -> MixtureDenoiser:
    """Return what a perfectly trained network would answer."""
    return MixtureDenoiser(torch.ones(len(modes)), modes, STD, process)


def describe(name: str, x: Tensor) -> None:
    """Print how many modes were found, and how far samples are from theirs (exact: sqrt(pi/2) std = 1.25)."""
    distance, mode = torch.cdist(x.double(), MODES).min(dim=1)
    print(f"{name:34s} modes {len(mode.unique())}/8   distance {distance.mean() / STD:5.2f} std")


@dataclass(frozen=True)
class ToldWhichMode:
    """A conditional denoiser: `cond["mode"]` `[B, 8]` is one-hot, or zeros where it is not told."""

    process: Process

    def __call__(self, x: Tensor, t: float, cond: dict[str, Tensor]) -> Tensor:
        """Return x0_hat: of the mode a row is told, or of the whole mixture."""
        each = torch.stack([mixture(self.process, mode[None])(x, t) for mode in MODES], dim=1)
        exact = (each * cond["mode"].unsqueeze(-1)).sum(dim=1)
        return torch.where(cond["mode"].sum(dim=1, keepdim=True) > 0, exact, mixture(self.process)(x, t))


def main() -> None:
    """Sample, then steer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="fewer samples")
    count = 64 if parser.parse_args().fast else 1000
    shape, g = (count, 2), torch.Generator().manual_seed(0)

    print("One loop for every process and sampler:")
    for process in (VP.cosine(100), Flow(), EDM(0.01, 10.0)):
        for kernel, steps in ((DDPM(), 50), (DDIM(), 10), (Heun(), 6), (DPMSolverPP2M(), 10)):
            x = sample(mixture(process), process, process.levels(steps), kernel, shape=shape, generator=g)
            describe(f"{type(process).__name__}, {type(kernel).__name__}, {steps} steps", x)

    print("\nGuidance is a wrapper around the denoiser, so the loop stays the same:")
    flow = Flow()
    levels, oracle = flow.levels(30)[1:], mixture(flow)  # just below pure noise, where guidance has something to push
    start = torch.randn(shape, generator=g) * flow.prior_std(levels[0]).float()
    label = LinearLabel([[1.0, 0.0]], [0.8], [[0.05]])  # "x was measured as 0.8, with variance 0.05"
    exact, plain = oracle.given(label).draw(count, g), sample(oracle, flow, levels, init=start)
    print(f"mean x: unguided {plain[:, 0].mean():+.2f}, of the exact posterior {exact[:, 0].mean():+.2f}")
    for where, gradient in (("x_t", oracle.label_score(label)), ("x0", gradient_of(label.log_prob))):
        x = sample(GradientGuidance(oracle, flow, gradient, where=where), flow, levels, init=start)
        print(f"  gradient at {where:3s}: mean x {x[:, 0].mean():+.2f}")

    cond = {"mode": torch.nn.functional.one_hot(torch.arange(16) % 2 * 4, 8).float()}  # east, west, east, ...
    x = sample(ClassifierFree(ToldWhichMode(flow), scale=1.0), flow, levels, cond=cond, init=start[:16])
    print(f"  told east, west, ...: x = {', '.join(f'{v:+.1f}' for v in x[:6, 0].tolist())}")

    x = sample(Inpaint(oracle, known=torch.zeros(2), mask=torch.tensor([True, False])), flow, levels, init=start)
    print(f"  x held at 0: x is {x[:, 0].abs().max():.0e}, |y| is {x[:, 1].abs().mean():.2f} on average")


if __name__ == "__main__":
    main()
