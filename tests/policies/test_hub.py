"""push and pull: through the real huggingface_hub against a server on a real socket, and to a folder."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from dipole.cli import main
from dipole.data import Feature, Normalizer
from dipole.evaluation.describe import describe, digest
from dipole.policies import DiffusionPolicy, PolicyConfig, load_policy, save_policy
from dipole.policies.hub import is_hub_name

pytest.importorskip("huggingface_hub")


class Hub(BaseHTTPRequestHandler):
    """The endpoints of the Hub that creating, uploading to and downloading a repository needs."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, value, status=200, headers=()):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        state, data = self.server.state, self.body()
        state["tokens"].add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            state["created"] = json.loads(data)
            self.answer({"url": f"{self.server.url}/me/peg", "id": "me/peg"})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(data)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            state["branch"] = self.path.rpartition("/")[2]
            for line in data.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    state["files"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            oid = hashlib.sha1(data).hexdigest()
            state["sha"] = oid
            self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/me/peg/commit/{oid}"})
        else:  # validate-yaml and the like
            self.answer({"errors": [], "warnings": []})

    def do_GET(self):
        state = self.server.state
        state["tokens"].add(self.headers.get("Authorization"))
        name = re.fullmatch(r"/me/peg/resolve/[^/]+/([^?]+)(\?.*)?", self.path)
        if name and name[1] in state["files"]:
            data = state["files"][name[1]]
            self.answer(data, headers={"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": state["sha"]})
        elif re.match(r"/api/models/me/peg/tree/", self.path):
            rows = [{"type": "file", "path": key, "size": len(v), "oid": "0" * 40} for key, v in state["files"].items()]
            self.answer(rows)
        elif self.path.startswith("/api/models/me/peg"):
            siblings = [{"rfilename": key, "size": len(v)} for key, v in state["files"].items()]
            self.answer({"_id": "1", "id": "me/peg", "sha": state["sha"], "siblings": siblings, "private": True})
        else:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.state = {"files": {}, "sha": "0" * 40, "tokens": set()}
    constants = pytest.importorskip("huggingface_hub.constants")
    # What HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE set when the package is imported.
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run_folder(tmp_path):
    vector = Feature("float32", (2,))
    config = PolicyConfig(
        {"observation.state": vector},
        vector,
        network={"name": "mlp", "width": 8, "num_blocks": 1},
        task="insert | push",
    )
    stats = {"min": -np.ones(2), "max": np.ones(2)}
    modes = dict.fromkeys(("observation.state", "action"), "min_max")
    policy = DiffusionPolicy(config, Normalizer.fit(dict.fromkeys(modes, stats), modes))
    run = tmp_path / "run"
    save_policy(policy, run / "checkpoints" / "last")
    estimate = {"value": 0.8, "low": 0.66, "high": 0.89, "confidence": 0.95}
    evaluation = {
        "env": "pusht",
        "score_name": "max_reward",
        "success": estimate,
        "score": {**estimate, "value": 0.912},
        "episodes": {"seed": list(range(50))},
        "settings": {"first_seed": 100000},
        "fingerprint": "abc123",
        "policy": {**describe(load_policy(run)), "nfe": 5},
        "timing": {"latency": [{"threads": 1, "p50_ms": 3.25, "p95_ms": 4.5}]},
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    record = {"data": {"episodes": 60, "frames": 900}, "command": {"data": "lerobot/pusht"}, "plan": {"steps": 4000}}
    (run / "train.json").write_text(json.dumps(record))
    return run


def act(folder):
    policy = load_policy(folder)
    obs = {"observation.state": torch.linspace(-1, 1, 4).reshape(1, 2, 2)}
    return policy.act(obs, {}, torch.zeros(1, 16, 2))[0]


def command(*words):
    main([str(word) for word in words])


def test_names_of_the_hub():
    assert is_hub_name("me/peg-v1.0")
    assert not any(map(is_hub_name, ("./me/peg", "/me/peg", "peg", "a/b/c", "../peg", "~/peg")))


def test_push_then_pull_through_the_real_client(hub, run_folder, tmp_path, capsys):
    command("push", run_folder, "me/peg", "--private", "--license", "apache-2.0", "--json")
    done = json.loads(capsys.readouterr().out)
    files = ["README.md", "config.json", "evaluation.json", "model.safetensors", "normalizer.safetensors"]
    assert done["files"] == sorted(hub.state["files"]) == files
    assert done["notes"] == []
    assert hub.state["branch"] == "main"
    assert hub.state["created"]["name"] == "peg"
    assert hub.state["created"].get("private") is True or hub.state["created"].get("visibility") == "private"
    assert "Bearer hf_test" in hub.state["tokens"]
    command("pull", "me/peg", "--out", tmp_path / "pulled")
    assert sorted(file.name for file in (tmp_path / "pulled").iterdir()) == files
    assert torch.equal(act(tmp_path / "pulled"), act(run_folder))
    assert not any(file.is_symlink() for file in (tmp_path / "pulled").iterdir())


def test_the_card_carries_the_figures(run_folder, tmp_path):
    command("push", run_folder, f"{tmp_path}/out/peg", "--license", "mit")
    card = (tmp_path / "out" / "peg" / "README.md").read_text()
    assert card.startswith('---\nlicense: "mit"\nlibrary_name: dipole\n')
    for text in (
        "insert | push",
        "| environment | `pusht` |",
        "| success | 80.0 %, 66.0 to 89.0 % (95 % interval) |",
        "| max reward | 0.912 (0.660 to 0.890) |",
        "| network calls per chunk | 5 |",
        "| latency | 3.2 ms per chunk (p95 4.5 ms), 1 thread |",
        "| dataset | `lerobot/pusht`: 60 episodes, 900 frames |",
        "| sampler | euler, 5 steps |",
        "dipole pull",
    ):
        assert text in card, text


def test_figures_of_other_weights_are_left_out(run_folder, tmp_path, capsys):
    values = json.loads((run_folder / "evaluation.json").read_text())
    values["policy"]["digest"] = "0" * 16
    (run_folder / "evaluation.json").write_text(json.dumps(values))
    command("push", run_folder, f"{tmp_path}/out")
    assert "of other weights" in capsys.readouterr().err
    assert "Not evaluated" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_local_data_path_is_not_published(run_folder, tmp_path):
    record = json.loads((run_folder / "train.json").read_text())
    record["command"]["data"] = "/home/someone/demos"
    (run_folder / "train.json").write_text(json.dumps(record))
    command("push", run_folder, f"{tmp_path}/out")
    assert "someone" not in (tmp_path / "out" / "README.md").read_text()


def test_figures_are_those_of_the_digest(run_folder):
    policy = load_policy(run_folder)
    assert digest(policy) == json.loads((run_folder / "evaluation.json").read_text())["policy"]["digest"]
    assert digest(policy.with_sampler(replace(policy.sampler, num_steps=2))) == digest(policy)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pull", "you/missing", "--out", "new"), "'you/missing' on the Hub: RepositoryNotFoundError"),
        (("pull", "./missing", "--out", "new"), "no such folder"),
        (("pull", "./missing", "--out", "new", "--revision", "v1"), "--revision is for"),
        (("push", "{run}", "./new", "--private"), "--private and --revision are for"),
        (("push", "./missing", "me/peg"), "no such folder"),
        (("push", "{run}", "{run}"), "exists already"),
        (("pull", "{run}", "--out", "new"), "'config.json' is missing"),
    ],
)
def test_mistakes_are_one_line(words, message, hub, run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command(*(word.format(run=run_folder) for word in words))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "new").exists()


def test_no_network_is_one_line(hub, run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(SystemExit):
        command("push", run_folder, "me/peg")
    error = capsys.readouterr().err
    assert error.startswith("dipole: 'me/peg' on the Hub: ")
    assert error.count("\n") == 1


def test_damaged_downloads_are_refused(run_folder, tmp_path, capsys):
    command("push", run_folder, f"{tmp_path}/out")
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(SystemExit):
        command("pull", f"{tmp_path}/out", "--out", tmp_path / "new")
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
