"""Streaming pictures out of video files, dipole's loader against LeRobot's: one LeRobotDataset v3.0, random windows.

    python benchmarks/streaming_loader.py --peer-python PATH_TO_A_PYTHON_WITH_LEROBOT_0.4

The set: 16 episodes of 150 frames from two cameras of 160 x 120 (a moving scene with fixed texture and a little noise),
AV1 as LeRobot's defaults write it (a key frame every second frame, crf 30), states and actions. Both loaders give
shuffled batches of 32 windows with 2 observations and 16 actions, using 2 workers, and are counted after their first
batch. LeRobot's gives float pictures in [0, 1], channels first; so ours are brought to that form inside the measured
time (`ours`; `ours_uint8` is without it). They run one after the other, each in a process of its own, whose largest
resident memory (with that of its worker processes) is the memory figure; `ours_mib_of_loader` is what ours takes beyond
Python and torch. Our cache of decoded pictures is off: of a set
larger than memory it would hold next to nothing, of this one nearly all. LeRobot decodes with torchcodec, the faster of
its ways, which needs FFmpeg's libraries: those of the system, or else the ones inside its PyAV, are put in its reach.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

EPISODES, FRAMES, HEIGHT, WIDTH, FPS = 16, 150, 120, 160, 10
CAMERAS = ("observation.images.front", "observation.images.wrist")
BATCH, WORKERS, SECONDS = 32, 2, 20.0
TO, TP, TA = 2, 16, 8
PEER = Path(__file__).parent / "peers" / "lerobot_streaming_loader.py"


def run(peer_python: str | None = None, seconds: float = SECONDS) -> dict[str, Any]:
    """Return windows per second (`ours`, `peer`), their ratio, and memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_data(data)
        words = [str(data), str(BATCH), str(WORKERS), str(seconds)]
        ours = measured([sys.executable, __file__, "--worker", *words])
        peer = None if peer_python is None else peer_speed(peer_python, words, Path(folder))
    ratio = None if peer is None else ours["windows_per_s"] / peer["windows_per_s"]
    return {
        "name": "streaming_loader",
        "ours": ours["windows_per_s"],
        "ours_uint8": ours["windows_per_s_uint8"],
        "peer": None if peer is None else peer["windows_per_s"],
        "ratio": ratio,
        "ours_mib": ours["peak_mib"],
        "ours_mib_of_loader": ours["grown_mib"],
        "decoded_mib": EPISODES * FRAMES * HEIGHT * WIDTH * 3 * len(CAMERAS) / 2**20,
        "peer_mib": None if peer is None else peer["peak_mib"],
        "peer_decoder": None if peer is None else peer["decoder"],
        "unit": "windows/s",
        "target": "ratio >= 2",
        "passed": None if ratio is None else ratio >= 2,
    }


def write_data(folder: Path) -> None:
    """Write the set."""
    from dipole.data import Episodes, Feature
    from dipole.data.formats import lerobot

    rng = np.random.default_rng(0)
    features = {key: Feature("video", (HEIGHT, WIDTH, 3)) for key in CAMERAS}
    features |= {"observation.state": Feature("float32", (7,)), "action": Feature("float32", (7,))}
    episodes = []
    for _ in range(EPISODES):
        episode = {key: _scene(rng) for key in CAMERAS}
        episode |= {key: rng.normal(size=(FRAMES, 7)).astype(np.float32) for key in ("observation.state", "action")}
        episodes.append(episode)
    lerobot.write(Episodes.from_list(episodes, features, FPS), folder, pictures="av1")


def _scene(rng: np.random.Generator) -> np.ndarray:
    """Return pictures of a textured table over which a disc and a bar move."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    table = 90 + 30 * np.sin(x / rng.uniform(5, 12)) * np.cos(y / rng.uniform(5, 12)) + rng.normal(0, 12, x.shape)
    frames = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    phase = rng.uniform(0, 6)
    for t in range(FRAMES):
        cx, cy = 80 + 60 * np.sin(t / 20 + phase), 60 + 40 * np.cos(t / 15 + phase)
        picture = np.stack([table, table * 0.9, table * 0.7], axis=-1)
        picture[(x - cx) ** 2 + (y - cy) ** 2 < 200] = (200, 60, 50)
        picture[np.abs((x - cx) * np.sin(t / 30) - (y - cy) * np.cos(t / 30)) < 3] = (60, 60, 70)
        frames[t] = np.clip(picture + rng.normal(0, 2, picture.shape), 0, 255)
    return frames


def peer_speed(python: str, words: list[str], folder: Path) -> dict[str, Any]:
    """Measure LeRobot's loader; FFmpeg's libraries inside its PyAV get the names by which torchcodec looks for them."""
    code = "import av, pathlib; print(pathlib.Path(av.__file__).parents[1] / 'av.libs')"
    libraries = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    links = folder / "libraries"
    links.mkdir()
    for library in libraries.glob("lib*.so.*"):
        found = re.fullmatch(r"(lib(?:av|sw)\w+)-\w+\.so\.(\d+)\..*", library.name)
        if found:
            (links / f"{found[1]}.so.{found[2]}").symlink_to(library)
    paths = [os.environ.get("LD_LIBRARY_PATH", ""), str(links), str(libraries)]
    return measured([python, str(PEER), *words], LD_LIBRARY_PATH=":".join(path for path in paths if path))


def measured(words: list[str], **variables: str) -> dict[str, Any]:
    """Run a loader in its own process; return its figures and the largest resident memory of it and its workers."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **quiet, **variables}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    out, err = process.communicate()
    watcher.join()
    if process.returncode != 0:
        raise RuntimeError(f"{words[1]} failed:\n{err[-2000:]}")
    return {**json.loads(out.strip().splitlines()[-1]), "peak_mib": peak[0] / 2**20}


def _watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    """Keep the largest resident memory (proportional for shared pages) of a process and its descendants."""
    import psutil

    while process.poll() is None:
        try:
            root = psutil.Process(process.pid)
            used = sum(p.memory_full_info().pss for p in [root, *root.children(recursive=True)])
            peak[0] = max(peak[0], used)
        except psutil.Error:
            pass  # one of them has just ended
        time.sleep(0.25)


def worker(data: Path, batch: int, workers: int, seconds: float) -> dict[str, float]:
    """Measure dipole's loader."""
    import psutil
    import torch

    from dipole.data import Streaming, Windows, load
    from dipole.training.batches import EpochOrder, Loader

    torch.zeros(1)
    before = psutil.Process().memory_info().rss
    episodes = load(data, stream=Streaming(workers=workers, cache_mb=0))
    windows = Windows(episodes, [*CAMERAS, "observation.state"], "action", TO, TP, TA)
    order = EpochOrder(len(windows), batch, seed=0)

    def as_floats(tensors: dict[str, torch.Tensor]) -> None:
        for key in CAMERAS:
            tensors[key].movedim(-1, -3).contiguous().float().div_(255)

    def speed(use: Callable[[dict[str, torch.Tensor]], None]) -> float:
        loader = Loader(windows, order, slice(0, batch), torch.device("cpu"), prefetch=2)
        done, begin = 0, None
        for tensors in loader:
            use(tensors)
            if begin is None:  # the first batch reads the indices of the files
                begin = time.perf_counter()
                continue
            done += batch
            if time.perf_counter() - begin > seconds:
                return done / (time.perf_counter() - begin)
        raise AssertionError("the loader is endless")

    torch.set_num_threads(1)
    plain = speed(lambda tensors: None)
    grown = _peak() - before
    return {"windows_per_s": speed(as_floats), "windows_per_s_uint8": plain, "grown_mib": grown / 2**20}


def _peak() -> int:
    """Return this process's largest resident memory; `ru_maxrss` would count that of the process that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("/proc/self/status does not tell VmHWM")
    return int(found[1]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--peer-python")
        parser.add_argument("--seconds", type=float, default=SECONDS)
        args = parser.parse_args()
        print(json.dumps(run(args.peer_python, args.seconds), indent=1))
