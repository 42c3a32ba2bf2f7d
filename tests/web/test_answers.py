"""What goes out: the text of each answer, and rows that no model foresaw."""

from conftest import finished, submit

from web.answers import Call, Quota


def test_the_text_is_compact_and_every_letter_is_itself(client):
    task_id = submit(client, "füchse 🦊")
    text = client.get(f"/status/{task_id}").text
    assert text.startswith(f'{{"id":"{task_id}","prompt":"füchse 🦊","status":"')
    assert text.endswith("}\n")


def test_a_whole_number_of_the_quota_is_shown_as_such():
    text = Quota(total=300, used=1.5, remaining=298.5).response().get_data(as_text=True)
    assert text == '{"total":300,"used":1.5,"remaining":298.5}\n'


def test_a_row_that_is_not_as_documented_is_shown_with_the_others(client):
    ids = [finished(client, submit(client))["id"] for _ in range(2)]
    with client.application.extensions["database"]._write() as connection:
        connection.execute(
            "UPDATE tasks SET created_at = 'long ago', error_code = 'new', width = -1 WHERE id = ?",
            ids[:1],
        )
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
