"""The HTTP face: the application, its routes and its JSON errors."""

import logging
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from flask import Flask, Response, current_app, g, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.middleware.proxy_fix import ProxyFix

import config as settings
import logs
from chutes import Chutes
from config import Config
from db import Database, DatabaseError
from images import Decoder
from inputs import InputFolder
from registry import ModelRegistry
from web import access, errors, health, images, models, openai, openapi, page, tasks
from web.params import MAX_BODY
from web.service import Service, service
from worker import Worker

# With this exit code of a worker gunicorn stops, instead of starting it again for ever.
_GUNICORN_GIVES_UP = 4

log = logging.getLogger("app")


class _JsonResponse(Response):
    default_mimetype = "application/json"  # Not even an empty answer is HTML.


class _Json(DefaultJSONProvider):
    sort_keys = False
    ensure_ascii = False
    compact = True


def create_app(config: Config) -> Flask:
    """Build the application: open the database, but start no thread.

    Its worker is `app.extensions["service"].worker`; who serves the application starts it,
    else the first request does, and whoever is done with it calls `close(app)`.
    """
    app = Flask(__name__, static_folder=None)
    # One byte more: Werkzeug ends a chunked body at its limit without a word.
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY + 1
    app.response_class = _JsonResponse
    app.json = _Json(app)
    app.url_map.merge_slashes = False  # Two slashes are not one.
    signer = access.Signer(config.database_path)
    database = Database(config.database_path)
    decoder = Decoder()
    registry = ModelRegistry(config, database)
    worker = Worker(config, database, Chutes(config), decoder, registry)
    app.extensions["service"] = Service(
        *(config, database, worker, decoder, signer, registry), InputFolder(config.input_dir)
    )
    if config.trusted_proxies:
        count = config.trusted_proxies
        proxied = ProxyFix(app.wsgi_app, x_for=count, x_proto=count, x_host=count)
        app.wsgi_app = proxied  # type: ignore[method-assign]
    app.before_request(_begin)
    app.before_request(_start_worker)
    app.after_request(_note)
    errors.register(app, config)
    for module in (tasks, models, openapi, page, health, images, openai):
        app.register_blueprint(module.bp)
    return app


def close(app: Flask) -> None:
    """End what `create_app` and the worker began: calls, threads, then the database."""
    parts: Service = app.extensions["service"]
    parts.worker.stop()
    parts.decoder.close()
    parts.database.close()


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
        if violation := settings.listening_error(config):
            raise settings.ConfigError(violation)
        app = create_app(config)
    except (settings.ConfigError, DatabaseError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(_GUNICORN_GIVES_UP) from error
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        _drain_when_told_to_stop(app.extensions["service"].worker)
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


def _begin() -> None:
    config = service.config
    g.began = time.monotonic()
    g.request_id = access.request_id(config)
    # Who has a signed address was given it for this image, and may show it anywhere.
    if request.path == "/healthz" or access.is_signed(service.signer):
        return
    access.check_origin(config)
    if openapi.needs_key():
        g.client = access.authenticate(config)


def _start_worker() -> None:
    """Start the worker at the first request, where nobody has: under `flask run`."""
    service.worker.start()
    with suppress(ValueError):  # Another request came first.
        current_app.before_request_funcs[None].remove(_start_worker)


def _note(response: Response) -> Response:
    response.headers["X-Request-ID"] = g.request_id
    _log_request(response, service.config)
    return response


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
