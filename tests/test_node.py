"""The Node server's database is taken over: its tasks as they were, its files as they lie."""

import os
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

import pytest
from conftest import finished, submit
from old_databases import KEYS, NODE_TABLE, node, node_rows, read_all
from upstream import image_bytes

import db
import outputs
from db import Database, DatabaseError
from images import Decoder

NAMES = ", ".join(KEYS)
ENDED = "status IN ('completed', 'failed')"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks.sqlite3"


@pytest.fixture
def take_over(serve, path, tmp_path):
    """Return a maker of an application over a Node server's rows; `files` are in OUTPUT_DIR."""

    def make(*rows, files=None, **values):
        node(path, rows)
        for name, data in (files or {}).items():
            file = tmp_path / "outputs" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return serve(**values)

    return make


def taken_over(path, *rows, **values):
    """Take a database of these rows over, and return its tasks in their order."""
    node(path, rows, **values)
    database = Database(path)
    tasks = database.list_tasks(None, None, None, 200)[::-1]
    assert database.check_counts()
    database.close()
    return tasks


# The rows


def test_a_hundred_thousand_tasks_are_there_as_they_were(path):
    node(path, node_rows(100_000))
    before = read_all(path, f"tasks WHERE {ENDED}", NAMES)
    Database(path).close()
    after = read_all(path, "tasks WHERE error_code IS NOT 'interrupted'", NAMES)
    assert (len(before), after) == (66_668, before)
    counts = read_all(path, "tasks GROUP BY 1, 2", "status, error_code, count(*)")
    assert counts == [
        ("completed", None, 33_334),
        ("failed", "interrupted", 33_332),
        ("failed", "upstream_error", 33_334),
    ]
    assert read_all(path, "pragma_user_version") == [(db.VERSION,)]
    assert read_all(path, "pragma_integrity_check") == [("ok",)]


def test_a_copy_is_kept_as_the_node_server_left_it(path):
    node(path, node_rows(6))
    before = read_all(path, "tasks")
    Database(path).close()
    copy = f"{path}.version-0"
    assert read_all(copy, "tasks") == before
    assert read_all(copy, "pragma_user_version") == [(0,)]


def test_a_copy_that_was_kept_before_is_replaced(path):
    copy = Path(f"{path}.version-0")
    copy.write_text("of another file")
    node(path, node_rows(6))
    Database(path).close()
    assert len(read_all(copy, "tasks")) == 6


def test_the_tables_are_those_of_a_new_database(path, tmp_path):
    node(path, node_rows(6))
    new = tmp_path / "new.sqlite3"
    for each in (path, new):
        Database(each).close()
    tables = [read_all(each, "sqlite_schema", "type, name, sql") for each in (path, new)]
    assert tables[0] == tables[1]


def test_a_task_has_what_the_node_server_did_not_know(path):
    (task,) = taken_over(path, {"id": "a", "file_path": "outputs/a.png"})
    assert (task.model, task.params, task.priority) == ("qwen-image", {}, 0)
    assert (task.attempts, task.calls, task.error_code) == (0, 0, None)
    assert task.finished_at == "2025-05-28 12:00:00"


@pytest.mark.parametrize("status", ["pending", "processing", "queued", "", None, b"completed"])
def test_what_had_not_ended_is_interrupted(path, status):
    (task,) = taken_over(path, {"id": "a", "status": status, "error": "its own words"})
    assert (task.status, task.error_code) == ("failed", "interrupted")
    assert "retry the task" in task.error
    assert task.last_error == "its own words"
    assert task.finished_at > "2026", "it ends now"


def test_the_newest_are_the_last(path):
    tasks = taken_over(path, *({"id": name} for name in "zay"))
    assert [task.id for task in tasks] == ["z", "a", "y"]


PROMPTS = [
    (None, ""),
    ("", ""),
    ("fuchs \N{FOX FACE}\0'\"; DROP TABLE tasks", "fuchs \N{FOX FACE}\0'\"; DROP TABLE tasks"),
    (b"bytes \xff", "bytes \N{REPLACEMENT CHARACTER}"),
    (7, "7"),
    ("x" * 1_000_000, "x" * 1_000_000),
]


@pytest.mark.parametrize(("prompt", "shown"), PROMPTS, ids=range(len(PROMPTS)))
def test_a_prompt_may_be_anything(path, prompt, shown):
    (task,) = taken_over(path, {"id": "a", "prompt": prompt})
    assert task.prompt == shown


def test_text_that_is_none_is_read_all_the_same(path):
    node(path, [{"id": "a"}])
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE tasks SET prompt = CAST(x'61ff62' AS TEXT), error = prompt")
    database = Database(path)
    assert database.get("a").prompt == "a\N{REPLACEMENT CHARACTER}b"
    database.close()


@pytest.mark.parametrize("encoding", ["UTF-8", "UTF-16le", "UTF-16be"])
def test_a_database_in_any_encoding(path, encoding):
    (task,) = taken_over(path, {"id": "a", "prompt": "füchse \N{FOX FACE}"}, encoding=encoding)
    assert (task.prompt, task.created_at) == ("füchse \N{FOX FACE}", "2025-05-28 12:00:00")


def test_no_task_is_lost_that_has_no_id_of_its_own(path):
    script = NODE_TABLE.replace("id TEXT PRIMARY KEY", "id")
    ids = [None, None, "", 1, "1", "a/b", "1.5"]
    tasks = taken_over(path, *({"id": id} for id in ids), script=script)
    assert [task.id for task in tasks[3:]] == ["1", tasks[4].id, "a/b", "1.5"]
    made = {task.id for task in (*tasks[:3], tasks[4])}
    assert len(made) == 4 and all(uuid.UUID(name) for name in made)


TIMES = [
    ("2025-05-28 12:00:00", "2025-05-28 12:00:00"),
    ("2025-05-28T12:00:00.123Z", "2025-05-28 12:00:00"),
    ("2025-05-28T14:00:00+02:00", "2025-05-28 12:00:00"),
    (1748433600123, "2025-05-28 12:00:00"),
    (1748433600, "2025-05-28 12:00:00"),
]


@pytest.mark.parametrize(("time", "shown"), TIMES)
def test_a_time_is_written_as_ours(path, time, shown):
    (task,) = taken_over(path, {"id": "a", "created_at": time, "updated_at": time})
    assert [task.created_at, task.updated_at, task.finished_at] == [shown] * 3


@pytest.mark.parametrize("time", [None, "", "yesterday", 1e300, b"\xff"])
def test_a_time_that_is_none_is_the_other_one_or_now(path, time):
    both, created = taken_over(
        path,
        {"id": "both", "created_at": time, "updated_at": time},
        {"id": "created", "updated_at": time},
    )
    assert created.updated_at == created.created_at == "2025-05-28 12:00:00"
    assert both.created_at == both.updated_at > "2026"


def test_what_lies_beside_the_tasks_stays(path):
    script = f"""
      {NODE_TABLE}
      CREATE INDEX tasks_status ON tasks (status);
      CREATE TRIGGER tasks_changed AFTER UPDATE ON tasks BEGIN
        UPDATE tasks SET updated_at = CURRENT_TIMESTAMP WHERE id = new.id;
      END;
      CREATE TABLE users (name TEXT, task TEXT REFERENCES tasks (id));
      INSERT INTO users VALUES ('fox', 'a');
      CREATE VIEW done AS SELECT id FROM tasks WHERE status = 'completed';
    """
    taken_over(path, {"id": "a"}, script=script)
    assert read_all(path, "users") == [("fox", "a")]
    assert read_all(path, "done", "id, 1") == [("a", 1)]


@pytest.mark.parametrize("change", ["DROP COLUMN error", "ADD COLUMN seq INTEGER"])
def test_a_table_of_another_program_is_refused(path, change):
    node(path, [], script=NODE_TABLE)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"ALTER TABLE tasks {change}")
    with pytest.raises(DatabaseError, match="made by another program"):
        Database(path)
    assert read_all(path, "pragma_user_version") == [(0,)]
    assert [file.name for file in path.parent.glob("*.version-*")] == []


def test_a_task_can_be_retried(take_over, upstream):
    client = take_over({"id": "a", "status": "failed", "error": "e"}).client
    assert client.post("/tasks/a/retry").status_code == 202
    task = finished(client, client.get("/tasks/a").json["retried_as"])
    assert task["status"] == "completed"
    (call,) = upstream.calls
    assert call == {"model": "qwen-image", "prompt": "a red fox"}


# The files


def png(**values):
    return image_bytes("PNG", (64, 48), **values)


def test_a_file_is_shown_as_what_it_is(take_over):
    rows = [{"id": n, "file_path": f"outputs/{n}.png"} for n in ("a", "b", "gone", "none")]
    rows[3]["file_path"] = None
    jpeg = image_bytes("JPEG", (32, 16))
    client = take_over(*rows, files={"a.png": png(), "b.png": jpeg}).client
    tasks = {task["id"]: task for task in client.get("/tasks").json["tasks"]}
    a, b = tasks["a"]["image"], tasks["b"]["image"]
    assert (a["content_type"], a["bytes"], a["width"], a["height"]) == (
        *("image/png", len(png()), 64, 48),
    )
    assert (b["content_type"], b["width"]) == ("image/jpeg", 32)
    assert tasks["gone"]["image"] is tasks["none"]["image"] is None
    assert tasks["a"]["file_path"] == "outputs/a.png"
    answer = client.get("/images/b")
    assert (answer.status_code, answer.data, answer.mimetype) == (200, jpeg, "image/jpeg")
    assert client.get("/images/b.png").headers["ETag"] == f'"{b["sha256"]}"'
    assert client.get("/images/a/thumbnail").status_code == 200
    for name in ("gone", "none"):
        answer = client.get(f"/images/{name}")
        assert (answer.status_code, answer.json["status"]) == (410, "completed")


def test_a_file_is_read_once_also_where_its_image_is_asked_for_first(take_over, monkeypatch):
    reads, inspect = [], Decoder.inspect
    monkeypatch.setattr(
        Decoder, "inspect", lambda *args: reads.append(args[1].name) or inspect(*args)
    )
    rows = [{"id": "a", "file_path": "a.png"}, {"id": "cut", "file_path": "cut.png"}]
    app = take_over(*rows, files={"a.png": png(), "cut.png": png()[:-10]})
    assert app.client.get("/images/a").status_code == 200
    for _ in range(2):
        tasks = app.client.get("/tasks").json["tasks"]
        assert [task["image"] is None for task in tasks] == [True, False]
        assert app.client.get("/images/cut").status_code == 410
        app.restart()
    assert sorted(reads) == ["a.png", "cut.png"]


def test_a_file_that_becomes_whole_is_read_again(take_over, tmp_path):
    app = take_over({"id": "a", "file_path": "a.png"}, files={"a.png": png()[:-10]})
    assert app.client.get("/status/a").json["image"] is None
    (tmp_path / "outputs" / "a.png").write_bytes(png())
    assert app.client.get("/status/a").json["image"]["bytes"] == len(png())


def test_what_cannot_be_kept_is_shown_all_the_same(take_over, monkeypatch):
    def fail(*args):
        raise DatabaseError("full")

    app = take_over({"id": "a", "file_path": "a.png"}, files={"a.png": png()})
    monkeypatch.setattr(app.database, "keep_image_facts", fail)
    assert app.client.get("/status/a").json["image"]["width"] == 64


def outside(tmp_path):
    file = tmp_path / "outside.png"
    file.write_bytes(png())
    return file


def link(tmp_path):
    (tmp_path / "outputs" / "link.png").symlink_to(outside(tmp_path))
    return "outputs/link.png"


def linked_folder(tmp_path):
    (tmp_path / "outputs" / "folder").symlink_to(outside(tmp_path).parent)
    return "outputs/folder/outside.png"


def fifo(tmp_path):
    os.mkfifo(tmp_path / "outputs" / "fifo.png")
    return "outputs/fifo.png"


OUTSIDE = {
    "absolute": lambda tmp_path: str(outside(tmp_path)),
    "relative": lambda tmp_path: f"outputs/../{outside(tmp_path).name}",
    "link": link,
    "linked folder": linked_folder,
    "no file": fifo,
    "folder": lambda tmp_path: "outputs",
    "no name": lambda tmp_path: "outputs/\0",
    "too long": lambda tmp_path: "x" * 5000,
}


@pytest.mark.parametrize("where", OUTSIDE)
def test_only_a_file_in_output_dir_is_served_or_deleted(take_over, tmp_path, where):
    (tmp_path / "outputs").mkdir()
    file_path = OUTSIDE[where](tmp_path)
    app = take_over({"id": "a", "file_path": file_path})
    before = sorted(tmp_path.rglob("*.png"))
    task = app.client.get("/status/a").json
    assert (task["file_path"], task["image"]) == (file_path, None)
    for url in ("/images/a", "/images/a.png", "/images/a/thumbnail"):
        assert app.client.get(url).status_code == 410
    assert app.client.delete("/tasks/a").status_code == 204
    assert sorted(tmp_path.rglob("*.png")) == before


@pytest.mark.parametrize(
    "file_path", ["outputs/of/a.png", "/somewhere/else/b.png", "./outputs/b.png"]
)
def test_a_file_in_output_dir_is_found_and_deleted(take_over, tmp_path, file_path):
    files = {"of/a.png": png(), "b.png": png()}
    client = take_over({"id": "x", "file_path": file_path}, files=files).client
    assert client.get("/images/x").data == png()
    assert client.delete("/tasks/x").status_code == 204
    left = [file.name for file in (tmp_path / "outputs").rglob("*.png")]
    assert left == sorted({"a.png", "b.png"} - {Path(file_path).name})


def test_a_file_of_ours_in_a_folder_that_was_output_dir_is_left_alone(app, tmp_path):
    task = finished(app.client, submit(app.client))
    app.restart(OUTPUT_DIR="elsewhere")
    assert app.client.get(f"/images/{task['id']}").status_code == 410
    assert app.client.delete(f"/tasks/{task['id']}").status_code == 204
    assert Path(task["file_path"]).exists()


def test_a_final_name_that_is_a_link_completes_no_orphan(configure, tmp_path):
    config = configure()
    (config.output_dir / "t.png").symlink_to(outside(tmp_path))
    assert list(outputs.finished_paths(config, "t")) == []


def test_a_file_that_another_row_names_stays(take_over, tmp_path):
    rows = [
        {"id": "a", "file_path": "outputs/shared.png"},
        {"id": "b", "file_path": "/app/outputs/shared.png"},
        {"id": "c", "file_path": "outputs/a.png"},
    ]
    app = take_over(*rows, files={"shared.png": png(), "a.png": png()})
    folder = tmp_path / "outputs"
    app.client.delete("/tasks/a")
    assert sorted(file.name for file in folder.glob("*.png")) == ["a.png", "shared.png"]
    app.client.delete("/tasks/b")
    assert [file.name for file in folder.glob("*.png")] == ["a.png"]
    app.client.delete("/tasks/c")
    assert list(folder.glob("*.png")) == []


def test_a_death_between_row_and_file_leaves_no_file(take_over, tmp_path):
    app = take_over({"id": "a", "file_path": "outputs/of-a.jpeg"}, files={"of-a.jpeg": png()})
    assert app.database.delete("a", 0)
    app.restart()
    finished(app.client, submit(app.client))
    assert not (tmp_path / "outputs" / "of-a.jpeg").exists()


def test_retention_holds_for_them(make, tmp_path, path):
    files = {"in": tmp_path / "outputs" / "in.png", "out": tmp_path / "out.png"}
    (tmp_path / "outputs").mkdir()
    for file in files.values():
        file.write_bytes(png())
    node(path, [{"id": name, "file_path": str(file)} for name, file in files.items()])
    q = make(RETENTION_DAYS=1).start()
    q.until(q.add(), status="completed")
    q.clock.now += 61
    q.until(q.add(), status="completed")
    assert q.task("in") is q.task("out") is None
    assert [file.exists() for file in files.values()] == [False, True]


IDS = ["1748433600123.5", "a b", "x" * 300, "\0", "ü", ".."]


@pytest.mark.parametrize("id", IDS, ids=range(len(IDS)))
def test_any_id_has_its_image(take_over, id):
    app = take_over({"id": id, "file_path": "o/a.png"}, files={"a.png": png()})
    (task,) = app.client.get("/tasks").json["tasks"]
    if id != "..":  # No address can say it: clients take it for a step up.
        assert app.client.get(task["image"]["url"]).data == png()
        assert app.client.get(f"{task['image']['url']}/thumbnail").status_code == 200
    assert app.worker.delete(app.database.get(id))


def test_an_id_that_looks_like_a_path_deletes_nothing_outside(take_over, tmp_path):
    app = take_over({"id": "../outside"}, files={"a.png": png()})
    file = outside(tmp_path)
    assert app.worker.delete(app.database.get("../outside"))
    assert file.exists()


def test_a_name_is_no_header_of_its_own(take_over):
    name = 'a"\r\nSet-Cookie: x=ü.png'
    client = take_over({"id": "a", "file_path": f"outputs/{name}"}, files={name: png()}).client
    answer = client.get("/images/a")
    assert (answer.status_code, answer.data) == (200, png())
    assert answer.headers["Content-Disposition"] == 'inline; filename="a___Set-Cookie__x__.png"'
