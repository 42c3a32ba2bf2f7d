"""How gunicorn serves the application: `gunicorn` in this folder needs nothing more."""

import functools
import gc
import logging
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

from gunicorn import glogging
from gunicorn.arbiter import Arbiter
from gunicorn.config import Config

import config as settings
import logs
from app import close
from db import Database, DatabaseError


def _check_database(config: settings.Config) -> None:
    """Try the database before there are workers, which would each fail for themselves."""
    try:
        Database(config.database_path).close()
    except DatabaseError as error:
        raise settings.ConfigError(f"DATABASE_PATH={config.database_path}: {error}") from error


try:
    _config = settings.reload(_check_database)
except settings.ConfigError as error:
    raise SystemExit(str(error)) from error

_host = f"[{_config.host}]" if ":" in _config.host else _config.host

wsgi_app = "app:app"
bind = [f"{_host}:{_config.port}"]
workers = _config.workers
worker_class = "gthread.Worker"
threads = _config.threads
# Of the usual 1,024 open files some must be left for calls, images and the database.
worker_connections = 800
# The address of an archive names up to 100 tasks, each with its signature.
limit_request_line = 8190
# The worker process drains the queue in worker_exit, where it gives no sign of life:
# neither the master's patience nor its heartbeat may end before the grace does.
graceful_timeout = math.ceil(_config.shutdown_grace) + 10
timeout = graceful_timeout + 20
# Background calls do not survive a worker that is recycled. All code is loaded before the fork,
# by the import of `close`, but no application is built: threads and SQLite do not survive one.
max_requests = 0
preload_app = False
control_socket_disable = True
# X-Forwarded-* is believed as TRUSTED_PROXIES says, and by nobody before that.
forwarded_allow_ips = ""
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None

_STOPS = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}


class logger_class(glogging.Logger):
    """Send gunicorn's lines and ours through one format, to wherever gunicorn's go."""

    def setup(self, cfg: Config) -> None:
        super().setup(cfg)
        for handler in self.error_log.handlers:
            handler.setFormatter(logs.formatter(_config.log_format, _config.scrub))
        logging.root.handlers = list(self.error_log.handlers)
        logging.root.setLevel(self.error_log.level)

    def exception(self, msg: object, *args: Any, **kwargs: Any) -> None:
        """Log a traceback, but not where a client is at fault."""
        if isinstance(sys.exc_info()[1], TimeoutError | BlockingIOError):
            self.info("client timed out")
        else:
            super().exception(msg, *args, **kwargs)


def on_starting(server: Arbiter) -> None:
    """Stop at once where an address is taken, which gunicorn would try again for seconds."""
    # The master hears the signals to stop again, as soon as it has forked.
    unblock = functools.partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, _STOPS)
    os.register_at_fork(after_in_parent=unblock)
    if "GUNICORN_FD" in os.environ or "LISTEN_FDS" in os.environ:
        return  # Who started this has opened the sockets.
    for address in server.cfg.address:
        if isinstance(address, tuple) and (error := settings.port_error(*address[:2])):
            raise SystemExit(error)


def when_ready(server: Arbiter) -> None:
    """Stop where -b or the environment made gunicorn listen beyond what HOST may name."""
    if error := settings.listening_error(_config):
        raise SystemExit(error)
    # What is loaded is shared with the processes as long as no collection writes to it.
    gc.collect()
    gc.freeze()


def on_reload(server: Arbiter) -> None:
    """Stop, as well as SIGTERM does, where the settings no longer allow the address."""
    if error := settings.listening_error(_config):
        logging.getLogger("gunicorn.error").error(error)
        os.kill(os.getpid(), signal.SIGTERM)


def pre_fork(server: Arbiter, worker: Any) -> None:
    """Keep a stop until the new process can hear it: the handler it inherits would lose it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)


def post_worker_init(worker: Any) -> None:
    """Let this process stand by for the queue, for as long as it serves its own master."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    worker.wsgi.extensions["service"].worker.start(
        lambda: worker.alive and os.getppid() == worker.ppid,
    )


def worker_exit(server: Arbiter, worker: Any) -> None:
    """End what the process began; the master calls this too, for one that never started."""
    if hasattr(worker, "wsgi"):
        close(worker.wsgi)
