"""Models replaced while sessions go on: verified first, and what is bad changes nothing."""

import asyncio
import json
import shutil
import time

import numpy as np
import pytest
import torch
from serving_helpers import EchoPolicy, real_policy, save_real, vector

from dipole.errors import DipoleError
from dipole.policies import save_policy
from dipole.realtime.runtime import Runtime, write_runtime
from dipole.serving.background import serving
from dipole.serving.client import PolicyClient
from dipole.serving.models import ModelStore, Source, from_policy, load_model
from dipole.serving.sessions import Memory, moved


@pytest.fixture
def folder(tmp_path):
    return save_real(tmp_path / "policy", seed=0)


def reload(server, name="m"):
    loop = server._server.get_loop()
    return asyncio.run_coroutine_threadsafe(server.service.reload(name), loop).result(30)


def served(folder, **options):
    source = Source("m", folder)
    return serving(ModelStore([load_model(source)], [source]), **options)


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def without_digest(folder):
    header = json.loads((folder / "config.json").read_text())
    del header["sha256"]["model.safetensors"]
    (folder / "config.json").write_text(json.dumps(header))


def of_another_robot(folder):
    policy = real_policy()
    policy.config = type(policy.config)(
        policy.config.observation, policy.config.action, 2, 8, 4, network=policy.config.network, fps=50.0
    )
    save_policy(policy, folder)


def with_nan(folder):
    policy = real_policy(seed=3)
    with torch.no_grad():
        next(policy.network.parameters()).fill_(torch.nan)
    save_policy(policy, folder)


BAD = {
    "random bytes": lambda folder: (folder / "model.safetensors").write_bytes(bytes(range(256)) * 50),
    "one bit": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-1] + b"\x7f"
    ),
    "truncated": truncated,
    "no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "JSON of something else": lambda folder: (folder / "config.json").write_text("[]"),
    "no digest": without_digest,
    "gone": lambda folder: (folder / "model.safetensors").unlink(),
    "another robot": of_another_robot,
    "weights that are no numbers": with_nan,
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_a_bad_checkpoint_is_refused_and_the_old_one_goes_on(folder, spoil):
    with served(folder) as server, PolicyClient(server.url) as client:
        before = client.infer(vector(0.1, 0.2), seed=1)
        spoil(folder)
        assert reload(server) is False
        after = client.infer(vector(0.1, 0.2), seed=1)
        np.testing.assert_array_equal(after.actions, before.actions)
        assert after.message["dipole/events"] == []
        assert server.service.metrics.reloads.values[("m", "refused")] == 1
        assert not server.service.problems()


def test_a_good_one_replaces_it_between_two_requests(folder):
    with served(folder) as server, PolicyClient(server.url) as client:
        before = client.infer(vector(0.1, 0.2), seed=1)
        assert reload(server) is False  # nothing has changed
        save_real(folder, seed=1)
        assert reload(server) is True
        after = client.infer(vector(0.1, 0.2), seed=1)
        assert after.message["dipole/events"] == ["model replaced"]
        assert after.message["dipole/checkpoint"] != before.message["dipole/checkpoint"]
        assert np.abs(after.actions - before.actions).max() > 0.01
        assert client.infer(vector(0.1, 0.2)).message["dipole/events"] == []
        assert not after.restarted


def test_files_are_watched(folder):
    with served(folder, watch_s=0.05) as server, PolicyClient(server.url) as client:
        first = client.metadata["dipole"]["checkpoint"]
        save_real(folder, seed=1)
        deadline = time.monotonic() + 20
        while server.service.store["m"].checkpoint == first and time.monotonic() < deadline:
            time.sleep(0.02)
        assert client.infer(vector(0, 0)).message["dipole/checkpoint"] != first


def test_what_is_loaded_is_what_was_verified(folder, monkeypatch):
    from dipole.serving import models

    real = models.load_policy

    def replaced_meanwhile(path, device):
        shutil.rmtree(folder)  # the folder vanishes after it was copied
        return real(path, device)

    monkeypatch.setattr(models, "load_policy", replaced_meanwhile)
    assert load_model(Source("m", folder)).schema.action_dim == 2


def test_errors_name_the_folder_not_the_copy(folder):
    truncated(folder)
    with pytest.raises(DipoleError) as caught:
        load_model(Source("m", folder))
    assert str(folder / "model.safetensors") in str(caught.value)
    assert "dipole-serve-" not in str(caught.value)


def test_the_version_tells_checkpoints_apart(folder, tmp_path):
    other = save_real(tmp_path / "other", seed=1)
    shutil.copytree(folder, tmp_path / "copy")
    versions = [load_model(Source("m", path)).checkpoint for path in (folder, other, tmp_path / "copy")]
    assert versions[0] == versions[2] != versions[1]


def test_the_runtime_of_the_folder_is_obeyed(folder):
    write_runtime(Runtime(action_horizon=2), folder)
    assert load_model(Source("m", folder)).schema.action_horizon == 2


def test_state_is_kept_where_it_fits_and_reset_where_not():
    old, new, other = (from_policy("m", EchoPolicy()) for _ in range(3))
    state = old.policy.initial_state(1)
    memory = Memory(old, state=state)
    assert moved(memory, old) is memory
    kept = moved(memory, new)
    assert kept.state is state
    assert kept.events == ("model replaced",)
    other.policy.initial_state = lambda batch: {"count": torch.zeros(batch, 3)}
    assert moved(memory, other).state is None
    assert moved(memory, other).events == ("model replaced", "state reset")


def test_names_of_models():
    model = from_policy("m", EchoPolicy())
    with pytest.raises(DipoleError, match="same name"):
        ModelStore([model, model])
    with pytest.raises(DipoleError, match="at least one"):
        ModelStore([])
    with pytest.raises(DipoleError, match="unknown model 'n'"):
        ModelStore([model])["n"]
