"""The monitor of chunks: the same objections as over the whole episode at once, each once; its file, read strictly."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stl_helpers import formulas, values

from dipole.errors import DipoleError
from dipole.safety import Limits, OutputGuard, RefusedError, STLMonitor, read_monitor
from dipole.safety.monitor import Rule
from dipole.safety.stl import Join, Not, Predicate, Until, Within

STATE = "observation.state"


def renamed(formula):
    """Return a formula of `stl_helpers` over x and y as one over an action's and an observation's component."""
    if isinstance(formula, Predicate):
        names = {"x": "action[1]", "y": f"{STATE}[0]"}
        return Predicate(tuple((names[n], w) for n, w in formula.weights), formula.bound, formula.at_least)
    if isinstance(formula, Not):
        return Not(renamed(formula.child))
    if isinstance(formula, Join):
        return Join(tuple(renamed(child) for child in formula.children), formula.every)
    if isinstance(formula, Within):
        return Within(renamed(formula.child), formula.window, formula.every)
    return Until(renamed(formula.first), renamed(formula.then), formula.window)


@st.composite
def episodes(draw):
    """Return chunks `[Ta, 2]`, how much of each is executed, and the observation at its beginning."""
    length = draw(st.integers(1, 5))
    chunks = []
    for _ in range(draw(st.integers(1, 5))):
        actions = np.array(draw(st.lists(values, min_size=2 * length, max_size=2 * length)), float).reshape(-1, 2)
        chunks.append((actions, draw(st.integers(0, length)), float(draw(values))))
    return chunks


@settings(max_examples=100, deadline=None)
@given(st.lists(formulas.map(renamed), min_size=1, max_size=2), episodes())
def test_online_is_offline(found, chunks):
    monitor = STLMonitor([Rule(str(k), formula) for k, formula in enumerate(found)])
    past, acted, seen = None, np.zeros((0, 2)), np.zeros(0)
    for actions, executed, state in chunks:
        obs = {STATE: np.array([[9.0], [state]])}  # To = 2, of which the newest counts
        objections = monitor.check(actions[None], {key: value[None] for key, value in obs.items()}, [past])
        # Offline: all that was done and this chunk, from the episode's beginning.
        whole, frames = np.concatenate([acted, actions]), np.concatenate([seen, np.full(len(actions), state)])
        for rule in monitor.rules:
            values = rule.formula.robustness({"action[1]": whole[:, 1], f"{STATE}[0]": frames})
            known = np.arange(len(values)) + rule.formula.horizon  # at which tick each value is known
            new = (known >= len(acted)) & (values < 0)
            mine = [v for v in objections if v.text == rule.name]
            assert len(mine) == bool(new.any())
            if mine:
                assert (mine[0].first, mine[0].count) == (known[new][0] - len(acted), new.sum())
                assert mine[0].excess == -values[new].min()
        past = monitor.remember(past, actions[:executed], obs)
        acted, seen = np.concatenate([acted, actions[:executed]]), np.concatenate([seen, np.full(executed, state)])
        assert all(len(kept) == min(monitor.horizon, len(acted)) for kept in past.values())


def at_most(bound, ticks=None):
    low = Predicate((("action[0]", 1.0),), bound, False)
    return low if ticks is None else Within(low, ticks, True)


def chunk(*rows):
    return np.array(rows, float)[..., None]


def test_rows_are_judged_apart():
    # Never above 1 for more than two ticks in a row.
    rule = Rule("rest", Within(at_most(1.0), (0, 2), False))
    guard = OutputGuard(Limits(on_monitor="report"), STLMonitor([rule]))
    tired = guard.remember(None, np.array([[0.0], [2.0], [2.0]]), {})
    safe, found = guard.check(chunk([2, 0, 0], [2, 2, 2]), None, {}, [tired, None])
    np.testing.assert_array_equal(safe, chunk([2, 0, 0], [2, 2, 2]))
    assert [(v.row, v.first, v.count, v.excess, v.text) for v in found] == [
        (0, 0, 1, 1.0, "rest"),
        (1, 2, 1, 1.0, "rest"),
    ]
    assert guard.counts == {"monitor": 2, "refused": 0}


def test_clamping_holds_from_the_first_tick_that_is_objected_to():
    monitor = STLMonitor([Rule("low", at_most(1.0))])
    guard = OutputGuard(Limits(on_monitor="clamp"), monitor)
    safe, found = guard.check(chunk([0.5, 2.0, 0.0], [0.0, 0.25, 0.5]))
    np.testing.assert_array_equal(safe, chunk([0.5, 0.5, 0.5], [0.0, 0.25, 0.5]))
    assert found[0].response == "clamp"
    held = OutputGuard(Limits((-1.0,), (3.0,), max_change=(0.75,), hold=(-1.0,), on_monitor="clamp"), monitor)
    safe, _ = held.check(chunk([0.5, 1.25, 0.5, 0.5]))
    np.testing.assert_array_equal(safe, chunk([0.5, -0.25, -1.0, -1.0]))  # hold is approached at the allowed rate
    with pytest.raises(RefusedError, match="monitor 'low'"):
        guard.check(chunk([2.0, 0.0]))  # from the very first tick on, and nothing was sent before
    safe, _ = guard.check(chunk([2.0, 0.0]), np.array([[0.25]]))
    np.testing.assert_array_equal(safe, chunk([0.25, 0.25]))


def test_refusing_replaces_the_whole_chunk():
    guard = OutputGuard(Limits(), STLMonitor([Rule("low", at_most(1.0))]))
    safe, found = guard.check(chunk([0.5, 2.0]), np.array([[0.0]]))
    np.testing.assert_array_equal(safe, chunk([0.0, 0.0]))
    assert guard.counts["refused"] == 1
    assert found[0].response == "refuse"


@settings(max_examples=100, deadline=None)
@given(formulas.map(renamed), st.lists(st.tuples(values, values, st.integers(0, 3)), min_size=1, max_size=6))
def test_missed_ticks_are_ticks_at_which_the_last_action_was_in_force(formula, ticks):
    guard = OutputGuard(Limits(on_monitor="report"), STLMonitor([Rule("r", formula)]))
    past = None
    for action, state, missed in ticks:
        sent, seen = np.array([0.0, action]), {STATE: np.array([[state]])}
        guard.check(sent[None, None], None, {STATE: seen[STATE][None]}, [past])
        past = guard.remember(past, sent[None], seen)
        if missed:
            past = guard.held(past, sent, missed, seen)
    counts = [1 + missed for _, _, missed in ticks]
    trace = {
        "action[1]": np.repeat([action for action, _, _ in ticks], counts),
        f"{STATE}[0]": np.repeat([state for _, state, _ in ticks], counts),
    }
    assert guard.counts.get("monitor", 0) == int((formula.robustness(trace) < 0).sum())
    assert guard.counts["refused"] == 0


def test_without_a_monitor_nothing_is_remembered():
    assert OutputGuard(Limits()).remember(None, np.zeros((2, 1))) is None
    assert OutputGuard(Limits()).held(None, np.zeros(1), 2) is None


def test_signals_that_do_not_exist_are_reported():
    guard = OutputGuard(Limits(), STLMonitor([Rule("r", Predicate((("action[4]", 1.0),), 0.0, True))]))
    with pytest.raises(DipoleError, match=r"'action\[4\]' does not exist: 'action' is \[1\]"):
        guard.check(chunk([0.0]))
    guard = OutputGuard(Limits(), STLMonitor([Rule("r", Predicate(((f"{STATE}[0]", 1.0),), 0.0, True))]))
    with pytest.raises(DipoleError, match=r"not seen by the policy, which sees observation\.force"):
        guard.check(chunk([0.0]), None, {"observation.force": np.zeros((1, 1, 3))})


def write(path, *rules):
    path.write_text(json.dumps({"format": 1, "rules": [{"name": f"r{k}", "formula": f} for k, f in enumerate(rules)]}))
    return path


LOW = {"signal": "action[0]", "at_most": 1}


def test_a_file_of_every_operator(tmp_path):
    total = {"sum": {"action[0]": 1.5, f"{STATE}[2]": -1}, "at_least": 0.5}
    monitor = read_monitor(
        write(
            tmp_path / "m.json",
            {"always": {"or": [LOW, total]}, "ticks": [0, 4]},
            {"until": [LOW, {"eventually": {"not": total}, "ticks": [1, 2]}], "ticks": [0, 3]},
            {"and": [LOW, total]},
        )
    )
    low = Predicate((("action[0]", 1.0),), 1.0, False)
    both = Predicate((("action[0]", 1.5), (f"{STATE}[2]", -1.0)), 0.5, True)
    assert [rule.formula for rule in monitor.rules] == [
        Within(Join((low, both), False), (0, 4), True),
        Until(low, Within(Not(both), (1, 2), False), (0, 3)),
        Join((low, both), True),
    ]
    assert monitor.horizon == 5


def nested(depth):
    return LOW if depth == 0 else {"not": nested(depth - 1)}


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("action[0] < 1", "expected a formula"),
        ({}, "expected a formula"),
        ({**LOW, "not": LOW}, "expected a formula"),
        ({"signal": "action[0]"}, "either at_least or at_most"),
        ({**LOW, "at_least": 0}, "either at_least or at_most"),
        ({**LOW, "at_mst": 0}, "unknown key .* 'at_mst': did you mean 'at_most'"),
        ({"signal": "__import__('os')", "at_most": 1}, "is no signal"),
        ({"signal": "action[-1]", "at_most": 1}, "is no signal"),
        ({"signal": "action", "at_most": 1}, "is no signal"),
        ({"signal": 3, "at_most": 1}, "expected a signal"),
        ({"sum": {}, "at_most": 1}, "expected a signal"),
        ({"sum": {"action[0]": "1"}, "at_most": 1}, "expected a finite number"),
        ({"signal": "action[0]", "at_most": float("nan")}, "expected a finite number"),
        ({"signal": "action[0]", "at_most": 10**400}, "expected a finite number"),
        ({"signal": "action[0]", "at_most": True}, "expected a finite number"),
        ({"always": LOW}, r"expected ticks \[A, B\]"),
        ({"always": LOW, "ticks": [2, 1]}, r"expected ticks \[A, B\]"),
        ({"always": LOW, "ticks": [0, 10**9]}, r"expected ticks \[A, B\]"),
        ({"always": LOW, "ticks": [0.0, 1.0]}, r"expected ticks \[A, B\]"),
        ({"not": LOW, "ticks": [0, 1]}, "unknown key"),
        ({"and": []}, "expected a list"),
        ({"until": [LOW], "ticks": [0, 1]}, "expected a list of two"),
        (nested(40), "nested deeper than 32"),
        ({"and": [LOW] * 1000}, "more than 1000 formulas"),
        ({"always": {"always": LOW, "ticks": [0, 9000]}, "ticks": [0, 9000]}, "reaches over 18000 ticks"),
    ],
)
def test_files_that_are_wrong_say_where(tmp_path, formula, message):
    with pytest.raises(DipoleError, match=message) as caught:
        read_monitor(write(tmp_path / "m.json", LOW, formula))
    assert "m.json: rules[1]" in str(caught.value)


@pytest.mark.parametrize(
    "table", [[], {}, {"format": 2, "rules": []}, {"format": 1, "rules": {}}, {"format": 1, "rules": [], "more": 1}]
)
def test_other_files_are_not_monitors(tmp_path, table):
    (tmp_path / "m.json").write_text(json.dumps(table))
    with pytest.raises(DipoleError, match="expected|must be a list"):
        read_monitor(tmp_path / "m.json")
    (tmp_path / "m.json").write_text('{"format": 1, "rules": []}')
    with pytest.raises(DipoleError, match="at least one rule"):
        read_monitor(tmp_path / "m.json")
