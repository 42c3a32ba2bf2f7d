"""What a request may cost: idempotency keys, and limits of the queue, the day, the models."""

import threading
from datetime import UTC, datetime

import pytest
from conftest import finished, submit, wait_until
from queues import ever
from upstream import refusal

from records import IdempotencyKey, NewTask, QueueFull
from web.answers import waiting_for


def post(client, key, prompt="p", **fields):
    headers = {"Idempotency-Key": key}
    return client.post("/generate", json={"prompt": prompt, **fields}, headers=headers)


def count(client):
    return len(client.get("/tasks?limit=200").json["tasks"])


# Idempotency-Key


def test_the_same_request_again_is_the_same_task(client):
    first, again = post(client, "k"), post(client, "k")
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json == again.json
    assert again.headers["Location"] == first.headers["Location"]
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert count(client) == 1


def test_a_key_belongs_to_its_input_not_to_its_spelling(client):
    first = post(client, "k", guidance_scale=7, width=None)
    same = client.post(
        "/generate",
        data=b'{ "guidance_scale": 7.0, "prompt": "\\u0070", "height": 1024 }',
        headers={"Idempotency-Key": "k"},
        content_type="application/json",
    )
    assert same.json == first.json


@pytest.mark.parametrize(
    "other",
    [
        *({"prompt": "q"}, {"width": 512}, {"priority": 1}, {"model": "x"}),
        *({"negative_prompt": "q"}, {"seed": 0}, {"guidance_scale": 8}, {"true_cfg_scale": 1}),
    ],
)
def test_the_same_key_with_another_input_is_refused(client, other):
    post(client, "k")
    answer = post(client, "k", **other)
    assert answer.status_code == 422
    assert "Idempotency-Key" in answer.json["error"]
    assert count(client) == 1


def test_another_key_is_another_task(client):
    assert post(client, "k").json["id"] != post(client, "K").json["id"]


def test_a_replay_after_the_end_pays_nothing(client, upstream):
    task_id = post(client, "k").json["id"]
    finished(client, task_id)
    assert post(client, "k").json["id"] == task_id
    assert len(upstream.calls) == 1


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
    ((kept,),) = database._reader.execute("SELECT count(*) FROM idempotency").fetchall()
    assert kept == 1


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


def test_a_key_outlives_a_restart(serve):
    first = serve()
    task_id = post(first, "k").json["id"]
    first.application.extensions["worker"].stop()
    assert post(serve(), "k").json["id"] == task_id


def test_clients_with_keys_of_their_own_do_not_meet(serve):
    client = serve(API_KEYS="one-client,another-client")
    ids = set()
    for key in ("one-client", "another-client", "one-client"):
        headers = {"Idempotency-Key": "k", "X-API-Key": key}
        ids.add(client.post("/generate", json={"prompt": "p"}, headers=headers).json["id"])
    assert len(ids) == 2


@pytest.mark.parametrize("key", ["a key", " ! ~", "a" * 255])
def test_any_printable_key_will_do(client, key):
    assert post(client, key).json == post(client, key).json


@pytest.mark.parametrize("key", ["", "a" * 256, "clé", "a\tb"])
def test_a_bad_key_is_refused(client, key):
    answer = client.post(
        "/generate",
        json={"prompt": "p"},
        headers={"Idempotency-Key": key.encode().decode("latin-1")},
    )
    assert answer.status_code == 400
    assert "Idempotency-Key must be 1 to 255 printable ASCII" in answer.json["error"]
    assert count(client) == 0


def test_a_refused_request_uses_up_no_key(client):
    assert post(client, "k", width=1).status_code == 400
    assert post(client, "k").status_code == 202


def test_fifty_at_once_make_one_task(client, upstream):
    answers, together = [], threading.Barrier(50)

    def send():
        other = client.application.test_client()
        together.wait(30)
        answers.append(post(other, "k"))

    threads = [threading.Thread(target=send) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json["id"] for answer in answers}) == 1
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 49
    finished(client, answers[0].json["id"])
    assert len(upstream.calls) == count(client) == 1


# MAX_PENDING


def test_a_full_queue_refuses_and_stores_nothing(serve, upstream):
    client = serve(MAX_PENDING=3)
    client.post("/queue/pause")
    ids = [submit(client) for _ in range(3)]
    answer = post(client, "k")
    assert answer.status_code == 429
    assert "MAX_PENDING" in answer.json["error"]
    assert int(answer.headers["Retry-After"]) > 0
    assert count(client) == 3
    client.post(f"/tasks/{ids[0]}/cancel")
    assert post(client, "k").status_code == 202


def test_a_replay_needs_no_room(serve):
    client = serve(MAX_PENDING=1)
    client.post("/queue/pause")
    task_id = post(client, "k").json["id"]
    assert post(client, "k").json["id"] == task_id
    assert post(client, "other").status_code == 429


def test_a_retry_needs_room_too(serve, upstream):
    upstream.decide = lambda fields: refusal(400, "no")
    client = serve(MAX_PENDING=2)
    ids = [submit(client) for _ in range(2)]
    ids += [finished(client, i) and submit(client) for i in ids]
    for task_id in ids:
        finished(client, task_id)
    client.post("/queue/pause")
    assert client.post("/tasks/retry").json == {"retried": 2}
    assert client.post("/tasks/retry").status_code == 429
    answer = client.post(f"/tasks/{ids[0]}/retry")
    assert (answer.status_code, count(client)) == (429, 6)


# MODELS


def test_a_model_that_is_not_allowed_is_told_those_that_are(serve):
    client = serve(MODELS="qwen-image, x/y")
    assert client.post("/generate", json={"prompt": "p", "model": "x/y"}).status_code == 202
    assert client.post("/generate", json={"prompt": "p"}).status_code == 202
    answer = client.post("/generate", json={"prompt": "p", "model": "z"})
    assert answer.status_code == 400
    assert "qwen-image, x/y" in answer.json["error"]


def test_a_model_that_is_no_longer_allowed_is_not_retried(serve, upstream):
    upstream.decide = lambda fields: refusal(400, "no")
    client = serve()
    task_id = submit(client, model="z")
    finished(client, task_id)
    client.application.extensions["worker"].stop()
    client = serve(MODELS="qwen-image")
    answer = client.post(f"/tasks/{task_id}/retry")
    assert (answer.status_code, "qwen-image" in answer.json["error"]) == (400, True)
    assert client.post("/tasks/retry").json == {"retried": 0}


# MAX_PER_DAY


def test_the_days_calls_are_limited_and_the_others_wait_for_the_next(make, upstream, clock):
    clock.now = datetime(2026, 5, 27, 23, 0, tzinfo=UTC).timestamp()
    q = make(clock=clock, MAX_PER_DAY=2, CONCURRENCY=1).start()
    ids = [q.add() for _ in range(3)]
    for task_id in ids[:2]:
        q.until(task_id, status="completed")
    queue_view = q.db.queue_view(q.task(ids[2]), None, clock.now, 2)
    assert waiting_for(q.task(ids[2]), queue_view, q.config, clock.now) == (
        "the limit of 2 calls a day (MAX_PER_DAY); next start at 2026-05-28 00:00:00 UTC"
    )
    clock.now += 3599
    assert not ever(lambda: len(upstream.calls) > 2)
    clock.now += 1
    q.until(ids[2], status="completed")


def test_the_day_begins_at_midnight_itself(make, upstream, clock):
    clock.now = datetime(2026, 5, 28, tzinfo=UTC).timestamp()
    q = make(clock=clock, MAX_PER_DAY=1).start()
    q.until(q.add(), status="completed")
    q.add()
    assert not ever(lambda: len(upstream.calls) > 1)


def test_the_days_limit_is_told_over_http(serve, upstream):
    client = serve(MAX_PER_DAY=1)
    finished(client, submit(client))
    task = client.get(f"/status/{submit(client)}").json
    assert task["waiting_for"].startswith("the limit of 1 calls a day (MAX_PER_DAY); next start")
    assert client.get("/queue").json["calls_today"] == 1


def test_a_days_limit_counts_what_was_called_before_a_restart(make, upstream, clock):
    q = make(clock=clock, MAX_PER_DAY=1).start()
    q.until(q.add(), status="completed")
    q.worker.stop()
    again = make(clock=clock, MAX_PER_DAY=1).start()
    again.add()
    assert not ever(lambda: len(upstream.calls) > 1)


def test_deleting_a_task_gives_no_call_back(serve, upstream):
    client = serve(MAX_PER_DAY=1)
    task_id = submit(client)
    finished(client, task_id)
    assert client.delete(f"/tasks/{task_id}").status_code == 204
    submit(client)
    assert client.get("/queue").json["calls_today"] == 1
    wait_until(lambda: client.get("/queue").json["pending"] == 1)
    assert len(upstream.calls) == 1
