"""The mathematics of denoising: processes, predictions, kernels, samplers, objectives, guidance. Needs torch only."""

from dipole.diffusion.denoiser import Denoiser, NetworkDenoiser
from dipole.diffusion.kernels import CPS, DDIM, DDPM, ConsistencyRenoise, FlowSDE, Kernel, Normal
from dipole.diffusion.objectives import Beta, DenoisingObjective, LogitNormal, LogLogistic, LogNormal, Uniform
from dipole.diffusion.prediction import PredictionType, add_noise, to_epsilon, to_score, to_x0
from dipole.diffusion.process import EDM, VP, ContinuousVP, Flow, Process
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
    "ConsistencyRenoise",
    "ContinuousVP",
    "DPMSolverPP2M",
    "DPMSolverPP2S",
    "Denoiser",
    "DenoisingObjective",
    "Flow",
    "FlowSDE",
    "Heun",
    "Kernel",
    "LogLogistic",
    "LogNormal",
    "LogitNormal",
    "NetworkDenoiser",
    "Normal",
    "PredictionType",
    "Process",
    "Solver",
    "Uniform",
    "add_noise",
    "sample",
    "sample_chain",
    "score_chain",
    "to_epsilon",
    "to_score",
    "to_x0",
]
