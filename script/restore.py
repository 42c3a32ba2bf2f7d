"""Put a backup of script/backup in the place of what the server has; `script/restore` runs it.

Nothing is deleted: what is replaced is moved into a folder beside it. Images that are there and
not in the backup stay. What is killed in the middle is made good by running it again.
"""

import argparse
import fcntl
import filecmp
import functools
import json
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import backup
from backup import BESIDE, DATABASE, MODELS, Places, Refused, plain_files

import config
import db
from outputs import EXTENSIONS, sync_folder

# Where SQLite, in every process that has a database open, holds a lock of the file.
_SHARED_FIRST, _SHARED_SIZE = 0x40000002, 510


class Owner(NamedTuple):
    """The user and the group that the server runs as."""

    user: int
    group: int

    def take(self, path: Path) -> Path:
        """Own the path, where root has made it."""
        if os.geteuid() == 0:
            os.chown(path, *self, follow_symlinks=False)
        return path


class Result(NamedTuple):
    """What a restored database and the images that are there have to do with each other."""

    without_task: int
    without_image: int
    unfinished: int
    made: int
    inputs_without_task: int
    without_input: int


def find(folder: Path) -> Path:
    """Return the backup that is meant: this folder, or the newest in it. Raises Refused."""
    for found in [folder] if backup.when(folder) else backup.backups(folder)[-1:]:
        if (found / DATABASE).is_file():
            _check(found / DATABASE)
            return found
    raise Refused(f"{folder} is no backup, and there is none in it")


def _check(database: Path) -> None:
    """Refuse a copy that is damaged, or newer than this server."""
    uri = f"{database.as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            ((version,),) = connection.execute("PRAGMA user_version").fetchall()
            fault = connection.execute("PRAGMA integrity_check(1)").fetchall()[0][0]
    except sqlite3.DatabaseError as error:
        fault = str(error)
    if fault != "ok":
        raise Refused(f"{database} is damaged ({' '.join(fault.split())}): take another backup")
    if version > db.VERSION:
        raise Refused(f"{database} is of a newer version of this server: update it first")


def owner(path: Path) -> Owner:
    """Return whose a file is to be: the owner of its folder, but of the file where that is root."""
    facts = path.parent.stat()
    if facts.st_uid == 0 and path.exists():
        facts = path.stat()
    return Owner(facts.st_uid, facts.st_gid)


@contextmanager
def server_kept_out(database: Path, server: Owner) -> Iterator[None]:
    """Hold what a server needs to start. Raises Refused where one runs."""
    with ExitStack() as held:
        for suffix in (".queue", ".lock"):
            path = Path(f"{database}{suffix}")
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            held.callback(os.close, file)
            server.take(path)
            with _refusing():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if database.exists():
            opened = held.enter_context(database.open("rb+"))
            with _refusing():
                fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB, _SHARED_SIZE, _SHARED_FIRST)
        yield


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except BlockingIOError as error:
        facts = "The server runs, or another program has its database open"
        raise Refused(f"{facts}: stop it, such as by systemctl stop image-proxy") from error


def restore(found: Path, here: Places, server: Owner) -> Result:
    """Put the images, the secret and the database in their places, the database last."""
    for name, target in here.folders.items():
        _make_folder(target, server)
        for file in plain_files(found / name).values():
            _put(file, target / file.name, server)
        sync_folder(target)
    if not here.models.exists() and (found / MODELS).exists():
        _put(found / MODELS, here.models, owner(here.models))
    for suffix in BESIDE:
        if (found / f"{DATABASE}{suffix}").exists():
            _put(found / f"{DATABASE}{suffix}", Path(f"{here.database}{suffix}"), server)
    part = server.take(_copy(found / DATABASE, here.database))
    result = _adapt(part, here.folders["outputs"], here.folders["inputs"])
    # Its log first: SQLite would play it into whatever has the database's name.
    for suffix in ("-wal", "-shm", "-journal", ""):
        _move_aside(Path(f"{here.database}{suffix}"), server)
    part.rename(here.database)
    sync_folder(here.database.parent)
    return result


def _make_folder(folder: Path, server: Owner) -> None:
    if not folder.exists():
        _make_folder(folder.parent, server)
        folder.mkdir()
        server.take(folder)


def _put(source: Path, target: Path, server: Owner) -> None:
    """Put a copy of a file in its place, if what is there is not the same."""
    if target.is_file() and not target.is_symlink() and filecmp.cmp(source, target, shallow=False):
        return
    part = server.take(_copy(source, target))
    _move_aside(target, server)
    part.rename(target)


def _copy(source: Path, target: Path) -> Path:
    """Copy a file to a hidden name beside the one that it is to get."""
    part = target.with_name(f".{target.name}.restored.part")
    part.unlink(missing_ok=True)
    backup.copy_file(source, part)
    return part


def _move_aside(path: Path, server: Owner) -> None:
    if os.path.lexists(path):
        path.rename(_aside(path.parent, server) / path.name)


@functools.cache
def _aside(folder: Path, server: Owner) -> Path:
    """Make the folder for what this run replaces in a folder."""
    prefix = time.strftime("replaced-%Y%m%d-%H%M%S-", time.gmtime())
    made = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    print(f"what is replaced goes into {made}")
    return server.take(made)


def _adapt(database: Path, outputs: Path, inputs: Path) -> Result:
    """Have the rows name the files in this folder, and say what belongs to what.

    A task that is pending, with its image there, is left as one whose call was under way: with
    these the server looks for the image before it makes a call.
    """
    there = plain_files(outputs)
    with closing(sqlite3.connect(database)) as connection, connection:
        # A death leaves no journal, which would be played into the next copy of this name.
        connection.execute("PRAGMA journal_mode = MEMORY")
        connection.create_function("there", 1, lambda path: str(outputs / Path(path).name))
        connection.execute("UPDATE tasks SET file_path = there(file_path) WHERE file_path NOTNULL")
        completed = connection.execute("SELECT file_path FROM tasks WHERE file_path NOTNULL")
        expected = {Path(path).name for (path,) in completed}
        unfinished = connection.execute(
            "SELECT id FROM tasks WHERE status IN ('pending', 'processing')"
        )
        files = {
            name: task
            for (task,) in unfinished.fetchall()
            for name in (f"{task}.{extension}" for extension in EXTENSIONS)
        }
        made = {files[name] for name in there.keys() & files.keys()}
        connection.executemany(
            "UPDATE tasks SET status = 'processing' WHERE id = ?", [(task,) for task in made]
        )
    backup.sync_file(database)
    return Result(
        without_task=len(there.keys() - expected - files.keys()),
        without_image=len(expected - there.keys()),
        unfinished=len(set(files.values())),
        made=len(made),
        inputs_without_task=len(plain_files(inputs).keys() - backup.input_names(database)),
        without_input=_count_without_input(database, inputs),
    )


def _count_without_input(database: Path, inputs: Path) -> int:
    """Count the tasks of which an input image is not there."""
    missing = json.dumps(list(backup.input_names(database) - plain_files(inputs).keys()))
    if missing == "[]":
        return 0
    sql = """SELECT count(DISTINCT task) FROM inputs
             WHERE sha256 || '.' || extension IN (SELECT value FROM json_each(?))"""
    with closing(sqlite3.connect(database)) as connection:
        return int(connection.execute(sql, (missing,)).fetchone()[0])


def report(result: Result, here: Places) -> None:
    """Print what belongs to nothing, and what will be paid for."""
    outputs = here.folders["outputs"]
    print(f"images without a task in {outputs}: {result.without_task}")
    print(f"completed tasks without an image: {result.without_image}")
    print(f"input images without a task in {here.folders['inputs']}: {result.inputs_without_task}")
    if result.inputs_without_task:
        print("  the server removes them when it starts: move them away to keep them")
    print(f"tasks without an input image: {result.without_input}")
    print(f"unfinished tasks: {result.unfinished}")
    if result.made:
        print(f"  with an image in {outputs}, which need no call: {result.made}")
    if rest := result.unfinished - result.made:
        print(f"  without one: {rest}. WARNING: if they were done since, they are paid again")
        print(f"  when the server starts, unless you put their images into {outputs}, and")
        print("  restore once more")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="script/restore",
        description="Put a backup in the place of the server's database, secret and images. "
        "The server must not run. Nothing is deleted: what is replaced is moved aside.",
    )
    words = "a backup, FOLDER/YYYYMMDD-HHMMSS, or where the newest one is taken from"
    parser.add_argument("folder", metavar="FOLDER", type=Path, help=words)
    return parser.parse_args()


def main() -> None:
    """Restore a backup, and say what came of it."""
    options = _arguments()
    os.umask(0o077)
    try:
        here, found = backup.places(), find(options.folder.resolve())
        server = owner(here.database)
        with server_kept_out(here.database, server):
            result = restore(found, here, server)
    except (Refused, config.ConfigError, OSError, sqlite3.Error) as error:
        sys.exit(f"Not restored: {error}")
    print(f"{found} is restored to {here.database}")
    report(result, here)


if __name__ == "__main__":
    main()
