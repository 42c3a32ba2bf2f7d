"""The routes in OpenAI's form: pictures in the answer, for the programs made for its API."""

import base64
import logging
import select
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http import HTTPStatus
from typing import IO, Any

from flask import Blueprint, Response, g, json, jsonify, request

import schema
from config import Config
from db import Database, Task
from guard import Signer
from tasks import check_disk, idempotency_key, json_body, new_task
from worker import Worker, image_path

_PREFIX = "/v1/"
# Base64 makes four characters of three bytes, so that each chunk but the last is whole.
_CHUNK = 48 * 1024
# A client that tells its own patience is answered so long before it ends, in seconds.
_MARGIN = 2.0
# A wait looks as often, in seconds, whether its client is still there.
_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 10

# What the failure of a task is called, by its error_code; any other is this server's.
_FAILURES = {
    "upstream_rejected": (400, "invalid_request_error"),
    "upstream_payment": (429, "insufficient_quota"),
    "canceled": (409, "invalid_request_error"),
    "upstream_timeout": (504, "server_error"),
    "expired": (504, "server_error"),
    "upstream_auth": (502, "server_error"),
    "upstream_error": (502, "server_error"),
    "upstream_truncated": (502, "server_error"),
    "not_an_image": (502, "server_error"),
    "image_too_large": (502, "server_error"),
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

log = logging.getLogger("openai")


def blueprint(config: Config, database: Database, worker: Worker, signer: Signer) -> Blueprint:
    """Build the routes over this database and this worker; `signer` signs the images' addresses."""
    routes = Blueprint("openai_images", __name__)

    @routes.post("/v1/images/generations")
    def generations() -> Response:
        try:
            fields = schema.json_object(json_body())
            wanted = schema.parse_generations(
                fields, config.default_model, config.model_in_url, config.models
            )
        except schema.Invalid as error:
            return _refusal(400, str(error), param=error.field)
        if schema.is_openai_model(fields, config.models):
            log.info("a model of OpenAI's means DEFAULT_MODEL", extra={"asked": fields["model"]})
        until = time.monotonic() + _patience(config)
        with worker.waiters.place() as has_place:
            if not has_place:
                return _no_place(worker)
            new = [new_task(one) for one in wanted.each()]
            ids = database.add(
                new,
                time.time(),
                config.max_pending,
                idempotency_key(f"images {wanted.model_dump_json(exclude=_NOT_OF_THE_TASKS)}"),
                lambda: check_disk(config),
            )
            g.stored = True
            worker.wake()
            tasks = _wait(ids, until)
        answer = _not_all_there(ids, tasks) or _pictures(
            tasks, wanted.response_format or _default_format(fields)
        )
        if ids != [task.id for task in new]:
            answer.headers["Idempotent-Replayed"] = "true"
        return answer

    @routes.get("/v1/models")
    def models() -> Response:
        names = config.models or dict.fromkeys([config.default_model, *database.models()])
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "chutes"} for name in names
        ]
        return jsonify(object="list", data=data)

    @routes.after_app_request
    def in_openai_form(response: Response) -> Response:
        """Give every error below the prefix OpenAI's form, whoever made it."""
        if not request.path.startswith(_PREFIX) or response.status_code < 400:
            return response
        told = response.get_json()
        status = HTTPStatus(response.status_code)
        error = {
            "message": told["error"],
            "type": told.get("type") or _TYPES.get(status) or _type(status),
            "param": told.get("param"),
            "code": told.get("code") or status.phrase.lower().replace(" ", "_"),
        }
        response.set_data(json.dumps({"error": error}) + "\n")
        if g.get("stored"):
            response.headers["X-Should-Retry"] = "false"
        return response

    def _wait(ids: list[str], until: float) -> list[Task | None]:
        """Return the tasks when all have ended, or one in vain, or the wait is over."""
        while True:
            tasks = [database.get(task_id) for task_id in ids]
            unended = [t.id for t in tasks if t and t.status in ("pending", "processing")]
            seconds = until - time.monotonic()
            if not unended or any(map(_is_in_vain, tasks)) or seconds <= 0 or _client_is_gone():
                return tasks
            if not worker.waiters.wait_for_any(unended, min(seconds, _LOOK_SECONDS)):
                return tasks

    def _pictures(tasks: list[Task], form: str) -> Response:
        paths = [image_path(config, task) for task in tasks]
        with ExitStack() as opened:
            try:
                files = [opened.enter_context(path.open("rb")) for path in paths]
            except OSError:
                sentence = "The picture was made, but its file is no longer there"
                return _refusal(410, f"{sentence}: {_told(tasks)}")
            if form == "b64_json":
                return _in_base64(files, opened.pop_all())
        base = config.public_url or request.host_url.rstrip("/")
        urls = [
            {"url": f"{base}/images/{path.name}?sig={signer.sign(task.id)}"}
            for task, path in zip(tasks, paths, strict=True)
        ]
        return jsonify(created=int(time.time()), data=urls)

    return routes


_NOT_OF_THE_TASKS = {"size", "response_format", "stream"}


def _patience(config: Config) -> float:
    """Return the seconds to wait: OPENAI_WAIT, or less where the client says it waits less.

    The official clients say so, the one for Python of a read, the one for JavaScript of all.
    """
    for name in ("X-Stainless-Read-Timeout", "X-Stainless-Timeout"):
        try:
            theirs = float(request.headers.get(name, ""))
        except ValueError:
            continue
        if theirs > 0:
            return min(config.openai_wait, theirs - min(_MARGIN, theirs / 2))
    return config.openai_wait


def _default_format(fields: dict[str, Any]) -> str:
    """Return what OpenAI answers with for such a model, where nothing else is asked for."""
    return "url" if str(fields.get("model")).startswith("dall-e") else "b64_json"


def _client_is_gone() -> bool:
    """Tell whether the client has hung up, so that nobody waits for the answer."""
    connection = request.environ.get("gunicorn.socket")
    if connection is None:
        return False
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


def _is_in_vain(task: Task | None) -> bool:
    return task is None or task.status == "failed"


def _no_place(worker: Worker) -> Response:
    if worker.is_draining:
        answer = _refusal(503, "The server is stopping; nothing was stored. Try again")
    else:
        answer = _refusal(
            429,
            "As many calls wait for their pictures as may (half of THREADS); nothing was "
            "stored. Try again in a few seconds, or use POST /generate, which does not wait",
        )
    answer.headers["Retry-After"] = str(_RETRY_SECONDS)
    return answer


def _not_all_there(ids: list[str], tasks: list[Task | None]) -> Response | None:
    """Return the error where a picture is missing, with the ids of the tasks, or None."""
    for task_id, task in zip(ids, tasks, strict=True):
        if task is None:
            return _refusal(409, f"The task {task_id} was deleted", code="deleted")
        if task.status == "failed":
            status, kind = _FAILURES.get(task.error_code, (500, "server_error"))
            others = [other for other in ids if other != task_id]
            more = f". The others of this call: {', '.join(others)}" if others else ""
            message = f"The task {task_id} has failed: {task.error}{more}"
            return _refusal(status, message, kind=kind, code=task.error_code)
    if all(task.status == "completed" for task in tasks):
        return None
    return _refusal(
        504,
        "The pictures are not there yet, but the tasks go on; see GET /status/<id>, and fetch "
        f"GET /images/<id>: {_told(tasks)}",
        code="timeout",
    )


def _told(tasks: list[Task]) -> str:
    return ", ".join(f"{task.id} ({task.status})" for task in tasks)


def _in_base64(files: list[IO[bytes]], opened: ExitStack) -> Response:
    """Stream the files, which are then closed, with the length told before."""
    before = [f'{{"created":{int(time.time())},"data":[{{"b64_json":"']
    before += ['"},{"b64_json":"'] * (len(files) - 1)
    after = '"}]}\n'
    sizes = [file.seek(0, 2) for file in files]
    length = sum(map(len, before)) + sum((size + 2) // 3 * 4 for size in sizes) + len(after)

    def body() -> Iterator[bytes]:
        for text, file in zip(before, files, strict=True):
            yield text.encode()
            file.seek(0)
            while chunk := file.read(_CHUNK):
                yield base64.b64encode(chunk)
        yield after.encode()

    answer = Response(body(), headers={"Content-Length": str(length)})
    answer.content_type = "application/json"
    answer.call_on_close(opened.close)
    return answer


def _type(status: int) -> str:
    return "server_error" if status >= 500 else "invalid_request_error"


def _refusal(
    status: int,
    message: str,
    param: str | None = None,
    kind: str | None = None,
    code: str | None = None,
) -> Response:
    answer = jsonify(error=message, param=param, type=kind, code=code)
    answer.status_code = status
    return answer
