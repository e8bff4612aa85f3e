"""The web page in a real browser."""

import os
import re
import shutil
import subprocess

import pytest
from serving_helpers import EchoPolicy, vector

from dipole.serving.background import serving
from dipole.serving.client import PolicyClient
from dipole.serving.models import ModelStore, from_policy
from dipole.serving.pages import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def visit(url, folder, *extra):
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={folder}",
         "--virtual-time-budget=4000", "--enable-logging=stderr", *extra, url],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to look at the page with")
def test_the_page_shows_sessions_latency_and_actions(tmp_path):
    policy = EchoPolicy()
    policy.config.task = "<img src=x onerror=alert(1)> lift"
    with serving(ModelStore([from_policy("m", policy)])) as server, PolicyClient(server.url) as client:
        for _ in range(3):
            client.infer(vector(0.125, 2))
        done = visit(f"http{server.url[2:]}/", tmp_path / "profile", "--dump-dom")
        session = client.metadata["dipole"]["session"]
    dom = done.stdout
    assert re.search(r'id="health"[^>]*class="good"[^>]*>healthy<', dom)
    assert "1 sessions" in dom
    assert session in dom
    assert "0.125 2 3" in dom  # the last actions: the observation, and the third call
    assert len(re.search(r'points="([^"]*)"', dom)[1].split()) == 3
    assert "&lt;img src=x onerror" in dom  # told as text, not run
    assert "Content Security Policy" not in done.stderr  # no violation was logged
    assert "Uncaught" not in done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to look at the page with")
def test_it_is_drawn(tmp_path):
    with serving(ModelStore([from_policy("m", EchoPolicy())])) as server:
        visit(f"http{server.url[2:]}/", tmp_path / "profile", f"--screenshot={tmp_path / 'page.png'}")
    assert (tmp_path / "page.png").stat().st_size > 5000


def test_nothing_is_fetched_from_elsewhere():
    html, policy = page()
    assert not re.search(r"https?://", html)
    assert "unsafe" not in policy
    assert "connect-src 'self'" in policy
