"""Datasets from one format to another: everything that `dipole.data.load` reads, to LeRobot v3.0 or v2.1, or Minari.

Between LeRobot versions files are copied, see `dipole.data.formats.lerobot_convert`. A LeRobotDataset made from a
Minari dataset keeps what the format has no place for (last observations, seeds, options, spaces, metadata) in
`meta/minari/`, which other programs ignore; converting it back gives the same Minari dataset.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from dipole.data import hub
from dipole.data.episodes import Episodes
from dipole.data.loading import detect, load
from dipole.errors import DipoleError, unknown

Target = Literal["lerobot-v3", "lerobot-v2.1", "minari"]
TARGETS = ("lerobot-v3", "lerobot-v2.1", "minari")
SIDE_FOLDER = Path("meta") / "minari"


def convert_dataset(
    source: str | Path,
    out: str | Path,
    to: Target = "lerobot-v3",
    pictures: Literal["png", "h264", "av1"] = "png",
    filter_key: str | None = None,
    dataset_id: str | None = None,
) -> dict[str, Any]:
    """Convert a dataset.

    Args:
        source: A path, or `organisation/name[@revision]` on the Hugging Face Hub.
        out: Folder to write; must not exist, or be empty.
        to: Format to write.
        pictures: How LeRobot sets store pictures that were not stored as video: `png` is lossless.
        filter_key: Mask of a robomimic file; None takes all demonstrations.
        dataset_id: Name of a Minari dataset; None takes the old one, or the name of the folder.

    Returns:
        What was done: `format` (of the source), `episodes`, `frames`, and `notes`, sentences about losses.

    Raises:
        DipoleError: The source is damaged or unknown, or `out` is taken.
    """
    if to not in TARGETS:
        raise unknown("format to write", to, TARGETS)
    path, out = hub.resolve(source), Path(out)
    found = detect(path)
    if filter_key is not None and found != "robomimic":
        raise DipoleError(f"{path} is a {found} dataset: filter keys are robomimic's, leave the option out")
    if found == "lerobot" and to != "minari":
        return {"format": found, **_between_lerobot(path, out, to)}
    episodes, extras = _read(path, found, filter_key)
    notes: list[str] = []
    if to == "minari":
        _write_minari(episodes, extras, out, dataset_id, notes)
    else:
        _write_lerobot(episodes, extras, out, to, pictures, notes)
    return {"format": found, "episodes": episodes.num_episodes, "frames": episodes.num_frames, "notes": notes}


def _read(path: Path, found: str, filter_key: str | None) -> tuple[Episodes, Any]:
    """Return the episodes, and the Minari extras where there are some."""
    if found == "minari":
        from dipole.data.formats import minari

        return minari.read_with_extras(path)
    if found == "robomimic":
        from dipole.data.formats import robomimic

        return robomimic.read(path, filter_key=filter_key), None
    if found == "lerobot" and (path / SIDE_FOLDER).is_dir():
        from dipole.data.formats.minari_extras import MinariExtras

        return load(path), MinariExtras.load(path / SIDE_FOLDER)
    return load(path), None


def _between_lerobot(path: Path, out: Path, to: str) -> dict[str, Any]:
    from dipole.data.formats import lerobot_convert, lerobot_v3_convert, lerobot_v21_write

    change = lerobot_v3_convert.to_v3 if to == "lerobot-v3" else lerobot_v21_write.from_v3
    report = change(path, out)
    notes = []
    if report.videos_encoded:
        some = "; ".join(report.videos_encoded[:3])
        notes.append(f"{len(report.videos_encoded)} videos were encoded again, with a small loss ({some} ...)")
    if report.stats_computed:
        notes.append("the source had no statistics per episode: they were computed")
    frames = sum(entry.length for entry in lerobot_convert.open_source(out).layout.entries)
    return {"episodes": report.episodes, "frames": frames, "videos_copied": report.videos_copied, "notes": notes}


def _write_lerobot(episodes: Episodes, extras: Any, out: Path, to: str, pictures: Any, notes: list[str]) -> None:
    from dipole.data.formats import lerobot_v21_write, lerobot_write
    from dipole.data.formats.files import atomic_folder

    write = lerobot_write.write if to == "lerobot-v3" else lerobot_v21_write.write
    with atomic_folder(out) as work:
        write(episodes, work, pictures)
        if extras is not None:
            extras.save(work / SIDE_FOLDER)
    if pictures != "png" and any(feature.is_image for feature in episodes.features.values()):
        notes.append(f"pictures were encoded as {pictures} video, with a small loss: --pictures png keeps them exact")


def _write_minari(episodes: Episodes, extras: Any, out: Path, dataset_id: str | None, notes: list[str]) -> None:
    from dipole.data.formats import minari_write

    minari_write.write(episodes, out, extras, dataset_id)
    if extras is None:
        notes.append("Minari stores one observation more than there are actions: the last one was repeated")
        kept = ("observation.", "action", "info.", "next.", "task_index")
        left = [key for key in episodes.features if not key.startswith(kept)]
        if left:
            notes.append(f"Minari has no place for {', '.join(left)}: left out")
        if len(episodes.tasks) > 1:
            notes.append("Minari has no place for tasks: left out")
