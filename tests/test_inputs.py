"""The folder of input images: what arrives, what is published, and what goes."""

import os

import pytest
import rows
from upstream import image_bytes

import images
import inputs
from inputs import InputFolder, InputGone, InputsUnreadable
from outputs import StorageError
from records import Image, NewTask

FOX = image_bytes()


@pytest.fixture
def folder(tmp_path):
    return InputFolder(tmp_path / "inputs")


def names(folder):
    return sorted(path.name for path in folder.path.iterdir())


def verifier():
    return images.Verifier(lambda path, outline: pytest.fail("a PNG is not decoded"))


@pytest.fixture
def fox(folder):
    """Return the facts of an image that was published."""
    with folder.arrival() as arrival:
        arrival.receive([FOX], verifier())
        folder.publish([arrival])
        return arrival.image


def test_what_arrives_is_hidden_and_goes_unless_it_is_published(folder):
    with folder.arrival() as arrival:
        arrival.receive([FOX[:9], FOX[9:]], verifier())
        assert (arrival.image.extension, arrival.image.bytes) == ("png", len(FOX))
        assert names(folder) == [arrival.path.name]
        assert arrival.path.name.startswith(".")
    assert names(folder) == []


def test_what_is_published_is_on_disk_with_its_name(folder, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real, **v: done.append(n) or r(*a, **v))
    with folder.arrival() as arrival:
        arrival.receive([FOX], verifier())
        assert done == ["fsync"]
        folder.publish([arrival])
    assert done == ["fsync", "replace", "fsync"]
    with folder.open(arrival.image) as file:
        assert file.read() == FOX


def test_the_name_comes_before_the_row(tmp_path):
    database, connections = rows.open_watched(tmp_path / "tasks.sqlite3")
    image = Image("image/png", "png", 1, 1, 1, "0" * 64)
    with rows.traced(connections) as statements:
        task = NewTask("t", "p", "m", {}, inputs=(image,))
        database.add([task], 0.0, publish=lambda: statements.append("published"))
    kinds = [sql.split("(")[0].strip() for sql in statements]
    published = kinds.index("published")
    assert kinds.index("BEGIN IMMEDIATE") < published < kinds.index("INSERT INTO tasks")
    assert kinds.index("INSERT INTO tasks") < kinds.index("COMMIT")
    assert database.get("t").inputs == (image,)
    database.close()


def test_nothing_is_published_for_a_task_without_inputs(database):
    database.add([NewTask("t", "p", "m", {})], 0.0, publish=lambda: pytest.fail("for nothing"))
    assert database.get("t").inputs == ()


def test_of_the_same_bytes_the_first_file_stays(folder, fox):
    before = folder.path_of(fox).stat()
    with folder.arrival() as arrival:
        arrival.receive([FOX], verifier())
        folder.publish([arrival])
    assert folder.path_of(fox).stat() == before
    assert names(folder) == [folder.path_of(fox).name]


def test_a_file_that_is_gone_or_cut_short_is_told_from_a_folder_that_is(folder, fox):
    path = folder.path_of(fox)
    path.write_bytes(FOX[1:])
    with pytest.raises(InputGone, match=path.name):
        folder.open(fox)
    path.unlink()
    with pytest.raises(InputGone, match=path.name):
        folder.open(fox)
    folder.path.rmdir()
    with pytest.raises(InputsUnreadable, match="No such file or directory"):
        folder.open(fox)
    folder.path.write_text("a file")
    with pytest.raises(InputsUnreadable, match="Not a directory"):
        folder.open(fox)
    with pytest.raises(StorageError, match="Not a directory"):
        folder.arrival()


def test_a_sweep_removes_what_nobody_receives_any_more(folder):
    folder.make()
    abandoned = folder.path / f".{'0' * 32}.upload"
    abandoned.write_bytes(FOX)
    (folder.path / ".hidden").write_text("of the user's own")
    with folder.arrival() as arrival:
        folder.remove_abandoned()
        assert names(folder) == sorted([".hidden", arrival.path.name])


def test_an_arrival_that_a_sweep_took_is_made_anew(folder, monkeypatch):
    real, taken = inputs.fcntl.flock, []

    def sweep_first(file, how):
        if not taken:
            taken.append(file.name)
            folder.remove_abandoned()
        real(file, how)

    monkeypatch.setattr(inputs.fcntl, "flock", sweep_first)
    with folder.arrival() as arrival:
        assert len(taken) == 1
        assert names(folder) == [arrival.path.name]


# Which files go is decided by the rows


IMAGE = Image("image/png", "png", 1, 1, 1, "a" * 64)
NAME = f"{'a' * 64}.png"


def add(database, *ids):
    database.add([NewTask(task_id, "p", "m", {}, inputs=(IMAGE,)) for task_id in ids], 0.0)


def test_a_deleted_task_leaves_a_note_of_its_inputs(database):
    add(database, "first", "second")
    assert database.unused_inputs() == []
    database.delete("first", 0.0)
    assert database.unused_inputs() == [NAME]
    removed = []
    database.remove_inputs([NAME], removed.append)
    assert (removed, database.unused_inputs()) == ([], [])
    database.delete("second", 0.0)
    database.remove_inputs(database.unused_inputs(), removed.append)
    assert (removed, database.unused_inputs()) == ([NAME], [])


def test_a_file_that_cannot_be_removed_keeps_its_note(database):
    add(database, "t")
    database.delete("t", 0.0)

    def fail(name):
        raise OSError("read-only")

    with pytest.raises(OSError, match="read-only"):
        database.remove_inputs([NAME], fail)
    assert database.unused_inputs() == [NAME]
