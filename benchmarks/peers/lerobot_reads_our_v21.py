"""Check by hand that LeRobot 0.3 opens the v2.1 datasets that dipole writes, and gets the same numbers out.

    python benchmarks/peers/lerobot_reads_our_v21.py --peer-python PATH_TO_A_PYTHON_WITH_LEROBOT_0.3

Converts the golden v3.0 set of the tests (numbers, PNG, AV1 video, tasks) to v2.1, lets the other Python read every
frame with `LeRobotDataset`, and compares with what dipole reads from the v3.0 set: all must be equal, the video up to
the rounding of two decoders. Without torchvision in the other Python, its two uses (ToTensor, decoding) are replaced by
a few lines around PyAV, and the result says so.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "lerobot_dataset_v3"
KEYS = ["observation.state", "action", "next.reward", "next.done", "task_index", "timestamp", "index", "episode_index"]
WRIST, TOP = "observation.images.wrist", "observation.images.top"
VIDEO_ERROR = 2.0  # levels of 255: two decoders turn YUV into RGB with different rounding


def stand_in_for_torchvision() -> bool:
    """Put modules in place of torchvision when it is missing; return whether that was needed."""
    if importlib.util.find_spec("torchvision") is not None:
        return False
    import torch

    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
        module: Any = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.Transform = module.functional = object
        module.ToTensor = lambda: lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
        sys.modules[name] = module
    return True


def decode(path: Path, times: list[float], tolerance: float, backend: str | None = None) -> Any:
    import av
    import torch

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [(float(f.pts * stream.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(stream)]
    nearest = [min(frames, key=lambda frame, t=t: abs(frame[0] - t)) for t in times]
    assert all(abs(frame[0] - t) < tolerance for frame, t in zip(nearest, times, strict=True))
    return torch.from_numpy(np.stack([frame[1] for frame in nearest])).permute(0, 3, 1, 2).float() / 255


def peer(root: Path, out: Path) -> None:
    """Run in the other Python: dump all that LeRobotDataset gives."""
    replaced = stand_in_for_torchvision()
    import lerobot.datasets.lerobot_dataset as module

    if replaced:
        module.decode_video_frames = decode
    data = module.LeRobotDataset("local/check", root=root, video_backend="pyav")
    rows = [data[i] for i in range(len(data))]
    dump = {key: np.stack([np.asarray(row[key]).reshape(-1) for row in rows]) for key in (*KEYS, WRIST, TOP)}
    meta = {"tasks": [row["task"] for row in rows], "mean": data.meta.stats["action"]["mean"].tolist()}
    np.savez(out, **dump)
    out.with_suffix(".json").write_text(json.dumps(meta | {"stand_in_for_torchvision": replaced}))


def compare(peer_python: str, folder: Path) -> dict[str, Any]:
    from dipole.data.formats import lerobot, lerobot_v21_write

    lerobot_v21_write.from_v3(GOLDEN, folder / "v21")
    out = folder / "found.npz"
    subprocess.run([peer_python, __file__, "--child", str(folder / "v21"), str(out)], check=True)
    found, meta = np.load(out, allow_pickle=False), json.loads(out.with_suffix(".json").read_text())
    episodes = lerobot.read(GOLDEN)
    ours = {"timestamp": episodes.timestamp, "index": np.arange(33), "episode_index": episodes.episode_index}
    ours = {key: values[:, None] for key, values in ours.items()} | episodes.columns
    unequal = [key for key in KEYS if not np.array_equal(found[key].astype(np.float64), ours[key].astype(np.float64))]
    pictures = {key: ours[key].transpose(0, 3, 1, 2).reshape(33, -1).astype(np.float64) for key in (WRIST, TOP)}
    errors = {key: float(np.abs(found[key] * 255 - pictures[key]).max()) for key in pictures}
    if meta["tasks"] != [episodes.task_of(i) for i in episodes.episode_index]:
        unequal.append("tasks")
    if not np.allclose(meta["mean"], episodes.stats()["action"]["mean"], atol=1e-6):  # pooled from float32 by LeRobot
        unequal.append("stats")
    passed = not unequal and errors[WRIST] < 1e-3 and errors[TOP] <= VIDEO_ERROR
    replaced = meta["stand_in_for_torchvision"]
    return {"unequal": unequal, "picture_errors": errors, "stand_in_for_torchvision": replaced, "passed": passed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python with LeRobot 0.3")
    parser.add_argument("--child", nargs=2, metavar=("ROOT", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        peer(Path(args.child[0]), Path(args.child[1]))
        return
    if not args.peer_python:
        parser.error("--peer-python is needed")
    with tempfile.TemporaryDirectory() as folder:
        result = compare(args.peer_python, Path(folder))
    print(json.dumps(result, indent=2))
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
