"""Large databases of every age are brought up to date, whoever is killed, and by one process."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from conftest import TOKEN, wait_until
from old_databases import columns_of, node, node_rows, read_all, released
from server import Server

import db
from db import Database

ROOT = Path(__file__).resolve().parent.parent
OPEN = "import sys; from pathlib import Path; from db import Database; Database(Path(sys.argv[1]))"
TASKS = 100_000
AGES = {
    "version 1": lambda path: released(path, 1, TASKS),
    "version 2": lambda path: released(path, 2, TASKS),
    "version 3": lambda path: released(path, 3, TASKS),
    "node": lambda path: node(path, node_rows(TASKS)),
}

# A hundred thousand tasks, several times: on a busy machine that takes its time.
pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def lay_down(tmp_path_factory):
    """Return a maker of a database of some age; each age is made once, and copied."""
    folder = tmp_path_factory.mktemp("ages")

    def make(age, path):
        original = folder / age
        if not original.exists():
            AGES[age](original)
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(original, path)

    return make


def version(path):
    return read_all(path, "pragma_user_version")[0][0]


def is_whole(path):
    """Open a database, and return whether it has all its tasks, each of them counted."""
    database = Database(path)
    try:
        counts = sum(database.stats().tasks.values())
        return (counts, database.check_counts(), version(path)) == (TASKS, True, db.VERSION)
    finally:
        database.close()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_database_of_each_released_version_loses_nothing(tmp_path, lay_down, number):
    path = tmp_path / "tasks.sqlite3"
    lay_down(f"version {number}", path)
    kept = [(table, columns_of(path, table)) for table in ("tasks", "calls")]
    before = [read_all(path, *each) for each in kept]
    assert is_whole(path)
    assert [read_all(path, *each) for each in kept] == before
    assert read_all(path, "pragma_integrity_check") == [("ok",)]
    assert read_all(f"{path}.version-{number}", *kept[0]) == before[0]


def kill_when(path, is_time):
    """Have a process bring the database up to date, and kill it then; return if it was in time."""
    process = subprocess.Popen([sys.executable, "-c", OPEN, str(path)], cwd=ROOT)
    try:
        wait_until(lambda: is_time() or process.poll() is not None, 60)
    finally:
        process.kill()
    return process.wait() == -signal.SIGKILL


def size(path):
    return path.stat().st_size if path.exists() else 0


@pytest.mark.parametrize("age", AGES)
def test_kills_in_the_middle_of_it_are_made_good_by_the_next_start(tmp_path, lay_down, age):
    path = tmp_path / "tasks.sqlite3"
    lay_down(age, path)
    old, ids = version(path), read_all(path, "tasks", "id")
    copy, wal = Path(f"{path}.version-{old}"), Path(f"{path}-wal")
    assert kill_when(path, lambda: size(Path(f"{copy}.part")))
    assert version(path) == old
    # What does not fit in memory is written to the log file before it counts.
    for megabytes in (1, 4):
        wal.unlink(missing_ok=True)
        kill_when(path, lambda: size(wal) > megabytes << 20)  # noqa: B023
        assert version(path) in (old, db.VERSION)
    assert is_whole(path)
    assert read_all(path, "tasks", "id") == ids
    assert read_all(path, "pragma_integrity_check") == [("ok",)]
    assert read_all(copy, "tasks", "id") == ids
    assert [file.name for file in tmp_path.glob("*.part")] == []


@pytest.mark.parametrize("age", ["version 1", "node"])
def test_of_two_servers_that_open_it_at_once_one_brings_it_up_to_date(
    tmp_path, upstream, lay_down, age
):
    folder = tmp_path / "server"
    path = folder / "tasks.sqlite3"
    lay_down(age, path)
    ((first, *_), *_) = read_all(path, "tasks", "id")
    servers = [Server(folder, upstream.url, WORKERS=2, MAX_PER_DAY=1) for _ in range(2)]
    try:
        for server in servers:
            server.ready()
            assert server.request("GET", f"/tasks/{first}")[0] == 200
        log = "".join(server.log() for server in servers)
        assert log.count("is brought up to date") == 1
        assert "Traceback" not in log
    finally:
        for server in servers:
            server.close()
    assert is_whole(path)


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_database_of_a_newer_version_is_refused_with_one_line(tmp_path, is_ours):
    path = tmp_path / "tasks.sqlite3"
    if is_ours:
        Database(path).close()
    else:
        node(path, node_rows(6))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {db.VERSION + 1}")
    before = path.read_bytes()
    environ = {"PATH": os.environ["PATH"], "CHUTES_API_TOKEN": TOKEN, "DATABASE_PATH": str(path)}
    refused = subprocess.run(
        [sys.executable, "-c", "from app import app"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = refused.stderr.splitlines()
    assert "was made by a newer version of this server: update it" in line
    assert refused.returncode == 4
    assert path.read_bytes() == before
