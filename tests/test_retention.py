"""RETENTION_DAYS, and what deleted tasks leave behind: what is removed, when and by whom."""

import uuid
from datetime import UTC, datetime
from pathlib import Path

import edits
import pytest
import rows
from conftest import Clock, wait_until
from upstream import local_models

from doorbell import Doorbell
from images import inspect
from records import Image, NewTask


@pytest.fixture
def clock():
    return Clock(datetime(2026, 5, 1, tzinfo=UTC).timestamp())


def turn(q, seconds):
    """Turn the clock, once, and wait until all that is removed then has been.

    The last to go is the call of a task that is no longer there.
    """
    rows.insert(q.db.path, "calls", [{"task": "gone", "number": 1, "started": 0.5}])
    q.clock.now += seconds
    q.start()
    wait_until(lambda: not q.db.calls("gone"))


def test_what_ended_long_ago_is_removed_with_its_files(make, clock):
    q = make(clock, RETENTION_DAYS=30).start()
    old = [q.until(q.add(f"p{n}"), status="completed") for n in range(12)]
    thumbnails = q.config.output_dir / "thumbnails"
    thumbnails.mkdir()
    (thumbnails / f"{old[0].id}.webp").write_bytes(b"small")
    clock.now += 29 * 86400
    young = q.until(q.add(), status="completed")
    clock.now += 2 * 86400
    wait_until(lambda: not any(q.task(task.id) for task in old))
    wait_until(lambda: q.db.pending_deletions() == [])
    assert q.task(young.id)
    assert q.files() == sorted([Path(young.file_path).name, "thumbnails"])
    assert list(thumbnails.iterdir()) == []
    assert q.outcomes() == ["completed"]


def test_an_input_goes_with_the_last_task_that_is_removed(make, clock):
    q = make(clock, RETENTION_DAYS=30).start()
    folder, names = q.config.input_dir, []
    folder.mkdir(exist_ok=True)
    for number in range(2):
        image = Image("image/png", "png", 1, 1, 1, str(number) * 64)
        names.append(f"{image.sha256}.png")
        (folder / names[-1]).write_bytes(b"x")
        ids = ("a", "b")[: number + 1]
        q.db.add([NewTask(f"{i}{number}", "p", "m", {}, inputs=(image,)) for i in ids], q.clock())
    q.worker.wake()
    for task_id in ("a0", "a1", "b1"):
        q.until(task_id, status="failed")
    rows.write(q.db.path, "UPDATE tasks SET finished_at = '2099-01-01 00:00:00' WHERE id = 'b1'")
    clock.now += 31 * 86400
    wait_until(lambda: not q.task("a0") and not q.task("a1"))
    wait_until(lambda: q.db.unused_inputs() == [])
    assert [path.name for path in folder.iterdir()] == names[1:]


def test_an_input_that_could_not_be_removed_is_tried_again(make, clock):
    q = make(clock)
    image = Image("image/png", "png", 1, 1, 1, "0" * 64)
    q.db.add([NewTask("t", "p", "m", {}, inputs=(image,))], clock())
    folder = q.config.input_dir
    (folder / f"{image.sha256}.png").mkdir(parents=True)  # No unlink removes a folder.
    assert q.worker.delete(q.task("t"))
    (folder / f"{image.sha256}.png").rmdir()
    turn(q, 1)
    assert q.db.unused_inputs() == []


def test_what_ended_is_kept_to_the_second(make, clock):
    q = make(clock, RETENTION_DAYS=1).start()
    task = q.until(q.add(), status="completed")
    turn(q, 86400)
    assert q.task(task.id)
    clock.now += 60
    wait_until(lambda: q.task(task.id) is None)


def test_calls_of_a_deleted_task_go_when_no_limit_needs_them(make, clock):
    q = make(clock, RATE_LIMIT="9/100000").start()
    task, kept = (q.until(q.add(), status="completed") for _ in range(2))
    assert q.worker.delete(task)
    turn(q, 99_000)
    assert len(q.outcomes()) == 2, "the next day, but in the window of the rate limit"
    clock.now += 2_000
    wait_until(lambda: len(q.outcomes()) == 1)
    assert q.db.calls(kept.id)
    q.worker.delete(kept)
    assert q.outcomes() == []


def test_calls_that_were_left_behind_go_in_steps(make, clock):
    q = make(clock)
    started = ((f"t{n}", 1000.0 + n // 700) for n in range(2000))
    calls = ({"task": task, "number": 1, "started": then} for task, then in started)
    rows.insert(q.db.path, "calls", calls)
    q.start()
    wait_until(lambda: q.outcomes() == [])


def test_a_death_while_files_are_removed_leaves_none(make, clock):
    q = make(clock, RETENTION_DAYS=1).start()
    task = q.until(q.add(), status="completed")
    q.worker.stop()
    assert [old.id for old in q.db.purge(clock.now + 1, 5, clock.now)] == [task.id]
    assert q.task(task.id) is None and q.files()
    again = make(clock, RETENTION_DAYS=1).start()
    wait_until(lambda: again.db.pending_deletions() == [])
    assert again.files() == []


def test_removals_that_fail_do_not_stop_the_others(make, clock):
    q = make(clock).start()
    q.until(q.add(), status="completed")
    stuck = [f"stuck-{n}" for n in range(20)]
    for name in stuck:
        (q.config.output_dir / f"{name}.png" / "below").mkdir(parents=True)
    rows.insert(q.db.path, "removals", ({"id": name} for name in [*stuck, "last"]))

    def is_gone_in_a_minute():
        clock.now += 61
        return "last" not in dict(q.db.pending_deletions())

    wait_until(is_gone_in_a_minute)
    assert set(dict(q.db.pending_deletions())) == set(stuck)


def test_what_waits_is_not_removed_however_old(make, clock):
    q = make(clock, RETENTION_DAYS=1, TASK_TTL=0)
    q.db.pause()
    task_id = q.add()
    turn(q, 50 * 86400)
    assert q.task(task_id).status == "pending"


def test_without_retention_all_is_kept(make, clock):
    q = make(clock).start()
    task = q.until(q.add(), status="completed")
    clock.now += 10_000 * 86400
    q.until(q.add(), status="completed")
    assert q.task(task.id)


def test_a_large_clearing_does_not_stop_the_queue(make, clock):
    q = make(clock, RETENTION_DAYS=1)
    old = {"status": "failed", "finished_at": "2026-01-01 00:00:00"}
    rows.insert(q.db.path, "tasks", (rows.task(f"t{n}", **old) for n in range(3000)))
    task_id = q.add()
    q.start()
    q.until(task_id, status="completed")
    assert sum(q.db.stats().tasks.values()) > 1000, "the new task did not wait for the old ones"


def test_a_large_clearing_lets_others_write_and_looks_at_the_disk_once(make, clock, monkeypatch):
    looks, pauses, wait = [], [], Doorbell.wait
    monkeypatch.setattr("outputs.is_low_on_disk", lambda config: looks.append(config))
    monkeypatch.setattr(
        Doorbell, "wait", lambda bell, seconds: pauses.append(seconds) or wait(bell, seconds)
    )
    q = make(clock, RETENTION_DAYS=1)
    old = {"status": "failed", "finished_at": "2026-01-01 00:00:00"}
    rows.insert(q.db.path, "tasks", (rows.task(f"t{n}", **old) for n in range(100)))
    q.start()
    wait_until(lambda: sum(q.db.stats().tasks.values()) == 0)
    assert len(pauses) > 10 and min(pauses) > 0, "there are twenty steps"
    assert len(looks) == 1, "the clock stands"


def test_files_that_a_dead_process_left_behind_are_removed(make):
    q = make().start()
    task = q.until(q.add(), status="completed")
    q.db.delete(task.id, 0)
    q.clock.now += 61
    wait_until(lambda: q.db.pending_deletions() == [])
    assert q.files() == []


def add_edit(q, picture):
    """Add a task that edits a picture, whose file is there, and return its id."""
    path = q.config.input_dir / edits.name(picture)
    path.write_bytes(picture)
    task = NewTask(str(uuid.uuid4()), "p", "qwen-image-edit-2511", {}, inputs=(inspect(path),))
    q.db.add([task], q.clock())
    q.worker.wake()
    return task.id


def inputs(q):
    return sorted(path.name for path in q.config.input_dir.iterdir())


def test_inputs_go_with_the_last_task_that_has_them(make, clock, upstream, tmp_path):
    models = tmp_path / "local-models.toml"
    models.write_text(local_models(upstream.url))
    q = make(clock, RETENTION_DAYS=30, MODELS_FILE=models).start()
    own, shared = edits.png(1), edits.png(2)
    old = [q.until(add_edit(q, picture), status="completed") for picture in (own, shared)]
    clock.now += 29 * 86400
    assert q.db.retry(old[1].id, "again", clock.now, 100, lambda model: None)
    q.worker.wake()
    q.until("again", status="completed")
    clock.now += 2 * 86400
    wait_until(lambda: not any(q.task(task.id) for task in old))
    wait_until(lambda: q.db.unused_inputs() == [])
    assert inputs(q) == [edits.name(shared)]
    clock.now += 30 * 86400
    wait_until(lambda: inputs(q) == [])
    assert [edits.sent(fields) for fields in upstream.calls] == [[own], [shared], [shared]]


def test_inputs_that_could_not_be_removed_at_the_start_go_later(make):
    q = make()
    names = [edits.name(edits.png(n)) for n in range(3)]
    for name in names:
        (q.config.input_dir / name / "in the way").mkdir(parents=True)
    q.start()
    wait_until(lambda: q.db.unused_inputs() and set(q.db.unused_inputs()) == set(names))
    for name in names:
        (q.config.input_dir / name / "in the way").rmdir()
        (q.config.input_dir / name).rmdir()
        (q.config.input_dir / name).touch()

    def are_gone_in_a_minute():
        q.clock.now += 61
        return inputs(q) == []

    wait_until(are_gone_in_a_minute)
    assert q.db.unused_inputs() == []
