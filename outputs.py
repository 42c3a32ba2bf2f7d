"""The folder of images: its names, how a file gets one and loses it, and how much room there is."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from config import Config
from records import Task

EXTENSIONS = ("png", "jpg", "webp")


def part_path(config: Config, task_id: str) -> Path:
    """Return where a task's image is written until it is whole."""
    return config.output_dir / f".{task_id}.part"


def image_path(config: Config, task: Task) -> Path:
    """Return where a task's image is: where it was put, or in a folder that has moved."""
    path = Path(task.file_path or "")
    return path if path.exists() else config.output_dir / path.name


def thumbnail_path(config: Config, task_id: str) -> Path:
    """Return where the thumbnail of a task's image is kept."""
    return config.output_dir / "thumbnails" / f"{task_id}.webp"


def finished_paths(config: Config, task_id: str) -> Iterator[Path]:
    """Yield the files that bear a final name of the task's image."""
    return filter(Path.exists, _final_paths(config, task_id))


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


def remove(config: Config, task_id: str) -> None:
    """Remove a task's image and thumbnail. Raises OSError where one stays."""
    for path in (*_final_paths(config, task_id), thumbnail_path(config, task_id)):
        path.unlink(missing_ok=True)


def _final_paths(config: Config, task_id: str) -> list[Path]:
    return [config.output_dir / f"{task_id}.{extension}" for extension in EXTENSIONS]


def sync_folder(path: Path) -> None:
    """Put the names in a folder on disk."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def has_room(folder: Path, size: int) -> bool:
    """Return whether the disk and its quotas leave room for so many bytes, by trying.

    Another fault than the lack of room is left to whoever writes in earnest.
    """
    probe = folder / ".room.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        return error.errno not in (errno.ENOSPC, errno.EDQUOT)
    finally:
        with suppress(OSError):
            probe.unlink()
    return True


def is_low_on_disk(config: Config) -> bool:
    """Return whether less than MIN_FREE_MB is free where images or the database are."""
    floor = config.min_free_mb * 1024 * 1024
    folders = (config.output_dir, config.database_path.parent)
    return any(shutil.disk_usage(_nearest(folder)).free < floor for folder in folders)


def _nearest(folder: Path) -> Path:
    """Return the folder, or the one that it would be made in."""
    return folder if folder.exists() or folder == folder.parent else _nearest(folder.parent)
