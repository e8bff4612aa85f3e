"""Forward processes: how clean data becomes noise. Every one is  x_t = alpha(t) x0 + sigma(t) eps.

A level `t` is measured in the unit of its process, and larger is always noisier:

| process        | level                       | clean | alpha, sigma                                            |
|----------------|-----------------------------|-------|---------------------------------------------------------|
| `VP`           | integer index 0 .. N-1      | -1    | alpha^2 = alpha_bar[t], sigma^2 = 1 - alpha_bar[t]      |
| `ContinuousVP` | time in [0, 1]              | 0     | alpha^2 + sigma^2 = 1                                   |
| `EDM`          | the noise sigma             | 0     | alpha = 1, sigma = t (variance exploding)               |
| `Flow`         | time in [0, 1], 1 is noise  | 0     | alpha = 1 - t, sigma = t (linear interpolation)         |

Sources: Ho et al. 2020 (DDPM); Nichol & Dhariwal 2021 (cosine); Song et al. 2021 (VP-SDE); Karras et al. 2022 (EDM);
Lipman et al. 2023 (flow matching). All coefficients are computed in float64.
"""

from dipole.diffusion.process.base import LevelLike, Process, Spacing, ratio_levels
from dipole.diffusion.process.edm import EDM
from dipole.diffusion.process.flow import Flow
from dipole.diffusion.process.vp import VP, ContinuousVP

__all__ = ["EDM", "VP", "ContinuousVP", "Flow", "LevelLike", "Process", "Spacing", "ratio_levels"]
