"""What a request may cost: the limits of the queue, the day and the models."""

from datetime import UTC, datetime

from conftest import finished, submit, wait_until
from queues import ever
from upstream import refusal

from web.answers import waiting_for


def count(client):
    return len(client.get("/tasks?limit=200").json["tasks"])


# MAX_PENDING


def test_a_full_queue_refuses_and_stores_nothing(serve, upstream):
    client = serve(MAX_PENDING=3).client
    client.post("/queue/pause")
    ids = [submit(client) for _ in range(3)]
    answer = client.post("/generate", json={"prompt": "p"})
    assert answer.status_code == 429
    assert "MAX_PENDING" in answer.json["error"]
    assert int(answer.headers["Retry-After"]) > 0
    assert count(client) == 3
    client.post(f"/tasks/{ids[0]}/cancel")
    assert client.post("/generate", json={"prompt": "p"}).status_code == 202


def test_a_retry_needs_room_too(serve, upstream):
    upstream.decide = lambda fields: refusal(400, "no")
    client = serve(MAX_PENDING=2).client
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
    client = serve(MODELS="qwen-image, x/y").client
    assert client.post("/generate", json={"prompt": "p", "model": "x/y"}).status_code == 202
    assert client.post("/generate", json={"prompt": "p"}).status_code == 202
    answer = client.post("/generate", json={"prompt": "p", "model": "z"})
    assert answer.status_code == 400
    assert "qwen-image, x/y" in answer.json["error"]


def test_a_model_that_is_no_longer_allowed_is_not_retried(app, upstream):
    upstream.decide = lambda fields: refusal(400, "no")
    task_id = submit(app.client, model="z")
    finished(app.client, task_id)
    app.restart(MODELS="qwen-image")
    answer = app.client.post(f"/tasks/{task_id}/retry")
    assert (answer.status_code, "qwen-image" in answer.json["error"]) == (400, True)
    assert app.client.post("/tasks/retry").json == {"retried": 0}


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
    client = serve(MAX_PER_DAY=1).client
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
    client = serve(MAX_PER_DAY=1).client
    task_id = submit(client)
    finished(client, task_id)
    assert client.delete(f"/tasks/{task_id}").status_code == 204
    submit(client)
    assert client.get("/queue").json["calls_today"] == 1
    wait_until(lambda: client.get("/queue").json["pending"] == 1)
    assert len(upstream.calls) == 1
