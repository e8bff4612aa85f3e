import math

import pytest
import torch

from dipole.diffusion import EDM, VP, ContinuousVP, Flow, Process

F64 = torch.float64
PROCESSES = [VP.cosine(100), VP.linear(1000), VP.scaled_linear(1000), ContinuousVP(), ContinuousVP("linear"), EDM()]
PROCESSES += [Flow(), Flow(shift=3.0)]
RATIO_SPACINGS = ["karras", "exponential"]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_every_process_offers_the_protocol_and_ends_clean(process):
    assert isinstance(process, Process)
    assert isinstance(hash(process), int)
    assert float(process.alpha(process.clean)) == 1
    assert float(process.sigma(process.clean)) == 0
    assert process.alpha(process.noisiest).dtype == F64
    assert process.alpha(torch.zeros(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_noise_to_signal_ratio_grows_with_the_level(process):
    levels = process.levels(50).flip(0)
    ratio = process.sigma(levels) / process.alpha(levels)
    assert bool((ratio[1:] > ratio[:-1]).all())


@pytest.mark.parametrize("process", [p for p in PROCESSES if isinstance(p, VP | ContinuousVP)], ids=repr)
def test_variance_is_preserved(process):
    levels = process.levels(50)
    power = process.alpha(levels) ** 2 + process.sigma(levels) ** 2
    assert torch.allclose(power, torch.ones(51, dtype=F64), atol=1e-15)  # a few roundings


def test_cosine_schedule_has_the_published_noise():
    # table of diffusion policy's 100 levels, printed to three digits
    table = {0: 0.025, 1: 0.042, 2: 0.058, 3: 0.074, 5: 0.105, 10: 0.182, 20: 0.333, 40: 0.606, 66: 0.871, 99: 1.0}
    sigma = VP.cosine(100).sigma(torch.tensor(list(table)))
    assert [round(value, 3) for value in sigma.tolist()] == list(table.values())


def test_cosine_schedule_is_its_formula_before_the_cap():
    # alpha_bar telescopes to f(t)/f(0) wherever beta is below its cap of 0.999
    u = torch.arange(1, 100, dtype=F64) / 100
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert torch.allclose(VP.cosine(100).alpha_bar[:-1], f / start, rtol=1e-12)


def test_linear_and_scaled_linear_betas():
    def betas(process):
        bar = torch.cat([torch.ones(1, dtype=F64), process.alpha_bar])
        return 1 - bar[1:] / bar[:-1]

    linear, scaled = betas(VP.linear(10, 0.1, 0.3)), betas(VP.scaled_linear(10, 0.1, 0.3))
    assert torch.allclose(linear.diff(), torch.full((9,), 0.2 / 9, dtype=F64), atol=1e-12)
    assert torch.allclose(scaled.sqrt().diff().diff(), torch.zeros(8, dtype=F64), atol=1e-12)
    assert [float(b) for b in (scaled[0], scaled[-1])] == pytest.approx([0.1, 0.3], abs=1e-12)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_levels_start_at_the_noisiest_and_end_clean(process, num_steps):
    for spacing in [*RATIO_SPACINGS, "linspace", "trailing"]:
        if spacing == "trailing" and isinstance(process, EDM):
            continue
        levels = process.levels(num_steps, spacing)
        assert levels.shape == (num_steps + 1,)
        assert levels.dtype == F64
        assert bool((levels[1:] < levels[:-1]).all())
        # (x^(1/7))^7 rounds
        assert float(levels[0]) == pytest.approx(process.noisiest, rel=1e-12)
        assert float(levels[-1]) == process.clean


@pytest.mark.parametrize("spacing", [*RATIO_SPACINGS, "linear"])
def test_edm_schedules_end_at_sigma_min_and_sigma_max(spacing):
    levels = EDM(0.005, 1.0).levels(7, spacing)
    assert [float(levels[0]), float(levels[-2]), float(levels[-1])] == pytest.approx([1.0, 0.005, 0.0], rel=1e-12)


def test_edm_karras_spacing_is_equation_5():
    process, n = EDM(0.002, 80.0, rho=7.0), 5
    wanted = [(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)]
    assert process.levels(n).tolist() == pytest.approx([*wanted, 0.0], rel=1e-12)


def test_exponential_spacing_is_uniform_in_log():
    steps = torch.log(EDM(0.05, 1.0).levels(5, "exponential")[:-1]).diff()
    assert torch.allclose(steps, steps[:1].expand(4), rtol=1e-12)


def test_vp_spacings_by_hand():
    process = VP.cosine(100)
    assert process.levels(4, "leading").tolist() == [75, 50, 25, 0, -1]
    assert process.levels(4, "trailing").tolist() == [99, 74, 49, 24, -1]
    assert process.levels(4, "linspace").tolist() == [99, 66, 33, 0, -1]
    assert process.levels(3, "leading").tolist() == [66, 33, 0, -1]
    assert process.levels(100).tolist() == list(range(99, -2, -1))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", *RATIO_SPACINGS])
def test_vp_levels_are_distinct_trained_ones_for_every_number_of_steps(spacing):
    process = VP.cosine(30)
    for num_steps in range(1, 31):
        levels = process.levels(num_steps, spacing).tolist()
        assert len(set(levels)) == num_steps + 1
        assert levels == sorted(levels, reverse=True)
        assert set(levels) <= set(range(-1, 30))


def test_flow_levels_and_shift():
    assert Flow().levels(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert Flow(shift=3.0).levels(2).tolist() == pytest.approx([1.0, 3 * 0.5 / 2, 0.0])
    ratio = Flow(t_min=0.01).levels(5, "exponential")
    assert float(ratio[-2]) == pytest.approx(0.01)
    assert float(Flow.from_data_at_one(torch.tensor(0.3))) == pytest.approx(0.7)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_level_at_inverts_the_ratio(process):
    levels = process.levels(20)[1:]
    found = process.level_at(process.sigma(levels) / process.alpha(levels))
    # acos/atan and square roots of the linear schedule near the clean end cost half the digits
    assert torch.allclose(found, levels, atol=1e-7)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_ode_time_and_its_inverse(process):
    levels = process.levels(20)
    scale, u = process.ode_view(levels)
    assert torch.allclose(process.level_at_ode_time(u), levels, atol=1e-7)
    # y = scale x = x0 + u eps for the variance-exploding view, (1 - u) x0 + u eps for a flow
    assert torch.allclose(scale * process.sigma(levels), u, rtol=1e-12)


def test_continuous_vp_linear_is_the_integral_of_beta():
    process, t = ContinuousVP("linear"), torch.tensor([0.2, 0.7], dtype=F64)
    integral = 0.1 * t + (20.0 - 0.1) * t**2 / 2
    assert torch.allclose(process.alpha(t) ** 2, torch.exp(-integral), rtol=1e-12)


def test_network_time_is_on_one_scale():
    assert float(VP.cosine(1000).network_time(999)) == 999
    assert float(Flow().network_time(1.0)) == 1000
    assert float(ContinuousVP().network_time(0.5)) == 500
    assert float(EDM().network_time(math.e**2)) == pytest.approx(500)
    assert math.isfinite(float(EDM().network_time(0.0)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VP.cosine(10).levels(11), "num_steps is 11"),
        (lambda: VP.cosine(10).levels(0), "num_steps is 0"),
        (lambda: Flow().levels(0), "num_steps is 0"),
        (lambda: EDM().levels(3, "leading"), "unknown spacing 'leading' for EDM"),
        (lambda: VP.cosine(10).sigma(10), "level 10 of a process whose levels end at 9"),
        (lambda: VP.cosine(10).alpha(torch.tensor([3, 12])), "level 12"),
        (lambda: VP(torch.tensor([0.5, 0.0])), "strictly between 0 and 1"),
        (lambda: VP(torch.tensor([0.5, 0.1]).half()), "float64 or float32, not torch.float16"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_repr_is_short():
    assert repr(VP.cosine(100)) == "VP(100 levels, sigma 0.02513 to 1)"


def test_processes_are_values_but_vp_is_compared_by_identity():
    assert Flow() == Flow()
    assert hash(EDM()) == hash(EDM())
    assert VP.cosine(10) != VP.cosine(10)
