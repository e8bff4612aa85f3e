"""A served policy is the policy: real ones, with memories of their own, and one imported from LeRobot."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from serving_helpers import STATE, real_policy

from dipole.evaluation.seeds import policy_generator
from dipole.policies import from_lerobot, load_policy, save_policy
from dipole.realtime import runtime as runtimes
from dipole.serving.background import serving
from dipole.serving.client import PolicyClient
from dipole.serving.config import ServiceConfig
from dipole.serving.models import ModelStore, Source, load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "networks"))
import lerobot_golden as golden


def in_process(policy, histories, seed, resets=()):
    """Return the chunks of one robot, whose episodes begin at `resets`."""
    state, generator, chunks = policy.initial_state(1), policy_generator(seed), []
    for k, obs in enumerate(histories):
        if k in resets:
            state = policy.initial_state(1)
        rows = {key: torch.from_numpy(value)[None] for key, value in obs.items()}
        with torch.no_grad():
            chunk, state = policy.act(rows, state, generator=[generator])
        chunks.append(chunk[0].numpy())
    return chunks


@pytest.mark.parametrize("method", ["plain", "rti", "ensemble"])
def test_robots_with_memories_in_turn(tmp_path, method):
    rng = np.random.default_rng(0)
    folder = save_policy(real_policy(width=32), tmp_path / "policy")
    file = runtimes.write_runtime(runtimes.Runtime(method), tmp_path / "runtime.json")
    policy = runtimes.load(folder, runtime=runtimes.read_runtime(file))
    robots = [[{STATE: rng.uniform(-1, 1, (2, 2)).astype(np.float32)} for _ in range(5)] for _ in range(3)]
    resets = [{3}, set(), {1, 4}]
    expected = [in_process(policy, robot, 7 + n, resets[n]) for n, robot in enumerate(robots)]
    source = Source("m", folder, runtime=file)
    with serving(ModelStore([load_model(source)], [source])) as server:
        clients = [PolicyClient(server.url) for _ in robots]
        for k in range(5):
            for n, client in enumerate(clients):
                reply = client.infer(robots[n][k], reset=k in resets[n], seed=7 + n if k == 0 else None)
                # One row per call on both sides: the same to the digit.
                np.testing.assert_array_equal(reply.actions, expected[n][k])
        for client in clients:
            client.close()


def test_padded_calls_are_those_of_evaluation(tmp_path):
    folder = save_policy(real_policy(width=32), tmp_path / "policy")
    source, obs = Source("m", folder), {STATE: np.full((2, 2), 0.3, np.float32)}
    replies = []
    for block in (1, 16):
        served = serving(ModelStore([load_model(source)]), ServiceConfig(block=block))
        with served as server, PolicyClient(server.url) as client:
            replies.append(client.infer(obs, seed=1).actions)
    # 1 and 16 rows round differently, in float32 through five network calls.
    np.testing.assert_allclose(*replies, atol=2e-5)


@pytest.mark.parametrize("name", [golden.STATE, golden.OLD_STATE, golden.IMAGE])
def test_an_imported_checkpoint_of_lerobot_behind_openpis_client(tmp_path, name):
    clients = pytest.importorskip("openpi_client.websocket_client_policy")
    checkpoint = tmp_path / "lerobot"
    made = ("io.safetensors", "weights.json", "literal_weights.safetensors")
    shutil.copytree(golden.FOLDER / name, checkpoint, ignore=lambda folder, files: made)
    save_file(golden.weights(name, ""), checkpoint / "model.safetensors")
    folder = save_policy(from_lerobot(checkpoint), tmp_path / "imported")
    policy = load_policy(folder)
    rng = np.random.default_rng(0)
    obs = {
        key: rng.integers(0, 256, (2, *feature.shape), np.uint8)
        if feature.is_image
        else rng.uniform(-1, 1, (2, *feature.shape)).astype(np.float32)
        for key, feature in policy.config.observation.items()
    }
    expected = in_process(policy, [obs], 5)[0]
    with serving(ModelStore([load_model(Source("m", folder))])) as server:
        client = clients.WebsocketClientPolicy("127.0.0.1", server.port)
        message = {key.replace(".", "/"): value for key, value in obs.items()} | {"prompt": "x", "dipole/seed": 5}
        np.testing.assert_array_equal(client.infer(message)["actions"], expected)
