"""Guidance: wrappers `Denoiser -> Denoiser` that change what is sampled. They nest."""

from dipole.diffusion.guidance.classifier_free import ClassifierFree, drop_conditioning, random_drop
from dipole.diffusion.guidance.composition import Composition, Selected, SpaceView
from dipole.diffusion.guidance.gradient import GradientGuidance, by_step, gradient_of
from dipole.diffusion.guidance.inpaint import Inpaint, hold
from dipole.diffusion.guidance.superposition import And, Or

__all__ = [
    "And",
    "ClassifierFree",
    "Composition",
    "GradientGuidance",
    "Inpaint",
    "Or",
    "Selected",
    "SpaceView",
    "by_step",
    "drop_conditioning",
    "gradient_of",
    "hold",
    "random_drop",
]
