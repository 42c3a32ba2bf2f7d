"""The original Node server's database: how it is known, and its tasks as those of version 1."""

import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

KEYS = {"id", "prompt", "status", "file_path", "error", "created_at", "updated_at"}
# A number from here on is of milliseconds (1973), as JavaScript has them, below of seconds.
_MILLISECONDS = 1e11

# With its indexes and triggers, whose names may be ours.
SET_ASIDE = """
CREATE TABLE node_tasks AS SELECT * FROM tasks NOT INDEXED;
DROP TABLE tasks;
"""

# The Node server sent one model, and kept no error codes: its tasks failed by their calls.
TAKE_OVER = """
WITH old AS MATERIALIZED (
  SELECT node_id(CAST(id AS BLOB)) AS id,
    coalesce(node_text(CAST(prompt AS BLOB)), '') AS prompt,
    node_text(CAST(status AS BLOB)) AS status,
    coalesce(status IN ('completed', 'failed'), 0) AS has_ended,
    node_text(CAST(file_path AS BLOB)) AS file_path,
    node_text(CAST(error AS BLOB)) AS error,
    node_time(CAST(created_at AS BLOB)) AS created_at,
    node_time(CAST(updated_at AS BLOB)) AS updated_at
  FROM node_tasks
)
INSERT INTO tasks (
  id, prompt, status, file_path, error, created_at, updated_at,
  error_code, model, params, priority, last_error, finished_at
)
SELECT id, prompt, iif(has_ended, status, 'failed'), file_path,
  iif(has_ended, error, 'The Node server had not ended this task (its status was '
    || coalesce(status, 'null') || '); retry the task to make its picture'),
  coalesce(created_at, updated_at, datetime()),
  iif(has_ended, coalesce(updated_at, created_at, datetime()), datetime()),
  CASE WHEN NOT has_ended THEN 'interrupted' WHEN status = 'failed' THEN 'upstream_error' END,
  'qwen-image', '{}', 0, iif(has_ended, NULL, error),
  iif(has_ended, coalesce(updated_at, created_at, datetime()), datetime())
FROM old;
DROP TABLE node_tasks;
"""


def functions(encoding: str) -> dict[str, Callable[[bytes | None], str | None]]:
    """Return the functions of the SQL above; each takes a value's bytes, in this encoding.

    A column of SQLite may hold anything, and text that is none cannot be read as text.
    """
    seen: set[str] = set()

    def text(value: bytes | None) -> str | None:
        return None if value is None else value.decode(encoding, "replace")

    def new_id(value: bytes | None) -> str:
        known = text(value)
        if not known or known in seen:
            known = str(uuid.uuid4())
        seen.add(known)
        return known

    return {
        "node_text": text,
        "node_id": new_id,
        "node_time": lambda value: _stamp(text(value) or ""),
    }


def _stamp(text: str) -> str | None:
    """Write a time as the rows have it: SQLite's (UTC), ISO 8601, or a number since 1970."""
    with suppress(ValueError, OverflowError, OSError):
        if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
            seconds = float(text) / (1000 if float(text) >= _MILLISECONDS else 1)
            time = datetime.fromtimestamp(seconds, UTC)
        else:
            time = datetime.fromisoformat(text)
            time = time.astimezone(UTC) if time.tzinfo else time
        return time.strftime("%Y-%m-%d %H:%M:%S")
    return None
