"""The folder of images: names that are on disk, or taken back, and what is wrong with it."""

import errno
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


def test_a_folder_is_checked_by_a_file_of_that_size_on_disk(tmp_path, monkeypatch):
    folder, synced, sync = outputs.Folder(tmp_path / "not yet"), [], os.fsync
    monkeypatch.setattr("os.fsync", lambda file: synced.append(os.fstat(file)) or sync(file))
    folder.check(100_000)
    (found,) = synced
    assert (found.st_size, found.st_nlink) == (100_000, 0)
    assert found.st_blocks * 512 >= 100_000
    assert list((tmp_path / "not yet").iterdir()) == []


FAULTS = {
    errno.ENOSPC: ("no_room", "There is no room on the disk for the image"),
    errno.EDQUOT: ("no_room", "There is no room on the disk for the image"),
    errno.EIO: ("storage", "The images cannot be written to {} (Input/output error)"),
    errno.EROFS: ("storage", "The images cannot be written to {} (Read-only file system)"),
}


@pytest.mark.parametrize("number", FAULTS)
def test_what_is_wrong_with_a_folder_is_told(tmp_path, monkeypatch, number):
    code, words = FAULTS[number]
    fault = OSError(number, os.strerror(number))
    monkeypatch.setattr("os.fsync", lambda file: raising(fault))
    with pytest.raises(outputs.StorageError) as caught:
        outputs.Folder(tmp_path).check()
    assert (caught.value.code, str(caught.value)) == (code, words.format(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_no_folder(tmp_path):
    folder = outputs.Folder(tmp_path / "outputs")
    (tmp_path / "outputs").write_text("in the way")
    with pytest.raises(outputs.StorageError, match="Not a directory"):
        folder.check()


def test_a_folder_that_was_deleted_is_made_anew(tmp_path):
    folder = outputs.Folder(tmp_path / "a" / "b")
    folder.check()
    (tmp_path / "a" / "b").rmdir()
    (tmp_path / "a").rmdir()
    folder.check()
    assert (tmp_path / "a" / "b").is_dir()


def test_a_folder_that_cannot_be_looked_at_is_not_taken_for_a_full_one(configure, monkeypatch):
    config = configure(MIN_FREE_MB=1)
    assert not outputs.is_low_on_disk(config)
    monkeypatch.setattr("shutil.disk_usage", lambda path: raising(OSError(errno.EIO, "fault")))
    assert not outputs.is_low_on_disk(config)


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
