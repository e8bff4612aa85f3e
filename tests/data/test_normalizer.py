import numpy as np
import pytest
import torch
from data_helpers import make_episodes
from safetensors.torch import load_file, save_file

from dipole.data import Normalizer
from dipole.errors import DipoleError

STATS = {
    "action": {
        "min": np.array([-3.0, 5.0]),
        "max": np.array([1.0, 5.0]),
        "mean": np.array([-1.0, 5.0]),
        "std": np.array([0.5, 0.0]),
        "q01": np.array([-2.0, 5.0]),
        "q99": np.array([0.0, 5.0]),
        "q10": np.array([-1.5, 5.0]),
        "q90": np.array([-0.5, 5.0]),
        "count": np.array([9]),
    }
}


@pytest.mark.parametrize(
    ("mode", "given", "expected"),
    [
        ("min_max", [[-3.0, 5.0], [1.0, 5.5], [-1.0, 5.0]], [[-1.0, 0.0], [1.0, 0.5], [0.0, 0.0]]),
        ("mean_std", [[-1.0, 5.0], [-0.5, 5.5]], [[0.0, 0.0], [1.0, 0.5]]),
        ("quantiles", [[-2.0, 5.0], [0.0, 5.5], [1.0, 5.0]], [[-1.0, 0.0], [1.0, 0.5], [2.0, 0.0]]),
        ("quantiles10", [[-1.5, 5.0], [-0.5, 5.5], [0.0, 5.0]], [[-1.0, 0.0], [1.0, 0.5], [2.0, 0.0]]),
        ("identity", [[-3.0, 5.0]], [[-3.0, 5.0]]),
    ],
)
def test_modes(mode, given, expected):
    # The second dimension is constant: it is centred and keeps its scale.
    normalizer = Normalizer.fit(STATS, {"action": mode})
    given = torch.tensor(given)
    assert torch.equal(normalizer.normalize("action", given), torch.tensor(expected))
    assert torch.equal(normalizer.denormalize("action", torch.tensor(expected)), given)


def test_quantiles_that_coincide_fall_back_to_the_range():
    # A gripper that opens in 0.5 % of the frames: q01 == q99, but the values are not constant.
    stats = {"action": STATS["action"] | {"q01": np.array([1.0, 5.0]), "q99": np.array([1.0, 5.0])}}
    normalizer = Normalizer.fit(stats, {"action": "quantiles"})
    assert torch.equal(normalizer.normalize("action", torch.tensor([-3.0, 5.0])), torch.tensor([-1.0, 0.0]))


def test_a_range_below_the_threshold_is_not_blown_up():
    stats = {"action": {"min": np.array([0.0]), "max": np.array([9e-5])}}
    normalizer = Normalizer.fit(stats, {"action": "min_max"})
    assert normalizer.affine("action")[0] == 1
    stats = {"action": {"min": np.array([0.0]), "max": np.array([1.1e-4])}}
    assert Normalizer.fit(stats, {"action": "min_max"}).affine("action")[0] > 1e4


def test_round_trip_on_data():
    data = make_episodes((50, 60))
    modes = {"observation.state": "mean_std", "action": "min_max"}
    normalizer = Normalizer.fit(data.stats(), modes)
    for key in modes:
        x = torch.from_numpy(data.columns[key])
        y = normalizer.normalize(key, x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(normalizer.denormalize(key, y), x)
    action = normalizer.normalize("action", torch.from_numpy(data.columns["action"]))
    # float32 rounding of scale and offset
    torch.testing.assert_close(action.amin(0), -torch.ones(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(action.amax(0), torch.ones(2), atol=1e-6, rtol=0)


def test_pictures_broadcast_over_channels():
    data = make_episodes((30,), cameras=["top"])
    key = "observation.images.top"
    normalizer = Normalizer.fit(data.stats(), {key: "mean_std"})
    pictures = torch.from_numpy(data.columns[key]).permute(0, 3, 1, 2) / 255.0
    normal = normalizer.normalize(key, pictures)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_state_survives_a_file(tmp_path):
    normalizer = Normalizer.fit(make_episodes().stats(), {"observation.state": "min_max", "action": "mean_std"})
    assert set(normalizer.state()) == {
        f"{key}.{part}" for key in ("observation.state", "action") for part in ("scale", "offset")
    }
    save_file(normalizer.state(), tmp_path / "normalizer.safetensors")
    again = Normalizer.from_state(load_file(tmp_path / "normalizer.safetensors"))
    for key, value in normalizer.state().items():
        assert torch.equal(again.state()[key], value)
    assert set(again.features) == set(normalizer.features)


def test_it_moves_with_a_module_but_learns_nothing():
    normalizer = Normalizer.fit(STATS, {"action": "min_max"})
    assert not list(normalizer.parameters())
    assert normalizer.double().affine("action")[0].dtype == torch.float64


def test_an_unknown_feature_is_an_error():
    normalizer = Normalizer.fit(STATS, {"action": "min_max"})
    for call in (normalizer.normalize, normalizer.denormalize):
        with pytest.raises(DipoleError, match="not fitted on 'observation.state'"):
            call("observation.state", torch.zeros(2))


@pytest.mark.parametrize(
    ("stats", "modes", "message"),
    [
        ({}, {"action": "min_max"}, "no statistics for 'action'"),
        ({"action": {"min": np.zeros(2)}}, {"action": "min_max"}, "have no 'max'"),
        (STATS, {"action": "minmax"}, "did you mean 'min_max'"),
        ({"action": STATS["action"] | {"max": np.array([np.nan, 1])}}, {"action": "min_max"}, "must be finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(stats, modes, message):
    with pytest.raises(DipoleError, match=message):
        Normalizer.fit(stats, modes)


@pytest.mark.parametrize(
    "odd", [{"action.scale": torch.ones(2)}, {"action.scale": torch.ones(2), "action.shift": torch.ones(2)}]
)
def test_a_damaged_state_is_refused(odd):
    with pytest.raises(DipoleError, match="incomplete"):
        Normalizer.from_state(odd)


def test_a_zero_scale_is_refused():
    with pytest.raises(DipoleError, match="no scale zero"):
        Normalizer({"action": (torch.tensor([0.0]), torch.tensor([0.0]))})


def test_an_origin_keeps_the_digits_of_a_huge_scale():
    # scale x + offset in float32 would be off by about ten here.
    origin = torch.tensor([0.7, 0.1])
    affine = {"action": (torch.full((2,), 2e8), torch.full((2,), -1.0))}
    normalizer = Normalizer.from_state(Normalizer(affine, {"action": origin}).state())
    assert torch.equal(normalizer.normalize("action", origin), torch.full((2,), -1.0))
    assert torch.equal(normalizer.denormalize("action", torch.tensor([0.5, -1.0])), origin)
    scale, offset = normalizer.affine("action")
    assert torch.equal(offset, -1 - 2e8 * origin)
    assert scale[0] == 2e8
    with pytest.raises(DipoleError, match="action"):
        Normalizer(affine, {"action": torch.tensor([torch.inf, 0.0])})
