"""A database of an older version is brought to today's: whole, once, and whatever is killed."""

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import wait_until
from rows import check_words, open_watched, steps_taken

import db
from db import Database, DatabaseError
from records import Ending, NewTask

ROOT = Path(__file__).resolve().parent.parent
NOW = 1_790_000_000.0
OPEN = "import sys; from pathlib import Path; from db import Database; Database(Path(sys.argv[1]))"


def version_1(path, tasks):
    """Make a database as the first version did, with tasks of every kind."""
    script = (ROOT / "schema.sql").read_text().split("\n-- version ")[1].partition("\n")[2]
    connection = sqlite3.connect(path)
    connection.executescript(f"PRAGMA journal_mode = WAL; {script} PRAGMA user_version = 1;")
    kinds = [("pending", None), ("completed", None), ("failed", "expired"), ("failed", "canceled")]
    connection.executemany(
        """INSERT INTO tasks (id, prompt, model, params, priority, status, error_code,
                              created_at, updated_at)
           VALUES (?, 'a fox', 'm', '{"seed": 7}', 0, ?, ?, '2026-01-01 00:00:00', '')""",
        ((f"t{n}", *kinds[n % 4]) for n in range(tasks)),
    )
    connection.execute("INSERT INTO holds VALUES ('m', 'busy', 9, 5, 0, NULL)")
    connection.commit()
    connection.close()


def rows(path, sql):
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "tasks.sqlite3"
    version_1(path, 100)
    return path


def is_today(path):
    return rows(path, "PRAGMA user_version") == [(db.VERSION,)]


def test_an_old_database_is_brought_up_to_date_with_nothing_lost(old):
    columns = ", ".join(column[1] for column in rows(old, "PRAGMA table_info(tasks)"))
    of_tasks, of_holds = f"SELECT {columns} FROM tasks", "SELECT * FROM holds"
    before = rows(old, of_tasks), rows(old, of_holds)
    database = Database(old)
    stats = database.stats()
    assert stats.tasks == {"pending": 25, "completed": 25, "failed": 50}
    assert stats.failures == {"expired": 25, "canceled": 25}
    assert database.check_counts()
    assert database.queue(NOW).pending == 25
    assert database.get("t0").params == {"seed": 7}
    database.close()
    assert (rows(old, of_tasks), rows(old, of_holds)) == before
    assert is_today(old)


def test_the_prompts_of_an_old_database_can_be_searched(old):
    database = Database(old)
    found = database.list_tasks("failed", None, None, 200, words="FOX", error_code="expired")
    assert len(found) == 25
    database.close()
    check_words(old)


def test_a_retry_of_an_old_database_names_what_it_retries(old):
    connection = sqlite3.connect(old)
    with connection:
        connection.execute("UPDATE tasks SET retried_as = 't50' WHERE id = 't2'")
    connection.close()
    database = Database(old)
    assert database.get("t50").retry_of == "t2"
    assert database.get("t2").retry_of is None
    database.close()


def test_an_old_database_has_the_same_tables_then_as_a_new_one(old, tmp_path):
    for path in (old, tmp_path / "new.sqlite3"):
        Database(path).close()
    names = "SELECT type, name, sql FROM sqlite_schema ORDER BY 1, 2"
    assert rows(old, names) == rows(tmp_path / "new.sqlite3", names)


def test_calls_of_today_that_found_no_connection_are_no_longer_counted(old):
    calls = [(1, None, "unavailable"), (2, 429, "unavailable"), (3, None, None)]
    connection = sqlite3.connect(old)
    connection.executemany(
        "INSERT INTO calls (task, number, started, http_status, outcome) VALUES ('t0', ?, 9, ?, ?)",
        calls,
    )
    connection.commit()
    connection.close()
    database = Database(old)
    assert database.queue(10).calls_today == 2
    database.close()


def test_a_copy_is_kept_as_it_was(old):
    Database(old).close()
    copy = f"{old}.version-1"
    assert rows(copy, "PRAGMA user_version") == [(1,)]
    assert rows(copy, "PRAGMA integrity_check") == [("ok",)]
    assert rows(copy, "SELECT count(*) FROM tasks") == [(100,)]


def test_without_room_there_is_no_copy_but_all_the_same_a_database(old, monkeypatch, caplog):
    monkeypatch.setattr(db.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    Database(old).close()
    assert is_today(old)
    assert [path.name for path in old.parent.glob("*.version-*")] == []
    assert "is not copied" in caplog.text


def test_a_new_database_is_not_copied(tmp_path):
    Database(tmp_path / "new.sqlite3").close()
    assert list(tmp_path.glob("*.version-*")) == []


def test_a_newer_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "newer.sqlite3"
    Database(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {db.VERSION + 1}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match="newer version"):
        Database(path)
    assert path.read_bytes() == before


def test_a_step_that_fails_changes_nothing(old):
    rows(old, "CREATE TABLE counts (in_the_way)")
    with pytest.raises(DatabaseError, match="counts"):
        Database(old)
    assert rows(old, "PRAGMA user_version") == [(1,)]
    assert rows(old, "SELECT count(*) FROM tasks") == [(100,)]


def test_a_kill_in_the_middle_of_it_is_made_good_by_the_next_start(tmp_path):
    path = tmp_path / "tasks.sqlite3"
    version_1(path, 100_000)
    kills = 0
    for milliseconds in (80, 120, 160, 200, 250, 300, 400):
        process = subprocess.Popen([sys.executable, "-c", OPEN, str(path)], cwd=ROOT)
        try:
            process.wait(milliseconds / 1000)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        assert rows(path, "PRAGMA user_version") in ([(1,)], [(db.VERSION,)])
    database = Database(path)
    assert database.check_counts()
    assert database.stats().tasks == {"pending": 25_000, "completed": 25_000, "failed": 50_000}
    database.close()
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    assert kills, "none came in time"


# The counts


def test_the_counts_follow_whatever_becomes_of_a_task(database):
    database.add([NewTask(name, "p", "m", {}) for name in "abc"], NOW)
    assert database.stats().tasks == {"pending": 3}
    task = database.claim(NOW)
    assert (database.queue(NOW).pending, database.queue(NOW).processing) == (2, 1)
    database.finish(task, Ending("storage", "failed", error="e"), NOW)
    database.cancel("b", NOW)
    assert database.stats().failures == {"storage": 1, "canceled": 1}
    database.delete("a", 0)
    assert database.stats().failures == {"storage": 0, "canceled": 1}
    assert database.check_counts()


def test_counts_that_are_wrong_are_mended_and_told(make, caplog):
    q = make()
    task_id = q.add()
    connection = sqlite3.connect(q.config.database_path)
    connection.execute("UPDATE counts SET tasks = 7")
    connection.commit()
    connection.close()
    assert q.db.queue(NOW).pending == 7
    q.start().until(task_id, status="completed")
    wait_until(lambda: "the counts of tasks were wrong" in caplog.text)
    assert q.db.queue(NOW).pending == 0
    assert q.db.check_counts()


def test_counts_that_are_right_are_not_told(make, caplog):
    q = make()
    q.start().until(q.add(), status="completed")
    assert "counts" not in caplog.text


def test_to_count_costs_no_more_where_there_are_many(tmp_path):
    steps = []
    for tasks in (40, 40_000):
        path = tmp_path / f"{tasks}.sqlite3"
        version_1(path, tasks)
        database, connections = open_watched(path)
        counts = [lambda: database.queue(NOW), database.stats]  # noqa: B023
        steps += [sum(steps_taken(connections, count) for count in counts)]
        database.close()
    assert steps[1] <= steps[0] + 10
