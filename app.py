"""The HTTP face: the application, its routes and its JSON errors."""

import logging
import signal
import sys
import threading
import time
from typing import Any
from urllib.parse import quote

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import (
    HTTPException,
    MethodNotAllowed,
    NotFound,
    RequestEntityTooLarge,
)
from werkzeug.middleware.proxy_fix import ProxyFix

import config as settings
import gauges
import guard
import logs
import openai_images
import openapi
import page
import pictures
import tasks
from chutes import Chutes
from config import Config
from db import Database, DatabaseError, KeyReused, LowOnDisk, QueueFull
from images import Decoder
from worker import Worker

# A client that takes or sends nothing for so long has no thread any more.
_STALL_SECONDS = 60.0
# With this exit code of a worker gunicorn stops, instead of starting it again for ever.
_GUNICORN_GIVES_UP = 4

log = logging.getLogger("app")


def create_app(config: Config) -> Flask:
    """Build the application: open the database, but start no thread.

    The worker is `app.extensions["worker"]`; who serves the application starts it, else
    the first request does, and whoever is done with it calls `close(app)`.
    """
    app = Flask(__name__, static_folder=None)
    # One byte more: Werkzeug ends a chunked body at its limit without a word.
    app.config["MAX_CONTENT_LENGTH"] = tasks.MAX_BODY + 1
    # Not even an empty answer is HTML, and two slashes are not one.
    app.response_class = type("JsonResponse", (Response,), {"default_mimetype": "application/json"})
    app.url_map.merge_slashes = False
    app.json.sort_keys = False
    app.json.ensure_ascii = False
    app.json.compact = True
    signer = guard.Signer(config.database_path)
    database = Database(config.database_path)
    decoder = Decoder()
    worker = Worker(config, database, Chutes(config), decoder)
    app.extensions.update(database=database, worker=worker, decoder=decoder)

    if config.trusted_proxies:
        most = config.trusted_proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=most, x_proto=most, x_host=most)

    @app.before_request
    def begin() -> None:
        g.began = time.monotonic()
        g.request_id = guard.request_id(config)
        if connection := request.environ.get("gunicorn.socket"):
            connection.settimeout(_STALL_SECONDS)
        worker.start()
        # Who has a signed address was given it for this image, and may show it anywhere.
        if request.path == "/healthz" or guard.is_signed(signer):
            return
        guard.check_page(config)
        if request.blueprint != "page":
            g.client = guard.check_key(config)

    @app.after_request
    def note(response: Response) -> Response:
        response.headers["X-Request-ID"] = g.request_id
        _log_request(response, config)
        return response

    @app.errorhandler(HTTPException)
    def refused(error: HTTPException) -> Response:
        answer = jsonify(error=config.scrub(_sentence(error)))
        answer.status_code = error.code
        for name, value in error.get_headers():
            if name != "Content-Type":
                answer.headers[name] = value
        return answer

    @app.errorhandler(DatabaseError)
    def unavailable(error: DatabaseError) -> tuple[Response, int, dict[str, str]]:
        log.error("%s", error)
        advice = "Free some disk space" if error.full else "Look at the log"
        answer = jsonify(error=f"{error}; nothing was changed. {advice}, then try again")
        return answer, 507 if error.full else 503, {"Retry-After": "10"}

    @app.errorhandler(QueueFull)
    def full(error: QueueFull) -> tuple[Response, int, dict[str, str]]:
        sentence = f"at most {config.max_pending} tasks may be pending (MAX_PENDING)"
        answer = jsonify(
            error=f"The queue is full: {sentence}; nothing was stored. Try again later"
        )
        return answer, 429, {"Retry-After": "30"}

    @app.errorhandler(KeyReused)
    def reused(error: KeyReused) -> tuple[Response, int]:
        sentence = "This Idempotency-Key came with another request before"
        return jsonify(error=f"{sentence}; send the same request again, or another key"), 422

    @app.errorhandler(LowOnDisk)
    def low_on_disk(error: LowOnDisk) -> tuple[Response, int, dict[str, str]]:
        sentence = f"Less than {config.min_free_mb} MB are free on the disk (MIN_FREE_MB)"
        answer = jsonify(error=f"{sentence}; nothing was stored. Free some, then try again")
        return answer, 507, {"Retry-After": "60"}

    @app.errorhandler(Exception)
    def defect(error: Exception) -> tuple[Response, int]:
        log.error("a defect of this server", exc_info=error)
        return jsonify(error="A defect of this server; its log tells more"), 500

    app.register_blueprint(tasks.blueprint(config, database, worker))
    app.register_blueprint(openapi.blueprint(config))
    app.register_blueprint(page.blueprint())
    app.register_blueprint(gauges.blueprint(config, database, worker))
    app.register_blueprint(pictures.blueprint(config, database, worker, decoder))
    app.register_blueprint(openai_images.blueprint(config, database, worker, signer))
    return app


def close(app: Flask) -> None:
    """End what `create_app` and the worker began: calls, threads, then the database."""
    app.extensions["worker"].stop()
    app.extensions["decoder"].close()
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
        if fault := settings.listening_fault(config):
            raise settings.ConfigError(fault)
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
    if isinstance(error, NotFound) and error.description == NotFound.description:
        return f"There is no {request.method} {request.path[:200]} on this server"
    if isinstance(error, MethodNotAllowed):
        methods = " or ".join(sorted(set(error.valid_methods) - {"HEAD", "OPTIONS"}))
        return f"{request.method} is not allowed here; use {methods}"
    if isinstance(error, RequestEntityTooLarge):
        return "The body is larger than 1 MiB"
    return error.description or error.name


def _log_request(response: Response, config: Config) -> None:
    log.info(
        "%s %s %s",
        request.method,
        quote(config.scrub(request.path[:200])),
        response.status_code,
        extra={
            "task": g.get("task"),
            "seconds": round(time.monotonic() - g.began, 4),
            "client": request.remote_addr,
            "request_id": g.request_id,
        },
    )
