"""Guidance: wrappers `Denoiser -> Denoiser` that change what is sampled. They nest."""

from dipole.diffusion.guidance.classifier_free import ClassifierFree, drop_conditioning, random_drop
from dipole.diffusion.guidance.gradient import GradientGuidance, by_step, gradient_of
from dipole.diffusion.guidance.inpaint import Inpaint, hold

__all__ = [
    "ClassifierFree",
    "GradientGuidance",
    "Inpaint",
    "by_step",
    "drop_conditioning",
    "gradient_of",
    "hold",
    "random_drop",
]
