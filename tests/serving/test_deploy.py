"""The examples for containers and systemd name options that exist, and do not run as root."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dipole.cli.serve import Args

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
SERVICE = (ROOT / "deploy" / "dipole-serve.service").read_text()
HOWTO = (ROOT / "docs" / "howto" / "serve.md").read_text()
OPTIONS = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Args)}


@pytest.mark.parametrize(
    "text",
    [
        DOCKERFILE.partition("ENTRYPOINT")[2],
        re.search(r"ExecStart=(.*?)\nExecReload", SERVICE, re.DOTALL)[1],
        "\n".join(re.findall(r"dipole serve .*", HOWTO)),
    ],
    ids=["Dockerfile", "service", "how-to"],
)
def test_options_exist(text):
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert used
    assert used <= OPTIONS


def test_neither_runs_as_root():
    assert re.search(r"^USER dipole$", DOCKERFILE, re.MULTILINE)
    assert "DynamicUser=yes" in SERVICE


def test_systemd_accepts_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    unit = tmp_path / "dipole-serve.service"
    unit.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", SERVICE))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert "Unknown" not in done.stderr
