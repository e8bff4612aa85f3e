import pytest
import torch

from dipole.diffusion import DDIM, DDPM, EDM, VP, ContinuousVP, Flow, sample
from dipole.diffusion.process_view import ProcessView

MEAN, STD = 0.7, 0.4


def denoiser(process):
    """The exact denoiser of N(MEAN, STD^2) in a process."""

    def expected(x, t, cond=None):
        alpha, sigma = (f(t).reshape(-1, *[1] * (x.dim() - 1)) for f in (process.alpha, process.sigma))
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return MEAN + gain * (x - alpha * MEAN)

    return expected


CONTINUOUS = [Flow(), EDM(), ContinuousVP(), ContinuousVP("linear")]


@pytest.mark.parametrize("own", CONTINUOUS, ids=repr)
@pytest.mark.parametrize("other", [*CONTINUOUS, VP.cosine(100)], ids=lambda p: type(p).__name__)
def test_view_is_the_exact_denoiser_of_the_other_process(own, other):
    view = ProcessView(denoiser(own), own, other)
    x = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(6, 1)
    levels = other.levels(6)[:-1]
    # noisier than the own process ever gets: its noisiest level stands in, which is close but not exact
    reached = other.sigma(levels) / other.alpha(levels) <= own.sigma(own.noisiest) / own.alpha(own.noisiest)
    x, levels = x[reached], levels[reached]
    assert len(levels) >= 3
    # float64: the matched level is solved in closed form, so only rounding is left
    assert torch.allclose(view(x, levels), denoiser(other)(x, levels), atol=1e-9, rtol=1e-9)
    for k, t in enumerate(levels.tolist()):
        assert torch.allclose(view(x, t)[k], view(x, levels)[k], atol=1e-12)


def test_a_flow_sampled_by_ddpm_gives_what_a_ddpm_denoiser_gives():
    own, other = Flow(), VP.cosine(100)
    runs = [
        sample(d, other, other.levels(100), DDPM(), shape=(50, 1), generator=torch.Generator().manual_seed(0))
        for d in (ProcessView(denoiser(own), own, other), denoiser(other))
    ]
    # fp32 samples; the first levels are matched at ratios of 2000
    assert torch.allclose(*runs, atol=1e-4)


def test_deterministic_sampling_does_not_depend_on_the_process_it_is_done_in():
    own, other = Flow(), EDM(sigma_max=200.0)
    noise = torch.linspace(-2, 2, 5, dtype=torch.float64).reshape(5, 1)
    in_own = sample(denoiser(own), own, own.levels(600), DDIM(), init=noise)
    view = ProcessView(denoiser(own), own, other)
    in_other = sample(view, other, other.levels(600), DDIM(), init=noise * 200)
    # both approach the same ODE solution: 600 first-order steps leave about 3e-3, starting at 200 another 1/200
    assert torch.allclose(in_own, in_other, atol=1e-2)
