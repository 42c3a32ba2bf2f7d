"""The routes of tasks and of the queue: submit, look, cancel, retry, delete, pause."""

import functools
import time
import uuid
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote, urlencode

from flask import Blueprint, Response, g, request

from db import POSITIONS, stamp
from outputs import is_low_on_disk
from records import QueueFull, Task
from web import answers, params, schemas, uploads
from web.errors import Refusal
from web.openapi import operation
from web.params import get_task_or_404, query
from web.service import service
from worker import rate_limit

# A call that is cut ends well within this time.
_CANCEL_SECONDS = 1.0
# A place in the line as one number: the highest priority is 100, and no `seq` is so large.
_HIGHEST, _PER_PRIORITY = 100, 10**15

# More than CONCURRENCY may be.
_MOST_RUNNING = 100

bp = Blueprint("tasks", __name__)


@bp.post("/generate")
@operation(answers.Accepted, errors=(429, 507), body=schemas.Generate, idempotent=True)
def generate() -> Response:
    """Add a task."""
    find = service.registry.find
    asked = schemas.parse(schemas.Generate, params.json_body(), service.config, find)
    key = params.idempotency_key(asked.canonical_input())
    (task_id,) = service.add(asked.new_tasks(), asked.model, key)
    return _accepted(task_id)


@bp.post("/edit")
@operation(answers.Accepted, errors=(429, 507), body=schemas.Edit, idempotent=True)
def edit() -> Response:
    """Add a task that edits images."""
    with ExitStack() as held:
        asked, arrivals = uploads.understand(schemas.Edit, held, _text_of_image)
        key = params.idempotency_key(asked.canonical_input())
        (task_id,) = service.add(asked.new_tasks(), asked.model, key, arrivals)
    return _accepted(task_id, "Edit task queued successfully")


def _text_of_image(item: Any) -> str:
    if not isinstance(item, str):
        raise schemas.Invalid("must be text: base64, a data URL, or a task's id")
    return item


@bp.get("/status/<task_id>")
@operation(answers.Task, query=params.Wait)
def status(task_id: str) -> Response:
    """Look at a task."""
    return _shown(get_task_or_404(task_id, query(params.Wait).wait)).response()


@bp.get("/tasks")
@operation(answers.Tasks, query=params.TasksQuery, id="tasks")
def list_tasks() -> Response:
    """List tasks, the newest first, or as they are taken."""
    wanted = query(params.TasksQuery)
    limit, in_line = wanted.limit, wanted.order == "queue"
    found = _queue_page(wanted) if in_line else _page(wanted)
    tasks, following, headers = _all_shown(found[:limit]), None, {}
    if len(found) > limit:
        last = found[limit - 1]
        asked = {**request.args.to_dict(), "before": _place(last) if in_line else last.seq}
        following = f"/tasks?{urlencode(asked)}"
        headers["Link"] = f'<{following}>; rel="next"'
    return answers.Tasks(tasks=tasks, next=following).response(headers)


@bp.get("/tasks/<task_id>")
@operation(answers.TaskWithCalls, query=params.Wait, id="task")
def get_task(task_id: str) -> Response:
    """Look at a task and its calls."""
    task = get_task_or_404(task_id, query(params.Wait).wait)
    calls = [answers.Call.of(call) for call in service.database.calls(task.id)]
    return answers.TaskWithCalls.of(_shown(task), calls=calls).response()


@bp.post("/tasks/<task_id>/cancel")
@operation(answers.Task, errors=(507,))
def cancel(task_id: str) -> Response:
    """End a task."""
    get_task_or_404(task_id)
    service.worker.cancel(task_id)
    service.worker.waiters.wait(task_id, _CANCEL_SECONDS, force=True)
    return _shown(get_task_or_404(task_id)).response()


@bp.post("/tasks/<task_id>/retry")
@operation(answers.Accepted, errors=(400, 409, 429, 507))
def retry(task_id: str) -> Response:
    """Add a new task with the same input."""
    task = get_task_or_404(task_id)
    model = service.registry.find(task.model)
    schemas.check_allowed(model, service.config, len(task.inputs))
    service.check_disk()
    new_id = _new_id()
    retry = functools.partial(service.database.retry, choose_seed=service.registry.choose_seed)
    if not retry(task.id, new_id, time.time(), service.config.max_pending):
        raise _conflict(get_task_or_404(task_id), "has not ended yet; cancel it first, or wait")
    service.worker.wake()
    return _accepted(new_id)


@bp.post("/tasks/retry")
@operation(answers.Retried, errors=(429, 507), query=params.RetryQuery, id="retryFailed")
def retry_failed() -> Response:
    """Retry all that failed and were not retried yet, but not what was canceled; or of a code."""
    code = query(params.RetryQuery).error_code
    service.check_disk()
    retried = _retry_failed(code)
    service.worker.wake()
    return answers.Retried(retried=retried).response()


@bp.get("/tasks/retry")
@operation(answers.Count, query=params.RetryQuery)
def count_retryable() -> Response:
    """Count the tasks that would be retried."""
    code, models = query(params.RetryQuery).error_code, _allowed_models()
    count = service.database.count_retryable(code, models, service.config.max_pending)
    return answers.Count(count=count).response()


@bp.get("/tasks/cancel")
@operation(answers.Count, query=params.CancelQuery)
def count_pending() -> Response:
    """Count the tasks that would be canceled."""
    return answers.Count(
        count=service.database.count_pending(query(params.CancelQuery).model)
    ).response()


@bp.post("/tasks/cancel")
@operation(answers.Canceled, errors=(507,), query=params.CancelQuery, id="cancelPending")
def cancel_pending() -> Response:
    """Cancel all tasks that are pending; with `model`, only those of that model."""
    canceled = service.worker.cancel_pending(query(params.CancelQuery).model)
    return answers.Canceled(canceled=canceled).response()


@bp.delete("/tasks/<task_id>")
@operation({204: {"description": "It is gone"}}, errors=(409, 507))
def delete(task_id: str) -> tuple[str, int]:
    """Delete a task and its files."""
    task = get_task_or_404(task_id)
    if not service.worker.delete(task):
        raise _conflict(get_task_or_404(task_id), "is processing; cancel it first")
    return "", 204


@bp.get("/queue")
@operation(answers.QueueAndTasks, query=params.QueueQuery)
def queue() -> Response:
    """Look at the queue, and with `tasks` at those that run and that are next, at one instant."""
    limit = query(params.QueueQuery).tasks
    if limit is None:
        return _queue().response()
    with service.database.at_one_instant():
        found = _queue()
        running = service.database.list_tasks("processing", None, None, _MOST_RUNNING)
        following = service.database.list_queue(None, None, limit)
        shown = _all_shown([*running, *following])
    running_shown, next_shown = shown[: len(running)], shown[len(running) :]
    return answers.QueueAndTasks.of(found, running=running_shown, next=next_shown).response()


@bp.post("/queue/pause")
@operation(answers.Queue, errors=(507,))
def pause() -> Response:
    """Start no more calls."""
    service.database.pause()
    return _queue().response()


@bp.post("/queue/resume")
@operation(answers.Resumed, errors=(507,))
def resume() -> Response:
    """Go on."""
    failed, code = service.database.resume()
    service.worker.wake()
    retry = f"/tasks/retry?error_code={code}" if failed else None
    return answers.Resumed.of(_queue(), failed_meanwhile=failed, retry=retry).response()


def _page(wanted: params.TasksQuery) -> list[Task]:
    """Read a page, and one task more, which tells that another follows."""
    return service.database.list_tasks(
        *(wanted.status, wanted.model, wanted.before, wanted.limit + 1),
        error_code=wanted.error_code,
        words=wanted.q,
    )


def _queue_page(wanted: params.TasksQuery) -> list[Task]:
    if wanted.status != "pending":
        raise Refusal(400, "order=queue is for pending tasks alone: add status=pending")
    after = None
    if wanted.before is not None:
        below, seq = divmod(wanted.before, _PER_PRIORITY)
        after = _HIGHEST - below, seq
    return service.database.list_queue(
        *(wanted.model, after, wanted.limit + 1), error_code=wanted.error_code, words=wanted.q
    )


def _place(task: Task) -> int:
    return (_HIGHEST - task.priority) * _PER_PRIORITY + task.seq


def _retry_failed(code: str | None) -> int:
    """Retry in steps, so that the queue goes on, and none that fails meanwhile again."""
    newest = service.database.list_tasks(None, None, None, 1)
    up_to = newest[0].seq if newest else 0
    models = _allowed_models()
    limit, choose_seed = service.config.max_pending, service.registry.choose_seed
    retry_some = functools.partial(
        service.database.retry_failed, code, up_to, models, _new_id, choose_seed=choose_seed
    )
    retried = 0
    try:
        while some := retry_some(time.time(), limit):
            retried += some
    except QueueFull:
        if not retried:
            raise
    return retried


def _allowed_models() -> list[str]:
    """Return what the models of MODELS are called; none where all are allowed."""
    return [service.registry.find(name).name for name in service.config.models]


def _new_id() -> str:
    return str(uuid.uuid4())


def _accepted(task_id: str, message: str = "Task queued successfully") -> Response:
    g.task = task_id
    answer = answers.Accepted(id=task_id, status="pending", message=message)
    return answer.response({"Location": f"/status/{task_id}"})


def _shown(task: Task) -> answers.Task:
    return _all_shown([task])[0]


def _all_shown(tasks: list[Task]) -> list[answers.Task]:
    """Show tasks; what the pending ones wait for is read at one instant for all."""
    tasks = service.with_image_facts(tasks)
    pending = [task for task in tasks if task.status == "pending"]
    waits = _waits(pending) if pending else {}
    return [_show(task, *waits.get(task.id, (None, None))) for task in tasks]


def _show(task: Task, position: int | None, reason: str | None) -> answers.Task:
    url = f"/images/{quote(task.id, safe='')}"
    image = answers.Image.of(task, url=url) if task.sha256 else None
    base = f"/tasks/{quote(task.id, safe='')}/inputs"
    inputs = [answers.Image.of(i, url=f"{base}/{n}") for n, i in enumerate(task.inputs)]
    return answers.Task.of(
        task, queue_position=position, waiting_for=reason, image=image, inputs=inputs
    )


def _waits(pending: list[Task]) -> dict[str, tuple[int | None, str | None]]:
    """Return the place of each pending task, and the words for what it waits for."""
    config, now, is_low = service.config, time.time(), is_low_on_disk(service.config)
    queue_views = service.database.queue_views(pending, rate_limit(config), now, config.max_per_day)
    return {
        task.id: (
            queue_view.ahead + 1 if queue_view.ahead < POSITIONS else None,
            answers.waiting_for(task, queue_view, config, now, is_low),
        )
        for task, queue_view in zip(pending, queue_views, strict=True)
    }


def _queue() -> answers.Queue:
    now, limit = time.time(), service.config.rate_limit
    queue = service.database.queue(now)
    names = answers.Quota.model_fields
    quota = queue.quota and answers.Quota(**dict(zip(names, queue.quota, strict=True)))
    return answers.Queue.of(
        queue,
        concurrency=service.config.concurrency,
        rate_limit=f"{limit.count}/{limit.seconds:g}" if limit else None,
        oldest_pending_seconds=answers.age(queue.oldest_pending, now),
        held=[answers.Hold.of(hold, until=stamp(hold.until)) for hold in queue.holds],
        quota=quota,
    )


def _conflict(task: Task, why: str) -> Refusal:
    return Refusal(409, f"The task {why}", status=task.status)
