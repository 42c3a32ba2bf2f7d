"""Doorbells: a thread sleeps until something rings, in this process or in another."""

import os
import select
import stat
import threading
from contextlib import suppress
from pathlib import Path

_NEW = os.O_NONBLOCK | os.O_CLOEXEC


class Doorbell:
    """Sleep until rung: by `ring`, by another process through a FIFO, or by a process's end.

    One thread waits; any may ring. A ring can be lost: its FIFO is full, was removed or could
    not be made, or its reader is frozen. So whoever waits looks up by itself, now and then.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._own = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._own, select.EPOLLIN)
        self._lock = threading.Lock()
        self._listening: dict[Path, int] = {}
        self._watched: dict[Path, int] = {}

    def ring(self) -> None:
        """Wake the thread that waits, or that waits next. Safe in a signal handler."""
        if not self._epoll.closed:
            os.eventfd_write(self._own, 1)

    def listen(self, path: Path) -> None:
        """Be rung through the FIFO at this path too, which is made where there is none."""
        with self._lock:
            self._listening[path] = self._open(path, os.O_RDWR, select.EPOLLIN)

    def stop_listening(self, path: Path) -> None:
        """Be rung through that FIFO no more; it is left where it is."""
        with self._lock:
            self._close(self._listening.pop(path, -1))

    def watch(self, path: Path) -> None:
        """Be rung once, when the process that listens at this path ends."""
        with self._lock:
            if path not in self._watched:
                self._watched[path] = self._open(path, os.O_RDONLY, 0)

    def wait(self, seconds: float) -> None:
        """Return when rung, or after so many seconds."""
        events = self._epoll.poll(seconds)
        with self._lock:
            for file, _ in events:
                self._answer(file)
            if not events:
                self._listen_anew()

    def close(self) -> None:
        """Close all files. Nobody waits, rings or listens any more."""
        with self._lock:
            if self._epoll.closed:
                return
            for file in (*self._listening.values(), *self._watched.values(), self._own):
                self._close(file)
            self._listening.clear()
            self._watched.clear()
            self._epoll.close()

    def _answer(self, file: int) -> None:
        # It may have been closed by another thread since, and its number be another file's.
        if file == self._own or file in self._listening.values():
            with suppress(BlockingIOError):
                os.read(file, 65536)
        for path in [path for path, watched in self._watched.items() if watched == file]:
            self._close(self._watched.pop(path))

    def _listen_anew(self) -> None:
        """Listen where a FIFO was removed, or replaced."""
        for path, file in list(self._listening.items()):
            with suppress(OSError):
                if file >= 0 and path.stat().st_ino == os.fstat(file).st_ino:
                    continue
            self._close(file)
            self._listening[path] = self._open(path, os.O_RDWR, select.EPOLLIN)

    def _open(self, path: Path, mode: int, events: int) -> int:
        """Return the FIFO's descriptor, -1 where there is none to be had."""
        with suppress(OSError):  # It is there, or the folder takes none.
            os.mkfifo(path, 0o600)
        with suppress(OSError):
            file = os.open(path, mode | _NEW)
            if stat.S_ISFIFO(os.fstat(file).st_mode):
                self._epoll.register(file, events)
                return file
            os.close(file)
        return -1

    def _close(self, file: int) -> None:
        if file >= 0:
            self._epoll.unregister(file)
            os.close(file)


def ring(path: Path) -> bool:
    """Ring whoever listens at the path; return False where nobody does."""
    try:
        file = os.open(path, os.O_WRONLY | _NEW)
    except OSError:
        return False
    try:
        if stat.S_ISFIFO(os.fstat(file).st_mode):
            os.write(file, b"\0")
    except OSError:  # It is full: whoever is to read it was rung already.
        pass
    finally:
        os.close(file)
    return True
