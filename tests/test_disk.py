"""What happens when the disk runs full, and how it is kept from that."""

import os
import subprocess
import threading
import time

import edits
import old_databases
import pytest
from conftest import finished, submit, wait_until
from queues import ever
from server import Server
from upstream import Answer, image_bytes

from db import Database, DatabaseError
from web import service, tasks


@pytest.fixture
def disk(tmp_path):
    """Mount a disk of 24 MB, where this user may, and return its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount; the same faults are injected elsewhere")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def free(folder):
    return os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize


def fill(folder, leave):
    """Leave so many bytes free on the disk; return the file that takes the others."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free(folder) - leave)
    return ballast


@pytest.fixture
def start(disk, upstream):
    servers = []

    def make(**values):
        servers.append(Server(disk / "server", upstream.url, RETRY_BACKOFF=0.1, **values))
        return servers[-1].ready()

    yield make
    for server in servers:
        server.close()


def fill_under_way(server, upstream, disk, tasks, leave):
    """Add tasks, and fill the disk once the first one's call is under way."""
    server.running()
    upstream.gate.clear()
    ids = [server.submit(f"p{n}") for n in range(tasks)]
    wait_until(lambda: upstream.at_once == 1)
    return ids, fill(disk, leave)


@pytest.mark.processes
def test_a_full_disk_loses_nothing_and_mends_itself(start, disk, upstream):
    server = start(MIN_FREE_MB=4, CONCURRENCY=1)
    ids, ballast = fill_under_way(server, upstream, disk, 3, 2 * 1024 * 1024)
    status, headers, answer = server.request("POST", "/generate", {"prompt": "p"})
    assert (status, int(headers["Retry-After"]) > 0) == (507, True)
    assert "MIN_FREE_MB" in answer["error"]
    filled = time.monotonic()
    wait_until(lambda: time.monotonic() > filled + 2)  # The disk is looked at once a second.
    upstream.gate.set()
    wait_until(lambda: server.status(ids[0])["status"] == "completed")
    waits = server.status(ids[1])["waiting_for"]
    assert waits == "less than 4 MB are free on the disk (MIN_FREE_MB)"
    assert len(upstream.calls) == 1, "nothing is paid for that may not be stored"
    ballast.unlink()
    ids.append(server.submit())
    tasks = server.all_end(ids)
    assert [(task["status"], task["attempts"]) for task in tasks] == [("completed", 1)] * 4
    server.check_files(tasks)


@pytest.mark.processes
def test_no_room_while_an_image_is_written(start, disk, upstream):
    data = image_bytes("PNG", (64, 64)) + os.urandom(6 * 1024 * 1024)
    upstream.decide = lambda fields: Answer(body=data)
    server = start(MIN_FREE_MB=0, CONCURRENCY=1)
    ids, ballast = fill_under_way(server, upstream, disk, 2, 3 * 1024 * 1024)
    upstream.gate.set()
    words = "There is no room on the disk for the image"
    wait_until(lambda: words in (server.status(ids[1])["waiting_for"] or ""))
    assert [server.status(task_id)["attempts"] for task_id in ids] == [0, 0]
    ballast.unlink()
    ballast = fill(disk, 5 * 1024 * 1024)
    freed = time.monotonic()
    wait_until(lambda: time.monotonic() > freed + 8)  # Longer than the hold would last.
    assert len(upstream.calls) == 1, "a call is paid for only where there is room for its image"
    ballast.unlink()
    tasks = server.all_end(ids)
    assert [(task["status"], task["attempts"]) for task in tasks] == [("completed", 1)] * 2
    server.check_files(tasks)
    assert len(upstream.calls) == 3


@pytest.mark.processes
def test_a_folder_that_is_read_only_loses_nothing_and_mends_itself(start, disk, upstream):
    folder = disk / "images"
    folder.mkdir()
    mount = ["mount", "--bind", str(folder), str(folder)]
    subprocess.run(mount, check=True)
    server = start(MIN_FREE_MB=0, OUTPUT_DIR=folder)
    try:
        server.request("POST", "/queue/pause")
        ids = [server.submit(f"p{n}") for n in range(60)]
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        server.request("POST", "/queue/resume")
        words = f"The images cannot be written to {folder} (Read-only file system)"
        wait_until(lambda: f"{words}; next try at" in (server.status(ids[0])["waiting_for"] or ""))
        since = time.monotonic()
        wait_until(lambda: time.monotonic() > since + 3)  # It is looked at once a second.
        queue = server.request("GET", "/queue")[2]
        assert (queue["pending"], queue["processing"]) == (60, 0)
        assert [hold["reason"] for hold in queue["held"]] == [words]
        status, _, answer = server.request("GET", "/readyz")
        assert (status, answer["problems"]) == (503, [words])
        ids.append(server.submit("still accepted"))
        assert upstream.calls == []
        subprocess.run(["mount", "-o", "remount,bind,rw", str(folder)], check=True)
        tasks = server.all_end(ids)
        assert {(task["status"], task["attempts"]) for task in tasks} == {("completed", 1)}
        assert len(list(folder.iterdir())) == len(upstream.calls) == 61
        assert server.request("GET", "/readyz")[0] == 200
    finally:
        server.close()
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def editing(disk, tmp_path, upstream):
    """Return a server that has INPUT_DIR, and nothing else, on a disk of its own."""
    folder = disk / "inputs"
    server = Server(tmp_path / "server", upstream.url, INPUT_DIR=folder, MIN_FREE_MB=0)
    yield server.ready()
    upstream.gate.set()
    server.close()


def input_files(disk):
    return sorted(path.name for path in (disk / "inputs").iterdir())


@pytest.mark.processes
def test_an_upload_that_does_not_fit_leaves_nothing_behind(editing, disk):
    small, large = edits.png(1), edits.png(2, 1300)
    assert len(large) > 5_000_000
    kept = edits.edit(editing, small)
    ballast = fill(disk, 2 * 1024 * 1024)
    status, answer = edits.send(editing, small, large, prompt="p")
    assert (status, answer["error"].partition(";")[0]) == (
        *(507, "There is no room on the disk for the image"),
    )
    assert input_files(disk) == [edits.name(small)]
    ended = editing.all_end([kept, editing.submit()])
    assert [task["status"] for task in ended] == ["completed", "completed"]
    ballast.unlink()
    (task,) = editing.all_end([edits.edit(editing, small, large)])
    assert task["status"] == "completed"


@pytest.mark.processes
@pytest.mark.parametrize("fault", ["read-only", "gone"])
def test_a_folder_of_inputs_at_fault_holds_edits_alone_and_mends_itself(
    tmp_path, disk, upstream, fault
):
    source, folder = tmp_path / "source", disk / "inputs"
    source.mkdir()
    folder.mkdir()

    def mount(*words):
        subprocess.run(words, check=True)

    mount("mount", "--bind", str(source), str(folder))
    server = Server(tmp_path / "server", upstream.url, INPUT_DIR=folder, MIN_FREE_MB=0)
    try:
        server.ready().running()
        server.request("POST", "/queue/pause")
        waiting = edits.edit(server, edits.png(1))
        if fault == "gone":
            mount("umount", str(folder))
            why = f"{folder} is not mounted"
        else:
            mount("mount", "-o", "remount,bind,ro", str(folder))
            why = "Read-only file system"
        server.request("POST", "/queue/resume")
        words = f"The images cannot be written to {folder} ({why})"
        status, answer = edits.send(server, edits.png(2), prompt="p")
        assert (status, answer["error"].partition(";")[0]) == (503, words)
        status, _, answer = server.request("GET", "/readyz")
        assert status == 503 and words in answer["problems"]
        assert server.all_end([server.submit()])[0]["status"] == "completed"
        if fault == "gone":
            waits = f"The input images cannot be read from {folder} ({why})"
            wait_until(lambda: waits in (server.status(waiting)["waiting_for"] or ""))
            mount("mount", "--bind", str(source), str(folder))
        else:
            mount("mount", "-o", "remount,bind,rw", str(folder))
        (task, _) = server.all_end([waiting, edits.edit(server, edits.png(2))])
        assert (task["status"], task["attempts"]) == ("completed", 1)
        assert server.request("GET", "/readyz")[0] == 200
    finally:
        server.close()
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_volume_that_is_gone_is_not_replaced_by_a_folder(make, disk, upstream):
    q = make(OUTPUT_DIR=disk / "images", MIN_FREE_MB=0)
    subprocess.run(["umount", str(disk)], check=True)
    task_id = q.add()
    q.start()
    words = f"The images cannot be written to {disk / 'images'} ({disk} is not mounted)"
    wait_until(lambda: q.waits(task_id).startswith(words))
    assert list(disk.iterdir()) == []
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)], check=True)
    q.clock.now += 10
    task = q.until(task_id, status="completed")
    assert (task.attempts, q.files()) == (1, [f"{task_id}.png"])


@pytest.mark.parametrize("name", ["OUTPUT_DIR", "DATABASE_PATH"])
def test_the_floor_is_that_of_either_disk(serve, disk, name):
    client = serve(MIN_FREE_MB=30, **{name: disk / "there"}).client
    answer = client.post("/generate", json={"prompt": "p"})
    assert answer.status_code == 507


def test_a_database_on_a_full_disk_is_not_ready(serve, disk):
    client = serve(MIN_FREE_MB=0, DATABASE_PATH=disk / "tasks.sqlite3").client
    client.get("/healthz")
    wait_until(lambda: client.get("/readyz").status_code == 200)
    ballast = fill(disk, 0)
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert "The database cannot be written" in answer.json["error"]
    ballast.unlink()
    assert client.get("/readyz").status_code == 200


def test_a_disk_that_fills_while_a_database_is_brought_up_to_date_loses_nothing(disk):
    path = disk / "tasks.sqlite3"
    old_databases.node(path, old_databases.node_rows(20_000))
    before = old_databases.read_all(path, "tasks")
    ballast = fill(disk, path.stat().st_size)
    with pytest.raises(DatabaseError) as error:
        Database(path)
    assert error.value.full
    assert "make room" in str(error.value)
    assert sorted(file.name for file in disk.iterdir()) == [
        *("ballast", "tasks.sqlite3", "tasks.sqlite3.lock"),
    ], "what was written is given back"
    assert old_databases.read_all(path, "tasks") == before
    ballast.unlink()
    database = Database(path)
    assert sum(database.stats().tasks.values()) == 20_000
    database.close()


# The same floor, without a disk of its own


def test_under_the_floor_nothing_is_stored(serve):
    client = serve(MIN_FREE_MB=10**9).client
    answer = client.post("/generate", json={"prompt": "p"})
    assert answer.status_code == 507
    assert "MIN_FREE_MB" in answer.json["error"]
    assert int(answer.headers["Retry-After"]) > 0
    assert client.get("/tasks").json["tasks"] == []


def test_under_the_floor_a_replay_has_its_task(app):
    headers = {"Idempotency-Key": "k"}
    task_id = app.client.post("/generate", json={"prompt": "p"}, headers=headers).json["id"]
    finished(app.client, task_id)
    app.restart(MIN_FREE_MB=10**9)
    client = app.client
    assert client.post("/generate", json={"prompt": "p"}, headers=headers).json["id"] == task_id
    headers = {"Idempotency-Key": "another"}
    assert client.post("/generate", json={"prompt": "p"}, headers=headers).status_code == 507
    assert len(client.get("/tasks").json["tasks"]) == 1


def test_a_page_of_tasks_looks_at_the_disk_once(client, monkeypatch):
    client.post("/queue/pause")
    for _ in range(3):
        submit(client)
    looks = []
    monkeypatch.setattr(tasks, "is_low_on_disk", lambda config: looks.append(config))
    assert len(client.get("/tasks").json["tasks"]) == 3
    assert len(looks) == 1


def test_a_disk_that_hangs_keeps_no_other_writer_waiting(app, client, monkeypatch):
    client.post("/queue/pause")
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(config):
        hangs.set()
        goes_on.wait(30)

    monkeypatch.setattr(service, "is_low_on_disk", hang)
    thread = threading.Thread(target=submit, args=(client.application.test_client(),))
    thread.start()
    assert hangs.wait(10)
    another = threading.Thread(target=app.database.pause)
    another.start()
    another.join(10)
    was_kept_waiting = another.is_alive()
    goes_on.set()
    thread.join(10)
    another.join(10)
    assert not was_kept_waiting


def test_under_the_floor_no_task_is_retried(app):
    task_id = submit(app.client)
    finished(app.client, task_id)
    app.restart(MIN_FREE_MB=10**9)
    for path in (f"/tasks/{task_id}/retry", "/tasks/retry"):
        assert app.client.post(path).status_code == 507
    assert len(app.client.get("/tasks").json["tasks"]) == 1


def test_under_the_floor_no_call_is_made(make, upstream):
    q = make(MIN_FREE_MB=10**9)
    q.add()
    q.start()
    assert not ever(lambda: upstream.calls)
