"""The routes of tasks and of the queue: submit, look, cancel, retry, delete, pause."""

import hashlib
import re
import time
import uuid
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from flask import Blueprint, Response, abort, g, jsonify, request
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge

import db
import schema
from config import Config
from db import Database, Task
from worker import Worker, is_low_on_disk, rate_limit, waiting_for

MAX_BODY = 1024 * 1024
STATUSES = ("pending", "processing", "completed", "failed")
ERROR_CODES = (
    *("upstream_auth", "upstream_payment", "upstream_rejected", "upstream_error"),
    *("upstream_timeout", "upstream_truncated", "not_an_image", "image_too_large"),
    *("interrupted", "expired", "canceled", "storage", "internal"),
)
_PAGE = 50
MAX_PAGE = 200
MAX_WAIT = 60
# A call that is cut ends well within this time.
_CANCEL_SECONDS = 1.0
# curl declares a form for `-d`, whatever it sends.
_FORM = "application/x-www-form-urlencoded"


Answer = tuple[Response, int, dict[str, str]]


def blueprint(config: Config, database: Database, worker: Worker) -> Blueprint:
    """Build the routes over this database and this worker."""
    routes = Blueprint("tasks", __name__)

    @routes.post("/generate")
    def generate() -> Answer:
        try:
            wanted = schema.parse_generate(
                json_body(), config.default_model, config.model_in_url, config.models
            )
        except schema.Invalid as error:
            abort(400, str(error))
        new = new_task(wanted)
        (task_id,) = database.add(
            [new],
            time.time(),
            config.max_pending,
            idempotency_key(wanted.model_dump_json()),
            is_low_on_disk(config),
        )
        answer, status, headers = _accepted(task_id)
        if task_id != new.id:
            headers["Idempotent-Replayed"] = "true"
        return answer, status, headers

    @routes.get("/status/<task_id>")
    def status(task_id: str) -> Response:
        return jsonify(_json(_waited_for(task_id)))

    @routes.get("/tasks")
    def newest() -> Answer:
        wanted = _listing()
        found = database.newest(*wanted)
        limit = wanted[-1]
        more = len(found) == limit and database.newest(*wanted[:2], found[-1].seq, 1)
        following = _page_after(found[-1]) if more else None
        headers = {"Link": f'<{following}>; rel="next"'} if following else {}
        return jsonify(tasks=_tasks_json(found, config, database), next=following), 200, headers

    @routes.get("/tasks/<task_id>")
    def one(task_id: str) -> Response:
        task = _waited_for(task_id)
        calls = [vars(call) for call in database.calls(task.id)]
        return jsonify(**_json(task), calls=calls)

    @routes.post("/tasks/<task_id>/cancel")
    def cancel(task_id: str) -> Response:
        known(database, task_id)
        worker.cancel(task_id)
        worker.waiters.wait(task_id, _CANCEL_SECONDS, even_if_full=True)
        return jsonify(_json(known(database, task_id)))

    @routes.post("/tasks/<task_id>/retry")
    def retry(task_id: str) -> Answer:
        task = known(database, task_id)
        if fault := schema.model_not_allowed(task.model, config.models):
            abort(400, fault)
        check_disk(config)
        new_id = str(uuid.uuid4())
        if not database.retry(task.id, new_id, time.time(), config.max_pending):
            return _conflict(
                known(database, task_id), "has not ended yet; cancel it first, or wait"
            )
        return _accepted(new_id)

    @routes.post("/tasks/retry")
    def retry_failed() -> tuple[Response, int]:
        _only("error_code")
        code = request.args.get("error_code") or None
        if code and code not in ERROR_CODES:
            abort(400, f"error_code must be one of {', '.join(ERROR_CODES)}")
        check_disk(config)
        retried = _retry_failed(code)
        worker.wake()
        return jsonify(retried=retried), 202

    @routes.delete("/tasks/<task_id>")
    def delete(task_id: str) -> Answer | tuple[str, int, dict[str, str]]:
        task = known(database, task_id)
        if not worker.remove(task):
            return _conflict(known(database, task_id), "is processing; cancel it first")
        return "", 204, {}

    @routes.get("/queue")
    def queue() -> Response:
        return jsonify(_queue_json(config, database))

    @routes.post("/queue/pause")
    def pause() -> Response:
        database.pause()
        return jsonify(_queue_json(config, database))

    @routes.post("/queue/resume")
    def resume() -> Response:
        database.resume()
        worker.wake()
        return jsonify(_queue_json(config, database))

    def _retry_failed(code: str | None) -> int:
        """Retry in steps, so that the queue goes on, and none that fails meanwhile again."""
        newest = database.newest(None, None, None, 1)
        up_to = newest[0].seq if newest else 0
        retried = 0
        try:
            while some := database.retry_failed(
                code,
                up_to,
                config.models,
                lambda: str(uuid.uuid4()),
                time.time(),
                config.max_pending,
            ):
                retried += some
        except db.QueueFull:
            if not retried:
                raise
        return retried

    def _accepted(task_id: str) -> Answer:
        worker.wake()
        g.task = task_id
        answer = jsonify(id=task_id, status="pending", message="Task queued successfully")
        return answer, 202, {"Location": f"/status/{task_id}"}

    def _waited_for(task_id: str) -> Task:
        """Return the task, once it has ended where `?wait=` asks for that."""
        return known(database, task_id, worker, wait_seconds())

    def _json(task: Task) -> dict[str, Any]:
        return _tasks_json([task], config, database)[0]

    return routes


def new_task(wanted: schema.Generate) -> db.NewTask:
    """Return the task that was asked for, with an id of its own."""
    task_id = str(uuid.uuid4())
    return db.NewTask(task_id, wanted.prompt, wanted.model, wanted.params(), wanted.priority)


def check_disk(config: Config) -> None:
    """Raise LowOnDisk where less than MIN_FREE_MB is free."""
    if is_low_on_disk(config):
        raise db.LowOnDisk


def idempotency_key(request_told: str) -> db.Key | None:
    """Return the key that came with the request (which is told in full), or None, or answer 400."""
    text = request.headers.get("Idempotency-Key")
    if text is None:
        return None
    if not re.fullmatch(r"[\x20-\x7e]{1,255}", text):
        abort(400, "Idempotency-Key must be 1 to 255 printable ASCII characters")
    fingerprint = hashlib.sha256(request_told.encode()).hexdigest()
    return db.Key(g.client, text, fingerprint)


def known(database: Database, task_id: str, worker: Worker | None = None, seconds: int = 0) -> Task:
    """Return the task, after a wait for its end, or answer 404."""
    g.task = task_id[:100]
    g.waited = bool(seconds) and worker.waiters.wait(task_id, seconds)
    task = database.get(task_id)
    if task is None:
        abort(404, "Task not found")
    return task


def wait_seconds() -> int:
    """Return the seconds of `?wait=`, 0 where there is none, or answer 400."""
    value = request.args.get("wait", "0")
    if "wait" in request.args and not _is_within(value, 1, MAX_WAIT):
        abort(400, f"wait must be an integer from 1 to {MAX_WAIT}, in seconds")
    return int(value)


def _is_within(text: str, least: int, most: int) -> bool:
    return bool(re.fullmatch(r"[0-9]{1,18}", text)) and least <= int(text) <= most


def _listing() -> tuple[str | None, str | None, int | None, int]:
    """Return status, model, before and limit as asked for, or answer 400."""
    _only("status", "model", "limit", "before")
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


def _only(*names: str) -> None:
    """Answer 400 where the query has another name: it would be ignored in silence."""
    for name in request.args:
        if name not in names:
            abort(400, f"{name[:50]!a} is not a parameter here; there are {', '.join(names)}")


def _page_after(last: Task) -> str:
    asked = {**request.args.to_dict(), "before": last.seq}
    return f"/tasks?{urlencode(asked)}"


def _conflict(task: Task, why: str) -> Answer:
    return jsonify(error=f"The task {why}", status=task.status), 409, {}


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


def _tasks_json(tasks: list[Task], config: Config, database: Database) -> list[dict[str, Any]]:
    """Show tasks; what the pending ones wait for is read at one instant for all."""
    pending = [task for task in tasks if task.status == "pending"]
    waits: dict[str, tuple[int | None, str]] = {}
    if pending:
        now, is_low = time.time(), is_low_on_disk(config)
        standings = database.standings(pending, rate_limit(config), now, config.max_per_day)
        for task, standing in zip(pending, standings, strict=True):
            position = standing.ahead + 1 if standing.ahead < db.POSITIONS else None
            waits[task.id] = position, waiting_for(task, standing, config, now, is_low)
    return [_task_json(task, *waits.get(task.id, (None, None))) for task in tasks]


def _task_json(task: Task, position: int | None, reason: str | None) -> dict[str, Any]:
    return {
        "id": task.id,
        "prompt": task.prompt,
        "status": task.status,
        "file_path": task.file_path,
        "error": task.error,
        "created_at": task.created_at,
        "updated_at": task.updated_at,
        "error_code": task.error_code,
        "model": task.model,
        "params": task.params,
        "priority": task.priority,
        "attempts": task.attempts,
        "queue_position": position,
        "waiting_for": reason,
        "started_at": task.started_at,
        "finished_at": task.finished_at,
        "image": _image_json(task),
        "retried_as": task.retried_as,
    }


def _image_json(task: Task) -> dict[str, Any] | None:
    if task.status != "completed":
        return None
    return {
        "url": f"/images/{task.id}",
        "content_type": task.content_type,
        "bytes": task.bytes,
        "width": task.width,
        "height": task.height,
        "sha256": task.sha256,
    }


def _queue_json(config: Config, database: Database) -> dict[str, Any]:
    now = time.time()
    queue = database.queue(now)
    limit = config.rate_limit
    return {
        "pending": queue.pending,
        "processing": queue.processing,
        "paused": queue.paused,
        "pause_reason": queue.pause_reason,
        "concurrency": config.concurrency,
        "rate_limit": f"{limit.count}/{limit.seconds:g}" if limit else None,
        "oldest_pending_seconds": age(queue.oldest_pending, now),
        "calls_today": queue.calls_today,
        "held": [
            {"model": hold.model, "reason": hold.reason, "until": db.stamp(hold.until)}
            for hold in queue.holds
        ],
        "quota": queue.quota
        and dict(zip(("total", "used", "remaining"), queue.quota, strict=True)),
    }


def age(created_at: str | None, now: float) -> int | None:
    """Return the whole seconds since a time as the rows have it, or None."""
    if created_at is None:
        return None
    created = datetime.strptime(created_at, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    return max(0, int(now - created.timestamp()))
