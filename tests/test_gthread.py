"""Real gunicorn processes, and clients that send slowly, or wrongly, or not to the end."""

import json
import signal
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import wait_until
from server import Server
from upstream import Answer, Upstream, image_bytes, serving

import gthread

pytestmark = pytest.mark.processes

HEADERS = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
TASK = b'{"prompt": "p"}'
WHOLE = HEADERS + b"Content-Length: 15\r\n\r\n" + TASK
# The poller reads the small ones to their end, threads the others.
HALF_BODIES = (
    HEADERS + b"Content-Length: 500\r\n\r\n{",
    HEADERS + b"Content-Length: 00000000000500\r\n\r\n{",
    HEADERS + b"Content-Length: 500000\r\n\r\n{",
    HEADERS + b"Transfer-Encoding: chunked\r\n\r\n1f4\r\n{",
    HEADERS + b"Content-Length: 500\r\nExpect: 100-continue\r\n\r\n{",
)

LATE = {"error": "The request did not arrive in time: send it at once, and to its end"}
# What the poller reads, and what a thread does.
CUT = [(408, LATE)] * 2 + [(400, {"error": "The body could not be read to its end"})] * 3


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Return one server for the tests that leave it as it was."""
    with serving(Upstream()) as upstream:
        server = Server(tmp_path_factory.mktemp("gthread") / "server", upstream.url)
        try:
            yield server.ready()
        finally:
            server.close()


@pytest.fixture
def start(tmp_path, upstream):
    """Return a maker of a server with constants of gthread.py of its own."""
    made = []

    def make(constants="", options=(), **values):
        program = (
            f"import sys; import gthread as g; sys.argv = {['gunicorn', *options]}\n{constants}\n"
            "from gunicorn.app.wsgiapp import run; run()"
        )
        made.append(Server(tmp_path / "server", upstream.url, ("-c", program), **values))
        return made[-1].ready()

    yield make
    upstream.gate.set()
    for server in made:
        server.close()


@contextmanager
def clients(server, count, *data, drip=b"", every=1.0):
    """Open so many connections for each of the data, which send it and then drip."""
    done = threading.Event()

    def keep_dripping():
        while drip and not done.wait(every):
            for client in made:
                with suppress(OSError):
                    client.send(drip)

    with ExitStack() as stack:
        made = []
        for piece in (data or (b"",)) * count:
            made.append(stack.enter_context(connect(server)))
            made[-1].sendall(piece)
        thread = threading.Thread(target=keep_dripping)
        thread.start()
        try:
            yield made
        finally:
            done.set()
            thread.join()


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), 30)


def answer(client):
    """Read one answer, and return its status and its JSON."""
    with client.makefile("rb") as file:
        return read(file)


def read(file):
    status = int(file.readline().split()[1])
    headers = {}
    while line := file.readline().strip():
        name, _, value = line.partition(b": ")
        headers[name.lower()] = value
    if status == 100:
        return status, None
    assert headers[b"content-type"] == b"application/json"
    body = file.read(int(headers[b"content-length"]))
    assert body.endswith(b"\n")
    return status, json.loads(body)


def last(client):
    """Read to the end of a connection."""
    return b"".join(iter(lambda: client.recv(65536), b""))


def ask(server, data):
    with connect(server) as client:
        client.sendall(data)
        return answer(client)


def healthz_within(server, seconds):
    began = time.monotonic()
    assert server.request("GET", "/healthz")[0] == 200
    assert time.monotonic() - began < seconds


def for_seconds(seconds):
    """Go round once, and again until the time is over."""
    deadline = time.monotonic() + seconds
    yield
    while time.monotonic() < deadline:
        yield


# Slow clients


def test_half_sent_headers_hold_nobody_up(server):
    with (
        clients(server, 200, b"GET /queue HTTP/1.1\r\nHost: loc"),
        clients(server, 50, b"GET /queue HTTP/1.1\r\nX: ", drip=b"x"),
        clients(server, 50),
    ):
        for _ in for_seconds(3):
            healthz_within(server, 1)
            assert ask(server, WHOLE)[0] == 202


def test_half_sent_bodies_hold_nobody_up(server):
    with clients(server, 10, *HALF_BODIES), clients(server, 30, *HALF_BODIES, drip=b" "):
        for _ in for_seconds(3):
            healthz_within(server, 15)
            assert ask(server, WHOLE)[0] == 202


def test_clients_that_do_not_close_hold_nobody_up(start):
    server = start(THREADS=2, WORKERS=1)
    last = b"GET /queue HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with clients(server, 20, last), clients(server, 20, b"nonsense\r\n\r\n"):
        healthz_within(server, 1)


def test_clients_that_ask_without_a_pause_hold_nobody_up(start):
    server = start(THREADS=2, WORKERS=1)
    get = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"

    def send(client):
        with suppress(OSError):
            while True:
                client.sendall(get * 100)

    def read_on(client):
        with suppress(OSError):
            last(client)

    with clients(server, 3) as busy:
        threads = [threading.Thread(target=send, args=(client,)) for client in busy]
        threads += [threading.Thread(target=read_on, args=(client,)) for client in busy]
        for thread in threads:
            thread.start()
        try:
            for _ in for_seconds(2):
                healthz_within(server, 1)
        finally:
            for client in busy:
                client.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


def test_more_clients_than_may_be_connected_keep_nobody_out(start):
    server = start(options=["--worker-connections", "40"], WORKERS=1)
    get = b"GET /queue HTTP/1.1\r\nHost: localhost\r\n"
    for data in (get, get + b"\r\n", get + b"Connection: close\r\n\r\n"):
        with clients(server, 200, data):
            healthz_within(server, 1)
            assert ask(server, WHOLE)[0] == 202


def test_who_is_about_to_send_is_not_closed_for_those_that_were_served(start):
    server = start(options=["--worker-connections", "40"], WORKERS=1)
    with clients(server, 39, WHOLE) as served:
        assert [answer(client)[0] for client in served] == [202] * 39
        with connect(server) as late:
            healthz_within(server, 1)
            late.sendall(WHOLE)
            assert answer(late)[0] == 202


def test_headers_have_their_time_in_all(start):
    server = start("g.HEADERS_SECONDS = 0.5")
    with clients(server, 2, b"GET / HTTP/1.1\r\nX: ", drip=b"x", every=0.1) as dripping:
        for client in dripping:
            assert answer(client) == (408, LATE)
    with clients(server, 1) as silent:
        assert silent[0].recv(1) == b""


def test_headers_of_a_kept_connection_have_their_time_too(start):
    server = start("g.HEADERS_SECONDS = 0.5")
    with connect(server) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer(client)[0] == 200
        client.sendall(b"GET")
        assert answer(client)[0] == 408


def test_bodies_that_stall_are_given_up(start):
    server = start("g.HEADERS_SECONDS = g.STALL_SECONDS = 0.5", THREADS=2, WORKERS=1)
    with clients(server, 4, *HALF_BODIES) as stalled:
        assert [last_answer(client) for client in stalled] == CUT * 4
    assert "Traceback" not in server.log()


def test_bodies_that_drip_are_given_up(start):
    server = start("g.HEADERS_SECONDS = g.SECONDS_PER_MIB = 0.5", THREADS=2, WORKERS=1)
    with clients(server, 2, *HALF_BODIES, drip=b" ", every=0.1) as dripping:
        assert [last_answer(client) for client in dripping] == CUT * 2
    assert "Traceback" not in server.log()


def last_answer(client):
    """Read one answer, after the promise to read on if there is one."""
    with client.makefile("rb") as file:
        status, told = read(file)
        return read(file) if status == 100 else (status, told)


@pytest.mark.parametrize(("size", "may_go_on"), [(2**20 - 1, False), (2**20, True)])
def test_each_mib_of_a_body_has_its_time(size, may_go_on):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = gthread.Reader(ours, SimpleNamespace(alive=True))
        reader.progress = gthread.Progress.LONG
        reader.size = size
        reader.began -= 61
        assert bool(reader.seconds_left()) == may_go_on


def test_a_client_that_takes_no_answer_is_given_up(start, upstream):
    upstream.decide = lambda fields: Answer(body=image_bytes() + bytes(20_000_000))
    server = start("g.ANSWER_SECONDS = 0.5", THREADS=2, WORKERS=1)
    (task,) = server.all_end([server.submit()])
    get = f"GET /images/{task['id']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with clients(server, 2, get):
        wait_until(lambda: server.request("GET", "/healthz")[0] == 200)
        wait_until(lambda: server.log().count("client timed out") == 2)
    assert "Traceback" not in server.log()


def test_clients_that_close_half_way_leave_nothing_behind(start):
    server = start(WORKERS=1)
    server.running()
    (pid,) = server.workers()

    def descriptors():
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))

    before = descriptors()
    with clients(server, 10, b"", b"GET /queue HT", *HALF_BODIES):
        wait_until(lambda: descriptors() >= before + 50)
    wait_until(lambda: descriptors() <= before)
    assert "Traceback" not in server.log()


# A stop


STOPPED_EARLY = """
import os, signal

def init_process(worker, init=g.Worker.init_process):
    try:
        os.close(os.open("stopped", os.O_CREAT | os.O_EXCL))
        os.kill(os.getpid(), signal.SIGTERM)
    except FileExistsError:
        pass
    init(worker)

g.Worker.init_process = init_process
"""


def test_a_process_hears_a_stop_that_comes_before_its_own_handlers(start):
    server = start(STOPPED_EARLY, WORKERS=1)
    wait_until(lambda: server.log().count("Booting worker") == 2)
    assert server.log().count("Worker exiting") == 1
    assert server.request("GET", "/healthz")[0] == 200


def test_a_stop_cuts_what_is_half_sent(start):
    server = start()
    with (
        clients(server, 5, *HALF_BODIES),
        clients(server, 5, *HALF_BODIES, drip=b" "),
        clients(server, 200, b"GET /queue HTTP/1.1\r\nHost: loc"),
        clients(server, 50, b"GET /queue HTTP/1.1\r\nX: ", drip=b"x"),
        clients(server, 50),
    ):
        healthz_within(server, 15)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 5
    assert "Traceback" not in server.log()


def test_what_is_whole_at_a_stop_is_answered(start, upstream):
    server = start(THREADS=2, WORKERS=1, SHUTDOWN_GRACE=30)
    server.running()
    upstream.gate.clear()
    task_id = server.submit()
    wait_until(lambda: upstream.at_once == 1)
    wait = f"GET /status/{task_id}?wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with clients(server, 1, wait) as waiting, clients(server, 10, HALF_BODIES[1]):
        healthz_within(server, 15)
        server.send(signal.SIGTERM)
        wait_until(lambda: "no new calls" in server.log())
        upstream.gate.set()
        assert answer(waiting[0])[1]["status"] == "completed"
    assert server.process.wait(30) == 0


def test_hup_loses_no_request_of_kept_connections(start):
    server = start()
    ids, faults, done = [], [], threading.Event()

    def keep_asking():
        while not done.is_set():
            with connect(server) as client, client.makefile("rb") as file:
                keep_asking_on(client, file)

    def keep_asking_on(client, file):
        """Ask until an answer says that it is the last one."""
        keep = True
        while keep and not done.is_set():
            client.sendall(WHOLE[:-9])
            client.sendall(WHOLE[-9:])
            lines = list(iter(lambda: file.readline().strip(), b""))
            length = next(int(line[16:]) for line in lines if line.startswith(b"Content-Length"))
            ids.append(json.loads(file.read(length))["id"])
            keep = b"Connection: keep-alive" in lines

    def note(target):
        try:
            target()
        except Exception as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=note, args=(keep_asking,)) for _ in range(4)]
    with clients(server, 50, b"GET /que"), clients(server, 10, HALF_BODIES[1], drip=b" "):
        for thread in threads:
            thread.start()
        for _ in range(3):
            server.reload()
        done.set()
        for thread in threads:
            thread.join()
    assert faults == []
    assert len(ids) == len(set(ids)) == server.rows("SELECT count(*) FROM tasks")[0][0]


# All ways to send a request


def test_headers_that_come_byte_by_byte_are_heard(server):
    with connect(server) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for n in range(len(WHOLE)):
            client.sendall(WHOLE[n : n + 1])
            time.sleep(0.001)
        assert answer(client)[0] == 202


def test_requests_of_a_kept_connection_are_answered_one_after_the_other(server):
    with connect(server) as client, client.makefile("rb") as file:
        for path in (b"/healthz", b"/queue", b"/nowhere", b"/healthz"):
            client.sendall(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path)
            assert read(file)[0] == (404 if path == b"/nowhere" else 200)


def test_requests_that_come_together_are_answered_in_their_order(server):
    get = b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(server) as client, client.makefile("rb") as file:
        client.sendall(get % b"/healthz" + WHOLE + get % b"/nowhere" + WHOLE[:-4])
        assert [read(file)[0] for _ in range(3)] == [200, 202, 404]
        client.sendall(WHOLE[-4:] + get % b"/healthz")
        assert [read(file)[0] for _ in range(2)] == [202, 200]


def test_who_waits_for_100_gets_it(start):
    server = start("g.HEADERS_SECONDS = 60")
    for length in (15, 100_000):
        with connect(server) as client, client.makefile("rb") as file:
            client.sendall(HEADERS + b"Expect: 100-Continue\r\n")
            client.sendall(b"Content-Length: %d\r\n\r\n" % length)
            assert read(file)[0] == 100
            client.sendall(TASK.ljust(length))
            assert read(file)[0] == 202


@pytest.mark.parametrize("size", [100_000, 1_100_000, 3_000_000])
def test_curl_gets_the_answer_to_a_large_body(server, tmp_path, size):
    (tmp_path / "body").write_bytes(TASK.ljust(size))
    command = ["curl", "-sS", "--noproxy", "*", "-w", "%{http_code}", "-d", "@body"]
    done = subprocess.run(
        [*command, f"{server.address}/generate"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout[-3:] == ("202" if size < 2**20 else "413")
    assert json.loads(done.stdout[:-3])


def test_a_chunked_body_is_read_to_its_end_and_no_further(server):
    with connect(server) as client, client.makefile("rb") as file:
        client.sendall(HEADERS + b"Transfer-Encoding: chunked\r\n\r\n")
        for piece in (TASK[:5], TASK[5:]):
            client.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        client.sendall(b"0\r\n\r\n" + WHOLE)
        assert [read(file)[0] for _ in range(2)] == [202, 202]


def test_who_is_refused_early_may_send_on_and_meets_no_reset(server):
    with connect(server) as client:
        client.sendall(HEADERS + b"Content-Length: 3000000\r\n\r\n" + bytes(1_000_000))
        assert last(client).startswith(b"HTTP/1.1 413 ")
        for _ in range(5):
            client.sendall(bytes(1000))


# What is refused before the application sees it


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"nonsense\r\n\r\n", 400, "GET /queue HTTP/1.1"),
        (b"nonsense\n", 400, "GET /queue HTTP/1.1"),
        (b"get / HTTP/1.1\r\n\r\n", 400, "GET /queue HTTP/1.1"),
        ("GET /ä HTTP/1.1\r\n\r\n".encode(), 400, "in ASCII"),
        (b"GET / HTTP/3.0\r\n\r\n", 400, "GET /queue HTTP/1.1"),
        (b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n", 400, "Name: value"),
        (b"GET / HTTP/1.1\r\nHost: a\nX: b", 400, "Name: value"),
        (b"GET / HTTP/1.1\r\nX: a\r\n b\r\n\r\n", 400, "Name: value"),
        (HEADERS + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n12", 400, "at most once"),
        (HEADERS + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400, "Name: value"),
        (b"GET /" + b"a" * 8177 + b" HTTP/1.1\r\n\r\n", 414, "8190"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 101 + b"\r\n", 431, "100"),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 8190 + b"\r\n\r\n", 431, "8190"),
        (b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 70_000, 431, "64 KiB"),
        (b"GET / HTTP/1.1\r\n" + b"X: %b\r\n" % (b"y" * 1000) * 70 + b"\r\n", 431, "64 KiB"),
        (HEADERS + b"Expect: miracles\r\n\r\n", 417, "100-continue"),
        (HEADERS + b"Transfer-Encoding: zip\r\n\r\n", 501, "chunked"),
    ],
)
def test_a_refusal_is_json_that_says_what_to_do(server, data, status, words):
    refused, told = ask(server, data)
    assert refused == status
    assert words in told["error"]
    assert list(told) == ["error"]
    assert "Traceback" not in server.log()


def test_the_longest_line_and_the_most_headers_are_taken(server):
    many = b"X: y\r\n" * 99
    longest = b"GET /" + b"a" * 8176 + b" HTTP/1.1\r\n"
    assert len(longest) == 8190 + 2
    assert ask(server, longest + b"Host: localhost\r\n" + many + b"\r\n")[0] == 404


def test_tls_is_refused_at_the_start(tmp_path, upstream):
    command = ("-m", "gunicorn", "--certfile", "app.py", "--keyfile", "app.py")
    server = Server(tmp_path / "server", upstream.url, command)
    try:
        assert server.process.wait(30) != 0
        assert "TLS is for a proxy in front of this server" in server.log()
    finally:
        server.close()
