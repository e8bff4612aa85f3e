"""Run by a Python with LeRobot 0.4: windows per second of its dataset and loader. See ../streaming_loader.py."""

import json
import sys
import time
from pathlib import Path

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

CAMERAS = ("observation.images.front", "observation.images.wrist")
FPS = 10


def main() -> None:
    root, batch, workers, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    torch.set_num_threads(1)
    offsets = {**dict.fromkeys((*CAMERAS, "observation.state"), range(-1, 1)), "action": range(-1, 15)}
    delta = {key: [i / FPS for i in steps] for key, steps in offsets.items()}
    decoder = "torchcodec" if _has_torchcodec() else "pyav"
    dataset = LeRobotDataset("local/streaming", root=root, delta_timestamps=delta, video_backend=decoder)
    loader = torch.utils.data.DataLoader(dataset, batch, shuffle=True, num_workers=workers, drop_last=True)
    done, begin = 0, None
    while True:
        for frames in loader:
            assert frames[CAMERAS[0]].shape[:3] == (batch, 2, 3)
            if begin is None:  # the first batch starts the workers
                begin = time.perf_counter()
                continue
            done += batch
            if time.perf_counter() - begin > seconds:
                speed = done / (time.perf_counter() - begin)
                print(json.dumps({"windows_per_s": speed, "decoder": decoder}))
                return


def _has_torchcodec() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


if __name__ == "__main__":
    main()
