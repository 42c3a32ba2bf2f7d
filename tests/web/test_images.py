"""The pictures over HTTP: whole, in parts, from a cache, small, or why not."""

import hashlib
import io
import uuid
from pathlib import Path

import pytest
from conftest import finished, submit, wait_until
from PIL import Image
from upstream import Answer, image_bytes, refusal


@pytest.fixture
def made(client, upstream):
    """Return a finished task and the bytes of its picture."""
    data = image_bytes("JPEG", (1600, 900))
    upstream.decide = lambda fields: Answer(body=data)
    return finished(client, submit(client)), data


def test_a_picture_is_served_as_it_came(client, made):
    task, data = made
    for path in (task["image"]["url"], f"/images/{task['id']}.jpg"):
        answer = client.get(path)
        assert (answer.status_code, answer.data) == (200, data)
        assert answer.content_type == "image/jpeg"
        assert answer.headers["Content-Disposition"] == f'inline; filename="{task["id"]}.jpg"'
        assert answer.headers["ETag"] == f'"{hashlib.sha256(data).hexdigest()}"'
        assert answer.headers["Cache-Control"] == "private, max-age=31536000, immutable"
        assert answer.headers["Content-Length"] == str(len(data))
        assert answer.headers["Accept-Ranges"] == "bytes"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(("kind", "type_"), [("PNG", "image/png"), ("WEBP", "image/webp")])
def test_the_content_type_is_the_true_one(client, upstream, kind, type_):
    data = image_bytes(kind)
    upstream.decide = lambda fields: Answer(body=data, headers={"Content-Type": "image/jpeg"})
    task = finished(client, submit(client))
    assert client.get(task["image"]["url"]).content_type == type_


def test_a_client_that_accepts_nothing_but_bytes_is_told_that_they_are(client, made):
    task, data = made
    octets = "application/octet-stream"
    for path in (f"/images/{task['id']}", f"/images/{task['id']}/thumbnail", "/images.zip?id=x"):
        answer = client.get(path, headers={"Accept": octets})
        assert (answer.status_code, answer.content_type) == (200, octets)
        answer = client.get(path, headers={"Accept": f"*/*, {octets}"})
        assert answer.content_type in ("image/jpeg", "image/webp", "application/zip")
    assert client.get(f"/images/{task['id']}", headers={"Accept": octets}).data == data


def test_head_tells_what_get_would(client, made):
    task, data = made
    answer = client.head(task["image"]["url"])
    assert (answer.status_code, answer.data) == (200, b"")
    assert answer.headers["Content-Length"] == str(len(data))


def test_a_picture_that_is_known_is_not_sent_again(client, made):
    url = made[0]["image"]["url"]
    etag = client.get(url).headers["ETag"]
    answer = client.get(url, headers={"If-None-Match": etag})
    assert (answer.status_code, answer.data) == (304, b"")
    assert answer.headers["ETag"] == etag
    assert "immutable" in answer.headers["Cache-Control"]
    assert client.get(url, headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    ("asked", "start", "stop"), [("bytes=0-99", 0, 100), ("bytes=500-", 500, None)]
)
def test_a_part_of_a_picture(client, made, asked, start, stop):
    task, data = made
    answer = client.get(task["image"]["url"], headers={"Range": asked})
    assert (answer.status_code, answer.data) == (206, data[start:stop])
    last = (stop or len(data)) - 1
    assert answer.headers["Content-Range"] == f"bytes {start}-{last}/{len(data)}"


@pytest.mark.parametrize(("asked", "of_the_end"), [("bytes=-7", 7), ("bytes=-99999999", None)])
def test_the_end_of_a_picture(client, made, asked, of_the_end):
    task, data = made
    wanted = data[-of_the_end:] if of_the_end else data
    for path, whole in (("", data), ("/thumbnail", None)):
        answer = client.get(task["image"]["url"] + path, headers={"Range": asked})
        assert answer.status_code == 206
        if whole:
            assert answer.data == wanted
            start = len(data) - len(wanted)
            told = f"bytes {start}-{len(data) - 1}/{len(data)}"
            assert answer.headers["Content-Range"] == told


def test_the_last_no_bytes_are_no_part(client, made):
    answer = client.get(made[0]["image"]["url"], headers={"Range": "bytes=-0"})
    assert answer.status_code == 416


def test_a_download_goes_on_only_in_the_same_picture(client, made):
    task, data = made
    headers = {"Range": "bytes=10-", "If-Range": f'"{task["image"]["sha256"]}"'}
    assert client.get(task["image"]["url"], headers=headers).data == data[10:]
    headers["If-Range"] = '"another"'
    assert client.get(task["image"]["url"], headers=headers).data == data


IGNORED = ["bytes=0-1,5-6", "bytes=abc", "items=0-5", "bytes=-", "bytes=5-2", "bytes 0-5", ""]


@pytest.mark.parametrize("asked", IGNORED)
def test_a_range_that_is_none_is_ignored(client, made, asked):
    task, data = made
    answer = client.get(task["image"]["url"], headers={"Range": asked})
    assert (answer.status_code, answer.data) == (200, data)


def test_a_range_is_for_get_only(client, made):
    answer = client.head(made[0]["image"]["url"], headers={"Range": "bytes=0-9"})
    assert (answer.status_code, answer.headers["Content-Length"]) == (200, str(len(made[1])))


def test_a_part_beyond_the_end_is_refused(client, made):
    task, data = made
    answer = client.get(task["image"]["url"], headers={"Range": f"bytes={len(data)}-"})
    assert answer.status_code == 416
    assert answer.headers["Content-Range"] == f"bytes */{len(data)}"
    assert list(answer.json) == ["error"]


def test_a_picture_under_way_asks_to_come_again(serve, upstream):
    upstream.gate.clear()
    client = serve(CONCURRENCY=1, SHUTDOWN_GRACE=0).client
    tasks = [submit(client), submit(client)]
    wait_until(lambda: upstream.at_once == 1)
    for task_id, status in zip(tasks, ("processing", "pending"), strict=True):
        for path in (
            f"/images/{task_id}",
            f"/images/{task_id}.jpg",
            f"/images/{task_id}/thumbnail",
        ):
            answer = client.get(path)
            assert (answer.status_code, answer.json["status"]) == (503, status)
            assert 1 <= int(answer.headers["Retry-After"]) <= 10
            assert status in answer.json["error"]


@pytest.mark.parametrize("path", ["/images/{}", "/images/{}.png", "/images/{}/thumbnail"])
def test_a_failed_task_has_no_picture(client, upstream, path):
    upstream.decide = lambda fields: refusal(400, "its own words")
    task = finished(client, submit(client))
    answer = client.get(path.format(task["id"]))
    assert answer.status_code == 409
    assert answer.json["status"] == "failed"
    assert answer.json["error_code"] == "upstream_rejected"
    assert "its own words" in answer.json["error"]


@pytest.mark.parametrize("path", ["/images/{}", "/images/{}.jpg", "/images/{}/thumbnail"])
def test_a_picture_deleted_by_hand_is_gone(client, made, caplog, path):
    task, _ = made
    client.get(f"/images/{task['id']}/thumbnail")
    Path(task["file_path"]).unlink()
    answer = client.get(path.format(task["id"]))
    assert (answer.status_code, answer.json["status"]) == (410, "completed")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("path", ["/images/{}", "/images/{}.jpg", "/images/{}/thumbnail"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_picture_that_is_not_as_long_as_it_was_is_gone_too(client, made, path, change):
    task, data = made
    path = path.format(task["id"])
    etag = client.get(path).headers["ETag"]
    Path(task["file_path"]).write_bytes((data + b"x")[: len(data) + change])
    for headers in ({}, {"Range": "bytes=0-9"}, {"If-None-Match": etag}):
        answer = client.get(path, headers=headers)
        assert (answer.status_code, answer.json["status"]) == (410, "completed")
        assert "no longer whole" in answer.json["error"]
        assert "ETag" not in answer.headers


@pytest.mark.parametrize("path", ["/images/{}", "/images/{}.jpg", "/images/{}/thumbnail"])
def test_a_picture_in_a_folder_that_is_none_is_gone(client, made, tmp_path, path):
    (tmp_path / "outputs").rename(tmp_path / "elsewhere")
    (tmp_path / "outputs").write_text("in the way")
    assert client.get(path.format(made[0]["id"])).status_code == 410


def test_a_picture_spoiled_by_hand_has_no_thumbnail(client, made):
    task, data = made
    Path(task["file_path"]).write_bytes(bytes(len(data)))
    assert client.get(f"/images/{task['id']}/thumbnail").status_code == 410


def test_pictures_are_found_in_a_folder_that_has_moved(app, made, tmp_path):
    task, data = made
    (tmp_path / "outputs").rename(tmp_path / "elsewhere")
    app.restart(OUTPUT_DIR="elsewhere")
    assert app.client.get(task["image"]["url"]).data == data


@pytest.mark.parametrize("path", ["/images/{}", "/images/{}.png", "/images/{}/thumbnail"])
def test_an_unknown_picture(client, path):
    answer = client.get(path.format(uuid.uuid4()))
    assert (answer.status_code, answer.json) == (404, {"error": "Task not found"})


def test_a_wrong_ending_is_told_the_right_name(client, made):
    task, _ = made
    answer = client.get(f"/images/{task['id']}.png")
    assert answer.status_code == 404
    assert f"{task['id']}.jpg" in answer.json["error"]


def test_a_path_from_outside_reaches_no_file(client, made, tmp_path):
    for path in ("/images/..%2ftasks.sqlite3", "/images/%2e%2e", "/images/../tasks.sqlite3"):
        assert client.get(path).status_code == 404


# Thumbnails


def test_a_thumbnail_is_a_small_webp_and_kept(client, made, tmp_path):
    task, _ = made
    url = f"/images/{task['id']}/thumbnail"
    answer = client.get(url)
    assert (answer.status_code, answer.content_type) == (200, "image/webp")
    small = Image.open(io.BytesIO(answer.data))
    assert (small.format, small.size) == ("WEBP", (512, 288))
    kept = tmp_path / "outputs" / "thumbnails" / f"{task['id']}.webp"
    assert kept.read_bytes() == answer.data
    assert answer.headers["Cache-Control"] == "private, max-age=31536000, immutable"
    assert answer.headers["ETag"] == f'"{hashlib.sha256(answer.data).hexdigest()}"'
    assert client.get(url, headers={"If-None-Match": answer.headers["ETag"]}).status_code == 304
    part = client.get(url, headers={"Range": "bytes=0-9"})
    assert (part.status_code, part.data) == (206, answer.data[:10])
    kept.write_bytes(b"from the disk")
    assert client.get(url).data == b"from the disk"


def test_a_small_picture_is_not_made_larger(client, upstream):
    upstream.decide = lambda fields: Answer(body=image_bytes("PNG", (200, 100)))
    task = finished(client, submit(client))
    answer = client.get(f"/images/{task['id']}/thumbnail")
    assert Image.open(io.BytesIO(answer.data)).size == (200, 100)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "I;16", "1", "CMYK"])
def test_every_kind_of_picture_has_a_thumbnail(client, upstream, mode):
    out = io.BytesIO()
    Image.new(mode, (600, 600)).save(out, "JPEG" if mode == "CMYK" else "PNG")
    upstream.decide = lambda fields: Answer(body=out.getvalue())
    task = finished(client, submit(client))
    answer = client.get(f"/images/{task['id']}/thumbnail")
    assert answer.status_code == 200
    assert Image.open(io.BytesIO(answer.data)).size == (512, 512)


def test_a_thumbnail_that_cannot_be_kept_is_served_all_the_same(client, made, tmp_path):
    (tmp_path / "outputs" / "thumbnails").write_text("in the way")
    task, _ = made
    assert client.get(f"/images/{task['id']}/thumbnail").status_code == 200


def test_no_temporary_file_stays_beside_a_thumbnail(client, made, tmp_path):
    task, _ = made
    client.get(f"/images/{task['id']}/thumbnail")
    names = [file.name for file in (tmp_path / "outputs" / "thumbnails").iterdir()]
    assert names == [f"{task['id']}.webp"]


# Waiting


def test_a_picture_can_be_waited_for(paused, upstream):
    task_id = submit(paused)
    wait_until(lambda: upstream.at_once)
    upstream.gate.set()
    answer = paused.get(f"/images/{task_id}?wait=60")
    assert (answer.status_code, answer.data) == (200, image_bytes())


def test_who_has_waited_may_come_again_at_once(paused, upstream):
    task_id = submit(paused)
    wait_until(lambda: upstream.at_once)
    assert paused.get(f"/images/{task_id}?wait=1").headers["Retry-After"] == "1"


def test_who_could_not_wait_uses_up_no_retries(serve):
    app = serve(THREADS=2)
    app.client.post("/queue/pause")
    task_id = submit(app.client)
    with app.worker.waiters.slot() as has_slot:
        assert has_slot, "the only one"
        answer = app.client.get(f"/images/{task_id}?wait=60")
    assert answer.headers["Retry-After"] == "10"
