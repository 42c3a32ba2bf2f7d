"""What a request says beside its fields: its body, its query and its headers, as values."""

import hashlib
import re

from flask import abort, g, request
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge

from records import STATUSES, IdempotencyKey, Task
from web.service import service

MAX_BODY = 1024 * 1024
_PAGE = 50
MAX_PAGE = 200
MAX_WAIT = 60
# curl declares a form for `-d`, whatever it sends.
_FORM = "application/x-www-form-urlencoded"
# A client that tells its own patience is answered so long before it ends, in seconds.
_MARGIN = 2.0
# The official client for JavaScript tells whole seconds: a patience of 0 is less than one.
_LEAST_PATIENCE = 0.5


def json_body() -> bytes:
    """Return the body, which is declared as JSON, as a form or not at all, or answer 4xx."""
    declared = request.mimetype
    if declared and declared != _FORM and not request.is_json:
        abort(
            415,
            f"The body is declared as {declared[:100]}; "
            "send JSON, with Content-Type: application/json",
        )
    try:
        body = request.get_data()
    except HTTPException:
        raise
    except Exception as error:  # Whatever the server in front raises for a broken body.
        raise BadRequest("The body could not be read to its end") from error
    if len(body) > MAX_BODY:
        raise RequestEntityTooLarge
    return body


def idempotency_key(request_told: str) -> IdempotencyKey | None:
    """Return the key that came with the request (which is told in full), or None, or answer 400."""
    text = request.headers.get("Idempotency-Key")
    if text is None:
        return None
    if not re.fullmatch(r"[\x20-\x7e]{1,255}", text):
        abort(400, "Idempotency-Key must be 1 to 255 printable ASCII characters")
    fingerprint = hashlib.sha256(request_told.encode()).hexdigest()
    return IdempotencyKey(g.client, text, fingerprint)


def known(task_id: str, seconds: int = 0) -> Task:
    """Return the task, after a wait for its end, or answer 404."""
    g.task = task_id[:100]
    g.waited = bool(seconds) and service.worker.waiters.wait(task_id, seconds)
    task = service.database.get(task_id)
    if task is None:
        abort(404, "Task not found")
    return task


def wait_seconds() -> int:
    """Return the seconds of `?wait=`, 0 where there is none, or answer 400."""
    value = request.args.get("wait", "0")
    if "wait" in request.args and not _is_within(value, 1, MAX_WAIT):
        abort(400, f"wait must be an integer from 1 to {MAX_WAIT}, in seconds")
    return int(value)


def listing() -> tuple[str | None, str | None, int | None, int]:
    """Return status, model, before and limit as asked for, or answer 400."""
    only("status", "model", "limit", "before")
    status = request.args.get("status")
    if status is not None and status not in STATUSES:
        abort(400, f"status must be one of {', '.join(STATUSES)}")
    limit = request.args.get("limit", str(_PAGE))
    if not _is_within(limit, 1, MAX_PAGE):
        abort(400, f"limit must be an integer from 1 to {MAX_PAGE}")
    before = request.args.get("before")
    if before is not None and not _is_within(before, 1, 10**18):
        abort(400, "before must be as `next` gave it")
    return status, request.args.get("model"), before and int(before), int(limit)


def patience() -> float:
    """Return the seconds to wait: OPENAI_WAIT, or less where the client says it waits less.

    The official clients say so in a header, the first one for Python, the other for JavaScript.
    """
    for name in ("X-Stainless-Read-Timeout", "X-Stainless-Timeout"):
        try:
            theirs = float(request.headers.get(name, ""))
        except ValueError:
            continue
        if theirs >= 0:
            theirs = max(theirs, _LEAST_PATIENCE)
            return min(service.config.openai_wait, theirs - min(_MARGIN, theirs / 2))
    return service.config.openai_wait


def only(*names: str) -> None:
    """Answer 400 where the query has another name: it would be ignored in silence."""
    for name in request.args:
        if name not in names:
            abort(400, f"{name[:50]!a} is not a parameter here; there are {', '.join(names)}")


def _is_within(text: str, least: int, most: int) -> bool:
    return bool(re.fullmatch(r"[0-9]{1,18}", text)) and least <= int(text) <= most
