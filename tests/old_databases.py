"""Databases as the released versions made them, and as the Node server did."""

import sqlite3
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NODE_TABLE = """
CREATE TABLE tasks (
  id TEXT PRIMARY KEY,
  prompt TEXT,
  status TEXT DEFAULT 'pending',
  file_path TEXT,
  error TEXT,
  created_at DATETIME DEFAULT CURRENT_TIMESTAMP,
  updated_at DATETIME DEFAULT CURRENT_TIMESTAMP
);
"""
KEYS = ("id", "prompt", "status", "file_path", "error", "created_at", "updated_at")


def released(path, version, tasks):
    """Make a database as this version did, with tasks of every kind and a call for each."""
    scripts = (ROOT / "schema.sql").read_text().split("\n-- version ")[1 : version + 1]
    script = "".join(script.partition("\n")[2] for script in scripts)
    kinds = [("pending", None), ("completed", None), ("failed", "expired"), ("failed", "canceled")]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(
            f"PRAGMA journal_mode = WAL; {script} PRAGMA user_version = {version};"
        )
        connection.executemany(
            """INSERT INTO tasks (id, prompt, model, params, priority, status, error_code,
                                  created_at, updated_at)
               VALUES (?, 'a red fox', 'm', '{"seed": 7}', 0, ?, ?, '2026-01-01 00:00:00', '')""",
            ((f"t{n}", *kinds[n % 4]) for n in range(tasks)),
        )
        connection.executemany(
            "INSERT INTO calls (task, number, started, outcome) VALUES (?, 1, ?, 'completed')",
            ((f"t{n}", float(n)) for n in range(tasks)),
        )


def node(path, rows, script=NODE_TABLE, encoding="UTF-8"):
    """Make a database as the Node server did, with these rows: dictionaries of its columns."""
    usual = {"prompt": "a red fox", "status": "completed", "file_path": None, "error": None}
    times = dict.fromkeys(("created_at", "updated_at"), "2025-05-28 12:00:00")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(f"PRAGMA encoding = '{encoding}'; {script}")
        connection.executemany(
            f"INSERT INTO tasks ({', '.join(KEYS)}) VALUES ({', '.join(f':{k}' for k in KEYS)})",
            ({**usual, **times, **row} for row in rows),
        )


def node_rows(count):
    """Yield rows of a Node server of every status, a third of which had not ended."""
    statuses = ("completed", "failed", "completed", "failed", "processing", "pending")
    for n in range(count):
        status = statuses[n % len(statuses)]
        yield {
            "id": f"node-{n}",
            "prompt": f"a red fox, number {n}",
            "status": status,
            "file_path": f"outputs/node-{n}.png" if status == "completed" else None,
            "error": "Request failed with status code 500" if status == "failed" else None,
        }


def read_all(path, table, columns="*"):
    """Return all rows of a table, in the order of their ids."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1").fetchall()


def columns_of(path, table):
    """Return the names of a table's columns, as SQL has them."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(f"PRAGMA table_info({table})").fetchall()
        return ", ".join(row[1] for row in rows)
