"""The registry of systems, the run folder, the results file and the two commands."""

import json
import operator
import sys
import types

import pytest

from dipole import systems
from dipole.cli import main
from dipole.errors import DipoleError
from dipole.serialization import read_json
from dipole.systems import Run, store
from dipole.systems.card import Card, Claim, Margin, Measure, Source

CARD = Card("toy", "A toy", Source("None", 2026), "objective", "s", "c", "a0")


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A system with one claim that passes and, in tier small, one that fails; and a results file of its own."""
    module = types.ModuleType("dipole.systems.toy")
    module.CARD = CARD
    good = Claim("works", "1", Measure(1.0), Measure(0.0), Margin("difference", low=0.5))
    bad = Claim("is fast", "2 x", Measure(3.0), Measure(2.0), Margin("ratio", high=0.7), "too slow here")
    module.TIERS = {"ci": lambda run: [good], "small": lambda run: [good, bad]}
    monkeypatch.setitem(sys.modules, "dipole.systems.toy", module)
    monkeypatch.setattr(systems, "_MODULES", ("toy",))
    monkeypatch.setattr(store, "RESULTS", tmp_path / "store" / "results.json")
    monkeypatch.chdir(tmp_path)
    return module


def test_names_cards_and_tiers(toy):
    assert systems.names() == ["toy"]
    assert systems.card("toy") is CARD
    assert systems.tiers("toy") == ["ci", "small"]
    with pytest.raises(DipoleError, match="unknown system 'tou': did you mean 'toy'"):
        systems.card("tou")
    with pytest.raises(DipoleError, match="has no tier 'gpu': it has ci, small"):
        systems.reproduce("toy", "gpu")


def test_reproduce_saves_its_report(toy, tmp_path):
    report = systems.reproduce("toy", "small", tmp_path / "out")
    assert report.verdict == "failed"
    saved = read_json(tmp_path / "out" / "report.json")
    assert [row["verdict"] for row in saved["claims"]] == ["passed", "failed"]
    assert saved["machine"]["cores"] >= 1
    assert not store.RESULTS.exists()


def test_command_prints_failures_as_failed_and_exits_with_1(toy, tmp_path, capsys):
    main(["reproduce", "toy"])
    assert "passed" in capsys.readouterr().out
    assert (tmp_path / "runs" / "reproduce" / "toy-ci" / "report.json").is_file()
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "toy", "--tier", "small"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "failed" in out
    assert "too slow here" in out
    assert not store.RESULTS.exists()


def test_command_prints_one_json_document(toy, capsys):
    main(["reproduce", "toy", "--json"])
    out = capsys.readouterr().out
    assert json.loads(out)["verdict"] == "passed"


def test_unknown_system_is_one_line_and_exit_code_2(toy, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "tooy"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_recording_and_listing(toy, capsys):
    main(["reproduce", "toy", "--record"])
    with pytest.raises(SystemExit):
        main(["reproduce", "toy", "--tier", "small", "--record"])
    assert set(store.load()["toy"]) == {"ci", "small"}
    capsys.readouterr()
    main(["systems", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == "toy"
    assert row["results"]["ci"]["passed"] == 1
    assert row["results"]["small"] | {"passed": 1, "failed": 1, "verdict": "failed"} == row["results"]["small"]
    main(["systems"])
    out = capsys.readouterr().out
    assert "toy" in out
    assert "1/2" in out


def test_recording_replaces_the_earlier_result_and_keeps_the_others(toy, tmp_path):
    path = tmp_path / "r.json"
    first = systems.reproduce("toy", "ci", tmp_path / "a")
    store.record(first, path)
    store.record(systems.reproduce("toy", "small", tmp_path / "b"), path)
    store.record(first, path)
    assert set(read_json(path)["toy"]) == {"ci", "small"}
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_results_that_cannot_be_written_are_a_clear_error(toy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DipoleError, match="cannot"):
        store.record(systems.reproduce("toy", "ci", tmp_path / "a"), tmp_path / "file" / "r.json")


def test_parts_are_kept_and_reused(tmp_path):
    calls, lines = [], []

    def compute():
        calls.append(1)
        return {"value": len(calls)}

    run = Run(tmp_path, lines.append)
    assert run.part("one", {"seed": 0}, compute) == {"value": 1}
    assert Run(tmp_path, lines.append).part("one", {"seed": 0}, compute) == {"value": 1}
    assert lines == ["one", "one: finished earlier"]
    assert run.part("one", {"seed": 1}, compute) == {"value": 2}
    assert Run(tmp_path, fresh=True).part("one", {"seed": 1}, compute) == {"value": 3}
    (tmp_path / "parts" / "one.json").write_text("{ half")
    with pytest.raises(DipoleError, match="not valid JSON"):
        run.part("one", {"seed": 1}, compute)


def test_an_interrupted_part_leaves_nothing_behind(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path).part("one", {}, interrupted)
    assert Run(tmp_path).part("one", {}, lambda: 5) == 5


def test_plots_are_saved_and_named(tmp_path):
    pytest.importorskip("matplotlib")
    run = Run(tmp_path)
    with run.plot("curve") as axes:
        axes.plot([0, 1], [0, 1])
    assert run.plots == ["curve.png"]
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_there_are_no_plots_and_no_failure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lines = []
    run = Run(tmp_path, lines.append)
    with run.plot("curve") as axes:
        axes.plot([0, 1], [0, 1])
        axes.set_xlabel("x")
    assert run.plots == []
    assert "dipole[report]" in lines[0]


def test_a_grid_runs_in_processes_and_keeps_what_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr("dipole.systems.run.usable_cores", lambda: 2)
    expected = {"ab": ["ab", "abab"], "c": ["c", "cc"]}
    lines = []
    run = Run(tmp_path, lines.append)
    assert run.grid(("ab", "c"), (1, 2), {"length": 3}, operator.mul) == expected
    assert lines[0] == "4 of 4 parts to compute, 2 at a time"
    (tmp_path / "parts" / "c-2.json").unlink()
    lines.clear()
    again = Run(tmp_path, lines.append)
    assert again.grid(("ab", "c"), (1, 2), {"length": 3}, operator.mul) == expected
    assert "1 of 4 parts to compute, 1 at a time" in lines
    assert again.saved_seconds > 0
    assert Run(tmp_path).grid(("ab", "c"), (1, 2), {"length": 4}, operator.mul) == expected
