"""Checkpoints of the three frameworks, turned into plain files."""

import collections
import json
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dipole.convert import convert_checkpoint
from dipole.convert.foreign import read_foreign
from dipole.convert.tree import TensorName
from dipole.errors import DipoleError

FIXTURES = Path(__file__).parent / "fixtures"


def read(folder, name):
    return json.loads((folder / name).read_text())


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


def test_diffusion_policy_written_by_dill_and_omegaconf(tmp_path):
    """The fixture was written with the real packages (fixtures/make_diffusion_policy.py)."""
    source = convert_checkpoint(FIXTURES / "diffusion_policy.ckpt", tmp_path / "out")
    assert source["framework"] == "diffusion_policy"
    assert (source["weights"], source["global_step"], source["epoch"]) == ("ema_model", 12, 3)
    config = read(tmp_path / "out", "config.json")
    assert config["horizon"] == 16
    assert config["none"] is None
    assert config["training"] == {"use_ema": True, "lr": 1e-4, "seed": 42}
    assert config["shape_meta"] == {"obs": {"state": {"shape": [5]}}, "action": {"shape": [2]}}
    assert config["name"] == "${_target_}"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["model.0.weight"].shape == (4, 3)
    assert weights["model.1.num_batches_tracked"].dtype == torch.int64
    normalizer = load_file(tmp_path / "out" / "normalizer.safetensors")
    # The EMA weights of the fixture are half of the others.
    assert_same(
        normalizer,
        {
            "action.scale": torch.full((2,), 0.5),
            "action.offset": torch.zeros(2),
            "action.input_stats.min": torch.full((2,), -0.5),
            "action.input_stats.max": torch.full((2,), 0.5),
        },
    )
    convert_checkpoint(FIXTURES / "diffusion_policy.ckpt", tmp_path / "raw", weights="model")
    raw = load_file(tmp_path / "raw" / "model.safetensors")
    assert torch.equal(raw["model.0.weight"] * 0.5, weights["model.0.weight"])
    assert torch.equal(load_file(tmp_path / "raw" / "normalizer.safetensors")["action.scale"], torch.ones(2))


def robomimic_checkpoint(path, **extra):
    nets = {"policy.noise_pred_net.w": torch.randn(3, 2), "policy.obs_encoder.b": torch.randn(4)}
    ema = {key: value * 2 for key, value in nets.items()}
    payload = {
        "model": {"nets": collections.OrderedDict(nets), "ema": collections.OrderedDict(ema), "optimizers": {}},
        "config": json.dumps({"algo_name": "diffusion_policy", "train": {"seq_length": 16}}),
        "algo_name": "diffusion_policy",
        "env_metadata": {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}},
        "shape_metadata": {"ac_dim": 7, "all_shapes": collections.OrderedDict(object=[10]), "use_images": False},
        "variable_state": {"epoch": 3, "best_return": np.float64(0.5)},
        **extra,
    }
    torch.save(payload, path)
    return payload


def test_robomimic(tmp_path):
    stats = {"object": {"mean": np.arange(3.0, dtype=np.float32)[None], "std": [[1.0, 2.0, 3.0]]}}
    action = {"actions": {"scale": np.ones((1, 2)), "offset": np.zeros((1, 2))}}
    payload = robomimic_checkpoint(tmp_path / "c.pth", obs_normalization_stats=stats, action_normalization_stats=action)
    source = convert_checkpoint(tmp_path / "c.pth", tmp_path / "out")
    assert (source["framework"], source["weights"], source["variable_state"]["best_return"]) == (
        "robomimic",
        "ema",
        0.5,
    )
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), payload["model"]["ema"])
    config = read(tmp_path / "out", "config.json")
    assert config["config"]["train"]["seq_length"] == 16
    assert config["shape_metadata"] == {"ac_dim": 7, "all_shapes": {"object": [10]}, "use_images": False}
    normalizer = load_file(tmp_path / "out" / "normalizer.safetensors")
    assert_same(
        normalizer,
        {
            "observation.object.mean": torch.arange(3.0)[None],
            "observation.object.std": torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64),
            "actions.scale": torch.ones(1, 2, dtype=torch.float64),
            "actions.offset": torch.zeros(1, 2, dtype=torch.float64),
        },
    )
    convert_checkpoint(tmp_path / "c.pth", tmp_path / "nets", weights="nets")
    assert_same(load_file(tmp_path / "nets" / "model.safetensors"), payload["model"]["nets"])


def test_robomimic_with_one_flat_state_dict(tmp_path):
    state = {"policy.w": torch.randn(3)}
    robomimic_checkpoint(tmp_path / "c.pth", model=state)
    assert convert_checkpoint(tmp_path / "c.pth", tmp_path / "out")["weights"] == "nets"
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), state)
    assert not (tmp_path / "out" / "normalizer.safetensors").exists()


def test_dppo_with_normalization(tmp_path):
    model, ema = {"network.w": torch.randn(2, 2)}, {"network.w": torch.randn(2, 2)}
    torch.save({"epoch": 7, "model": model, "ema": ema}, tmp_path / "state_7.pt")
    limits = {"obs_min": [-1.0, -2.0], "obs_max": [1.0, 2.0], "action_min": [-3.0], "action_max": [3.0]}
    np.savez(tmp_path / "normalization.npz", **limits)
    source = convert_checkpoint(
        tmp_path / "state_7.pt", tmp_path / "out", normalization=tmp_path / "normalization.npz", framework="dppo"
    )
    assert (source["framework"], source["weights"], source["left_out"]) == ("dppo", "ema", ["model"])
    assert read(tmp_path / "out", "config.json") == {"epoch": 7}
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), ema)
    normalizer = load_file(tmp_path / "out" / "normalizer.safetensors")
    assert normalizer["observation.state.max"].tolist() == [1.0, 2.0]
    assert normalizer["action.min"].tolist() == [-3.0]


def test_dppo_fine_tuned_has_no_ema(tmp_path):
    torch.save({"itr": 3, "model": {"actor.w": torch.ones(2), "critic.w": torch.ones(3)}}, tmp_path / "c.pt")
    assert convert_checkpoint(tmp_path / "c.pt", tmp_path / "out")["weights"] == "model"
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {"actor.w", "critic.w"}


def test_normalization_errors(tmp_path):
    torch.save({"itr": 3, "model": {"w": torch.ones(2)}}, tmp_path / "c.pt")

    def convert(normalization):
        convert_checkpoint(tmp_path / "c.pt", tmp_path / "out", normalization=normalization)

    np.savez(tmp_path / "few.npz", obs_min=[0.0])
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "few.npz").read_bytes()[:60])
    np.savez(
        tmp_path / "objects.npz", **{k: np.array([{}]) for k in ("obs_min", "obs_max", "action_min", "action_max")}
    )
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("obs_min.npy", bytes(2**27))
    for name, words in [
        ("few", "has no action_max, action_min, obs_max"),
        ("damaged", "not a readable npz"),
        ("objects", "not a readable npz"),  # object arrays would need pickle
        ("bomb", "unpacks to more than"),
        ("absent", "does not exist"),
    ]:
        with pytest.raises(DipoleError, match=words):
            convert(tmp_path / f"{name}.npz")
    assert not (tmp_path / "out").exists()


def test_errors_a_user_can_mend(tmp_path):
    torch.save({"whatever": 1}, tmp_path / "c.pt")
    robomimic_checkpoint(tmp_path / "r.pth")
    cases = [
        ("c.pt", {}, "not recognised: choose --from"),
        ("c.pt", {"framework": "robomimik"}, "did you mean 'robomimic'"),
        ("c.pt", {"framework": "robomimic"}, "has no 'model'"),
        ("c.pt", {"framework": "diffusion_policy"}, "has no 'state_dicts'"),
        ("c.pt", {"framework": "dppo"}, "has no weights"),
        ("r.pth", {"weights": "best"}, "no 'best' weights: it has ema, nets"),
        ("r.pth", {"normalization": tmp_path / "x.npz"}, "carries its own statistics"),
        ("absent.pt", {}, "is not a file"),
    ]
    for name, options, words in cases:
        with pytest.raises(DipoleError, match=words):
            convert_checkpoint(tmp_path / name, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(DipoleError, match="exists: give a new folder"):
        convert_checkpoint(tmp_path / "r.pth", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
DTYPES += ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"]


def test_tensors_of_every_kind_keep_their_values(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    payload = {name: torch.tensor([0, 1, 3, 7]).to(getattr(torch, name)) for name in DTYPES}
    payload |= {
        "transposed": base.permute(2, 0, 1),
        "slice": base[:, 1:, ::2],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "expanded": torch.ones(1).expand(5),
        "tied": base,
        "requires grad": torch.ones(3, requires_grad=True),
    }
    torch.save(payload, tmp_path / "c.pt")
    with read_foreign(tmp_path / "c.pt") as foreign:
        found = foreign.tensors(foreign.value)
    assert found.keys() == payload.keys()
    for key, value in payload.items():
        assert found[key].dtype == value.dtype
        bits = torch.uint8 if value.element_size() == 1 else None
        same = torch.equal(found[key].view(bits), value.view(bits)) if bits else torch.equal(found[key], value.detach())
        assert same, key


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(protocol, tmp_path):
    payload = {
        "w": torch.arange(3),
        "a": np.arange(3),
        "p": PurePosixPath("a/b"),
        "t": (1, "x"),
        "d": torch.device("cuda", 1),
    }
    payload |= {"dtype": torch.float32, "size": torch.Size([2, 3]), "float": float("-inf"), "bytes": b"\xff"}
    torch.save(payload, tmp_path / "c.pt", pickle_protocol=protocol)
    with read_foreign(tmp_path / "c.pt") as foreign:
        value = foreign.value
        assert foreign.tensors(value)["w"].tolist() == foreign.tensors(value)["a"].tolist() == [0, 1, 2]
    rest = {k: v for k, v in value.items() if not isinstance(v, TensorName)}
    assert rest == {
        "p": "a/b",
        "t": [1, "x"],
        "d": "cuda:1",
        "dtype": "torch.float32",
        "size": [2, 3],
        "float": float("-inf"),
        "bytes": b"\xff",
    }


def test_tensor_subclasses_and_old_makers(tmp_path):
    value = torch.ones(2)
    value.note = "extra attribute"  # makes torch write _rebuild_from_type_v2
    torch.save({"w": value}, tmp_path / "c.pt")
    with read_foreign(tmp_path / "c.pt") as foreign:
        assert foreign.tensors(foreign.value)["w"].tolist() == [1.0, 1.0]


def test_reading_leaves_nothing_behind_and_needs_no_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    torch.save({"itr": 1, "model": {"w": torch.ones(2)}}, tmp_path / "c.pt")
    convert_checkpoint(tmp_path / "c.pt", tmp_path / "out")
    assert not list((tmp_path / "scratch").iterdir())
    code = "import sys, dipole.convert.child; print('torch' in sys.modules, 'pickle' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # numpy imports pickle itself; the reader never does, and torch would not fit its memory limit.
    assert done.stdout.split()[0] == "False"
    sources = Path(convert_checkpoint.__code__.co_filename).parent.glob("*.py")
    assert not [
        path.name for path in sources if "import pickle\n" in path.read_text() or "torch.load" in path.read_text()
    ]


def test_pickled_values_survive_the_trip(tmp_path):
    value = {"a": [1, {"b": None}], 3: "three", (1, 2): "pair", "big": 2**63, "text": "α\n"}
    torch.save(value, tmp_path / "c.pt")
    with read_foreign(tmp_path / "c.pt") as foreign:
        assert foreign.value == value
