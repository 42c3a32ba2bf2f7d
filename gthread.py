"""gunicorn's threaded worker, in which a request gets a thread only when it is there.

The poller reads what clients send, so that whoever sends slowly, or nothing, holds no thread.
What is overridden is gunicorn 27.0.1's (gunicorn/workers/gthread.py): compare before another
version is pinned.
"""

import json
import re
import select
import selectors
import socket
import struct
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from enum import Enum, auto
from functools import partial
from http import HTTPStatus
from typing import Any

from gunicorn.config import Config
from gunicorn.http import errors
from gunicorn.http.parser import RequestParser
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers.gthread import ThreadWorker

# What a client may take, in seconds: for all its headers, for the next bytes of a body, for each
# MiB of a body, for the next bytes of an answer, to close after its last answer, and to send the
# rest at a stop.
HEADERS_SECONDS = 10.0
STALL_SECONDS = 10.0
SECONDS_PER_MIB = 60.0
ANSWER_SECONDS = 60.0
CLOSE_SECONDS = 2.0
STOP_SECONDS = 1.0
# How long a thread waits for the next request of a client that it has just answered.
NEXT_SECONDS = 0.002
# How many bytes of a request the poller reads; a thread reads what is longer.
READ_AHEAD = 64 * 1024

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*0*([0-9]*)", re.IGNORECASE)
_STREAMED = re.compile(rb"\r\n(?:transfer-encoding|expect):", re.IGNORECASE)

_DEFECT = (500, "Internal server error; see the server log")
_REFUSALS = {
    TimeoutError: (408, "The request did not arrive in time: send it at once, and to its end"),
    errors.LimitRequestLine: (414, "The first line is longer than 8190 bytes: shorten the address"),
    errors.ExpectationFailed: (417, "Expect must be 100-continue: send that, or no such header"),
    errors.LimitRequestHeaders: (
        431,
        "The headers are too large: send at most 100, each of at most 8190 bytes, 64 KiB in all",
    ),
    errors.UnsupportedTransferCoding: (
        501,
        "Transfer-Encoding must be chunked: send that, or a Content-Length",
    ),
    errors.InvalidResponseHeader: _DEFECT,  # type: ignore[attr-defined]
    errors.InvalidResponseHeaderName: _DEFECT,  # type: ignore[attr-defined]
    errors.ParseException: (
        400,
        "The request is not valid: its first line must be like GET /queue HTTP/1.1, each header "
        "like Name: value, all in ASCII, with Host and Content-Length at most once",
    ),
    BaseException: _DEFECT,
}


class Progress(Enum):
    """How much of a request has come."""

    PART = auto()  # Nothing, or some of its headers.
    HEADERS = auto()
    WHOLE = auto()
    LONG = auto()  # Its headers, and a body that a thread must read.
    OVERSIZED = auto()  # More than headers may have.
    CLOSING = auto()  # The client has its last answer.


class Connection(socket.socket):
    """A connection with a client, on which the system itself bounds each wait.

    gunicorn changes how long it may wait several times a request. Each time is a call of the
    system, in which a thread gives up its turn to run, and gets it back behind all others.
    """

    def __init__(self, accepted: socket.socket):
        family, kind, protocol = accepted.family, accepted.type, accepted.proto
        super().__init__(family, kind, protocol, accepted.detach())
        super().setblocking(True)
        self._wait_at_most(socket.SO_RCVTIMEO, NEXT_SECONDS)
        self._wait_at_most(socket.SO_SNDTIMEO, ANSWER_SECONDS)

    def _wait_at_most(self, option: int, seconds: float) -> None:
        whole, part = divmod(round(seconds * 1e6), 10**6)
        self.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", whole, part))

    def setblocking(self, flag: bool) -> None:
        """Change nothing."""

    def settimeout(self, value: float | None) -> None:
        """Change nothing."""

    def gettimeout(self) -> float:
        """Return how long the client may take for the next bytes of a file, for `sendfile`."""
        return ANSWER_SECONDS


class Reader(SocketUnreader):
    """What a client sends: the poller reads ahead, and a thread the rest of a long request."""

    # Of a whole MiB at once, each upload would hold four copies.
    max_body_chunk = READ_AHEAD

    def __init__(self, sock: socket.socket, worker: "Worker"):
        super().__init__(sock)
        self._worker = worker
        self.progress = Progress.PART
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count the time and the bytes of a request from now on."""
        self.began = self._last = time.monotonic()
        self.size = 0

    def read_ahead(self, flags: int = socket.MSG_DONTWAIT) -> bool:
        """Take what has come, without waiting; return whether the client is still there."""
        try:
            data = self.sock.recv(READ_AHEAD, flags)
        except OSError as error:
            is_there, data = isinstance(error, BlockingIOError), b""
        else:
            is_there = bool(data)
        if self.progress is not Progress.CLOSING:
            self._note(data)
            self.unread(self.take_buffered() + data)
            self.progress = self._look()
        return is_there

    def _look(self) -> Progress:
        data = self.buf.getvalue()
        head, end, body = data.partition(b"\r\n\r\n")
        if len(head) > READ_AHEAD:
            return Progress.OVERSIZED
        if not end:
            # gunicorn refuses a line that ends in LF alone: there is nothing to wait for.
            is_broken = data.count(b"\n") != data.count(b"\r\n")
            return Progress.WHOLE if is_broken else Progress.PART
        length = _LENGTH.search(head)
        size = int(length[1][:9] or 0) if length else 0
        if size > READ_AHEAD or _STREAMED.search(head):
            return Progress.LONG
        return Progress.WHOLE if len(body) >= size else Progress.HEADERS

    def has_begun(self) -> bool:
        """Return whether some of a request has come, but not all."""
        return bool(self.buf.getvalue()) and self.progress is not Progress.CLOSING

    def has_next(self) -> bool:
        """Return whether the next request is there, all of it, now or in a moment."""
        return self.read_ahead(flags=0) and self.progress is Progress.WHOLE

    def chunk(self, size_hint: int | None = None) -> bytes:
        """Read more of a long request. Raises TimeoutError where the client is too slow."""
        # In turns of a second: the process may be told to stop meanwhile.
        while not _is_readable(self.sock, min(1.0, self.seconds_left())):
            if not self.seconds_left():
                raise TimeoutError("the client is too slow to send its request")
        data = super().chunk(size_hint)  # type: ignore[call-arg]
        self._note(data)
        return data

    def _note(self, data: bytes) -> None:
        self.size += len(data)
        if data and self._worker.alive:
            self._last = time.monotonic()

    def seconds_left(self) -> float:
        """Return how long to wait for the client; at a stop, from its last bytes before that."""
        until = self._last + STALL_SECONDS
        if not self._worker.alive:
            until = self._last + STOP_SECONDS
        elif self.progress is Progress.CLOSING:
            until = self._last + CLOSE_SECONDS
        elif self.progress is Progress.PART:
            until = self.began + HEADERS_SECONDS
        else:
            until = min(until, self.began + SECONDS_PER_MIB * (self.size // 2**20 + 1))
        return max(0.0, until - time.monotonic())


class Worker(ThreadWorker):
    """Serve requests in threads, while the poller alone waits for clients.

    Requests that are whole have `threads` for themselves; those with a long body as many more.
    """

    @classmethod
    def check_config(cls, cfg: Config, log: Any) -> None:
        """Refuse to start with TLS, which the poller cannot read."""
        if cfg.is_ssl:
            raise SystemExit("certfile, keyfile: TLS is for a proxy in front of this server")

    def init_process(self) -> None:
        """Serve until the process is told to stop."""
        self._busy = 0
        self._long_pool: ThreadPoolExecutor = self.get_thread_pool()
        super().init_process()

    def enqueue_req(self, conn: Any) -> None:
        """Take what has come of a request, and give it to a thread if that is enough."""
        reader = _reader(conn, self)
        is_there = reader.read_ahead()
        if reader.progress in (Progress.WHOLE, Progress.LONG):
            self._busy += 1
            reader.restart_clock()
            pool = self.tpool if reader.progress is Progress.WHOLE else self._long_pool
            future = pool.submit(self.handle, conn)
            future.add_done_callback(partial(self.method_queue.defer, self.finish_request, conn))
        elif reader.progress is Progress.OVERSIZED:
            self._refuse(conn, errors.LimitRequestHeaders("more than 64 KiB"))
        elif is_there:
            self.pending_conns.append(conn)
            readable = partial(self.on_pending_socket_readable, conn)
            self.poller.register(conn.sock, selectors.EVENT_READ, readable)
        else:
            self._close(conn)

    def handle(self, conn: Any) -> Any:
        """Serve a request, and those that follow at once while nobody waits for a thread."""
        keep = super().handle(conn)
        while keep and self.alive and self._busy <= self.cfg.threads and _reader(conn).has_next():
            keep = super().handle(conn)
        return keep

    def finish_request(self, conn: Any, fs: "Future[Any]") -> None:
        """Wait for the next request of a client that may send one, else for it to close."""
        self._busy -= 1
        _reader(conn).restart_clock()
        if fs.cancelled() or fs.exception() or not fs.result():
            self._close_gently(conn)
        else:
            super().finish_request(conn, fs)

    def murder_pending(self) -> None:
        """Give up the clients whose time is over, and one where no other could connect."""
        for conn in [c for c in self.pending_conns if not _reader(c).seconds_left()]:
            self.pending_conns.remove(conn)
            self.poller.unregister(conn.sock)
            if _reader(conn).has_begun() and self.alive:
                self._refuse(conn, TimeoutError())
            else:
                self._close(conn)
        # First one that was served, and may be again: another may be about to send its request.
        waiting = self.keepalived_conns or self.pending_conns
        if waiting and self.nr_conns >= self.worker_connections:
            self.poller.unregister(waiting[0].sock)
            self._close(waiting.popleft())

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        """Answer what does not reach the application as the application does: in JSON."""
        with suppress(OSError):
            client.send(_refusal(exc, addr, self.log), socket.MSG_DONTWAIT)

    def _refuse(self, conn: Any, error: Exception) -> None:
        self.handle_error(None, conn.sock, conn.client, error)
        self._close_gently(conn)

    def _close_gently(self, conn: Any) -> None:
        """Close a connection when its client does, or soon: a reset could cost it the answer."""
        _reader(conn).progress = Progress.CLOSING
        with suppress(OSError):
            conn.sock.shutdown(socket.SHUT_WR)
        self.enqueue_req(conn)

    def _close(self, conn: Any) -> None:
        self.nr_conns -= 1
        conn.close()


def _reader(conn: Any, worker: Worker | None = None) -> Reader:
    """Return the reader of a connection; the worker makes one where there is none."""
    if worker and not conn.initialized:
        conn.sock = Connection(conn.sock)
        conn.parser = RequestParser(worker.cfg, conn.sock, conn.client)
        conn.parser.unreader = Reader(conn.sock, worker)
        conn.initialized = True
    reader: Reader = conn.parser.unreader
    return reader


def _refusal(error: BaseException, address: Any, log: Any) -> bytes:
    """Return the answer to a request that gunicorn refuses, and log it."""
    status, sentence = next(_REFUSALS[c] for c in type(error).__mro__ if c in _REFUSALS)
    if status == 500:
        log.exception("Error handling request")
    else:
        # Not what the client sent: it may be a prompt.
        log.warning("Invalid request from ip=%s: %s", address and address[0], sentence)
    body = json.dumps({"error": sentence}, separators=(",", ":")) + "\n"
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


def _is_readable(sock: socket.socket, seconds: float) -> bool:
    """Wait for at most so many seconds; return whether there is something to read, or an end."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
