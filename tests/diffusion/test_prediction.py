import pytest
import torch

from dipole.diffusion import EDM, VP, ContinuousVP, Flow, add_noise, to_epsilon, to_score, to_x0
from dipole.diffusion.prediction import PREDICTION_TYPES, conversion, target, to_output

F64 = torch.float64
PROCESSES = [VP.cosine(100), VP.linear(1000), ContinuousVP(), ContinuousVP("linear"), EDM(), Flow()]


def data(process, per_position, dtype=F64):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(6, 4, 3, generator=generator, dtype=dtype)
    epsilon = torch.randn(6, 4, 3, generator=generator, dtype=dtype)
    # every level but pure noise, where epsilon says nothing about x0
    levels = process.levels(26)[2:-1]
    pick = torch.randint(0, len(levels), (6, 4) if per_position else (6,), generator=generator)
    return x0, epsilon, levels[pick]


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_target_means_x0(process, prediction_type, per_position):
    x0, epsilon, t = data(process, per_position)
    x = add_noise(x0, epsilon, t, process)
    goal = target(x0, epsilon, t, process, prediction_type)
    # dividing by alpha, down to 1e-3 here, costs three digits of float64's sixteen
    assert torch.allclose(to_x0(goal, x, t, process, prediction_type), x0, atol=1e-11)
    assert torch.allclose(to_output(x0, x, t, process, prediction_type), goal, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_epsilon_and_score(process):
    x0, epsilon, t = data(process, per_position=True)
    x = add_noise(x0, epsilon, t, process)
    sigma = process.sigma(t).unsqueeze(-1)
    # at the smallest sigma, 2e-3, the difference x - alpha x0 keeps thirteen digits
    assert torch.allclose(to_epsilon(x0, x, t, process), epsilon, atol=1e-10)
    assert torch.allclose(to_score(x0, x, t, process) * sigma, -epsilon, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_a_number_and_a_tensor_of_levels_agree_bit_for_bit(process, prediction_type, dtype):
    x, output, _ = data(process, False, dtype)
    t = float(process.levels(26)[7])
    by_number = to_x0(output, x, t, process, prediction_type)
    by_row = to_x0(output, x, torch.full((6,), t, dtype=F64), process, prediction_type)
    by_position = to_x0(output, x, torch.full((6, 4), t, dtype=F64), process, prediction_type)
    assert torch.equal(by_number, by_row)
    assert torch.equal(by_number, by_position)


def test_edm_coefficients_are_equation_7_and_keep_unit_variance():
    process, data_std = EDM(), 0.5
    sigma = torch.logspace(-3, 2, 20, dtype=F64)
    c_in, c_skip, c_out = conversion("edm", process, sigma, data_std)
    power = sigma**2 + data_std**2
    assert torch.allclose(c_in, power.rsqrt(), rtol=1e-14)
    assert torch.allclose(c_skip, data_std**2 / power, rtol=1e-14)
    assert torch.allclose(c_out, sigma * data_std / power.sqrt(), rtol=1e-14)
    # variance of the target: c_skip^2 (sigma^2 + s^2) + c_out^2 = s^2
    assert torch.allclose(c_skip**2 * power + c_out**2, torch.full_like(sigma, data_std**2), rtol=1e-14)


def test_edm_preconditioning_of_a_flow_is_that_of_the_same_sample_rescaled():
    flow, edm, t = Flow(), EDM(), torch.tensor([0.2, 0.8], dtype=F64)
    x, output = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    ratio = flow.sigma(t) / flow.alpha(t)
    rescaled = x / flow.alpha(t).unsqueeze(1)
    assert torch.allclose(to_x0(output, x, t, flow, "edm"), to_x0(output, rescaled, ratio, edm, "edm"), rtol=1e-12)
    fed = conversion("edm", flow, t).c_in.unsqueeze(1) * x
    assert torch.allclose(fed, conversion("edm", edm, ratio).c_in.unsqueeze(1) * rescaled, rtol=1e-12)


def test_half_precision_outputs_are_added_in_the_precision_of_the_sample():
    x, output = torch.randn(2, 3), torch.randn(2, 3).bfloat16()
    x0 = to_x0(output, x, 0.5, Flow(), "velocity")
    assert x0.dtype == torch.float32
    assert torch.equal(x0, to_x0(output.float(), x, 0.5, Flow(), "velocity"))


def test_epsilon_cannot_start_from_pure_noise():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="'epsilon' does not determine x0 at level 1"):
        to_x0(x, x, 1.0, Flow(), "epsilon")


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="unknown prediction_type 'eps'"):
        conversion("eps", Flow(), 0.5)
