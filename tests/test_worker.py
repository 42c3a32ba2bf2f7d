"""The queue in one process: what runs when, and how every attempt ends."""

import errno
import itertools
import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import rows
from conftest import Clock, hang_look_ups, wait_until
from queues import ever
from upstream import Answer, closed_port, image_bytes, raw_server, refusal

import images
import outputs
import worker as queue
from chutes import Chutes
from db import DatabaseError
from records import ALL_MODELS, Ending
from worker import backoff

# What runs


def test_no_more_than_concurrency_at_once_and_no_fewer(make, upstream):
    upstream.gate.clear()
    q = make(CONCURRENCY=3).start()
    ids = [q.add() for _ in range(9)]
    wait_until(lambda: upstream.at_once == 3)
    upstream.gate.set()
    for task_id in ids:
        q.until(task_id, status="completed")
    assert upstream.most_at_once == 3
    assert len(upstream.calls) == 9


def test_the_pool_never_holds_what_it_does_not_run(make, upstream):
    upstream.gate.clear()
    q = make(CONCURRENCY=2).start()
    for _ in range(50):
        q.add()
    wait_until(lambda: upstream.at_once == 2)
    assert not ever(lambda: len(q.db.orphans()) > 2)


def test_first_in_first_out(make, upstream):
    q = make(CONCURRENCY=1)
    ids = [q.add(f"p{n}") for n in range(10)]
    q.start()
    q.until(ids[-1], status="completed")
    assert upstream.prompts() == [f"p{n}" for n in range(10)]


def test_the_rate_limit_holds_over_a_restart(make, upstream):
    clock = Clock()
    q = make(clock, RATE_LIMIT="2/60").start()
    ids = [q.add() for _ in range(5)]
    for task_id in ids[:2]:
        q.until(task_id, status="completed")
    assert q.waits(ids[2]).startswith("the rate limit of 2 in 60 s; next start at ")
    q.worker.stop()
    again = make(clock, RATE_LIMIT="2/60").start()
    # A call may reach Chutes a little later after its claim than the one of before.
    clock.now += 60.1
    assert not ever(lambda: len(upstream.calls) > 2)
    clock.now += 0.9
    for task_id in ids[2:4]:
        again.until(task_id, status="completed")
    assert not ever(lambda: len(upstream.calls) > 4)


# How an attempt ends


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_what_is_told_of_an_image_holds_for_its_file(make, upstream, kind):
    upstream.decide = lambda fields: Answer(body=image_bytes(kind, (300, 200)) + b"behind the end")
    q = make().start()
    task = q.until(q.add(), status="completed")
    facts = (task.content_type, task.bytes, task.width, task.height, task.sha256)
    image = images.inspect(Path(task.file_path))
    expected = (image.content_type, image.bytes, image.width, image.height, image.sha256)
    assert facts == expected
    assert (task.bytes, task.width) == (len(image_bytes(kind, (300, 200))) + 14, 300)


def test_a_spoiled_image_is_tried_again_and_then_failed(make, upstream, tmp_path):
    upstream.decide = lambda fields: Answer(body=image_bytes("JPEG", (200, 200))[:-50])
    q = make(MAX_ATTEMPTS=2, RETRY_BACKOFF=7).start()
    task_id = q.add()
    task = q.until(task_id, attempts=1)
    assert (task.status, task.not_before) == ("pending", q.clock.now + 7)
    assert q.waits(task_id).startswith("attempt 2 of 2 at ")
    assert q.waits(task_id).endswith(", after: The image ended early or does not decode")
    q.clock.now += 7
    task = q.ended(task_id)
    assert (task.error_code, task.attempts) == ("upstream_truncated", 2)
    assert task.error == "The image ended early or does not decode (attempt 2 of 2)"
    assert q.files() == []
    assert len(upstream.calls) == 2


ATTEMPTS = {
    "upstream_error": lambda fields: refusal(500, "exhausted all available targets to no avail"),
    "not_an_image": lambda fields: Answer(body=b'{"images": []}'),
    "upstream_truncated": lambda fields: Answer(body=image_bytes()[:-9]),
}


@pytest.mark.parametrize("code", ATTEMPTS)
def test_a_fault_that_may_pass_is_tried_max_attempts_times(make, upstream, code):
    upstream.decide = ATTEMPTS[code]
    q = make(RETRY_BACKOFF=0.01, clock=None, MAX_ATTEMPTS=3)
    task_id = q.add()
    q.start()
    for attempts in (1, 2):
        q.until(task_id, attempts=attempts)
        q.clock.now += 1
    task = q.ended(task_id)
    assert (task.status, task.error_code, task.attempts) == ("failed", code, 3)
    assert len(upstream.calls) == 3
    assert q.outcomes() == [code] * 3


def test_the_backoff_has_jitter(make, upstream):
    upstream.decide = lambda fields: refusal(500, "no")
    q = make(RETRY_BACKOFF=8, jitter=0.5).start()
    assert q.until(q.add(), attempts=1).not_before == q.clock.now + 9


def test_the_second_attempt_may_succeed(make, upstream):
    answers = iter([refusal(500, "no"), Answer()])
    upstream.decide = lambda fields: next(answers)
    q = make().start()
    task_id = q.add()
    q.until(task_id, attempts=1)
    q.clock.now += 5
    task = q.until(task_id, status="completed")
    assert (task.attempts, task.error, task.error_code) == (2, None, None)


def test_a_timeout_counts_as_an_attempt(make, upstream):
    upstream.gate.clear()
    q = make(TASK_TIMEOUT=1, MAX_ATTEMPTS=1).start()
    task = q.ended(q.add())
    assert (task.error_code, task.attempts) == ("upstream_timeout", 1)
    assert task.error == "No whole image came within 1 seconds (attempt 1 of 1)"


def test_a_connection_broken_after_sending_counts_as_an_attempt(make):
    with raw_server(lambda connection: None) as url:
        q = make(CHUTES_API_URL=url, MAX_ATTEMPTS=1).start()
        assert q.ended(q.add()).error_code == "upstream_error"


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_refusal_for_good_fails_at_once_in_chutes_own_words(make, upstream, status):
    upstream.decide = lambda fields: refusal(status, "in its own words")
    q = make().start()
    task = q.ended(q.add())
    assert (task.error_code, task.attempts) == ("upstream_rejected", 1)
    assert task.error == f"Chutes refused the request ({status}): in its own words"
    assert len(upstream.calls) == 1


def test_too_large_an_image_is_not_tried_again(make, upstream):
    upstream.decide = lambda fields: Answer(body=image_bytes("PNG", (4097, 4096)))
    q = make().start()
    assert q.ended(q.add()).error_code == "image_too_large"
    upstream.decide = lambda fields: Answer(body=os.urandom(1024 * 1024 + 1))
    q.worker.stop()
    q = make(MAX_IMAGE_MB=1).start()
    assert q.ended(q.add()).error_code == "image_too_large"
    assert len(upstream.calls) == 2
    assert q.files() == []


@pytest.mark.parametrize(
    ("status", "detail", "code", "reason"),
    [
        (401, "Invalid token.", "upstream_auth", "Chutes refused the API token (401)"),
        (402, "Please add balance.", "upstream_payment", "Chutes wants payment (402)"),
    ],
)
def test_a_refused_token_or_an_empty_account_burns_no_thousand_tasks(
    make, upstream, status, detail, code, reason
):
    upstream.decide = lambda fields: refusal(status, detail)
    q = make(CONCURRENCY=1)
    ids = [q.add() for _ in range(5)]
    q.start()
    task = q.ended(ids[0])
    assert (task.status, task.error_code) == ("failed", code)
    assert q.waits(ids[1]) == f"the queue is paused: {reason}"
    assert not ever(lambda: len(upstream.calls) > 1)
    q.worker.stop()
    upstream.decide = lambda fields: Answer()
    make(q.clock).start().until(ids[4], status="completed")


def test_a_model_the_token_may_not_use_fails_its_task_only(make, upstream):
    upstream.decide = lambda f: refusal(403, "no") if f["model"] == "x" else Answer()
    q = make().start()
    assert q.ended(q.add(model="x")).error_code == "upstream_auth"
    q.until(q.add(), status="completed")


@pytest.mark.parametrize("status", [429, 502, 503, 504, 520, 522, 524])
def test_a_model_without_capacity_is_held_and_the_others_go_on(make, upstream, status):
    busy = [True]
    upstream.decide = lambda f: refusal(status, "later") if f["model"] == "x" and busy else Answer()
    q = make(CONCURRENCY=2, RETRY_BACKOFF=5).start()
    held = [q.add(model="x") for _ in range(4)]
    q.until(q.add(), status="completed")
    wait_until(lambda: q.db.hold("x"))
    q.until(q.add(), status="completed")
    assert "for x" in q.waits(held[3]) and "; next try at " in q.waits(held[3])
    made = upstream.prompts().count("p")
    q.clock.now += 5
    wait_until(lambda: q.db.hold("x").until > q.clock.now)
    assert upstream.prompts().count("p") == made + 1, "one probe, and no more"
    assert [q.task(task_id).attempts for task_id in held] == [0] * 4
    busy.clear()
    q.clock.now += 10
    for task_id in held:
        assert q.until(task_id, status="completed").attempts == 1
    assert q.db.hold("x") is None


@pytest.mark.parametrize("status", [502, 504, 520])
def test_a_gateway_that_gives_up_late_counts_and_holds_nobody(make, upstream, monkeypatch, status):
    monkeypatch.setattr("chutes.EDGE_SECONDS", 0.0)
    upstream.decide = lambda fields: Answer(status, b"<html>") if fields["seed"] else Answer()
    queue = make(MAX_ATTEMPTS=2, CONCURRENCY=1, RETRY_BACKOFF=0.01)
    slow, quick = (queue.add(params={"seed": seed}) for seed in (1, 0))
    queue.start()
    assert queue.ended(quick).status == "completed"
    wait_until(lambda: queue.task(slow).attempts == 1 and queue.db.hold("m") is None)
    queue.clock.now += 1
    task = queue.ended(slow)
    assert (task.error_code, task.attempts) == ("upstream_timeout", 2)
    assert "Lower num_inference_steps or the size" in task.error


def test_a_hold_says_that_there_is_no_free_capacity(make, upstream):
    upstream.decide = lambda fields: refusal(429, "Infrastructure is at maximum capacity")
    q = make(clock=Clock(datetime(2026, 5, 27, 12, 3, 5, tzinfo=UTC).timestamp())).start()
    task_id = q.add(model="qwen-image")
    wait_until(lambda: q.db.hold("qwen-image"))
    words = "Chutes has no free capacity for qwen-image; next try at 12:03:10 UTC"
    assert q.waits(task_id) == words


def test_a_hold_doubles_to_300_seconds(make, upstream):
    upstream.decide = lambda fields: refusal(429, "later")
    q = make(RETRY_BACKOFF=200).start()
    q.add()
    steps = []
    for _ in range(3):
        until = wait_until(lambda: (h := q.db.hold("m")) and h.until > q.clock.now and h.until)
        steps.append(until - q.clock.now)
        q.clock.now = until
    assert steps == [200, 300, 300]


def test_retry_after_is_honoured(make, upstream):
    upstream.decide = lambda fields: refusal(503, "later", Retry_After="100")
    q = make().start()
    q.add()
    assert wait_until(lambda: q.db.hold("m")).until == q.clock.now + 100


def test_a_used_up_quota_holds_all_until_its_reset(make, upstream):
    q = make(clock=Clock(datetime(2026, 5, 27, 20, 0, tzinfo=UTC).timestamp()), CONCURRENCY=1)
    detail = {"message": "Quota", "quota_reset_timestamp": "2026-05-28T00:00:00+00:00"}
    upstream.decide = lambda fields: refusal(402, detail)
    ids = [q.add(model=model) for model in ("x", "y")]
    q.start()
    wait_until(lambda: q.db.hold(ALL_MODELS))
    words = "Chutes' daily quota is used up; next try at 2026-05-28 00:00:00 UTC"
    assert [q.waits(task_id) for task_id in ids] == [words, words]
    q.clock.now += timedelta(hours=4).total_seconds() - 1
    assert not ever(lambda: len(upstream.calls) > 1)
    upstream.decide = lambda fields: Answer()
    q.clock.now += 1
    for task_id in ids:
        assert q.until(task_id, status="completed").attempts == 1


def test_nothing_listening_holds_the_model_and_counts_no_attempt(make):
    q = make(CHUTES_API_URL=f"http://127.0.0.1:{closed_port()}/generate").start()
    task_id = q.add()
    wait_until(lambda: q.db.hold("m"))
    task = q.until(task_id, status="pending")
    assert (task.attempts, q.outcomes()) == (0, ["unavailable"])
    assert "cannot be reached for m (Connection refused)" in q.waits(task_id)


def test_no_room_on_the_disk_holds_the_queue_until_there_is(make, upstream, monkeypatch):
    room = [0]
    full = OSError(28, "No space left on device")
    no_room = outputs.StorageError(full, Path("outputs"))
    sync = os.fsync
    monkeypatch.setattr("chutes.os.fsync", lambda f: sync(f) if room[0] else raising(full))
    monkeypatch.setattr(
        outputs.Folder, "check", lambda folder, size: room[0] >= size or raising(no_room)
    )
    q = make(CONCURRENCY=1, RETRY_BACKOFF=5).start()
    ids = [q.add(), q.add(model="x")]
    wait_until(lambda: q.db.hold(ALL_MODELS))
    assert q.waits(ids[1]).startswith("There is no room on the disk for the image; next try at ")
    for _ in range(5):
        q.clock.now += 60
        wait_until(lambda: q.db.hold(ALL_MODELS).until > q.clock.now)
    assert len(upstream.calls) == 1, "nothing is paid for that cannot be stored"
    room[0] = 10**9
    q.clock.now += 60
    for task_id in ids:
        assert q.until(task_id, status="completed").attempts == 1


def test_a_folder_that_was_removed_ends_a_hold_for_want_of_room(make, upstream, monkeypatch):
    full = [OSError(28, "No space left on device")]
    sync = os.fsync
    monkeypatch.setattr("chutes.os.fsync", lambda f: raising(full.pop()) if full else sync(f))
    q = make().start()
    task_id = q.add()
    wait_until(lambda: q.db.hold(ALL_MODELS))
    q.config.output_dir.rmdir()
    q.clock.now += 60
    q.until(task_id, status="completed")


def raising(error):
    raise error


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES])
def test_another_fault_of_the_disk_holds_the_queue_and_says_so(make, upstream, monkeypatch, number):
    faulty, sync = [True], os.fsync
    fault = OSError(number, os.strerror(number))
    monkeypatch.setattr("os.fsync", lambda file: raising(fault) if faulty else sync(file))
    q = make(CONCURRENCY=1).start()
    ids = [q.add(), q.add(model="x")]
    wait_until(lambda: q.db.hold(ALL_MODELS))
    reason = f"The images cannot be written to {q.config.output_dir} ({os.strerror(number)})"
    for task_id in ids:
        assert q.waits(task_id).startswith(f"{reason}; next try at ")
    for _ in range(5):
        q.clock.now += 60
        wait_until(lambda: q.db.hold(ALL_MODELS).until > q.clock.now)
    assert len(upstream.calls) == 1, "nothing is paid for that cannot be stored"
    assert [q.task(task_id).attempts for task_id in ids] == [0, 0]
    faulty.clear()
    q.clock.now += 2
    for task_id in ids:
        assert q.until(task_id, status="completed").attempts == 1


def test_a_folder_that_is_none_holds_the_queue_and_costs_nothing(make, upstream):
    q = make(CONCURRENCY=3)
    q.config.output_dir.rmdir()
    q.config.output_dir.write_text("in the way")
    q.start()
    ids = [q.add() for _ in range(9)]
    wait_until(lambda: q.db.hold(ALL_MODELS))
    words = f"The images cannot be written to {q.config.output_dir} (Not a directory); next try at "
    wait_until(lambda: all(q.waits(task_id).startswith(words) for task_id in ids))
    for _ in range(5):
        q.clock.now += 60
        wait_until(lambda: q.db.hold(ALL_MODELS).until > q.clock.now)
    assert {(q.task(task_id).status, q.task(task_id).attempts) for task_id in ids} == {
        ("pending", 0)
    }
    assert (upstream.calls, q.db.queue(q.clock.now).calls_today) == ([], 0)
    q.config.output_dir.unlink()
    q.config.output_dir.mkdir()
    q.clock.now += 2
    for task_id in ids:
        assert q.until(task_id, status="completed").attempts == 1


def test_the_reason_is_always_that_of_the_last_look(make, monkeypatch):
    q = make()
    q.config.output_dir.rmdir()
    q.config.output_dir.write_text("in the way")
    task_id = q.add()
    q.start()
    wait_until(lambda: "(Not a directory)" in q.waits(task_id))
    q.config.output_dir.unlink()
    monkeypatch.setattr("os.fsync", lambda file: raising(OSError(errno.EIO, "Input/output error")))
    q.clock.now += 2
    wait_until(lambda: "(Input/output error)" in q.waits(task_id))


def test_a_task_whose_images_are_lost_max_attempts_times_fails(make, upstream, monkeypatch):
    lost, sync = [], outputs.sync_folder

    def fail(path):
        lost.append(path)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(outputs, "sync_folder", fail)
    q = make(CONCURRENCY=1, MAX_ATTEMPTS=2).start()
    ids = [q.add(), q.add()]
    q.until(ids[0], lost_images=1, status="pending")
    q.clock.now += 10
    task = q.ended(ids[0])
    assert (task.error_code, task.attempts, task.lost_images) == ("storage", 0, 2)
    folder = q.config.output_dir
    assert task.error == (
        f"The images cannot be written to {folder} (Input/output error), "
        "for 2 images of this task; mend that, then retry the task"
    )
    assert (len(upstream.calls), q.outcomes(), q.files()) == (2, ["storage"] * 2, [])
    assert q.waits(ids[1]).startswith("The images cannot be written"), "the others wait"
    monkeypatch.setattr(outputs, "sync_folder", sync)
    q.clock.now += 20
    assert q.until(ids[1], status="completed").lost_images == 0


def test_a_disk_that_is_written_again_is_not_written_over_and_over(make, monkeypatch):
    checks, check = [], outputs.Folder.check
    monkeypatch.setattr(
        outputs.Folder, "check", lambda self, size: checks.append(size) or check(self, size)
    )
    sync = os.fsync
    full = [OSError(28, "No space left on device")]
    monkeypatch.setattr("chutes.os.fsync", lambda f: raising(full.pop()) if full else sync(f))
    q = make().start()
    task_id = q.add()
    wait_until(lambda: q.db.hold(ALL_MODELS))
    q.worker.cancel(task_id)
    for _ in range(5):
        q.clock.now += 2
        ever(lambda: False, looks=3)
    assert checks == [len(image_bytes()) + 65536]


def test_a_folder_that_was_removed_is_made_again(make):
    q = make()
    q.config.output_dir.rmdir()
    q.start()
    task = q.until(q.add(), status="completed")
    assert q.files() == [f"{task.id}.png"]


def test_a_defect_fails_its_task_and_the_queue_goes_on(make, monkeypatch, caplog):
    real = Chutes.generate
    calls = itertools.count()
    monkeypatch.setattr(
        Chutes,
        "generate",
        lambda self, *args: (
            raising(ZeroDivisionError("inside")) if next(calls) == 0 else real(self, *args)
        ),
    )
    q = make(CONCURRENCY=1).start()
    task = q.ended(q.add())
    assert task.error_code == "internal"
    assert "log" in task.error and "inside" not in task.error
    assert "ZeroDivisionError: inside" in caplog.text
    q.until(q.add(), status="completed")


def test_what_waited_too_long_expires(make, upstream):
    upstream.decide = lambda fields: refusal(503, "later")
    q = make(TASK_TTL=100).start()
    task_id = q.add()
    wait_until(lambda: q.db.hold("m"))
    q.clock.now += 102
    task = q.ended(task_id)
    assert (task.error_code, task.attempts) == ("expired", 0)
    assert "100 seconds" in task.error


def test_a_task_between_attempts_expires_too(make, upstream):
    upstream.decide = lambda fields: refusal(500, "no")
    q = make(TASK_TTL=100, RETRY_BACKOFF=3600).start()
    task_id = q.add()
    q.until(task_id, attempts=1)
    q.clock.now += 102
    assert q.ended(task_id).error_code == "expired"


def test_a_ttl_of_zero_is_for_ever(make, upstream):
    upstream.decide = lambda fields: refusal(503, "later")
    q = make(TASK_TTL=0, RETRY_BACKOFF=3600).start()
    task_id = q.add()
    wait_until(lambda: q.db.hold("m"))
    q.clock.now += 3000
    assert not ever(lambda: q.task(task_id).status != "pending")


def test_the_end_of_a_call_is_written_once_the_database_takes_it(make, upstream, monkeypatch):
    q = make()
    finish, refusals = q.db.finish_and_claim, [1, 1]

    def flaky(*args):
        if refusals:
            refusals.pop()
            raise DatabaseError("disk is full", full=True)
        return finish(*args)

    monkeypatch.setattr(q.db, "finish_and_claim", flaky)
    monkeypatch.setattr(queue, "RETRY_SECONDS", 0.01)
    q.start()
    q.until(q.add(), status="completed")
    assert len(upstream.calls) == 1


def test_an_end_that_was_written_without_a_word_keeps_its_image(make, monkeypatch):
    q = make(SHUTDOWN_GRACE=30)
    finish, silences = q.db.finish_and_claim, [1]

    def silent(*args):
        written = finish(*args)
        if silences:
            silences.pop()
            raise DatabaseError("disk I/O error")
        return written

    monkeypatch.setattr(q.db, "finish_and_claim", silent)
    monkeypatch.setattr(queue, "RETRY_SECONDS", 0.01)
    q.start()
    task = q.until(q.add(), status="completed")
    q.worker.stop()
    assert silences == []
    assert q.files() == [f"{task.id}.png"]


def test_a_picture_that_is_no_longer_wanted_leaves_no_file(make, upstream):
    upstream.gate.clear()
    q = make(SHUTDOWN_GRACE=30).start()
    task_id = q.add()
    wait_until(lambda: upstream.at_once)
    task = q.task(task_id)
    q.db.finish(task, Ending("canceled", "failed", error="by hand"), q.clock())
    upstream.gate.set()
    q.worker.stop()
    assert q.files() == []
    assert q.task(task.id).error_code == "canceled"


# A death in the middle: every state that a kill can leave


def orphan(q):
    """Leave a task as a process leaves it that is killed during its call."""
    task_id = q.add()
    return q.db.claim(q.clock.now) and task_id


def test_an_interrupted_call_counts_and_the_next_follows_at_once(make, upstream):
    q = make(RETRY_BACKOFF=3600)
    task_id = orphan(q)
    (q.config.output_dir / f".{task_id}.part").write_bytes(b"half")
    task = q.start().until(task_id, status="completed")
    assert (task.attempts, len(upstream.calls)) == (2, 1)
    assert q.files() == [f"{task_id}.png"]
    assert q.outcomes() == ["interrupted", "completed"]


def test_an_interrupted_call_may_be_told_to_fail(make, upstream):
    q = make(INTERRUPTED="fail")
    task_id = orphan(q)
    task = q.start().ended(task_id)
    assert (task.status, task.error_code) == ("failed", "interrupted")
    assert upstream.calls == []


def test_an_interrupted_last_attempt_fails(make, upstream):
    q = make(MAX_ATTEMPTS=1)
    task_id = orphan(q)
    task = q.start().ended(task_id)
    assert (task.status, task.error_code, task.attempts) == ("failed", "interrupted", 1)
    assert upstream.calls == []


def test_what_an_interrupted_call_had_written_is_removed(make):
    q = make(INTERRUPTED="fail")
    task_id = orphan(q)
    (q.config.output_dir / f".{task_id}.part").write_bytes(b"half")
    q.start().ended(task_id)
    assert q.files() == []


def test_an_orphan_whose_file_cannot_be_read_stops_no_other(make):
    q = make()
    task_id = orphan(q)
    (q.config.output_dir / f"{task_id}.png").mkdir()
    other = q.add()
    q.start().until(other, status="completed")
    assert q.task(task_id).attempts >= 1


def test_attempts_that_were_used_up_before_are_not_exceeded(make, upstream):
    upstream.decide = lambda fields: refusal(500, "its words")
    q = make(MAX_ATTEMPTS=5, RETRY_BACKOFF=3600).start()
    task_id = q.add()
    q.until(task_id, attempts=1)
    q.worker.stop()
    task = make(q.clock, MAX_ATTEMPTS=1).start().ended(task_id)
    assert (task.error_code, task.attempts, len(upstream.calls)) == ("upstream_error", 1, 1)
    assert "its words" in task.error


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("interrupted", ["retry", "fail"])
def test_a_finished_file_completes_its_task_without_a_call(make, upstream, kind, interrupted):
    q = make(INTERRUPTED=interrupted)
    task_id = orphan(q)
    extension = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind]
    path = q.config.output_dir / f"{task_id}.{extension}"
    path.write_bytes(image_bytes(kind))
    task = q.start().until(task_id, status="completed")
    assert (task.file_path, task.sha256) == (str(path), images.inspect(path).sha256)
    assert upstream.calls == []


def test_a_torn_file_with_a_final_name_is_removed(make, upstream):
    q = make()
    task_id = orphan(q)
    (q.config.output_dir / f"{task_id}.webp").write_bytes(image_bytes("WEBP")[:-9])
    q.start().until(task_id, status="completed")
    assert q.files() == [f"{task_id}.png"]
    assert len(upstream.calls) == 1


# Stopping


def test_a_call_that_ends_within_the_grace_is_kept(make, upstream):
    upstream.gate.clear()
    q = make(SHUTDOWN_GRACE=30).start()
    running = [q.add(), q.add()]
    wait_until(lambda: upstream.at_once == 2)
    q.worker.drain()
    later = q.add()
    assert not ever(lambda: len(upstream.calls) > 2)
    upstream.gate.set()
    q.worker.stop()
    assert [q.task(task_id).status for task_id in running] == ["completed"] * 2
    assert q.task(later).status == "pending"


@pytest.mark.parametrize("interrupted", ["retry", "fail"])
def test_a_call_cut_when_the_grace_is_over_goes_back_uncounted(make, upstream, interrupted):
    upstream.gate.clear()
    q = make(SHUTDOWN_GRACE=0.1, INTERRUPTED=interrupted, MAX_ATTEMPTS=1).start()
    task_id = q.add()
    wait_until(lambda: upstream.at_once)
    q.worker.stop()
    task = q.task(task_id)
    assert (task.status, task.attempts, task.not_before) == ("pending", 0, None)
    assert q.outcomes() == ["shutdown"]
    assert q.files() == []


def test_a_call_that_cannot_be_cut_does_not_count_either(make, upstream, monkeypatch):
    q = make(INTERRUPTED="fail", MAX_ATTEMPTS=1)
    looking, answer = hang_look_ups(monkeypatch)
    monkeypatch.setattr(queue, "CANCEL_SECONDS", 0.1)
    q.start()
    task_id = q.add()
    looking.wait(10)
    q.worker.drain()
    task = q.until(task_id, status="pending")
    assert (task.attempts, q.outcomes()) == (0, ["shutdown"])
    answer.set()
    q.worker.stop()
    assert q.task(task_id).status == "pending"
    assert upstream.calls == []


@pytest.fixture
def one_thread_is_refused(monkeypatch):
    """Let the pool fail once to start a thread, as at a limit of the machine."""
    start, refusals = threading.Thread.start, [1]

    def scarce(thread):
        if thread.name.startswith("call") and refusals:
            refusals.pop()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)


@pytest.mark.usefixtures("one_thread_is_refused")
def test_no_thread_to_be_had_makes_no_call_and_the_queue_goes_on(make, upstream):
    q = make(CONCURRENCY=2)
    task_id = q.add()
    q.start()
    assert q.until(task_id, status="completed").attempts == 1
    assert (len(upstream.calls), q.outcomes()) == (1, ["shutdown", "completed"])


@pytest.mark.usefixtures("one_thread_is_refused")
def test_what_was_taken_back_does_not_end_the_next_attempt(make, upstream):
    q = make(CONCURRENCY=1)
    upstream.gate.clear()
    ids = [q.add() for _ in range(3)]
    q.start()
    wait_until(lambda: upstream.at_once == 1)
    assert not ever(lambda: len(upstream.calls) > 1)
    assert [task.id for task in q.db.orphans()] == ids[:1]
    upstream.gate.set()
    for task_id in ids:
        q.until(task_id, status="completed")
    assert len(upstream.calls) == 3


def test_a_cancel_is_heard_while_it_drains(make, upstream):
    upstream.gate.clear()
    q = make(SHUTDOWN_GRACE=30).start()
    task_id = q.add()
    wait_until(lambda: upstream.at_once)
    q.worker.drain()
    q.worker.cancel(task_id)
    wait_until(lambda: not q.worker.is_run_by_any())
    assert q.task(task_id).error_code == "canceled"


def test_a_cancel_finds_a_call_that_takes_the_place_of_another(make, upstream, monkeypatch):
    q, has_looked = make(CONCURRENCY=1), threading.Event()
    finish, canceling = q.db.finish_and_claim, q.db.canceling

    def look():
        if found := canceling():
            has_looked.set()
        return found

    def cancel_between(*args):
        written = finish(*args)
        if not has_looked.is_set():
            # The next task is claimed, and the worker does not know of it yet.
            upstream.gate.clear()
            q.worker.cancel(second)
            has_looked.wait(10)
        return written

    monkeypatch.setattr(q.db, "canceling", look)
    monkeypatch.setattr(q.db, "finish_and_claim", cancel_between)
    monkeypatch.setattr(queue, "MAX_SLEEP", 60.0)
    _, second = q.add(), q.add()
    q.start()
    assert q.until(second, status="failed").error_code == "canceled"


def test_a_canceled_probe_leaves_the_hold_to_the_next(make, upstream):
    upstream.decide = lambda fields: refusal(429, "later")
    q = make(CONCURRENCY=4).start()
    first = q.add()
    wait_until(lambda: q.db.hold("m"))
    ids = [q.add() for _ in range(4)]
    upstream.gate.clear()
    q.clock.now += 5
    wait_until(lambda: upstream.at_once == 1)
    q.worker.cancel(first)
    q.ended(first)
    wait_until(lambda: len(upstream.calls) == 3)
    assert not ever(lambda: upstream.at_once > 1)
    assert q.db.hold("m").probe == ids[0]


def test_a_clock_that_was_set_back_before_the_start_is_noticed(make, upstream):
    fast = Clock()
    q = make(fast, RATE_LIMIT="1/60").start()
    q.until(q.add(), status="completed")
    q.worker.stop()
    slow = Clock(fast.now - 86400)
    again = make(slow, RATE_LIMIT="1/60").start()
    task_id = again.add()
    last = "SELECT max(started) FROM calls"
    wait_until(lambda: rows.read(again.db.path, last)[0][0] <= slow.now)
    assert again.waits(task_id).startswith("the rate limit")
    slow.now += 61
    again.until(task_id, status="completed")


def test_a_cancel_that_a_death_interrupts_is_kept(make, upstream):
    q = make(INTERRUPTED="fail")
    task_id = orphan(q)
    q.db.cancel(task_id, q.clock.now)
    task = q.start().ended(task_id)
    assert (task.error_code, task.attempts) == ("canceled", 0)


def test_nothing_is_claimed_once_it_is_no_longer_wanted(make, upstream):
    upstream.gate.clear()
    q = make(CONCURRENCY=2)
    for _ in range(8):
        q.add()
    q.worker.start(lambda: not q.db.orphans())
    wait_until(q.outcomes)
    wait_until(lambda: not q.worker.is_run_by_any())
    assert q.outcomes() == ["shutdown", "shutdown"]


def test_stopping_ends_every_thread_and_frees_the_lock(make):
    before = threading.active_count()
    first = make().start()
    first.until(first.add(), status="completed")
    first.worker.stop()
    assert threading.active_count() <= before + 1  # The upstream's own.
    second = make().start()
    second.until(second.add(), status="completed")


def test_it_stops_while_its_database_fails(make, monkeypatch):
    q = make()
    tries = []
    monkeypatch.setattr(queue, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(
        q.db, "reset_run_state", lambda *values: tries.append(1) or raising(DatabaseError("gone"))
    )
    q.start()
    wait_until(lambda: len(tries) > 1)
    q.worker.drain()
    wait_until(lambda: not q.worker.is_run_by_any())


def test_a_stopped_worker_does_not_start_again(make, upstream):
    q = make().start()
    q.worker.stop()
    q.worker.start()
    q.add()
    assert not ever(lambda: upstream.calls)


def test_only_one_worker_runs_the_queue_and_another_takes_over(make, upstream):
    upstream.gate.clear()
    first = make(CONCURRENCY=2, SHUTDOWN_GRACE=0)
    ids = [first.add() for _ in range(6)]
    first.start()
    wait_until(lambda: upstream.at_once == 2)
    second = make(first.clock, CONCURRENCY=2).start()
    assert not ever(lambda: len(upstream.calls) > 2)
    first.worker.stop()
    upstream.gate.set()
    for task_id in ids:
        second.until(task_id, status="completed")
    assert upstream.most_at_once <= 4
    assert len(upstream.calls) == 8, "two were cut, and made again"


def test_it_drains_as_soon_as_it_is_no_longer_wanted(make, upstream):
    wanted = [True]
    q = make()
    q.worker.start(lambda: bool(wanted))
    q.until(q.add(), status="completed")
    wanted.clear()
    q.add()
    wait_until(lambda: not q.worker.is_run_by_any())
    assert len(upstream.calls) == 1


# Words and numbers


@pytest.mark.parametrize(
    ("attempts", "seconds"), [(1, 5), (2, 20), (3, 80), (4, 300), (5, 300), (100, 300)]
)
def test_the_backoff_grows_fourfold_to_300_seconds(attempts, seconds):
    assert backoff(attempts, 5, 0) == seconds
    assert seconds <= backoff(attempts, 5, 1) <= min(300, seconds * 1.25)


def test_jitter_makes_it_longer(make):
    assert backoff(1, 4, 1) == 5
