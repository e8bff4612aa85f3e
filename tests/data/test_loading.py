"""`load`, the names of datasets, and atomic writing."""

import numpy as np
import pytest
from data_helpers import FIXTURES, make_episodes

from dipole.data import hub, load
from dipole.data.formats import files, lerobot
from dipole.data.loading import FORMATS, detect
from dipole.errors import DipoleError
from refusals import assert_refused


def make(path, *files):
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("files", "target", "name"),
    [
        (["meta/info.json"], ".", "lerobot"),
        (["data/metadata.json", "data/main_data.hdf5"], ".", "minari"),
        (["metadata.json"], ".", "minari"),
        ([".zgroup"], ".", "zarr_replay"),
        (["a.zarr.zip"], "a.zarr.zip", "zarr_replay"),
        (["a.npz"], "a.npz", "npz"),
        (["train.npz"], ".", "npz"),
        (["low_dim.hdf5"], "low_dim.hdf5", "robomimic"),
    ],
)
def test_formats_are_told_apart(files, target, name, tmp_path):
    assert detect(make(tmp_path, *files) / target) == name
    assert name in FORMATS


def test_an_unknown_folder_is_refused_with_a_hint(tmp_path):
    make(tmp_path, "cube/meta/info.json", "readme.txt")
    with pytest.raises(DipoleError, match=r"no dataset that dipole knows: expected .*one of its folders \(cube\)"):
        load(tmp_path)
    with pytest.raises(DipoleError, match=r"readme.txt is no dataset"):
        load(tmp_path / "readme.txt")


def test_episodes_keys_and_images_in_any_format(tmp_path):
    data = make_episodes((3, 4, 5), cameras=["top"])
    lerobot.write(data, tmp_path / "lerobot")
    names = {"observation.state": "state", "action": "action", "observation.images.top": "top"}
    np.savez(tmp_path / "a.npz", episode_ends=data.ends, **{new: data.columns[old] for old, new in names.items()})
    for path in (tmp_path / "lerobot", tmp_path / "a.npz"):
        if path.suffix == "":
            pytest.importorskip("av")
        assert load(path).num_frames == 12
        part = load(path, episodes=[2, 0], keys=["action", "observation.state"])
        assert list(part.features) == ["action", "observation.state"]
        np.testing.assert_array_equal(part.columns["action"], data.select([2, 0]).columns["action"])
        assert list(load(path, keys=["action"]).columns) == ["action"]
        assert "observation.images.top" not in load(path, images=False).features
        with pytest.raises(DipoleError, match="no .*'observation.force'"):
            load(path, keys=["observation.force"])
        with pytest.raises(DipoleError, match="no episode 3"):
            load(path, episodes=[3])


def test_a_local_folder_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "snapshot_download", None)  # a call would fail
    monkeypatch.chdir(tmp_path)
    lerobot.write(make_episodes((3,)), tmp_path / "org" / "name")
    assert load("org/name").num_frames == 3
    assert hub.resolve("org/name", "model").samefile(tmp_path / "org/name")


def test_a_name_is_downloaded(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo, **options):
        asked.append((repo, options))
        return str(FIXTURES / "lerobot_dataset_v3")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load("org/name@v3.0", images=False).num_frames == 33
    hub.resolve("org/other-model", "model")
    assert asked == [
        ("org/name", {"repo_type": "dataset", "revision": "v3.0", "ignore_patterns": ["videos/*", "*.mp4"]}),
        ("org/other-model", {"repo_type": "model", "revision": None, "ignore_patterns": None}),
    ]


def test_a_failing_network_gives_one_line(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def download(*_, **__):
        raise ConnectionError("Max retries exceeded\nwith url: (Caused by ...)\n" + "x" * 900)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with assert_refused("no local path org/name, and the dataset 'org/name' could not") as caught:
        load("org/name")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "../up/there", "/no/such/path", "org/na me", "org/name@", ""])
def test_what_is_no_name_never_reaches_the_network(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(DipoleError, match=r"there is no |is no dataset"):
        load(name)


def test_a_missing_package_names_its_extra(monkeypatch, tmp_path):
    import sys

    from dipole.errors import MissingExtraError

    for package, call, extra in (
        ("av", lambda: lerobot.read(FIXTURES / "lerobot_dataset_v3"), "data"),
        ("zarr", lambda: load(FIXTURES / "replay_buffer.zarr"), "data"),
        ("huggingface_hub", lambda: load("org/name"), "hub"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtraError, match=rf"'{package}' is not installed: .*dipole\[{extra}\]"):
            call()


def test_an_interrupted_write_leaves_the_old_folder(tmp_path):
    make(tmp_path / "out", "old.txt")

    def interrupted():
        with files.atomic_folder(tmp_path / "out", overwrite=True) as work:
            (work / "new.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old.txt"]


def test_templates_take_nothing_but_numbers_and_names():
    assert files.fill("a/{k}-{n:03d}/{n}.x", k="obs.top", n=7) == "a/obs.top-007/7.x"
    for template in ("{n!r}", "{n.real}", "{n:>9}", "{}", "{n", "{n:0999999d}"):
        with pytest.raises(DipoleError, match="template"):
            files.fill(template, n=7)
