"""What lies below a database: its rows, behind the server's back, and what SQLite does for it."""

import fcntl
import sqlite3
import time
from contextlib import closing, contextmanager
from pathlib import Path
from unittest import mock

from db import Database


def read(path, sql, values=()):
    """Return all rows of a statement."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(sql, values).fetchall()


def write(path, sql, values=()):
    """Run one statement that writes."""
    with _writing(path) as connection:
        connection.execute(sql, values)


def insert(path, table, rows):
    """Insert rows, dictionaries of the same columns, all in one transaction."""
    rows = list(rows)
    marks = ", ".join(f":{column}" for column in rows[0])
    with _writing(path) as connection:
        connection.executemany(f"INSERT INTO {table} ({', '.join(rows[0])}) VALUES ({marks})", rows)


def check_words(path):
    """Fail where the index of words is not what the prompts make it."""
    write(path, "INSERT INTO prompts (prompts, rank) VALUES ('integrity-check', 1)")


def task(id, **columns):
    """Return the row of a pending task that was added now, or of one with these columns."""
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    usual = {"prompt": "p", "model": "m", "params": "{}", "priority": 0, "status": "pending"}
    return {"id": id, **usual, "created_at": now, "updated_at": now, **columns}


def open_watched(path):
    """Open a database, and return it with the connections to SQLite that it has opened."""
    connections, connect = [], sqlite3.connect

    def collect(*args, **values):
        connection = connect(*args, **values)
        if "factory" in values:  # Not the one that only looks at what the file is.
            connections.append(connection)
        return connection

    with mock.patch("sqlite3.connect", collect):
        return Database(path), connections


@contextmanager
def traced(connections):
    """Collect the statements that are run."""
    statements = []
    for connection in connections:
        connection.set_trace_callback(statements.append)
    yield statements
    for connection in connections:
        connection.set_trace_callback(None)


def steps_taken(connections, work):
    """Count the instructions of SQLite's machine, in tens."""
    taken = []
    for connection in connections:
        connection.set_progress_handler(lambda: taken.append(1), 10)
    work()
    for connection in connections:
        connection.set_progress_handler(None, 0)
    return len(taken)


def damage(path, text=b"2026"):
    """Overwrite the pages of a database that hold a text, as a bad disk may; nobody has it open."""
    data = path.read_bytes()
    with path.open("rb+") as file:
        for start in range(4096, len(data), 4096):
            if text in data[start : start + 4096]:
                file.seek(start)
                file.write(b"\xa5" * 4096)


@contextmanager
def _writing(path):
    """Open the database for one transaction, under the lock that all its writers share."""
    with (
        Path(f"{path}.lock").open("rb+") as lock,
        closing(sqlite3.connect(path, 30)) as connection,
        connection,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield connection
