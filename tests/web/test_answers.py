"""What goes out: the text of each answer, rows that no model foresaw, and why a task waits."""

from dataclasses import replace
from datetime import UTC, datetime

import rows
from conftest import finished, submit

from records import ALL_MODELS, Hold, QueueView
from web.answers import Call, Quota, waiting_for


def test_the_text_is_compact_and_every_letter_is_itself(client):
    task_id = submit(client, "füchse 🦊")
    text = client.get(f"/status/{task_id}").text
    assert text.startswith(f'{{"id":"{task_id}","prompt":"füchse 🦊","status":"')
    assert text.endswith("}\n")


def test_a_whole_number_of_the_quota_is_shown_as_such():
    text = Quota(total=300, used=1.5, remaining=298.5).response().get_data(as_text=True)
    assert text == '{"total":300,"used":1.5,"remaining":298.5}\n'


def test_a_row_that_is_not_as_documented_is_shown_with_the_others(app, client):
    ids = [finished(client, submit(client))["id"] for _ in range(2)]
    odd = "UPDATE tasks SET created_at = 'long ago', error_code = 'new', width = -1 WHERE id = ?"
    rows.write(app.database.path, odd, ids[:1])
    second, first = client.get("/tasks").json["tasks"]
    assert (second["id"], first["id"]) == (ids[1], ids[0])
    assert (first["created_at"], first["error_code"]) == ("long ago", "new")
    assert first["image"]["width"] == -1


def test_what_a_record_knows_more_is_not_shown():
    class Record:
        def __init__(self):
            self.number, self.started, self.secret = 1, "2026-11-22 17:25:59", "s"

    assert Call.of(Record(), outcome="completed").response().json == {
        "number": 1,
        "started": "2026-11-22 17:25:59",
        "outcome": "completed",
    }


# Why a task waits


def reason(q, task, **values):
    queue_view = QueueView(0, 0, False, None, (), None)
    return waiting_for(task, replace(queue_view, **values), q.config, q.clock())


def test_a_time_gone_by_is_no_reason(make, clock):
    q = make(clock=clock, CONCURRENCY=4)
    task = replace(q.task(q.add()), not_before=clock.now, attempts=1, last_error="it broke")
    due = (Hold("m", "Chutes has no free capacity for m", clock.now, 5, 0, None),)
    assert reason(q, task, holds=due, processing=4) == "all 4 places are busy"
    probed = (replace(due[0], probe="another"),)
    said = "Chutes has no free capacity for m; one task is trying now"
    assert reason(q, task, holds=probed, processing=4) == said


def test_the_first_thing_that_would_have_to_change_is_named(make, clock):
    q = make(clock=clock, CONCURRENCY=4, RATE_LIMIT="60/60")
    soon = clock.now + 60
    task = replace(q.task(q.add()), not_before=soon, attempts=1, last_error="it broke")
    holds = (Hold(ALL_MODELS, "Chutes' daily quota is used up", soon, 5, 0, None),)
    facts = {
        "paused": True,
        "pause_reason": "Chutes refused the API token (401)",
        "holds": holds,
        "next_start": soon,
        "ahead": 2,
        "processing": 4,
    }
    said = [reason(q, task, **facts)]
    facts["pause_reason"] = None
    said.append(reason(q, task, **facts))
    facts["paused"] = False
    said.append(reason(q, task, **facts))
    facts["holds"] = ()
    said.append(reason(q, task, **facts))
    task = replace(task, not_before=None)
    said.append(reason(q, task, **facts))
    facts["next_start"] = None
    said.append(reason(q, task, **facts))
    facts["ahead"] = 1001
    said.append(reason(q, task, **facts))
    facts["ahead"] = 0
    said.append(reason(q, task, **facts))
    low = waiting_for(task, QueueView(0, 0, False, None, holds, soon), q.config, clock.now, True)
    assert low == "less than 200 MB are free on the disk (MIN_FREE_MB)"
    low = waiting_for(task, QueueView(0, 0, True, None, holds, soon), q.config, clock.now, True)
    assert low == "the queue is paused"
    at = datetime.fromtimestamp(soon, UTC)
    assert said == [
        "the queue is paused: Chutes refused the API token (401)",
        "the queue is paused",
        f"Chutes' daily quota is used up; next try at {at:%Y-%m-%d %H:%M:%S} UTC",
        f"attempt 2 of 3 at {at:%H:%M:%S} UTC, after: it broke",
        f"the rate limit of 60 in 60 s; next start at {at:%H:%M:%S} UTC",
        "2 tasks ahead",
        "more than 1000 tasks ahead",
        "all 4 places are busy",
    ]
