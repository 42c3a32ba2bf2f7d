"""What goes wrong: the refusal that any route raises, what every exception tells, and its form."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound

from config import Config
from db import DatabaseError
from outputs import StorageError
from records import KeyReused, LowOnDisk, QueueFull
from web.answers import Error, OpenAIError, OpenAIErrorBody
from web.schemas import Invalid

OPENAI_PREFIX = "/v1/"
# What of a refusal is in OpenAI's form, and what it is where the refusal does not say.
_OPENAI_KEYS = {"type", "param", "code"}
_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

log = logging.getLogger("app")


class Refusal(Exception):
    """A request that is refused: the status, what is wrong and what to do, and further keys.

    Of the keys, `type`, `param` and `code` are in OpenAI's form alone, the others never there.
    """

    def __init__(
        self, status: int, message: str, headers: Mapping[str, str] | None = None, /, **keys: Any
    ):
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.keys = keys


def register(app: Flask, config: Config) -> None:
    """Have the application answer each exception with JSON, in the form of its path."""

    def answer(error: Exception) -> Response:
        refusal = _refusal(error, config)
        message = config.scrub(str(refusal))
        if request.path.startswith(OPENAI_PREFIX):
            return _in_openai_form(refusal, message)
        keys = {name: v for name, v in refusal.keys.items() if name not in _OPENAI_KEYS}
        return Error(error=message, **keys).response(refusal.headers, refusal.status)

    app.register_error_handler(Exception, answer)


def _refusal(error: Exception, config: Config) -> Refusal:
    match error:
        case Refusal():
            return error
        case Invalid():
            return Refusal(400, str(error), param=error.field)
        case KeyReused():
            sentence = "This Idempotency-Key came with another request before"
            return Refusal(422, f"{sentence}; send the same request again, or another key")
        case QueueFull():
            sentence = f"at most {config.max_pending} tasks may be pending (MAX_PENDING)"
            advice = "nothing was stored. Try again later"
            return Refusal(429, f"The queue is full: {sentence}; {advice}", {"Retry-After": "30"})
        case LowOnDisk():
            sentence = f"Less than {config.min_free_mb} MB are free on the disk (MIN_FREE_MB)"
            advice = "nothing was stored. Free some, then try again"
            return Refusal(507, f"{sentence}; {advice}", {"Retry-After": "60"})
        case StorageError(code=code):
            log.error("%s", error)
            sentence = f"{error.headline}; nothing was stored. Mend that, then try again"
            return Refusal(507 if code == "no_room" else 503, sentence, {"Retry-After": "60"})
        case DatabaseError():
            log.error("%s", error)
            advice = "Free some disk space" if error.full else "Look at the log"
            sentence = f"{error}; nothing was changed"
            if not error.is_final:
                sentence += f". {advice}, then try again"
            return Refusal(507 if error.full else 503, sentence, {"Retry-After": "10"})
        case HTTPException(code=int(status)):
            headers = {name: v for name, v in error.get_headers() if name != "Content-Type"}
            return Refusal(status, _sentence(error), headers)
    log.error("internal server error", exc_info=error)
    return Refusal(500, "Internal server error; see the server log")


def _sentence(error: HTTPException) -> str:
    match error:
        case NotFound():
            return f"There is no {request.method} {request.path[:200]} on this server"
        case MethodNotAllowed():
            methods = sorted(set(error.valid_methods or ()) - {"HEAD", "OPTIONS"})
            return f"{request.method} is not allowed here; use {' or '.join(methods)}"
    return error.description or error.name


def _in_openai_form(refusal: Refusal, message: str) -> Response:
    """Answer as OpenAI does; once tasks are stored, name them, and ask for no repetition."""
    status, headers = HTTPStatus(refusal.status), refusal.headers
    if stored := g.get("stored"):
        headers.pop("Retry-After", None)
        headers["X-Should-Retry"] = "false"
        if not all(task_id in message for task_id in stored):
            message += f". The tasks of this call are stored, and go on: {', '.join(stored)}"
    usual = "server_error" if status >= 500 else "invalid_request_error"
    body = OpenAIErrorBody(
        message=message,
        type=refusal.keys.get("type") or _OPENAI_TYPES.get(status, usual),
        param=refusal.keys.get("param"),
        code=refusal.keys.get("code") or status.phrase.lower().replace(" ", "_"),
    )
    return OpenAIError(error=body).response(headers, status)
