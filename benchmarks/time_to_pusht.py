"""Minutes of training until a policy scores 0.9 on Push-T: dipole as its docs say against LeRobot's default, here.

    python benchmarks/time_to_pusht.py --data PUSHT --peer-python PATH_TO_A_PYTHON_WITH_LEROBOT_0.4

Started by hand, because it takes up to an hour: it is no part of `make bench`. PUSHT is the set of 206 human
demonstrations (state observations). dipole trains the U-Net of docs/howto/make-it-fast.md, 1.4 million parameters that
predict the clean chunk, from the beginning with each of a few budgets, so that every score belongs to a whole
learning-rate schedule, until one reaches 0.9. LeRobot trains for `--peer-minutes`, with the schedule of its default
200,000 updates, its default policy (250 million parameters or so) and one with a U-Net as small as ours; both are
imported and evaluated by the same code on the same seeds, with DDIM-10 (their own DDPM-100 would take most of a day).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from dipole.cores import usable_cores

BUDGETS = (1.5, 2.5, 4.0, 6.0, 9.0)
SCORE, EPISODES = 0.9, 100
PEER = Path(__file__).parent / "peers" / "lerobot_train_pusht.py"
PEERS = {"small": "[32, 64, 128]", "default": "[512, 1024, 2048]"}
OPTIONS = [
    "--policy", "unet", "--network", "down_dims=[32,64,128]", "step_embed_dim=128", "--process", "vp-cosine",
    "--prediction", "x0", "--batch-size", "128", "--lr", "1e-3", "--weight-decay", "1e-4", "--val-fraction", "0.03",
    "--precision", "bf16",
]  # fmt: skip


def dipole(*words: Any) -> dict[str, Any]:
    """Run a command of dipole and return what it prints as JSON."""
    done = subprocess.run(
        ["dipole", *(str(word) for word in words), "--json"], check=True, capture_output=True, text=True
    )
    return dict(json.loads(done.stdout))


def score(run: Path) -> dict[str, Any]:
    """Return the mean of the largest coverages of an episode, with its interval."""
    words = ("eval", run, "--env", "pusht", "--episodes", EPISODES, "--sampler", "ddim", "--steps", 10)
    return dict(dipole(*words)["score"])


def ours(data: Path, folder: Path, threads: int) -> list[dict[str, Any]]:
    """Return the score for each budget, up to the first that is enough."""
    results: list[dict[str, Any]] = []
    for minutes in BUDGETS:
        out = folder / f"dipole-{minutes}"
        words = ("train", "--data", data, "--out", out, "--minutes", minutes, "--threads", threads, *OPTIONS)
        trained = dipole(*words)
        results.append({"minutes": trained["seconds"] / 60, "updates": trained["steps"], "score": score(out)})
        print(json.dumps(results[-1]), flush=True)
        if results[-1]["score"]["value"] >= SCORE:
            break
    return results


def peer(data: Path, folder: Path, python: str, minutes: float, threads: int, down_dims: str) -> dict[str, Any]:
    """Return the score of LeRobot's policy with such a U-Net after some minutes."""
    words = [python, str(PEER), str(data), str(folder / "lerobot"), str(minutes), str(threads), down_dims]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    trained = json.loads(done.stdout.strip().splitlines()[-1])
    dipole("import", folder / "lerobot", "--out", folder / "imported")
    result = {"down_dims": down_dims, **trained, "score": score(folder / "imported")}
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    from dipole.data import load
    from dipole.data.formats import lerobot

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer-python")
    parser.add_argument("--peer-minutes", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=usable_cores())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, Any] = {"ours": ours(args.data, Path(folder), args.threads)}
        if args.peer_python:
            data = Path(folder) / "data"
            lerobot.write(load(args.data), data)
            results["peer"] = [
                peer(data, Path(folder) / name, args.peer_python, args.peer_minutes, args.threads, down_dims)
                for name, down_dims in PEERS.items()
            ]
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
