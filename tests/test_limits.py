"""What a request may cost: the limits of the queue, the day and the models."""

from datetime import UTC, datetime

import pytest
from conftest import finished, hang_look_ups, submit, wait_until
from queues import ever
from server import Server
from upstream import closed_port, refusal


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
    assert q.waits(ids[2]) == (
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


def sent(q):
    return q.db.queue(q.clock.now).calls_today


def test_a_connection_that_was_not_made_is_no_call_of_the_day(make, upstream, clock):
    q = make(
        clock=clock, MAX_PER_DAY=1, CHUTES_API_URL=f"http://127.0.0.1:{closed_port()}/"
    ).start()
    task_id = q.add()
    for calls in range(1, 4):
        wait_until(lambda: q.outcomes() == ["unavailable"] * calls)  # noqa: B023
        assert sent(q) == 0
        clock.now = wait_until(lambda: (hold := q.db.hold("m")) and not hold.probe and hold.until)
    q.worker.stop()
    again = make(clock=clock, MAX_PER_DAY=1).start()
    clock.now += 300
    again.until(task_id, status="completed")
    assert sent(again) == 1


def test_a_call_that_was_sent_counts_however_it_ends(make, upstream, clock):
    upstream.decide = lambda fields: refusal(429, "later")
    q = make(clock=clock, MAX_PER_DAY=2).start()
    q.add()
    wait_until(lambda: q.outcomes() == ["unavailable"])
    assert sent(q) == 1


def test_calls_under_way_count_so_that_no_more_than_the_limit_are_made(make, upstream):
    upstream.gate.clear()
    q = make(MAX_PER_DAY=3, CONCURRENCY=8)
    ids = [q.add() for _ in range(6)]
    q.start()
    wait_until(lambda: upstream.at_once == 3)
    assert not ever(lambda: len(upstream.calls) > 3)
    upstream.gate.set()
    q.until(ids[2], status="completed")
    assert not ever(lambda: len(upstream.calls) > 3)


def test_a_call_that_is_canceled_before_its_connection_is_made_gives_its_place_back(
    make, upstream, monkeypatch
):
    looking, answer = hang_look_ups(monkeypatch)
    q = make(MAX_PER_DAY=1, CONCURRENCY=1).start()
    first, second = q.add(), q.add()
    looking.wait(10)
    assert sent(q) == 1
    q.worker.cancel(first)
    wait_until(lambda: not q.db.canceling() or q.worker._running[first][1].reason)
    answer.set()
    q.until(second, status="completed")
    assert (sent(q), len(upstream.calls)) == (1, 1)


def test_a_call_that_a_death_has_cut_counts(make, upstream, clock):
    q = make(clock=clock, MAX_PER_DAY=1)
    task_id = q.add()
    q.db.claim(clock.now)
    q.start().until(task_id, status="pending")
    assert q.waits(task_id).startswith("the limit of 1 calls a day")
    assert not ever(lambda: upstream.calls)


@pytest.mark.processes
def test_a_kill_in_the_middle_of_a_call_gives_nothing_back(tmp_path, upstream):
    upstream.gate.clear()
    folder = tmp_path / "server"
    first = Server(folder, upstream.url, MAX_PER_DAY=1)
    second = None
    try:
        task_id = first.ready().submit()
        wait_until(lambda: upstream.at_once == 1)
        first.kill_all()
        upstream.gate.set()
        second = Server(folder, upstream.url, MAX_PER_DAY=1).ready()
        wait_until(lambda: "MAX_PER_DAY" in (second.status(task_id)["waiting_for"] or ""))
        assert second.request("GET", "/queue")[2]["calls_today"] == 1
        assert len(upstream.calls) == 1
    finally:
        for server in filter(None, (first, second)):
            server.close()


def test_the_rate_limit_counts_every_start(make, clock):
    url = f"http://127.0.0.1:{closed_port()}/"
    q = make(clock=clock, RATE_LIMIT="1/60", RETRY_BACKOFF=1, CHUTES_API_URL=url).start()
    task_id = q.add()
    wait_until(lambda: q.db.hold("m"))
    clock.now += 2
    assert not ever(lambda: len(q.outcomes()) > 1)
    assert q.db.queue_view(q.task(task_id), (1, 60), clock.now).next_start


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
