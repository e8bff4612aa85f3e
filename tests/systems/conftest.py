"""What the tests of experiments share."""

import pytest


@pytest.fixture
def one_worker(monkeypatch):
    """Experiments compute in this process: a worker would not see the constants that a test has patched."""
    monkeypatch.setattr("dipole.systems.run.usable_cores", lambda: 1)
