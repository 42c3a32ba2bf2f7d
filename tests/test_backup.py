"""A backup is whole, whatever the server does meanwhile, and can be put back anywhere."""

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import backup
import edits
import old_databases
import pytest
import rows
from conftest import finished, submit, wait_until
from server import Server
from upstream import Answer, image_bytes

import images
from db import Database
from inputs import InputFolder
from records import Ending, NewTask

ROOT = Path(__file__).resolve().parent.parent
SECRET = b"s" * 32
# What a program of cron finds in its environment.
CRON = {"PATH": "/usr/bin:/bin"}
OPEN = "import sys; from pathlib import Path; from db import Database; "
OPEN += "d = Database(Path(sys.argv[1])); "


class Site:
    """A server's files, without a server: its database, its secret and its images."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.database = folder / "tasks.sqlite3"
        self.outputs = folder / "outputs"
        self.inputs = folder / "inputs"
        self.secret = folder / "tasks.sqlite3.secret"
        self.models = folder / "models.toml"

    def environ(self):
        return CRON | {
            "DATABASE_PATH": str(self.database),
            "OUTPUT_DIR": str(self.outputs),
            "INPUT_DIR": str(self.inputs),
            "MODELS_FILE": str(self.models),
        }

    def fill(self, count, pending=0):
        """Make so many tasks with their images, and so many without, and return their ids."""
        self.outputs.mkdir(exist_ok=True)
        self.secret.write_bytes(SECRET)
        self.secret.chmod(0o600)
        with closing(Database(self.database)) as database:
            ids = [str(uuid.uuid4()) for _ in range(count + pending)]
            database.add([NewTask(task_id, "p", "m", {}) for task_id in ids], time.time())
            for n in range(count):
                path = self.outputs / f"{ids[n]}.png"
                path.write_bytes(image_bytes(size=(16, 16 + n)))
                end = Ending("completed", "completed", path=path, image=images.inspect(path))
                database.finish(database.claim(time.time()), end, time.time())
        return ids

    def script(self, name, *arguments):
        return subprocess.run(
            ["sh", str(ROOT / "script" / name), *map(str, arguments)],
            env=self.environ(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def back_up(self, folder, *options):
        """Make a backup and return its folder."""
        ended = self.script("backup", folder, *options)
        assert ended.returncode == 0, ended.stderr
        return Path(ended.stdout.splitlines()[-1])

    def restore(self, folder):
        """Restore a backup and return what was said."""
        ended = self.script("restore", folder)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def refusal(self, name, *arguments):
        """Return the one line with which a script refuses."""
        ended = self.script(name, *arguments)
        assert ended.returncode == 1, ended.stdout
        (line,) = ended.stderr.splitlines()
        return line

    def tasks(self):
        return rows.read(self.database, "SELECT id, status, file_path, sha256 FROM tasks")


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path / "site")


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "backups"


def kill_writer(path, statement=""):
    """Open the database in a process, write in it, and kill it: the log stays."""
    program = f"{OPEN} d.pause(); print(flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        process.stdout.readline()
        process.kill()
    assert Path(f"{path}-wal").stat().st_size


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_whole(found):
    """Assert that a backup has a sound database, and the image of each completed task."""
    copy = found / "tasks.sqlite3"
    assert rows.read(copy, "PRAGMA integrity_check") == [("ok",)]
    completed = rows.read(copy, "SELECT id, sha256 FROM tasks WHERE status = 'completed'")
    for task_id, digest in completed:
        assert sha256(found / "outputs" / f"{task_id}.png") == digest
    return len(completed)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def facts(folder):
    """Return what is in a folder, and whose it is."""
    found = {path.name: path.lstat() for path in folder.iterdir()}
    return {name: (each.st_uid, each.st_gid, each.st_mode) for name, each in found.items()}


# Backing up


def test_a_backup_has_everything_for_the_owner_alone(site, kept):
    ids = site.fill(3, pending=1)
    site.models.write_text("[m]\n")
    found = site.back_up(kept)
    assert found.parent == kept and backup.when(found)
    assert names(found) == [
        *("inputs", "models.toml", "outputs", "tasks.sqlite3", "tasks.sqlite3.secret")
    ]
    assert check_whole(found) == 3
    assert names(found / "outputs") == sorted(f"{task_id}.png" for task_id in ids[:3])
    assert (found / "tasks.sqlite3.secret").read_bytes() == SECRET
    assert (found / "models.toml").read_text() == "[m]\n"
    assert {path.stat().st_mode & 0o777 for path in (kept, found, found / "outputs")} == {0o700}


def test_only_plain_images_are_copied(site, kept):
    site.fill(1)
    os.mkfifo(site.outputs / "fifo.png")
    os.mkfifo(site.folder / "tasks.sqlite3.bell")
    (site.outputs / "link.png").symlink_to("/etc/hostname")
    (site.outputs / ".x.part").write_text("half")
    (site.outputs / "thumbnails").mkdir()
    assert len(names(site.back_up(kept) / "outputs")) == 1


def test_an_image_in_a_folder_that_was_output_dir_before_is_in_it(site, kept):
    site.fill(1)
    site.outputs.rename(site.folder / "before")
    sql = "UPDATE tasks SET file_path = replace(file_path, 'outputs', 'before')"
    rows.write(site.database, sql)
    assert check_whole(site.back_up(kept)) == 1
    # Nothing else is, whatever a row says.
    (site.folder / "elsewhere.png").write_text("not an image of this task")
    rows.write(site.database, "UPDATE tasks SET file_path = ?", (f"{site.folder}/elsewhere.png",))
    assert names(site.back_up(kept) / "outputs") == []


def test_unchanged_images_are_links_to_the_last_backups_and_not_to_the_servers(site, kept):
    ids = site.fill(3)
    first = site.back_up(kept)
    changed = site.outputs / f"{ids[0]}.png"
    changed.write_bytes(image_bytes(colour="red"))
    (site.outputs / f"{ids[1]}.png").unlink()
    second = site.back_up(kept)
    same, new = (second / "outputs" / f"{ids[n]}.png" for n in (2, 0))
    assert same.stat().st_ino == (first / "outputs" / same.name).stat().st_ino
    assert new.read_bytes() == changed.read_bytes() != (first / "outputs" / new.name).read_bytes()
    assert {path.stat().st_nlink for path in site.outputs.iterdir()} == {1}
    shutil.rmtree(first)
    assert names(second / "outputs") == sorted([same.name, new.name])
    assert same.read_bytes() == (site.outputs / same.name).read_bytes()


def test_a_second_one_in_the_same_second_has_the_next_name(site, kept):
    site.fill(1)
    folder(kept)
    made = [backup.back_up(place(site), kept) for _ in range(5)]
    assert [path.name for path in made] == names(kept)
    assert len(set(made)) == 5


def test_a_clock_that_is_set_back_changes_no_order(site, kept):
    site.fill(1)
    (folder(kept) / "20990101-235959").mkdir()
    assert backup.back_up(place(site), kept).name == "20990102-000000"


def place(site):
    return backup.Places(
        site.database, site.models, {"inputs": site.inputs, "outputs": site.outputs}
    )


def folder(path):
    path.mkdir()
    return path


def test_the_last_ones_are_kept(site, kept):
    site.fill(2)
    (folder(kept) / "notes").mkdir()
    made = [site.back_up(kept).name for _ in range(3)]
    made.append(site.back_up(kept, "--keep", 2).name)
    assert names(kept) == [*made[-2:], "notes"]
    assert check_whole(kept / made[-1]) == 2
    assert "--keep" in site.script("backup", kept, "--keep", "0").stderr


@pytest.mark.parametrize("state", ["live", "stopped", "killed", "killed, and no -shm", "no lock"])
def test_nothing_is_made_beside_the_database_and_all_that_was_committed_is_there(site, kept, state):
    """As root, of the files of another user, where the tests may do so."""
    site.fill(2)
    server = None
    if state == "live":
        server = Database(site.database)
        server.pause()
    elif state.startswith("killed"):
        kill_writer(site.database)
        if state != "killed":
            Path(f"{site.database}-shm").unlink()
    else:
        with closing(Database(site.database)) as database:
            database.pause()
        if state == "no lock":
            Path(f"{site.database}.lock").unlink()
    if os.geteuid() == 0:
        for path in (site.folder, *site.folder.rglob("*")):
            os.chown(path, 65534, 65534)
    before = facts(site.folder), facts(site.outputs)
    found = site.back_up(kept)
    assert (facts(site.folder), facts(site.outputs)) == before
    assert check_whole(found) == 2
    assert rows.read(found / "tasks.sqlite3", "SELECT paused FROM queue") == [(1,)]
    assert names(found) == ["inputs", "outputs", "tasks.sqlite3", "tasks.sqlite3.secret"]
    if server:
        server.close()


def test_it_needs_no_right_to_write_where_the_database_is(site, kept):
    site.fill(2)
    kill_writer(site.database)
    for path in (*site.folder.rglob("*"), site.folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    # Root may write anywhere, unless it gives that up.
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    before = facts(site.folder)
    command = [*(drop if os.geteuid() == 0 else []), "sh", ROOT / "script" / "backup", kept]
    said = subprocess.run(command, env=site.environ(), capture_output=True, text=True, check=True)
    assert facts(site.folder) == before
    assert check_whole(Path(said.stdout.splitlines()[-1])) == 2
    site.folder.chmod(0o755)
    site.outputs.chmod(0o755)


def test_the_server_may_stop_while_its_database_is_copied(site, kept):
    site.fill(2)
    server = Database(site.database)
    server.pause()
    source = backup._open_live(site.database)
    source.execute("SELECT 1 FROM sqlite_schema").fetchall()
    server.close()
    assert source.execute("SELECT paused FROM queue").fetchall() == [(1,)]
    source.close()
    with closing(Database(site.database)) as again:
        assert again.queue(time.time()).paused


def test_what_cannot_be_backed_up_is_told_in_one_line(site, kept):
    assert f"There is no database at {site.database}" in site.refusal("backup", kept)
    site.fill(1)
    data = site.database.read_bytes()
    site.database.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    assert "malformed" in site.refusal("backup", kept)
    assert names(kept) == []


def is_half(kept):
    return kept.is_dir() and any(path.name.endswith(".part") for path in kept.iterdir())


def test_a_kill_leaves_no_folder_that_looks_whole(site, kept):
    site.fill(30)
    chance, cut = random.Random(3), 0
    for _ in range(25):
        process = subprocess.Popen(
            ["sh", str(ROOT / "script" / "backup"), str(kept)],
            env=site.environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        with process:
            wait_until(lambda: process.poll() is not None or is_half(kept))  # noqa: B023
            with suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0, 0.06))
            process.kill()
        cut += is_half(kept)
        for found in backup.backups(kept):
            assert check_whole(found) == 30
    assert cut, "none came in the middle"
    site.back_up(kept)
    assert all(backup.when(path) for path in kept.iterdir()), "what was left half is removed"


# Restoring


def test_a_restore_takes_back_all_that_changed(site, kept):
    ids = site.fill(3)
    before, images_before = site.tasks(), contents(site.outputs)
    found = site.back_up(kept)
    with closing(Database(site.database)) as database:
        database.delete(ids[0], 0)
        database.add([NewTask("later", "p", "m", {})], time.time())
    site.secret.write_bytes(b"t" * 32)
    (site.outputs / f"{ids[0]}.png").unlink()
    (site.outputs / f"{ids[1]}.png").write_bytes(b"damaged")
    later = {path.name: path.read_bytes() for path in (site.database, site.secret)}
    said = site.restore(kept)
    assert f"{found} is restored to {site.database}" in said
    assert (site.tasks(), contents(site.outputs)) == (before, images_before)
    assert site.secret.read_bytes() == SECRET
    aside = [next(place.glob("replaced-*")) for place in (site.folder, site.outputs)]
    assert {path.name: path.read_bytes() for path in aside[0].iterdir()} == later
    assert contents(aside[1]) == {f"{ids[1]}.png": b"damaged"}
    assert all(str(path) in said for path in aside)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_a_killed_server_left_is_not_played_into_the_backup(site, kept):
    site.fill(2)
    found = site.back_up(kept)
    kill_writer(site.database)
    log = Path(f"{site.database}-wal").read_bytes()
    site.restore(found)
    assert not Path(f"{site.database}-wal").exists() and not Path(f"{site.database}-shm").exists()
    (aside,) = site.folder.glob("replaced-*")
    assert (aside / "tasks.sqlite3-wal").read_bytes() == log
    with closing(Database(aside / "tasks.sqlite3")) as replaced:
        assert replaced.queue(time.time()).paused, "it is whole where it is now"
    with closing(Database(site.database)) as restored:
        assert not restored.queue(time.time()).paused
        assert restored.stats().tasks["completed"] == 2


def test_two_restores_in_one_second_keep_both_that_they_replace(site, kept):
    site.fill(1)
    site.back_up(kept)
    for _ in range(2):
        site.restore(kept)
    assert len(list(site.folder.glob("replaced-*/tasks.sqlite3"))) == 2


def test_the_newest_backup_is_taken_or_the_one_that_is_named(site, kept):
    site.fill(1)
    first = site.back_up(kept)
    with closing(Database(site.database)) as database:
        database.pause()
    second = site.back_up(kept)
    (kept / ".20990101-000000.x.part").mkdir()
    for named, paused in ((kept, 1), (first, 0), (second, 1)):
        site.restore(named)
        assert rows.read(site.database, "SELECT paused FROM queue") == [(paused,)]


def test_elsewhere_the_rows_name_the_files_there(site, kept, tmp_path):
    ids = site.fill(2)
    site.models.write_text("[m]\n")
    found = site.back_up(kept)
    other = Site(tmp_path / "other")
    site.folder.rename(tmp_path / "gone")
    other.restore(found)
    paths = {task: path for task, _, path, _ in other.tasks()}
    assert paths == {task_id: str(other.outputs / f"{task_id}.png") for task_id in ids}
    assert other.models.read_text() == "[m]\n"
    assert {path.stat().st_nlink for path in other.outputs.iterdir()} == {1}


def test_a_list_of_models_that_is_there_stays(site, kept):
    site.fill(1)
    site.models.write_text("[old]\n")
    site.back_up(kept)
    site.models.write_text("[new]\n")
    site.restore(kept)
    assert site.models.read_text() == "[new]\n"


def test_what_belongs_to_nothing_is_counted(site, kept):
    ids = site.fill(4, pending=3)
    found = site.back_up(kept)
    for name in ids[:3]:
        (found / "outputs" / f"{name}.png").unlink()
        (site.outputs / f"{name}.png").unlink()
    for name in ("nobodys-1", "nobodys-2", ids[4]):
        (site.outputs / f"{name}.png").write_bytes(image_bytes())
    said = site.restore(found)
    assert f"images without a task in {site.outputs}: 2\n" in said
    assert "completed tasks without an image: 3\n" in said
    assert "unfinished tasks: 3\n" in said
    assert f"with an image in {site.outputs}, which need no call: 1\n" in said
    assert "without one: 2. WARNING" in said


def test_what_is_done_since_is_not_paid_again_where_its_image_is(serve, upstream, kept, tmp_path):
    app, site = serve(), Site(tmp_path)
    app.client.post("/queue/pause")
    done, lost = submit(app.client, "done"), submit(app.client, "lost")
    found = site.back_up(kept)
    app.client.post("/queue/resume")
    paths = [finished(app.client, task)["file_path"] for task in (done, lost)]
    app.close()
    Path(paths[1]).unlink()
    site.restore(found)
    app.open()
    app.client.post("/queue/resume")
    tasks = [finished(app.client, task) for task in (done, lost)]
    assert [task["file_path"] for task in tasks] == paths
    assert sorted(upstream.prompts()) == ["done", "lost", "lost"]
    assert [task["attempts"] for task in tasks] == [1, 1]
    assert app.database.check_counts()


@pytest.mark.parametrize("owner", [0, 65534])
def test_what_is_restored_belongs_to_the_server(site, kept, owner):
    if os.geteuid():
        owner = os.geteuid()
    site.fill(2)
    site.database.chmod(0o640)
    found = site.back_up(kept)
    shutil.rmtree(site.outputs)
    for path in (site.folder, *site.folder.rglob("*")):
        os.chown(path, owner, owner)
    (site.database.rename(site.folder / "away"))
    site.restore(found)
    for path in site.folder.rglob("*"):
        assert (path.stat().st_uid, path.stat().st_gid) == (owner, owner), path
    assert site.database.stat().st_mode & 0o777 == 0o640
    assert site.secret.stat().st_mode & 0o777 == 0o600
    assert site.outputs.stat().st_mode & 0o777 == 0o700


def test_while_a_process_has_the_database_open_nothing_is_restored(site, kept):
    site.fill(1)
    site.back_up(kept)
    before = facts(site.folder)
    program = f"{OPEN} print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(site.database)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as idle:
        idle.stdout.readline()
        assert "The server runs" in site.refusal("restore", kept)
        assert before.keys() <= facts(site.folder).keys()
        assert not list(site.folder.glob("replaced-*"))
        idle.stdin.close()
    site.restore(kept)


def test_what_cannot_be_restored_is_told_in_one_line(site, kept):
    site.fill(1)
    before = site.database.read_bytes()
    folder(kept)
    assert "is no backup, and there is none in it" in site.refusal("restore", kept)
    found = site.back_up(kept)
    copy = found / "tasks.sqlite3"
    with closing(sqlite3.connect(copy)) as connection:
        connection.execute("PRAGMA user_version = 99")
    assert "newer version" in site.refusal("restore", found)
    data = copy.read_bytes()
    copy.write_bytes(data[:-8192] + b"\xff" * 8192)
    assert "damaged" in site.refusal("restore", found)
    copy.unlink()
    assert "is no backup" in site.refusal("restore", found)
    assert site.database.read_bytes() == before


def test_a_restore_that_is_killed_is_made_good_by_another(site, kept):
    site.fill(20)
    found = site.back_up(kept)
    with closing(Database(site.database)) as database:
        database.pause()
    chance, cut = random.Random(4), 0
    for _ in range(15):
        shutil.rmtree(site.outputs)
        process = subprocess.Popen(
            ["sh", str(ROOT / "script" / "restore"), str(found)],
            env=site.environ(),
            stdout=subprocess.DEVNULL,
        )
        with process:
            wait_until(site.outputs.exists)
            with suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0, 0.06))
            process.kill()
        cut += process.returncode == -signal.SIGKILL
        site.restore(found)
        assert check_restored(site) == 20
        assert [n for n in names(site.folder) if n.endswith((".part", "-wal", "-journal"))] == []
    assert cut, "none came in the middle"


def check_restored(site):
    completed = [task for task in site.tasks() if task[1] == "completed"]
    for _, _, path, digest in completed:
        assert sha256(Path(path)) == digest
    return len(completed)


# The images that tasks edit


def add_edit(site, picture):
    """Add a task that edits a picture, and return its id."""
    site.inputs.mkdir(exist_ok=True)
    path = site.inputs / edits.name(picture)
    path.write_bytes(picture)
    task = NewTask(str(uuid.uuid4()), "p", "m", {}, inputs=(images.inspect(path),))
    with closing(Database(site.database)) as database:
        database.add([task], time.time())
    return task.id


def test_the_inputs_of_tasks_are_in_it_and_links_where_they_were_before(site, kept):
    site.fill(1)
    first, second = edits.png(1), edits.png(2)
    add_edit(site, first)
    (site.inputs / edits.name(edits.png(3))).write_bytes(edits.png(3))
    (site.inputs / ".half.upload").write_bytes(b"half")
    before = site.back_up(kept)
    assert contents(before / "inputs") == {edits.name(first): first}
    add_edit(site, second)
    after = site.back_up(kept)
    assert contents(after / "inputs") == {edits.name(first): first, edits.name(second): second}
    same = [found / "inputs" / edits.name(first) for found in (before, after)]
    assert same[0].samefile(same[1]) and not same[0].samefile(site.inputs / edits.name(first))


def test_no_input_of_the_copied_database_is_removed_before_it_is_copied(site, kept, monkeypatch):
    site.fill(1)
    picture = edits.png(1)
    task_id = add_edit(site, picture)
    copy, folder_of_inputs = backup._copy_database, InputFolder(site.inputs)

    def delete(database):
        database.delete(task_id, 0)
        database.remove_inputs(database.unused_inputs(), folder_of_inputs.remove)

    with closing(Database(site.database)) as database:

        def copy_and_delete(*paths):
            copy(*paths)
            with pytest.raises(BlockingIOError):
                delete(database)

        monkeypatch.setattr(backup, "_copy_database", copy_and_delete)
        found = backup.back_up(place(site), folder(kept))
        assert contents(found / "inputs") == {edits.name(picture): picture}
        assert names(site.inputs) == database.unused_inputs() == [edits.name(picture)]
        delete(database)
        assert names(site.inputs) == database.unused_inputs() == []


def test_what_inputs_belong_to_nothing_is_counted(site, kept):
    site.fill(1)
    there, lost = edits.png(1), edits.png(2)
    for picture in (there, there, lost, lost):
        add_edit(site, picture)
    (site.inputs / edits.name(lost)).unlink()
    ended = site.script("backup", kept)
    assert "input images that are gone from INPUT_DIR: 1; their tasks cannot" in ended.stdout
    (site.inputs / edits.name(there)).write_bytes(b"damaged")
    (site.inputs / edits.name(edits.png(3))).write_bytes(edits.png(3))
    said = site.restore(kept)
    assert (site.inputs / edits.name(there)).read_bytes() == there
    assert f"input images without a task in {site.inputs}: 1\n" in said
    assert "move them away to keep them\n" in said
    assert "tasks without an input image: 2\n" in said


def test_a_backup_of_an_earlier_version_is_restored(site, kept):
    old_databases.released(site.database, 3, 8)
    found = site.back_up(kept)
    (found / "inputs").rmdir()
    before = old_databases.read_all(found / "tasks.sqlite3", "tasks", "id")
    said = site.restore(found)
    assert "tasks without an input image: 0\n" in said
    with closing(Database(site.database)) as database:
        assert sum(database.stats().tasks.values()) == 8
    assert old_databases.read_all(site.database, "tasks", "id") == before


@contextmanager
def under_load(server, work):
    """Let three threads do the work, turn by turn, until the block ends; then kill the server."""
    faults, done = [], threading.Event()

    def keep_on(n):
        try:
            for _ in work(n):
                if done.is_set():
                    return
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=keep_on, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()
        server.kill_all()
    assert faults == []


@pytest.mark.processes
def test_under_load_each_backup_has_the_inputs_of_its_tasks_and_runs_elsewhere(
    tmp_path, kept, upstream
):
    server = Server(tmp_path / "site", upstream.url).ready()
    site = Site(server.folder)
    server.running()
    server.request("POST", "/queue/pause")

    def keep_editing(n):
        turn, ids = 0, []
        while True:
            prompt = f"{n} {turn % 7}"
            ids.append(edits.edit(server, edits.png(prompt), prompt=prompt))
            if turn := turn + 1:
                with suppress(json.JSONDecodeError):  # 204 has no body.
                    server.request("DELETE", f"/tasks/{ids.pop(turn % len(ids))}")
            if turn % 3 == 0:
                ids.append(edits.edit(server, edits.png(prompt), prompt=prompt))
            yield

    with under_load(server, keep_editing):
        made = [site.back_up(kept) for _ in range(4)]
    for found in made:
        assert backup.input_names(found / "tasks.sqlite3") == set(names(found / "inputs"))
        for name, picture in contents(found / "inputs").items():
            assert edits.name(picture) == name
    other = Site(tmp_path / "other")
    other.restore(kept)
    pending = [task for task, *_ in other.tasks()]
    assert pending
    successor = Server(other.folder, upstream.url).ready()
    try:
        successor.request("POST", "/queue/resume")
        assert {task["status"] for task in successor.all_end(pending)} == {"completed"}
    finally:
        successor.close()
    for fields in upstream.calls:
        assert edits.sent(fields) == [edits.png(fields["prompt"])]


# Of a server at work


@pytest.mark.processes
def test_under_load_each_backup_is_whole_and_serves_elsewhere(tmp_path, kept, upstream):
    upstream.decide = lambda fields: Answer(body=image_bytes(colour=fields["prompt"]))
    server = Server(tmp_path / "site", upstream.url, CONCURRENCY=8).ready()
    site = Site(server.folder)
    server.running()
    ids = []

    def keep_asking(n):
        chance = random.Random(n)
        while True:
            ids.append(server.submit(f"#{chance.randrange(2**24):06x}"))
            if chance.random() < 0.2:
                with suppress(json.JSONDecodeError):  # 204 has no body.
                    server.request("DELETE", f"/tasks/{chance.choice(ids)}")
            yield

    with under_load(server, keep_asking):
        made = [site.back_up(kept) for _ in range(4)]
        assert "The server runs" in site.refusal("restore", kept)
    before = {task: digest for task, _, _, digest in site.tasks() if digest}
    for found in made:
        for task, path in backup.image_paths(found / "tasks.sqlite3").items():
            copy = found / "outputs" / path.name
            assert copy.exists() or task not in before, (
                "only what was deleted meanwhile is not there"
            )
            assert not copy.exists() or task not in before or sha256(copy) == before[task]
    wait_until(lambda: not upstream.at_once)
    calls = len(upstream.calls)
    other = Site(tmp_path / "other")
    other.restore(kept)
    there = {path.stem for path in other.outputs.iterdir()}
    unfinished = sum(
        status in ("pending", "processing") and task not in there
        for task, status, _, _ in other.tasks()
    )
    successor = Server(other.folder, upstream.url, CONCURRENCY=8).ready()
    try:
        wait_until(lambda: not successor.request("GET", "/queue")[2]["pending"])
        tasks = successor.all_end([task for task, *_ in other.tasks()])
        assert {task["status"] for task in tasks} == {"completed"}
        assert len(upstream.calls) - calls == unfinished
        shared = [task for task in tasks if task["id"] in before]
        assert shared and len(made) == len(set(made))
        for task in shared:
            assert task["image"]["sha256"] == before[task["id"]]
            assert Path(task["file_path"]).parent == other.outputs
    finally:
        successor.close()
