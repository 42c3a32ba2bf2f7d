"""The HTTP face, as a client sees it."""

import hashlib
import io
import json
import re
import threading
import uuid
from pathlib import Path

import pytest
from conftest import PROMPT, TOKEN, finished, submit, wait_until
from upstream import Answer, image_bytes, refusal

from app import close, create_app
from db import DatabaseError
from web.params import MAX_BODY


def test_a_prompt_becomes_a_picture_on_disk(client, upstream, tmp_path):
    data = image_bytes("JPEG", (640, 480))
    upstream.decide = lambda fields: Answer(body=data, headers={"Content-Type": "image/png"})
    task = finished(client, submit(client))
    path = Path(task["file_path"])
    assert path == tmp_path / "outputs" / f"{task['id']}.jpg"
    assert path.read_bytes() == data
    assert task["image"] == {
        "url": f"/images/{task['id']}",
        "content_type": "image/jpeg",
        "bytes": len(data),
        "width": 640,
        "height": 480,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_submitting_answers_as_the_original_did(client):
    answer = client.post("/generate", json={"prompt": PROMPT})
    assert answer.status_code == 202
    assert list(answer.json) == ["id", "status", "message"]
    assert str(uuid.UUID(answer.json["id"], version=4)) == answer.json["id"]
    assert answer.json["status"] == "pending"
    assert answer.json["message"] == "Task queued successfully"
    assert answer.headers["Location"] == f"/status/{answer.json['id']}"


def test_the_status_has_the_seven_keys_first_and_all_the_others(client, upstream):
    task_id = submit(client, "füchse 🦊", width=512, seed=3, priority=2)
    task = finished(client, task_id)
    assert list(task) == [
        *("id", "prompt", "status", "file_path", "error", "created_at", "updated_at"),
        *("error_code", "model", "params", "priority", "attempts", "queue_position"),
        *("waiting_for", "started_at", "finished_at", "image", "retried_as"),
    ]
    assert (task["prompt"], task["status"], task["model"]) == (
        "füchse 🦊",
        "completed",
        "qwen-image",
    )
    sent = upstream.calls[0]
    assert {**task["params"], "model": "qwen-image", "prompt": "füchse 🦊"} == sent
    assert "priority" not in sent
    assert (task["priority"], task["attempts"], task["error"]) == (2, 1, None)
    for name in ("created_at", "updated_at", "started_at", "finished_at"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", task[name])


def test_what_is_not_given_is_not_sent(client, upstream):
    finished(client, submit(client))
    assert upstream.calls == [
        {
            "model": "qwen-image",
            "prompt": PROMPT,
            "guidance_scale": 7.5,
            "width": 1024,
            "height": 1024,
            "num_inference_steps": 20,
        }
    ]


def test_a_pending_task_tells_its_place_and_why_it_waits(paused):
    running = submit(paused)
    wait_until(lambda: paused.get(f"/status/{running}").json["status"] == "processing")
    first, second, third = (submit(paused) for _ in range(3))
    waits = [paused.get(f"/status/{task}").json for task in (first, second, third)]
    assert [task["queue_position"] for task in waits] == [1, 2, 3]
    assert [task["waiting_for"] for task in waits] == [
        "all 1 places are busy",
        "1 task ahead",
        "2 tasks ahead",
    ]
    task = paused.get(f"/status/{running}").json
    assert (task["queue_position"], task["waiting_for"], task["file_path"]) == (None, None, None)


def test_the_place_is_null_past_a_thousand(paused):
    ids = [submit(paused) for _ in range(1003)]
    running = wait_until(
        lambda: [i for i in ids[:2] if paused.get(f"/status/{i}").json["status"] == "processing"]
    )
    assert running == ids[:1]
    task = paused.get(f"/status/{ids[1000]}").json
    assert (task["queue_position"], task["waiting_for"]) == (1000, "999 tasks ahead")
    task = paused.get(f"/status/{ids[1001]}").json
    assert (task["queue_position"], task["waiting_for"]) == (None, "1000 tasks ahead")
    task = paused.get(f"/status/{ids[1002]}").json
    assert (task["queue_position"], task["waiting_for"]) == (None, "more than 1000 tasks ahead")


def test_a_higher_priority_goes_first(paused, upstream):
    submit(paused, "running")
    wait_until(lambda: upstream.calls)
    for prompt, priority in (("low", -1), ("normal", 0), ("high", 100), ("high too", 100)):
        submit(paused, prompt, priority=priority)
    upstream.gate.set()
    wait_until(lambda: len(upstream.calls) == 5)
    assert upstream.prompts() == ["running", "high", "high too", "normal", "low"]


# Bad input: 35 bodies that broke plain handlers, and what each must be told.

DEEP = b'{"prompt":' + b"[" * 100_000
HOSTILE = [
    (b"", "JSON"),
    (b"   ", "JSON"),
    (b"prompt=a+fox", "JSON"),
    (b"{", "JSON"),
    (b'{"prompt": "a fox"} extra', "JSON"),
    (b"{'prompt': 'a fox'}", "JSON"),
    (b'{"prompt": "a\nfox"}', "JSON"),
    (b'\xff\xfe{"prompt"', "JSON"),
    (b'{"prompt": "\xff"}', "JSON"),
    (b"[]", "object"),
    (b'["prompt"]', "object"),
    (b'"a fox"', "object"),
    (b"null", "object"),
    (b"7", "object"),
    (b"NaN", "object"),
    (DEEP, "nested"),
    (b"[" * 100_000 + b"]" * 100_000, "nested"),
    (b"{}", "Prompt is required"),
    (b'{"prompt": null}', "Prompt is required"),
    (b'{"prompt": "  "}', "Prompt is required"),
    (b'{"prompt": 7}', "prompt"),
    (b'{"prompt": ["a fox"]}', "prompt"),
    (b'{"prompt": {"a": "fox"}}', "prompt"),
    (b'{"prompt": "\\ud800"}', "prompt"),
    (b'{"prompt": "a\\u0000b"}', "prompt"),
    (b'{"prompt": "p", "seed": 99999999999999999999}', "seed"),
    (b'{"prompt": "p", "seed": ' + b"9" * 5000 + b"}", "seed"),
    (b'{"prompt": "p", "width": 512.5}', "width"),
    (b'{"prompt": "p", "width": "512"}', "width"),
    (b'{"prompt": "p", "height": true}', "height"),
    (b'{"prompt": "p", "guidance_scale": NaN}', "guidance_scale"),
    (b'{"prompt": "p", "guidance_scale": 1e999}', "guidance_scale"),
    (b'{"prompt": "p", "model": "a\\r\\nX-Evil: 1"}', "model"),
    (b'{"prompt": "p", "model": "../../etc/passwd"}', "model"),
    (b'{"prompt": "p", "\\ud800": 1}', "field"),
    (b'{"prompt": "p", "widht": 512}', "width"),
    (b'{"prompt": "p", "num_inference_steps": -1}', "num_inference_steps"),
]


@pytest.mark.parametrize(("body", "fault"), HOSTILE)
def test_a_hostile_body_is_refused_by_name(client, caplog, body, fault):
    answer = client.post("/generate", data=body, content_type="application/json")
    assert answer.status_code == 400
    assert answer.is_json
    assert fault in answer.json["error"]
    assert len(answer.json["error"]) < 400
    assert "Traceback" not in caplog.text
    rows = client.application.extensions["database"]
    assert not rows.has_work(9e9) and rows.orphans() == []


def test_a_prompt_of_markup_is_only_text(client, upstream):
    prompt = "<script>alert(1)</script>\r\nX: y\x1b[31m'; DROP TABLE tasks; --\u202e"
    assert finished(client, submit(client, prompt))["prompt"] == prompt
    assert upstream.prompts() == [prompt]


@pytest.mark.parametrize(
    "declared",
    [
        None,
        "application/json",
        "application/json; charset=utf-8",
        "application/x-www-form-urlencoded",
        "application/ld+json",
    ],
)
def test_json_may_be_declared_as_json_as_a_form_or_not_at_all(client, declared):
    body = json.dumps({"prompt": PROMPT})
    assert client.post("/generate", data=body, content_type=declared).status_code == 202


@pytest.mark.parametrize("declared", ["text/plain", "multipart/form-data", "image/png"])
def test_a_body_declared_as_something_else_is_refused(client, declared):
    answer = client.post("/generate", data=b'{"prompt": "p"}', content_type=declared)
    assert answer.status_code == 415
    assert declared in answer.json["error"]
    assert "application/json" in answer.json["error"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_one_mebibyte_is_refused(client, chunked):
    def post(size):
        body = b'{"prompt": "p"}'.ljust(size)
        if not chunked:
            return client.post("/generate", data=body, content_type="application/json")
        return client.post(
            "/generate",
            input_stream=io.BytesIO(body),
            content_type="application/json",
            environ_overrides={"wsgi.input_terminated": True, "CONTENT_LENGTH": ""},
        )

    answer = post(MAX_BODY + 1)
    assert (answer.status_code, answer.json) == (413, {"error": "The body is larger than 1 MiB"})
    assert post(MAX_BODY).status_code == 202


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


@pytest.mark.parametrize(("full", "status"), [(True, 507), (False, 503)])
def test_a_database_that_fails_is_told_and_nothing_is_promised(client, monkeypatch, full, status):
    def fail(*values):
        raise DatabaseError("The database cannot be written: disk", full=full)

    monkeypatch.setattr(client.application.extensions["database"], "add", fail)
    answer = client.post("/generate", json={"prompt": "p"})
    assert answer.status_code == status
    assert "nothing was changed" in answer.json["error"]
    assert int(answer.headers["Retry-After"]) > 0


def test_a_defect_is_json_too(client, monkeypatch, caplog):
    def fail(*values):
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(client.application.extensions["database"], "get", fail)
    answer = client.get("/status/x")
    assert (answer.status_code, list(answer.json)) == (500, ["error"])
    assert "inside" not in answer.json["error"]
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("status", [400, 401, 403, 500])
def test_an_echoed_token_is_in_no_answer_no_log_and_no_row(
    serve, upstream, logged, tmp_path, status
):
    upstream.decide = lambda fields: refusal(
        status, f"no: {TOKEN}", X_Chutes_InvocationID=TOKEN, Retry_After=TOKEN
    )
    client = serve(MAX_ATTEMPTS=1)
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
