"""Servers that stand in for Chutes in the tests: one told what to answer, one what to send."""

import io
import json
import random
import re
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image
from simulator import Simulator


def image_bytes(kind="PNG", size=(64, 48), colour="teal"):
    """Return the bytes of a real image."""
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


class Answer:
    """What to answer: by default a picture, in chunks, as Chutes does."""

    def __init__(self, status=200, body=None, headers=None):
        self.status = status
        self.body = image_bytes() if body is None else body
        self.headers = headers or {}


def refusal(status, detail, **headers):
    """Return an answer as Chutes' gateway gives it."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(
        status,
        json.dumps({"detail": detail}).encode(),
        {"Content-Type": "application/json", **named},
    )


class Upstream(Simulator):
    """Answer each call with `decide(fields)`, while `gate` is open, and keep the books."""

    def __init__(self):
        super().__init__()
        self.decide = lambda fields: Answer()
        self.gate = threading.Event()
        self.gate.set()
        self.calls = []
        self.times = []
        self.headers = []
        self.cut = []
        self.under_way = []
        self.most_at_once = 0
        self.changed = threading.RLock()

    @property
    def at_once(self):
        """Count the calls under way whose client is still there."""
        with self.changed:
            return sum(not is_gone(call.connection) for call in self.under_way)

    def prompts(self):
        return [fields["prompt"] for fields in self.calls]

    def answer(self, call):
        fields = json.loads(call.body)
        with self.changed:
            self.calls.append(fields)
            self.times.append(time.time())
            self.headers.append((call.path, dict(call.headers)))
            self.under_way.append(call)
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self._wait(call, fields["prompt"])
            answer = self.decide(fields)
        finally:
            with self.changed:
                self.under_way.remove(call)
        return answer.status, answer.headers, answer.body

    def _wait(self, call, prompt):
        """Wait for the gate to open, as long as the client does."""
        while not self.gate.wait(0.02):
            if is_gone(call.connection):
                self.cut.append(prompt)
                raise ConnectionAbortedError

    def shutdown(self):
        self.gate.set()
        super().shutdown()

    def handle_error(self, request, client_address):
        """Stay silent: clients that go away are what the tests are about."""


def is_gone(connection):
    """Return whether the client has closed the connection."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@contextmanager
def serving(server):
    """Serve in a thread until the block ends."""
    thread = threading.Thread(target=server.serve_forever, args=(0.002,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def raw_server(script):
    """Accept connections on loopback and run `script(connection)` for each, in a thread.

    The request is read before the script runs. Yields the address for CHUTES_API_URL.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []

    def talk(connection):
        with connection, suppress(OSError):
            read_request(connection)
            script(connection)

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=talk, args=(connection,), daemon=True))
            threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/generate"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive(), "the client has not let go of the connection"


def read_request(connection):
    """Read one request with a body of known length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _more(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length")
    )
    while len(body) < length:
        body += _more(connection)
    return head, body


def _more(connection):
    data = connection.recv(65536)
    if not data:
        raise ConnectionResetError("the client went away")
    return data


def until_gone(connection, send=b"", every=0.05):
    """Send the bytes again and again, or nothing, until the client hangs up."""
    connection.settimeout(every)
    while True:
        if send:
            connection.sendall(send)
        with suppress(TimeoutError):
            if connection.recv(1) == b"":
                return


def local_models(url):
    """Return the models of `models.toml`, each host of theirs behind the upstream's address."""
    text = Path(__file__).parent.parent.joinpath("models.toml").read_text()
    base = url.removesuffix("/generate")
    return re.sub(r'"https://(?!image\.)([a-z0-9-]+)\.chutes\.ai/', rf'"{base}/\1/', text)


def closed_port():
    """Return a port on loopback where nothing listens.

    Not one that the kernel gives to whoever asks for any: another test would have it next.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
