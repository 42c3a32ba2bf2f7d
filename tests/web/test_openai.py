"""The routes in OpenAI's form, as any client sees them."""

import base64
import os
import re
from pathlib import Path

import pytest
from conftest import KEYS, submit
from upstream import image_bytes

from db import DatabaseError
from images import Decoder

KEY = KEYS.split(",")[0]


BY_ADDRESS = {"prompt": "p", "response_format": "url"}


def test_the_address_is_the_public_one(serve):
    client = serve(PUBLIC_URL="https://pictures.example").client
    made = client.post("/v1/images/generations", json=BY_ADDRESS)
    assert made.json["data"][0]["url"].startswith("https://pictures.example/images/")


def test_the_address_is_as_a_trusted_proxy_tells_it(serve):
    client = serve(TRUSTED_PROXIES=1, API_KEYS=KEYS).client
    headers = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "pictures.example:8443"}
    headers["X-API-Key"] = KEY
    made = client.post("/v1/images/generations", json=BY_ADDRESS, headers=headers)
    assert made.json["data"][0]["url"].startswith("https://pictures.example:8443/images/")


def test_other_routes_keep_their_form(client):
    assert client.get("/v1").json == {"error": "There is no GET /v1 on this server"}


# What goes wrong


def test_a_defect_of_the_server_is_its_own(client, monkeypatch):
    monkeypatch.setattr(Decoder, "verifier", lambda *values: 1 / 0)
    answer = client.post("/v1/images/generations", json={"prompt": "p"})
    assert (answer.status_code, answer.json["error"]["code"]) == (500, "internal")


def test_a_defect_has_openais_form_and_is_not_tried_again(app, client, monkeypatch):
    monkeypatch.setattr(app.worker.waiters, "wait_for_any", lambda ids, seconds: 1 / 0)
    monkeypatch.setattr(app.worker, "wake", lambda: None)
    client.post("/queue/pause")
    answer = client.post("/v1/images/generations", json={"prompt": "p"})
    assert answer.status_code == 500
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["X-Should-Retry"] == "false"
    (task,) = client.get("/tasks").json["tasks"]
    assert task["id"] in answer.json["error"]["message"]


def test_a_database_that_fails_once_the_tasks_are_stored_names_them(app, client, monkeypatch):
    client.post("/queue/pause")

    def fail(task_id):
        raise DatabaseError("The database cannot be read: disk I/O error")

    monkeypatch.setattr(app.database, "get", fail)
    answer = client.post("/v1/images/generations", json={"prompt": "p", "n": 2})
    assert answer.status_code == 503
    assert answer.headers["X-Should-Retry"] == "false"
    assert "Retry-After" not in answer.headers
    ids = {task.id for task in app.database.list_tasks(None, None, None, 9)}
    assert len(ids) == 2
    assert all(task_id in answer.json["error"]["message"] for task_id in ids)


def test_under_the_floor_of_the_disk_nothing_is_stored(serve):
    client = serve(MIN_FREE_MB=10**9).client
    answer = client.post("/v1/images/generations", json={"prompt": "p", "n": 2})
    assert (answer.status_code, answer.json["error"]["type"]) == (507, "server_error")
    assert "MIN_FREE_MB" in answer.json["error"]["message"]
    assert "X-Should-Retry" not in answer.headers
    assert client.get("/tasks").json["tasks"] == []


# The same request again


def test_a_replay_needs_no_room_in_the_queue_or_on_the_disk(serve):
    app = serve(MAX_PENDING=1)
    headers = {"Idempotency-Key": "k"}

    def post(**fields):
        body = {"prompt": "p", **fields}
        return app.client.post("/v1/images/generations", json=body, headers=headers)

    first = post()
    app.client.post("/queue/pause")
    submit(app.client)
    assert post(size="auto", stream=False).json["data"] == first.json["data"]
    app.restart(MIN_FREE_MB=10**9)
    assert post().json["data"] == first.json["data"]
    assert post(size="512x512").status_code == 422


@pytest.mark.parametrize("form", ["b64_json", "url"])
@pytest.mark.parametrize("change", [Path.unlink, lambda file: os.truncate(file, 9)])
def test_a_picture_whose_file_is_gone_or_cut_short_is_said_to_be(client, tmp_path, form, change):
    headers = {"Idempotency-Key": "k"}
    body = {"prompt": "p", "response_format": form}
    assert client.post("/v1/images/generations", json=body, headers=headers).status_code == 200
    (file,) = (tmp_path / "outputs").glob("*.png")
    change(file)
    answer = client.post("/v1/images/generations", json=body, headers=headers)
    assert answer.status_code == 410
    assert "no longer there" in answer.json["error"]["message"]
    assert answer.headers["Idempotent-Replayed"] == "true"


def test_a_task_that_was_deleted_is_said_to_be(client):
    headers = {"Idempotency-Key": "k"}
    body = {"prompt": "p", "response_format": "url"}
    made = client.post("/v1/images/generations", json=body, headers=headers)
    task_id = re.search(r"images/([0-9a-f-]+)", made.json["data"][0]["url"])[1]
    client.delete(f"/tasks/{task_id}")
    answer = client.post("/v1/images/generations", json=body, headers=headers)
    assert (answer.status_code, answer.json["error"]["code"]) == (409, "deleted")


def test_pictures_are_found_where_they_were_moved(app, tmp_path):
    headers = {"Idempotency-Key": "k"}
    app.client.post("/v1/images/generations", json={"prompt": "p"}, headers=headers)
    (tmp_path / "outputs").rename(tmp_path / "moved")
    app.restart(OUTPUT_DIR="moved")
    answer = app.client.post("/v1/images/generations", json={"prompt": "p"}, headers=headers)
    assert base64.b64decode(answer.json["data"][0]["b64_json"]) == image_bytes()
