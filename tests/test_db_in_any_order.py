"""`db.py` against a plain model: every verb in any order, the clock going forward and back."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import rows
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from db import Database
from records import ALL_MODELS, CANCELED, SHUTDOWN, Ending, Image, NewHold, NewTask

MAX_ATTEMPTS = 3
MAX_BACKOFF = 300.0
MODELS = ("m", "n")
MEMORY = Path("/dev/shm")
UNCOUNTED = ("shutdown", "unavailable", "storage")
IMAGE = Image("image/png", "png", 3, 1, 1, "0" * 64)

# All of its work is one test.
pytestmark = pytest.mark.timeout(300)


@dataclass
class ModelTask:
    id: str
    seq: int
    model: str
    priority: int
    status: str = "pending"
    attempts: int = 0
    calls: int = 0
    not_before: float | None = None
    last_error: str | None = None
    error_code: str | None = None
    lost_images: int = 0
    is_canceling: bool = False


@dataclass
class ModelHold:
    until: float
    step: float
    room: int
    probe: str | None = None


class Model:
    """What the database promises, in dictionaries."""

    def __init__(self):
        self.tasks = {}
        self.holds = {}
        self.outcomes = {}
        self.pause = None
        self.seq = 0

    def add(self, task_id, model, priority):
        self.seq += 1
        self.tasks[task_id] = ModelTask(task_id, self.seq, model, priority)

    def claim(self, now):
        pending = [task for task in self.tasks.values() if task.status == "pending"]
        for task in pending:
            if task.not_before is not None and task.not_before <= now:
                task.not_before = None
        ready = [t for t in pending if t.not_before is None and not self._waits(t, now)]
        if not ready:
            return None
        task = min(ready, key=lambda task: (-task.priority, task.seq))
        task.status, task.calls = "processing", task.calls + 1
        self.outcomes[task.id, task.calls] = None
        for hold in self._holds(task):
            hold.probe = task.id
        return task.id

    def is_under_way(self, claimed):
        task = self.tasks.get(claimed.id)
        return bool(task) and (task.status, task.calls) == ("processing", claimed.calls)

    def _waits(self, task, now):
        return self.pause or any(hold.probe or hold.until > now for hold in self._holds(task))

    def _holds(self, task):
        return [self.holds[key] for key in (task.model, ALL_MODELS) if key in self.holds]

    def finish(self, claimed, end, now):
        if self.outcomes.get((claimed.id, claimed.calls), "gone") is None:
            self.outcomes[claimed.id, claimed.calls] = end.outcome
        if not self.is_under_way(claimed):
            return False
        task = self.tasks[claimed.id]
        task.status, task.attempts = end.status, task.attempts + end.counted
        task.lost_images += end.has_lost_image
        task.not_before = end.not_before
        if end.status == "failed":
            task.error_code = end.outcome
        if end.status == "pending":
            task.last_error = end.error or task.last_error
            if task.is_canceling:
                self._fail(task, "canceled")
        if end.hold:
            self._hold(end.hold, task.id, now)
        for model, hold in list(self.holds.items()):
            if hold.probe == task.id:
                hold.probe = None
                if end.counted or (end.hold and end.hold.model != ALL_MODELS):
                    del self.holds[model]
        if end.pause_reason and not self.pause:
            self.pause = end.pause_reason
        return True

    def _hold(self, new, task_id, now):
        old = self.holds.get(new.model)
        if old is None:
            wait = new.step if new.wait is None else new.wait
            self.holds[new.model] = ModelHold(now + wait, new.step, new.room)
            return
        if old.probe == task_id:
            old.step, old.probe = min(2 * old.step, new.maximum), None
        old.until = max(old.until, now + (old.step if new.wait is None else new.wait))
        old.room = max(old.room, new.room)

    def _fail(self, task, code):
        task.status, task.error_code = "failed", code

    def cancel(self, task_id):
        task = self.tasks[task_id]
        if task.status == "pending":
            self._fail(task, "canceled")
        elif task.status == "processing":
            task.is_canceling = True

    def remove(self, task_id):
        if self.tasks[task_id].status == "processing":
            return False
        del self.tasks[task_id]
        self.outcomes = {key: value for key, value in self.outcomes.items() if key[0] != task_id}
        return True

    def begin(self):
        for hold in self.holds.values():
            hold.probe = None
        if self.pause != "by a person":
            self.pause = None
        for task in self.tasks.values():
            if task.status == "pending" and task.attempts >= MAX_ATTEMPTS:
                outcomes = (self.outcomes[task.id, n] for n in range(task.calls, 0, -1))
                self._fail(task, next(word for word in outcomes if word not in UNCOUNTED))

    def clamp_future_times(self, now):
        for task in self.tasks.values():
            if task.status == "pending" and task.not_before:
                task.not_before = min(task.not_before, now + MAX_BACKOFF)
        for model, hold in self.holds.items():
            if hold.room:
                hold.until = hold.until if hold.until <= now + MAX_BACKOFF else now
            elif model != ALL_MODELS:
                hold.until = min(hold.until, now + 3600)


def endings():
    """Draw any ending; `not_before` is from now, and a model's hold is of the task's own model."""
    hold = st.builds(
        NewHold,
        model=st.sampled_from(("m", ALL_MODELS)),
        reason=st.just("busy"),
        step=st.just(5.0),
        maximum=st.just(300.0),
        wait=st.sampled_from((None, 7.0, 4000.0)),
        room=st.sampled_from((0, 9)),
    )
    return st.one_of(
        st.just(Ending("completed", "completed", path=Path("p"), image=IMAGE)),
        st.sampled_from((None, "the token")).map(
            lambda reason: Ending("upstream_auth", "failed", error="no", pause_reason=reason)
        ),
        st.sampled_from((None, 5.0, 300.0)).map(
            lambda wait: Ending("upstream_error", "pending", error="e", not_before=wait)
        ),
        hold.map(lambda hold: Ending("unavailable", "pending", counted=False, hold=hold)),
        st.sampled_from(("pending", "failed")).map(
            lambda status: Ending("storage", status, counted=False, has_lost_image=True)
        ),
        st.sampled_from((SHUTDOWN, CANCELED)),
    )


class Verbs(RuleBasedStateMachine):
    """Say each verb to the database and to the model, and compare what both know then."""

    def __init__(self):
        super().__init__()
        # In memory, where there is a place: thousands of commits wait for no disk.
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.path = Path(self.folder.name) / "tasks.sqlite3"
        self.database = Database(self.path)
        self.model = Model()
        self.now = 1_790_000_000.0
        self.claimed = []

    def teardown(self):
        rows.check_words(self.path)
        self.database.close()
        self.folder.cleanup()

    def unfinished(self):
        live = ("pending", "processing")
        return sorted(t.id for t in self.model.tasks.values() if t.status in live)

    def under_way(self):
        return [task for task in self.claimed if self.model.is_under_way(task)]

    @initialize()
    def begin(self):
        for model in MODELS:
            self.add(model, 0)

    # Few tasks, so that what is done next often meets what was done before.
    @precondition(lambda self: len(self.unfinished()) < 4)
    @rule(model=st.sampled_from(MODELS), priority=st.integers(0, 1))
    def add(self, model, priority):
        task_id = f"t{self.model.seq + 1}"
        self.database.add([NewTask(task_id, "p", model, {}, priority)], self.now)
        self.model.add(task_id, model, priority)

    @rule(seconds=st.sampled_from((0.0, 0.0, 5.0, 400.0, 5000.0)), times=st.sampled_from((1, 3)))
    def wait_and_claim(self, seconds, times):
        self.now += seconds
        for _ in range(times):
            task = self.database.claim(self.now)
            assert (task and task.id) == self.model.claim(self.now)
            self.claimed += [task] if task else []

    @rule(data=st.data(), end=endings(), is_canceled=st.sampled_from((False, False, True)))
    def finish(self, data, end, is_canceled):
        if not self.unfinished():
            self.add("m", 0)
        if not self.under_way():
            self.wait_and_claim(0.0, 3)
        if not self.under_way():
            return  # All are held, or wait, or the queue is paused.
        task = data.draw(st.sampled_from(self.under_way()))
        if is_canceled:
            self.say_cancel(task.id)
        self.say_finish(task, end)

    @precondition(lambda self: len(self.claimed) > len(self.under_way()))
    @rule(data=st.data(), end=endings())
    def finish_late(self, data, end):
        ended = [task for task in self.claimed if not self.model.is_under_way(task)]
        self.say_finish(data.draw(st.sampled_from(ended[-3:])), end)

    def say_finish(self, task, end):
        if end.hold and end.hold.model != ALL_MODELS:
            end = replace(end, hold=replace(end.hold, model=task.model))
        if end.not_before:
            end = replace(end, not_before=self.now + end.not_before)
        assert self.database.finish(task, end, self.now) is self.model.finish(task, end, self.now)

    @precondition(unfinished)
    @rule(data=st.data())
    def cancel(self, data):
        self.say_cancel(data.draw(st.sampled_from(self.unfinished())))

    def say_cancel(self, task_id):
        self.database.cancel(task_id, self.now)
        self.model.cancel(task_id)

    @precondition(lambda self: self.model.tasks)
    @rule(data=st.data())
    def delete(self, data):
        task_id = data.draw(st.sampled_from(sorted(self.model.tasks)))
        limits_since = self.now + 1e6
        assert self.database.delete(task_id, limits_since) is self.model.remove(task_id)

    @precondition(lambda self: not self.model.pause)
    @rule(is_meant=st.sampled_from((False, False, True)))
    def pause(self, is_meant):
        if is_meant:
            self.database.pause()
            self.model.pause = "by a person"

    @precondition(lambda self: self.model.pause)
    @rule()
    def resume(self):
        self.database.resume()
        self.model.pause = None

    @rule(seconds=st.sampled_from((10.0, 5000.0)))
    def set_the_clock_back(self, seconds):
        self.now -= seconds
        self.database.clamp_future_times(self.now, MAX_BACKOFF)
        self.model.clamp_future_times(self.now)

    @rule(end=st.sampled_from((SHUTDOWN, Ending("interrupted", "pending", error="died"))))
    def crash_and_recover(self, end):
        self.database.close()
        self.database = Database(self.path)
        self.database.reset_run_state(MAX_ATTEMPTS, self.now)
        self.model.begin()
        orphans = self.database.orphans()
        assert {task.id for task in orphans} == {task.id for task in self.under_way()}
        for task in orphans:
            self.say_finish(task, end)

    @invariant()
    def both_know_the_same_tasks(self):
        for task in self.model.tasks.values():
            row = self.database.get(task.id)
            assert (
                *(row.status, row.attempts, row.calls, row.not_before, row.last_error),
                *(row.error_code, bool(row.canceling), row.model, row.priority, row.lost_images),
            ) == (
                *(task.status, task.attempts, task.calls, task.not_before, task.last_error),
                *(task.error_code, task.is_canceling, task.model, task.priority, task.lost_images),
            )
        statuses = [task.status for task in self.model.tasks.values()]
        queue = self.database.queue(self.now)
        assert queue.pending == statuses.count("pending")
        assert queue.processing == statuses.count("processing")

    @invariant()
    def both_know_the_same_holds(self):
        for model in (*MODELS, ALL_MODELS):
            found, hold = self.database.hold(model), self.model.holds.get(model)
            assert (found and (found.until, found.step, found.room, found.probe)) == (
                hold and (hold.until, hold.step, hold.room, hold.probe)
            )

    @invariant()
    def the_queue_is_paused_for_the_same_reason(self):
        queue = self.database.queue(self.now)
        assert queue.paused == bool(self.model.pause)
        assert queue.pause_reason == (
            None if self.model.pause == "by a person" else self.model.pause
        )

    @invariant()
    def every_call_ended_as_it_did_first(self):
        for task in self.model.tasks.values():
            outcomes = [self.model.outcomes[task.id, n + 1] for n in range(task.calls)]
            assert [call.outcome for call in self.database.calls(task.id)] == outcomes
            assert outcomes.count(None) == (task.status == "processing")


TestVerbs = Verbs.TestCase
TestVerbs.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
