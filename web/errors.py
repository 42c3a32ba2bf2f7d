"""What goes wrong, as a status and JSON: HTTP's own errors, refusals, faults and defects."""

import logging

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import (
    HTTPException,
    MethodNotAllowed,
    NotFound,
    RequestEntityTooLarge,
)

from db import DatabaseError
from records import KeyReused, LowOnDisk, QueueFull
from web.service import service

log = logging.getLogger("app")


def register(app: Flask) -> None:
    """Have the application answer with these."""
    app.register_error_handler(HTTPException, _refused)
    app.register_error_handler(DatabaseError, _unavailable)
    app.register_error_handler(QueueFull, _full)
    app.register_error_handler(KeyReused, _reused)
    app.register_error_handler(LowOnDisk, _low_on_disk)
    app.register_error_handler(Exception, _defect)


def _refused(error: HTTPException) -> Response:
    answer = jsonify(error=service.config.scrub(_sentence(error)))
    answer.status_code = error.code
    for name, value in error.get_headers():
        if name != "Content-Type":
            answer.headers[name] = value
    return answer


def _unavailable(error: DatabaseError) -> tuple[Response, int, dict[str, str]]:
    log.error("%s", error)
    advice = "Free some disk space" if error.full else "Look at the log"
    answer = jsonify(error=f"{error}; nothing was changed. {advice}, then try again")
    return answer, 507 if error.full else 503, {"Retry-After": "10"}


def _full(error: QueueFull) -> tuple[Response, int, dict[str, str]]:
    sentence = f"at most {service.config.max_pending} tasks may be pending (MAX_PENDING)"
    answer = jsonify(error=f"The queue is full: {sentence}; nothing was stored. Try again later")
    return answer, 429, {"Retry-After": "30"}


def _reused(error: KeyReused) -> tuple[Response, int]:
    sentence = "This Idempotency-Key came with another request before"
    return jsonify(error=f"{sentence}; send the same request again, or another key"), 422


def _low_on_disk(error: LowOnDisk) -> tuple[Response, int, dict[str, str]]:
    sentence = f"Less than {service.config.min_free_mb} MB are free on the disk (MIN_FREE_MB)"
    answer = jsonify(error=f"{sentence}; nothing was stored. Free some, then try again")
    return answer, 507, {"Retry-After": "60"}


def _defect(error: Exception) -> tuple[Response, int]:
    log.error("internal server error", exc_info=error)
    return jsonify(error="Internal server error; see the server log"), 500


def _sentence(error: HTTPException) -> str:
    if isinstance(error, NotFound) and error.description == NotFound.description:
        return f"There is no {request.method} {request.path[:200]} on this server"
    if isinstance(error, MethodNotAllowed):
        methods = " or ".join(sorted(set(error.valid_methods) - {"HEAD", "OPTIONS"}))
        return f"{request.method} is not allowed here; use {methods}"
    if isinstance(error, RequestEntityTooLarge):
        return "The body is larger than 1 MiB"
    return error.description or error.name
