"""The training state on disk: complete or absent, whatever happens while it is written."""

import errno
import os
import shutil

import pytest
import torch
from torch import nn

from dipole.errors import DipoleError
from dipole.training import checkpoint
from dipole.training.checkpoint import (
    load_state,
    module_tensors,
    optimizer_tensors,
    prune,
    restore_module,
    restore_optimizer,
    save_state,
)
from refusals import assert_refused


def _save(folder, step, **values):
    return save_state(folder, step, {"model": {"w": torch.full((3,), float(step))}}, {"seconds": 1.5, **values})


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_read_is_what_was_written(tmp_path):
    tensors = {
        "model": {"a.weight": torch.randn(2, 3), "half": torch.randn(4).bfloat16(), "flag": torch.tensor(True)},
        "loop": {"meter": torch.randn(3, dtype=torch.float64)},
    }
    save_state(tmp_path / "state", 12, tensors, {"best": ["val_loss", 0.1 + 0.2, 7], "loss": None})
    state = load_state(tmp_path / "state")
    assert state.step == 12
    assert state.values == {"best": ["val_loss", 0.1 + 0.2, 7], "loss": None}
    for group, entries in tensors.items():
        assert state.tensors[group].keys() == entries.keys()
        assert all(torch.equal(state.tensors[group][name], value) for name, value in entries.items())


def test_not_a_number_survives(tmp_path):
    # The loss before the first line of the log is nan.
    _save(tmp_path, 0, loss=float("nan"))
    assert load_state(tmp_path).values["loss"] != load_state(tmp_path).values["loss"]


def test_two_generations_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        _save(tmp_path, step)
    assert _names(tmp_path) == ["step-000000015", "step-000000020"]
    assert load_state(tmp_path).step == 20
    _save(tmp_path, 20, again=1)  # the same step twice, as after a resumption
    assert load_state(tmp_path).values["again"] == 1
    assert _names(tmp_path) == ["step-000000015", "step-000000020"]


def test_nothing_there(tmp_path):
    assert load_state(tmp_path / "absent") is None
    (tmp_path / ".saving-000000007").mkdir()
    assert load_state(tmp_path) is None


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "manifest", "no manifest", "other format"])
def test_a_damaged_state_is_passed_over(tmp_path, harm):
    _save(tmp_path, 1)
    newest = _save(tmp_path, 2)
    weights, manifest = newest / "model.safetensors", newest / "state.json"
    data = bytearray(weights.read_bytes())
    if harm == "flip":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif harm == "truncate":
        weights.write_bytes(data[:-1])
    elif harm == "remove":
        weights.unlink()
    elif harm == "manifest":
        manifest.write_text(manifest.read_text()[:20])
    elif harm == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    assert load_state(tmp_path).step == 1
    shutil.rmtree(tmp_path / "step-000000001")
    with pytest.raises(DipoleError, match="no intact training state"):
        load_state(tmp_path)


class Killed(BaseException):
    """Stands for SIGKILL: no handler of Exception runs on it."""


def _kill_at(monkeypatch, number):
    """Make the `number`-th operation on files raise `Killed`, as if the process had died there."""
    count = 0

    def killing(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                raise Killed
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(checkpoint, "_write", killing(checkpoint._write))
    for name in ("rename", "fsync"):
        monkeypatch.setattr(os, name, killing(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", killing(shutil.rmtree))
    return lambda: count


def test_killed_at_any_operation_a_complete_state_remains(tmp_path, monkeypatch):
    number, finished = 0, False
    while not finished:
        number += 1
        folder = tmp_path / str(number)
        for step in (1, 2):
            _save(folder, step)
        with monkeypatch.context() as patched:
            count = _kill_at(patched, number)
            try:
                _save(folder, 3)
                finished = True
            except Killed:
                pass
        state = load_state(folder)
        assert state.step in (2, 3)
        assert torch.equal(state.tensors["model"]["w"], torch.full((3,), float(state.step)))
        _save(folder, 4)  # life goes on, and what the kill left is cleared away
        assert load_state(folder).step == 4
        assert _names(folder) == [f"step-{state.step:09d}", "step-000000004"]
    # Two files, each written and flushed, two folders flushed, one renamed, one removed: all were killed once.
    assert number - 1 == count() == 8


def test_disk_full_leaves_the_older_states(tmp_path, monkeypatch):
    _save(tmp_path, 1)

    def full(path, data):
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_write", full)
        with assert_refused(r"No space left on device.*--resume"):
            _save(tmp_path, 2)
    assert _names(tmp_path) == ["step-000000001"]
    assert load_state(tmp_path).step == 1


def test_prune_removes_leftovers(tmp_path):
    for step in (1, 2):
        _save(tmp_path, step)
    (tmp_path / ".saving-000000003").mkdir()
    prune(tmp_path, keep=1)
    assert _names(tmp_path) == ["step-000000002"]


def _trained(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_module_and_optimizer_come_back_exactly(tmp_path):
    model, optimizer = _trained()
    tensors = {"model": module_tensors(model), "optimizer": optimizer_tensors(optimizer, model)}
    save_state(tmp_path, 3, tensors, {})
    assert set(tensors["optimizer"]) >= {"0.weight/exp_avg", "1.bias/exp_avg_sq", "1.bias/step"}
    other, other_optimizer = _trained(seed=1)
    state = load_state(tmp_path)
    restore_module(other, state.tensors["model"])
    restore_optimizer(other_optimizer, other, state.tensors["optimizer"])
    x = torch.randn(5, 3)
    for module, opt in ((model, optimizer), (other, other_optimizer)):
        opt.zero_grad()
        module(x).square().mean().backward()
        opt.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_network_is_refused():
    model, optimizer = _trained()
    wider = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.raises(DipoleError, match=r"'0.weight' is \[4, 3\], the policy's \[5, 3\]"):
        restore_module(wider, module_tensors(model))
    with pytest.raises(DipoleError, match="only one of the saved"):
        restore_module(nn.Linear(3, 4), module_tensors(model))
    with pytest.raises(DipoleError, match="the optimizer has"):
        restore_optimizer(optimizer, nn.Linear(3, 4), optimizer_tensors(optimizer, model))


def test_shared_weights_are_stored_once(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_state(tmp_path, 1, {"model": module_tensors(model)}, {})
    assert set(load_state(tmp_path).tensors["model"]) == {"0.weight", "0.bias", "1.bias"}
