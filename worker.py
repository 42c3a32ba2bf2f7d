"""The queue: which process runs it, what runs next, and how an attempt ends."""

import fcntl
import functools
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import db
import doorbell
import images
import outputs
from chutes import Canceled, CancelToken
from config import Config
from db import Database, DatabaseError
from doorbell import Doorbell
from inputs import InputFolder
from records import (
    ALL_MODELS,
    CANCELED,
    SHUTDOWN,
    AttemptError,
    Ending,
    Hold,
    Image,
    Limits,
    NewHold,
    Remedy,
    Reply,
    Task,
)
from registry import ModelRegistry
from waiters import Waiters

# Whoever sleeps looks up as often, in seconds, as a ring can be lost.
MAX_SLEEP = 1.0
MAX_BACKOFF = 300.0
# A call reaches Chutes a little after it was claimed, and not always equally late.
RATE_MARGIN = 0.25
RETRY_SECONDS = 1.0
CANCEL_SECONDS = 5.0
_CHORES_SECONDS = 1.0
# Between two steps of a long chore others write.
_STEP_SECONDS = 0.02
_DRAIN_POLL_SECONDS = 0.05
# Until the next look at the disk, and a little longer, so that the reason is shown all the time.
_DISK_SECONDS = 5.0
_PURGE_SECONDS = 60.0
_PURGE_STEP = 5
_SWEEP_STEP = 500
_FIRST_CALL = (0.0, "", 0)
_Result = TypeVar("_Result")

log = logging.getLogger("worker")


class Worker:
    """Run the queue of this database, in whichever process holds its lock.

    The database is the queue; the threads of the pool are only hands, and never hold more
    than CONCURRENCY tasks. The process that has the lock (flock on a file beside the
    database, for life) is the only one that makes calls, so that every task it finds
    under way when it begins is an orphan. The others stand by and take over at once.
    `start` begins a thread, which `stop` ends; it owns the pool, the lock and the client.
    """

    def __init__(
        self,
        config: Config,
        database: Database,
        client: Any,
        decoder: images.Decoder,
        registry: ModelRegistry,
        clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ):
        self._models = registry
        self._config = config
        self._db = database
        self._chutes = client
        self._decoder = decoder
        self._folder = outputs.Folder(config.output_dir)
        self._inputs = InputFolder(config.input_dir)
        self._bell = Doorbell()
        self._bell_path = Path(f"{config.database_path}.bell")
        # Half of the HTTP threads may wait; the others answer.
        self.waiters = Waiters(
            database.unfinished, config.threads // 2, self._bell, self._bell_path
        )
        models = config.file_models.items()
        at_once = {name: model.concurrency for name, model in models if model.concurrency}
        self._limits = Limits(rate_limit(config), config.max_per_day, at_once)
        self._clock = clock
        self._jitter = jitter
        self._draining = False
        self._running: dict[str, tuple[Task, CancelToken]] = {}
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._last_chores = 0.0
        self._has_more_chores = False
        self._disk_is_full = False
        self._checked_hold: Hold | None = None
        self._last_tick = 0.0
        self._last_purge = 0.0
        self._last_purged_call = _FIRST_CALL
        self._is_over = threading.Event()

    def start(self, keep_running: Callable[[], bool] = lambda: True) -> None:
        """Stand by for the queue, and run it when its lock is free; once, however often called.

        When `keep_running` says no, this drains: it is asked before any claim.
        """
        with self._starting:
            if self._thread is None:
                self._keep_running = keep_running
                self._thread = threading.Thread(target=self._run, name="queue")
                self._thread.start()

    def wake(self) -> None:
        """Have the process that runs the queue, whichever it is, look at it at once."""
        if not doorbell.ring(self._bell_path):
            self._bell.ring()

    def cancel(self, task_id: str) -> None:
        """End a task: a pending one at once, one under way as soon as its call is canceled."""
        self._db.cancel(task_id, self._clock())
        self.waiters.ended(task_id)
        self.wake()

    def cancel_pending(self, model: str | None) -> int:
        """End all tasks that are pending now, or those of a model; return how many.

        In steps, so that others write meanwhile.
        """
        up_to, count = self._db.last_seq(), 0
        while ids := self._db.cancel_pending(model, up_to, self._clock()):
            self.waiters.ended(*ids)
            count += len(ids)
            time.sleep(_STEP_SECONDS)
        self.wake()
        return count

    def delete(self, task: Task) -> bool:
        """Delete a task with its files; False while it is processing."""
        if not self._db.delete(task.id, self._limits_since()):
            return False
        self.waiters.ended(task.id)
        self._finish_deletion(task.id, task.file_path)
        if task.inputs:
            self._remove_unused_inputs()
        return True

    def check_folders(self) -> Iterator[outputs.StorageError]:
        """Yield why an image cannot be written, one that is made or one that is sent."""
        for folder in (self._folder, self._inputs):
            try:
                folder.check()
            except outputs.StorageError as error:
                yield error

    @property
    def is_draining(self) -> bool:
        """Return whether this process starts no more calls."""
        return self._draining

    def is_run_by_any(self) -> bool:
        """Return whether some process, this one or another, runs the queue."""
        try:
            with _QueueLock(self._config.database_path) as lock:
                return not lock.acquire()
        except OSError:  # Its folder is gone, too.
            return False

    def drain(self) -> None:
        """Start no more calls; give those under way SHUTDOWN_GRACE seconds, then cancel them.

        Safe in a signal handler. What is canceled so goes back to pending, and does not count.
        """
        self._draining = True
        self._bell.ring()

    def stop(self) -> None:
        """Drain, and return when no call is under way and the lock is free for others."""
        self.drain()
        if self._thread:
            self._thread.join()
        self._chutes.close()
        self._models.close()
        self._bell.close()

    def _run(self) -> None:
        with _QueueLock(self._config.database_path) as lock:
            if not lock.acquire():
                # Perhaps it takes the place of one that died; the first to run does it later.
                with suppress(DatabaseError):
                    self._sweep_inputs()
            if not self._stand_by(lock):
                return
            log.info("this process runs the queue")
            self._bell.listen(self._bell_path)
            with ThreadPoolExecutor(self._config.concurrency, "call") as pool:
                self._write_until_accepted(self._recover, self._should_drain)
                self._tick(pool)  # No call waits for the counts, which take long where many are.
                self._write_until_accepted(self._check_counts, self._should_drain)
                self._write_until_accepted(self._sweep_inputs, self._should_drain)
                while not self._should_drain():
                    self._bell.wait(self._tick(pool))
                self._finish_running()
                self.waiters.release()
            self._bell.stop_listening(self._bell_path)

    def _stand_by(self, lock: "_QueueLock") -> bool:
        """Wait for the lock, and return whether this process has it; not if it is to drain."""
        until = math.inf
        while True:
            # In this order: the end of a process that has the lock now is noticed.
            self._bell.watch(self._bell_path)
            if lock.acquire():
                return True
            if self._should_drain():
                # What another process has under way may end in time for those who wait here.
                until = min(until, time.monotonic() + self._config.shutdown_grace)
                if not self.waiters or time.monotonic() >= until:
                    self.waiters.release()
                    return False
            try:
                self.waiters.poll()
            except DatabaseError as error:
                log.error("the waiters wait for the database: %s", error)
            self._bell.wait(_DRAIN_POLL_SECONDS if self._draining else MAX_SLEEP)

    def _should_drain(self) -> bool:
        if not self._draining and not self._keep_running():
            self.drain()
        return self._draining

    def _tick(self, pool: ThreadPoolExecutor) -> float:
        """Do all that is due, and return how many seconds nothing will be."""
        try:
            self._check_clock()
            has_more = self._do_chores()
            if self._has_room() and not self._should_drain() and not self._disk_is_full:
                self._start_some(pool)
            has_more |= self._cancel_requested()
            self.waiters.poll()
            return min(self._seconds_until_due(), _STEP_SECONDS if has_more else MAX_SLEEP)
        except DatabaseError as error:
            log.error("the queue waits for its database: %s", error)
        except Exception:
            log.exception("internal error in the queue; it goes on in a second")
        return MAX_SLEEP

    def _seconds_until_due(self) -> float:
        if not self._has_room():
            return MAX_SLEEP  # Whoever makes room rings.
        now = self._clock()
        due = self._db.next_due(now, self._limits.rate)
        return MAX_SLEEP if due is None else min(MAX_SLEEP, max(0.0, due - now))

    def _do_chores(self) -> bool:
        """Do once a second, in steps, what no task waits for; return whether there is more."""
        now = self._clock()
        if abs(now - self._last_chores) >= _CHORES_SECONDS:
            self._last_chores = now
            self._disk_is_full = self._look_at_disk(now)
            self._models.refresh_if_due()
            self._has_more_chores = True
        if self._has_more_chores:
            self._has_more_chores = self._expire(now) or self._purge(now)
        return self._has_more_chores

    def _has_room(self) -> bool:
        return len(self._running) < self._config.concurrency

    def _start_some(self, pool: ThreadPoolExecutor) -> None:
        """Claim tasks for the places that are free, and start their calls."""
        room = self._config.concurrency - len(self._running)
        self._start(pool, self._db.claim_some(room, self._clock(), self._limits))

    def _start(self, pool: ThreadPoolExecutor, claimed: list[Task]) -> None:
        self._running |= {task.id: (task, CancelToken()) for task in claimed}
        for place, task in enumerate(claimed):
            try:
                pool.submit(self._work, pool, *self._running[task.id])
            except RuntimeError as error:
                self._take_back(claimed[place:], error)
                return

    def _take_back(self, tasks: list[Task], error: RuntimeError) -> None:
        """Undo claims that the pool did not take: no thread to be had, or no interpreter."""
        for task in tasks:
            log.error("no thread for a call: %s", error, extra={"task": task.id})
            # The pool may have kept the work for another thread: a canceled token makes no call.
            self._running[task.id][1].cancel("shutdown")
            end = replace(SHUTDOWN, sent=False)
            finish = functools.partial(self._db.finish, task, end, self._clock())
            self._write_until_accepted(finish, self._is_over.is_set)
            self._running.pop(task.id)
        if "interpreter" in str(error):
            self.drain()
        else:
            time.sleep(1)
            self._bell.ring()

    def _look_at_disk(self, now: float) -> bool:
        """Return whether an image could not be stored, so that no call is to be paid for.

        A hold for that reason ends when a file of the size of the lost image can be written.
        """
        if outputs.is_low_on_disk(self._config):
            return True
        hold = self._db.hold(ALL_MODELS)
        if not hold or not hold.room or hold.probe or hold == self._checked_hold:
            return False
        try:
            self._folder.check(hold.room)
        except outputs.StorageError as error:
            self._db.delay_hold(ALL_MODELS, now + _DISK_SECONDS, error.headline)
            return True
        # It is not written again and again while the hold is not over, or no task comes.
        until = min(hold.until, now) if self._disk_is_full else hold.until
        self._checked_hold = replace(hold, until=until)
        self._db.delay_hold(ALL_MODELS, until, hold.reason)
        return False

    def _check_clock(self) -> None:
        """Take the times that were written down back with a clock that is set back."""
        now = self._clock()
        if now < self._last_tick - 1:
            log.warning("the clock was set back", extra={"seconds": self._last_tick - now})
            self._db.clamp_future_times(now, MAX_BACKOFF)
            self._last_purged_call = _FIRST_CALL
        self._last_tick = now

    def _purge(self, now: float) -> bool:
        """Remove what ended RETENTION_DAYS ago, and what deleted tasks left; a little a time.

        Returns whether there may be more.
        """
        if abs(now - self._last_purge) < _PURGE_SECONDS:
            return False
        if self._config.retention_days:
            before = now - self._config.retention_days * 86400
            if retired := self._db.purge(before, _PURGE_STEP, self._limits_since()):
                for task in retired:
                    self._finish_deletion(task.id, task.file_path)
                log.info("tasks removed (RETENTION_DAYS)", extra={"count": len(retired)})
                return True
        for task_id, file_path in self._db.pending_deletions(_PURGE_STEP):
            self._finish_deletion(task_id, file_path)
        if self._remove_unused_inputs(_PURGE_STEP):
            return True
        if last := self._db.purge_calls(self._last_purged_call, self._limits_since()):
            self._last_purged_call = last
            return True
        self._last_purge = now
        return False

    def _limits_since(self) -> float:
        """Return from when on (epoch seconds) calls count for a limit, the day's or the rate's."""
        now = self._clock()
        limit = self._limits.rate
        return min(db.midnight(now), now - limit[1] if limit else now)

    def _expire(self, now: float) -> bool:
        """Fail what has waited too long, in steps; return whether there may be more."""
        if not self._config.task_ttl:
            return False
        error = f"The task waited longer than {self._config.task_ttl} seconds (TASK_TTL)"
        expired = self._db.expire(now - self._config.task_ttl, error, now)
        if expired:
            log.info("tasks expired", extra={"count": expired})
        return bool(expired)

    def _cancel_requested(self) -> bool:
        """Cancel the calls of tasks that a client, in whichever process, has canceled.

        Returns whether there may be more: a task may have been claimed a moment ago.
        """
        canceling = self._db.canceling() if self._running else []
        running = [self._running.get(task_id) for task_id in canceling]
        for _, token in filter(None, running):
            token.cancel("canceled")
        return None in running

    def _finish_deletion(self, task_id: str, file_path: str | None) -> None:
        try:
            outputs.remove(self._config, task_id, file_path, self._db.file_paths)
        except OSError:
            log.exception("a file stays; its removal is tried again", extra={"task": task_id})
            return
        self._db.files_deleted(task_id)

    def _remove_unused_inputs(self, limit: int = _SWEEP_STEP) -> bool:
        """Remove some files of inputs that no task has; return whether there may be more."""
        if names := self._db.unused_inputs(limit):
            try:
                self._db.remove_inputs(names, self._inputs.remove)
            except BlockingIOError:
                log.info("input images stay while a backup is made", extra={"count": len(names)})
                return False
            except OSError:
                log.exception("an input image stays; its removal is tried again")
                return False
        return len(names) == limit

    def _sweep_inputs(self) -> None:
        """Remove the files of inputs that a death has left without a task."""
        try:
            self._inputs.remove_abandoned()
            names = list(self._inputs.names())
        except OSError as error:
            log.error("the folder of inputs cannot be swept: %s", error)
            return
        for start in range(0, len(names), _SWEEP_STEP):
            self._db.note_unused_inputs(names[start : start + _SWEEP_STEP])
            self._remove_unused_inputs()

    def _work(self, pool: ThreadPoolExecutor, task: Task, token: CancelToken) -> None:
        """Make the call of a task, and start that of the one that takes its place."""
        if self._running.get(task.id) != (task, token):
            return  # It was taken back, and perhaps claimed anew.
        if following := self._attempt(task, token):
            self._start(pool, [following])
        self._running.pop(task.id, None)
        if not following:
            self._bell.ring()

    def _attempt(self, task: Task, token: CancelToken) -> Task | None:
        """Make one call for the task and write down how it ended; return the next task."""
        part = outputs.part_path(self._config, task.id)
        began = time.monotonic()
        end = self._call(task, part, token)
        # Before the row: what dies in between is still found as an orphan.
        with suppress(OSError):  # A folder that cannot be written must not stop the end.
            part.unlink(missing_ok=True)
        end = replace(end, sent=token.connected, seconds=time.monotonic() - began, host=token.host)
        write = functools.partial(self._finish_and_claim, task, end)
        written = self._write_until_accepted(write, self._is_over.is_set)
        if not written:
            return None
        is_ours, following = written
        # Not in one with the write: tried again, that would claim another task.
        tell = functools.partial(self._tell, task, end, is_ours)
        self._write_until_accepted(tell, self._is_over.is_set)
        return following

    def _call(self, task: Task, part: Path, token: CancelToken) -> Ending:
        """Fetch and keep the image; return how that ended."""
        reply, verifier = Reply(), None
        try:
            verifier = self._decoder.verifier()
            self._folder.make()
            model = self._models.find(task.model)
            with ExitStack() as held:
                files = [held.enter_context(self._inputs.open(image)) for image in task.inputs]
                reply = self._chutes.generate(
                    *(model, task.prompt, task.params, part, token, verifier.feed), files
                )
            image = verifier.finish(part)
            path = outputs.publish(part, self._config.output_dir / task.id, image.extension)
        except Canceled as reason:
            return CANCELED if str(reason) == "canceled" else replace(SHUTDOWN, outcome=str(reason))
        except DatabaseError as error:
            log.error("a call waits for the database: %s", error, extra={"task": task.id})
            return replace(SHUTDOWN, outcome="database")
        except AttemptError as error:
            return self._consequence(task, error, error.reply or reply)
        except OSError as error:
            size = verifier.size if verifier else 0
            storage = outputs.StorageError(error, self._config.output_dir, size)
            return self._consequence(task, storage, reply)
        except Exception as error:
            log.exception("internal server error", extra={"task": task.id})
            message = f"Internal server error ({type(error).__name__}); see the server log"
            return Ending("internal", "failed", error=message)
        return Ending("completed", "completed", reply=reply, path=path, image=image)

    def _consequence(self, task: Task, error: AttemptError, reply: Reply) -> Ending:
        """Return what a failed call means for its task, and for the others."""
        end = Ending(error.code, "failed", error=str(error), reply=reply)
        if error.remedy is Remedy.FAIL:
            is_missing = reply.status == 404
            return replace(end, error=f"{error}{self._hint(task.model)}") if is_missing else end
        if error.remedy is Remedy.PAUSE:
            return replace(end, pause_reason=error.headline)
        if error.remedy is Remedy.RETRY:
            wait = backoff(task.attempts + 1, self._config.retry_backoff, self._jitter())
            return self._another_attempt(task, replace(end, not_before=self._clock() + wait))
        log.warning("%s", error, extra={"task": task.id})
        step = self._config.retry_backoff
        hold = NewHold(
            model=task.model if error.remedy is Remedy.HOLD_MODEL else ALL_MODELS,
            reason=error.headline,
            # The disk is looked at before a hold for its sake is over.
            step=max(step, _DISK_SECONDS) if error.room else step,
            maximum=MAX_BACKOFF,
            wait=error.wait,
            room=error.room,
        )
        end = replace(end, status="pending", counted=False, error=None, hold=hold)
        return self._lost_image_ending(task, end, error) if error.has_lost_image else end

    def _lost_image_ending(self, task: Task, end: Ending, error: AttemptError) -> Ending:
        """Return the ending of a call that was paid for in vain; the last one fails the task."""
        end, lost = replace(end, has_lost_image=True), task.lost_images + 1
        if lost < self._config.max_attempts:
            return end
        sentence = f"{error}, for {lost} images of this task; mend that, then retry the task"
        return replace(end, outcome="storage", status="failed", error=sentence)

    def _hint(self, name: str) -> str:
        """Return a sentence that names the nearest models, where nothing is known of this one."""
        with suppress(DatabaseError):
            if self._models.find(name).source == "setting" and (near := self._models.nearest(name)):
                return f". No {name} is known here; did you mean {' or '.join(near)}?"
        return ""

    def _another_attempt(self, task: Task, end: Ending) -> Ending:
        """Return the ending with another attempt to follow, if there is one left."""
        attempts, maximum = task.attempts + 1, self._config.max_attempts
        is_over = end.outcome == "interrupted" and self._config.interrupted == "fail"
        if attempts < maximum and not is_over:
            return replace(end, status="pending")
        error = f"{end.error} (attempt {attempts} of {max(attempts, maximum)})"
        return replace(end, error=error, not_before=None)

    def _finish_and_claim(self, task: Task, end: Ending) -> tuple[bool, Task | None]:
        """Write down how a call ended; return the task that takes its place, if one may."""
        if self._disk_is_full or self._should_drain():
            return self._db.finish(task, end, self._clock()), None
        return self._db.finish_and_claim(task, end, self._clock(), self._limits)

    def _finish(self, task: Task, end: Ending) -> None:
        """Write down how a call ended, and tell of it."""
        self._tell(task, end, self._db.finish(task, end, self._clock()))

    def _tell(self, task: Task, end: Ending, is_ours: bool) -> None:
        """Log in one line how a call ended, and wake those who wait for its task."""
        log.info(
            "attempt ended",
            extra={
                "task": task.id,
                "call": task.calls,
                "model": task.model,
                "outcome": end.outcome,
                "status": end.reply.status,
                "seconds": end.seconds and round(end.seconds, 3),
                "reason": end.error,
            },
        )
        if end.path and not is_ours:
            self._discard(task, end.path)
        if end.status != "pending":
            self.waiters.ended(task.id)
        if end.pause_reason:
            log.error("the queue pauses itself: %s", end.pause_reason)

    def _discard(self, task: Task, path: Path) -> None:
        """Remove an image that its task does not want: it was ended in another way meanwhile."""
        now = self._db.get(task.id)
        # A write whose success was not told is tried again, and finds its own work done.
        if now is None or now.file_path != str(path):
            path.unlink(missing_ok=True)

    def _write_until_accepted(
        self, write: Callable[[], _Result], gives_up: Callable[[], bool]
    ) -> _Result | None:
        """Write, again every RETRY_SECONDS until the database takes it or `gives_up` says so."""
        while True:
            try:
                return write()
            except DatabaseError as error:
                log.error("the queue waits for its database: %s", error)
            except Exception:
                log.exception("internal server error; what it stopped is tried again")
            if gives_up() or self._is_over.wait(RETRY_SECONDS):
                return None

    def _recover(self) -> None:
        """Settle what the last process to run the queue left under way, and begin anew."""
        now = self._clock()
        self._db.clamp_future_times(now, MAX_BACKOFF)
        self._db.reset_run_state(self._config.max_attempts, now)
        for task_id, file_path in self._db.pending_deletions():
            self._finish_deletion(task_id, file_path)
        for task in self._db.orphans():
            self._finish(task, self._orphan_ending(task))

    def _check_counts(self) -> None:
        if not self._db.check_counts():
            log.error("the counts of tasks were wrong; they are counted anew")

    def _orphan_ending(self, task: Task) -> Ending:
        """Return how the call ended that was under way when its process died."""
        try:
            if found := self._finished_file(task):
                path, image = found
                return Ending("completed", "completed", path=path, image=image)
        except OSError:
            log.exception("a file of an orphan cannot be read", extra={"task": task.id})
        if task.canceling:
            return CANCELED
        message = "The server died while the call to Chutes was under way"
        return self._another_attempt(task, Ending("interrupted", "failed", error=message))

    def _finished_file(self, task: Task) -> tuple[Path, Image] | None:
        """Return the image of an orphan that was whole when its process died."""
        with suppress(OSError):  # A folder that cannot be written may hold a finished image.
            outputs.part_path(self._config, task.id).unlink(missing_ok=True)
        for path in outputs.finished_paths(self._config, task.id):
            try:
                image = self._decoder.inspect(path)
            except images.ImageError:
                path.unlink()
                continue
            outputs.sync_folder(path.parent)
            return path, image
        return None

    def _finish_running(self) -> None:
        """Wait for the calls under way, cancel them when the grace is over, and wait again."""
        if self._running:
            log.info(
                "no new calls; waiting for those under way",
                extra={"calls": len(self._running), "grace": self._config.shutdown_grace},
            )
        self._wait_for_calls(self._config.shutdown_grace)
        for _, token in list(self._running.values()):
            token.cancel("shutdown")
        self._wait_for_calls(CANCEL_SECONDS)
        self._is_over.set()
        # What cannot be canceled, such as the look-up of a name, must not count either.
        for task, token in list(self._running.values()):
            end = replace(SHUTDOWN, sent=token.connected)
            put_back = functools.partial(self._db.finish, task, end, self._clock())
            self._write_until_accepted(put_back, self._is_over.is_set)

    def _wait_for_calls(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._running and (left := deadline - time.monotonic()) > 0:
            with suppress(DatabaseError):
                self._cancel_requested()
            self._bell.wait(min(left, _DRAIN_POLL_SECONDS))


class _QueueLock:
    """The right to run the queue: a kernel lock that any death frees and any freeze keeps."""

    def __init__(self, database_path: Path):
        self._path = f"{database_path}.queue"

    def __enter__(self) -> "_QueueLock":
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)

    def acquire(self) -> bool:
        """Take the lock if it is free, and return whether this process has it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def backoff(attempts: int, base: float, jitter: float) -> float:
    """Return the seconds before the next attempt: four times more each, up to MAX_BACKOFF.

    `jitter`, 0 to 1, makes it up to a quarter longer, never shorter.
    """
    return min(MAX_BACKOFF, base * 4.0 ** (attempts - 1) * (1 + jitter / 4))


def rate_limit(config: Config) -> tuple[int, float] | None:
    """Return the rate limit as calls and seconds, with a margin that keeps it for Chutes."""
    limit = config.rate_limit
    return (limit.count, limit.seconds + RATE_MARGIN) if limit else None
