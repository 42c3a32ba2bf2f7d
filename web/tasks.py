"""The routes of tasks and of the queue: submit, look, cancel, retry, delete, pause."""

import time
import uuid
from urllib.parse import urlencode

from flask import Blueprint, Response, abort, g, jsonify, request

from outputs import is_low_on_disk
from records import ERROR_CODES, LowOnDisk, QueueFull, Task
from web import schemas
from web.answers import queue_json, tasks_json
from web.params import idempotency_key, json_body, known, listing, only, wait_seconds
from web.service import service

# A call that is cut ends well within this time.
_CANCEL_SECONDS = 1.0

Answer = tuple[Response, int, dict[str, str]]

bp = Blueprint("tasks", __name__)


@bp.post("/generate")
def generate() -> Answer:
    config = service.config
    try:
        wanted = schemas.parse_generate(
            json_body(), config.default_model, config.model_in_url, config.models
        )
    except schemas.Invalid as error:
        abort(400, str(error))
    new = schemas.new_task(wanted)
    (task_id,) = service.database.add(
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


@bp.get("/status/<task_id>")
def status(task_id: str) -> Response:
    return _shown(known(task_id, wait_seconds()))


@bp.get("/tasks")
def newest() -> Answer:
    wanted = listing()
    found = service.database.list_tasks(*wanted)
    limit = wanted[-1]
    more = len(found) == limit and service.database.list_tasks(*wanted[:2], found[-1].seq, 1)
    following = _page_after(found[-1]) if more else None
    headers = {"Link": f'<{following}>; rel="next"'} if following else {}
    return jsonify(tasks=tasks_json(found), next=following), 200, headers


@bp.get("/tasks/<task_id>")
def one(task_id: str) -> Response:
    task = known(task_id, wait_seconds())
    calls = [vars(call) for call in service.database.calls(task.id)]
    return jsonify(**tasks_json([task])[0], calls=calls)


@bp.post("/tasks/<task_id>/cancel")
def cancel(task_id: str) -> Response:
    known(task_id)
    service.worker.cancel(task_id)
    service.worker.waiters.wait(task_id, _CANCEL_SECONDS, force=True)
    return _shown(known(task_id))


@bp.post("/tasks/<task_id>/retry")
def retry(task_id: str) -> Answer:
    task = known(task_id)
    if fault := schemas.model_not_allowed(task.model, service.config.models):
        abort(400, fault)
    _check_disk()
    new_id = str(uuid.uuid4())
    if not service.database.retry(task.id, new_id, time.time(), service.config.max_pending):
        return _conflict(known(task_id), "has not ended yet; cancel it first, or wait")
    return _accepted(new_id)


@bp.post("/tasks/retry")
def retry_failed() -> tuple[Response, int]:
    only("error_code")
    code = request.args.get("error_code") or None
    if code and code not in ERROR_CODES:
        abort(400, f"error_code must be one of {', '.join(ERROR_CODES)}")
    _check_disk()
    retried = _retry_failed(code)
    service.worker.wake()
    return jsonify(retried=retried), 202


@bp.delete("/tasks/<task_id>")
def delete(task_id: str) -> Answer | tuple[str, int, dict[str, str]]:
    task = known(task_id)
    if not service.worker.delete(task):
        return _conflict(known(task_id), "is processing; cancel it first")
    return "", 204, {}


@bp.get("/queue")
def queue() -> Response:
    return jsonify(queue_json())


@bp.post("/queue/pause")
def pause() -> Response:
    service.database.pause()
    return jsonify(queue_json())


@bp.post("/queue/resume")
def resume() -> Response:
    service.database.resume()
    service.worker.wake()
    return jsonify(queue_json())


def _retry_failed(code: str | None) -> int:
    """Retry in steps, so that the queue goes on, and none that fails meanwhile again."""
    newest = service.database.list_tasks(None, None, None, 1)
    up_to = newest[0].seq if newest else 0
    retried = 0
    try:
        while some := service.database.retry_failed(
            code,
            up_to,
            service.config.models,
            lambda: str(uuid.uuid4()),
            time.time(),
            service.config.max_pending,
        ):
            retried += some
    except QueueFull:
        if not retried:
            raise
    return retried


def _check_disk() -> None:
    """Raise LowOnDisk where less than MIN_FREE_MB is free."""
    if is_low_on_disk(service.config):
        raise LowOnDisk


def _accepted(task_id: str) -> Answer:
    service.worker.wake()
    g.task = task_id
    answer = jsonify(id=task_id, status="pending", message="Task queued successfully")
    return answer, 202, {"Location": f"/status/{task_id}"}


def _shown(task: Task) -> Response:
    return jsonify(tasks_json([task])[0])


def _page_after(last: Task) -> str:
    asked = {**request.args.to_dict(), "before": last.seq}
    return f"/tasks?{urlencode(asked)}"


def _conflict(task: Task, why: str) -> Answer:
    return jsonify(error=f"The task {why}", status=task.status), 409, {}
