"""Who waits for a task to end: HTTP threads, of which others must stay free."""

import threading
from collections.abc import Callable, Iterable


class Waiters:
    """Let threads wait for tasks to end, at most `most` of them at a time.

    Where a task ends in this process, `ended` wakes its waiters at once. What other
    processes end is found by `look`, one query for all waiters, which whoever owns this
    calls every few milliseconds.
    """

    def __init__(self, unended: Callable[[Iterable[str]], set[str]], most: int):
        self._unended = unended
        self._most = most
        self._lock = threading.Lock()
        self._waiting: list[tuple[str, threading.Event]] = []
        self._released = False

    def wait(self, task_id: str, seconds: float, even_if_full: bool = False) -> bool:
        """Return True when the task has ended, is gone, or the time is over.

        Past `most` waiters, unless `even_if_full`, and once all are released, return
        False instead, at once.
        """
        waiter = (task_id, threading.Event())
        with self._lock:
            is_full = len(self._waiting) >= self._most and not even_if_full
            if self._released or is_full:
                return False
            self._waiting.append(waiter)
        try:
            if self._unended([task_id]):
                waiter[1].wait(seconds)
        finally:
            with self._lock:
                self._waiting.remove(waiter)
        return not self._released

    def ended(self, task_id: str) -> None:
        """Wake those who wait for this task."""
        self._wake(lambda waited_for: waited_for == task_id)

    def look(self) -> None:
        """Wake those whose task has ended, in whichever process."""
        with self._lock:
            ids = {task_id for task_id, _ in self._waiting}
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
            for task_id, event in self._waiting:
                if is_meant(task_id):
                    event.set()
