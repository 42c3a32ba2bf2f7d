"""The folder of input images: each a file that is named by its bytes, kept once for all tasks."""

import fcntl
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self

from images import Verifier
from outputs import Folder, StorageError, sync_folder
from records import AttemptError, Image, Remedy

_NAME = re.compile(r"[0-9a-f]{64}\.(png|jpg|webp)")
_ARRIVING = re.compile(r"\.[0-9a-f]{32}\.upload")


class InputGone(AttemptError):
    """The file of an input is no longer there, or no longer whole: the task has failed."""

    code = "storage"
    remedy = Remedy.FAIL


class InputsUnreadable(AttemptError):
    """No file of the folder can be read now, which is no fault of the task."""

    code = "storage"
    remedy = Remedy.HOLD_MODEL
    wait = 5.0  # To look again costs no call.

    def __init__(self, error: OSError, folder: Path):
        self.headline = f"The input images cannot be read from {folder} ({error.strerror})"
        super().__init__(self.headline)


class Arrival:
    """An image that arrives: a hidden file, locked until this is closed, which removes it.

    `image` is what it shows, once it is complete.
    """

    image: Image

    def __init__(self, folder: Path):
        self._folder = folder
        self.path = folder / f".{uuid.uuid4().hex}.upload"
        self._file = self.path.open("xb")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def receive(self, chunks: Iterable[bytes], verifier: Verifier) -> None:
        """Write all chunks as they come, on disk (fsync), and look what image they are.

        Raises ImageError where they are no whole image, StorageError where they cannot be
        written, and what the chunks raise.
        """
        for chunk in chunks:
            verifier.feed(chunk)
            self.write(chunk)
        with self._faults_of_the_disk():
            self._file.flush()
            os.fsync(self._file.fileno())
        self.image = verifier.finish(self.path)

    def write(self, data: bytes) -> None:
        """Write more of the file. Raises StorageError."""
        with self._faults_of_the_disk():
            self._file.write(data)

    def read(self) -> bytes:
        """Return all that was written."""
        self._file.flush()
        return self.path.read_bytes()

    def close(self) -> None:
        """Remove the file, unless it was given its name; a sweep does where this cannot."""
        with suppress(OSError):  # There may be no room for what is not written yet.
            self._file.close()
        with suppress(OSError):
            self.path.unlink()

    @contextmanager
    def _faults_of_the_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(error, self._folder) from error


class InputFolder(Folder):
    """The folder of input images: those of tasks, and those that arrive."""

    def arrival(self) -> Arrival:
        """Make the file of an image that arrives. Raises StorageError."""
        while True:
            try:
                self.make()
                arrival = Arrival(self.path)
            except OSError as error:
                raise StorageError(error, self.path) from error
            if arrival.path.exists():
                return arrival
            arrival.close()  # A sweep came between its first two steps.

    def publish(self, arrivals: Iterable[Arrival]) -> None:
        """Give images that have arrived their names, on disk (fsync). Raises StorageError.

        Of the same bytes one file stays. Nobody else may publish or remove meanwhile.
        """
        try:
            for arrival in arrivals:
                if not self.has(arrival.image):
                    arrival.path.replace(self.path_of(arrival.image))
            sync_folder(self.path)
        except OSError as error:
            raise StorageError(error, self.path) from error

    def path_of(self, image: Image) -> Path:
        """Return where the file of an input is."""
        return self.path / f"{image.sha256}.{image.extension}"

    def has(self, image: Image) -> bool:
        """Return whether the file of an input is there, as long as it was."""
        try:
            return self.path_of(image).stat().st_size == image.bytes
        except FileNotFoundError:
            return False

    def open(self, image: Image) -> BinaryIO:
        """Open the file of an input. Raises InputGone or InputsUnreadable."""
        try:
            self.check_mounted()
            self.path.stat()
            if self.has(image):
                return self.path_of(image).open("rb")
        except OSError as error:
            raise InputsUnreadable(error, self.path) from error
        fact = f"The input image {self.path_of(image).name} is gone from {self.path}"
        raise InputGone(f"{fact}, or no longer whole; send it again")

    def remove(self, name: str) -> None:
        """Remove the file of that name, if it is there.

        Raises OSError, which is BlockingIOError while a backup keeps all files (flock).
        """
        self.check_mounted()
        try:
            folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.path / name).unlink(missing_ok=True)
        finally:
            os.close(folder)

    def names(self) -> Iterator[str]:
        """Yield the names of all files that may be the inputs of tasks. Raises OSError."""
        return (path.name for path in self.path.iterdir() if _NAME.fullmatch(path.name))

    def remove_abandoned(self) -> None:
        """Remove what arrived when its process died. Raises OSError."""
        for path in list(self.path.iterdir()):
            if _ARRIVING.fullmatch(path.name):
                with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
