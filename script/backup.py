"""Back up the database, what lies beside it, and the images; `script/backup` runs it.

A backup is a folder that is whole by itself: it gets its name when all of it is on disk. Images
that the backup before has too are hard links to that one's, never to the server's. The server
may run meanwhile: nothing is written where its database is, and nothing of it is locked for long,
but that it removes no input image until those of the database's copy are copied, too.
"""

import argparse
import fcntl
import os
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import config
from outputs import sync_folder

# What is in a backup.
DATABASE, MODELS = "tasks.sqlite3", "models.toml"
# Files beside the database, by what follows its name.
BESIDE = (".secret",)
# Folders of images, each with the setting that names the server's.
FOLDERS = {"inputs": "INPUT_DIR", "outputs": "OUTPUT_DIR"}
_DEFAULTS = {"DATABASE_PATH": DATABASE, "MODELS_FILE": MODELS}
_DEFAULTS |= {setting: name for name, setting in FOLDERS.items()}
_NAME = "%Y%m%d-%H%M%S"
_INPUT_NAMES = "SELECT DISTINCT sha256 || '.' || extension FROM inputs"


class Refused(Exception):
    """What was asked for cannot be done; the message says what to do."""


class Places(NamedTuple):
    """Where the server keeps what is backed up."""

    database: Path
    models: Path
    folders: dict[str, Path]


def places() -> Places:
    """Read from the settings where everything is, without a look at it. Raises ConfigError."""
    values = _DEFAULTS | config.read()
    paths = {name: config.ROOT / values[name] for name in _DEFAULTS}
    folders = {name: paths[setting] for name, setting in FOLDERS.items()}
    return Places(paths["DATABASE_PATH"], paths["MODELS_FILE"], folders)


def when(backup: Path) -> datetime | None:
    """Return the time that is a backup's name, or None where the name is no backup's."""
    with suppress(ValueError):
        if re.fullmatch(r"\d{8}-\d{6}", backup.name):
            return datetime.strptime(backup.name, _NAME).replace(tzinfo=UTC)
    return None


def backups(folder: Path) -> list[Path]:
    """Return the backups in a folder, the oldest first."""
    return sorted(path for path in folder.iterdir() if when(path) and path.is_dir())


def plain_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by name: no links, FIFOs, folders or hidden ones."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {
            entry.name: Path(entry.path)
            for entry in entries
            if entry.is_file(follow_symlinks=False) and not entry.name.startswith(".")
        }


def image_paths(database: Path) -> dict[str, Path]:
    """Return where the image of each completed task is said to be, by task."""
    with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
        sql = "SELECT id, file_path FROM tasks WHERE file_path IS NOT NULL"
        return {task: Path(path) for task, path in connection.execute(sql)}


def input_names(database: Path) -> set[str]:
    """Return the names of all input images that the tasks need."""
    with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
        # A database of an earlier version has none.
        if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'inputs'").fetchall():
            return set()
        return {name for (name,) in connection.execute(_INPUT_NAMES)}


def copy_file(source: Path, target: Path) -> None:
    """Copy a file with its mode and times, onto the disk (fsync)."""
    shutil.copy2(source, target, follow_symlinks=False)
    sync_file(target)


def sync_file(path: Path) -> None:
    """Put a file's bytes on disk."""
    with path.open("rb") as file:
        os.fsync(file)


def back_up(here: Places, folder: Path) -> Path:
    """Make a backup in the folder and return it. What fails or is killed leaves none."""
    before = backups(folder)
    name = _next_name(before)
    part = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=folder))
    last = before[-1] if before else part
    inputs, outputs = (here.folders[name] for name in ("inputs", "outputs"))
    try:
        with _locked(inputs, fcntl.LOCK_SH):
            _copy_database(here.database, part / DATABASE)
            needed = input_names(part / DATABASE)
            files = {name: path for name, path in plain_files(inputs).items() if name in needed}
            _copy_images(files, part / "inputs", last / "inputs")
        for suffix in BESIDE:
            _copy_if_there(Path(f"{here.database}{suffix}"), part / f"{DATABASE}{suffix}")
        _copy_if_there(here.models, part / MODELS)
        files = plain_files(outputs) | _moved_images(part / DATABASE, outputs)
        _copy_images(files, part / "outputs", last / "outputs")
        sync_folder(part)
        _report(part)
        backup = part.rename(folder / name)
        sync_folder(folder)
        return backup
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _next_name(before: list[Path]) -> str:
    """Return the time of now, or of a second after the last backup, where that is later."""
    now = datetime.now(UTC)
    if before and (last := when(before[-1])):
        now = max(now, last + timedelta(seconds=1))
    return now.strftime(_NAME)


def _copy_database(database: Path, target: Path) -> None:
    """Write all that is committed to a new file, on disk (fsync)."""
    if not database.is_file():
        raise Refused(f"There is no database at {database}: set DATABASE_PATH as the server has it")
    raw = target.with_name("raw.sqlite3")
    with _locked(Path(f"{database}.lock"), fcntl.LOCK_EX):  # That all writers share.
        source = _open_live(database) or _open_copy(database, raw)
        # Once it is read, its log stays while it is open here, though the server may close it.
        source.execute("SELECT 1 FROM sqlite_schema").fetchall()
    with closing(source):
        source.execute("VACUUM INTO ?", (str(target),))
    for path in raw.parent.glob(f"{raw.name}*"):
        path.unlink()
    target.chmod(database.stat().st_mode & 0o777)
    sync_file(target)


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    """Hold a lock (flock) of the server's, where it has made the file or the folder."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield
        return
    try:
        fcntl.flock(lock, kind)
        yield
    finally:
        os.close(lock)


def _open_live(database: Path) -> sqlite3.Connection | None:
    """Open a database that has its log beside it: then SQLite makes no file there."""
    if not all(Path(f"{database}{end}").exists() for end in ("-wal", "-shm")):
        return None
    return sqlite3.connect(f"file:{quote(str(database))}?mode=ro", timeout=30, uri=True)


def _open_copy(database: Path, raw: Path) -> sqlite3.Connection:
    """Open a copy of a database that no server has open."""
    shutil.copyfile(database, raw)
    with suppress(FileNotFoundError):
        shutil.copyfile(f"{database}-wal", f"{raw}-wal")
    return sqlite3.connect(raw)


def _moved_images(database: Path, outputs: Path) -> dict[str, Path]:
    """Return the images that are where their tasks say, in a folder that was OUTPUT_DIR before."""
    return {
        path.name: path
        for task, path in image_paths(database).items()
        if path.stem == task and path.parent != outputs
        if path.is_file() and not path.is_symlink()
    }


def _copy_if_there(source: Path, target: Path) -> None:
    if source.is_file():
        copy_file(source, target)


def _copy_images(files: dict[str, Path], target: Path, before: Path) -> None:
    """Copy the files to a new folder, or link those that the folder of before has, too."""
    target.mkdir()
    for name, source in files.items():
        with suppress(FileNotFoundError):  # It was deleted meanwhile.
            if not _link(source, before / name, target / name):
                copy_file(source, target / name)
    sync_folder(target)


def _link(source: Path, before: Path, target: Path) -> bool:
    """Link the copy of before, if it is one of this source and may be linked."""
    facts = source.lstat()
    with suppress(OSError):
        old = before.lstat()
        if (old.st_size, old.st_mtime_ns) == (facts.st_size, facts.st_mtime_ns):
            target.hardlink_to(before)
            return True
    return False


def _report(part: Path) -> None:
    """Print what is in the backup, and what is not."""
    images, inputs = (plain_files(part / name) for name in ("outputs", "inputs"))
    for words, files in (("images", images), ("input images", inputs)):
        linked = sum(path.stat().st_nlink > 1 for path in files.values())
        print(f"{words}: {len(files)}, of which {linked} were in the backup before")
    missing = sum(path.name not in images for path in image_paths(part / DATABASE).values())
    if missing:
        print(f"completed tasks without their image: {missing}; it was deleted, or is gone")
    if lost := len(input_names(part / DATABASE) - inputs.keys()):
        print(f"input images that are gone from INPUT_DIR: {lost}; their tasks cannot be done")


def remove_old(folder: Path, keep: int) -> None:
    """Remove all backups but the last ones, each by its name first, so that none is half there."""
    for backup in backups(folder)[:-keep]:
        shutil.rmtree(backup.rename(folder / f".{backup.name}.old.part"))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one backup at a time be made in a folder, and remove what killed ones have left."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for part in folder.glob(".????????-??????.*part"):
            shutil.rmtree(part)
        yield
    finally:
        os.close(lock)


def _positive(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        raise argparse.ArgumentTypeError("must be an integer from 1 on")
    return int(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="script/backup",
        description="Back up the database, its secret and all images, also while the server runs. "
        "The last line is the backup's path, FOLDER/YYYYMMDD-HHMMSS (UTC).",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where backups are kept")
    parser.add_argument(
        "--keep", metavar="N", type=_positive, help="then remove all but the last N"
    )
    return parser.parse_args()


def main() -> None:
    """Make a backup, and remove old ones."""
    options = _arguments()
    os.umask(0o077)
    try:
        here, folder = places(), options.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            backup = back_up(here, folder)
            if options.keep:
                remove_old(folder, options.keep)
    except (Refused, config.ConfigError, OSError, sqlite3.Error) as error:
        sys.exit(f"The backup failed: {error}")
    print(backup)


if __name__ == "__main__":
    main()
