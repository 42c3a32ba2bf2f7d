"""The folder of images: its names, how a file gets one and loses it, and whether it takes one."""

import errno
import hashlib
import math
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from config import Config
from records import AttemptError, Remedy, Task

EXTENSIONS = ("png", "jpg", "webp")
_CHUNK = 65536


class StorageError(AttemptError):
    """An image could not be written to the folder, after so many bytes of it had come.

    It is no fault of its task; without a byte, no call was made.
    """

    remedy = Remedy.HOLD_ALL

    def __init__(self, error: OSError, folder: Path, size: int = 0):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self.code = "no_room"
            self.headline = "There is no room on the disk for the image"
        else:
            self.code = "storage"
            self.headline = f"The images cannot be written to {folder} ({error.strerror})"
        super().__init__(self.headline)
        self.room = size + _CHUNK
        self.has_lost_image = size > 0


class Folder:
    """A folder of images, on the volume where it was when this was made."""

    def __init__(self, path: Path):
        self.path = path
        real = path.resolve()
        self._volume = next(folder for folder in (real, *real.parents) if folder.is_mount())

    def make(self) -> None:
        """Make the folder where it was deleted, but not where its volume is gone.

        Raises OSError, also where it is no folder.
        """
        self.check_mounted()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error

    def check_mounted(self) -> None:
        """Raise OSError where the volume of the folder is gone."""
        if not self._volume.is_mount():
            raise OSError(errno.ENODEV, f"{self._volume} is not mounted")

    def check(self, size: int = 1) -> None:
        """Write a file of that size there, on disk (fsync), of which nothing stays.

        Raises StorageError.
        """
        try:
            self.make()
            with tempfile.TemporaryFile(dir=self.path, prefix=".", suffix=".part") as file:
                for start in range(0, size, _CHUNK):
                    # Not zeros, for which some file systems need no room.
                    file.write(os.urandom(min(_CHUNK, size - start)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(error, self.path) from error


def part_path(config: Config, task_id: str) -> Path:
    """Return where a task's image is written until it is whole."""
    return config.output_dir / f".{task_id}.part"


def image_path(config: Config, task: Task) -> Path:
    """Return where a task's image is in OUTPUT_DIR: where it was put, or in one that has moved.

    Raises FileNotFoundError where it is not there, or only by a link.
    """
    path = _find(config, task.file_path)
    if path is None:
        raise FileNotFoundError(errno.ENOENT, "not in OUTPUT_DIR", task.file_path)
    return path


def whole_image_path(config: Config, task: Task) -> Path | None:
    """Return where a completed task's image is, or None where it is gone or cut short."""
    try:
        path = image_path(config, task)
        return path if path.stat().st_size == task.bytes else None
    except OSError:
        return None


def thumbnail_path(config: Config, task_id: str) -> Path:
    """Return where the thumbnail of a task's image is kept."""
    return config.output_dir / "thumbnails" / f"{_stem(task_id)}.webp"


def finished_paths(config: Config, task_id: str) -> Iterator[Path]:
    """Yield the files that bear a final name of the task's image."""
    return filter(_is_file, _final_paths(config, task_id))


def publish(part: Path, target: Path, extension: str) -> Path:
    """Give a whole image its final name, `target` and the ending its bytes ask for.

    The file must be on disk (fsync) already; when this returns, so is its name.
    """
    path = target.with_name(f"{target.name}.{extension}")
    part.replace(path)
    try:
        sync_folder(path.parent)
    except OSError:
        path.unlink()
        raise
    return path


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, whoever else writes the same one."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def remove(
    config: Config,
    task_id: str,
    file_path: str | None,
    file_paths: Callable[[str], Iterable[str]],
) -> None:
    """Remove a task's image and thumbnail. Raises OSError where one stays.

    `file_paths` are those of other tasks, by the name of their files: what they name stays.
    """
    paths = [*_final_paths(config, task_id), thumbnail_path(config, task_id)]
    if image := _find(config, file_path):
        paths.append(image)
    for path in paths:
        others = (_find(config, other) for other in file_paths(path.name))
        if not any(_is_same(path, other) for other in others):
            path.unlink(missing_ok=True)


def _final_paths(config: Config, task_id: str) -> list[Path]:
    return [config.output_dir / f"{_stem(task_id)}.{extension}" for extension in EXTENSIONS]


def _stem(task_id: str) -> str:
    """Return how a task's files are named: as its id, if that can be the name of a file."""
    if re.fullmatch(r"[\w.-]{1,100}", task_id, re.ASCII):
        return task_id
    return hashlib.sha256(task_id.encode()).hexdigest()


def _find(config: Config, file_path: str | None) -> Path | None:
    """Return the file in OUTPUT_DIR that a row means, which no link below that leads to.

    A relative path is one beside OUTPUT_DIR, as in `outputs/name.png`.
    """
    folder = config.output_dir
    there = Path(os.path.normpath(folder.parent / file_path)) if file_path else folder
    for top, path in ((Path(os.path.normpath(folder)), there), (folder, folder / there.name)):
        if path.is_relative_to(top) and _is_file(path) and not _is_linked(path, top):
            return path
    return None


def _is_file(path: Path) -> bool:
    """Return whether it is a file itself: no link, and nothing that an open could wait for."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):  # No name for a file.
        return False


def _is_linked(path: Path, top: Path) -> bool:
    folders = path.relative_to(top).parents[:-1]
    return any((top / folder).is_symlink() for folder in folders)


def _is_same(path: Path, other: Path | None) -> bool:
    return other is not None and os.path.normpath(path) == os.path.normpath(other)


def sync_folder(path: Path) -> None:
    """Put the names in a folder on disk."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_low_on_disk(config: Config) -> bool:
    """Return whether less than MIN_FREE_MB is free where images or the database are."""
    floor = config.min_free_mb * 1024 * 1024
    folders = (config.output_dir, config.input_dir, config.database_path.parent)
    return min(map(_free, folders)) < floor


def _free(folder: Path) -> float:
    try:
        return shutil.disk_usage(_nearest(folder)).free
    except OSError:  # Whoever writes there is told what is wrong.
        return math.inf


def _nearest(folder: Path) -> Path:
    """Return the folder, or the one that it would be made in."""
    return folder if folder.exists() or folder == folder.parent else _nearest(folder.parent)
