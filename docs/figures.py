"""The figures of the concepts page. Seeded, no training: the denoiser is the closed form of a mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from dipole.diffusion import DDIM, EDM, VP, DPMSolverPP2M, Flow, Heun, MixtureDenoiser, Process, sample

COLUMNS = 6
POINTS = 400


def ring(process: Process, modes: int = 5, std: float = 0.12) -> MixtureDenoiser:
    """Return the exact denoiser of a mixture: equal modes on the unit circle."""
    angle = torch.arange(modes, dtype=torch.float64) * 2 * torch.pi / modes
    return MixtureDenoiser(torch.ones(modes), torch.stack([angle.sin(), angle.cos()], 1), torch.tensor(std), process)


def generator(seed: int = 0) -> torch.Generator:
    """Return a seeded generator."""
    return torch.Generator().manual_seed(seed)


def save(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same in every run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", dpi=150, metadata={"Date": None})


def draw_processes(path: Path) -> None:
    """Draw alpha and sigma of each process over its level."""
    panels: list[tuple[str, Any, torch.Tensor]] = [
        ("VP.cosine(100)", VP.cosine(100), torch.arange(100).double()),
        ("VP.linear(1000)", VP.linear(1000, 1e-4, 0.02), torch.arange(1000).double()),
        ("Flow()", Flow(), torch.linspace(0, 1, 101).double()),
        ("EDM(), part of it", EDM(), torch.linspace(0, 3, 101).double()),
    ]
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    for axes, (title, process, levels) in zip(figure.subplots(1, 4), panels, strict=True):
        axes.plot(levels, process.alpha(levels), label="α, signal")
        axes.plot(levels, process.sigma(levels), label="σ, noise")
        axes.set(title=title, xlabel="level (right is noisier)")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    save(figure, path)


def draw_denoising(path: Path) -> None:
    """Draw a mixture being sampled: one row per process, one column per visited level."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    rows: list[tuple[str, Any]] = [("VP.cosine(100)", VP.cosine(100)), ("Flow()", Flow()), ("EDM()", EDM(0.01, 10.0))]
    grid = figure.subplots(len(rows), COLUMNS)
    for axes_row, (name, process) in zip(grid, rows, strict=True):
        steps: list[Any] = []
        levels = process.levels(20)
        denoiser = ring(process)
        final = sample(
            denoiser, process, levels, DDIM(), shape=(POINTS, 2), generator=generator(), callback=steps.append
        )
        samples = [(info.t, info.x) for info in steps] + [(steps[-1].s, final)]
        chosen = [samples[round(k * (len(samples) - 1) / (COLUMNS - 1))] for k in range(COLUMNS)]
        for axes, (level, x) in zip(axes_row, chosen, strict=True):
            scale = float((process.alpha(level) ** 2 + process.sigma(level) ** 2).sqrt())
            axes.scatter(x[:, 0] / scale, x[:, 1] / scale, s=2, linewidths=0, rasterized=True)
            axes.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
            axes.set_title(f"level {float(level):.3g}", fontsize=9)
        axes_row[0].set_ylabel(name)
    save(figure, path)


def draw_steps(path: Path) -> None:
    """Draw how far n network calls end from where the exact ODE ends, from the same noise."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels: list[tuple[str, Any, Any]] = [("Flow()", Flow(), "linear"), ("EDM(0.01, 10)", EDM(0.01, 10.0), "karras")]
    solvers: list[tuple[str, Any, int]] = [("DDIM", DDIM(), 1), ("Heun", Heun(), 2), ("DPM++ 2M", DPMSolverPP2M(), 1)]
    for axes, (title, process, spacing) in zip(figure.subplots(1, 2), panels, strict=True):
        denoiser = ring(process, std=0.3)
        noise = torch.randn(200, 2, generator=generator(1), dtype=torch.float64)
        init = noise * process.prior_std(process.noisiest)
        exact = sample(denoiser, process, process.levels(400, spacing), Heun(), init=init)
        for label, solver, calls in solvers:
            nfe, error = [], []
            for steps in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48):
                x0 = sample(denoiser, process, process.levels(steps, spacing), solver, init=init)
                nfe.append(calls * steps - (calls - 1))
                error.append(float((x0 - exact).norm(dim=1).mean()))
            axes.loglog(nfe, error, marker="o", markersize=3, label=label)
        axes.set(title=title, xlabel="network calls", ylabel="mean distance from the exact end")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    save(figure, path)


def draw_all(folder: Path) -> None:
    """Draw all figures into a folder."""
    mpl.rcParams["svg.hashsalt"] = "dipole"
    torch.set_num_threads(1)
    draw_processes(folder / "processes.svg")
    draw_denoising(folder / "denoising.svg")
    draw_steps(folder / "steps.svg")
