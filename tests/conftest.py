"""What the tests share: settings, a database, an upstream, and a way to wait for a fact."""

import logging
import socket
import threading
import time

import pytest
from upstream import Upstream, local_models, serving

import config as settings
import logs
from app import close, create_app
from db import Database

PROMPT = "a fox of the tests"
KEYS = "first-key-of-the-tests,second-key-of-the-tests"
TOKEN = "cpk_0123456789abcdef0123456789abcdef.fedcba98.ThisIsTheSecretOfTheTests"


class Clock:
    """A clock that stands until a test turns it."""

    def __init__(self, now=1_790_000_000.0):
        self._now = now
        self.turned = {}

    def __call__(self):
        return self._now

    @property
    def now(self):
        return self._now

    @now.setter
    def now(self, now):
        """Turn the clock, and have those look at it who sleep until a time of theirs."""
        self._now = now
        for look in list(self.turned.values()):
            look()


def read_whole(wsgi_app):
    """Return the application with each answer read to its end, and the files behind it closed."""

    def application(environ, start_response):
        body = wsgi_app(environ, start_response)
        try:
            return [b"".join(body)]
        finally:
            body.close()

    return application


def wait_until(fact, seconds=20, what="the fact did not come about"):
    """Look until the fact is true and return it; fail after that many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := fact()):
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
    return found


def hang_look_ups(monkeypatch):
    """Let each look-up of a name wait; return what says that one does, and what lets it go."""
    looking, answer = threading.Event(), threading.Event()
    look_up = socket.getaddrinfo

    def stuck(*args, **values):
        looking.set()
        answer.wait(30)
        return look_up(*args, **values)

    monkeypatch.setattr("chutes.socket.getaddrinfo", stuck)
    return looking, answer


def submit(client, prompt=PROMPT, **fields):
    answer = client.post("/generate", json={"prompt": prompt, **fields})
    assert answer.status_code == 202, answer.json
    return answer.json["id"]


def finished(client, task_id):
    def look():
        task = client.get(f"/status/{task_id}").json
        return task if task["status"] in ("completed", "failed") else None

    return wait_until(look)


@pytest.fixture(autouse=True)
def logged():
    """Return the lines that are logged, with all their facts and nothing hidden.

    In no test may one of them hold a secret or the words of a prompt.
    """
    lines = []
    handler = logging.Handler()
    formatter = logs.formatter("text", lambda text: text)
    handler.emit = lambda record: lines.append(formatter.format(record))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield lines
    root.removeHandler(handler)
    root.setLevel(level)
    check_lines("\n".join(lines))


def check_lines(text):
    """Assert that no log line tells what it must not."""
    for word in (TOKEN, PROMPT, *KEYS.split(",")):
        assert word not in text


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def configure(tmp_path):
    """Return a maker of settings for this test's own folder."""

    def make(**values):
        values = {"CHUTES_API_TOKEN": TOKEN, "CATALOGUE_URL": "off", **values}
        return settings.from_values({k: str(v) for k, v in values.items()}, tmp_path)

    return make


@pytest.fixture
def database(tmp_path):
    database = Database(tmp_path / "tasks.sqlite3")
    yield database
    database.close()


@pytest.fixture
def upstream():
    with serving(Upstream()) as server:
        yield server


class App:
    """An application over the files of this test: a client of it, and its parts."""

    def __init__(self, configure, **values):
        self._configure = configure
        self._values = values
        self.open()

    def open(self):
        self._app = create_app(self._configure(**self._values))
        self._app.wsgi_app = read_whole(self._app.wsgi_app)
        service = self._app.extensions["service"]
        self.database, self.worker = service.database, service.worker
        self.client = self._app.test_client()

    def restart(self, **values):
        """Stop it, and build it anew over the same files, with these settings changed."""
        self.close()
        self._values |= values
        self.open()

    def close(self):
        close(self._app)


@pytest.fixture
def serve(configure, upstream, tmp_path):
    """Return a maker of applications; no model of theirs leads to Chutes."""
    made, models = [], tmp_path / "local-models.toml"

    def make(**values):
        models.write_text(local_models(upstream.url))
        usual = {"CHUTES_API_URL": upstream.url, "MODELS_FILE": models}
        made.append(App(configure, **usual | values))
        return made[-1]

    yield make
    upstream.gate.set()
    for app in made:
        app.close()


@pytest.fixture
def app(serve):
    return serve()


@pytest.fixture
def client(app):
    return app.client


@pytest.fixture
def paused(serve, upstream):
    """Return a client of an application whose calls do not return."""
    upstream.gate.clear()
    return serve(CONCURRENCY=1, SHUTDOWN_GRACE=0).client


@pytest.fixture
def make(configure, upstream):
    from queues import Queue

    made = []

    def build(clock=None, jitter=0.0, **values):
        values = {"CHUTES_API_URL": upstream.url, "SHUTDOWN_GRACE": 0, **values}
        made.append(Queue(configure(**values), upstream, clock or Clock(), jitter))
        return made[-1]

    yield build
    for built in made:
        built.close()
