import math

import pytest
import torch
from scipy import stats

from dipole.diffusion import (
    EDM,
    VP,
    Beta,
    ContinuousVP,
    DenoisingObjective,
    Flow,
    GaussianDenoiser,
    LogitNormal,
    LogLogistic,
    LogNormal,
    NetworkDenoiser,
    Uniform,
    add_noise,
)
from dipole.diffusion.prediction import PREDICTION_TYPES, conversion, target, to_output
from dipole.diffusion.tensors import randn_like

F64 = torch.float64
PROCESSES = [VP.cosine(100), ContinuousVP(), EDM(), Flow()]


def design():
    """Every combination of x0 in mean +- spread and of signs of noise: a Gaussian's moments, without sampling error."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 4)
    mean = torch.tensor([0.3, -0.2], dtype=F64)
    root = torch.tensor([[0.8, 0.0], [0.5, 0.4]], dtype=F64)
    return mean + signs[:, :2] @ root.T, signs[:, 2:], mean, root @ root.T


@pytest.mark.parametrize("weighting", ["one", "x0", "min_snr"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("index", [2, 5])  # the later level is nearly clean: its SNR is above min_snr's bound of 5
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_best_linear_network_is_the_oracle(process, index, prediction_type, weighting):
    # least squares depend on second moments only, and the design has those of the Gaussian exactly
    x0, noise, mean, cov = design()
    t = float(process.levels(7)[index])
    oracle = GaussianDenoiser(mean, cov, process)
    change = torch.nn.Linear(2, 2).double()
    torch.nn.init.zeros_(change.weight)
    torch.nn.init.zeros_(change.bias)
    c_in = float(conversion(prediction_type, process, t).c_in)

    def network(x, time, cond):
        x = x / c_in
        return to_output(oracle(x, t), x, t, process, prediction_type) + change(x)

    objective = DenoisingObjective(process, prediction_type, weighting=weighting)
    loss = objective(network, x0, t=torch.full((16,), t, dtype=F64), noise=noise)
    loss.backward()
    loss = loss.detach()
    assert float(loss) > 1e-4
    assert float(change.weight.grad.abs().max()) < 1e-9
    assert float(change.bias.grad.abs().max()) < 1e-9
    # and the loss is that of the answer it gives
    x = add_noise(x0, noise, t, process)
    error = NetworkDenoiser(network, process, prediction_type)(x, t).detach() - x0
    c_out = float(conversion(prediction_type, process, t).c_out)
    snr = float((process.alpha(t) / process.sigma(t)) ** 2)
    weight = {"one": c_out**-2, "x0": 1.0, "min_snr": min(snr, 5.0)}[weighting]
    assert float(loss) == pytest.approx(weight * float((error**2).mean()), rel=1e-9)


def test_epsilon_loss_is_equation_14_of_ddpm():
    process, x0, noise = VP.cosine(100), torch.randn(6, 4, 2), torch.randn(6, 4, 2)
    t = torch.tensor([0.0, 10.0, 20.0, 50.0, 90.0, 99.0])
    seen = []

    def network(x, time, cond):
        seen.append((x, time, cond))
        return 0.5 * x

    loss = DenoisingObjective(process)(network, x0, "told", t=t, noise=noise)
    x = process.alpha(t).float()[:, None, None] * x0 + process.sigma(t).float()[:, None, None] * noise
    assert float(loss) == pytest.approx(float(((0.5 * x - noise) ** 2).mean()), rel=1e-6)
    assert torch.allclose(seen[0][0], x)
    assert torch.equal(seen[0][1], t)
    assert seen[0][2] == "told"


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("levels", ["row", "position"])
def test_a_perfect_network_has_no_loss(process, prediction_type, levels):
    x0, noise = torch.randn(5, 3, 2, dtype=F64), torch.randn(5, 3, 2, dtype=F64)
    objective = DenoisingObjective(process, prediction_type, Uniform(low=0.1), levels=levels)
    t = objective.draw_levels(x0, torch.Generator().manual_seed(0))
    assert t.shape == ((5,) if levels == "row" else (5, 3))
    perfect = target(x0, noise, t, process, prediction_type)
    network = lambda x, time, cond: perfect  # noqa: E731
    assert float(objective(network, x0, t=t, noise=noise)) == 0
    # what the sampler makes of that output is x0
    x = add_noise(x0, noise, t, process)
    assert torch.allclose(NetworkDenoiser(network, process, prediction_type)(x, t), x0, atol=1e-9)


def test_both_clocks_have_the_same_loss():
    x0, process = torch.randn(8, 2), Flow()
    losses = []
    for clock, sign in (("noise_at_one", 1.0), ("data_at_one", -1.0)):
        objective = DenoisingObjective(process, "velocity", clock=clock)

        def network(x, time, cond, sign=sign):
            ours = time if sign > 0 else 1000 - time
            return sign * (0.3 * x + ours[:, None] / 1000)

        losses.append(float(objective(network, x0, generator=torch.Generator().manual_seed(0))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 1), (4, 3, 2)])
def test_masked_entries_do_not_count(shape):
    mask = torch.rand(shape) < 0.6
    x0, noise = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    t = torch.rand(4, dtype=F64)
    objective = DenoisingObjective(Flow(), "velocity")
    full = mask.reshape(shape + (1,) * (3 - len(shape))).expand(4, 3, 2)
    loss = objective(lambda x, time, cond: 0 * x, x0, t=t, noise=noise, mask=mask)
    assert float(loss) == pytest.approx(float(((noise - x0)[full] ** 2).mean()), rel=1e-6)
    nothing = objective(lambda x, time, cond: 0 * x, x0, t=t, noise=noise, mask=torch.zeros(4, dtype=torch.bool))
    assert float(nothing) == 0


def test_same_generator_same_loss():
    x0 = torch.randn(8, 3)
    objective = DenoisingObjective(Flow(), "velocity", LogitNormal())
    losses = [
        float(objective(lambda x, time, cond: x, x0, generator=torch.Generator().manual_seed(s))) for s in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_parts():
    processes = {"a": Flow(), "b": VP.cosine(100)}
    x0 = {"a": torch.randn(64, 3, 2), "b": torch.randn(64, 4)}
    objective = DenoisingObjective(processes, "v", levels="part")
    seen = []

    def network(x, time, cond):
        seen.append(time)
        return x

    parts = objective.per_part(network, x0, generator=torch.Generator().manual_seed(0))
    assert set(parts) == {"a", "b"}
    total = objective(network, x0, generator=torch.Generator().manual_seed(0))
    assert float(total) == pytest.approx(float(parts["a"] + parts["b"]))
    assert float(seen[0]["b"].max()) <= 99
    assert float(seen[0]["a"].max()) > 500
    with pytest.raises(ValueError, match="cannot share one level"):
        DenoisingObjective(processes)(network, x0)
    shared = DenoisingObjective(Flow()).draw_levels(x0)
    assert shared["a"] is shared["b"]
    positions = DenoisingObjective(Flow(), levels="position").draw_levels(x0)
    assert positions["a"].shape == (64, 3)
    masked = objective.per_part(
        network, x0, t={"a": shared["a"], "b": torch.zeros(64)}, mask={"a": None, "b": torch.zeros(64)}
    )
    assert float(masked["b"]) == 0


def test_time_told_in_training_is_that_told_in_sampling():
    for process in PROCESSES:
        x0, told = torch.randn(3, 2, dtype=torch.bfloat16), []
        network = lambda x, time, cond: told.append(time) or x  # noqa: E731, B023
        t = process.levels(4)[1].expand(3)
        DenoisingObjective(process, "x0")(network, x0, t=t)
        NetworkDenoiser(network, process, "x0")(x0, t)
        NetworkDenoiser(network, process, "x0")(x0, float(t[0]))
        assert torch.equal(told[0], told[1])
        assert torch.equal(told[0], told[2])


COUNT = 20000


def draws(time, process):
    t = time.sample((COUNT,), process, torch.Generator().manual_seed(0))
    assert t.dtype == F64
    assert torch.equal(t, time.sample((COUNT,), process, torch.Generator().manual_seed(0)))
    return t


@pytest.mark.parametrize(
    ("time", "process", "cdf"),
    [
        (Uniform(), Flow(), stats.uniform().cdf),
        (Uniform(low=0.2), ContinuousVP(), stats.uniform(0.2, 0.799).cdf),
        (LogitNormal(0.5, 0.8), Flow(), lambda t: stats.norm(0.5, 0.8).cdf(torch.logit(torch.as_tensor(t)).numpy())),
        (Beta(), Flow(), stats.beta(1.5, 1.0, 0.001, 0.999).cdf),
        (Beta(2.0, 3.0, 0.1), Flow(), stats.beta(2.0, 3.0, 0.1, 0.9).cdf),
        (LogNormal(), EDM(), stats.lognorm(1.2, scale=math.exp(-1.2)).cdf),
    ],
)
def test_distribution_of_levels(time, process, cdf):
    # Kolmogorov-Smirnov at 20 000 fixed draws: a right implementation passes 0.001 with this seed, a wrong one does not
    assert stats.kstest(draws(time, process).numpy(), cdf).pvalue > 0.001


def test_log_logistic_is_truncated_by_its_distribution_function():
    time = LogLogistic(low=0.05, high=1.0)
    sigma = draws(time, EDM())
    assert float(sigma.min()) >= 0.05
    assert float(sigma.max()) <= 1.0
    reference = stats.fisk(c=1 / 0.5, scale=0.5)  # scipy's name for it
    low, high = reference.cdf(0.05), reference.cdf(1.0)
    assert stats.kstest(sigma.numpy(), lambda s: (reference.cdf(s) - low) / (high - low)).pvalue > 0.001
    grid = torch.tensor([0.05, 0.3, 1.0], dtype=F64)
    assert time.cdf(grid).tolist() == pytest.approx(reference.cdf(grid.numpy()).tolist(), rel=1e-12)


def test_uniform_levels_of_a_discrete_process_are_all_of_them():
    t = draws(Uniform(), VP.cosine(10))
    counts = torch.bincount(t.long(), minlength=10)
    assert len(counts) == 10
    # 2000 of each: standard deviation 42; four of them
    assert float((counts - 2000).abs().max()) < 170


def test_generators_on_one_device_serve_data_on_another():
    # meta stands in for an accelerator: levels and noise are drawn where the generator is, then moved
    x0, generator = torch.empty(3, 2, device="meta"), torch.Generator().manual_seed(0)
    assert DenoisingObjective(Flow(), "velocity").draw_levels(x0, generator).device.type == "meta"
    assert randn_like(x0, generator).device.type == "meta"
    assert randn_like(x0, [generator] * 3).device.type == "meta"
