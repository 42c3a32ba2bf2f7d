"""Rows of a database, read and written behind the server's back."""

import fcntl
import sqlite3
import time
from contextlib import closing, contextmanager
from pathlib import Path


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


def task(id, **columns):
    """Return the row of a pending task that was added now, or of one with these columns."""
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    usual = {"prompt": "p", "model": "m", "params": "{}", "priority": 0, "status": "pending"}
    return {"id": id, **usual, "created_at": now, "updated_at": now, **columns}


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
