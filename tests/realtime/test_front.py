import copy

import pytest

from dipole.realtime import front


def row(name, ms, score, **options):
    estimate = {
        "value": score,
        "low": score - 0.1,
        "high": min(1.0, score + 0.1),
        "confidence": 0.95,
        "method": "wilson",
    }
    values = {
        "name": name, "run": "run", "runtime": {}, "episodes": 96, "score": estimate, "success": score, "p50_ms": ms,
        "p95_ms": 1.5 * ms, "ms_per_action": ms / 8, "nfe": 5, "dropped": None, "problem": "", "front": True,
    }  # fmt: skip
    return values | options


def document():
    unable = {"p50_ms": None, "p95_ms": None, "ms_per_action": None, "score": None, "front": False}
    unable["problem"] = "back end 'packed' knows no transformer"
    return {
        "run": "runs/<peg>", "env": "micro/fork2d", "score_name": "success", "reference": "as trained",
        "chosen": "ddim:2", "runtime": "runs/peg/runtime.json", "notes": [], "machine": {}, "paired": None,
        "config": {"target_ms": None, "max_drop": 0.02, "episodes": 96},
        "confirmation": {
            "first_seed": 100_000, "episodes": 96, "reference": 0.9, "chosen": 0.8, "p": 0.04,
            "difference": {"value": -0.1, "low": -0.2, "high": 0.0},
        },
        "rows": [
            row("as trained", 10.0, 0.9), row("ddim:2", 2.0, 0.9), row("ddim:1", 1.0, 0.2, episodes=16, front=False),
            row("a + packed", 1.0, 0.5) | unable, row("b + packed", 1.0, 0.5) | unable,
        ],
    }  # fmt: skip


def test_the_words_say_what_was_found_and_what_was_not():
    lines = front.sentences(document())
    assert lines[0] == "chosen: 'ddim:2', 2.00 ms per chunk instead of 10.0 (5.0 times as fast)"
    assert lines[1].startswith(
        "on 96 fresh seeds: -10 points against the reference (95 % interval -20 to +0, p = 0.04)"
    )
    assert "larger than was allowed" in lines[2]
    assert lines[3] == "not run: 'a + packed' and 1 more: back end 'packed' knows no transformer"
    assert "stays" in front.sentences({**document(), "chosen": "as trained"})[0]
    assert "Nothing was chosen" in front.sentences({**document(), "chosen": None})[0]
    fine = copy.deepcopy(document())
    fine["confirmation"]["difference"]["value"] = -0.01
    assert not any("larger" in line for line in front.sentences(fine))


def test_the_table_is_ordered_by_time_and_leaves_out_what_was_not_run():
    found = document()
    names = [front.cells(item, found)[0] for item in front.ordered(found["rows"])]
    assert names == ["ddim:1", "ddim:2", "as trained"]
    assert front.cells(found["rows"][1], found)[-1] == "chosen"
    assert front.cells(found["rows"][0], found)[-1] == "reference"


def test_the_page_needs_nothing_but_itself(tmp_path):
    pytest.importorskip("matplotlib")
    assert front.draw(document(), tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    text = front.write_page(document(), tmp_path).read_text()
    assert "runs/&lt;peg&gt;" in text
    assert "data:image/png;base64," in text
    assert "http" not in text
    assert text.count("<tr") == 4
