"""What a request says beside its fields: its body, its query and its headers, as values."""

import functools
import hashlib
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar, get_origin

from flask import g, request
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from werkzeug.exceptions import RequestEntityTooLarge

from models import Model
from records import ERROR_CODES, STATUSES, ErrorCode, IdempotencyKey, Status, Task
from web.errors import Refusal
from web.service import service

MAX_BODY = 1024 * 1024
_CHUNK = 65536
# curl declares a form for `-d`, whatever it sends.
_FORM = "application/x-www-form-urlencoded"
# A client that tells its own patience is answered so long before it ends, in seconds.
_MARGIN = 2.0
# The official client for JavaScript tells whole seconds: a patience of 0 is less than one.
_MIN_PATIENCE = 0.5


def _digits(text: str) -> int:
    """Read ASCII digits alone: pydantic takes "+1", " 1" and "1.0", too."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError
    return int(text)


def _integer(minimum: int, maximum: int, rule: str = "") -> tuple[Any, ...]:
    rule = rule or f"an integer from {minimum} to {maximum}"
    return Field(ge=minimum, le=maximum, description=rule), BeforeValidator(_digits)


def _one_of(words: tuple[str, ...]) -> Any:
    return Field(description=f"one of {', '.join(words)}")


class Wait(BaseModel):
    """How long an answer may wait for the end of the task; other parameters are ignored."""

    wait: Annotated[int, *_integer(1, 60, "an integer from 1 to 60, in seconds")] = 0


class ImageQuery(Wait):
    """The query of an image."""

    sig: Annotated[str, Field(description="in place of a key")] = ""


class ArchiveQuery(BaseModel, extra="forbid"):
    """Whose images to archive, and for who has no key, the signature of each in the same order."""

    id: Annotated[
        list[str], Field(min_length=1, max_length=100, description="a task's id, 1 to 100 times")
    ]
    sig: Annotated[list[str], Field(description="in place of a key: one for each id")] = []


class TasksQuery(BaseModel, extra="forbid"):
    """Which tasks to list; an unknown parameter would widen the list in silence."""

    status: Annotated[Status | None, _one_of(STATUSES)] = None
    model: str | None = None
    error_code: Annotated[ErrorCode | None, _one_of(ERROR_CODES)] = None
    q: Annotated[
        str | None,
        Field(pattern=r"[^\s\x00]", max_length=1000, description="words of the prompt"),
    ] = None
    order: Annotated[
        Literal["queue"] | None, Field(description="queue, as they are taken, with status=pending")
    ] = None
    limit: Annotated[int, *_integer(1, 200)] = 50
    before: Annotated[int | None, *_integer(1, 10**18 - 1, "as `next` gave it")] = None


class QueueQuery(BaseModel, extra="forbid"):
    """How many of the tasks that are next to list beside the queue, and all that run."""

    tasks: Annotated[int | None, *_integer(1, 200)] = None


class CancelQuery(BaseModel, extra="forbid"):
    """Which of the pending tasks to cancel; all, without a model."""

    model: Annotated[str | None, Field(min_length=1, description="a model's name")] = None


class RetryQuery(BaseModel, extra="forbid"):
    """Which of the tasks that failed to retry; without a code all but the canceled."""

    error_code: Annotated[ErrorCode | None, _one_of(ERROR_CODES)] = None


_Model = TypeVar("_Model", bound=BaseModel)


def json_body() -> bytes:
    """Return the body, which is declared as JSON, as a form or not at all, or refuse it."""
    check_declared()
    return b"".join(body_chunks(MAX_BODY))


def check_declared(*others: str) -> None:
    """Refuse a body that is declared as something other than JSON or one of these types."""
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        advice = "send it as it is, without Content-Encoding"
        raise Refusal(415, f"The body is encoded as {encoding[:100]}; {advice}")
    declared = request.mimetype
    if declared and declared not in (_FORM, *others) and not request.is_json:
        advice = " or ".join(["send JSON, with Content-Type: application/json", *others])
        raise Refusal(415, f"The body is declared as {declared[:100]}; {advice}")


def body_chunks(maximum: int) -> Iterator[bytes]:
    """Yield the body as it comes, at most so many bytes of it, or refuse it."""
    # One byte more: Werkzeug ends a chunked body at its limit without a word.
    request.max_content_length = maximum + 1
    size = 0
    try:
        while chunk := request.stream.read(_CHUNK):
            size += len(chunk)
            if size > maximum:
                raise RequestEntityTooLarge
            yield chunk
    except RequestEntityTooLarge:
        mib = maximum // 2**20
        raise Refusal(413, f"The body is larger than {mib} MiB") from None
    except Exception as error:  # Whatever the server in front raises for a broken body.
        raise Refusal(400, "The body could not be read to its end") from error


def idempotency_key(canonical_input: str) -> IdempotencyKey | None:
    """Return the key that came with this input, or None, or refuse it with 400."""
    text = request.headers.get("Idempotency-Key")
    if text is None:
        return None
    if not re.fullmatch(r"[\x20-\x7e]{1,255}", text):
        raise Refusal(400, "Idempotency-Key must be 1 to 255 printable ASCII characters")
    fingerprint = hashlib.sha256(canonical_input.encode()).hexdigest()
    return IdempotencyKey(g.client, text, fingerprint)


def get_task_or_404(task_id: str, wait: int = 0) -> Task:
    """Return the task, after so many seconds of waiting for its end, or refuse it with 404."""
    g.task = task_id[:100]
    g.waited = bool(wait) and service.worker.waiters.wait(task_id, wait)
    task = service.database.get(task_id)
    if task is None:
        raise Refusal(404, "Task not found")
    return task


def get_model_or_404(name: str) -> Model:
    """Return a model that may be asked for, or refuse it with 404 and the nearest names."""
    if model := service.registry.get(name):
        return model
    near = " or ".join(service.registry.nearest(name))
    advice = f"did you mean {near}?" if near else "GET /models lists all"
    raise Refusal(404, f"There is no model {name[:100]}; {advice}")


def query(model: type[_Model]) -> _Model:
    """Return the parameters of the query as the model has them, or refuse it with 400."""
    given = request.args.to_dict(flat=False)
    lists = _lists_of(model)
    try:
        return model.model_validate({n: v if n in lists else v[0] for n, v in given.items()})
    except ValidationError as error:
        violations = error.errors(include_url=False)
    unknown = [found for found in violations if found["type"] == "extra_forbidden"]
    name = str((unknown or violations)[0]["loc"][0])
    if unknown:
        there_are = ", ".join(model.model_fields)
        raise Refusal(400, f"{name[:50]!a} is not a parameter here; there are {there_are}")
    raise Refusal(400, f"{name} must be {model.model_fields[name].description}")


@functools.cache
def _lists_of(model: type[BaseModel]) -> frozenset[str]:
    fields = model.model_fields.items()
    return frozenset(name for name, field in fields if get_origin(field.annotation) is list)


def patience() -> float:
    """Return the seconds to wait: OPENAI_WAIT, or less where the client says it waits less.

    The official clients say so in a header, the first one for Python, the other for JavaScript.
    """
    for name in ("X-Stainless-Read-Timeout", "X-Stainless-Timeout"):
        theirs = request.headers.get(name, type=float)
        if theirs is not None and theirs >= 0:
            theirs = max(theirs, _MIN_PATIENCE)
            return min(service.config.openai_wait, theirs - min(_MARGIN, theirs / 2))
    return service.config.openai_wait
