"""Output is complete under its final name, or not there."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from t3 import files
from t3.errors import T3Error


@pytest.fixture
def place(tmp_path):
    return tmp_path / "Ünï code 影" / "deep"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_check_makes_the_folder_and_leaves_no_probe(place):
    final = files.check_output(place / "clip.mp4")
    assert final == place / "clip.mp4" and final.is_absolute()
    assert names(place) == []


def test_check_refuses_what_exists_and_leaves_it(place):
    place.mkdir(parents=True)
    (place / "clip.mp4").write_bytes(b"old")
    (place / "clip-2.mp4").write_bytes(b"older")
    with pytest.raises(T3Error, match=r"clip\.mp4 exists.*clip-3\.mp4"):
        files.check_output(place / "clip.mp4")
    assert files.check_output(place / "clip.mp4", overwrite=True) == place / "clip.mp4"
    assert (place / "clip.mp4").read_bytes() == b"old"


@pytest.mark.parametrize("overwrite", [False, True])
def test_check_refuses_a_folder_as_a_file(place, overwrite):
    place.mkdir(parents=True)
    with pytest.raises(T3Error, match="is a folder"):
        files.check_output(place, overwrite)


def test_check_refuses_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "clip.mp4", tmp_path / "file" / "deeper" / "clip.mp4"):
        with pytest.raises(T3Error, match=r"clip\.mp4 cannot be"):
            files.check_output(path)
        with pytest.raises(T3Error, match=r"clip\.mp4 cannot be"):
            files.check_output_folder(path)


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid"), reason="permission bits of POSIX")
def test_check_refuses_a_read_only_folder(tmp_path, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir()
    if os.geteuid() == 0:  # root may write anywhere: let the attempt itself fail
        monkeypatch.setattr(
            Path, "touch", lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
        )
    else:
        folder.chmod(0o500)
    with pytest.raises(T3Error, match="Permission denied"):
        files.check_output(folder / "clip.mp4")


@pytest.mark.parametrize("name", ["", "/", ".."])
def test_check_refuses_no_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(T3Error):
        files.check_output(name)


@pytest.mark.parametrize("name", ["a" * 300 + ".mp4", "nul\0byte.mp4"])
def test_check_refuses_impossible_names(name, tmp_path):
    with pytest.raises(T3Error, match="cannot be"):
        files.check_output(tmp_path / name)
    with pytest.raises(T3Error, match="cannot be"):
        files.check_output_folder(tmp_path / name)


def test_check_names_needed_and_free_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(0, 0, 3 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(T3Error, match=r"5\.0 GiB.*3\.0 GiB are free.*Free 2\.0 GiB"):
        files.check_output(tmp_path / "a", need_bytes=5 * 2**30)
    files.check_output(tmp_path / "a", need_bytes=3 * 2**30)


def test_atomic_path(place):
    place.mkdir(parents=True)
    final = place / "clip.mp4"
    with files.atomic_path(final) as temp:
        assert temp.parent == place and temp.suffix == ".mp4" and temp.name.startswith(".clip.partial-")
        assert not temp.exists()
        temp.write_bytes(b"new")
        assert not final.exists()
    assert final.read_bytes() == b"new" and names(place) == ["clip.mp4"]


@pytest.mark.skipif(os.name == "nt", reason="no permission bits")
def test_files_made_for_their_owner_alone_are_readable_as_others(place):
    """safetensors makes them so; other programs and machines are to read what was written here."""
    place.parent.mkdir()
    before = os.umask(0o027)
    try:
        with files.atomic_path(place) as temp:
            temp.write_text("x")
            temp.chmod(0o600)
        with files.atomic_folder(place.parent / "frames") as folder:
            (folder / "a").write_text("x")
            (folder / "a").chmod(0o600)
    finally:
        os.umask(before)
    assert place.stat().st_mode & 0o777 == 0o640
    assert (place.parent / "frames" / "a").stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in (place.parent / "frames").iterdir()) == ["a"]


def test_atomic_path_of_a_long_name(tmp_path):
    name = "影" * 80 + ".mp4"
    with files.atomic_path(tmp_path / name) as temp:
        temp.write_bytes(b"new")
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_atomic_path_removes_the_file_on_any_exception(tmp_path, error, overwrite):
    if overwrite:
        (tmp_path / "clip.mp4").write_bytes(b"old")
    with pytest.raises(error), files.atomic_path(tmp_path / "clip.mp4", overwrite) as temp:
        temp.write_bytes(b"half")
        raise error
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([b"old"] if overwrite else [])


def test_atomic_path_overwrites_only_when_told(tmp_path):
    final = tmp_path / "clip.mp4"
    final.write_bytes(b"old")
    with files.atomic_path(final, overwrite=True) as temp:
        temp.write_bytes(b"new")
    assert final.read_bytes() == b"new" and names(tmp_path) == ["clip.mp4"]


@pytest.mark.parametrize("links", [True, False])
def test_lost_race_overwrites_nothing_and_keeps_the_work(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *a, **k: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    final = tmp_path / "clip.mp4"
    (tmp_path / "clip-2.mp4").write_bytes(b"another")
    with (
        pytest.raises(T3Error, match=r"clip\.mp4 could not be put in place.*kept as .*clip-3\.mp4"),
        files.atomic_path(final) as temp,
    ):
        temp.write_bytes(b"mine")
        final.write_bytes(b"theirs")
    contents = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    assert contents == {"clip.mp4": b"theirs", "clip-2.mp4": b"another", "clip-3.mp4": b"mine"}


def test_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *a, **k: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    with files.atomic_path(tmp_path / "clip.mp4") as temp:
        temp.write_bytes(b"new")
    assert names(tmp_path) == ["clip.mp4"]


def test_failed_flush_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(T3Error, match="No space left"), files.atomic_path(tmp_path / "clip.mp4") as temp:
        temp.write_bytes(b"new")
    assert names(tmp_path) == []


def test_atomic_folder(place):
    place.parent.mkdir()
    with files.atomic_folder(place) as temp:
        (temp / "frame_0.png").write_bytes(b"0")
        assert not place.exists() and temp.parent == place.parent
    assert names(place) == ["frame_0.png"] and names(place.parent) == [place.name]


def test_atomic_folder_takes_an_empty_folder(place):
    place.mkdir(parents=True)
    files.check_output_folder(place)
    with files.atomic_folder(place) as temp:
        (temp / "frame_0.png").write_bytes(b"0")
    assert names(place) == ["frame_0.png"] and names(place.parent) == [place.name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_folder_removes_itself_on_any_exception(place, error):
    place.mkdir(parents=True)
    (place / "frame_0.png").write_bytes(b"old")
    with pytest.raises(error), files.atomic_folder(place, overwrite=True) as temp:
        (temp / "frame_0.png").write_bytes(b"half")
        raise error
    assert names(place.parent) == [place.name] and (place / "frame_0.png").read_bytes() == b"old"


def test_folder_is_replaced_as_a_whole_and_only_if_ours(place):
    place.mkdir(parents=True)
    for number in range(3):
        (place / f"frame_{number}.png").write_bytes(b"old")
    with pytest.raises(T3Error, match="exists already"):
        files.check_output_folder(place)
    files.check_output_folder(place, True, ours=["frame_*.png"])
    with files.atomic_folder(place, True, ["frame_*.png"]) as temp:
        (temp / "frame_0.png").write_bytes(b"new")
    assert names(place) == ["frame_0.png"] and names(place.parent) == [place.name]

    (place / "taxes.txt").write_bytes(b"")
    with pytest.raises(T3Error, match=r"taxes\.txt"):
        files.check_output_folder(place, True, ours=["frame_*.png"])


def test_folder_that_filled_up_meanwhile_is_left_and_the_work_kept(place):
    place.parent.mkdir()
    with pytest.raises(T3Error, match="kept as .*deep-2"), files.atomic_folder(place) as temp:
        (temp / "frame_0.png").write_bytes(b"mine")
        place.mkdir()
        (place / "frame_0.png").write_bytes(b"theirs")
    assert (place / "frame_0.png").read_bytes() == b"theirs"
    assert (place.parent / "deep-2" / "frame_0.png").read_bytes() == b"mine"
    assert names(place.parent) == ["deep", "deep-2"]


def test_folder_check_refuses_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(T3Error, match="no folder"):
        files.check_output_folder(tmp_path / "file", overwrite=True)
