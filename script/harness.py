"""What `benchmark.py` measures with: an upstream, servers under gunicorn, and load for them.

The server runs as shipped, in a copy of this folder's code, with its data in a new folder.
"""

import asyncio
import functools
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from timeit import timeit
from typing import NamedTuple

from PIL import Image

from db import Database
from records import NewTask

ROOT = Path(__file__).resolve().parent.parent
CONNECTIONS, SMALL, LARGE = 16, 100_000, 20_000_000
# The defaults on two cores or more, and what script/server adds; the hello-world Flask has it too.
SHIPPED = {"WORKERS": 2, "THREADS": 16, "MALLOC_ARENA_MAX": 2}
HELLO = 'import flask\napp = flask.Flask("hello")\napp.get("/")(lambda: {"hello": "world"})\n'
HELLO_CONF = """import os
wsgi_app, bind = "hello:app", "127.0.0.1:" + os.environ["PORT"]
worker_class, workers, threads = "gthread", int(os.environ["WORKERS"]), int(os.environ["THREADS"])
control_socket_disable, worker_tmp_dir = True, "/dev/shm"
"""


@functools.cache
def answer(size: int) -> bytes:
    """Return the answer with a PNG of noise of about that size, in chunks, as Chutes sends it."""
    side, out = math.isqrt(size // 3), io.BytesIO()
    noise = random.Random(size).randbytes(3 * side * side)
    Image.frombytes("RGB", (side, side), noise).save(out, "PNG", compress_level=0)
    parts = (out.getvalue()[i : i + 16384] for i in range(0, out.tell(), 16384))
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks


async def answer_calls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer each call of a connection with the bytes, after the seconds, that its prompt names."""
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.findall(rb"(?i)content-length: *(\d+)", head)[0])
            size, seconds = json.loads(await reader.readexactly(length))["prompt"].split()
            await asyncio.sleep(float(seconds))
            writer.write(answer(int(size)))
            await writer.drain()
    writer.close()


def serve_upstream(listener: socket.socket) -> None:
    """Answer calls until the process is ended."""

    async def serve() -> None:
        await (await asyncio.start_server(answer_calls, sock=listener)).serve_forever()

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(serve())


def body(size: int = SMALL, seconds: float = 0) -> str:
    """Return a request for an image of so many bytes, which takes so many seconds."""
    return json.dumps({"prompt": f"{size} {seconds}"})


def run(*command: str) -> str:
    """Return what the command prints; raise CalledProcessError where it fails."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def curl(urls: str, data: str, at_once: int, output: str = "/dev/null") -> None:
    """Get each of the addresses, or post the data to them; none may answer with an error."""
    options = f"-qsSfZ --no-progress-meter --noproxy * --parallel-max {at_once}".split()
    post = ["-H", "Content-Type: application/json", "-d", data] if data else []
    run("curl", *options, "--parallel-immediate", *post, "-o", output, urls)


def wrk_rate(output: str) -> float:
    """Return the requests a second that wrk counted, or raise RuntimeError where some failed."""
    if "Non-2xx" in output or "Socket errors" in output:
        raise RuntimeError(f"Not all requests were answered:\n{output}")
    return float(re.findall(r"Requests/sec: +([\d.]+)", output)[0])


def wait_until(fact: Callable[[], bool]) -> None:
    """Ask until it is true, and a server answers; raise TimeoutError after two minutes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(OSError):
            if fact():
                return
        time.sleep(0.005)
    raise TimeoutError("The server took more than two minutes")


def milliseconds(act: Callable[[], object]) -> float:
    """Return how long it takes."""
    return timeit(act, number=1) * 1000


class Server(NamedTuple):
    """A gunicorn: its master, its port, the folder of its data, its start (monotonic)."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    began: float

    def connect(self, timeout: float = 120) -> HTTPConnection:
        """Return a connection, to be made by its first request."""
        return HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, path: str, data: str = "", client: HTTPConnection | None = None) -> bytes:
        """Get, or post the data, on a new connection unless one is given; return the body.

        Raises RuntimeError where the answer is an error.
        """
        client = client or self.connect()
        client.request("POST" if data else "GET", path, data, {"Content-Type": "application/json"})
        with client.getresponse() as response:
            content = response.read()
        if response.status >= 300:
            raise RuntimeError(f"{path}: {response.status} {content.decode()}")
        return content

    def submit(self, count: int, data: str) -> None:
        """Post as many tasks, on 16 connections."""
        # What follows # numbers the requests for curl, and is not sent.
        curl(f"http://127.0.0.1:{self.port}/generate#[1-{count}]", data, CONNECTIONS)

    def rate(self, path: str, data: str = "") -> float:
        """Return the requests a second that it answers: to wrk in two seconds, else to curl."""
        url = f"http://127.0.0.1:{self.port}{path}"
        if not shutil.which("wrk"):
            return 3e6 / milliseconds(lambda: curl(f"{url}#[1-3000]", data, CONNECTIONS))
        script, method = self.folder / "request.lua", "POST" if data else "GET"
        script.write_text(f"wrk.method = {method!r}\nwrk.body = {data!r}\n")
        options = f"-t1 -c{CONNECTIONS} -d2s -H Content-Type:application/json".split()
        return wrk_rate(run("wrk", *options, "-s", str(script), url))

    def queue(self) -> tuple[int, int]:
        """Return how many tasks are pending, and how many processing."""
        queue = json.loads(self.ask("/queue"))
        return queue["pending"], queue["processing"]

    def finish(self) -> None:
        """Wait until all tasks have ended."""
        wait_until(lambda: self.queue() == (0, 0))

    def make(self, count: int, data: str) -> None:
        """Submit as many tasks and wait for their images, or raise RuntimeError."""
        self.submit(count, data)
        self.finish()
        if failed := json.loads(self.ask("/tasks?status=failed"))["tasks"]:
            raise RuntimeError(failed[0]["error"])

    def is_up(self) -> bool:
        """Return whether each worker answers; raise RuntimeError where the server has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"The server has ended:\n{(self.folder / 'log').read_text()}")
        if len(self.workers()) < SHIPPED["WORKERS"]:
            return False
        for pid in self.workers():
            with self.without(pid):
                # Not for long: the one that is stopped may hold a lock that the other waits for.
                self.ask("/", client=self.connect(timeout=0.5))
        return True

    def workers(self) -> list[int]:
        """Return the pids of the workers."""
        pid = self.process.pid
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    def runner(self) -> int:
        """Return the pid of the worker that runs the queue."""
        log = (self.folder / "log").read_text()
        return int(re.findall(r"(\d+)\D* this process runs the queue", log)[0])

    @contextmanager
    def without(self, pid: int) -> Iterator[None]:
        """Stop a worker meanwhile, so that the other one accepts the connections."""
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def megabytes(self) -> float:
        """Return the memory of all processes: PSS, which counts a shared page once."""
        pids = (self.process.pid, *self.workers())
        texts = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids)
        return sum(int(re.findall(r"Pss: +(\d+)", text)[0]) for text in texts) * 1024 / 1e6

    def cpu(self) -> float:
        """Return the CPU milliseconds that all processes have used."""
        # Each one's clock, as clock_getcpuclockid(3) makes it: /proc counts in steps of 10.
        clocks = ((~pid << 3) | 2 for pid in (self.process.pid, *self.workers()))
        return sum(map(time.clock_gettime, clocks)) * 1000


class Bench:
    """A temporary folder, in it a copy of the server's code, and the upstream."""

    def __init__(self, folder: Path):
        self.folder = folder
        listener = socket.create_server(("127.0.0.1", 0))
        self.upstream = f"http://127.0.0.1:{listener.getsockname()[1]}/generate"
        # Made before the fork, which inherits them.
        answer(SMALL)
        answer(LARGE)
        fork = multiprocessing.get_context("fork")
        fork.Process(target=serve_upstream, args=(listener,), daemon=True).start()
        # A copy, so that neither .env nor the database of this folder is in play.
        shutil.copytree(ROOT / "web", folder / "server" / "web")
        for path in (*ROOT.glob("*.py"), ROOT / "schema.sql", ROOT / "models.toml"):
            shutil.copy2(path, folder / "server")
        (folder / "hello").mkdir()
        (folder / "hello" / "hello.py").write_text(HELLO)
        (folder / "hello" / "gunicorn.conf.py").write_text(HELLO_CONF)

    @contextmanager
    def server(
        self, code: str = "server", pending: int = 0, wait: bool = True, **settings: int
    ) -> Iterator[Server]:
        """Start the server as shipped, but for these settings, and with so many tasks pending."""
        with tempfile.TemporaryDirectory(dir=self.folder) as data:
            if pending:
                add_pending(Path(data, "tasks.sqlite3"), pending)
            server = self._start(self.folder / code, Path(data), SHIPPED | settings)
            try:
                if wait:
                    wait_until(server.is_up)
                yield server
            finally:
                os.killpg(server.process.pid, signal.SIGKILL)
                server.process.wait()

    def _start(self, code: Path, data: Path, settings: dict[str, int]) -> Server:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environ |= {name: str(value) for name, value in settings.items()} | {"PORT": str(port)}
        environ |= {"CHUTES_API_TOKEN": "benchmark", "CHUTES_API_URL": self.upstream}
        environ["CATALOGUE_URL"] = "off"
        environ |= {"DATABASE_PATH": f"{data}/tasks.sqlite3", "OUTPUT_DIR": f"{data}/outputs"}
        command, began = [sys.executable, "-m", "gunicorn"], time.monotonic()
        with (data / "log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=code, env=environ, stdout=log, stderr=log, start_new_session=True
            )
        return Server(process, port, data, began)

    def fetch(self, size: int, count: int, at_once: int = 4) -> tuple[float, float]:
        """Fetch images with curl and flush them; return milliseconds and CPU ms of one image."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            began, used = time.monotonic(), sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
            curl(f"{self.upstream}?[1-{count}]", body(size), at_once, f"{folder}/#1")
            with ThreadPoolExecutor(at_once) as pool:
                list(pool.map(flush, Path(folder).iterdir()))
            cpu = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - used
            return (time.monotonic() - began) / count * 1000, cpu / count * 1000


def flush(path: Path) -> None:
    """Have the file on disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def add_pending(path: Path, count: int) -> None:
    """Add so many tasks, each of which takes a minute."""
    prompt = json.loads(body(seconds=60))["prompt"]
    with closing(Database(path)) as database:
        for start in range(0, count, 10_000):
            ids = (str(uuid.uuid4()) for _ in range(min(10_000, count - start)))
            database.add([NewTask(id, prompt, "qwen-image", {}) for id in ids], time.time())


def inserts_per_second(folder: Path) -> float:
    """Insert with sqlite3 alone for half a second: a row a commit, on disk before the next."""
    path, count = folder / "reference.sqlite3", 0
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE IF NOT EXISTS tasks (id TEXT PRIMARY KEY, body TEXT)")
        began = time.monotonic()
        while time.monotonic() < began + 0.5:
            count += 1
            connection.execute("INSERT INTO tasks VALUES (?, ?)", (str(uuid.uuid4()), body()))
        return count / (time.monotonic() - began)
