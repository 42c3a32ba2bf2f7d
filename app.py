"""The HTTP face: the application, its routes and its JSON errors."""

import logging
import signal
import sys
import threading
import time
import uuid
from typing import Any
from urllib.parse import quote

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import (
    BadRequest,
    HTTPException,
    MethodNotAllowed,
    NotFound,
    RequestEntityTooLarge,
    UnsupportedMediaType,
)

import config as settings
import logs
import schema
from chutes import Chutes
from config import Config
from db import POSITIONS, Database, DatabaseError, Task
from worker import Worker, rate_limit, waiting_for

MAX_BODY = 1024 * 1024
# curl declares a form for `-d`, whatever it sends.
_FORM = "application/x-www-form-urlencoded"
# With this exit code of a worker gunicorn stops, instead of starting it again for ever.
_GUNICORN_GIVES_UP = 4

log = logging.getLogger("app")


def create_app(config: Config) -> Flask:
    """Build the application: open the database, make the folder, but start no thread.

    The worker is `app.extensions["worker"]`; who serves the application starts it, else
    the first request does, and whoever is done with it calls `close(app)`.
    """
    app = Flask(__name__, static_folder=None)
    # One byte more: Werkzeug ends a chunked body at its limit without a word.
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY + 1
    app.json.sort_keys = False
    app.json.ensure_ascii = False
    app.json.compact = True
    config.output_dir.mkdir(parents=True, exist_ok=True)
    database = Database(config.database_path)
    worker = Worker(config, database, Chutes(config))
    app.extensions.update(database=database, worker=worker)

    @app.before_request
    def begin() -> None:
        g.began = time.monotonic()
        worker.start()

    @app.after_request
    def note(response: Response) -> Response:
        _log_request(response)
        return response

    @app.errorhandler(HTTPException)
    def refused(error: HTTPException) -> Response:
        answer = jsonify(error=_sentence(error))
        answer.status_code = error.code
        if isinstance(error, MethodNotAllowed):
            answer.headers["Allow"] = ", ".join(sorted(error.valid_methods))
        return answer

    @app.errorhandler(DatabaseError)
    def unavailable(error: DatabaseError) -> tuple[Response, int, dict[str, str]]:
        log.error("%s", error)
        advice = "Free some disk space" if error.full else "Look at the log"
        answer = jsonify(error=f"{error}; nothing was changed. {advice}, then try again")
        return answer, 507 if error.full else 503, {"Retry-After": "10"}

    @app.errorhandler(Exception)
    def defect(error: Exception) -> tuple[Response, int]:
        log.error("a defect of this server", exc_info=error)
        return jsonify(error="A defect of this server; its log tells more"), 500

    @app.post("/generate")
    def generate() -> tuple[Response, int, dict[str, str]]:
        try:
            wanted = schema.parse_generate(_json_body(), config.default_model, config.model_in_url)
        except schema.Invalid as error:
            return jsonify(error=str(error)), 400, {}
        task_id = g.task = str(uuid.uuid4())
        database.add(
            task_id, wanted.prompt, wanted.model, wanted.params(), wanted.priority, time.time()
        )
        worker.wake()
        answer = jsonify(id=task_id, status="pending", message="Task queued successfully")
        return answer, 202, {"Location": f"/status/{task_id}"}

    @app.get("/status/<task_id>")
    def status(task_id: str) -> Response | tuple[Response, int]:
        task = database.get(task_id)
        if task is None:
            return jsonify(error="Task not found"), 404
        g.task = task.id
        return jsonify(_task_json(task, config, database))

    return app


def close(app: Flask) -> None:
    """End what `create_app` and the worker began: calls, threads, then the database."""
    app.extensions["worker"].stop()
    app.extensions["database"].close()


def __getattr__(name: str) -> Flask:
    """Build `app` from the environment when it is first asked for: `gunicorn app:app`."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    app = globals()["app"] = _from_environment()
    return app


def _from_environment() -> Flask:
    try:
        config = settings.in_force()
        logs.to_stderr(config.log_format, config.scrub)
        app = create_app(config)
    except (settings.ConfigError, DatabaseError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(_GUNICORN_GIVES_UP) from error
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        _drain_when_told_to_stop(app.extensions["worker"])
    return app


def _drain_when_told_to_stop(worker: Worker) -> None:
    """End `flask run` as gunicorn ends: with SHUTDOWN_GRACE for the calls under way."""
    if threading.current_thread() is not threading.main_thread():
        return

    def stop(number: int, frame: Any) -> None:
        worker.drain()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _sentence(error: HTTPException) -> str:
    if isinstance(error, NotFound):
        return f"There is no {request.method} {request.path[:200]} on this server"
    if isinstance(error, MethodNotAllowed):
        return f"{request.method} is not allowed here; use {' or '.join(error.valid_methods)}"
    if isinstance(error, RequestEntityTooLarge):
        return "The body is larger than 1 MiB"
    return error.description or error.name


def _log_request(response: Response) -> None:
    log.info(
        "%s %s %s",
        request.method,
        quote(request.path[:200]),
        response.status_code,
        extra={
            "task": g.get("task"),
            "seconds": round(time.monotonic() - g.began, 4),
            "client": request.remote_addr,
        },
    )


def _json_body() -> bytes:
    declared = request.mimetype
    if declared and declared != _FORM and not request.is_json:
        raise UnsupportedMediaType(
            f"The body is declared as {declared[:100]}; "
            "send JSON, with Content-Type: application/json"
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


def _task_json(task: Task, config: Config, database: Database) -> dict[str, Any]:
    position = reason = None
    if task.status == "pending":
        now = time.time()
        standing = database.standing(task, rate_limit(config), now)
        position = standing.ahead + 1 if standing.ahead < POSITIONS else None
        reason = waiting_for(task, standing, config, now)
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
