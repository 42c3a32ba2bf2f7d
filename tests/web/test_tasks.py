"""Tasks and the queue over HTTP: submit, look, list, cancel, retry, delete, pause."""

import hashlib
import io
import json
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import rows
from conftest import PROMPT, finished, submit, wait_until
from upstream import Answer, image_bytes, refusal

from records import ALL_MODELS


def failed(client, upstream, detail="no", prompt="p"):
    """Return a task that has failed for good."""
    upstream.decide = lambda fields: refusal(400, detail)
    task = finished(client, submit(client, prompt))
    assert task["status"] == "failed"
    upstream.decide = lambda fields: Answer()
    return task


# Submitting, and the status


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
        *("waiting_for", "started_at", "finished_at", "image", "retried_as", "retry_of"),
        "inputs",
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
    task = finished(client, submit(client))
    assert upstream.calls == [
        {
            "model": "qwen-image",
            "prompt": PROMPT,
            "guidance_scale": 7.5,
            "width": 1024,
            "height": 1024,
            "num_inference_steps": 20,
            "seed": task["params"]["seed"],
        }
    ]


def test_a_prompt_of_markup_is_only_text(client, upstream):
    prompt = "<script>alert(1)</script>\r\nX: y\x1b[31m'; DROP TABLE tasks; --\u202e"
    assert finished(client, submit(client, prompt))["prompt"] == prompt
    assert upstream.prompts() == [prompt]


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


# Listing


def test_the_newest_come_first_in_pages(client):
    ids = [finished(client, submit(client, f"p{n}"))["id"] for n in range(7)]
    seen, url = [], "/tasks?limit=3"
    while url:
        answer = client.get(url)
        assert answer.status_code == 200
        seen.append([task["id"] for task in answer.json["tasks"]])
        url = answer.json["next"]
        link = f'<{url}>; rel="next"' if url else None
        assert answer.headers.get("Link") == link
    assert [len(page) for page in seen] == [3, 3, 1]
    assert [task_id for page in seen for task_id in page] == ids[::-1]


def test_a_page_that_is_just_full_has_no_next(client):
    for _ in range(3):
        submit(client)
    assert client.get("/tasks?limit=3").json["next"] is None


def test_new_tasks_do_not_shift_the_pages(client):
    ids = [submit(client) for _ in range(4)]
    following = client.get("/tasks?limit=2").json["next"]
    submit(client)
    assert [task["id"] for task in client.get(following).json["tasks"]] == ids[1::-1]


def test_a_list_can_be_narrowed(client, upstream):
    completed = finished(client, submit(client, model="x"))["id"]
    bad = failed(client, upstream)["id"]

    def listed(query):
        return [task["id"] for task in client.get(f"/tasks?{query}").json["tasks"]]

    assert listed("status=failed") == [bad]
    assert listed("status=completed&model=x") == [completed]
    assert listed("model=qwen-image") == [bad]
    assert listed("status=failed&model=x") == []
    assert listed("") == [bad, completed]


def test_the_next_page_is_narrowed_as_this_one(client):
    for _ in range(2):
        submit(client, model="x/y:z")
    url = client.get("/tasks?model=x/y:z&limit=1").json["next"]
    submit(client)
    assert [task["model"] for task in client.get(url).json["tasks"]] == ["x/y:z"]


def test_a_listed_task_is_as_its_status(client):
    task = finished(client, submit(client))
    assert client.get("/tasks").json["tasks"] == [task]


PROMPTS = ["A red fox in the snow", "foxes AND hounds, 16:9", "Füchse 🦊 im Schnee", "fo_x don't"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        *(("fox", [0, 1]), ("FOX", [0, 1]), ("foxes", [1]), ("fo", [0, 1, 3]), ("ox", [])),
        *(("snow red", [0]), ("red snows", []), ("a red fox in the snow", [0]), ("r s f", [0])),
        *(("füchse", [2]), ("FÜCHSE", [2]), ("Fu\u0308ch", [2]), ("fuchse", [2]), ("🦊", [2])),
        # Nothing is an operator, and what holds no word asks for nothing.
        *(("red AND fox", []), ("foxes AND hounds", [1]), ("red OR hounds", [])),
        *(("NOT fox", []), ("fox*", [0, 1]), ("-fox", [0, 1]), ("^red", [0]), ("prompt:fox", [])),
        *(('"red fox"', [0]), ('"', []), ('fox "', [0, 1]), ("(fox", [0, 1]), ("NEAR(a b)", [])),
        *(("16:9", [1]), ("16:8", []), ("9:16", []), ("don't", [3]), ("fo_x", [3]), ("fo\0x", [3])),
        ("'; DROP TABLE tasks; --", []),
        (" ".join(f"w{n}" for n in range(200)), []),
    ],
)
def test_what_was_made_is_found_by_words_of_its_prompt(client, words, found):
    client.post("/queue/pause")
    ids = [submit(client, prompt) for prompt in PROMPTS]
    answer = client.get("/tasks", query_string={"q": words})
    assert answer.status_code == 200, answer.json
    assert [task["id"] for task in answer.json["tasks"]] == [ids[n] for n in reversed(found)]


def test_a_search_goes_on_page_by_page_and_can_be_narrowed(client, upstream):
    made = [finished(client, submit(client, f"a fox {n}", model="x"))["id"] for n in range(3)]
    finished(client, submit(client, "a hound", model="x"))
    bad = failed(client, upstream, prompt="a fox that failed")["id"]
    client.post("/queue/pause")
    waits = [submit(client, "a fox", priority=priority) for priority in (0, 1, 0)]
    made, line = made[::-1], [waits[1], waits[0], waits[2]]
    assert pages(client, "/tasks?q=fox&limit=2") == [
        waits[:0:-1],
        [waits[0], bad],
        made[:2],
        made[2:],
    ]
    assert pages(client, "/tasks?q=fox&status=completed&limit=2") == [made[:2], made[2:]]
    assert pages(client, "/tasks?q=fox&status=completed&model=x") == [made]
    assert pages(client, "/tasks?q=fox&model=qwen-image&status=completed") == [[]]
    for query in ("", "&q=fox", "&q=fox&status=failed&model=qwen-image", "&status=failed"):
        assert pages(client, f"/tasks?error_code=upstream_rejected{query}") == [[bad]]
    assert pages(client, "/tasks?error_code=upstream_rejected&q=hound") == [[]]
    assert pages(client, "/tasks?error_code=expired&q=fox") == [[]]
    assert pages(client, "/tasks?error_code=upstream_rejected&status=pending") == [[]]
    queue = "/tasks?status=pending&order=queue"
    assert pages(client, f"{queue}&q=fox&limit=2") == [line[:2], line[2:]]
    assert pages(client, f"{queue}&q=fox&error_code=expired") == [[]]


def test_what_is_deleted_is_found_no_more(client):
    client.post("/queue/pause")
    gone, kept = submit(client, "a fox"), submit(client, "a fox, too")
    client.delete(f"/tasks/{gone}")
    assert pages(client, "/tasks?q=fox") == [[kept]]


def pages(client, url):
    """Return the ids of each page from this one on."""
    seen = []
    while url:
        answer = client.get(url)
        assert answer.status_code == 200, answer.json
        seen.append([task["id"] for task in answer.json["tasks"]])
        url = answer.json["next"]
    return seen


def test_the_line_is_listed_as_it_is_taken(client):
    client.post("/queue/pause")
    ids = [submit(client, priority=priority) for priority in (0, -100, 5, 0, 100, 5)]
    line = [ids[n] for n in (4, 2, 5, 0, 3, 1)]
    assert pages(client, "/tasks?status=pending&order=queue") == [line]
    shown = client.get("/tasks?status=pending&order=queue").json["tasks"]
    assert [task["queue_position"] for task in shown] == [1, 2, 3, 4, 5, 6]
    for limit in (1, 2, 4):
        by_limit = pages(client, f"/tasks?status=pending&order=queue&limit={limit}")
        assert by_limit == [line[at : at + limit] for at in range(0, 6, limit)]


def test_the_line_goes_on_where_the_last_page_ended_whatever_became_of_its_tasks(client):
    client.post("/queue/pause")
    ids = [submit(client) for _ in range(4)]
    following = client.get("/tasks?status=pending&order=queue&limit=2").json["next"]
    client.post(f"/tasks/{ids[0]}/cancel")
    client.delete(f"/tasks/{ids[1]}")
    submit(client, priority=1)
    assert pages(client, following) == [ids[2:]]


def test_the_line_of_a_model_is_listed(client):
    client.post("/queue/pause")
    ids = [submit(client, model=model) for model in "xyxyx"]
    url = "/tasks?status=pending&order=queue&limit=2&model=x"
    assert pages(client, url) == [[ids[0], ids[2]], [ids[4]]]
    assert pages(client, "/tasks?status=pending&order=queue&model=z") == [[]]


@pytest.mark.parametrize("query", ["order=queue", "order=queue&status=failed"])
def test_only_what_is_pending_stands_in_a_line(client, query):
    answer = client.get(f"/tasks?{query}")
    assert answer.status_code == 400
    assert "status=pending" in answer.json["error"]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("status=done", "pending, processing, completed, failed"),
        ("status=", "pending, processing, completed, failed"),
        ("limit=0", "1 to 200"),
        ("limit=201", "1 to 200"),
        ("limit=ten", "1 to 200"),
        *((f"limit={text}", "1 to 200") for text in ("", "%2B1", "%201", "1.0", "1_0", "%D9%A3")),
        ("before=x", "next"),
        ("before=-1", "next"),
        ("before=", "next"),
        ("before=" + "9" * 30, "next"),
        ("before=1" + "0" * 18, "next"),
        ("status=pending&order=", "queue"),
        ("status=pending&order=newest", "queue"),
        ("error_code=nonsense", "upstream_auth, "),
        ("error_code=", "upstream_auth, "),
        *((f"q={text}", "words") for text in ("", "%20", "%09%0A", "%00", "x" * 1001)),
        ("state=failed", "status, model, error_code, q, order, limit, before"),
    ],
)
def test_a_bad_list_is_refused_by_name(client, query, words):
    answer = client.get(f"/tasks?{query}")
    assert answer.status_code == 400
    assert words in answer.json["error"]


def test_the_first_of_two_parameters_of_one_name_counts(client):
    ids = [submit(client) for _ in range(2)]
    answer = client.get("/tasks?limit=1&limit=none&before=" + "9" * 18)
    assert [task["id"] for task in answer.json["tasks"]] == ids[1:]


# One task with its calls


def test_a_task_tells_what_happened_call_by_call(serve, upstream):
    client = serve(RETRY_BACKOFF=0.01).client
    answers = iter([refusal(500, "no"), Answer(headers={"X-Chutes-InvocationID": "inv-2"})])
    upstream.decide = lambda fields: next(answers)
    task = finished(client, submit(client))
    answer = client.get(f"/tasks/{task['id']}").json
    calls = answer.pop("calls")
    assert answer == task
    assert [(c["number"], c["http_status"], c["outcome"], c["invocation_id"]) for c in calls] == [
        (1, 500, "upstream_error", None),
        (2, 200, "completed", "inv-2"),
    ]
    assert all(0 <= call["seconds"] < 30 for call in calls)
    assert all(datetime.strptime(call["started"], "%Y-%m-%d %H:%M:%S") for call in calls)


def test_an_unknown_task_is_404_everywhere(client):
    unknown = f"/tasks/{uuid.uuid4()}"
    for method, path in [
        ("GET", unknown),
        ("DELETE", unknown),
        ("POST", f"{unknown}/cancel"),
        ("POST", f"{unknown}/retry"),
    ]:
        answer = client.open(path, method=method)
        assert (answer.status_code, answer.json) == (404, {"error": "Task not found"})


# Waiting


@pytest.mark.parametrize("path", ["/status/{}", "/tasks/{}"])
def test_a_task_can_be_waited_for(paused, upstream, path):
    task_id = submit(paused)
    wait_until(lambda: upstream.at_once)
    upstream.gate.set()
    assert paused.get(path.format(task_id) + "?wait=60").json["status"] == "completed"


def test_a_wait_that_is_over_answers_as_without_one(paused, upstream):
    task_id = submit(paused)
    wait_until(lambda: upstream.at_once)
    answer = paused.get(f"/status/{task_id}?wait=1")
    assert (answer.status_code, answer.json["status"]) == (200, "processing")


def test_a_wait_for_a_task_that_is_deleted_ends(app, client):
    client.post("/queue/pause")
    task_id = submit(client)
    other = client.application.test_client()
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(other.get, f"/status/{task_id}?wait=60")
        wait_until(lambda: app.worker.waiters.count == 1)
        assert client.delete(f"/tasks/{task_id}").status_code == 204
        assert answer.result(10).status_code == 404


# Cancel


def test_a_pending_task_is_canceled_at_once(paused, upstream):
    submit(paused, "running")
    wait_until(lambda: upstream.at_once)
    task_id = submit(paused, "unwanted")
    answer = paused.post(f"/tasks/{task_id}/cancel")
    assert answer.status_code == 200
    assert (answer.json["status"], answer.json["error_code"]) == ("failed", "canceled")
    assert answer.json["finished_at"] and answer.json["error"]
    upstream.gate.set()
    finished(paused, submit(paused, "next"))
    assert "unwanted" not in upstream.prompts()


def test_a_cancel_cuts_the_call_that_is_under_way(paused, upstream, tmp_path):
    task_id = submit(paused, "unwanted")
    wait_until(lambda: upstream.at_once)
    answer = paused.post(f"/tasks/{task_id}/cancel")
    assert answer.status_code == 200
    assert (answer.json["status"], answer.json["error_code"]) == ("failed", "canceled")
    wait_until(lambda: upstream.cut == ["unwanted"])
    assert upstream.at_once == 0
    calls = paused.get(f"/tasks/{task_id}").json["calls"]
    assert [call["outcome"] for call in calls] == ["canceled"]
    assert list((tmp_path / "outputs").iterdir()) == []


def test_a_place_that_a_cancel_frees_is_used(paused, upstream):
    first = submit(paused, "unwanted")
    wait_until(lambda: upstream.at_once)
    submit(paused, "wanted")
    paused.post(f"/tasks/{first}/cancel")
    wait_until(lambda: upstream.prompts() == ["unwanted", "wanted"])


def test_an_ended_task_stays_as_it_is(client, upstream):
    task = finished(client, submit(client))
    answer = client.post(f"/tasks/{task['id']}/cancel")
    assert (answer.status_code, answer.json) == (200, task)
    bad = failed(client, upstream)
    assert client.post(f"/tasks/{bad['id']}/cancel").json == bad


def test_a_task_that_is_being_canceled_has_no_next_attempt(app, client, upstream, monkeypatch):
    def cancel_meanwhile(fields):
        app.database.cancel(task_id, time.time())
        return refusal(500, "try again")

    upstream.gate.clear()
    task_id = submit(client)
    wait_until(lambda: upstream.at_once)
    # The mark of the cancel without its cut: as if the answer had come at that instant.
    monkeypatch.setattr(app.database, "canceling", list)
    upstream.decide = cancel_meanwhile
    upstream.gate.set()
    assert finished(client, task_id)["error_code"] == "canceled"
    assert len(upstream.calls) == 1


def test_all_that_wait_are_canceled_at_once(paused, upstream):
    running = submit(paused)
    wait_until(lambda: upstream.at_once)
    ids = [submit(paused) for _ in range(3)]
    answer = paused.post("/tasks/cancel")
    assert (answer.status_code, answer.json) == (200, {"canceled": 3})
    tasks = [paused.get(f"/status/{task_id}").json for task_id in ids]
    assert {(task["status"], task["error_code"]) for task in tasks} == {("failed", "canceled")}
    assert all(task["finished_at"] and task["error"] for task in tasks)
    assert paused.get(f"/status/{running}").json["status"] == "processing"
    assert paused.post("/tasks/cancel").json == {"canceled": 0}
    upstream.gate.set()
    assert finished(paused, running)["status"] == "completed"


def test_a_cancel_can_be_narrowed_to_a_model(client):
    client.post("/queue/pause")
    ids = [submit(client, model=model) for model in "xyx"]
    assert client.post("/tasks/cancel?model=x").json == {"canceled": 2}
    statuses = [client.get(f"/status/{task_id}").json["status"] for task_id in ids]
    assert statuses == ["failed", "pending", "failed"]
    assert client.post("/tasks/cancel?model=x").json == {"canceled": 0}


@pytest.mark.parametrize(("query", "word"), [("model=", "model"), ("modle=x", "modle")])
def test_a_cancel_that_would_widen_in_silence_is_refused(client, query, word):
    client.post("/queue/pause")
    submit(client)
    answer = client.post(f"/tasks/cancel?{query}")
    assert answer.status_code == 400
    assert word in answer.json["error"]
    assert client.get("/queue").json["pending"] == 1


def test_ten_thousand_are_canceled_in_steps_between_which_others_write(serve, monkeypatch):
    app = serve(MAX_PENDING=20_000)
    client = app.client
    app.database.pause()
    rows.insert(app.database.path, "tasks", (rows.task(f"t{n}") for n in range(10_000)))
    step, added = app.database.cancel_pending, []

    def with_a_submit_in_between(*values):
        added.append(submit(client))
        return step(*values)

    monkeypatch.setattr(app.database, "cancel_pending", with_a_submit_in_between)
    assert client.post("/tasks/cancel").json == {"canceled": 10_000}
    assert len(added) > 10
    # What was submitted after the call began is another's.
    assert app.database.queue(time.time()).pending == len(added)
    assert app.database.check_counts()


def test_who_waits_for_what_is_canceled_is_woken(app, client):
    client.post("/queue/pause")
    ids = [submit(client), submit(client)]
    with ThreadPoolExecutor() as pool:
        answers = [
            pool.submit(client.application.test_client().get, f"/status/{task_id}?wait=60")
            for task_id in ids
        ]
        wait_until(lambda: app.worker.waiters.count == 2)
        client.post("/tasks/cancel")
        assert [answer.result(10).json["error_code"] for answer in answers] == ["canceled"] * 2


# Retry


def test_a_retry_is_a_new_task_with_the_same_input(client, upstream):
    upstream.decide = lambda fields: refusal(400, "no")
    old = finished(client, submit(client, "a fox", width=512, seed=4, priority=3, model="x"))
    upstream.decide = lambda fields: Answer()
    answer = client.post(f"/tasks/{old['id']}/retry")
    assert answer.status_code == 202
    assert list(answer.json) == ["id", "status", "message"]
    assert answer.headers["Location"] == f"/status/{answer.json['id']}"
    new = finished(client, answer.json["id"])
    same = ("prompt", "model", "params", "priority")
    assert [new[name] for name in same] == [old[name] for name in same]
    assert new["id"] != old["id"] and new["attempts"] == 1
    old_now = client.get(f"/status/{old['id']}").json
    assert old_now == {**old, "retried_as": new["id"]}
    assert (old["retry_of"], new["retry_of"]) == (None, old["id"])


def test_a_completed_task_can_be_made_again(client):
    task = finished(client, submit(client))
    assert client.post(f"/tasks/{task['id']}/retry").status_code == 202


def test_a_task_that_has_not_ended_is_not_retried(paused, upstream):
    tasks = [submit(paused), submit(paused)]
    wait_until(lambda: upstream.at_once)
    for task_id, status in zip(tasks, ("processing", "pending"), strict=True):
        answer = paused.post(f"/tasks/{task_id}/retry")
        assert (answer.status_code, answer.json["status"]) == (409, status)
    assert len(paused.get("/tasks").json["tasks"]) == 2


def test_all_that_failed_are_retried_once(serve, upstream):
    client = serve(CONCURRENCY=1, MAX_ATTEMPTS=1).client
    for n in range(3):
        failed(client, upstream, prompt=f"p{n}")
    upstream.decide = lambda fields: Answer(body=b"no image")
    assert finished(client, submit(client, "other"))["error_code"] == "not_an_image"
    upstream.decide = lambda fields: Answer()
    answer = client.post("/tasks/retry?error_code=upstream_rejected")
    assert (answer.status_code, answer.json) == (202, {"retried": 3})
    assert client.post("/tasks/retry?error_code=upstream_rejected").json == {"retried": 0}
    assert client.post("/tasks/retry").json == {"retried": 1}
    assert client.post("/tasks/retry").json == {"retried": 0}
    wait_until(lambda: len(upstream.calls) == 8)
    assert upstream.prompts()[-4:] == ["p0", "p1", "p2", "other"]
    tasks = {task["id"]: task for task in client.get("/tasks").json["tasks"]}
    retries = [task for task in tasks.values() if task["retry_of"]]
    assert len(retries) == 4
    assert all(tasks[task["retry_of"]]["retried_as"] == task["id"] for task in retries)


def test_what_fails_meanwhile_is_not_retried_for_ever(app, client, upstream, monkeypatch):
    failed(client, upstream)
    upstream.decide = lambda fields: refusal(400, "no")
    step = app.database.retry_failed

    def until_all_have_failed(*values, **options):
        retried = step(*values, **options)
        wait_until(lambda: client.get("/queue").json["pending"] == 0)
        wait_until(lambda: client.get("/queue").json["processing"] == 0)
        return retried

    monkeypatch.setattr(app.database, "retry_failed", until_all_have_failed)
    assert client.post("/tasks/retry").json == {"retried": 1}
    assert len(upstream.calls) == 2


def test_more_failures_than_one_step_takes_are_all_retried(app, client):
    app.database.pause()
    failed = {"status": "failed", "error_code": "expired"}
    tasks = (rows.task(f"t{n}", **failed) for n in range(1201))
    rows.insert(app.database.path, "tasks", tasks)
    assert client.post("/tasks/retry?error_code=expired").json == {"retried": 1201}


def test_what_was_canceled_is_retried_only_by_name(client, upstream):
    failed(client, upstream)
    client.post("/queue/pause")
    for _ in range(3):
        client.post(f"/tasks/{submit(client)}/cancel")
    assert client.post("/tasks/retry").json == {"retried": 1}
    assert client.post("/tasks/retry?error_code=canceled").json == {"retried": 3}
    assert client.post("/tasks/retry?error_code=canceled").json == {"retried": 0}


def test_what_would_be_retried_is_counted_before(serve, upstream):
    app = serve(MAX_ATTEMPTS=1)
    failed(app.client, upstream)
    upstream.decide = lambda fields: refusal(400, "no")
    assert finished(app.client, submit(app.client, model="another"))["status"] == "failed"
    app.client.post("/queue/pause")
    app.client.post(f"/tasks/{submit(app.client)}/cancel")

    def count(query=""):
        answer = app.client.get(f"/tasks/retry{query}")
        assert answer.status_code == 200
        return answer.json["count"]

    assert (count(), count("?error_code=canceled"), count("?error_code=expired")) == (2, 1, 0)
    app.restart(MAX_PENDING=1)
    assert count() == 1
    app.restart(MODELS="qwen-image", MAX_PENDING=9)
    assert (count(), count("?error_code=upstream_rejected")) == (1, 1)
    assert app.client.post("/tasks/retry").json == {"retried": 1}
    assert count() == 0
    assert app.client.get("/tasks/retry?code=x").status_code == 400


def test_what_would_be_canceled_is_counted_before(paused):
    paused.post("/queue/pause")
    for model in ("a", "b", "b"):
        submit(paused, model=model)

    def count(query=""):
        answer = paused.get(f"/tasks/cancel{query}")
        assert answer.status_code == 200
        return answer.json["count"]

    assert (count(), count("?model=b"), count("?model=c")) == (3, 2, 0)
    assert paused.post("/tasks/cancel?model=b").json == {"canceled": 2}
    assert (count(), count("?model=b")) == (1, 0)
    assert paused.get("/tasks/cancel?model=").status_code == 400


def test_the_queue_shows_what_runs_and_what_is_next(serve, upstream):
    upstream.gate.clear()
    client = serve(CONCURRENCY=2, SHUTDOWN_GRACE=0).client
    first = [submit(client, f"running {n}") for n in range(2)]
    wait_until(lambda: client.get("/queue").json["processing"] == 2)
    late, soon = submit(client, "late"), submit(client, "soon", priority=1)
    told = client.get("/queue?tasks=1").json
    assert {task["id"] for task in told.pop("running")} == set(first)
    assert [task["id"] for task in told.pop("next")] == [soon]
    assert told.keys() == client.get("/queue").json.keys()
    both = client.get("/queue?tasks=200").json["next"]
    assert [(task["id"], task["queue_position"]) for task in both] == [(soon, 1), (late, 2)]
    for query in ("tasks=0", "tasks=201", "tasks=", "tasks=x", "limit=1"):
        assert client.get(f"/queue?{query}").status_code == 400


@pytest.mark.parametrize("query", ["error_code=nonsense", "error_code=", "code=expired"])
def test_an_unknown_error_code_is_refused(client, upstream, query):
    failed(client, upstream)
    answer = client.post(f"/tasks/retry?{query}")
    assert answer.status_code == 400
    assert "error_code" in answer.json["error"]
    assert client.post("/tasks/retry").json == {"retried": 1}


# Delete


def test_a_deleted_task_is_gone_with_its_files(client, tmp_path):
    task = finished(client, submit(client))
    client.get(f"/images/{task['id']}/thumbnail")
    answer = client.delete(f"/tasks/{task['id']}")
    assert (answer.status_code, answer.data) == (204, b"")
    assert client.get(f"/status/{task['id']}").status_code == 404
    assert client.get(f"/images/{task['id']}").status_code == 404
    files = [file for file in (tmp_path / "outputs").rglob("*") if file.is_file()]
    assert files == []


def test_a_pending_task_can_be_deleted(paused, upstream):
    submit(paused)
    wait_until(lambda: upstream.at_once)
    task_id = submit(paused, "unwanted")
    assert paused.delete(f"/tasks/{task_id}").status_code == 204
    upstream.gate.set()
    finished(paused, submit(paused))
    assert "unwanted" not in upstream.prompts()


def test_a_task_under_way_is_not_deleted(paused, upstream):
    task_id = submit(paused)
    wait_until(lambda: upstream.at_once)
    answer = paused.delete(f"/tasks/{task_id}")
    assert (answer.status_code, answer.json["status"]) == (409, "processing")
    upstream.gate.set()
    assert finished(paused, task_id)["status"] == "completed"


def test_who_comes_second_to_delete_or_retry_is_told_that_it_is_gone(app, client, monkeypatch):
    task = finished(client, submit(client))
    for name, method, path in (("get", "DELETE", ""), ("get", "POST", "/retry")):
        known, looks = getattr(app.database, name), []

        def slow(task_id, known=known, looks=looks):
            found = known(task_id)
            if not looks.append(1) and len(looks) == 1:
                app.database.delete(task_id, 0)
            return found

        monkeypatch.setattr(app.database, name, slow)
        answer = client.open(f"/tasks/{task['id']}{path}", method=method)
        monkeypatch.undo()
        assert (answer.status_code, answer.json) == (404, {"error": "Task not found"})
        task = finished(client, submit(client))


def test_a_death_between_row_and_files_leaves_no_file(app):
    task = finished(app.client, submit(app.client))
    app.worker.stop()
    assert app.database.delete(task["id"], 0)
    assert Path(task["file_path"]).exists()
    app.restart()
    finished(app.client, submit(app.client))
    assert not Path(task["file_path"]).exists()


# The queue


def test_the_queue_tells_how_it_stands(serve, upstream):
    upstream.gate.clear()
    client = serve(CONCURRENCY=2, RATE_LIMIT="90/60", SHUTDOWN_GRACE=0).client
    assert client.get("/queue").json == {
        "pending": 0,
        "processing": 0,
        "paused": False,
        "pause_reason": None,
        "concurrency": 2,
        "rate_limit": "90/60",
        "oldest_pending_seconds": None,
        "calls_today": 0,
        "held": [],
        "quota": None,
    }
    for _ in range(5):
        submit(client)
    wait_until(lambda: upstream.at_once == 2)
    queue = client.get("/queue").json
    assert (queue["pending"], queue["processing"], queue["calls_today"]) == (3, 2, 2)
    assert queue["oldest_pending_seconds"] in range(30)


def test_a_paused_queue_starts_nothing_until_it_is_resumed(client, upstream):
    answer = client.post("/queue/pause")
    assert answer.status_code == 200
    assert (answer.json["paused"], answer.json["pause_reason"]) == (True, None)
    assert answer.json == client.get("/queue").json
    task_id = submit(client)
    task = client.get(f"/status/{task_id}?wait=1").json
    assert (task["status"], task["waiting_for"]) == ("pending", "the queue is paused")
    assert upstream.calls == []
    answer = client.post("/queue/resume")
    assert (answer.status_code, answer.json["paused"]) == (200, False)
    assert (answer.json["failed_meanwhile"], answer.json["retry"]) == (0, None)
    assert list(answer.json) == [*client.get("/queue").json, "failed_meanwhile", "retry"]
    assert finished(client, task_id)["status"] == "completed"


@pytest.mark.parametrize(("status", "code"), [(401, "upstream_auth"), (402, "upstream_payment")])
@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_resume_tells_what_failed_meanwhile_and_how_to_retry_it(
    serve, upstream, status, code, is_restarted
):
    upstream.gate.clear()
    upstream.decide = lambda fields: refusal(status, "no")
    app = serve(CONCURRENCY=3)
    ids = [submit(app.client) for _ in range(5)]
    wait_until(lambda: upstream.at_once == 3)
    app.database.pause()  # A person is first, and finds that much under way.
    upstream.gate.set()
    assert [finished(app.client, task_id)["error_code"] for task_id in ids[:3]] == [code] * 3
    upstream.decide = lambda fields: Answer()
    if is_restarted:
        app.restart()
    answer = app.client.post("/queue/resume").json
    retry = f"/tasks/retry?error_code={code}"
    assert (answer["failed_meanwhile"], answer["retry"]) == (3, retry)
    assert app.client.post(answer["retry"]).json == {"retried": 3}
    assert finished(app.client, ids[4])["status"] == "completed"
    answer = app.client.post("/queue/resume").json
    assert (answer["failed_meanwhile"], answer["retry"]) == (0, None)


def test_what_failed_before_a_restart_with_a_token_that_is_right_is_told_too(app, upstream):
    upstream.decide = lambda fields: refusal(401, "Invalid token.")
    finished(app.client, submit(app.client))
    upstream.decide = lambda fields: Answer()
    app.restart()
    assert finished(app.client, submit(app.client))["status"] == "completed"
    answer = app.client.post("/queue/resume").json
    assert (answer["failed_meanwhile"], answer["retry"]) == (
        1,
        "/tasks/retry?error_code=upstream_auth",
    )


def test_a_model_that_the_token_may_not_use_is_no_cause_of_a_pause(client, upstream):
    upstream.decide = lambda fields: refusal(403, "no")
    assert finished(client, submit(client))["error_code"] == "upstream_auth"
    answer = client.post("/queue/resume").json
    assert (answer["failed_meanwhile"], answer["retry"]) == (0, None)


def test_a_pause_outlives_a_restart(app, upstream):
    app.client.post("/queue/pause")
    app.restart()
    task_id = submit(app.client)
    assert app.client.get(f"/status/{task_id}?wait=1").json["waiting_for"] == "the queue is paused"
    assert app.client.get("/queue").json["paused"] is True
    assert upstream.calls == []


def test_a_resume_lifts_a_pause_of_the_queues_own(client, upstream):
    upstream.decide = lambda fields: refusal(401, "Invalid token.")
    assert finished(client, submit(client))["error_code"] == "upstream_auth"
    queue = client.get("/queue").json
    assert (queue["paused"], queue["pause_reason"]) == (
        True,
        "Chutes refused the API token (401)",
    )
    task_id = submit(client)
    waits = client.get(f"/status/{task_id}").json["waiting_for"]
    assert waits == "the queue is paused: Chutes refused the API token (401)"
    upstream.decide = lambda fields: Answer()
    client.post("/queue/resume")
    assert finished(client, task_id)["status"] == "completed"


def test_the_queues_own_pause_does_not_replace_a_persons(client, upstream):
    upstream.gate.clear()
    upstream.decide = lambda fields: refusal(401, "Invalid token.")
    task_id = submit(client)
    wait_until(lambda: upstream.at_once)
    client.post("/queue/pause")
    upstream.gate.set()
    assert finished(client, task_id)["error_code"] == "upstream_auth"
    queue = client.get("/queue").json
    assert (queue["paused"], queue["pause_reason"]) == (True, None)


def test_a_canceled_call_does_not_count(paused, upstream):
    task_id = submit(paused)
    wait_until(lambda: upstream.at_once)
    assert paused.post(f"/tasks/{task_id}/cancel").json["attempts"] == 0


def test_what_is_held_is_told(client, upstream):
    upstream.decide = lambda fields: refusal(429, "later", Retry_After="600")
    task_id = submit(client, model="x")
    (held,) = wait_until(lambda: client.get("/queue").json["held"])
    assert (held["model"], held["reason"]) == ("x", "Chutes has no free capacity for x")
    until = datetime.strptime(held["until"], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    assert 500 < until.timestamp() - time.time() <= 600
    assert client.get(f"/status/{task_id}").json["waiting_for"].startswith(held["reason"])


def test_a_hold_of_all_is_told_as_such(client, upstream):
    reset = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=5)
    detail = {"message": "Quota", "quota_reset_timestamp": reset.isoformat()}
    upstream.decide = lambda fields: refusal(402, detail)
    submit(client)
    (held,) = wait_until(lambda: client.get("/queue").json["held"])
    assert (held["model"], held["until"]) == (ALL_MODELS, f"{reset:%Y-%m-%d %H:%M:%S}")


@pytest.mark.parametrize(
    ("values", "quota"),
    [
        (("300", "12", "288"), {"total": 300, "used": 12, "remaining": 288}),
        (("300", "1.5", "298.5"), {"total": 300, "used": 1.5, "remaining": 298.5}),
        (("300", "12", "<script>"), None),
        (("", "", ""), None),
    ],
)
def test_the_quota_is_what_chutes_said_last(client, upstream, values, quota):
    names = ("X-Chutes-Quota-Total", "X-Chutes-Quota-Used", "X-Chutes-Quota-Remaining")
    upstream.decide = lambda fields: Answer(headers=dict(zip(names, values, strict=True)))
    finished(client, submit(client))
    assert client.get("/queue").json["quota"] == quota


def test_every_answer_is_json_with_a_newline(client):
    task_id = submit(client)
    for method, path in [
        ("GET", "/tasks"),
        ("GET", f"/tasks/{task_id}"),
        ("POST", f"/tasks/{task_id}/cancel"),
        ("POST", "/tasks/retry"),
        ("POST", "/tasks/cancel"),
        ("GET", "/queue"),
        ("POST", "/queue/pause"),
        ("POST", "/queue/resume"),
    ]:
        answer = client.open(path, method=method)
        assert json.loads(answer.data) is not None
        assert answer.data.endswith(b"}\n")


def test_a_line_of_a_form_ends_as_it_was_typed(client):
    """A browser sends both signs for the end of a line."""
    data = {"prompt": "a fox\r\nat night", "images": io.BytesIO(image_bytes())}
    answer = client.post("/edit", data=data, content_type="multipart/form-data")
    assert client.get(answer.headers["Location"]).json["prompt"] == "a fox\nat night"
