"""Who waits for a task to end: HTTP threads, of which others must stay free."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager


class Waiters:
    """Let threads wait for tasks to end, in at most `most` places.

    Where a task ends in this process, `ended` wakes its waiters at once. What other
    processes end is found by `look`, one query for all waiters, which whoever owns this
    calls every few milliseconds.
    """

    def __init__(self, unended: Callable[[Iterable[str]], set[str]], most: int):
        self._unended = unended
        self._most = most
        self._lock = threading.Lock()
        self._taken = 0
        self._waiting: list[tuple[Collection[str], threading.Event]] = []
        self._released = False

    @contextmanager
    def place(self, even_if_full: bool = False) -> Iterator[bool]:
        """Keep one of the places to wait in; False where none is free, or all were released."""
        with self._lock:
            is_free = even_if_full or self._taken < self._most
            has_place = is_free and not self._released
            self._taken += has_place
        try:
            yield has_place
        finally:
            with self._lock:
                self._taken -= has_place

    def wait(self, task_id: str, seconds: float, even_if_full: bool = False) -> bool:
        """Return True when the task has ended, is gone, or the time is over.

        Where there is no place (`even_if_full` takes one nevertheless), and once all are
        released, return False instead, at once.
        """
        with self.place(even_if_full) as has_place:
            return has_place and self.wait_for_any([task_id], seconds)

    def wait_for_any(self, ids: Collection[str], seconds: float) -> bool:
        """Return True when one of the tasks has ended, is gone, or the time is over.

        Whoever calls this has a place. Once all are released, return False, at once.
        """
        waiter = (ids, threading.Event())
        with self._lock:
            if self._released:
                return False
            self._waiting.append(waiter)
        try:
            if len(self._unended(ids)) == len(ids):
                waiter[1].wait(seconds)
        finally:
            with self._lock:
                self._waiting.remove(waiter)
        return not self._released

    @property
    def are_there(self) -> bool:
        """Tell whether anyone has a place."""
        return bool(self._taken)

    def ended(self, task_id: str) -> None:
        """Wake those who wait for this task."""
        self._wake(lambda waited_for: waited_for == task_id)

    def look(self) -> None:
        """Wake those of whose tasks one has ended, in whichever process."""
        with self._lock:
            ids = {task_id for ids, _ in self._waiting for task_id in ids}
        if ids:
            unended = self._unended(ids)
            self._wake(lambda waited_for: waited_for in ids and waited_for not in unended)

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
