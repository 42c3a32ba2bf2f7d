"""Real gunicorn processes, killed, stopped, told and reloaded, while the upstream counts."""

import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import rows
from conftest import PROMPT, TOKEN, wait_until
from PIL import Image
from server import Server, alive, checkout, memory
from upstream import Answer, closed_port

from db import Database
from records import NewTask

pytestmark = pytest.mark.processes


@pytest.fixture
def start(tmp_path, upstream):
    """Return a maker of servers that share one folder, one database and one upstream."""
    made = []

    def make(**values):
        values = {"CONCURRENCY": 3, "RETRY_BACKOFF": 0.05, **values}
        made.append(Server(tmp_path / "server", upstream.url, **values))
        return made[-1].ready()

    yield make
    upstream.gate.set()
    for server in made:
        server.close()


def submit(server, count):
    return [server.submit(f"p{n}") for n in range(count)]


def all_completed(server, ids):
    tasks = server.all_end(ids)
    assert {task["status"] for task in tasks} == {"completed"}, tasks
    server.check_files(tasks)
    return tasks


def test_kill_9_of_the_process_that_runs_the_queue(start, upstream):
    server = start()
    runner = server.running()
    upstream.gate.clear()
    ids = submit(server, 8)
    wait_until(lambda: upstream.at_once == 3)
    server.send(signal.SIGKILL, runner)
    wait_until(lambda: len(upstream.calls) == 6, what="the standby did not take over")
    upstream.gate.set()
    tasks = all_completed(server, ids)
    assert sorted(task["attempts"] for task in tasks) == [1] * 5 + [2] * 3
    assert len(upstream.calls) == 8 + 3, "only what was cut is called again"
    assert upstream.most_at_once == 3
    assert server.running() != runner


def test_kill_9_of_the_master(start, upstream):
    server = start()
    runner = server.running()
    upstream.gate.clear()
    ids = submit(server, 8)
    wait_until(lambda: upstream.at_once == 3)
    server.send(signal.SIGKILL)
    server.process.wait()
    successor = start()
    late = successor.submit("late")
    assert alive(runner), "its calls have their grace"
    upstream.gate.set()
    tasks = all_completed(successor, [*ids, late])
    assert [task["attempts"] for task in tasks] == [1] * 9
    assert len(upstream.calls) == 9, "no live call was made again"
    assert upstream.most_at_once == 3
    wait_until(lambda: not alive(runner))


def test_the_orphans_of_a_killed_master_claim_nothing_more(start, upstream):
    server = start(CONCURRENCY=1)
    server.running()
    upstream.gate.clear()
    ids = submit(server, 3)
    wait_until(lambda: upstream.at_once == 1)
    workers = server.workers()
    server.send(signal.SIGKILL)
    server.process.wait()
    upstream.gate.set()
    wait_until(lambda: not any(alive(pid) for pid in workers))
    assert upstream.prompts() == ["p0"]
    all_completed(start(CONCURRENCY=1), ids)
    assert upstream.prompts() == ["p0", "p1", "p2"]


def test_kill_9_of_all_processes_at_once(start, upstream):
    server = start()
    server.running()
    upstream.gate.clear()
    ids = submit(server, 8)
    wait_until(lambda: upstream.at_once == 3)
    server.kill_all()
    upstream.gate.set()
    tasks = all_completed(start(), ids)
    assert sorted(task["attempts"] for task in tasks) == [1] * 5 + [2] * 3
    assert len(upstream.calls) == 8 + 3
    assert upstream.most_at_once == 3


def test_kill_9_again_and_again_loses_nothing(start, upstream):
    chance = random.Random(5)
    server = start(MAX_ATTEMPTS=100)
    upstream.decide = lambda fields: time.sleep(chance.uniform(0, 0.02)) or Answer()
    ids, needless = [], 0
    for turn in range(6):
        ids += submit(server, 15)
        wait_until(lambda: len(upstream.calls) >= len(ids) - 15 + chance.randrange(1, 12))  # noqa: B023
        if turn % 2:
            server.kill_all()
            server = start(MAX_ATTEMPTS=100)
        else:
            server.send(signal.SIGKILL, server.running())
        needless += 3
    tasks = all_completed(server, ids)
    calls = len(upstream.calls)
    assert len(ids) <= calls <= len(ids) + needless
    assert upstream.most_at_once <= 3
    assert sum(task["attempts"] for task in tasks) >= calls
    assert server.rows("SELECT count(*) FROM tasks WHERE status != 'completed'") == [(0,)]
    assert server.rows("SELECT count(*) FROM calls WHERE outcome IS NULL") == [(0,)]


def test_a_frozen_process_keeps_the_queue(start, upstream):
    server = start()
    runner = server.running()
    upstream.gate.clear()
    ids = submit(server, 6)
    wait_until(lambda: upstream.at_once == 3)
    server.send(signal.SIGSTOP, runner)
    upstream.gate.set()
    wait_until(lambda: upstream.at_once == 0)
    # The standby looks for the lock fifty times in this second, and must not have it.
    deadline = time.monotonic() + 1
    wait_until(lambda: time.monotonic() > deadline)
    assert len(upstream.calls) == 3
    server.send(signal.SIGCONT, runner)
    tasks = all_completed(server, ids)
    assert [task["attempts"] for task in tasks] == [1] * 6
    assert len(upstream.calls) == 6
    assert server.running() == runner


def test_term_lets_running_calls_end_and_starts_no_more(start, upstream):
    server = start()
    server.running()
    upstream.gate.clear()
    ids = submit(server, 8)
    wait_until(lambda: upstream.at_once == 3)
    server.send(signal.SIGTERM)
    wait_until(lambda: "no new calls" in server.log())
    upstream.gate.set()
    assert server.process.wait(30) == 0
    assert len(upstream.calls) == 3
    assert server.rows("SELECT status, count(*) FROM tasks GROUP BY 1 ORDER BY 1") == [
        ("completed", 3),
        ("pending", 5),
    ]
    all_completed(start(), ids)
    assert len(upstream.calls) == 8


@pytest.mark.parametrize("interrupted", ["retry", "fail"])
def test_term_cuts_what_outlasts_the_grace_and_does_not_count_it(start, upstream, interrupted):
    values = {"SHUTDOWN_GRACE": 0.2, "INTERRUPTED": interrupted, "MAX_ATTEMPTS": 1}
    server = start(**values)
    server.running()
    upstream.gate.clear()
    ids = submit(server, 5)
    wait_until(lambda: upstream.at_once == 3)
    assert server.stop() == 0
    wait_until(lambda: len(upstream.cut) == 3)
    assert server.rows("SELECT DISTINCT status, attempts FROM tasks") == [("pending", 0)]
    upstream.gate.set()
    tasks = all_completed(start(**values), ids)
    assert [task["attempts"] for task in tasks] == [1] * 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_other_ways_to_stop_are_as_gentle(start, upstream, number):
    server = start()
    server.running()
    upstream.gate.clear()
    ids = submit(server, 3)
    wait_until(lambda: upstream.at_once == 3)
    server.send(number)
    wait_until(lambda: "no new calls" in server.log())
    upstream.gate.set()
    assert server.process.wait(30) == 0
    assert server.rows("SELECT DISTINCT status FROM tasks") == [("completed",)]
    assert len(ids) == len(upstream.calls) == 3


def test_hup_refuses_no_request_and_runs_no_task_twice(start, upstream):
    server = start()
    first = server.running()
    upstream.decide = lambda fields: time.sleep(0.02) or Answer()
    ids, faults, done = [], [], threading.Event()

    def keep_asking(name):
        while not done.is_set():
            try:
                ids.append(server.submit(f"{name}-{len(ids)}"))
                done.wait(0.005)
            except Exception as error:
                faults.append(error)

    threads = [threading.Thread(target=keep_asking, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        server.reload()
    done.set()
    for thread in threads:
        thread.join()
    assert faults == []
    tasks = all_completed(server, ids)
    assert {task["attempts"] for task in tasks} == {1}
    assert sorted(upstream.prompts()) == sorted(task["prompt"] for task in tasks)
    assert upstream.most_at_once <= 3
    assert server.running() != first


def test_hup_reads_the_settings_anew_and_survives_bad_ones(start, upstream):
    server = start(SHUTDOWN_GRACE=0)
    server.running()
    upstream.gate.clear()
    env = server.folder / ".env"
    env.write_text("DEFAULT_MODEL=FLUX.1-dev\n")
    server.reload()
    assert server.status(server.submit())["model"] == "FLUX.1-dev"
    env.write_text("DEFAULT_MODEL=../etc\n")
    server.reload()
    assert "DEFAULT_MODEL=../etc: must be" in server.log()
    assert server.status(server.submit())["model"] == "FLUX.1-dev"
    (server.folder / "other.sqlite3").write_text("something else " * 1000)
    for bad in ("OUTPUT_DIR=app.py", "DATABASE_PATH=other.sqlite3"):
        env.write_text(f"{bad}\n")
        server.reload()
        assert bad.partition("=")[0] in server.log()
        assert server.status(server.submit())["model"] == "FLUX.1-dev"


def test_a_task_added_in_a_standby_process_is_started(start, upstream):
    server = start()
    server.running()
    standby = Database(server.folder / "tasks.sqlite3")
    standby.add([NewTask("by-a-standby", "p", "m", {})], time.time())
    wait_until(lambda: upstream.calls)
    standby.close()
    assert server.all_end(["by-a-standby"])[0]["status"] == "completed"


def test_a_long_backlog_costs_only_its_rows(start, upstream, tmp_path):
    upstream.gate.clear()
    figures = []
    for count in (10, 100_000):
        server = start(CONCURRENCY=1)
        server.kill_all()
        tasks = (rows.task(f"{count}-{n}", prompt="word " * 20) for n in range(count))
        rows.insert(server.folder / "tasks.sqlite3", "tasks", tasks)
        calls = len(upstream.calls)
        began = time.monotonic()
        server = start(CONCURRENCY=1)
        wait_until(lambda: len(upstream.calls) > calls)  # noqa: B023
        figures.append((time.monotonic() - began, memory(server.running(), "VmRSS")))
        server.kill_all()
    (short, small), (long, large) = figures
    assert long < short + 1
    assert large - small < 8 * 1024 * 1024


@pytest.mark.parametrize(
    ("kind", "side", "options", "least"),
    [("PNG", 3200, {"compress_level": 0}, 29 << 20), ("JPEG", 4096, {"quality": 75}, 9 << 20)],
)
def test_streaming_is_flat(start, upstream, kind, side, options, least):
    noise = random.Random(7).randbytes(side * side * 3)
    out = io.BytesIO()
    Image.frombytes("RGB", (side, side), noise).save(out, kind, **options)
    data = out.getvalue()
    assert len(data) > least
    upstream.decide = lambda fields: Answer(body=data)
    server = start(CONCURRENCY=10, WORKERS=1)
    runner = server.running()
    upstream.gate.clear()
    ids = submit(server, 10)
    wait_until(lambda: upstream.at_once == 10)
    before = memory(runner, "VmRSS")
    upstream.gate.set()
    all_completed(server, ids)
    assert memory(runner, "VmHWM") - before < 16 * 1024 * 1024


# Waiting, canceling and fetching, over all processes


def test_waiters_leave_threads_for_the_others(start, upstream):
    server = start(THREADS=8, WORKERS=1)
    server.running()
    upstream.gate.clear()
    task_id = server.submit()
    wait_until(lambda: upstream.at_once == 1)
    answers = []

    def wait():
        answers.append(server.request("GET", f"/status/{task_id}?wait=60", timeout=70))

    waiters = [threading.Thread(target=wait) for _ in range(30)]
    for thread in waiters:
        thread.start()
    # Half of the 8 threads may wait; the others were answered at once.
    wait_until(lambda: len(answers) == 30 - 4)
    for _ in range(50):
        assert server.status(task_id)["status"] == "processing"
    assert len(answers) == 30 - 4, "the others still wait"
    upstream.gate.set()
    for thread in waiters:
        thread.join(30)
    assert [answer[2]["status"] for answer in answers[26:]] == ["completed"] * 4


def test_a_cancel_in_any_process_frees_the_upstream(start, upstream):
    server = start(CONCURRENCY=4)
    server.running()
    upstream.gate.clear()
    ids = submit(server, 4)
    wait_until(lambda: upstream.at_once == 4)
    for left, task_id in ((3, ids[0]), (2, ids[1])):
        status, _, task = server.request("POST", f"/tasks/{task_id}/cancel")
        assert (status, task["status"], task["error_code"]) == (200, "failed", "canceled")
        assert upstream.at_once == left
    elsewhere = Database(server.folder / "tasks.sqlite3")
    for task_id in ids[2:]:
        elsewhere.cancel(task_id, time.time())
    elsewhere.close()
    wait_until(lambda: upstream.at_once == 0)
    assert [task["error_code"] for task in server.all_end(ids)] == ["canceled"] * 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_who_waits_has_the_grace_too(start, upstream, number):
    server = start(SHUTDOWN_GRACE=30)
    server.running()
    upstream.gate.clear()
    task_id = server.submit()
    wait_until(lambda: upstream.at_once == 1)
    before = set(server.workers())
    waiters = all_wait(server, f"/status/{task_id}?wait=60", 6)
    server.send(number)
    wait_until(lambda: "Handling signal" in server.log())
    if number == signal.SIGHUP:
        wait_until(lambda: len(set(server.workers()) - before) == 2)
    upstream.gate.set()
    said = [answer.rpartition(b"\r\n")[2] for answer in answers(waiters)]
    assert [json.loads(one)["status"] for one in said] == ["completed"] * 6
    assert len(upstream.calls) == 1


def test_who_waits_is_let_go_when_the_grace_is_over(start, upstream):
    server = start(SHUTDOWN_GRACE=1)
    server.running()
    upstream.gate.clear()
    task_id = server.submit()
    wait_until(lambda: upstream.at_once == 1)
    waiters = all_wait(server, f"/images/{task_id}?wait=60", 6)
    server.send(signal.SIGTERM)
    assert [answer[:12] for answer in answers(waiters)] == [b"HTTP/1.0 503"] * 6
    assert server.process.wait(60) == 0


def all_wait(server, path, count):
    """Ask for the path on so many connections, and return them when the server has read it all."""
    made = []
    for _ in range(count):
        made.append(socket.create_connection(("127.0.0.1", server.port), 60))
        made[-1].sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())

    def are_read():
        queues = [fields[4] for fields in established(server.port)]
        return len(queues) == count and all(queue.endswith(":00000000") for queue in queues)

    wait_until(are_read)
    # What has come after them is answered, so that by now they wait.
    for _ in range(20):
        server.request("GET", "/queue")
    return made


def answers(connections):
    """Read all to their ends, together: gunicorn waits two seconds for each to be closed."""

    def read(connection):
        with connection, connection.makefile("rb") as file:
            return file.read()

    with ThreadPoolExecutor(len(connections)) as pool:
        return list(pool.map(read, connections))


def established(port):
    """Return the connections that are open to a port on loopback."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return [f for f in fields if f[1].endswith(f":{port:04X}") and f[3] == "01"]


def test_fifty_at_once_with_one_key_make_one_task_in_all_processes(start, upstream):
    server = start(WORKERS=4)
    server.running()
    together, answers = threading.Barrier(50), []

    def send():
        request = urllib.request.Request(
            f"{server.address}/generate", b'{"prompt": "p"}', {"Idempotency-Key": "once"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        together.wait(30)
        with opener.open(request, timeout=30) as answer:
            answers.append((answer.headers["Idempotent-Replayed"], json.load(answer)["id"]))

    threads = [threading.Thread(target=send) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 50 and len({task_id for _, task_id in answers}) == 1
    assert sum(replayed == "true" for replayed, _ in answers) == 49
    server.all_end([answers[0][1]])
    assert len(upstream.calls) == 1
    assert server.rows("SELECT count(*) FROM tasks") == [(1,)]


def test_curl_ends_with_the_picture_under_its_right_name(start, upstream, tmp_path):
    server = start()
    server.running()
    upstream.decide = lambda fields: time.sleep(0.5) or Answer()
    task_id = server.submit()
    folder = tmp_path / "downloads"
    folder.mkdir()
    address = f"{server.address}/images/{task_id}"
    command = ["curl", "-sfOJ", "--noproxy", "*", "--retry", "9", f"{address}?wait=60"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    (file,) = folder.iterdir()
    assert (file.name, file.read_bytes()) == (f"{task_id}.png", Answer().body)


def test_curl_without_a_wait_comes_again(start, upstream, tmp_path):
    server = start()
    server.running()
    upstream.gate.clear()
    task_id = server.submit()
    command = ["curl", "-sfOJ", "--noproxy", "*", "--retry", "9"]
    curl = subprocess.Popen([*command, f"{server.address}/images/{task_id}"], cwd=tmp_path)
    wait_until(lambda: f"GET /images/{task_id} 503" in server.log())
    upstream.gate.set()
    assert curl.wait(60) == 0
    assert (tmp_path / f"{task_id}.png").read_bytes() == Answer().body


# Starting, and refusing to


def run(folder, *command, **environ):
    """Run a command in a checkout without settings until it ends, and return it."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [sys.executable, *command],
        cwd=checkout(folder),
        env={**keep, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, ["CHUTES_API_TOKEN", "script/demo"]),
        ({"CHUTES_API_TOKEN": TOKEN, "PORT": "99999"}, ["PORT=99999", "65535"]),
        (
            {"CHUTES_API_TOKEN": TOKEN, "HOST": "0.0.0.0"},
            ["HOST=0.0.0.0", "API_KEYS", "ALLOW_ANONYMOUS"],
        ),
        (
            {"CHUTES_API_TOKEN": TOKEN, "CHUTES_API_URL": "http://example.com"},
            ["CHUTES_API_URL", "https"],
        ),
    ],
)
@pytest.mark.parametrize("command", [("-m", "gunicorn"), ("-m", "flask", "--app", "app", "run")])
def test_a_bad_setting_stops_the_start_with_one_line(tmp_path, command, environ, words):
    ended = run(tmp_path / "server", *command, **environ)
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, ended.stderr
    assert all(word in lines[0] for word in words)
    assert TOKEN not in ended.stderr + ended.stdout


def test_a_database_of_another_program_stops_the_start(tmp_path):
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "tasks.sqlite3").write_text("something else " * 1000)
    ended = run(
        tmp_path / "server",
        *("-m", "gunicorn"),
        CHUTES_API_TOKEN=TOKEN,
        PORT=str(closed_port()),
    )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("DATABASE_PATH=") and "file is not a database" in line
    assert (tmp_path / "server" / "tasks.sqlite3").read_text() == "something else " * 1000
    assert not list((tmp_path / "server").glob("tasks.sqlite3?*")), "nothing is left beside it"


def test_a_busy_port_stops_the_start_at_once_with_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        began = time.monotonic()
        ended = run(tmp_path / "server", "-m", "gunicorn", CHUTES_API_TOKEN=TOKEN, PORT=str(port))
        # gunicorn alone would try again for five seconds.
        assert time.monotonic() - began < 5
    assert ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if "Starting gunicorn" not in line]
    assert line.startswith(f"HOST=127.0.0.1 PORT={port}: Address already in use")
    assert "set another PORT" in line


def test_an_address_of_another_machine_is_told_as_well(tmp_path):
    values = {"CHUTES_API_TOKEN": TOKEN, "HOST": "192.0.2.1", "ALLOW_ANONYMOUS": "1"}
    ended = run(tmp_path / "server", "-m", "gunicorn", PORT=str(closed_port()), **values)
    assert "HOST=192.0.2.1" in ended.stderr.splitlines()[-1]
    assert "Cannot assign requested address; correct HOST" in ended.stderr


@pytest.fixture
def isolated():
    """Return how to run a program in a network of its own, which nobody can reach."""
    command = ["unshare", "--net"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make a network of its own")
    return lambda *words: (
        "-c",
        f"import os; os.execvp('unshare', {[*command, sys.executable, *words]})",
    )


@pytest.mark.parametrize(
    ("options", "environ", "host"),
    [
        (["-b", "0.0.0.0:8000"], {}, "0.0.0.0"),
        ([], {"GUNICORN_CMD_ARGS": "-b 0.0.0.0:8000"}, "0.0.0.0"),
        (["-b", "[::]:8000"], {}, "::"),
        (["-b", "unix:socket", "-b", "0.0.0.0:8000"], {}, "0.0.0.0"),
    ],
)
def test_gunicorns_own_way_beyond_loopback_is_refused_too(
    tmp_path, isolated, options, environ, host
):
    command = isolated("-m", "gunicorn", *options)
    ended = run(tmp_path / "server", *command, CHUTES_API_TOKEN=TOKEN, **environ)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert f"HOST={host}:" in last and "ALLOW_ANONYMOUS" in last
    assert "Booting worker" not in ended.stderr


def test_gunicorn_without_its_settings_is_refused_beyond_loopback_too(tmp_path, isolated):
    command = isolated("-m", "gunicorn", "-c", "/dev/null", "-b", "0.0.0.0:8000", "app:app")
    ended = run(tmp_path / "server", *command, CHUTES_API_TOKEN=TOKEN)
    assert ended.returncode != 0
    assert "HOST=0.0.0.0: anyone who reaches this address" in ended.stderr


def test_gunicorns_own_lines_tell_no_secret_and_no_prompt(start):
    key = 'a+b/c=="\\of-the-review'
    server = start(API_KEYS=key)
    for text in (
        f"GET /queue HTTP/1.1\r\nX-API-Key {key}\r\n\r\n",
        f'{{"prompt":"{PROMPT.replace(" ", "_")}"}}\r\n\r\n',
        f"GET /{urllib.parse.quote(key, safe='')} HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(text.encode())
            assert client.recv(10) == b"HTTP/1.1 4"
    said = server.log()
    assert said.count("Invalid request") == 2
    assert "of-the-review" not in said
    assert PROMPT.replace(" ", "_") not in said


def test_a_reload_without_keys_ends_a_server_that_listens_beyond_loopback(
    tmp_path, upstream, isolated
):
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / ".env").write_text("API_KEYS=a-key\n")
    server = Server(folder, upstream.url, isolated("-m", "gunicorn", "-b", "0.0.0.0:8000"))
    try:
        wait_until(lambda: "Booting worker" in server.log(), what=server.log())
        (folder / ".env").write_text("")
        server.send(signal.SIGHUP)
        server.process.wait(60)
        assert "HOST=0.0.0.0: anyone who reaches this address" in server.log()
    finally:
        server.close()


def test_gunicorns_patience_is_longer_than_the_grace(tmp_path):
    environ = {"CHUTES_API_TOKEN": TOKEN, "SHUTDOWN_GRACE": "100"}
    shown = run(tmp_path / "server", "-m", "gunicorn", "--print-config", **environ).stdout
    values = dict(re.findall(r"^(\w+)\s+= (.+)$", shown, re.M))
    assert int(values["graceful_timeout"]) >= 105
    assert int(values["timeout"]) >= int(values["graceful_timeout"]) + 10


def test_settings_of_the_env_file_reach_gunicorn_and_the_application(tmp_path, upstream):
    folder = tmp_path / "server"
    folder.mkdir()
    port = closed_port()
    (folder / ".env").write_text(f"PORT={port}\nCHUTES_API_URL={upstream.url}\nWORKERS=1\n")
    server = Server(folder, "", command=("-m", "gunicorn", "app:app"), PORT="", WORKERS="")
    server.address = f"http://127.0.0.1:{port}"
    try:
        server.ready()
        assert len(server.workers()) == 1
        all_completed(server, [server.submit()])
        assert f"Listening at: http://127.0.0.1:{port}" in server.log()
    finally:
        server.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_flask_run_serves_and_stops_as_gently(tmp_path, upstream, number):
    folder = tmp_path / "server"
    port = str(closed_port())
    command = ("-m", "flask", "--app", "app", "run", "--port", port)
    server = Server(folder, upstream.url, command=command)
    server.address = f"http://127.0.0.1:{port}"
    try:
        server.ready()
        upstream.gate.clear()
        server.submit("first")
        server.submit("second")
        wait_until(lambda: upstream.at_once == 2)
        server.send(number)
        wait_until(lambda: "no new calls" in server.log())
        upstream.gate.set()
        assert server.process.wait(30) in (0, 1, 130)
        assert server.rows("SELECT DISTINCT status FROM tasks") == [("completed",)]
    finally:
        server.close()


def test_gunicorns_lines_are_json_too(start):
    server = start(LOG_FORMAT="json")
    server.all_end([server.submit("words that are nobody's business")])
    server.request("GET", "/nowhere")
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.log().splitlines()]
    loggers = {line["logger"] for line in lines}
    assert {"gunicorn.error", "app", "worker"} <= loggers
    assert "nobody's business" not in server.log()
    assert TOKEN not in server.log()


def test_no_control_socket_is_left_open(start, tmp_path):
    server = start()
    sockets = Path("/proc/net/unix").read_text()
    assert str(server.folder) not in sockets
    assert "gunicorn.ctl" not in sockets


def test_a_chunked_body_over_the_limit_is_refused(start):
    server = start()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        )
        body = b'{"prompt": "p"}'.ljust(1024 * 1024 + 1)
        connection.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'{"error":"The body is larger than 1 MiB"}' in answer


def test_a_forwarded_scheme_is_not_believed_from_loopback_either(start):
    server = start()
    request = urllib.request.Request(
        f"{server.address}/queue",
        headers={"X-Forwarded-Proto": "https", "Origin": f"https://127.0.0.1:{server.port}"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10)
    with refused.value as answer:
        assert answer.code == 403


def test_a_broken_chunk_is_the_clients_fault(start):
    server = start()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\nzz\r\n"
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert "Traceback" not in server.log()


def refused(server):
    """Return whether every process refuses a task, and says that it is not ready, and why."""
    answers = [server.request("POST", "/generate", {"prompt": "p"}) for _ in range(12)]
    answers += [server.request("GET", "/readyz") for _ in range(12)]
    return {(status, "the server" in answer["error"]) for status, _, answer in answers} == {
        (503, True)
    }


@pytest.mark.parametrize("fault", ["deleted", "replaced"])
def test_a_database_that_is_replaced_is_refused_by_all_until_the_server_is_started_anew(
    start, upstream, fault
):
    server = start().ready()
    runner = server.running()
    server.all_end([server.submit()])
    path, other = server.folder / "tasks.sqlite3", server.folder / "other.sqlite3"
    Database(other).close()
    aside = path.rename(server.folder / "aside.sqlite3")
    if fault == "replaced":
        other.rename(path)
    assert refused(server)
    # One that begins now opens whatever is there, but not for tasks.
    server.send(signal.SIGKILL, runner)
    wait_until(lambda: len(server.workers()) == 2 and runner not in server.workers())
    wait_until(lambda: server.request("GET", "/healthz")[0] == 200)
    assert refused(server)
    server.kill_all()
    aside.replace(path)
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink()
    again = start().ready()
    (task,) = again.all_end([again.submit()])
    assert task["status"] == "completed"
    wait_until(lambda: again.request("GET", "/readyz")[0] == 200)


ENDS_WITH_A_BACKLOG = """
import threading, time
from concurrent.futures import thread
from pathlib import Path
import app
from records import NewTask

def tell():
    while not thread._shutdown:
        time.sleep(0.01)
    print("no new threads", flush=True)

service = app.app.extensions["service"]
service.database.add([NewTask(f"t{n}", "p", "m", {}) for n in range(20)], time.time())
service.worker.start()
threading.Thread(target=tell).start()
while not Path("end").exists():
    time.sleep(0.01)
"""


def test_a_program_that_ends_makes_no_more_calls_than_those_under_way(tmp_path, upstream):
    upstream.gate.clear()
    command = ("-c", ENDS_WITH_A_BACKLOG)
    server = Server(tmp_path / "server", upstream.url, command, CONCURRENCY=1)
    try:
        # It has come to the upstream: a claim alone may meet the end before there is a call.
        wait_until(lambda: upstream.at_once == 1, what=server.log())
        (server.folder / "end").touch()
        wait_until(lambda: "no new threads" in server.log())
        upstream.gate.set()
        assert server.process.wait(30) == 0
    finally:
        upstream.gate.set()
        server.close()
    assert server.rows("SELECT status, count(*) FROM tasks GROUP BY 1 ORDER BY 1") == [
        ("completed", 1),
        ("pending", 19),
    ]
    assert len(upstream.calls) == 1
