"""Idempotency-Key: the same request again is the same task, and another one is refused."""

import threading

import pytest
from conftest import finished


def post(client, key, prompt="p", **fields):
    headers = {"Idempotency-Key": key}
    return client.post("/generate", json={"prompt": prompt, **fields}, headers=headers)


def count(client):
    return len(client.get("/tasks?limit=200").json["tasks"])


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


def test_a_key_outlives_a_restart(app):
    task_id = post(app.client, "k").json["id"]
    app.restart()
    assert post(app.client, "k").json["id"] == task_id


def test_clients_with_keys_of_their_own_do_not_meet(serve):
    client = serve(API_KEYS="one-client,another-client").client
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


def test_a_replay_needs_no_room(serve):
    client = serve(MAX_PENDING=1).client
    client.post("/queue/pause")
    task_id = post(client, "k").json["id"]
    assert post(client, "k").json["id"] == task_id
    assert post(client, "other").status_code == 429
