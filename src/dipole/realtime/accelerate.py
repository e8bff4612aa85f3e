"""Finding the fastest way to run a policy that still does its job: `dipole accelerate`.

All candidates are timed in turn, then play the same episodes in rounds of growing length. After each round the better
half stays, by ranks of domination in (score, latency), the reference always with them (successive halving, Jamieson &
Talwalkar 2016). The finalists are tried on other back ends. One is chosen, and plays against the reference once more,
on seeds that had no part in the choice: those of the search flatter whoever won on them.

Episodes are those of the seed, whatever the machine; timings are not, and where two candidates are about equally fast
they decide. What is finished is kept in the folder of the search, and an interrupted search goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dipole.envs.spec import VectorEnv
from dipole.errors import DipoleError
from dipole.evaluation.machine import machine
from dipole.policies.checkpoint import find_policy
from dipole.realtime.candidates import Workshop, on_backends
from dipole.realtime.runtime import FILE as RUNTIME_FILE
from dipole.realtime.runtime import write_runtime
from dipole.realtime.search import Progress, Say, Search
from dipole.realtime.selection import Entry, SearchConfig, choose, domination_ranks, halve, paired, planned, rungs
from dipole.serialization import to_dict, write_json

FILE = "accelerate.json"
FASTER = 0.95  # a back end is worth episodes of its own where it takes at most this share of the time


def accelerate(
    run: str | Path,
    env: VectorEnv,
    config: SearchConfig,
    out: Path,
    *,
    device: str = "cpu",
    progress: Callable[[int], Progress | None] | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Search, choose, confirm, and save the choice as `runtime.json` beside the weights it is for.

    Args:
        run: Run folder or checkpoint folder.
        env: The environment to do well in; it is used, and not closed.
        config: What is searched for.
        out: Where results are kept.
        device: Where policies compute.
        progress: Given the number of episodes planned, returns what is called with each finished one.
        say: Called with a line when a stage begins.

    Returns:
        What is in `accelerate.json`: rows of all candidates, the choice, its confirmation.

    Raises:
        DipoleError: Policy and environment do not fit, or no candidate is as fast as asked.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        search = Search(Path(run), env, config, out, Workshop(device), say)
        entries = search.candidates()
        say(f"timing {len(entries)} candidates")
        search.time(entries)
        reference = entries[0]
        if reference.problem:
            raise DipoleError(reference.problem)
        if progress is not None:
            search.progress = progress(planned(len(entries), config.episodes))
        finalists = _rounds(search, entries, reference)
        finalists += _other_backends(search, finalists, entries)
        chosen = choose(finalists, reference, config)
        if chosen is not None:
            say(f"confirming '{chosen.candidate.name}' on fresh seeds")
        confirmation = None if chosen is None else search.confirm(chosen, reference)
        return _finish(search, entries, reference, chosen, confirmation)
    finally:
        torch.set_num_threads(threads)


def _rounds(search: Search, entries: Sequence[Entry], reference: Entry) -> list[Entry]:
    """Play the rounds; return the finalists."""
    config = search.config
    alive = [entry for entry in entries if not entry.problem]
    if config.target_ms is not None:
        slow = [e for e in alive if e is not reference and (e.p50_ms or 0.0) > 3 * config.target_ms]
        alive = [entry for entry in alive if entry not in slow]  # no back end makes up for that
        for entry in slow:
            entry.dropped = 0
    sizes = rungs(config.episodes)
    for number, size in enumerate(sizes, 1):
        search.say(f"round {number} of {len(sizes)}: {len(alive)} candidates, {size} episodes each")
        search.play(alive, size)
        if reference.problem:
            raise DipoleError(reference.problem)
        kept = [e for e in alive if not e.problem] if number == len(sizes) else halve(alive, reference, config)
        for entry in alive:
            if entry not in kept and not entry.problem:
                entry.dropped = number
        alive = kept
    return alive


def _other_backends(search: Search, finalists: Sequence[Entry], entries: list[Entry]) -> list[Entry]:
    """Try finalists on other back ends; return those that are faster there and have played all episodes."""
    config, found = search.config, []
    pairs = [
        (entry, search.entry(candidate))
        for entry in finalists
        for candidate in on_backends(entry.candidate, config.backends, search.workshop.device)
    ]
    others = [other for _, other in pairs]
    if any(other.p50_ms is None for other in others):
        search.say(f"timing {len(finalists)} finalists on other back ends")
        # All anew, in turn: a timing of minutes ago may be that of a busier machine.
        search.time([*finalists, *others], anew=True)
    entries += others
    for entry, other in pairs:
        other.nfe = entry.nfe  # some back ends call what cannot be watched
        if other.problem or (other.p50_ms or math.inf) > FASTER * (entry.p50_ms or 0.0):
            other.dropped = None if other.problem else 0
            continue
        search.say(f"'{other.candidate.name}': {other.p50_ms:.3g} ms instead of {entry.p50_ms:.3g}")
        search.play([other], config.episodes)
        if not other.problem:
            found.append(other)
    return found


def _finish(
    search: Search, entries: Sequence[Entry], reference: Entry, chosen: Entry | None, confirmation: Any
) -> dict[str, Any]:
    config = search.config
    rows = [entry.row(search.on_success) for entry in entries]
    complete = [i for i, row in enumerate(rows) if row["episodes"] == config.episodes and row["p50_ms"] is not None]
    ranks = domination_ranks([(entries[i].score, entries[i].p50_ms or 0.0) for i in complete])
    for i, row in enumerate(rows):
        row["front"] = i in complete and ranks[complete.index(i)] == 0
    document: dict[str, Any] = {
        "run": str(search.run),
        "env": search.env.spec.name,
        "score_name": search.env.spec.score,
        "config": to_dict(config),
        "reference": reference.candidate.name,
        "chosen": None if chosen is None else chosen.candidate.name,
        "runtime": None,
        "paired": None if chosen is None or chosen is reference else paired(reference, chosen, search.on_success),
        "confirmation": confirmation,
        "rows": rows,
        "notes": search.notes,
        "machine": machine(),
    }
    if chosen is not None:
        folder = Path(chosen.candidate.run)
        # A file in the run folder itself comes first when the run is loaded: then that is the one to replace.
        place = folder if (folder / RUNTIME_FILE).is_file() else find_policy(folder)
        document["runtime"] = str(write_runtime(chosen.candidate.runtime, place))
    write_json(search.out / FILE, document)
    if chosen is None:
        fastest = min((e for e in entries if e.p95_ms is not None), key=lambda e: e.p95_ms or 0.0)
        raise DipoleError(
            f"no candidate keeps to {config.target_ms:g} ms (95th percentile); the fastest, "
            f"'{fastest.candidate.name}', takes {fastest.p95_ms:.3g} ms: see {search.out / FILE}"
        )
    return document


def forget(out: Path) -> None:
    """Remove what earlier searches left in a folder."""
    for folder in (out / "candidates", out / "confirmation" / "candidates"):
        for path in folder.glob("*.json") if folder.is_dir() else ():
            with suppress(FileNotFoundError):
                path.unlink()
