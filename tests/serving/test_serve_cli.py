"""`dipole serve` as a process of its own: signals, files, messages."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from serving_helpers import save_real, vector

from dipole.cli import main
from dipole.serving.client import PolicyClient, ServerError


@pytest.fixture
def start(tmp_path):
    processes = []

    def begin(*words):
        log = open(tmp_path / f"stderr{len(processes)}", "w")  # noqa: SIM115 - lives as long as the process
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from dipole.cli import main; main()",
                "serve",
                *map(str, words),
                "--port",
                "0",
                "--threads",
                "1",
            ],
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        process.log = tmp_path / f"stderr{len(processes)}"
        processes.append(process)
        deadline = time.monotonic() + 90  # importing torch on a busy machine
        while time.monotonic() < deadline:
            if found := re.search(r"serving on (\S+)", process.log.read_text()):
                return process, found[1]
            assert process.poll() is None, process.log.read_text()
            time.sleep(0.05)
        raise AssertionError(process.log.read_text())

    yield begin
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow  # a process that imports torch: 6 s of processor time
def test_serve_reload_and_end(start, tmp_path):
    folder = save_real(tmp_path / "run" / "checkpoints" / "best")
    (tmp_path / "tokens").write_text("arm a-token-of-24-characters\n")
    (tmp_path / "tokens").chmod(0o600)
    (tmp_path / "limits.json").write_text('{"low": [-0.5, -0.5], "high": [0.5, 0.5]}')
    (tmp_path / "rename.json").write_text('{"joints": "observation.state"}')
    (tmp_path / "metadata.json").write_text('{"reset_pose": [0, 1]}')
    process, url = start(
        tmp_path / "run", f"other={folder}", "--token-file", tmp_path / "tokens", "--audit", tmp_path / "audit",
        "--limits", tmp_path / "limits.json", "--rename", tmp_path / "rename.json",
        "--metadata", tmp_path / "metadata.json",
    )  # fmt: skip
    with pytest.raises(ServerError):
        PolicyClient(url, give_up_s=0).connect()
    with PolicyClient(url, "a-token-of-24-characters") as client:
        assert client.metadata["reset_pose"] == [0, 1]
        assert client.metadata["dipole"]["models"] == ["run", "other"]
        first = client.infer({"joints": vector(1, 1)["observation.state"]})
        assert abs(first.actions).max() <= 0.5
        save_real(folder, seed=1)
        process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 30
        while (after := client.infer(vector(1, 1))).message["dipole/checkpoint"] == first.message["dipole/checkpoint"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not after.restarted
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    events = (tmp_path / "audit").read_text()
    assert '"model-replaced"' in events
    assert events.splitlines()[-1].count('"stop"')
    assert "Traceback" not in process.log.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "--token-file"),
        (["--token-file", "none"], "cannot be read"),
        (["--tls-cert", "none"], "both"),
        (["--limits", "none"], "none"),
        (["--rename", "none.json"], "no such file"),
        (["--audit", "/proc/none/audit"], "audit log"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, words, said):
    folder = save_real(tmp_path / "policy")
    with pytest.raises(SystemExit) as caught:
        main(["serve", str(folder), *words])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_a_missing_run(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "nowhere"])
    assert "nowhere: no such folder" in capsys.readouterr().err
