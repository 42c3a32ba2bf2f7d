"""Real gunicorn processes that edit images: killed at each step, filled, raced and left alone."""

import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import wait_until
from edits import edit, form, name, png, request, send, sent
from server import Server

pytestmark = pytest.mark.processes

# gunicorn with a step that, while there is a file `stop`, waits before it is done, or after.
STOPPING = """
import importlib, sys, time
from pathlib import Path
from gunicorn.app.wsgiapp import run

def stop(where, is_done):
    module, *names, last = where.split(".")
    owner = importlib.import_module(module)
    for name in names:
        owner = getattr(owner, name)
    step = getattr(owner, last)

    def stopping(*args, **values):
        found = step(*args, **values) if is_done else None
        if Path("stop").exists():
            Path("stopped").touch()
            while Path("stop").exists():
                time.sleep(0.01)
        return found if is_done else step(*args, **values)

    setattr(owner, last, stopping)

sys.argv = ["gunicorn"]
"""


@pytest.fixture
def start(tmp_path, upstream):
    """Return a maker of servers that share one folder, one database and one upstream."""
    made = []

    def make(program="", **values):
        values = {"CONCURRENCY": 3, "RETRY_BACKOFF": 0.05, **values}
        command = ("-c", f"{STOPPING}{program}\nrun()") if program else ("-m", "gunicorn")
        made.append(Server(tmp_path / "server", upstream.url, command, **values))
        return made[-1].ready()

    yield make
    (tmp_path / "server" / "stop").unlink(missing_ok=True)
    upstream.gate.set()
    for server in made:
        server.close()


def stopped(server, work, *args):
    """Have that work done in a thread, until it comes to the step; return the thread."""
    (server.folder / "stop").touch()

    def try_to():
        with suppress(OSError, IndexError):  # It is not answered where the server is killed.
            work(server, *args)

    thread = threading.Thread(target=try_to)
    thread.start()
    wait_until((server.folder / "stopped").exists, what=server.log())
    return thread


def files(server):
    """Return the names of all that is in INPUT_DIR."""
    return sorted(path.name for path in (server.folder / "inputs").iterdir())


def needed(server):
    """Return the names of the files that the tasks need."""
    rows = server.rows("SELECT DISTINCT sha256 || '.' || extension FROM inputs ORDER BY 1")
    return [row[0] for row in rows]


def delete(server, task_id):
    with suppress(ValueError):  # 204 has no body.
        status, _, answer = server.request("DELETE", f"/tasks/{task_id}")
        raise AssertionError(f"{status} {answer}")


def check_all_end(server, upstream, *expected):
    """Assert that these prompts are done, each with its pictures, and that no other file is there.

    Each is a prompt and the pictures that Chutes was to be sent with it.
    """
    wait_until(lambda: files(server) == needed(server), what=f"{files(server)} {needed(server)}")
    server.request("POST", "/queue/resume")
    found = [row[0] for row in server.rows("SELECT id FROM tasks")]
    tasks = server.all_end(found)
    assert {task["status"] for task in tasks} <= {"completed"}, tasks
    assert sorted(task["prompt"] for task in tasks) == sorted(prompt for prompt, _ in expected)
    for prompt, pictures in expected:
        bodies = [sent(fields) for fields in upstream.calls if fields["prompt"] == prompt]
        assert bodies and all(body == pictures for body in bodies), prompt
    assert files(server) == needed(server)
    assert files(server) == sorted({name(picture) for _, each in expected for picture in each})


ADDING = {
    "the pictures are on disk, but have no names": ("inputs.InputFolder.publish", False),
    "one has its name, the other has not": ("pathlib.Path.replace", True),
    "they have their names, which may be lost": ("inputs.sync_folder", False),
    "there is no row yet": ("db._insert", False),
    "the row is not on disk": ("db._insert", True),
    "the row is there, but nobody was told": ("worker.Worker.wake", False),
}


@pytest.mark.parametrize("step", ADDING)
def test_a_kill_while_an_edit_is_added_leaves_all_of_it_or_nothing(start, upstream, step):
    first, second, other = png(1), png(2), png(3)
    server = start(f"stop{ADDING[step]}")
    server.running()
    server.request("POST", "/queue/pause")
    edit(server, other, prompt="before")
    thread = stopped(server, edit, first, second)
    server.kill_all()
    thread.join()
    again = start()
    expected = [("before", [other])]
    if again.rows("SELECT 1 FROM tasks WHERE prompt = 'p'"):
        assert "row is there" in step
        expected.append(("p", [first, second]))
    check_all_end(again, upstream, *expected)


def test_a_kill_in_the_middle_of_an_upload_leaves_nothing(start, upstream):
    whole, half = png(1), request(form(png(2), png(3, 300), prompt="p"))[:-1000]
    server = start()
    server.running()
    server.request("POST", "/queue/pause")
    edit(server, whole, prompt="before")
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(half)
        wait_until(lambda: len(files(server)) == 3)
        server.kill_all()
    assert len(files(server)) == 3
    check_all_end(start(), upstream, ("before", [whole]))


def test_what_a_killed_process_of_several_has_left_is_removed_too(start, upstream):
    server = start()
    runner = server.running()
    (standby,) = wait_until(lambda: set(server.workers()) - {runner})
    server.send(signal.SIGSTOP, runner)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(request(form(png(3, 300), prompt="p"))[:-1000])
        wait_until(lambda: len(files(server)) == 1)
        server.send(signal.SIGKILL, standby)
        server.send(signal.SIGCONT, runner)
        wait_until(lambda: files(server) == [], what="it stays until the server is started anew")


@pytest.mark.parametrize("interrupted", ["retry", "fail"])
@pytest.mark.parametrize("step", ["half of the body is sent", "the whole body is sent"])
def test_a_kill_during_the_call_has_the_same_pictures_sent_again(
    start, upstream, step, interrupted
):
    pictures = [png(n, 300) for n in range(3)]
    server = start("stop('base64.b64encode', True)", INTERRUPTED=interrupted)
    server.running()
    upstream.gate.clear()
    if step == "the whole body is sent":
        edit(server, *pictures)
        wait_until(lambda: upstream.at_once == 1)
    else:
        stopped(server, edit, *pictures).join()
        assert upstream.calls == []
    server.kill_all()
    (server.folder / "stop").unlink(missing_ok=True)
    upstream.gate.set()
    calls = len(upstream.calls)
    again = start(INTERRUPTED=interrupted)
    if interrupted == "retry":
        check_all_end(again, upstream, ("p", pictures))
        assert len(upstream.calls) == calls + 1
        ((attempts,),) = again.rows("SELECT attempts FROM tasks")
        assert attempts == 2
        return
    ((task_id,),) = again.rows("SELECT id FROM tasks")
    (task,) = again.all_end([task_id])
    assert (task["error_code"], len(upstream.calls)) == ("interrupted", calls)
    assert files(again) == sorted(map(name, pictures)), "a retry needs them"
    assert again.request("POST", f"/tasks/{task_id}/retry")[0] == 202
    delete(again, task_id)
    check_all_end(again, upstream, ("p", pictures))


DELETING = {
    "the row is there yet": ("db._delete", False),
    "the row is gone, but not on disk": ("db._delete", True),
    "the row is gone": ("db.Database.remove_inputs", False),
    "the file is to be removed": ("inputs.InputFolder.remove", False),
    "the file is gone": ("inputs.InputFolder.remove", True),
}


@pytest.mark.parametrize("step", DELETING)
def test_a_kill_while_a_task_is_deleted_leaves_all_of_it_or_nothing(start, upstream, step):
    own, shared = png(1), png(2)
    server = start(f"stop{DELETING[step]}")
    server.running()
    server.request("POST", "/queue/pause")
    task_id = edit(server, own, shared)
    edit(server, shared, prompt="after")
    thread = stopped(server, delete, task_id)
    server.kill_all()
    thread.join()
    again = start()
    expected = [("after", [shared])]
    if "row is there" in step or "not on disk" in step:
        expected.append(("p", [own, shared]))
    check_all_end(again, upstream, *expected)


# Many at once


def test_the_same_bytes_of_many_clients_are_one_file_until_the_last_task_goes(start, upstream):
    picture = png(1, 300)
    server = start(WORKERS=2)
    server.running()
    server.request("POST", "/queue/pause")
    with ThreadPoolExecutor(20) as pool:
        ids = list(pool.map(lambda n: edit(server, picture, prompt=f"p{n}"), range(20)))
        assert len(set(ids)) == 20
        assert files(server) == [name(picture)]
        list(pool.map(lambda task_id: delete(server, task_id), ids[1:]))
    assert files(server) == [name(picture)]
    assert server.rows("SELECT task FROM inputs") == [(ids[0],)]
    delete(server, ids[0])
    assert files(server) == []
    assert upstream.calls == []


def test_a_file_that_is_being_removed_is_not_taken_for_a_new_task(start, upstream):
    picture = png(1)
    server = start("stop('inputs.InputFolder.remove', False)")
    server.running()
    server.request("POST", "/queue/pause")
    deletion = stopped(server, delete, edit(server, picture))
    answers = []
    addition = threading.Thread(target=lambda: answers.append(send(server, picture, prompt="new")))
    addition.start()
    addition.join(1)
    assert answers == [], "nobody adds while a file is removed"
    (server.folder / "stop").unlink()
    addition.join()
    deletion.join()
    assert [status for status, _ in answers] == [202]
    check_all_end(server, upstream, ("new", [picture]))


def test_adds_and_deletes_of_the_same_bytes_leave_no_task_without_its_file(start, upstream):
    picture = png(1)
    server = start(WORKERS=2)
    server.running()
    server.request("POST", "/queue/pause")
    last = edit(server, picture)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(60):
            added = pool.submit(edit, server, picture)
            deleted = pool.submit(delete, server, last)
            deleted.result()
            last = added.result()
            assert files(server) == [name(picture)]
    check_all_end(server, upstream, ("p", [picture]))


def proportional_size(server):
    """Return the memory of all processes in bytes, what they share counted once."""
    total = 0
    for pid in (server.process.pid, *server.workers()):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024


def test_large_uploads_and_their_calls_take_little_memory(start, upstream):
    pictures = [png(n, 2240) for n in range(10)]
    assert min(map(len, pictures)) > 15_000_000
    server = start(CONCURRENCY=10, WORKERS=2)
    server.running()
    with ThreadPoolExecutor(4) as pool:  # What each process loads with its first edit, stays.
        server.all_end(list(pool.map(lambda n: edit(server, png(n)), range(20))))
    upstream.calls.clear()
    before, peak, done = proportional_size(server), [], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak.append(proportional_size(server))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(10) as pool:
            ids = list(pool.map(lambda n: edit(server, pictures[n], prompt=f"{n}"), range(10)))
        tasks = server.all_end(ids)
    finally:
        done.set()
        watcher.join()
    assert {task["status"] for task in tasks} == {"completed"}
    for fields in upstream.calls:
        assert sent(fields) == [pictures[int(fields["prompt"])]]
    assert max(peak) - before < 24 * 2**20


# Clients that do not send to the end


@pytest.mark.parametrize("way", ["goes away", "resets", "stalls", "drips"])
def test_an_upload_that_does_not_end_leaves_nothing_and_holds_nobody_up(start, way):
    program = "import gthread as g; g.STALL_SECONDS = g.SECONDS_PER_MIB = 2"
    server = start(program, THREADS=4, WORKERS=1)
    server.running()
    half = request(form(png(1, 300), png(2, 300), prompt="p"))[:-100_000]
    clients = [socket.create_connection(("127.0.0.1", server.port), 30) for _ in range(4)]
    for client in clients:
        client.sendall(half)
    wait_until(lambda: len(files(server)) == 8)
    (task,) = server.all_end([server.submit("somebody else's")])
    assert task["status"] == "completed"
    assert len(files(server)) == 8, "they are waited for"
    if way in ("stalls", "drips"):
        check_given_up(clients, drip=b"." if way == "drips" else b"")
    for client in clients:
        if way == "resets":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    wait_until(lambda: files(server) == [])
    assert server.rows("SELECT count(*) FROM inputs") == [(0,)]
    edit(server, png(1, 300))
    assert "Traceback" not in server.log()


def check_given_up(clients, drip):
    """Drip until each client has its answer."""
    for client in clients:
        client.settimeout(0.2)
    waiting = list(clients)
    while waiting:
        for client in list(waiting):
            with suppress(TimeoutError):
                client.sendall(drip)
                assert client.recv(13) == b"HTTP/1.1 400 "
                waiting.remove(client)
