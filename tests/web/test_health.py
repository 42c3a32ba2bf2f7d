"""Health, readiness, and the numbers for Prometheus."""

import pytest
import rows
from conftest import finished, submit, wait_until
from prometheus_client.parser import text_string_to_metric_families
from upstream import Answer, image_bytes, refusal

from db import Database, DatabaseError


def ready(client):
    answer = client.get("/readyz")
    return answer.status_code, answer.json["problems"]


def test_it_lives(client):
    answer = client.get("/healthz")
    assert (answer.status_code, answer.json) == (200, {"status": "ok"})


def test_its_life_is_no_secret(serve):
    client = serve(API_KEYS="a-key").client
    assert client.get("/healthz", headers={"Host": "10.0.0.7"}).status_code == 200
    for path in ("/readyz", "/metrics"):
        assert client.get(path).status_code == 401


def test_it_is_ready_once_a_process_runs_the_queue(client):
    client.get("/healthz")
    wait_until(lambda: ready(client) == (200, []))


def problem_of(client, words):
    client.get("/healthz")
    wait_until(lambda: len(ready(client)[1]) == 1)
    status, (problem,) = ready(client)
    assert status == 503
    assert words in problem
    answer = client.get("/readyz")
    assert problem in answer.json["error"]
    assert int(answer.headers["Retry-After"]) > 0


def test_a_database_that_cannot_be_written_is_told(app, client, monkeypatch):
    def fail():
        raise DatabaseError("The database cannot be written: disk I/O error")

    monkeypatch.setattr(app.database, "check_writable", fail)
    problem_of(client, "The database cannot be written")


@pytest.mark.parametrize("fault", ["deleted", "replaced", "damaged"])
def test_with_another_database_than_the_next_start_will_find_nothing_is_accepted(
    serve, tmp_path, fault
):
    path, whole = tmp_path / "tasks.sqlite3", tmp_path / "whole.sqlite3"
    Database(path).close()
    rows.insert(path, "tasks", (rows.task(f"t{n}", status="failed") for n in range(2000)))
    whole.write_bytes(path.read_bytes())
    if fault == "damaged":
        rows.damage(path)
    app = serve()
    if fault == "deleted":
        path.unlink()
    elif fault == "replaced":
        whole.rename(path)
    app.client.get("/tasks?limit=200")
    answer = app.client.post("/generate", json={"prompt": "p"})
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert str(path) in answer.json["error"]
    assert "nothing was changed" in answer.json["error"]
    problem = ready(app.client)[1][0]
    assert (str(path) in problem, fault in problem) == (True, True)
    assert ready(app.client)[0] == 503


def test_a_disk_under_the_floor_is_told(serve):
    problem_of(serve(MIN_FREE_MB=10**9).client, "MIN_FREE_MB")


def test_a_folder_that_cannot_be_written_is_told_and_tasks_are_accepted_all_the_same(
    client, upstream, tmp_path
):
    (tmp_path / "outputs").rmdir()
    (tmp_path / "outputs").write_text("in the way")
    folder = tmp_path / "outputs"
    problem_of(client, f"The images cannot be written to {folder} (Not a directory)")
    task_id = submit(client)
    words = f"The images cannot be written to {folder} (Not a directory); next try at "
    wait_until(
        lambda: (client.get(f"/status/{task_id}").json["waiting_for"] or "").startswith(words)
    )
    folder.unlink()
    assert finished(client, task_id)["status"] == "completed"
    assert ready(client) == (200, [])


def test_a_refused_token_is_told(client, upstream):
    upstream.decide = lambda fields: refusal(401, "Invalid token.")
    finished(client, submit(client))
    problem_of(client, "Chutes refused the API token (401)")


def test_a_pause_by_a_person_is_no_problem(client):
    client.post("/queue/pause")
    wait_until(lambda: ready(client) == (200, []))


def test_stopping_is_told(app, client):
    client.get("/healthz")
    wait_until(lambda: ready(client) == (200, []))
    app.worker.stop()
    assert ready(client) == (503, ["this process is stopping", "no process runs the queue"])


def test_another_process_may_run_the_queue(serve):
    first, second = serve(), serve()
    first.client.get("/healthz")
    wait_until(lambda: ready(first.client) == (200, []))
    assert ready(second.client) == (200, [])
    second.worker.stop()
    assert ready(second.client) == (503, ["this process is stopping"])


def numbers(client):
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.content_type.startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_the_numbers_are_those_of_the_database(client, upstream):
    data = image_bytes("PNG", (100, 80))
    upstream.decide = lambda f: refusal(400, "no") if f["prompt"] == "bad" else Answer(body=data)
    for prompt in ("good", "good too", "bad"):
        finished(client, submit(client, prompt))
    client.post("/queue/pause")
    submit(client)
    found = numbers(client)
    by_status = {key[1][1]: value for key, value in found.items() if key[0] == "image_proxy_tasks"}
    assert by_status == {"pending": 1, "processing": 0, "completed": 2, "failed": 1}
    assert found[("image_proxy_failures", ("error_code", "upstream_rejected"))] == 1
    assert found[("image_proxy_failures", ("error_code", "expired"))] == 0
    assert found[("image_proxy_queue_depth",)] == 1
    assert 0 <= found[("image_proxy_oldest_pending_seconds",)] < 60
    assert found[("image_proxy_held_models",)] == 0
    assert found[("image_proxy_paused",)] == 1
    assert found[("image_proxy_image_bytes_total",)] == 2 * len(data)
    assert found[("image_proxy_upstream_seconds_count",)] == 3
    assert found[("image_proxy_upstream_seconds_bucket", ("le", "+Inf"))] == 3
    assert found[("image_proxy_upstream_seconds_bucket", ("le", "640.0"))] == 3
    assert 0 < found[("image_proxy_upstream_seconds_sum",)] < 60


def test_what_runs_is_in_the_queue_too_and_ages_are_told(paused, upstream, tmp_path):
    first = submit(paused)
    wait_until(lambda: upstream.at_once == 1)
    waits = submit(paused)
    aged = "UPDATE tasks SET created_at = '2026-01-01 00:00:00'"
    rows.write(tmp_path / "tasks.sqlite3", aged)
    found = numbers(paused)
    assert found[("image_proxy_queue_depth",)] == 2
    assert found[("image_proxy_oldest_pending_seconds",)] > 86400
    for task_id in (first, waits):
        paused.post(f"/tasks/{task_id}/cancel")


def test_the_totals_outlive_a_restart_and_a_deleted_task(app):
    task_id = submit(app.client)
    size = finished(app.client, task_id)["image"]["bytes"]
    app.client.delete(f"/tasks/{task_id}")
    app.restart()
    found = numbers(app.client)
    assert found[("image_proxy_image_bytes_total",)] == size
    assert found[("image_proxy_upstream_seconds_count",)] == 1


def test_the_calls_and_the_quota_are_told(app, upstream):
    quota = {"Total": "300", "Used": "12.5", "Remaining": "287.5"}
    headers = {f"X-Chutes-Quota-{name}": value for name, value in quota.items()}
    assert not [key for key in numbers(app.client) if key[0] == "image_proxy_quota"]
    upstream.decide = lambda fields: Answer(headers=headers)
    ids = [finished(app.client, submit(app.client, model=model))["id"] for model in "xyx"]
    for task_id in ids:
        app.client.delete(f"/tasks/{task_id}")
    app.restart()
    found = numbers(app.client)
    assert found[("image_proxy_calls_today",)] == 3
    told = {key[1][1]: value for key, value in found.items() if key[0] == "image_proxy_quota"}
    assert told == {"total": 300, "used": 12.5, "remaining": 287.5}
    calls = {key[1]: value for key, value in found.items() if key[0] == "image_proxy_calls_total"}
    assert calls == {("model", "x"): 2, ("model", "y"): 1}


def test_a_held_model_is_counted(client, upstream):
    upstream.decide = lambda fields: refusal(429, "later")
    submit(client)
    wait_until(lambda: numbers(client)[("image_proxy_held_models",)] == 1)


def test_a_hold_that_is_over_is_none(make, upstream, clock):
    upstream.decide = lambda fields: refusal(429, "later")
    q = make(clock=clock, RETRY_BACKOFF=5).start()
    task_id = q.add()
    wait_until(lambda: q.db.queue(clock.now).holds)
    q.worker.cancel(task_id)
    clock.now += 6
    assert q.db.queue(clock.now).holds == ()


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_a_gauge_takes_no_other_method(client, path):
    assert client.post(path).status_code == 405
