"""The routes in OpenAI's form: pictures in the answer, for the programs made for its API."""

import base64
import logging
import re
import select
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http import HTTPStatus
from typing import IO

from flask import Blueprint, Response, abort, g, jsonify, request

from outputs import image_path, is_low_on_disk
from records import Task
from web import answers, schemas
from web.params import idempotency_key, json_body, patience
from web.service import service

_PREFIX = "/v1/"
# Base64 makes four characters of three bytes, so that each chunk but the last is whole.
_CHUNK = 48 * 1024
# A wait looks as often, in seconds, whether its client is still there.
_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 10
# What makes no difference to the tasks, or is in their width and height.
_NOT_OF_THE_TASKS = {"size", "response_format", "stream"}

# What the failure of a task is, by its error_code; any other is that of a server behind this one.
_FAILURES = {
    "upstream_rejected": (400, "invalid_request_error"),
    "upstream_payment": (429, "insufficient_quota"),
    "canceled": (409, "invalid_request_error"),
    "upstream_timeout": (504, "server_error"),
    "expired": (504, "server_error"),
    "interrupted": (500, "server_error"),
    "storage": (500, "server_error"),
    "internal": (500, "server_error"),
}
_ANOTHER_FAILURE = (502, "server_error")
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

log = logging.getLogger("openai")


bp = Blueprint("openai", __name__)


@bp.post("/v1/images/generations")
def generations() -> Response:
    try:
        wanted = _wanted()
    except schemas.Invalid as error:
        return _error(400, str(error), param=error.field)
    base = _public_base() if wanted.response_format == "url" else None
    until = time.monotonic() + patience()
    with ExitStack() as held:
        has_slot = held.enter_context(service.worker.waiters.slot())
        if service.worker.is_draining or not has_slot:
            return _no_slot()
        ids, is_replay = _store(wanted)
        tasks = _wait(ids, until)
        answer = _fault(ids, tasks) or _pictures(tasks, base)
        # A slow reader keeps its place, as its thread does.
        answer.call_on_close(held.pop_all().close)
    if is_replay:
        answer.headers["Idempotent-Replayed"] = "true"
    return answer


@bp.get("/v1/models")
def models() -> Response:
    config, database = service.config, service.database
    names = config.models or dict.fromkeys([config.default_model, *database.models()])
    data = [
        answers.OpenAIModel(id=name, object="model", created=0, owned_by="chutes") for name in names
    ]
    return answers.OpenAIModels(object="list", data=data).response()


@bp.after_app_request
def in_openai_form(response: Response) -> Response:
    """Give every error below the prefix OpenAI's form, whoever made it.

    Once tasks are stored it names them, and tells the client not to repeat the call.
    """
    if not request.path.startswith(_PREFIX) or response.status_code < 400:
        return response
    told = response.get_json()
    message = service.config.scrub(told["error"])
    stored = g.get("stored", [])
    if stored:
        response.headers["X-Should-Retry"] = "false"
        response.headers.pop("Retry-After", None)
        if not all(task_id in message for task_id in stored):
            message += f". The tasks of this call are stored, and go on: {', '.join(stored)}"
    status = HTTPStatus(response.status_code)
    error = {
        "message": message,
        "type": told.get("type") or _TYPES.get(status) or _type(status),
        "param": told.get("param"),
        "code": told.get("code") or status.phrase.lower().replace(" ", "_"),
    }
    response.set_data(jsonify(error=error).get_data())
    return response


def _store(wanted: schemas.Generations) -> tuple[list[str], bool]:
    """Add the tasks; return their ids, and whether those of an earlier call are meant."""
    new = [schemas.new_task(one) for one in wanted.each()]
    ids = service.database.add(
        new,
        time.time(),
        service.config.max_pending,
        idempotency_key(wanted.model_dump_json(exclude=_NOT_OF_THE_TASKS)),
        is_low_on_disk(service.config),
    )
    g.stored = ids
    service.worker.wake()
    return ids, ids != [task.id for task in new]


def _wait(ids: list[str], until: float) -> list[Task | None]:
    """Return the tasks when all have ended, or one in vain, or the wait is over."""
    may_go_on = True
    while True:
        tasks = [service.database.get(task_id) for task_id in ids]
        unfinished = [t.id for t in tasks if t and t.status in ("pending", "processing")]
        seconds = until - time.monotonic()
        if not unfinished or any(map(_is_in_vain, tasks)) or seconds <= 0 or not may_go_on:
            return tasks
        is_there = service.worker.waiters.wait_for_any(unfinished, min(seconds, _LOOK_SECONDS))
        may_go_on = is_there and not _client_is_gone()


def _pictures(tasks: list[Task], base: str | None) -> Response:
    """Answer with the pictures, as addresses below the base; in base64 without one."""
    paths = [image_path(service.config, task) for task in tasks]
    with ExitStack() as opened:
        try:
            files = [opened.enter_context(path.open("rb")) for path in paths]
        except OSError:
            return _error(410, "The picture was made, but its file is no longer there")
        if base is None:
            return _in_base64(files, opened.pop_all())
    data = [
        answers.OpenAIImage(url=f"{base}/images/{path.name}?sig={service.signer.sign(task.id)}")
        for task, path in zip(tasks, paths, strict=True)
    ]
    return answers.OpenAIImages(created=int(time.time()), data=data).response()


def _wanted() -> schemas.Generations:
    """Return what the request asks for, its response_format filled in, or raise Invalid."""
    fields = schemas.json_object(json_body())
    asked = fields.get("model")
    if schemas.is_openai_model(asked, service.config.models):
        log.info("a model of OpenAI's means DEFAULT_MODEL", extra={"asked": asked})
    if fields.get("response_format") is None:
        fields["response_format"] = "url" if str(asked).startswith("dall-e") else "b64_json"
    return schemas.parse_generations(
        fields, service.config.default_model, service.config.model_in_url, service.config.models
    )


def _public_base() -> str:
    """Return the address of this server as its client knows it, or answer 400."""
    host = request.headers.get("Host", "")
    if service.config.public_url:
        return service.config.public_url
    if not re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?", host):
        abort(400, "The Host of this request makes no address for a picture; set PUBLIC_URL")
    return f"{request.scheme}://{host}"


def _client_is_gone() -> bool:
    """Return whether the client has hung up, so that nobody waits for the answer."""
    connection = request.environ.get("gunicorn.socket")
    if connection is None:
        return False
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


def _is_in_vain(task: Task | None) -> bool:
    return task is None or task.status == "failed"


def _no_slot() -> Response:
    if service.worker.is_draining:
        answer = _error(503, "The server is stopping; nothing was stored. Try again")
    else:
        answer = _error(
            429,
            "As many calls wait for their pictures as may (half of THREADS); nothing was "
            "stored. Try again in a few seconds, or use POST /generate, which does not wait",
        )
    answer.headers["Retry-After"] = str(_RETRY_SECONDS)
    return answer


def _fault(ids: list[str], tasks: list[Task | None]) -> Response | None:
    """Return the error where a picture is missing, or None."""
    for task_id, task in zip(ids, tasks, strict=True):
        if task is None:
            return _error(409, f"The task {task_id} was deleted", code="deleted")
        if task.status == "failed":
            status, kind = _FAILURES.get(task.error_code, _ANOTHER_FAILURE)
            message = f"The task {task_id} has failed: {task.error}"
            return _error(status, message, kind=kind, code=task.error_code)
    if all(task.status == "completed" for task in tasks):
        return None
    return _error(
        504,
        "The pictures are not there yet; look at GET /status/<id>, and fetch GET /images/<id>",
        code="timeout",
    )


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


def _error(
    status: int,
    message: str,
    param: str | None = None,
    kind: str | None = None,
    code: str | None = None,
) -> Response:
    """Answer with an error, which gets OpenAI's form as all others do."""
    answer = jsonify(error=message, param=param, type=kind, code=code)
    answer.status_code = status
    return answer
