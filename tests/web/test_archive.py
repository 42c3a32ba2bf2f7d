"""Several pictures as one zip: whole, streamed, and with a word for each that is not there."""

import hashlib
import http.client
import io
import json
import os
import random
import urllib.parse
import urllib.request
import uuid
import zipfile
from pathlib import Path

import pytest
from conftest import KEYS, PROMPT, finished, submit, wait_until
from PIL import Image
from server import Server, memory
from upstream import Answer, Upstream, image_bytes, refusal, serving

from web.access import Signer


def made(client, upstream, kind="PNG", colour="teal", **fields):
    """Return a finished task and the bytes of its picture."""
    data = image_bytes(kind, colour=colour)
    upstream.decide = lambda _: Answer(body=data)
    return finished(client, submit(client, **fields)), data


def opened(client, ids):
    """Return the archive of these tasks, whole, and the lines of its manifest."""
    answer = client.get("/images.zip", query_string={"id": ids})
    assert answer.status_code == 200, answer.json
    archive = zipfile.ZipFile(io.BytesIO(answer.data))
    assert archive.testzip() is None
    assert archive.namelist()[-1] == "manifest.jsonl"
    return archive, [json.loads(line) for line in archive.read("manifest.jsonl").splitlines()]


def test_an_archive_has_each_picture_under_its_own_name_and_a_manifest(client, upstream):
    first, first_data = made(client, upstream, "PNG", prompt="füchse", seed=7)
    second, second_data = made(client, upstream, "JPEG", model="x")
    archive, manifest = opened(client, [second["id"], first["id"]])
    names = [f"{second['id']}.jpg", f"{first['id']}.png"]
    assert archive.namelist() == [*names, "manifest.jsonl"]
    assert [archive.read(name) for name in names] == [second_data, first_data]
    keys = ("id", "prompt", "model", "params")
    assert manifest == [
        {**{key: task[key] for key in keys}, "sha256": task["image"]["sha256"]}
        for task in (second, first)
    ]
    assert [list(line) for line in manifest] == [[*keys, "sha256"]] * 2
    assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}


def test_an_archive_tells_its_length_and_its_name(client, upstream):
    task, _ = made(client, upstream)
    for answer in (
        client.get(f"/images.zip?id={task['id']}"),
        client.head(f"/images.zip?id={task['id']}"),
    ):
        assert answer.content_type == "application/zip"
        assert answer.headers["Content-Disposition"] == 'attachment; filename="images.zip"'
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    length = int(answer.headers["Content-Length"])
    assert len(client.get(f"/images.zip?id={task['id']}").data) == length


def test_what_is_missing_is_in_the_manifest_with_the_reason(client, upstream):
    there, _ = made(client, upstream)
    gone, _ = made(client, upstream)
    short, _ = made(client, upstream)
    Path(gone["file_path"]).unlink()
    os.truncate(short["file_path"], short["image"]["bytes"] - 1)
    upstream.decide = lambda _: refusal(400, "no")
    failed = finished(client, submit(client))
    client.post("/queue/pause")
    pending = submit(client)
    unknown = str(uuid.uuid4())
    ids = [
        gone["id"],
        there["id"],
        short["id"],
        failed["id"],
        pending,
        unknown,
        there["id"],
        "é/..",
    ]
    archive, manifest = opened(client, ids)
    assert archive.namelist() == [f"{there['id']}.png", "manifest.jsonl"]
    assert [line["id"] for line in manifest] == ids
    words = ["no longer there", None, "no longer there", "failed: ", "pending", "not found"]
    words += ["twice", "not found"]
    for line, word in zip(manifest, words, strict=True):
        assert ("missing" in line) == bool(word) != ("sha256" in line)
        assert not word or word in line["missing"]


def test_an_archive_of_nothing_is_a_manifest(client):
    archive, manifest = opened(client, [str(uuid.uuid4())])
    assert archive.namelist() == ["manifest.jsonl"]
    assert len(manifest) == 1


@pytest.mark.parametrize("query", ["", "id=a&" * 100 + "id=a", "ids=a", "id=a&limit=3"])
def test_an_archive_of_none_or_too_many_is_refused(client, query):
    answer = client.get(f"/images.zip?{query}")
    assert answer.status_code == 400
    assert "id" in answer.json["error"]


def test_an_archive_may_have_a_hundred(client):
    assert len(opened(client, [f"t{n}" for n in range(100)])[1]) == 100


def test_whoever_has_the_signature_of_each_needs_no_key(serve, upstream):
    app = serve(API_KEYS=KEYS)
    headers = {"X-API-Key": KEYS.split(",")[0], "Host": "pictures.example"}
    body = {"prompt": PROMPT, "n": 2, "response_format": "url"}
    answer = app.client.post("/v1/images/generations", json=body, headers=headers)
    urls = [urllib.parse.urlsplit(each["url"]) for each in answer.json["data"]]
    ids = [Path(url.path).stem for url in urls]
    signatures = [url.query.removeprefix("sig=") for url in urls]

    def status(ids, signatures):
        query = {"id": ids, "sig": signatures}
        return app.client.get("/images.zip", query_string=query).status_code

    assert status(ids, signatures) == 200
    assert status(ids[:1], signatures[:1]) == 200
    wrong = [signatures[0], "0" * 64]
    for refused in (([], []), ([], signatures), (ids, []), (ids, signatures[:1]), (ids, wrong)):
        assert status(*refused) == 401
    assert status(ids, signatures[::-1]) == 401
    query = {"id": ids, "sig": signatures}
    assert app.client.get("/tasks", query_string=query).status_code == 401


# The real server


@pytest.fixture
def service(tmp_path):
    """Return a server with pictures of 12 MB, and their tasks."""
    out = io.BytesIO()
    noise = random.Random(7).randbytes(2000 * 2000 * 3)
    Image.frombytes("RGB", (2000, 2000), noise).save(out, "PNG", compress_level=0)
    with serving(Upstream()) as upstream:
        upstream.decide = lambda _: Answer(body=out.getvalue())
        server = Server(tmp_path / "server", upstream.url, WORKERS=1)
        try:
            server.ready().running()
            yield server, server.all_end([server.submit() for _ in range(8)])
        finally:
            server.close()


def query(tasks):
    return urllib.parse.urlencode({"id": [task["id"] for task in tasks]}, doseq=True)


@pytest.mark.processes
def test_an_archive_of_large_pictures_needs_little_memory(service):
    server, tasks = service
    before = memory(server.runner(), "VmHWM")
    url = f"{server.address}/images.zip?{query(tasks)}"
    with urllib.request.urlopen(url, timeout=60) as answer:
        archive = zipfile.ZipFile(io.BytesIO(answer.read()))
    assert memory(server.runner(), "VmHWM") - before < tasks[0]["image"]["bytes"] / 2
    for task in tasks:
        data = archive.read(Path(task["file_path"]).name)
        assert hashlib.sha256(data).hexdigest() == task["image"]["sha256"]


@pytest.mark.processes
def test_an_address_has_room_for_a_hundred_signatures(service):
    server, tasks = service
    signer = Signer(server.folder / "tasks.sqlite3")
    ids = [task["id"] for task in tasks] + [str(uuid.uuid4()) for _ in range(100 - len(tasks))]
    signed = {"id": ids, "sig": [signer.sign(task_id) for task_id in ids]}
    url = f"{server.address}/images.zip?{urllib.parse.urlencode(signed, doseq=True)}"
    # Only a signature lets a page of another site in.
    request = urllib.request.Request(url, headers={"Sec-Fetch-Site": "cross-site"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert len(zipfile.ZipFile(io.BytesIO(answer.read())).namelist()) == 9


@pytest.mark.processes
@pytest.mark.parametrize("fault", [os.unlink, lambda path: os.truncate(path, 1000)])
def test_a_fault_in_the_middle_breaks_the_answer_off(service, fault):
    server, tasks = service
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", f"/images.zip?{query(tasks)}")
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.read(1000)
    fault(tasks[-1]["file_path"])
    with pytest.raises(http.client.IncompleteRead):
        answer.read()
    connection.close()
    wait_until(lambda: server.request("GET", "/healthz")[0] == 200)
