"""`db.finish`: each way that a call can end, in each state that its task can be in meanwhile."""

from dataclasses import astuple
from pathlib import Path

import pytest

from records import ALL_MODELS, CANCELED, SHUTDOWN, Ending, Image, NewHold, NewTask

NOW = 1_790_000_000.0
IMAGE = Image("image/png", "png", 3, 1, 1, "0" * 64)
BUSY = NewHold("m", "busy", step=5, maximum=300)
QUOTA = NewHold(ALL_MODELS, "no quota", step=5, maximum=300, wait=3600)
NO_ROOM = NewHold(ALL_MODELS, "no room", step=5, maximum=300, room=9)

WAYS = {
    "completed": Ending("completed", "completed", path=Path("p"), image=IMAGE),
    "failed": Ending("upstream_rejected", "failed", error="no"),
    "failed and pauses": Ending("upstream_auth", "failed", error="401", pause_reason="token"),
    "canceled": CANCELED,
    "another attempt later": Ending("upstream_error", "pending", error="e", not_before=NOW + 60),
    "another attempt at once": Ending("interrupted", "pending", error="died"),
    "cut by a shutdown": SHUTDOWN,
    "no capacity": Ending("unavailable", "pending", counted=False, hold=BUSY),
    "no quota": Ending("quota", "pending", counted=False, hold=QUOTA),
    "no room": Ending("no_room", "pending", counted=False, hold=NO_ROOM),
}

# The task then: status, attempts, error_code, error, last_error, not_before; and the hold.
EXPECTED = {
    "completed": ("completed", 1, None, None, None, None, None),
    "failed": ("failed", 1, "upstream_rejected", "no", None, None, None),
    "failed and pauses": ("failed", 1, "upstream_auth", "401", None, None, None),
    "canceled": ("failed", 0, "canceled", "A client canceled the task", None, None, None),
    "another attempt later": ("pending", 1, None, None, "e", NOW + 60, None),
    "another attempt at once": ("pending", 1, None, None, "died", None, None),
    "cut by a shutdown": ("pending", 0, None, None, None, None, None),
    "no capacity": ("pending", 0, None, None, None, None, ("m", NOW + 5)),
    "no quota": ("pending", 0, None, None, None, None, (ALL_MODELS, NOW + 3600)),
    "no room": ("pending", 0, None, None, None, None, (ALL_MODELS, NOW + 5)),
}


def is_put_back_and_canceled(database, task):
    database.finish(task, SHUTDOWN, NOW)
    database.cancel(task.id, NOW)


def is_put_back_and_claimed_anew(database, task):
    database.finish(task, SHUTDOWN, NOW)
    assert database.claim(NOW).id == task.id


def has_failed_and_is_deleted(database, task):
    database.finish(task, WAYS["failed"], NOW)
    assert database.delete(task.id, 0)


NO_LONGER_IN_THE_CALL = {
    "completed": lambda database, task: database.finish(task, WAYS["completed"], NOW),
    "failed": lambda database, task: database.finish(task, WAYS["failed"], NOW),
    "put back": lambda database, task: database.finish(task, SHUTDOWN, NOW),
    "to be tried later": lambda d, task: d.finish(task, WAYS["another attempt later"], NOW),
    "put back and canceled": is_put_back_and_canceled,
    "put back and claimed anew": is_put_back_and_claimed_anew,
    "failed and deleted": has_failed_and_is_deleted,
}


@pytest.fixture
def task(database):
    """Return a claimed task, the only one."""
    database.add([NewTask("t", "p", "m", {})], NOW)
    return database.claim(NOW)


def facts(database):
    """Return what an ending may change, but for the rows of calls."""
    task = database.get("t")
    queue = database.queue(NOW)
    return task, queue, [database.hold(model) for model in ("m", ALL_MODELS)]


def outcomes(database):
    return [call.outcome for call in database.calls("t")]


@pytest.mark.parametrize("way", WAYS)
def test_a_call_ends_its_task_in_this_way(database, task, way):
    assert database.finish(task, WAYS[way], NOW + 1) is True
    then, queue, holds = facts(database)
    (hold,) = [hold for hold in holds if hold] or [None]
    assert EXPECTED[way] == (
        *(then.status, then.attempts, then.error_code, then.error, then.last_error),
        *(then.not_before, hold and (hold.model, hold.until - 1)),
    )
    assert (queue.paused, queue.pause_reason) == (
        (True, "token") if way == "failed and pauses" else (False, None)
    )
    assert (then.finished_at is None) == (then.status == "pending")
    assert (then.sha256, then.file_path) == (
        (IMAGE.sha256, "p") if way == "completed" else (None, None)
    )
    assert outcomes(database) == [WAYS[way].outcome]


@pytest.mark.parametrize("way", WAYS)
def test_a_task_that_is_being_canceled_has_no_next_attempt(database, task, way):
    database.cancel("t", NOW)
    assert database.finish(task, WAYS[way], NOW + 1) is True
    then = database.get("t")
    status, attempts, *_ = EXPECTED[way]
    if status == "pending":
        assert (then.status, then.error_code, then.attempts) == ("failed", "canceled", attempts)
        assert then.finished_at
    else:
        assert (then.status, then.attempts, then.error_code) == EXPECTED[way][:3]
    assert outcomes(database) == [WAYS[way].outcome]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", NO_LONGER_IN_THE_CALL)
def test_a_late_end_changes_nothing_newer(database, task, way, state):
    NO_LONGER_IN_THE_CALL[state](database, task)
    before, calls = facts(database), outcomes(database)
    assert database.finish(task, WAYS[way], NOW + 1) is False
    assert facts(database) == before
    assert outcomes(database) == calls, "the first end of a call is the one that it keeps"


@pytest.mark.parametrize("way", WAYS)
def test_the_totals_count_a_call_whose_task_went_on_without_it(database, task, way):
    database.finish(task, SHUTDOWN, NOW)
    before = database.stats()
    late = Ending(**{**vars(WAYS[way]), "seconds": 2.0})
    database.finish(task, late, NOW + 1)
    after = database.stats()
    assert after.upstream_seconds == before.upstream_seconds + 2
    assert after.image_bytes == before.image_bytes
    assert astuple(after)[:2] == astuple(before)[:2]
