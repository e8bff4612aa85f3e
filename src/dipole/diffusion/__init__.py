"""The mathematics of denoising: processes, predictions, kernels, samplers, objectives, guidance. Needs torch only."""

from dipole.diffusion.denoiser import Denoiser, NetworkDenoiser
from dipole.diffusion.guidance import ClassifierFree, GradientGuidance, Inpaint, drop_conditioning
from dipole.diffusion.kernels import CPS, DDIM, DDPM, ConsistencyRenoise, FlowSDE, Kernel, Normal
from dipole.diffusion.objectives import Beta, DenoisingObjective, LogitNormal, LogLogistic, LogNormal, Uniform
from dipole.diffusion.oracle import GaussianDenoiser, LinearLabel, MixtureDenoiser
from dipole.diffusion.prediction import PredictionType, add_noise, to_epsilon, to_score, to_x0
from dipole.diffusion.process import EDM, VP, ContinuousVP, Flow, Process
from dipole.diffusion.process_view import ProcessView
from dipole.diffusion.samplers import Chain, sample, sample_chain, score_chain
from dipole.diffusion.solvers import DPM2, DPMSolverPP2M, DPMSolverPP2S, Heun, Solver

__all__ = [
    "CPS",
    "DDIM",
    "DDPM",
    "DPM2",
    "EDM",
    "VP",
    "Beta",
    "Chain",
    "ClassifierFree",
    "ConsistencyRenoise",
    "ContinuousVP",
    "DPMSolverPP2M",
    "DPMSolverPP2S",
    "Denoiser",
    "DenoisingObjective",
    "Flow",
    "FlowSDE",
    "GaussianDenoiser",
    "GradientGuidance",
    "Heun",
    "Inpaint",
    "Kernel",
    "LinearLabel",
    "LogLogistic",
    "LogNormal",
    "LogitNormal",
    "MixtureDenoiser",
    "NetworkDenoiser",
    "Normal",
    "PredictionType",
    "Process",
    "ProcessView",
    "Solver",
    "Uniform",
    "add_noise",
    "drop_conditioning",
    "sample",
    "sample_chain",
    "score_chain",
    "to_epsilon",
    "to_score",
    "to_x0",
]
