"""The routes in OpenAI's form: pictures in the answer, for the programs made for its API."""

import functools
import re
import select
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO, Any

from flask import Blueprint, Response, g, request

from images import Base64Stream
from inputs import Arrival
from outputs import whole_image_path
from records import Task
from web import answers, schemas, uploads
from web.errors import Refusal
from web.openapi import operation
from web.params import get_model_or_404, idempotency_key, json_body, patience
from web.service import service

# A wait looks as often, in seconds, whether its client is still there.
_LOOK_SECONDS = 1.0

# The status for the failure of a task, by its error_code; any other is 502.
_FAILURES = {
    "upstream_rejected": 400,
    "upstream_payment": 429,
    "canceled": 409,
    "upstream_timeout": 504,
    "expired": 504,
    "interrupted": 500,
    "storage": 500,
    "internal": 500,
}

_makes_images = functools.partial(
    operation,
    answers.OpenAIImages,
    errors=(409, 410, 429, 500, 502, 504, 507),
    idempotent=True,
)

bp = Blueprint("openai", __name__)


@bp.post("/v1/images/generations")
@_makes_images(body=schemas.Generations)
def generations() -> Response:
    """Make pictures, and wait for them, as OpenAI's API does."""
    until = time.monotonic() + patience()
    find = service.registry.find
    return _make(schemas.parse(schemas.Generations, json_body(), service.config, find), until)


@bp.post("/v1/images/edits")
@_makes_images(body=schemas.Edits)
def edits() -> Response:
    """Edit pictures, and wait for what is made of them, as OpenAI's API does."""
    until = time.monotonic() + patience()
    with ExitStack() as held:
        asked, arrivals = uploads.understand(schemas.Edits, held, _text_of_image)
        return _make(asked, until, arrivals)


@bp.post("/v1/images/variations")
@operation({}, errors=(404,))
def variations() -> Response:
    """Be told that there are no variations here."""
    advice = "use POST /v1/images/edits, with a prompt that says what may vary"
    raise Refusal(404, f"There are no variations here; {advice}")


def _text_of_image(item: Any) -> str:
    url = item.get("image_url") if isinstance(item, dict) else None
    if isinstance(url, str) and url.lower().startswith(("data:", "http:", "https:")):
        return url
    raise schemas.Invalid('must be {"image_url": "data:image/png;base64,..."}: no file_id is known')


def _make(asked: schemas.Request, until: float, arrivals: Sequence[Arrival] = ()) -> Response:
    """Add the tasks, wait for them, and answer with their pictures."""
    wants_url = getattr(asked.body, "response_format", None) == "url"
    base = _public_base() if wants_url else None
    with ExitStack() as held:
        _check_slot(held.enter_context(service.worker.waiters.slot()))
        key = idempotency_key(asked.canonical_input())
        ids = g.stored = service.add(asked.new_tasks(), asked.model, key, arrivals)
        answer = _images(_completed(ids, _wait(ids, until)), base, held)
        # A slow reader keeps its slot and the files, as its thread does.
        answer.call_on_close(held.pop_all().close)
    return answer


@bp.get("/v1/models")
@operation(answers.OpenAIModels, id="openaiModels")
def models() -> Response:
    """List the models, as OpenAI's API does."""
    data = [_model(model.name) for model in service.registry.known()]
    return answers.OpenAIModels(object="list", data=data).response()


@bp.get("/v1/models/<path:name>")
@operation(answers.OpenAIModel, id="openaiModel")
def model(name: str) -> Response:
    """Look at one of the models, as OpenAI's API does."""
    try:
        return _model(get_model_or_404(name).name).response()
    except Refusal as refusal:
        raise Refusal(404, str(refusal), param="model", code="model_not_found") from refusal


def _model(name: str) -> answers.OpenAIModel:
    return answers.OpenAIModel(id=name, object="model", created=0, owned_by="chutes")


def _wait(ids: list[str], until: float) -> list[Task | None]:
    """Return the tasks when all have ended, or one in vain, or the wait is over."""
    may_go_on = True
    while True:
        tasks = [service.database.get(task_id) for task_id in ids]
        unfinished = [t.id for t in tasks if t and t.status in ("pending", "processing")]
        is_in_vain = any(task is None or task.status == "failed" for task in tasks)
        seconds = until - time.monotonic()
        if not unfinished or is_in_vain or seconds <= 0 or not may_go_on:
            return tasks
        is_there = service.worker.waiters.wait_for_any(unfinished, min(seconds, _LOOK_SECONDS))
        may_go_on = is_there and not _client_is_gone()


def _images(tasks: list[Task], base: str | None, held: ExitStack) -> Response:
    """Answer with the images, held open, as addresses below the base; in base64 without one."""
    found = (whole_image_path(service.config, task) for task in tasks)
    paths = [path for path in found if path]
    try:
        files = [held.enter_context(path.open("rb")) for path in paths]
    except OSError:
        files = []
    if len(files) < len(tasks):
        fact = "The picture was made, but its file is no longer there, or no longer whole"
        raise Refusal(410, fact)
    if base is None:
        return _in_base64(files)
    data = [
        answers.OpenAIImage(url=f"{base}/images/{path.name}?sig={service.signer.sign(task.id)}")
        for task, path in zip(tasks, paths, strict=True)
    ]
    return answers.OpenAIImages(created=int(time.time()), data=data).response()


def _public_base() -> str:
    """Return the address of this server as its client knows it, or refuse it."""
    host = request.headers.get("Host", "")
    if service.config.public_url:
        return service.config.public_url
    if not re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?", host):
        sentence = "The Host of this request makes no address for a picture"
        raise Refusal(400, f"{sentence}; set PUBLIC_URL")
    return f"{request.scheme}://{host}"


def _client_is_gone() -> bool:
    """Return whether the client has hung up, so that nobody waits for the answer."""
    connection = request.environ.get("gunicorn.socket")
    if connection is None:
        return False
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


def _check_slot(is_free: bool) -> None:
    """Refuse a call that nobody could wait for; nothing is stored."""
    headers = {"Retry-After": "10"}
    if service.worker.is_draining:
        raise Refusal(503, "The server is stopping; nothing was stored. Try again", headers)
    if not is_free:
        fact = "As many calls wait for their pictures as may (half of THREADS)"
        advice = "Try again in a few seconds, or use POST /generate, which does not wait"
        raise Refusal(429, f"{fact}; nothing was stored. {advice}", headers)


def _completed(ids: list[str], tasks: list[Task | None]) -> list[Task]:
    """Return the tasks, all completed, or refuse what was asked for."""
    for task_id, task in zip(ids, tasks, strict=True):
        if task is None:
            raise Refusal(409, f"The task {task_id} was deleted", code="deleted")
        if task.status == "failed":
            code, status = task.error_code, _FAILURES.get(task.error_code or "", 502)
            kind = "insufficient_quota" if code == "upstream_payment" else None
            sentence = f"The task {task_id} has failed: {task.error}"
            raise Refusal(status, sentence, type=kind, code=code)
    completed = [task for task in tasks if task and task.status == "completed"]
    if len(completed) < len(ids):
        sentence = "The pictures are not there yet; look at GET /status/<id>"
        raise Refusal(504, f"{sentence}, and fetch GET /images/<id>", code="timeout")
    return completed


def _in_base64(files: Sequence[IO[bytes]]) -> Response:
    """Stream the files, with the length known before."""
    before = f'{{"created":{int(time.time())},"data":[{{"b64_json":"'
    between = ['"},{"b64_json":"'] * (len(files) - 1)
    stream = Base64Stream([before, *between, '"}]}\n'], files)
    headers = {"Content-Length": str(len(stream))}
    return Response(stream, headers=headers, content_type="application/json")
