import pytest
import torch

from dipole.diffusion import DDIM, EDM, VP, ContinuousVP, Flow, NetworkDenoiser, sample, to_x0
from dipole.diffusion.denoiser import prepare
from dipole.diffusion.prediction import PREDICTION_TYPES, conversion

F64 = torch.float64
PROCESSES = [VP.cosine(100), ContinuousVP(), EDM(), Flow()]


class Recording:
    def __init__(self, output=None):
        self.output, self.calls = output, []

    def __call__(self, x, time, cond):
        self.calls.append((x, time, cond))
        return x if self.output is None else self.output


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_network_sees_scaled_samples_and_times_and_its_output_means_x0(process, prediction_type):
    x, output = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    network = Recording(output)
    denoiser = NetworkDenoiser(network, process, prediction_type)
    t = float(process.levels(5)[2])
    position = torch.full((3, 4), t, dtype=F64)
    results = [denoiser(x, level, "told") for level in (t, position[:, 0], position, position[:1], position[0, 0])]
    for result in results:
        assert torch.equal(result, results[0])
    assert torch.allclose(results[0], to_x0(output, x, t, process, prediction_type), rtol=1e-6)
    times = [time for _, time, _ in network.calls]
    assert [tuple(time.shape) for time in times] == [(3,), (3,), (3, 4), (3, 4), (3,)]
    assert all(bool((time == float(process.network_time(t).float())).all()) for time in times)
    c_in = conversion(prediction_type, process, t).c_in.float()
    assert all(torch.equal(seen, x * c_in) for seen, _, _ in network.calls)
    assert all(cond == "told" for _, _, cond in network.calls)


@pytest.mark.parametrize(
    ("dtype", "time_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)]
)
def test_time_is_never_told_in_half_precision(dtype, time_dtype):
    network = Recording()
    denoiser, x = NetworkDenoiser(network, VP.cosine(1000)), torch.zeros(2, 3, dtype=dtype)
    for t in (997.0, torch.tensor([997, 997])):
        assert denoiser(x, t).dtype == dtype
    for _, time, _ in network.calls:
        assert time.dtype == time_dtype
        assert time.tolist() == [997, 997]  # bfloat16 would say 996


def test_both_flow_clocks_agree():
    process = Flow()

    def ours(x, time, cond):  # t = 1 is noise, velocity is eps - x0
        return 0.3 * x + torch.sin(time / 1000)[:, None]

    def theirs(x, time, cond):  # t = 1 is data, velocity is x0 - eps
        return -(0.3 * x + torch.sin(1 - time / 1000)[:, None])

    x = torch.randn(4, 2, dtype=F64)
    denoisers = (
        NetworkDenoiser(ours, process, "velocity"),
        NetworkDenoiser(theirs, process, "velocity", clock="data_at_one"),
    )
    for t in (0.25, torch.rand(4, dtype=F64)):
        assert torch.allclose(denoisers[0](x, t), denoisers[1](x, t), atol=1e-14)
    runs = [sample(d, process, process.levels(5), DDIM(), init=x) for d in denoisers]
    assert torch.allclose(*runs, atol=1e-13)
    # Euler in their own clock, from noise at 0 to data at 1
    y = x
    for k in range(5):
        y = y + theirs(y, torch.full((4,), 200.0 * k, dtype=F64), None) / 5
    assert torch.allclose(runs[1], y, atol=1e-13)


def test_only_velocities_change_sign_with_the_clock():
    x, output = torch.randn(2, 3), torch.randn(2, 3)
    denoiser = NetworkDenoiser(Recording(output), Flow(), "x0", clock="data_at_one")
    assert torch.equal(denoiser(x, 0.3), output)
    assert torch.equal(denoiser(x, torch.tensor([0.3, 0.4])), output)
    with pytest.raises(ValueError, match="'data_at_one' is for Flow processes"):
        NetworkDenoiser(Recording(), EDM(), clock="data_at_one")


@pytest.mark.parametrize("shared", [False, True])
def test_parts_have_their_own_times_scales_and_processes(shared):
    network = Recording()
    processes = Flow() if shared else {"a": Flow(), "b": VP.cosine(100)}
    own = {"a": Flow(), "b": Flow() if shared else VP.cosine(100)}
    denoiser = NetworkDenoiser(network, processes, "v")
    x = {"a": torch.randn(3, 4, 2), "b": torch.randn(3, 5)}
    t = {"a": torch.rand(3, 4, dtype=F64), "b": 0.0 if shared else 40.0}
    x0 = denoiser(x, t, None)
    _, time, _ = network.calls[0]
    assert time["a"].shape == (3, 4)
    assert time["b"].shape == (3,)
    for key in x:
        assert torch.allclose(x0[key], to_x0(x[key], x[key], t[key], own[key], "v"), rtol=1e-6)
    both = denoiser(x, 0.5 if shared else 30.0) if shared else None
    assert both is None or both["a"].shape == (3, 4, 2)


def test_a_process_per_part_needs_parts():
    with pytest.raises(ValueError, match="the sample has no parts"):
        NetworkDenoiser(Recording(), {"a": Flow()})(torch.zeros(1, 2), 0.5)


class Preparing(Recording):
    def prepare(self, times, cond):
        self.prepared = times, cond
        return Recording(torch.ones(2, 3))


def test_prepare_tells_the_network_its_times():
    network = Preparing()
    levels = VP.cosine(100).levels(3)
    ready = prepare(NetworkDenoiser(network, VP.cosine(100), "x0"), levels, "cond")
    times, cond = network.prepared
    assert times.tolist() == levels[:-1].tolist()
    assert cond == "cond"
    assert torch.equal(ready(torch.zeros(2, 3), 50.0), torch.ones(2, 3))
    flipped = Preparing()
    prepare(NetworkDenoiser(flipped, Flow(), clock="data_at_one"), Flow().levels(4), None)
    assert flipped.prepared[0].tolist() == [0, 250, 500, 750]


def test_prepare_tells_times_per_part():
    processes = {"a": Flow(), "b": VP.cosine(10)}
    for levels in ({"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([3.0, -1.0])}, torch.tensor([1.0, 0.0])):
        network = Preparing()
        prepare(NetworkDenoiser(network, processes), levels, None)
        times = {key: value.tolist() for key, value in network.prepared[0].items()}
        assert times == {"a": [1000.0], "b": [3.0 if isinstance(levels, dict) else 1.0]}


def test_what_has_nothing_to_prepare_is_returned():
    denoiser = NetworkDenoiser(Recording(), Flow())
    assert prepare(denoiser, Flow().levels(2), None) is denoiser
    function = lambda x, t, cond: x  # noqa: E731
    assert prepare(function, Flow().levels(2), None) is function


def test_autocast_outputs_are_used_in_full_precision():
    x, output = torch.randn(2, 3), torch.randn(2, 3)
    half = NetworkDenoiser(Recording(output.bfloat16()), Flow(), "velocity")(x, 0.4)
    full = NetworkDenoiser(Recording(output.bfloat16().float()), Flow(), "velocity")(x, 0.4)
    assert half.dtype == torch.float32
    assert torch.equal(half, full)
