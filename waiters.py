"""Who waits for a task to end: HTTP threads, of which others must stay free."""

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import doorbell
from doorbell import Doorbell


class Waiters:
    """Let threads wait for tasks to end, in at most `maximum` slots.

    Where a task ends in this process, `ended` wakes its waiters at once, and rings the other
    processes where someone waits: each has a FIFO for as long as that is so. Who owns this is
    rung by the doorbell, and calls `poll`, one query for all waiters.
    """

    def __init__(
        self,
        unfinished: Callable[[Iterable[str]], set[str]],
        maximum: int,
        bell: Doorbell,
        path: Path,
    ):
        self._unfinished = unfinished
        self._maximum = maximum
        self._bell = bell
        self._prefix = f"{path}."
        self._path = Path(f"{path}.{os.getpid()}-{id(self):x}")
        self._lock = threading.Lock()
        self._taken = 0
        self._waiting: list[tuple[Collection[str], threading.Event]] = []
        self._released = False

    @contextmanager
    def slot(self, force: bool = False) -> Iterator[bool]:
        """Keep one of the slots to wait in; False where none is free, or all were released."""
        with self._lock:
            is_free = force or self._taken < self._maximum
            has_slot = is_free and not self._released
            self._taken += has_slot
        try:
            yield has_slot
        finally:
            with self._lock:
                self._taken -= has_slot

    def wait(self, task_id: str, seconds: float, force: bool = False) -> bool:
        """Return True when the task has ended, is gone, or the time is over.

        Where there is no slot (`force` takes one nevertheless), and once all are
        released, return False instead, at once.
        """
        with self.slot(force) as has_slot:
            return has_slot and self.wait_for_any([task_id], seconds)

    def wait_for_any(self, ids: Collection[str], seconds: float) -> bool:
        """Return True when one of the tasks has ended, is gone, or the time is over.

        Whoever calls this has a slot. Once all are released, return False, at once.
        """
        waiter = (ids, threading.Event())
        with self._lock:
            if self._released:
                return False
            if not self._waiting:
                self._bell.listen(self._path)
            self._waiting.append(waiter)
        try:
            if len(self._unfinished(ids)) == len(ids):
                waiter[1].wait(seconds)
        finally:
            with self._lock:
                self._waiting.remove(waiter)
                if not self._waiting:
                    self._bell.stop_listening(self._path)
                    self._path.unlink(missing_ok=True)
        return not self._released

    def __bool__(self) -> bool:
        """Return whether anyone has a slot."""
        return bool(self._taken)

    @property
    def count(self) -> int:
        """Return how many threads wait now."""
        return len(self._waiting)

    def ended(self, *ids: str) -> None:
        """Wake those who wait for one of these tasks, in all processes."""
        self._wake(frozenset(ids).__contains__)
        for path in self._path.parent.iterdir():
            is_other = str(path).startswith(self._prefix) and path != self._path
            if is_other and not doorbell.ring(path):
                path.unlink(missing_ok=True)  # Its process has died.

    def poll(self) -> None:
        """Wake those of whose tasks one has ended, in whichever process."""
        with self._lock:
            ids = {task_id for ids, _ in self._waiting for task_id in ids}
        if ids:
            unfinished = self._unfinished(ids)
            self._wake(lambda waited_for: waited_for in ids and waited_for not in unfinished)

    def release(self) -> None:
        """Wake all, and let no one wait any more."""
        with self._lock:
            self._released = True
        self._wake(lambda waited_for: True)

    def _wake(self, is_meant: Callable[[str], bool]) -> None:
        with self._lock:
            for ids, event in self._waiting:
                if any(map(is_meant, ids)):
                    event.set()
