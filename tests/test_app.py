"""The application: its routes, its log lines, and what is in none of them."""

import threading
import uuid

import pytest
from conftest import TOKEN, finished, submit, wait_until
from upstream import refusal

from app import close, create_app


def test_an_unknown_id_and_an_unknown_route(client):
    answer = client.get(f"/status/{uuid.uuid4()}")
    assert (answer.status_code, answer.json) == (404, {"error": "Task not found"})
    for path in ("/status/", "/generate/", "/%00", "/status/a/b", "/%ff"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert answer.is_json and list(answer.json) == ["error"]


def test_two_slashes_are_not_one_and_no_answer_is_html(client):
    for method, path in (("GET", "/status//x"), ("GET", "/tasks//"), ("OPTIONS", "/generate")):
        answer = client.open(path, method=method)
        assert answer.status_code in (200, 404)
        assert answer.content_type == "application/json"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/generate", {"POST", "OPTIONS"}), ("POST", "/status/x", {"GET", "HEAD", "OPTIONS"})],
)
def test_a_wrong_method_is_told_the_right_one(client, method, path, allowed):
    answer = client.open(path, method=method)
    assert answer.status_code == 405
    assert set(answer.headers["Allow"].split(", ")) == allowed
    assert method in answer.json["error"]


def test_every_answer_is_json_and_ends_in_a_newline(client):
    answers = [
        client.post("/generate", json={"prompt": "p"}),
        client.post("/generate", json={}),
        client.post("/generate", data="x", content_type="text/plain"),
        client.get(f"/status/{submit(client)}"),
        client.get("/status/x"),
        client.get("/nowhere"),
        client.get("/generate"),
    ]
    for answer in answers:
        assert answer.content_type == "application/json"
        assert answer.data.endswith(b"}\n")


@pytest.mark.parametrize("status", [400, 401, 403, 500])
def test_an_echoed_token_is_in_no_answer_no_log_and_no_row(
    serve, upstream, logged, tmp_path, status
):
    upstream.decide = lambda fields: refusal(
        status, f"no: {TOKEN}", X_Chutes_InvocationID=TOKEN, Retry_After=TOKEN
    )
    client = serve(MAX_ATTEMPTS=1).client
    task_id = submit(client)
    assert finished(client, task_id)["status"] == "failed"
    assert TOKEN not in client.get(f"/tasks/{task_id}").text
    assert logged and not [line for line in logged if TOKEN in line]
    # Before the database is closed: what is in its log file counts, too.
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) >= 3
    for file in files:
        assert TOKEN.encode() not in file.read_bytes(), file


def test_one_line_a_request_and_one_an_attempt_but_never_the_prompt(client, logged):
    task_id = submit(client, "very secret words")
    finished(client, task_id)
    # The line follows the row, so that one whose row must be written again is one line, too.
    wait_until(lambda: any("attempt ended" in line for line in logged))
    about = [line for line in logged if task_id in line]
    assert sum("POST /generate 202" in line for line in about) == 1
    assert sum("attempt ended" in line and "outcome=completed" in line for line in about) == 1
    assert "secret words" not in "".join(logged)


def test_a_path_cannot_forge_a_log_line(client, caplog):
    caplog.set_level("INFO")
    client.get("/a%0d%0aPOST /generate 202")
    assert any("/a%0D%0APOST" in record.getMessage() for record in caplog.records)


def test_building_starts_no_thread(configure, upstream):
    before = threading.active_count()
    app = create_app(configure(CHUTES_API_URL=upstream.url))
    assert threading.active_count() == before
    close(app)
