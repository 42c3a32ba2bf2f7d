"""The folder of images: names that are on disk, or taken back, and room that is found by trying."""

import os
from pathlib import Path

import pytest
from upstream import image_bytes

import outputs


def saved(path, data):
    path.write_bytes(data)
    return path


def test_the_new_name_is_put_on_disk(tmp_path, monkeypatch):
    synced = []
    sync = os.fsync

    def watched(file):
        synced.append(Path(f"/proc/self/fd/{file}").readlink())
        sync(file)

    monkeypatch.setattr("outputs.os.fsync", watched)
    outputs.publish(saved(tmp_path / ".t.part", image_bytes()), tmp_path / "t", "png")
    assert synced == [tmp_path]


def test_room_is_found_by_trying(tmp_path, monkeypatch):
    folder = tmp_path / "not yet"
    assert outputs.has_room(folder, 10_000)
    assert list(folder.iterdir()) == []
    for number, found in ((28, False), (122, False), (5, True)):
        error = OSError(number, "fault")
        monkeypatch.setattr("outputs.os.posix_fallocate", lambda *args: raising(error))  # noqa: B023
        assert outputs.has_room(folder, 10_000) is found
        assert list(folder.iterdir()) == []


def raising(error):
    raise error


def test_a_whole_image_gets_its_final_name(tmp_path):
    part = saved(tmp_path / ".t.part", image_bytes("WEBP"))
    path = outputs.publish(part, tmp_path / "t", "webp")
    assert path == tmp_path / "t.webp"
    assert [file.name for file in tmp_path.iterdir()] == ["t.webp"]
    assert path.read_bytes() == image_bytes("WEBP")


def test_a_name_that_is_not_on_disk_is_taken_back(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(outputs, "sync_folder", fail)
    with pytest.raises(OSError, match="Input/output"):
        outputs.publish(saved(tmp_path / ".t.part", image_bytes()), tmp_path / "t", "png")
    assert list(tmp_path.iterdir()) == []
