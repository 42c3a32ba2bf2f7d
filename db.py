"""The tables and all SQL: what is accepted, what runs, what was called, and how it ended."""

import bisect
import fcntl
import json
import logging
import mmap
import os
import shutil
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import node
from records import (
    ALL_MODELS,
    CANCELED,
    CatalogueState,
    Ending,
    Hold,
    IdempotencyKey,
    Image,
    KeyReused,
    Limits,
    LowOnDisk,
    NewHold,
    NewTask,
    PastCall,
    Queue,
    QueueFull,
    QueueView,
    Stats,
    Task,
)

POSITIONS = 1000
# Calls are counted for so many models, and for all others together, by a name that none can have.
MAX_COUNTED_MODELS = 100
OTHER_MODELS = "_other"
_MAX_BATCH = 64
KEY_SECONDS = 86400.0
CATALOGUE_AWAITED = "the catalogue is read for "
_Values = Sequence[Any] | Mapping[str, Any]
# One script a version.
_SCRIPTS = Path(__file__).with_name("schema.sql").read_text().split("\n-- version ")[1:]
_SCRIPTS = [script.partition("\n")[2] for script in _SCRIPTS]
VERSION = len(_SCRIPTS)
# The files of a database that is open: whoever opens it later must find the same ones.
_SUFFIXES = ("", "-wal", "-shm")
# A database that is not to be written any more, and why, in memory that is shared with the
# processes forked from this one: none of them goes on until they all are started anew.
_REFUSED = mmap.mmap(-1, 2 * mmap.PAGESIZE)

log = logging.getLogger("db")


class DatabaseError(Exception):
    """The database could not do what was asked; nothing was changed.

    `is_final` is an error that stays until the server is started anew.
    """

    def __init__(self, message: str, full: bool = False, is_final: bool = False):
        super().__init__(message)
        self.full = full
        self.is_final = is_final


_NO_FACTS = dict.fromkeys(("content_type", "bytes", "width", "height", "sha256"))
_FIELDS = [field.name for field in fields(Task)]
_PARAMS = _FIELDS.index("params")
_IMAGE = ", ".join(field.name for field in fields(Image))
# The inputs of a task come with it, in one column.
_INPUTS = f"""(SELECT json_group_array(json_array({_IMAGE}))
               FROM (SELECT * FROM inputs WHERE task = tasks.id ORDER BY position)) AS inputs"""
_COLUMNS = ", ".join([*_FIELDS[:-1], _INPUTS])

# The models with a task that is ready, each found by one step in the index: a held
# model with 100,000 waiting tasks costs one look, not 100,000. Left to itself, SQLite
# takes another index, and walks them all.
_NEXT = """
WITH RECURSIVE ready (model) AS (
  SELECT min(model) FROM tasks INDEXED BY tasks_ready
  WHERE status = 'pending' AND not_before IS NULL
  UNION ALL
  SELECT (SELECT min(tasks.model) FROM tasks INDEXED BY tasks_ready
          WHERE status = 'pending' AND not_before IS NULL AND tasks.model > ready.model)
  FROM ready WHERE ready.model IS NOT NULL
)
SELECT tasks.seq FROM ready JOIN tasks ON tasks.seq = (
  SELECT first.seq FROM tasks AS first INDEXED BY tasks_ready
  WHERE first.status = 'pending' AND first.not_before IS NULL AND first.model = ready.model
  ORDER BY first.priority DESC, first.seq LIMIT 1)
WHERE NOT EXISTS (SELECT 1 FROM queue WHERE paused)
  AND NOT EXISTS (SELECT 1 FROM holds
                  WHERE holds.model IN (ready.model, '*')
                    AND (probe IS NOT NULL OR until > :now))
  AND ready.model NOT IN (SELECT value FROM json_each(:busy))
ORDER BY tasks.priority DESC, tasks.seq LIMIT 1
"""


class _Connection(sqlite3.Connection):
    """A connection that reads a statement whole: an unfinished one would stand in others' way."""

    def rows(self, sql: str, values: _Values = ()) -> list[Any]:
        return self.execute(sql, values).fetchall()

    def count(self, sql: str, values: _Values = ()) -> int:
        return int(self.rows(sql, values)[0][0])


class _Batch:
    """Writes of several threads that share a COMMIT."""

    def __init__(self) -> None:
        self.size = 0
        self.done = threading.Event()
        self.error: BaseException | None = None


class Database:
    """Own the two connections of this process: one that writes, one that reads.

    Every write is one transaction, on disk (fsync) when the method returns, under a
    lock that all processes share: SQLite before 3.51.3 can lose committed rows when
    two connections write or checkpoint at the same instant. Where the file that is open is no
    longer the one at the path, or a statement has found it damaged, nothing is written until
    the server is started anew.
    Open it after a fork, and close it in the same process. Raises DatabaseError.
    """

    def __init__(self, path: Path):
        self.path = path
        self._paths = [f"{path}{suffix}" for suffix in _SUFFIXES]
        self._writing = threading.Lock()
        self._counting = threading.Lock()
        self._waiting = 0
        self._batch: _Batch | None = None
        self._reading = threading.RLock()
        _refuse_foreign(path)
        self._lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with self._alone():
                self._writer = self._connect()
                try:
                    self._bring_up_to_date()
                    self._reader = self._connect()
                    # Else the first use fails, where another program changes the schema before it.
                    for connection in (self._writer, self._reader):
                        connection.rows("SELECT rowid FROM prompts LIMIT 0")
                    self._files = list(map(_identity, self._paths))
                except BaseException:
                    self._writer.close()
                    raise
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Close both connections; the last one folds the log file into the database."""
        with self._alone(), self._reading:
            self._reader.close()
            self._writer.close()
        os.close(self._lock)

    def add(
        self,
        tasks: Sequence[NewTask],
        now: float,
        max_pending: int | None = None,
        key: IdempotencyKey | None = None,
        low_on_disk: bool = False,
        publish: Callable[[], None] = lambda: None,
    ) -> list[str]:
        """Store pending tasks, all or none; when this returns, they outlive a loss of power.

        Returns their ids, or those of the tasks that the same key has added in the last
        day, with nothing stored. Raises KeyReused, and where something would be stored,
        LowOnDisk and QueueFull. `publish` gives the files of the inputs their names, on disk:
        it is called before the rows are stored, while nobody else writes or removes one.
        """
        ids = [task.id for task in tasks]
        with self._write() as connection:
            if key and (first := _first_tasks(connection, key, now)):
                return first
            if low_on_disk:
                raise LowOnDisk
            _check_pending_limit(connection, max_pending, len(tasks))
            if any(task.inputs for task in tasks):
                publish()
            _insert(connection, tasks, stamp(now))
            if key:
                # An expired one may still be there: they are removed some at a time.
                connection.execute(
                    """INSERT OR REPLACE INTO idempotency (client, key, fingerprint, task, created)
                       VALUES (?, ?, ?, ?, ?)""",
                    (key.client, key.value, key.fingerprint, " ".join(ids), now),
                )
            return ids

    def get(self, id: str) -> Task | None:
        """Read a task, or return None where there is none."""
        rows = self._fetch(f"SELECT {_COLUMNS} FROM tasks WHERE id = ?", (id,))
        return _task(rows[0]) if rows else None

    def queue_view(
        self,
        task: Task,
        rate_limit: tuple[int, float] | None,
        now: float,
        max_calls: int = 0,
    ) -> QueueView:
        """Read all that a pending task waits for, at one instant."""
        return self.queue_views([task], rate_limit, now, max_calls)[0]

    def queue_views(
        self,
        tasks: Sequence[Task],
        rate_limit: tuple[int, float] | None,
        now: float,
        max_calls: int = 0,
    ) -> list[QueueView]:
        """Read all that each of the pending tasks waits for, at one instant.

        `ahead` is exact to POSITIONS and one more beyond, `calls_today` to `max_calls`.
        """
        with self._read() as connection:
            line = connection.rows(
                """SELECT -priority, seq FROM tasks INDEXED BY tasks_line
                   WHERE status = 'pending' ORDER BY priority DESC, seq LIMIT ?""",
                (POSITIONS + 1,),
            )
            ((paused, pause_reason),) = connection.rows("SELECT paused, pause_reason FROM queue")
            holds = _holds(connection, [ALL_MODELS, *(task.model for task in tasks)])
            running = _running(connection)
            shared = QueueView(
                ahead=0,
                processing=running.total(),
                paused=bool(paused),
                pause_reason=pause_reason,
                holds=(),
                next_start=rate_limit and _next_start(connection, *rate_limit, now),
                calls_today=_calls_since(connection, midnight(now), max_calls),
            )
        return [
            replace(
                shared,
                ahead=bisect.bisect_left(line, (-task.priority, task.seq)),
                holds=tuple(hold for hold in holds if hold.model in (ALL_MODELS, task.model)),
                processing_of_model=running[task.model],
            )
            for task in tasks
        ]

    def claim(
        self, now: float, rate_limit: tuple[int, float] | None = None, max_per_day: int = 0
    ) -> Task | None:
        """Take the next task as `claim_some` does, or return None."""
        return next(iter(self.claim_some(1, now, Limits(rate_limit, max_per_day))), None)

    def claim_some(self, count: int, now: float, limits: Limits) -> list[Task]:
        """Take up to so many of the next tasks that may run, and note their calls.

        Highest priority first, then first in, first out. Passed over are tasks that wait
        for their next attempt, models that are held or of which as many calls as may be are
        under way, and all while the queue is paused.
        The first task of a model after its hold has ended is the probe: no other task of
        that model is claimed before the probe's call has ended.
        """
        with self._write() as connection:
            tasks: list[Task] = []
            while len(tasks) < count and (task := _claim(connection, now, limits)):
                tasks.append(task)
            return tasks

    def next_due(self, now: float, rate_limit: tuple[int, float] | None = None) -> float | None:
        """Return when `claim` may find a task that it does not find now (epoch seconds).

        None where that takes another change of the database, or the next day.
        """
        with self._read() as connection:
            ((later, held),) = connection.rows(
                """SELECT (SELECT min(not_before) FROM tasks INDEXED BY tasks_later
                           WHERE status = 'pending' AND not_before > :now),
                          (SELECT min(until) FROM holds WHERE until > :now)""",
                {"now": now},
            )
            start = _next_start(connection, *rate_limit, now) if rate_limit else None
        return min((due for due in (later, held, start) if due), default=None)

    def finish(self, task: Task, end: Ending, now: float) -> bool:
        """End the task's call, and with it the task, its hold and the queue's run as `end` says.

        Where the task is no longer in that call, only the call is ended; returns False.
        """
        with self._write() as connection:
            return _finish(connection, task, end, now)

    def finish_and_claim(
        self, task: Task, end: Ending, now: float, limits: Limits
    ) -> tuple[bool, Task | None]:
        """Do as `finish` does, and take the next task that may run then, as `claim` does."""
        with self._write() as connection:
            return _finish(connection, task, end, now), _claim(connection, now, limits)

    def list_tasks(
        self,
        status: str | None,
        model: str | None,
        before: int | None,
        limit: int,
        *,
        error_code: str | None = None,
        words: str | None = None,
    ) -> list[Task]:
        """Read up to `limit` tasks, the newest first, that were added before that `seq`.

        Each of the words must begin one of the prompt's, in upper or lower case, with or
        without accents.
        """
        values = {"before": sys.maxsize if before is None else before, "limit": limit}
        lists, filters = _lists(status, model, error_code, words)
        rows = self._fetch(
            f"""SELECT {_COLUMNS} FROM tasks
                WHERE seq IN ({lists} ORDER BY seq DESC LIMIT :limit) ORDER BY seq DESC""",
            {**values, **filters},
        )
        return [_task(row) for row in rows]

    def list_queue(
        self,
        model: str | None,
        after: tuple[int, int] | None,
        limit: int,
        *,
        error_code: str | None = None,
        words: str | None = None,
    ) -> list[Task]:
        """Read up to `limit` pending tasks in the order in which they are taken.

        Only those behind that (priority, `seq`) of the line, filtered as `list_tasks` does.
        """
        conditions = ["status = 'pending'"]
        if after:
            conditions.append("priority <= :priority AND (priority < :priority OR seq > :seq)")
        lists, filters = _lists("pending", model, error_code, words)
        if (model, error_code, words) != (None, None, None):
            conditions.append(f"seq IN ({lists})")
        priority, seq = after or (None, None)
        rows = self._fetch(
            f"""SELECT {_COLUMNS} FROM tasks INDEXED BY tasks_line
                WHERE {" AND ".join(conditions)} ORDER BY priority DESC, seq LIMIT :limit""",
            {"priority": priority, "seq": seq, "before": sys.maxsize, "limit": limit, **filters},
        )
        return [_task(row) for row in rows]

    def last_seq(self) -> int:
        """Return the `seq` of the task that was added last, 0 where there is none."""
        with self._read() as connection:
            return connection.count("SELECT coalesce(max(seq), 0) FROM tasks")

    def calls(self, id: str) -> list[PastCall]:
        """Read the upstream calls of a task, the first one first."""
        rows = self._fetch(
            """SELECT number, started, seconds, http_status, outcome, invocation_id, host
               FROM calls WHERE task = ? ORDER BY number""",
            (id,),
        )
        return [PastCall(number, stamp(started), *rest) for number, started, *rest in rows]

    def unfinished(self, ids: Iterable[str]) -> set[str]:
        """Return those of the tasks that are pending or processing."""
        sql = """SELECT id FROM tasks WHERE id IN (SELECT value FROM json_each(?))
                   AND status IN ('pending', 'processing')"""
        return set(self._column(sql, (json.dumps(list(ids)),)))

    def cancel(self, id: str, now: float) -> None:
        """Fail a pending task at once, and have the call of one that is processing cut."""
        with self._write() as connection:
            connection.execute(f"{_CANCEL} AND id = :id", {**_cancel(now), "id": id})
            connection.execute(
                "UPDATE tasks SET canceling = 1 WHERE id = ? AND status = 'processing'", (id,)
            )

    def cancel_pending(
        self, model: str | None, up_to: int, now: float, limit: int = 500
    ) -> list[str]:
        """Fail up to `limit` pending tasks, the oldest first; return which.

        Only those whose `seq` is at most `up_to`, and of that model, if any.
        """
        only = "AND model = :model" if model is not None else ""
        with self._write() as connection:
            rows = connection.rows(
                f"""{_CANCEL} AND seq IN (
                      SELECT seq FROM tasks WHERE status = 'pending' AND seq <= :up_to {only}
                      ORDER BY seq LIMIT :limit) RETURNING id""",
                {**_cancel(now), "model": model, "up_to": up_to, "limit": limit},
            )
        return [id for (id,) in rows]

    def canceling(self) -> list[str]:
        """Return the tasks whose calls are to be cut."""
        return self._column(
            """SELECT id FROM tasks INDEXED BY tasks_canceling
               WHERE status = 'processing' AND canceling"""
        )

    def retry(
        self,
        id: str,
        new_id: str,
        now: float,
        max_pending: int | None = None,
        choose_seed: Callable[[str], int | None] = lambda model: None,
    ) -> bool:
        """Add a new task with the input of one that has ended; False where it has not.

        `choose_seed` returns another for a model, where it was chosen and not asked for.
        Raises QueueFull.
        """
        with self._write() as connection:
            _check_pending_limit(connection, max_pending)
            return _retry(connection, id, new_id, now, choose_seed)

    def retry_failed(
        self,
        error_code: str | None,
        up_to: int,
        models: Sequence[str],
        new_id: Callable[[], str],
        now: float,
        max_pending: int | None = None,
        choose_seed: Callable[[str], int | None] = lambda model: None,
        limit: int = 500,
    ) -> int:
        """Add anew up to `limit` failed tasks not retried yet, the oldest first; say how many.

        Only those whose `seq` is at most `up_to`, and who failed with that code, or without
        one in any way but by being canceled, and are of these models, if any are given.
        Raises QueueFull where there is no room for one.
        """
        retryable, values = _retryable(error_code, models)
        with self._write() as connection:
            limit = min(limit, _free_slots(connection, max_pending))
            rows = connection.rows(
                f"SELECT id {retryable} AND seq <= :up_to ORDER BY seq LIMIT :limit",
                {**values, "up_to": up_to, "limit": max(limit, 1)},
            )
            if rows and limit < 1:
                raise QueueFull
            for (id,) in rows:
                _retry(connection, id, new_id(), now, choose_seed)
            return len(rows)

    def count_retryable(
        self, error_code: str | None, models: Sequence[str], max_pending: int | None = None
    ) -> int:
        """Count the tasks that `retry_failed` would add now, called again and again."""
        retryable, values = _retryable(error_code, models)
        with self._read() as connection:
            found = connection.count(f"SELECT count(*) {retryable}", values)
            return max(0, min(found, _free_slots(connection, max_pending)))

    def count_pending(self, model: str | None) -> int:
        """Count the tasks that `cancel_pending` would end now, called again and again."""
        with self._read() as connection:
            if model is None:
                return _count(connection, "pending")
            sql = "SELECT count(*) FROM tasks WHERE status = 'pending' AND model = ?"
            return connection.count(sql, (model,))

    def delete(self, id: str, limits_since: float) -> bool:
        """Delete a task that is not processing, and note that its files must go.

        Its calls go too, but for those started at `limits_since` or later, which still
        count for the limits: `purge_calls` deletes them in time. Call `files_deleted` when the
        files have gone, and `remove_inputs` for its inputs: a death in between leaves the note.
        """
        with self._write() as connection:
            return _delete(connection, id, limits_since)

    def purge(self, finished_before: float, limit: int, limits_since: float) -> list[Task]:
        """Delete up to `limit` tasks that ended before then, with their calls, as `delete` does."""
        rows = self._fetch(
            f"SELECT {_COLUMNS} FROM tasks INDEXED BY tasks_finished WHERE finished_at < ? LIMIT ?",
            (stamp(finished_before), limit),
        )
        if not rows:
            return []
        with self._write() as connection:
            return [t for t in map(_task, rows) if _delete(connection, t.id, limits_since)]

    def purge_calls(
        self, after: tuple[float, str, int], limits_since: float, limit: int = 500
    ) -> tuple[float, str, int] | None:
        """Look at up to `limit` calls behind `after`, and delete those of deleted tasks.

        Only calls started before `limits_since`. Returns the last one that was looked at,
        to go on from, or None where there was none.
        """
        with self._read() as connection:
            rows = connection.rows(
                """SELECT started, task, number,
                     EXISTS (SELECT 1 FROM tasks WHERE tasks.id = calls.task)
                   FROM calls INDEXED BY calls_started
                   WHERE (started, task, number) > (?, ?, ?) AND started < ?
                   ORDER BY started, task, number LIMIT ?""",
                (*after, limits_since, limit),
            )
        orphans = [(task, number) for _, task, number, has_task in rows if not has_task]
        if orphans:
            with self._write() as connection:
                connection.executemany("DELETE FROM calls WHERE task = ? AND number = ?", orphans)
        return rows[-1][:3] if rows else None

    def pending_deletions(self, limit: int = 1000) -> list[tuple[str, str | None]]:
        """Return some deleted tasks whose files may still be there, each time others.

        Each is an id and a `file_path`.
        """
        sql = "SELECT id, file_path FROM removals ORDER BY random() LIMIT ?"
        return self._fetch(sql, (limit,))

    def files_deleted(self, id: str) -> None:
        """Note that the files of a deleted task have gone."""
        self._run("DELETE FROM removals WHERE id = ?", (id,))

    def note_unused_inputs(self, names: Sequence[str]) -> None:
        """Note the files of these names that are the input of no task, for `unused_inputs`."""
        self._run(
            """INSERT OR IGNORE INTO unused_inputs SELECT value FROM json_each(?)
               WHERE NOT EXISTS (SELECT 1 FROM inputs WHERE sha256 = substr(value, 1, 64))""",
            (json.dumps(names),),
        )

    def unused_inputs(self, limit: int = 1000) -> list[str]:
        """Return some names of files of deleted tasks' inputs, each time others."""
        sql = "SELECT name FROM unused_inputs ORDER BY random() LIMIT ?"
        return self._column(sql, (limit,))

    def remove_inputs(self, names: Iterable[str], remove: Callable[[str], None]) -> None:
        """Have those files removed that are the input of no task, while nobody adds one.

        Where `remove` raises OSError, the files after it stay, to be removed another time.
        """
        # A deletion that shares this COMMIT may still be undone: what is committed counts, too.
        with self._write() as connection, self._read() as committed:
            for name in names:
                sha256 = (name.partition(".")[0],)
                is_used = connection.count(_USES, sha256)
                if is_used or not committed.count(_USES, sha256):
                    if not is_used:
                        remove(name)
                    connection.execute("DELETE FROM unused_inputs WHERE name = ?", (name,))

    def file_paths(self, name: str) -> list[str]:
        """Return each `file_path` of the Node server's tasks whose last part is this name."""
        return self._column(
            """SELECT file_path FROM tasks INDEXED BY tasks_taken_over
               WHERE calls = 0 AND file_path IS NOT NULL AND :name =
                 substr(file_path, length(rtrim(file_path, replace(file_path, '/', ''))) + 1)""",
            {"name": name},
        )

    def keep_image_facts(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Note what the files of completed tasks show, by their ids, where nothing is known yet.

        Of a file that is no whole image, its `bytes` alone.
        """
        with self._write() as connection:
            connection.executemany(
                """UPDATE tasks SET content_type = :content_type, bytes = :bytes, width = :width,
                     height = :height, sha256 = :sha256
                   WHERE id = :id AND status = 'completed' AND sha256 IS NULL""",
                [{"id": id, **_NO_FACTS, **found} for id, found in facts.items()],
            )

    def queue(self, now: float) -> Queue:
        """Read how the queue stands, at one instant."""
        with self._read() as connection:
            sql = "SELECT min(created_at) FROM tasks INDEXED BY tasks_age WHERE status = 'pending'"
            ((oldest,),) = connection.rows(sql)
            ((paused, reason, *quota),) = connection.rows(
                """SELECT paused, pause_reason, quota_total, quota_used, quota_remaining
                   FROM queue"""
            )
            holds = _holds(connection)
            return Queue(
                pending=_count(connection, "pending"),
                processing=_count(connection, "processing"),
                paused=bool(paused),
                pause_reason=reason,
                oldest_pending=oldest,
                calls_today=_calls_since(connection, midnight(now)),
                holds=tuple(hold for hold in holds if hold.probe or hold.until > now),
                quota=None if quota[0] is None else tuple(quota),
            )

    def check_writable(self) -> None:
        """Write nothing of note, to see that it can be written. Raises DatabaseError."""
        with self._write() as connection:
            # An UPDATE to the same values would write nothing at all.
            connection.execute("INSERT INTO removals (id) VALUES ('')")
            connection.execute("DELETE FROM removals WHERE id = ''")

    def stats(self) -> Stats:
        """Read the numbers that are for gauges only."""
        with self._read() as connection:
            counts = connection.rows("SELECT status, error_code, tasks FROM counts")
            calls = connection.rows("SELECT model, calls FROM calls_by_model")
            buckets = connection.rows("SELECT le, calls FROM buckets ORDER BY le")
            totals = connection.rows("SELECT upstream_seconds, image_bytes FROM queue")
        statuses: Counter[str] = Counter()
        for status, _, tasks in counts:
            statuses[status] += tasks
        failures = {code: tasks for status, code, tasks in counts if status == "failed"}
        return Stats(statuses, failures, dict(calls), tuple(buckets), *totals[0])

    def check_counts(self) -> bool:
        """Count the tasks anew; return whether the counts were right, which they are then."""
        anew = "SELECT status, coalesce(error_code, ''), count(*) FROM tasks GROUP BY 1, 2"
        kept = "SELECT * FROM counts WHERE tasks != 0"
        with self._read() as connection:
            if set(connection.rows(anew)) == set(connection.rows(kept)):
                return True
        with self._write() as connection:
            connection.execute("DELETE FROM counts")
            connection.execute(f"INSERT INTO counts {anew}")
        return False

    def catalogue_entry(self, name: str) -> str | None:
        """Return what the catalogue says of a model of this name, in JSON, or None."""
        entries = self._column(
            """SELECT entry FROM catalogue_names JOIN catalogue_models USING (position)
               WHERE name = ?""",
            (name,),
        )
        return entries[0] if entries else None

    def catalogue_entries(self) -> list[str]:
        """Return what the catalogue says of all its models, in JSON, the busiest first."""
        return self._column("SELECT entry FROM catalogue_models ORDER BY position")

    def catalogue_names(self) -> list[str]:
        """Return all names of the catalogue's models."""
        return self._column("SELECT name FROM catalogue_names")

    def catalogue_state(self) -> CatalogueState:
        """Read how old the catalogue is."""
        rows = self._fetch(
            """SELECT read_at, tried_at, is_reading, error,
                 EXISTS (SELECT 1 FROM holds WHERE reason = ? || model)
               FROM catalogue""",
            (CATALOGUE_AWAITED,),
        )
        read_at, tried_at, is_reading, error, is_awaited = rows[0]
        return CatalogueState(read_at, tried_at, bool(is_reading), error, bool(is_awaited))

    def await_catalogue(self, model: str, now: float, seconds: float, step: float) -> None:
        """Hold a model that is not known until the catalogue was read, at most so many seconds.

        Not where that was tried in the last minute, whatever came of it.
        """
        self._run(
            """INSERT OR IGNORE INTO holds (model, reason, until, step, room)
               SELECT :model, :awaited || :model, :until, :step, 0 FROM catalogue
               WHERE is_reading OR tried_at IS NULL OR abs(:now - tried_at) > 60""",
            {
                "model": model,
                "awaited": CATALOGUE_AWAITED,
                "until": now + seconds,
                "step": step,
                "now": now,
            },
        )

    def begin_catalogue(self, now: float) -> None:
        """Note that the catalogue is being read."""
        self._run("UPDATE catalogue SET is_reading = 1, tried_at = ?", (now,))

    def end_catalogue(
        self, now: float, models: Sequence[tuple[str, Sequence[str]]] = (), error: str | None = None
    ) -> None:
        """Keep a catalogue that was read, entries with their names, or why it was not.

        Lets go on those who waited for it.
        """
        with self._write() as connection:
            connection.execute("UPDATE catalogue SET is_reading = 0, error = ?", (error,))
            connection.execute("DELETE FROM holds WHERE reason = ? || model", (CATALOGUE_AWAITED,))
            if error is None:
                connection.execute("UPDATE catalogue SET read_at = ?", (now,))
                connection.execute("DELETE FROM catalogue_models")
                connection.execute("DELETE FROM catalogue_names")
                connection.executemany(
                    "INSERT INTO catalogue_models VALUES (?, ?)",
                    [(position, entry) for position, (entry, _) in enumerate(models)],
                )
                connection.executemany(
                    "INSERT INTO catalogue_names VALUES (?, ?)",
                    [(n, position) for position, (_, names) in enumerate(models) for n in names],
                )

    def pause(self) -> None:
        """Start no call any more, until `resume`."""
        self._run("UPDATE queue SET paused = 1, pause_reason = NULL")

    def resume(self) -> tuple[int, str | None]:
        """End a pause, whoever began it.

        Returns how many tasks failed since the last one by what the queue paused itself for,
        and their error_code.
        """
        with self._write() as connection:
            (found,) = connection.rows("SELECT failed_meanwhile, pause_code FROM queue")
            connection.execute(
                """UPDATE queue SET paused = 0, pause_reason = NULL,
                     pause_code = NULL, failed_meanwhile = 0"""
            )
            return found[0], found[1]

    def delay_hold(self, model: str, until: float, reason: str) -> None:
        """Let a hold last until then, for this reason, unless a task probes it."""
        self._run(
            "UPDATE holds SET until = ?, reason = ? WHERE model = ? AND probe IS NULL",
            (until, reason, model),
        )

    def hold(self, model: str) -> Hold | None:
        """Read the hold of a model, or of ALL_MODELS."""
        with self._read() as connection:
            return next(iter(_holds(connection, [model])), None)

    def expire(self, created_before: float, error: str, now: float, limit: int = 500) -> int:
        """Fail up to `limit` pending tasks that were added before then; return how many."""
        cutoff = stamp(created_before)
        with self._read() as connection:
            old = """SELECT seq FROM tasks INDEXED BY tasks_age
                     WHERE status = 'pending' AND created_at < ? LIMIT ?"""
            if not connection.rows(old, (cutoff, 1)):
                return 0
        with self._write() as connection:
            return connection.execute(
                f"""UPDATE tasks SET status = 'failed', error_code = 'expired', error = ?,
                      updated_at = ?, finished_at = ?
                    WHERE seq IN ({old}) AND status = 'pending'""",
                (error, stamp(now), stamp(now), cutoff, limit),
            ).rowcount

    def orphans(self) -> list[Task]:
        """Read the tasks under way: for whoever begins to run the queue, all are orphans."""
        rows = self._fetch(f"SELECT {_COLUMNS} FROM tasks WHERE status = 'processing' ORDER BY seq")
        return [_task(row) for row in rows]

    def reset_run_state(self, max_attempts: int, now: float) -> None:
        """Note that the queue starts anew.

        No probe is under way, a pause of its own is lifted, and a task that has used up
        the attempts allowed by now has failed as its last attempt did.
        """
        with self._write() as connection:
            connection.execute("UPDATE holds SET probe = NULL WHERE probe IS NOT NULL")
            connection.execute(
                """UPDATE queue SET paused = 0, pause_reason = NULL
                   WHERE pause_reason IS NOT NULL"""
            )
            connection.execute(
                """UPDATE tasks SET status = 'failed', error = last_error, error_code = (
                         SELECT outcome FROM calls
                         WHERE task = tasks.id AND outcome NOT IN ('shutdown', 'unavailable',
                           'quota', 'no_room', 'storage') ORDER BY number DESC LIMIT 1),
                       updated_at = :stamp, finished_at = :stamp
                   WHERE status = 'pending' AND attempts >= :maximum""",
                {"stamp": stamp(now), "maximum": max_attempts},
            )

    def clamp_future_times(self, now: float, max_wait: float) -> None:
        """Take back what was written down for a time that a clock set back has yet to reach.

        A task then waits at most `max_wait` seconds for its attempt, a model an hour.
        """
        with self._write() as connection:
            connection.execute("UPDATE calls SET started = :now WHERE started > :now", {"now": now})
            connection.execute(
                """UPDATE tasks SET not_before = :latest
                   WHERE status = 'pending' AND not_before > :latest""",
                {"latest": now + max_wait},
            )
            connection.execute(
                """UPDATE holds SET until = :latest
                   WHERE until > :latest AND (model != :all OR room > 0)""",
                {"latest": now + 3600, "all": ALL_MODELS},
            )
            # Whether there is room is looked at before a call.
            connection.execute(
                "UPDATE holds SET until = :now WHERE until > :latest AND room > 0",
                {"now": now, "latest": now + max_wait},
            )

    def _connect(self) -> _Connection:
        # Autocommit: every transaction is begun and ended in sight. The lock beside each
        # connection keeps the threads apart, so that sqlite3 need not check for it.
        connection = sqlite3.connect(
            *(self.path, 30), isolation_level=None, check_same_thread=False, factory=_Connection
        )
        # NORMAL may lose the last commits when the power goes.
        connection.rows("PRAGMA synchronous = FULL")
        return connection

    def _bring_up_to_date(self) -> None:
        """Make the tables, or those that came since the database's version, in one transaction.

        A database that is refused is left as it is.
        """
        version = self._writer.count("PRAGMA user_version")
        if version > VERSION:
            raise DatabaseError(
                f"{self.path} was made by a newer version of this server: "
                "update it, or name another file in DATABASE_PATH"
            )
        is_new = not version and not self._writer.rows("SELECT 1 FROM sqlite_schema")
        scripts = _SCRIPTS if is_new else self._steps(version)
        if scripts and not is_new:
            self._copy(version)
        self._writer.rows("PRAGMA journal_mode = WAL")
        if scripts:
            self._writer.executescript(
                f"BEGIN IMMEDIATE; {''.join(scripts)} PRAGMA user_version = {VERSION}; COMMIT"
            )

    def _steps(self, version: int) -> list[str]:
        """Return what makes today's tables of that version's, or of the Node server's table."""
        if version:
            return _SCRIPTS[version:]
        _check_origin(self.path, self._writer.rows("SELECT name FROM pragma_table_info('tasks')"))
        encoding = self._writer.rows("PRAGMA encoding")[0][0]
        for name, function in node.functions(encoding).items():
            self._writer.create_function(name, 1, function)
        return [node.SET_ASIDE, _SCRIPTS[0], node.TAKE_OVER, *_SCRIPTS[1:]]

    def _copy(self, version: int) -> None:
        """Keep the database as it is, beside it, where there is room for two of them.

        A copy that is there is of the same tables, and older.
        """
        copy = Path(f"{self.path}.version-{version}")
        part = Path(f"{copy}.part")
        part.unlink(missing_ok=True)
        if shutil.disk_usage(copy.parent).free < 2 * self.path.stat().st_size:
            log.warning("%s is not copied before it is brought up to date", self.path)
            return
        try:
            self._writer.execute("VACUUM INTO ?", (str(part),))
            part.replace(copy)
        finally:
            part.unlink(missing_ok=True)
        # Under gunicorn this comes before the log is set up, which would drop anything less.
        log.warning("%s is brought up to date; %s is as it was", self.path, copy)

    def _fetch(self, sql: str, values: _Values = ()) -> list[Any]:
        """Read all rows of one statement, which is a transaction by itself."""
        with self._reading:
            try:
                return self._reader.rows(sql, values)
            except sqlite3.Error as error:
                raise self._ours(error, "read") from error

    def _column(self, sql: str, values: _Values = ()) -> list[str]:
        return [row[0] for row in self._fetch(sql, values)]

    def _run(self, sql: str, values: _Values = ()) -> None:
        """Write by one statement."""
        with self._write() as connection:
            connection.execute(sql, values)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep every other writer out, in this process and in all others."""
        with self._writing:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                yield
            except sqlite3.Error as error:
                raise _plain_error(error, "written") from error
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    @contextmanager
    def _write(self) -> Iterator[_Connection]:
        """Write, and return when it is on disk: alone, or together with others who came meanwhile.

        Who leaves while others wait leaves the COMMIT to the last of them, so that one fsync
        serves them all. What fails undoes itself; a COMMIT that fails is everyone's.
        """
        with self._counting:
            self._waiting += 1
        with self._writing:
            with self._counting:
                self._waiting -= 1
            batch = self._join_batch()
            try:
                yield self._writer
                self._writer.execute("RELEASE one")
            except sqlite3.Error as error:
                self._undo(batch, error)
                raise self._ours(error, "written") from error
            except BaseException as error:
                self._undo(batch, error)
                raise
            finally:
                batch.size += 1
                if self._batch and (not self._waiting or batch.size >= _MAX_BATCH):
                    self._commit(batch)
        batch.done.wait()
        if batch.error:
            raise self._ours(batch.error, "written") from batch.error

    def _join_batch(self) -> "_Batch":
        try:
            if self._batch is None:
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                self._check_files()
                self._writer.execute("BEGIN IMMEDIATE")
                self._batch = _Batch()
            self._writer.execute("SAVEPOINT one")
            return self._batch
        except (sqlite3.Error, DatabaseError) as error:
            self._end_batch(error)
            raise self._ours(error, "written") from error

    def _undo(self, batch: "_Batch", error: BaseException) -> None:
        """Undo what this writer did; where SQLite has undone all of the batch, tell the others."""
        if self._writer.in_transaction:
            self._writer.execute("ROLLBACK TO one")
            self._writer.execute("RELEASE one")
        else:
            self._end_batch(error)

    def _commit(self, batch: "_Batch") -> None:
        try:
            self._writer.execute("COMMIT")
            self._end_batch(None)
        except sqlite3.Error as error:
            self._end_batch(error)

    def _end_batch(self, error: BaseException | None) -> None:
        if self._writer.in_transaction:
            self._writer.execute("ROLLBACK")
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        if self._batch:
            self._batch.error = error
            self._batch.done.set()
            self._batch = None

    @contextmanager
    def at_one_instant(self) -> Iterator[None]:
        """Let all that this thread reads in the block be as it was at one instant."""
        with self._read():
            yield

    @contextmanager
    def _read(self) -> Iterator[_Connection]:
        with self._reading:
            if self._reader.in_transaction:  # Of this thread: no other has the lock.
                yield self._reader
                return
            try:
                self._reader.execute("BEGIN")
                try:
                    yield self._reader
                finally:
                    self._reader.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._ours(error, "read") from error

    def _check_files(self) -> None:
        """Raise DatabaseError where what is written now would be lost at the next start."""
        try:
            is_there = list(map(_identity, self._paths)) == self._files
        except OSError as error:
            raise DatabaseError(f"{self.path} cannot be found: {error.strerror}") from error
        if not is_there:
            self._refuse("was deleted or replaced under the server")
        if reason := self._refused():
            raise DatabaseError(reason, is_final=True)

    def _refuse(self, fact: str) -> None:
        """Have no process write to this database any more; the first reason stays."""
        if not self._refused():
            advice = "stop the server, restore the file, and start it again"
            text = f"{self.path}\0The database {self.path} {fact}: {advice}"
            _REFUSED[:] = os.fsencode(text)[: len(_REFUSED)].ljust(len(_REFUSED), b"\0")

    def _refused(self) -> str:
        """Return why this database is not to be written any more, or nothing."""
        if not _REFUSED[0]:
            return ""
        path, _, reason = _REFUSED[:].rstrip(b"\0").partition(b"\0")
        return os.fsdecode(reason) if path == os.fsencode(self.path) else ""

    def _ours(self, error: BaseException, done: str) -> DatabaseError:
        """Return an error as ours; what is damaged is not written any more."""
        if isinstance(error, DatabaseError):
            return DatabaseError(str(error), error.full, error.is_final)
        if _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or (
            # All that is said of a damaged table of the index of words.
            "vtable constructor failed" in str(error)
        ):
            self._refuse(f"is damaged ({error})")
            return DatabaseError(self._refused(), is_final=True)
        return _plain_error(error, done)


def _refuse_foreign(path: Path) -> None:
    """Refuse a file of another program before anything is written, to it or beside it."""
    if not path.exists():
        return
    uri = f"file:{quote(str(path))}?immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            if connection.execute("PRAGMA user_version").fetchall() != [(0,)]:
                return
            if not connection.execute("SELECT 1 FROM sqlite_schema").fetchall():
                return  # It is empty, or all of it is in its log yet.
            rows = connection.execute("SELECT name FROM pragma_table_info('tasks')").fetchall()
    except sqlite3.Error as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_NOTADB:
            return  # It is told when the database is opened in earnest.
        raise _plain_error(error, "read") from error
    _check_origin(path, rows)


def _check_origin(path: Path, columns: Iterable[tuple[str]]) -> None:
    """Refuse a database without a version whose table of tasks is not the Node server's."""
    names = {name.lower() for (name,) in columns}
    if "seq" in names or not names >= node.KEYS:
        advice = "move it away, or name another file in DATABASE_PATH"
        raise DatabaseError(f"{path} was made by another program: {advice}")


_USES = "SELECT EXISTS (SELECT 1 FROM inputs WHERE sha256 = ?)"


def _insert(connection: _Connection, tasks: Sequence[NewTask], created: str) -> None:
    connection.executemany(
        """INSERT INTO tasks (id, prompt, model, params, priority, seed_chosen, status,
                              created_at, updated_at)
           VALUES (?, ?, ?, ?, ?, ?, 'pending', ?, ?)""",
        [
            (
                *(task.id, task.prompt, task.model, json.dumps(task.params), task.priority),
                *(task.seed_chosen, created, created),
            )
            for task in tasks
        ],
    )
    connection.executemany(
        f"""INSERT INTO inputs (task, position, {_IMAGE})
            VALUES (:task, :position, {", ".join(f":{f.name}" for f in fields(Image))})""",
        [
            {"task": task.id, "position": position, **vars(image)}
            for task in tasks
            for position, image in enumerate(task.inputs)
        ],
    )


def _may_start(
    connection: _Connection, now: float, rate_limit: tuple[int, float] | None, max_per_day: int
) -> bool:
    """Return whether the limits of a day and of a time leave room for a call."""
    if max_per_day and _calls_since(connection, midnight(now), max_per_day) >= max_per_day:
        return False
    return not rate_limit or _next_start(connection, *rate_limit, now) is None


def _claim(connection: _Connection, now: float, limits: Limits) -> Task | None:
    if not _may_start(connection, now, limits.rate, limits.per_day):
        return None
    connection.execute(
        """UPDATE tasks INDEXED BY tasks_later SET not_before = NULL
           WHERE status = 'pending' AND not_before <= ?""",
        (now,),
    )
    under_way = _running(connection) if limits.at_once else Counter[str]()
    busy = [model for model, most in limits.at_once.items() if under_way[model] >= most]
    rows = connection.rows(
        f"""UPDATE tasks SET status = 'processing', calls = calls + 1,
              started_at = :stamp, updated_at = :stamp
            WHERE seq = ({_NEXT}) AND status = 'pending'
            RETURNING {_COLUMNS}""",
        {"now": now, "stamp": stamp(now), "busy": json.dumps(busy)},
    )
    if not rows:
        return None
    task = _task(rows[0])
    _begin_call(connection, task, now)
    return task


def _begin_call(connection: _Connection, task: Task, now: float) -> None:
    connection.execute(
        "INSERT INTO calls (task, number, started) VALUES (?, ?, ?)", (task.id, task.calls, now)
    )
    connection.execute(
        "UPDATE holds SET probe = ? WHERE model IN (?, ?)", (task.id, task.model, ALL_MODELS)
    )


def _running(connection: _Connection) -> Counter[str]:
    """Count the tasks under way by model."""
    sql = "SELECT model FROM tasks INDEXED BY tasks_processing WHERE status = 'processing'"
    return Counter(model for (model,) in connection.rows(sql))


_CANCEL = """UPDATE tasks SET status = 'failed', error_code = :code, error = :error,
               updated_at = :stamp, finished_at = :stamp
             WHERE status = 'pending'"""


def _lists(
    status: str | None, model: str | None, error_code: str | None, words: str | None
) -> tuple[str, dict[str, Any]]:
    """Return a query for the `seq` of the tasks that are all of this, and its values.

    Each part of it goes through an index, from `:before` down, so that they meet in one pass.
    """
    filters = {"status": status, "model": model, "error_code": error_code}
    given = [f"{name} = :{name}" for name in ("status", "model") if filters[name] is not None]
    lists = []
    if given or (error_code is None and words is None):
        lists.append(f"SELECT seq FROM tasks WHERE {' AND '.join([*given, 'seq < :before'])}")
    if error_code is not None:
        lists.append("SELECT seq FROM tasks WHERE error_code = :error_code AND seq < :before")
    if words is not None:
        lists.append(
            "SELECT rowid AS seq FROM prompts WHERE prompts MATCH :match AND rowid < :before"
        )
    return " INTERSECT ".join(lists), {**filters, "match": words and _match(words)}


def _match(text: str) -> str:
    """Return the query of FTS5 for all words of a text, each as the beginning of a word."""
    words = sorted(set(text.replace("\0", " ").lower().split()))
    # What holds a word holds all beginnings of it: to look for "a" reads every word with an a.
    longest = [
        word
        for word, following in zip(words, [*words[1:], ""], strict=True)
        if not following.startswith(word)
    ]
    return " ".join('"{}"*'.format(word.replace('"', '""')) for word in longest)


def _retryable(error_code: str | None, models: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return what follows SELECT for the tasks that are retried together, and its values."""
    index = "tasks_unretried" if error_code else "tasks_unretried_line"
    only = "error_code = :code" if error_code else "error_code != 'canceled'"
    if models:
        only += " AND model IN (SELECT value FROM json_each(:models))"
    return (
        f"""FROM tasks INDEXED BY {index}
            WHERE status = 'failed' AND retried_as IS NULL AND {only}""",
        {"code": error_code, "models": json.dumps(models)},
    )


def _retry(
    connection: _Connection,
    task_id: str,
    new_id: str,
    now: float,
    choose_seed: Callable[[str], int | None],
) -> bool:
    models = connection.rows("SELECT model FROM tasks WHERE id = ? AND seed_chosen", (task_id,))
    seed = choose_seed(models[0][0]) if models else None
    values = {"id": task_id, "new_id": new_id, "stamp": stamp(now), "seed": seed}
    cursor = connection.execute(
        """INSERT INTO tasks
             (id, prompt, model, params, priority, seed_chosen, status, created_at, updated_at,
              retry_of)
           SELECT :new_id, prompt, model,
             iif(:seed IS NULL, params, json_set(params, '$.seed', :seed)),
             priority, seed_chosen, 'pending', :stamp, :stamp, id
           FROM tasks WHERE id = :id AND status IN ('completed', 'failed')""",
        values,
    )
    if not cursor.rowcount:
        return False
    connection.execute("UPDATE tasks SET retried_as = :new_id WHERE id = :id", values)
    connection.execute(
        f"""INSERT INTO inputs (task, position, {_IMAGE})
            SELECT :new_id, position, {_IMAGE} FROM inputs WHERE task = :id""",
        values,
    )
    return True


def _cancel(now: float) -> dict[str, Any]:
    return {"code": CANCELED.outcome, "error": CANCELED.error, "stamp": stamp(now)}


def _finish(connection: _Connection, task: Task, end: Ending, now: float) -> bool:
    _end_call(connection, task, end)
    if not _end_attempt(connection, task, end, now):
        return False
    if end.image:
        connection.execute("UPDATE queue SET image_bytes = image_bytes + ?", (end.image.bytes,))
    if end.hold:
        _set_hold(connection, end.hold, task, now)
    _end_probe(connection, task, end)
    if end.pause_reason:
        # A pause by a person stays one, but what failed then is told at its end, too.
        connection.execute(
            """UPDATE queue SET
                 paused = 1, pause_reason = iif(paused, pause_reason, :reason),
                 pause_code = :code,
                 failed_meanwhile = 1 + iif(pause_code = :code, failed_meanwhile, 0)""",
            {"reason": end.pause_reason, "code": end.outcome},
        )
    return True


def _end_call(connection: _Connection, task: Task, end: Ending) -> None:
    cursor = connection.execute(
        """UPDATE calls SET outcome = ?, sent = ?, seconds = ?, http_status = ?, invocation_id = ?,
             host = ?
           WHERE task = ? AND number = ? AND outcome IS NULL""",
        (
            *(end.outcome, end.sent, end.seconds, end.reply.status, end.reply.invocation_id),
            end.host,
            *(task.id, task.calls),
        ),
    )
    # A connection that was never made has sent nothing.
    if cursor.rowcount and end.sent:
        _count_call(connection, task.model)
    if end.seconds is not None:
        connection.execute("UPDATE buckets SET calls = calls + 1 WHERE le >= ?", (end.seconds,))
        connection.execute(
            "UPDATE queue SET upstream_seconds = upstream_seconds + ?", (end.seconds,)
        )
    if end.reply.quota:
        connection.execute(
            "UPDATE queue SET quota_total = ?, quota_used = ?, quota_remaining = ?",
            end.reply.quota,
        )


def _count_call(connection: _Connection, model: str) -> None:
    connection.execute(
        """INSERT INTO calls_by_model (model, calls)
           SELECT CASE WHEN EXISTS (SELECT 1 FROM calls_by_model WHERE model = :model)
                       OR count(*) < :maximum THEN :model ELSE :others END, 1
           FROM calls_by_model WHERE true
           ON CONFLICT (model) DO UPDATE SET calls = calls + 1""",
        {"model": model, "maximum": MAX_COUNTED_MODELS, "others": OTHER_MODELS},
    )


def _end_attempt(connection: _Connection, task: Task, end: Ending, now: float) -> bool:
    has_failed, is_pending = end.status == "failed", end.status == "pending"
    facts = vars(end.image) if end.image else {}
    cursor = connection.execute(
        """UPDATE tasks SET status = :status, attempts = attempts + :counted,
             lost_images = lost_images + :has_lost_image,
             not_before = :not_before, last_error = coalesce(:last_error, last_error),
             error_code = :error_code, error = :error, file_path = :path,
             content_type = :content_type, bytes = :bytes, width = :width, height = :height,
             sha256 = :sha256, updated_at = :stamp, finished_at = :finished_at
           WHERE id = :id AND status = 'processing' AND calls = :calls""",
        {
            **_NO_FACTS,
            **facts,
            "status": end.status,
            "counted": end.counted,
            "has_lost_image": end.has_lost_image,
            "not_before": end.not_before,
            "last_error": end.error if is_pending else None,
            "error_code": end.outcome if has_failed else None,
            "error": end.error if has_failed else None,
            "path": end.path and str(end.path),
            "stamp": stamp(now),
            "finished_at": None if is_pending else stamp(now),
            "id": task.id,
            "calls": task.calls,
        },
    )
    # A task that is being canceled has no next attempt.
    connection.execute(f"{_CANCEL} AND id = :id AND canceling", {**_cancel(now), "id": task.id})
    return bool(cursor.rowcount)


def _end_probe(connection: _Connection, task: Task, end: Ending) -> None:
    """Lift the holds that the task probed and got past; leave the others to the next probe."""
    if end.counted or (end.hold and end.hold.model != ALL_MODELS):
        connection.execute("DELETE FROM holds WHERE probe = ?", (task.id,))
    connection.execute("UPDATE holds SET probe = NULL WHERE probe = ?", (task.id,))


def _set_hold(connection: _Connection, hold: NewHold, task: Task, now: float) -> None:
    # Only the probe's failure doubles the wait: the calls that were under way when the
    # hold began tell nothing new.
    connection.execute(
        """INSERT INTO holds (model, reason, until, step, room)
           VALUES (:model, :reason, :now + coalesce(:wait, :step), :step, :room)
           ON CONFLICT (model) DO UPDATE SET
             reason = excluded.reason,
             probe = nullif(probe, :task),
             room = max(room, excluded.room),
             step = CASE WHEN probe = :task THEN min(2 * step, :maximum) ELSE step END,
             until = max(until, :now + coalesce(:wait,
               CASE WHEN probe = :task THEN min(2 * step, :maximum) ELSE step END))""",
        {**vars(hold), "task": task.id, "now": now},
    )


def _delete(connection: _Connection, task_id: str, limits_since: float) -> bool:
    sql = "DELETE FROM tasks WHERE id = ? AND status != 'processing' RETURNING id, file_path"
    deleted = connection.rows(sql, (task_id,))
    if not deleted:
        return False
    connection.execute("DELETE FROM calls WHERE task = ? AND started < ?", (task_id, limits_since))
    connection.execute("INSERT OR IGNORE INTO removals (id, file_path) VALUES (?, ?)", deleted[0])
    connection.execute(
        """INSERT OR IGNORE INTO unused_inputs
           SELECT sha256 || '.' || extension FROM inputs WHERE task = ?""",
        (task_id,),
    )
    connection.execute("DELETE FROM inputs WHERE task = ?", (task_id,))
    return True


def _first_tasks(connection: _Connection, key: IdempotencyKey, now: float) -> list[str]:
    connection.execute(
        """DELETE FROM idempotency WHERE rowid IN (
             SELECT rowid FROM idempotency WHERE created <= ? ORDER BY created LIMIT 500)""",
        (now - KEY_SECONDS,),
    )
    rows = connection.rows(
        """SELECT fingerprint, task FROM idempotency
           WHERE client = ? AND key = ? AND created > ?""",
        (key.client, key.value, now - KEY_SECONDS),
    )
    if rows and rows[0][0] != key.fingerprint:
        raise KeyReused
    return rows[0][1].split() if rows else []


def _free_slots(connection: _Connection, max_pending: int | None) -> int:
    """Return how many more tasks may be pending."""
    if max_pending is None:
        return sys.maxsize
    return max_pending - _count(connection, "pending")


def _check_pending_limit(connection: _Connection, max_pending: int | None, wanted: int = 1) -> None:
    if _free_slots(connection, max_pending) < wanted:
        raise QueueFull


def _calls_since(connection: _Connection, then: float, limit: int = -1) -> int:
    """Count the calls that were sent, up to the limit; one under way counts."""
    return connection.count(
        """SELECT count(*) FROM (SELECT 1 FROM calls INDEXED BY calls_sent
                                 WHERE started >= ? AND sent LIMIT ?)""",
        (then, limit),
    )


def midnight(now: float) -> float:
    """Return when the UTC day began, in epoch seconds."""
    return now - now % 86400


def _holds(connection: _Connection, models: list[str] | None = None) -> tuple[Hold, ...]:
    """Read the holds of these models, or all, ordered by model: that of ALL_MODELS comes first."""
    sql = "SELECT model, reason, until, step, room, probe FROM holds"
    if models is not None:
        sql += " WHERE model IN (SELECT value FROM json_each(:models))"
    rows = connection.rows(f"{sql} ORDER BY model", {"models": json.dumps(models)})
    return tuple(Hold(*row) for row in rows)


def _next_start(connection: _Connection, count: int, seconds: float, now: float) -> float | None:
    """Slide the window over the calls that were started, whatever became of them."""
    rows = connection.rows(
        "SELECT started FROM calls WHERE started > ? ORDER BY started DESC LIMIT 1 OFFSET ?",
        (now - seconds, count - 1),
    )
    return rows[0][0] + seconds if rows else None


def _count(connection: _Connection, status: str) -> int:
    return connection.count(
        "SELECT coalesce(sum(tasks), 0) FROM counts WHERE status = ?", (status,)
    )


def _task(row: tuple[Any, ...]) -> Task:
    values = list(row)
    values[_PARAMS] = json.loads(values[_PARAMS])
    values[-1] = tuple(Image(*facts) for facts in json.loads(values[-1]))
    return Task(*values)


def stamp(now: float) -> str:
    """Write epoch seconds as the rows have it: UTC, `YYYY-MM-DD HH:MM:SS`."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _plain_error(error: BaseException, done: str) -> DatabaseError:
    full = _code(error) == sqlite3.SQLITE_FULL
    advice = "; make room on its disk" if full else ""
    return DatabaseError(f"The database cannot be {done}: {error}{advice}", full)


def _code(error: BaseException) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _identity(path: str) -> tuple[int, int] | None:
    """Return the device and the inode of a file, or None where there is none.

    It is not opened: that would drop SQLite's own locks on it.
    """
    try:
        found = os.stat(path)  # noqa: PTH116, a fifth of the time, at each write
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino
