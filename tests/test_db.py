"""The tables: what is claimed next, who may end it, and what outlives what."""

import fcntl
import multiprocessing
import sqlite3
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import rows
from conftest import wait_until

import db
from db import Database, DatabaseError
from records import (
    ALL_MODELS,
    SHUTDOWN,
    Ending,
    IdempotencyKey,
    Image,
    Limits,
    NewHold,
    NewTask,
    QueueFull,
    Reply,
)

NOW = 1_790_000_000.0
PICTURE = Image("image/png", "png", 3, 1, 1, "0" * 64)
COMPLETED = Ending("completed", "completed", path=Path("p"), image=PICTURE)
FAILED = Ending("storage", "failed", error="e")


def add(database, *names, model="m", priority=0, now=NOW):
    database.add(
        [NewTask(name, f"prompt {name}", model, {"width": 512}, priority) for name in names], now
    )


def claimed(database, now=NOW):
    """Claim all that can be claimed, and return the names in order."""
    names = []
    while task := database.claim(now):
        names.append(task.id)
    return names


def hold(model="m", **values):
    return NewHold(model, **{"reason": "busy", "step": 5, "maximum": 300, **values})


def held(model="m", **values):
    """Return the ending of a call that found no capacity."""
    return Ending("unavailable", "pending", counted=False, hold=hold(model, **values))


def retry(error="e", not_before=None):
    """Return the ending of a call that another may follow."""
    return Ending("upstream_error", "pending", error=error, not_before=not_before)


def test_a_new_task_is_pending(database):
    add(database, "a", priority=7)
    task = database.get("a")
    assert (task.status, task.prompt, task.priority) == ("pending", "prompt a", 7)
    assert task.params == {"width": 512}
    assert (task.attempts, task.error, task.file_path, task.finished_at) == (0, None, None, None)
    assert task.created_at == task.updated_at == "2026-09-21 14:13:20"


def test_an_unknown_task_is_none(database):
    assert database.get("nobody") is None


def test_first_in_first_out_within_a_priority(database):
    add(database, "a", "b")
    add(database, "urgent", "urgent too", priority=1)
    add(database, "later", priority=-1)
    add(database, "c", model="another")
    assert claimed(database) == ["urgent", "urgent too", "a", "b", "c", "later"]


def test_a_claim_is_for_one(database):
    add(database, "a")
    task = database.claim(NOW)
    assert (task.status, task.calls, task.attempts) == ("processing", 1, 0)
    assert database.claim(NOW) is None


def test_a_task_that_waits_for_its_next_attempt_blocks_no_other(database):
    add(database, "a", "b")
    database.finish(database.claim(NOW), retry("failed", NOW + 60), NOW)
    assert claimed(database, NOW + 59) == ["b"]
    assert database.next_due(NOW + 59) == NOW + 60
    assert database.next_due(NOW + 60) is None
    task = database.claim(NOW + 60)
    assert (task.id, task.calls, task.attempts, task.last_error) == ("a", 2, 1, "failed")


def test_completed_tells_the_picture(database, tmp_path):
    add(database, "a")
    task = database.claim(NOW)
    path = tmp_path / "a.png"
    assert database.finish(task, replace(COMPLETED, path=path), NOW + 2)
    task = database.get("a")
    assert (task.status, task.attempts, task.file_path) == ("completed", 1, str(path))
    assert (task.content_type, task.bytes, task.sha256) == ("image/png", 3, "0" * 64)
    assert task.finished_at == "2026-09-21 14:13:22"


def test_failed_tells_why(database):
    add(database, "a")
    assert database.finish(database.claim(NOW), replace(FAILED, error="no folder"), NOW)
    task = database.get("a")
    assert (task.status, task.error_code, task.error) == ("failed", "storage", "no folder")


def test_a_call_keeps_what_chutes_said(database):
    add(database, "a")
    end = replace(FAILED, seconds=0.5, reply=Reply(400, "inv-1", (300, 7, 293)))
    database.finish(database.claim(NOW), end, NOW)
    assert database.queue(NOW).quota == (300, 7, 293)
    assert rows.read(database.path, "SELECT seconds, http_status, invocation_id FROM calls") == [
        (0.5, 400, "inv-1")
    ]


def test_a_held_model_waits_and_others_go_on(database):
    add(database, "a", "b")
    add(database, "x", model="other")
    database.finish(database.claim(NOW), held(), NOW)
    assert claimed(database, NOW + 4.9) == ["x"]
    assert database.get("a").attempts == 0
    assert database.hold("m").until == NOW + 5


def test_one_probe_tries_when_the_hold_ends(database):
    add(database, "a", "b")
    database.finish(database.claim(NOW), held(), NOW)
    assert claimed(database, NOW + 5) == ["a"]
    assert database.hold("m").probe == "a"


def test_a_probe_that_gets_through_lifts_the_hold(database):
    add(database, "a", "b", "c")
    database.finish(database.claim(NOW), held(), NOW)
    database.finish(database.claim(NOW + 5), COMPLETED, NOW + 6)
    assert database.hold("m") is None
    assert claimed(database, NOW + 6) == ["b", "c"]


@pytest.mark.parametrize("end", [FAILED, retry()])
def test_a_probe_that_fails_by_its_own_fault_lifts_the_hold(database, end):
    add(database, "a", "b")
    database.finish(database.claim(NOW), held(), NOW)
    database.finish(database.claim(NOW + 5), end, NOW)
    assert database.hold("m") is None


def test_each_probe_that_fails_doubles_the_hold(database):
    add(database, "a")
    now, steps = NOW, []
    for _ in range(9):
        database.finish(database.claim(now), held(), now)
        steps.append(database.hold("m").until - now)
        now = database.hold("m").until
    assert steps == [5, 10, 20, 40, 80, 160, 300, 300, 300]


def test_calls_that_were_under_way_together_do_not_double_it(database):
    add(database, "a", "b", "c")
    tasks = [database.claim(NOW) for _ in range(3)]
    for task in tasks:
        database.finish(task, held(), NOW + 1)
    assert database.hold("m").until == NOW + 6


def test_a_task_put_back_keeps_its_last_error(database):
    add(database, "a")
    database.finish(database.claim(NOW), retry("it broke", None), NOW)
    database.finish(database.claim(NOW), held(), NOW)
    assert database.get("a").last_error == "it broke"


def test_a_named_wait_is_kept_to(database):
    add(database, "a")
    database.finish(database.claim(NOW), held(wait=100), NOW)
    assert database.hold("m").until == NOW + 100
    database.finish(database.claim(NOW + 100), held(wait=1), NOW + 100)
    assert database.hold("m").until == NOW + 101


def test_a_probe_that_is_cut_leaves_the_hold_to_the_next(database):
    add(database, "a")
    database.finish(database.claim(NOW), held(), NOW)
    database.finish(database.claim(NOW + 5), SHUTDOWN, NOW + 6)
    assert database.hold("m").probe is None
    assert claimed(database, NOW + 6) == ["a"]


def test_a_hold_of_all_models_stops_all(database):
    add(database, "a")
    add(database, "x", model="other")
    database.finish(database.claim(NOW), held(ALL_MODELS, wait=3600), NOW)
    assert claimed(database, NOW + 3599) == []
    assert claimed(database, NOW + 3600) == ["a"]


def test_a_probe_of_both_holds_lifts_the_one_it_got_past(database):
    add(database, "a", "b")
    first, second = database.claim(NOW), database.claim(NOW)
    database.finish(first, held(), NOW)
    database.finish(second, held(ALL_MODELS), NOW)
    database.finish(database.claim(NOW + 5), held(), NOW + 5)
    assert database.hold(ALL_MODELS) is None
    assert (database.hold("m").until, database.hold("m").probe) == (NOW + 15, None)


def test_holds_outlive_a_restart_but_probes_do_not(database):
    add(database, "a")
    database.finish(database.claim(NOW), held(), NOW)
    probe = database.claim(NOW + 5)
    database.reset_run_state(3, NOW)
    assert database.hold("m").probe is None
    assert [task.id for task in database.orphans()] == [probe.id]


def test_a_pause_of_its_own_stops_the_queue_until_it_begins_anew(database):
    add(database, "a", "b")
    database.finish(database.claim(NOW), replace(FAILED, pause_reason="401"), NOW)
    assert claimed(database) == []
    queue_view = database.queue_view(database.get("b"), None, NOW)
    assert (queue_view.paused, queue_view.pause_reason) == (True, "401")
    database.reset_run_state(3, NOW)
    assert claimed(database) == ["b"]


def test_calls_of_a_deleted_task_still_count_for_the_limits(database):
    add(database, "a", "b")
    for now in (NOW - 100, NOW):
        task = database.claim(now)
        database.finish(task, FAILED, now)
        assert database.delete(task.id, NOW - 50)
    assert rows.read(database.path, "SELECT task FROM calls") == [("b",)]
    assert database.queue(NOW - NOW % 86400 + 1).calls_today == 1


def test_calls_of_deleted_tasks_are_purged_in_steps_and_no_others(database):
    add(database, *"abcd")
    for name in "abcd":
        database.finish(database.claim(NOW), FAILED, NOW)
        if name in "ac":
            database.delete(name, 0)
    last, looks = (0.0, "", 0), 0
    while last := database.purge_calls(last, NOW + 1, limit=1):
        looks += 1
    assert looks == 4
    assert rows.read(database.path, "SELECT task FROM calls ORDER BY task") == [("b",), ("d",)]
    assert database.purge_calls((0.0, "", 0), NOW) is None, "what a limit may need is not looked at"


def test_calls_are_purged_by_an_index(opened):
    database, connections = opened
    with rows.traced(connections) as statements:
        database.purge_calls((0.0, "", 0), NOW)
    steps = [step for sql in statements if "calls" in sql for step in plan(database, sql)]
    assert steps and all(step.startswith(("SEARCH", "CORRELATED")) for step in steps)


def start_after(database, count, seconds, now):
    """Return when the rate limit allows the next start."""
    task = NewTask("view", "p", "m", {})
    if database.get("view") is None:
        database.add([task], now)
    return database.queue_view(database.get("view"), (count, seconds), now).next_start


def test_the_rate_limit_slides_over_the_calls_that_were_started(database):
    add(database, "a", "b", "c")
    assert start_after(database, 2, 60, NOW) is None
    database.claim(NOW)
    assert start_after(database, 2, 60, NOW + 1) is None
    database.claim(NOW + 10)
    assert start_after(database, 2, 60, NOW + 11) == NOW + 60
    assert start_after(database, 2, 60, NOW + 60) is None
    database.claim(NOW + 60)
    assert start_after(database, 2, 60, NOW + 61) == NOW + 70


def test_nothing_is_claimed_past_the_limits_of_the_rate_and_of_the_day(database):
    add(database, "a", "b", "c")
    assert database.claim(NOW, (1, 60), 2).id == "a"
    assert database.claim(NOW + 59, (1, 60), 2) is None
    assert database.next_due(NOW + 59, (1, 60)) == NOW + 60
    assert database.claim(NOW + 60, (1, 60), 2).id == "b"
    assert database.claim(NOW + 120, (1, 60), 2) is None
    tomorrow = NOW - NOW % 86400 + 86400
    assert database.claim(tomorrow, (1, 60), 2).id == "c"


def test_as_many_are_claimed_together_as_there_are_places(database):
    add(database, "a", "b", "c")
    tasks = database.claim_some(2, NOW, Limits())
    assert [(task.id, task.status, task.calls) for task in tasks] == [
        ("a", "processing", 1),
        ("b", "processing", 1),
    ]
    assert [len(database.calls(name)) for name in "abc"] == [1, 1, 0]


def test_those_that_are_claimed_together_keep_to_the_limits(database):
    add(database, "a", "b", "c")
    add(database, "x", model="other")
    limits = Limits(at_once={"m": 2})
    assert [task.id for task in database.claim_some(9, NOW, limits)] == ["a", "b", "x"]
    add(database, "y", "z", model="other")
    assert database.claim_some(9, NOW, Limits(rate=(4, 60))) == [database.get("c")]


def test_the_end_of_a_call_makes_room_for_the_next(database):
    add(database, "a", "b")
    limits = Limits(at_once={"m": 1})
    (task,) = database.claim_some(9, NOW, limits)
    is_ours, following = database.finish_and_claim(task, COMPLETED, NOW, limits)
    assert (is_ours, following) == (True, database.get("b"))
    assert database.finish_and_claim(task, COMPLETED, NOW, limits) == (False, None)


@pytest.mark.parametrize("end", [held(), replace(FAILED, pause_reason="401")])
def test_what_a_call_ends_with_holds_the_next_one_too(database, end):
    add(database, "a", "b")
    task = database.claim(NOW)
    assert database.finish_and_claim(task, end, NOW, Limits()) == (True, None)


def test_the_next_thing_that_is_due_is_the_earliest(database):
    add(database, "a", "b", "c")
    assert database.next_due(NOW) is None
    database.finish(database.claim(NOW), retry("e", NOW + 60), NOW)
    assert database.next_due(NOW) == NOW + 60
    database.finish(database.claim(NOW), held(), NOW)
    assert database.next_due(NOW) == NOW + 5
    assert database.next_due(NOW, (1, 2)) == NOW + 2
    assert database.next_due(NOW + 70) is None


def test_a_clock_set_back_stops_nothing_for_long(database):
    add(database, "a", "b", "c")
    first = database.claim(NOW)
    database.finish(first, retry("e", NOW + 5), NOW)
    database.finish(database.claim(NOW), held(wait=60), NOW)
    past = NOW - 86400
    database.clamp_future_times(past, 300)
    assert start_after(database, 1, 60, past + 59) == past + 60
    assert start_after(database, 1, 60, past + 60) is None
    assert database.get("a").not_before == past + 300
    assert database.hold("m").until == past + 3600


def test_a_hold_for_want_of_room_is_due_when_the_clock_goes_back(database):
    add(database, "a")
    database.finish(database.claim(NOW), held(ALL_MODELS, room=9), NOW)
    database.clamp_future_times(NOW - 86400, 300)
    assert database.hold(ALL_MODELS).until <= NOW - 86400 + 300


def test_a_quota_is_held_until_its_reset_whatever_the_clock_does(database):
    add(database, "a")
    database.finish(database.claim(NOW), held(ALL_MODELS, wait=80000), NOW)
    database.clamp_future_times(NOW - 86400, 300)
    assert database.hold(ALL_MODELS).until == NOW + 80000


def test_attempts_that_are_no_longer_allowed_are_not_made(database):
    add(database, "a", "b")
    for _ in range(2):
        task = database.claim(NOW + 100)
        database.finish(task, Ending("upstream_timeout", "pending", error="too slow"), NOW)
        assert task.id == "a"
    database.finish(database.claim(NOW + 100), SHUTDOWN, NOW)
    database.reset_run_state(2, NOW)
    task = database.get("a")
    assert (task.status, task.error_code, task.error) == ("failed", "upstream_timeout", "too slow")
    assert database.get("b").status == "pending"


def test_what_waited_too_long_expires_in_steps(database):
    add(database, "a", "b", "c", now=NOW - 100)
    add(database, "fresh")
    assert database.expire(NOW - 50, "too late", NOW, limit=2) == 2
    assert database.expire(NOW - 50, "too late", NOW, limit=2) == 1
    assert database.expire(NOW - 50, "too late", NOW, limit=2) == 0
    states = [(database.get(name).status, database.get(name).error_code) for name in "abc"]
    assert states == [("failed", "expired")] * 3
    assert database.get("fresh").status == "pending"


def test_the_place_in_the_line(database):
    add(database, "a", "b")
    add(database, "urgent", priority=5)
    places = {name: database.queue_view(database.get(name), None, NOW).ahead for name in "ab"}
    assert places == {"a": 1, "b": 2}
    assert database.queue_view(database.get("urgent"), None, NOW).ahead == 0
    database.claim(NOW)
    assert database.queue_view(database.get("a"), None, NOW).ahead == 0


def fill(database, count, models=3):
    tasks = (rows.task(f"t{n}", model=f"m{n % models}") for n in range(count))
    rows.insert(database.path, "tasks", tasks)


def test_the_place_is_exact_to_1000_and_no_further(database):
    fill(database, 1100)
    assert database.queue_view(database.get("t999"), None, NOW).ahead == 999
    assert database.queue_view(database.get("t1000"), None, NOW).ahead == 1000
    assert database.queue_view(database.get("t1001"), None, NOW).ahead == 1001
    assert database.queue_view(database.get("t1099"), None, NOW).ahead == 1001


def plan(database, sql):
    return [line[3] for line in rows.read(database.path, f"EXPLAIN QUERY PLAN {sql}")]


def test_the_next_task_is_found_by_steps_in_an_index(opened):
    database, connections = opened
    fill(database, 100)
    with rows.traced(connections) as statements:
        assert database.claim(NOW)
    sql = next(sql for sql in statements if "ready (model)" in sql)
    steps = plan(database, sql)
    on_tasks = [step for step in steps if " tasks" in step or " first" in step]
    assert len(on_tasks) >= 4
    assert all(step.startswith("SEARCH") for step in on_tasks)


LISTS = {
    "all": {},
    "by status": {"status": "pending"},
    "by model": {"model": "m1"},
    "by both": {"status": "pending", "model": "m1"},
    "a later page": {"status": "pending", "model": "m1", "before": 20},
    "by error_code": {"error_code": "expired"},
    "by words": {"words": "p"},
    "by all": {"status": "failed", "model": "m1", "error_code": "expired", "words": "p"},
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_served_by_an_index(opened, name):
    database, connections = opened
    fill(database, 100)
    with rows.traced(connections) as statements:
        wanted = {"status": None, "model": None, "before": None, **LISTS[name]}
        assert bool(database.list_tasks(**wanted, limit=50)) == ("error_code" not in wanted)
    (sql,) = [statement for statement in statements if "FROM tasks" in statement]
    steps = plan(database, sql)
    assert all(step.startswith("SEARCH tasks USING") for step in steps if " tasks" in step)
    # What is wanted is read in the order of the indexes, and no further than to the limit.
    assert not [step for step in steps if "TEMP B-TREE" in step]
    assert ("SCAN prompts VIRTUAL TABLE" in str(steps)) == ("words" in LISTS[name])


LINES = {
    "all": (None, None, 50),
    "by model": ("m1", None, 50),
    "a later page": (None, (0, 20), 50),
    "both": ("m1", (0, 20), 50),
}


@pytest.mark.parametrize("name", LINES)
def test_the_line_is_listed_by_an_index(opened, name):
    database, connections = opened
    fill(database, 100)
    with rows.traced(connections) as statements:
        assert database.list_queue(*LINES[name])
    (sql,) = [statement for statement in statements if "FROM tasks" in statement]
    steps = plan(database, sql)
    assert "INDEX tasks_line" in steps[0]
    assert all("INDEX" in step for step in steps if " tasks" in step)
    assert not [step for step in steps if "TEMP B-TREE" in step]


@pytest.mark.parametrize("model", [None, "m1"])
def test_what_is_canceled_is_found_by_an_index(opened, model):
    database, connections = opened
    fill(database, 100)
    with rows.traced(connections) as statements:
        assert database.cancel_pending(model, 50, NOW)
    (sql,) = {statement for statement in statements if statement.startswith("UPDATE tasks")}
    steps = plan(database, sql)
    assert all(step.startswith("SEARCH tasks USING") for step in steps if " tasks" in step)
    assert not [step for step in steps if "TEMP B-TREE" in step]


def test_place_and_status_are_served_by_an_index(opened):
    database, connections = opened
    fill(database, 100)
    with rows.traced(connections) as statements:
        database.queue_view(database.get("t50"), (60, 60), NOW)
    on_tasks = [sql for sql in statements if "FROM tasks" in sql]
    steps = [step for sql in on_tasks for step in plan(database, sql) if "tasks" in step]
    assert len(steps) >= 2
    assert all(step.startswith(("SEARCH tasks USING", "SCAN tasks USING")) for step in steps)
    # Of those under way there are at most CONCURRENCY, and of the line POSITIONS are read.
    scans = {step.rpartition(" ")[2] for step in steps if step.startswith("SCAN")}
    assert scans <= {"tasks_processing", "tasks_line"}


def test_a_page_of_waiting_tasks_costs_no_more_statements_than_one(opened):
    database, connections = opened
    fill(database, 200)
    numbers = []
    for count in (1, 200):
        tasks = database.list_tasks("pending", None, None, count)
        with rows.traced(connections) as statements:
            assert len(database.queue_views(tasks, (60, 60), NOW, 9)) == count
        numbers.append(len([sql for sql in statements if " holds " not in sql]))
    assert numbers[0] == numbers[1] < 10


def test_each_task_of_a_page_has_its_own_place_and_its_own_holds(database):
    add(database, "a", "b", "c")
    add(database, "x", model="other")
    add(database, "urgent", priority=1)
    database.claim(NOW)
    database.finish(database.claim(NOW), held(), NOW)
    tasks = [database.get(name) for name in ("x", "c", "a")]
    assert [
        (queue_view.ahead, [one.model for one in queue_view.holds])
        for queue_view in database.queue_views(tasks, None, NOW)
    ] == [(3, []), (2, ["m"]), (0, ["m"])]


def test_what_is_no_longer_pending_has_the_place_that_it_had(database):
    add(database, "a", "b", "c")
    task = database.get("b")
    database.cancel("b", NOW)
    assert database.queue_view(task, None, NOW).ahead == 1


def test_the_days_calls_are_counted_by_an_index(opened):
    database, connections = opened
    with rows.traced(connections) as statements:
        database.queue(NOW)
    (sql,) = [sql for sql in statements if "FROM calls" in sql]
    assert any("COVERING INDEX calls_sent (started>?)" in step for step in plan(database, sql))


# The file that the path names


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
@pytest.mark.parametrize("is_replaced", [False, True])
def test_nothing_is_written_to_a_file_that_the_next_start_will_not_find(
    database, suffix, is_replaced
):
    add(database, "a")
    file = Path(f"{database.path}{suffix}")
    aside = file.rename(f"{file}.aside")
    if is_replaced:
        file.write_bytes(aside.read_bytes())
    with pytest.raises(DatabaseError, match="was deleted or replaced under the server") as caught:
        add(database, "b")
    assert str(database.path) in str(caught.value) and caught.value.is_final
    for write in (lambda: database.claim(NOW), database.check_writable, database.pause):
        with pytest.raises(DatabaseError, match="was deleted or replaced"):
            write()
    aside.rename(file)
    with pytest.raises(DatabaseError, match="was deleted or replaced"):
        add(database, "b")
    assert database.get("a") and not database.get("b")


def test_a_file_that_cannot_be_looked_at_is_refused_only_as_long(database, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.stat", lambda path: raising(OSError(5, "Input/output error")))
        with pytest.raises(DatabaseError, match="cannot be found: Input/output error"):
            add(database, "a")
    add(database, "a")


def raising(error):
    raise error


def test_what_a_statement_finds_damaged_is_not_written_any_more(tmp_path):
    path = tmp_path / "tasks.sqlite3"
    database = Database(path)
    fill(database, 2000)
    database.close()
    rows.damage(path)
    database = Database(path)
    database.pause()
    database.check_writable()
    for work in (
        lambda: database.list_tasks(None, None, None, 2000),
        lambda: add(database, "a"),
        database.check_writable,
        database.pause,
    ):
        with pytest.raises(DatabaseError) as caught:
            work()
        assert caught.value.is_final
        assert "is damaged (database disk image is malformed)" in str(caught.value)
    database.close()


def test_another_database_is_written_all_the_same(tmp_path):
    paths = [tmp_path / name for name in ("a", "b")]
    first, second = map(Database, paths)
    paths[0].rename(tmp_path / "aside")
    with pytest.raises(DatabaseError):
        add(first, "a")
    add(second, "a")
    first.close()
    second.close()


def test_what_one_process_has_found_holds_for_all_that_are_forked_from_the_same(tmp_path):
    path = tmp_path / "tasks.sqlite3"
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert "was deleted or replaced" in pool.submit(write_anew, path).result(60)
    database = Database(path)
    with pytest.raises(DatabaseError, match="was deleted or replaced"):
        add(database, "a")
    database.close()


def write_anew(path):
    """Open a database in a process of its own, delete it, and return what a write says."""
    database = Database(path)
    path.unlink()
    try:
        database.pause()
    except DatabaseError as error:
        return str(error)
    finally:
        database.close()


def test_any_number_of_canceled_tasks_costs_a_retry_of_all_nothing(tmp_path):
    steps = []
    for count in (30, 30_000):
        database, connections = rows.open_watched(tmp_path / f"{count}.sqlite3")
        kind = {"status": "failed", "error_code": "canceled"}
        rows.insert(database.path, "tasks", (rows.task(f"t{n}", **kind) for n in range(count)))
        retry_all = lambda: database.retry_failed(None, 10**6, (), str, NOW)  # noqa: B023, E731
        steps.append(rows.steps_taken(connections, retry_all))
        database.close()
    assert steps[1] <= steps[0] + 10


@pytest.fixture
def opened(tmp_path):
    """Return a database, and its connections to SQLite."""
    database, connections = rows.open_watched(tmp_path / "tasks.sqlite3")
    yield database, connections
    database.close()


@pytest.mark.parametrize("is_held", [False, True])
def test_a_long_backlog_costs_no_more_than_a_short_one(tmp_path, is_held):
    steps = []
    for count in (30, 30_000):
        database, connections = rows.open_watched(tmp_path / f"{count}.sqlite3")
        fill(database, count)
        if is_held:
            for _ in range(3):
                task = database.claim(NOW)
                database.finish(task, held(task.model), NOW)
        steps.append(rows.steps_taken(connections, lambda: database.claim(NOW)))  # noqa: B023
        steps.append(rows.steps_taken(connections, lambda: database.next_due(NOW)))  # noqa: B023
        database.close()
    assert steps[2] <= steps[0] + 10
    assert steps[3] <= steps[1] + 10


def test_commits_reach_the_disk(opened):
    for connection in opened[1]:
        assert connection.execute("PRAGMA synchronous").fetchall() == [(2,)]
        assert connection.execute("PRAGMA journal_mode").fetchall() == [("wal",)]


def test_the_seven_columns_of_the_original_are_there(database):
    names = [row[1] for row in rows.read(database.path, "PRAGMA table_info(tasks)")]
    for name in ("id", "prompt", "status", "file_path", "error", "created_at", "updated_at"):
        assert name in names


def test_a_database_of_others_is_left_alone(tmp_path):
    path = tmp_path / "other.sqlite3"
    connection = sqlite3.connect(path)
    connection.executescript("CREATE TABLE tasks (id)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match="another program"):
        Database(path)
    assert [(file, file.read_bytes()) for file in tmp_path.iterdir()] == [(path, before)]


def test_a_table_of_others_that_comes_later_is_in_nobodys_way(tmp_path):
    Database(tmp_path / "tasks.sqlite3").close()
    database = Database(tmp_path / "tasks.sqlite3")
    rows.write(database.path, "CREATE TABLE another_programs (x)")
    add(database, "a")
    rows.write(database.path, "VACUUM")
    assert [task.id for task in database.list_tasks(None, None, None, 9, words="a")] == ["a"]
    database.close()


def test_a_file_that_is_no_database_is_named_as_such(tmp_path):
    path = tmp_path / "other.sqlite3"
    path.write_text("not a database at all, but long enough to look like one" * 100)
    with pytest.raises(DatabaseError, match="not a database"):
        Database(path)


def test_a_write_that_fails_changes_nothing(database):
    add(database, "a")
    with pytest.raises(DatabaseError):
        add(database, "a")
    assert claimed(database) == ["a"]


def test_a_full_disk_is_told_apart(opened):
    database, connections = opened
    for connection in connections:
        connection.execute("PRAGMA max_page_count = 1").fetchall()
    with pytest.raises(DatabaseError) as error:
        for n in range(1000):
            database.add([NewTask(f"t{n}", "p" * 5000, "m", {})], NOW)
    assert error.value.full


def claim_and_add(path, results):
    database = Database(path)
    names = []
    for n in range(50):
        task = database.claim(NOW)
        names.append(task.id)
        database.finish(task, COMPLETED, NOW)
        database.add([NewTask(f"{task.id}-{n}", "p", "m", {})], NOW)
    results.put(names)
    database.close()


def test_processes_never_claim_the_same_task(database):
    fill(database, 300, models=1)
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    processes = [
        spawn.Process(target=claim_and_add, args=(database.path, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    names = [name for _ in processes for name in results.get(timeout=60)]
    for process in processes:
        process.join()
    assert len(names) == len(set(names)) == 200
    assert rows.read(
        database.path, "SELECT status, count(*) FROM tasks GROUP BY status ORDER BY 1"
    ) == [
        ("completed", 200),
        ("pending", 300),
    ]
    assert rows.read(database.path, "PRAGMA integrity_check") == [("ok",)]


def test_a_write_waits_for_the_lock_that_all_processes_share(database):
    with open(f"{database.path}.lock", "rb+") as lock:  # noqa: PTH123
        fcntl.flock(lock, fcntl.LOCK_EX)
        writer = threading.Thread(target=add, args=(database, "a"))
        writer.start()
        writer.join(0.2)
        assert writer.is_alive() and database.get("a") is None
        fcntl.flock(lock, fcntl.LOCK_UN)
        writer.join(10)
    assert database.get("a")


def add_together(database, adders):
    """Let the adders come while another process writes, so that all wait, and have them go."""
    with open(f"{database.path}.lock", "rb+") as lock:  # noqa: PTH123
        fcntl.flock(lock, fcntl.LOCK_EX)
        threads = [threading.Thread(target=adder) for adder in adders]
        for thread in threads:
            thread.start()
        wait_until(lambda: database._waiting == len(threads) - 1)
        fcntl.flock(lock, fcntl.LOCK_UN)
        for thread in threads:
            thread.join(10)


def test_writes_that_wait_together_share_a_commit(opened):
    database, connections = opened
    with rows.traced(connections) as statements:
        add_together(database, [lambda n=n: add(database, f"t{n}") for n in range(10)])
    assert statements.count("COMMIT") == 1
    assert len(claimed(database)) == 10


def test_a_write_that_fails_among_others_fails_alone(database):
    add(database, "there")
    failures = []

    def add_again():
        try:
            add(database, "new", "there")
        except DatabaseError as error:
            failures.append(str(error))

    others = [lambda n=n: add(database, f"t{n}") for n in range(5)]
    add_together(database, [*others[:3], add_again, *others[3:]])
    assert len(failures) == 1 and "UNIQUE" in failures[0]
    assert sorted(claimed(database)) == ["t0", "t1", "t2", "t3", "t4", "there"]
    assert database.check_counts()
    rows.check_words(database.path)


def test_a_commit_that_fails_is_everyones(opened):
    database, connections = opened
    rows.write(
        database.path,
        "CREATE TABLE other (task REFERENCES tasks (id) DEFERRABLE INITIALLY DEFERRED)",
    )
    rows.write(
        database.path,
        """CREATE TRIGGER bad AFTER INSERT ON tasks WHEN new.id = 'bad'
           BEGIN INSERT INTO other VALUES ('nobody'); END""",
    )
    for connection in connections:
        connection.execute("PRAGMA foreign_keys = ON")
    failures = []

    def add_one(name):
        try:
            add(database, name)
        except DatabaseError as error:
            failures.append(str(error))

    add_together(database, [lambda n=n: add_one(n) for n in ("a", "bad", "b", "c")])
    assert len(failures) == 4 and all("FOREIGN KEY" in failure for failure in failures)
    assert claimed(database) == []
    add(database, "later")
    assert claimed(database) == ["later"]


def test_what_is_read_together_is_as_it_was_at_one_instant(database, tmp_path):
    add(database, "first")
    with database.at_one_instant():
        before = database.queue(0.0).pending, len(database.list_queue(None, None, 9))
        other = Database(database.path)
        add(other, "second")
        assert other.queue(0.0).pending == 2
        other.close()
        after = database.queue(0.0).pending, len(database.list_queue(None, None, 9))
    assert (before, after) == ((1, 1), (1, 1))
    assert database.queue(0.0).pending == 2


def test_a_deletion_that_may_still_be_undone_removes_no_input(database):
    image = Image("image/png", "png", 1, 1, 1, "a" * 64)
    name, removed = f"{'a' * 64}.png", []
    database.add([NewTask("t", "p", "m", {}, inputs=(image,))], 0.0)
    delete, remove = (
        lambda: database.delete("t", 0.0),
        lambda: database.remove_inputs([name], removed.append),
    )
    # The deletion comes first, and shares its COMMIT with the removal.
    add_together(database, [delete, remove])
    assert (removed, database.unused_inputs()) == ([], [name])
    remove()
    assert (removed, database.unused_inputs()) == ([name], [])


def test_threads_add_without_waiting_on_each_other_for_ever(database):
    def work(first):
        for n in range(25):
            add(database, f"{first}-{n}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed(database)) == 200


def test_a_key_is_kept_for_a_day(database):
    def add(task, now):
        return database.add([NewTask(task, "p", "m", {})], now, None, IdempotencyKey("", "k", "f"))

    assert add("first", 1_790_000_000.0) == ["first"]
    assert add("second", 1_790_000_000.0 + 86399) == ["first"]
    assert add("third", 1_790_000_000.0 + 86400) == ["third"]
    assert add("fourth", 1_790_000_000.0 + 86401) == ["third"]


def test_any_number_of_keys_can_be_used_again_the_next_day(database):
    def add(name, now):
        key = IdempotencyKey("", name.partition("-")[0], "f")
        return database.add([NewTask(name, "p", "m", {})], now, None, key)

    for n in range(600):
        add(f"{n}-first", 1_790_000_000.0)
    assert add("599-again", 1_790_000_000.0 + 86401) == ["599-again"]
    assert add("599-once-more", 1_790_000_000.0 + 86402) == ["599-again"]
    assert rows.read(database.path, "SELECT count(*) FROM idempotency") == [(1,)]


def test_tasks_that_came_together_are_replayed_together(database):
    def add(*names):
        tasks = [NewTask(name, "p", "m", {}) for name in names]
        return database.add(tasks, 1_790_000_000.0, None, IdempotencyKey("", "k", "f"))

    assert add("a", "b", "c") == ["a", "b", "c"]
    assert add("d", "e", "f") == ["a", "b", "c"]
    assert database.get("d") is None


def test_tasks_that_come_together_are_stored_all_or_none(database):
    def add(*names):
        database.add([NewTask(name, "p", "m", {}) for name in names], 1_790_000_000.0, 3)

    add("a", "b")
    with pytest.raises(QueueFull):
        add("c", "d")
    assert database.get("c") is None
    add("e")
    assert database.get("e")


def test_a_check_really_writes(database):
    log = Path(f"{database.path}-wal")
    before = log.stat().st_size
    database.check_writable()
    assert log.stat().st_size > before
    assert database.pending_deletions() == []


def test_seconds_of_calls_add_up(database):
    for name in ("a", "b"):
        database.add([NewTask(name, "p", "m", {})], 1_790_000_000.0)
        task = database.claim(1_790_000_000.0)
        database.finish(task, Ending("storage", "failed", seconds=5.0), 1_790_000_005.0)
    assert database.stats().upstream_seconds == 10.0


def call(database, model, end, name="a"):
    add(database, name, model=model)
    task = database.claim(NOW)
    assert database.finish(task, end, NOW)
    assert not database.finish(task, end, NOW)
    return task


def test_a_call_is_counted_once_if_it_was_sent(database):
    unsent = replace(held("x"), hold=None, sent=False)
    call(database, "x", unsent)
    assert database.stats().calls == {}
    task = database.claim(NOW)
    database.finish(task, replace(unsent, sent=True, reply=Reply(429)), NOW)
    assert database.stats().calls == {"x": 1}
    task = database.claim(NOW)
    database.finish(task, COMPLETED, NOW)
    database.delete("a", 0)
    assert database.stats().calls == {"x": 2}


def test_calls_are_counted_by_so_many_models_and_by_others_together(database):
    for n in range(db.MAX_COUNTED_MODELS + 2):
        call(database, f"m{n}", FAILED, name=f"t{n}")
    call(database, "m7", FAILED, name="again")
    calls = database.stats().calls
    assert len(calls) == db.MAX_COUNTED_MODELS + 1
    assert (calls["m7"], calls["m99"], calls[db.OTHER_MODELS]) == (2, 1, 2)


def test_a_slow_call_is_in_no_bucket_below_it(database):
    database.add([NewTask("a", "p", "m", {})], 1_790_000_000.0)
    task = database.claim(1_790_000_000.0)
    database.finish(task, Ending("storage", "failed", seconds=5.0), 1_790_000_005.0)
    buckets = dict(database.stats().buckets)
    assert (buckets[2.5], buckets[5.0], buckets[10.0], buckets[float("inf")]) == (0, 1, 1, 1)
