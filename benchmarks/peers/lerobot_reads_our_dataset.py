"""Check by hand that LeRobot opens the datasets dipole writes, and gets the same numbers out.

    python benchmarks/peers/lerobot_reads_our_dataset.py --peer-python PATH_TO_A_PYTHON_WITH_LEROBOT_0.4

Writes a dataset of random numbers and pictures three times (PNG, H.264, AV1), lets the other Python read every frame
with `LeRobotDataset`, and compares. Numbers and PNG must be equal; for video the mean error on smooth pictures is
printed and must stay below 3 of 255. Windows (`delta_timestamps`) are compared with dipole's, padding flags included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

KEYS = [
    "observation.state",
    "observation.grid",
    "action",
    "next.reward",
    "next.done",
    "task_index",
    "timestamp",
    "index",
]
CAMERA = "observation.images.top"
TO, TP = 2, 8
VIDEO_ERROR = 3.0


def make_episodes():
    from dipole.data import Episodes

    rng = np.random.default_rng(0)
    episodes = []
    for number, length in enumerate((12, 7, 20)):
        y, x = np.mgrid[0:64, 0:96]
        # Smooth pictures, so that a lossy video keeps them nearly as they are; each frame is another one.
        shade = [(x + 2 * y + 9 * t + 50 * number) % 510 for t in range(length)]
        gray = np.abs(255 - np.stack(shade)).astype(np.uint8)
        episodes.append(
            {
                "observation.state": rng.normal(size=(length, 5)).astype(np.float32),
                "observation.grid": rng.normal(size=(length, 2, 3)).astype(np.float32),
                "action": rng.normal(size=(length, 3)).astype(np.float32),
                "next.reward": rng.normal(size=(length, 1)).astype(np.float32),
                "next.done": np.arange(length)[:, None] == length - 1,
                "task_index": np.full((length, 1), number % 2),
                CAMERA: np.stack([gray, gray[:, ::-1], 255 - gray], axis=-1),
            }
        )
    return Episodes.from_list(episodes, fps=10, tasks=("open the drawer", "close the drawer"))


def peer(root: Path, out: Path) -> None:
    """Run in the other Python: dump all that LeRobotDataset gives."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    data = LeRobotDataset("local/check", root=root, video_backend="pyav")
    rows = [data[i] for i in range(len(data))]
    dump = {key: np.stack([np.asarray(row[key]).reshape(-1) for row in rows]) for key in KEYS}
    dump["camera"] = np.stack([np.asarray(row[CAMERA]) for row in rows])
    stamps = {
        "action": [k / data.fps for k in range(1 - TO, TP - TO + 1)],
        "observation.state": [(1 - TO) / data.fps, 0.0],
    }
    windows = LeRobotDataset("local/check", root=root, delta_timestamps=stamps, video_backend="pyav")
    cut = [windows[i] for i in range(len(windows))]
    for key in (*stamps, "action_is_pad"):
        dump[f"window/{key}"] = np.stack([np.asarray(row[key]) for row in cut])
    meta = {"tasks": [row["task"] for row in rows], "episodes": data.num_episodes, "fps": data.fps}
    meta["mean"] = data.meta.stats["action"]["mean"].tolist()
    np.savez(out, **dump)
    out.with_suffix(".json").write_text(json.dumps(meta))


def compare(episodes, root: Path, pictures: str, peer_python: str) -> dict:
    from dipole.data import Windows
    from dipole.data.formats import lerobot

    lerobot.write(episodes, root, pictures=pictures)
    out = root.with_suffix(".npz")
    subprocess.run([peer_python, __file__, "--child", str(root), str(out)], check=True)
    found = np.load(out, allow_pickle=False)
    meta = json.loads(out.with_suffix(".json").read_text())
    ours = episodes.columns | {"timestamp": episodes.timestamp, "index": np.arange(episodes.num_frames)}
    unequal = [key for key in KEYS if not np.array_equal(found[key].astype(np.float64), _flat(ours[key]))]
    camera = found["camera"].transpose(0, 2, 3, 1) * 255
    error = float(np.abs(camera - episodes.columns[CAMERA]).mean())
    # LeRobot starts a window at every frame; dipole drops those that would mostly be padding at an episode's end.
    windows = Windows(episodes, ["observation.state"], obs_horizon=TO, pred_horizon=TP, action_horizon=TP - TO + 1)
    batch = windows.batch(np.arange(len(windows)))
    for key in ("action", "observation.state", "action_is_pad"):
        if not np.array_equal(found[f"window/{key}"][windows.frames], batch[key]):
            unequal.append(f"window/{key}")
    sentences = [episodes.tasks[i] for i in episodes.columns["task_index"][:, 0]]
    if meta["tasks"] != sentences or meta["episodes"] != episodes.num_episodes:
        unequal.append("tasks")
    if not np.allclose(meta["mean"], episodes.stats()["action"]["mean"], atol=1e-12):
        unequal.append("stats")
    passed = not unequal and error <= (0.01 if pictures == "png" else VIDEO_ERROR)
    return {"pictures": pictures, "unequal": unequal, "picture_error": round(error, 4), "passed": passed}


def _flat(column: np.ndarray) -> np.ndarray:
    return column.reshape(len(column), -1).astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python with LeRobot 0.4")
    parser.add_argument("--child", nargs=2, metavar=("ROOT", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        peer(Path(args.child[0]), Path(args.child[1]))
        return
    if not args.peer_python:
        parser.error("--peer-python is needed")
    episodes = make_episodes()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            compare(episodes, Path(folder) / pictures, pictures, args.peer_python)
            for pictures in ("png", "h264", "av1")
        ]
    print(json.dumps(results, indent=2))
    sys.exit(0 if all(result["passed"] for result in results) else 1)


if __name__ == "__main__":
    main()
