"""Editing images: what comes in, in each form, what is kept of it, and what Chutes is sent."""

import base64
import hashlib
import io
import json
import struct
import threading
import zlib

import pytest
import rows
from conftest import KEYS, PROMPT, finished, submit, wait_until
from upstream import Answer, image_bytes

import records
from web import schemas, uploads

FOX, OWL, CAT = (image_bytes(*of) for of in (("PNG",), ("JPEG",), ("WEBP", (32, 32), "red")))
MODEL, NO_IMAGES, OTHER = "qwen-image-edit-2511", "z-image-turbo", "qwen-image-edit-2509"
UNKNOWN_ID = "00000000-0000-4000-8000-000000000000"


def text_of(data):
    return base64.b64encode(data).decode()


def file(data, name="fox.png"):
    return data, name


def edit(client, images=(FOX,), path="/edit", key=None, **fields):
    """Post a form; a tuple of images is a repeated part."""
    parts = [*fields.items(), *(("images", file(image)) for image in images)]
    headers = {"Idempotency-Key": key} if key else {}
    return client.post(path, data=form(*parts), headers=headers, content_type=FORM_TYPE)


def edit_json(client, images=None, **fields):
    """Post JSON with one image, or these; a field that is `...` is left out."""
    body = {"prompt": PROMPT, "images": [text_of(FOX)] if images is None else images, **fields}
    return client.post("/edit", json={k: v for k, v in body.items() if v is not ...})


BOUNDARY = "a-boundary-of-the-tests"
FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"


def form(*parts, end=True):
    """Return the bytes of a form; a part is a name with a text, or with a file and its name."""
    body = b""
    for name, value in parts:
        filename = ""
        if isinstance(value, tuple):
            filename = f'; filename="{value[1]}"\r\nContent-Type: text/plain'
            value = value[0]
        value = value if isinstance(value, bytes) else str(value).encode()
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'
        body += head.encode() + value + b"\r\n"
    return body + (f"--{BOUNDARY}--\r\n".encode() if end else b"")


def post_form(client, *parts, path="/edit", **values):
    parts = parts if "prompt" in dict(parts) else (("prompt", PROMPT), *parts)
    return client.post(path, data=form(*parts, **values), content_type=FORM_TYPE)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "inputs"


@pytest.fixture
def kept(folder):
    """Return a function that names the files that are kept."""
    return lambda: sorted(path.name for path in folder.iterdir())


def name_of(data, extension="png"):
    return f"{hashlib.sha256(data).hexdigest()}.{extension}"


def accepted(answer):
    assert answer.status_code == 202, answer.json
    return answer.json["id"]


def sentence(answer, status=400):
    assert answer.status_code == status, answer.json
    return answer.json["error"]


def sent(upstream):
    """Return what Chutes was sent in the last call, the images as bytes."""
    call = dict(upstream.calls[-1])
    return call, [base64.b64decode(text) for text in call.pop("image_b64s")]


# What is accepted


def test_a_form_makes_a_task_that_edits(client, upstream):
    answer = edit(client, prompt=PROMPT)
    assert answer.status_code == 202
    assert answer.json == {
        "id": answer.json["id"],
        "status": "pending",
        "message": "Edit task queued successfully",
    }
    assert answer.headers["Location"] == f"/status/{answer.json['id']}"
    task = finished(client, answer.json["id"])
    assert (task["status"], task["model"]) == ("completed", MODEL)
    assert sent(upstream) == ({"prompt": PROMPT, "seed": task["params"]["seed"]}, [FOX])


@pytest.mark.parametrize(
    "text",
    [
        text_of(FOX),
        f"data:image/gif;base64,{text_of(FOX)}",
        f"DATA:;charset=x;BASE64,{text_of(FOX)}",
        base64.encodebytes(FOX).decode().replace("\n", "\r\n \t"),
        f"  data:image/png;base64,{base64.encodebytes(FOX).decode()}",
    ],
    ids=["base64", "data URL", "in capitals", "white space", "both"],
)
def test_json_and_texts_of_a_form_take_the_same(client, upstream, text):
    for answer in (edit_json(client, [text]), post_form(client, ("images", text))):
        finished(client, accepted(answer))
        assert sent(upstream)[1] == [FOX]


def test_the_id_of_a_completed_task_is_its_image(client, upstream):
    upstream.decide = lambda fields: Answer(body=OWL)
    made = submit(client)
    finished(client, made)
    for answer in (edit_json(client, [made]), post_form(client, ("images", f" {made}\n"))):
        first = finished(client, accepted(answer))
        assert sent(upstream)[1] == [OWL]
    finished(client, accepted(edit_json(client, [first["id"], made])))
    assert sent(upstream)[1] == [OWL, OWL]


@pytest.mark.parametrize("name", ["images", "image", "images[]", "image[]"])
def test_each_name_of_the_part_will_do(client, upstream, name):
    parts = [(name, file(FOX)), (name, file(OWL)), (name, file(CAT))]
    finished(client, accepted(post_form(client, *parts)))
    assert sent(upstream)[1] == [FOX, OWL, CAT]


def test_only_the_bytes_tell_what_an_image_is(client):
    part = file(OWL, "../notes.txt")
    task = finished(client, accepted(post_form(client, ("image", part))))
    assert task["inputs"][0]["content_type"] == "image/jpeg"


def test_a_file_that_nobody_chose_is_none(client):
    empty = file(b"", "")
    accepted(post_form(client, ("image", empty), ("image", file(FOX))))
    assert "1 to 3" in sentence(post_form(client, ("image", empty)))


def test_the_fields_of_a_form_are_read_as_the_models(client, upstream):
    fields = {"seed": "7", "width": "512", "true_cfg_scale": "1.5", "negative_prompt": "12"}
    task = finished(client, accepted(edit(client, prompt=PROMPT, priority="-3", **fields)))
    expected = {"seed": 7, "width": 512, "true_cfg_scale": 1.5, "negative_prompt": "12"}
    assert (task["params"], task["priority"]) == (expected, -3)
    assert sent(upstream)[0] == {"prompt": PROMPT, **expected}


def test_an_empty_text_for_a_number_means_its_default(client):
    task = client.get(f"/status/{accepted(edit(client, prompt=PROMPT, width=''))}").json
    assert "width" not in task["params"]


@pytest.mark.parametrize(
    "width", [*("5", "wide", "5 12", "512.5"), *("[512]", '"512"', "NaN", "1" * 5000)]
)
def test_a_text_that_is_no_such_number_is_refused(client, width):
    told = sentence(edit(client, prompt=PROMPT, width=width))
    assert told.startswith(f"width must be an integer from 128 to 2048 for {MODEL}, not ")


def test_only_a_list_is_a_repeated_part(serve, tmp_path, upstream):
    base = upstream.url.replace("/generate", "/lists/generate")
    (tmp_path / "m.toml").write_text(
        f'[m]\nurl = "{base}"\nimages = {{ field = "image_b64" }}\n'
        '[m.fields]\nstyles = { type = "array" }\nwidth = { type = "integer" }\n'
    )
    client = serve(MODELS_FILE=tmp_path / "m.toml", DEFAULT_EDIT_MODEL="m").client
    parts = [("images", file(FOX)), ("styles", "ink"), ("styles", "noir")]
    task = finished(client, accepted(post_form(client, *parts)))
    assert task["params"] == {"styles": ["ink", "noir"]}
    one = finished(client, accepted(post_form(client, *parts[:2])))
    assert one["params"] == {"styles": ["ink"]}
    for name in ("width", "prompt", "model"):
        given = [*parts, (name, "1"), (name, "1"), ("prompt", "p")]
        assert sentence(post_form(client, *given)) == f'"{name}" is given twice'


def test_a_text_means_one_of_the_values_that_a_field_takes(serve, tmp_path, upstream):
    (tmp_path / "m.toml").write_text(
        f'[m]\nurl = "{upstream.url}"\nimages = {{ field = "image_b64" }}\n[m.fields]\n'
        'steps = { enum = [4, 8] }\nstyle = { enum = ["4", "ink"] }\nhd = { type = "boolean" }\n'
        "extra = {}\n"
    )
    client = serve(MODELS_FILE=tmp_path / "m.toml", DEFAULT_EDIT_MODEL="m").client
    fields = {"steps": "8", "style": "4", "hd": "True", "extra": "0.5"}
    task = finished(client, accepted(edit(client, prompt=PROMPT, **fields)))
    assert task["params"] == {"steps": 8, "style": "4", "hd": True, "extra": 0.5}
    told = sentence(edit(client, prompt=PROMPT, steps="5"))
    assert told == 'steps must be one of 4, 8 for m, not "5"'
    other = finished(client, accepted(edit(client, prompt=PROMPT, extra="words of any kind")))
    assert other["params"] == {"extra": "words of any kind"}


def test_the_default_is_a_model_that_edits(serve):
    client = serve(DEFAULT_EDIT_MODEL=OTHER).client
    assert finished(client, accepted(edit(client, prompt=PROMPT)))["model"] == OTHER


def test_a_default_outside_the_allowed_models_is_no_fault_at_the_start(serve):
    client = serve(MODELS="qwen-image").client
    assert MODEL in sentence(edit(client, prompt=PROMPT))


def test_where_one_image_is_the_most_it_is_sent_as_a_text(serve, tmp_path, upstream):
    (tmp_path / "m.toml").write_text(
        f'[m]\nurl = "{upstream.url}"\nmodel = "m"\nimages = {{ field = "image_b64" }}\n'
        '[m.fields]\nseed = { type = "integer" }\n'
    )
    client = serve(MODELS_FILE=tmp_path / "m.toml").client
    finished(client, accepted(edit(client, prompt=PROMPT, model="m", seed="1")))
    call = upstream.calls[-1]
    assert call == {"model": "m", "prompt": PROMPT, "image_b64": text_of(FOX), "seed": 1}
    assert list(call) == ["model", "prompt", "image_b64", "seed"]


def test_the_body_has_a_length_and_the_same_bytes_each_time(client, upstream):
    bodies = []
    upstream.decide = lambda fields: bodies.append(upstream.under_way[0].body) or Answer()
    for _ in range(2):
        finished(client, accepted(edit(client, (FOX, OWL), prompt=PROMPT, seed="1", width="512")))
    headers = upstream.headers[-1][1]
    assert int(headers["Content-Length"]) == len(bodies[0])
    assert "Transfer-Encoding" not in headers
    assert headers["Content-Type"] == "application/json"
    images = [text_of(FOX), text_of(OWL)]
    fields = {"prompt": PROMPT, "image_b64s": images, "width": 512, "seed": 1}
    assert bodies[0] == bodies[1] == json.dumps(fields).encode()


# What is shown


def test_a_task_shows_its_inputs(client):
    task = finished(client, accepted(edit(client, (FOX, CAT), prompt=PROMPT)))
    url = f"/tasks/{task['id']}/inputs"
    assert task["inputs"] == [
        {
            "url": f"{url}/0",
            "content_type": "image/png",
            "bytes": len(FOX),
            "width": 64,
            "height": 48,
            "sha256": hashlib.sha256(FOX).hexdigest(),
        },
        {
            "url": f"{url}/1",
            "content_type": "image/webp",
            "bytes": len(CAT),
            "width": 32,
            "height": 32,
            "sha256": hashlib.sha256(CAT).hexdigest(),
        },
    ]
    for shown in (client.get(f"/tasks/{task['id']}"), client.get("/tasks")):
        found = shown.json["tasks"][0] if "tasks" in shown.json else shown.json
        assert found["inputs"] == task["inputs"]
    assert finished(client, submit(client))["inputs"] == []


def test_an_input_is_served_as_an_image_is(client, folder):
    task_id = accepted(edit(client, (FOX, OWL), prompt=PROMPT))
    for number, (data, kind) in enumerate(((FOX, "png"), (OWL, "jpeg"))):
        answer = client.get(f"/tasks/{task_id}/inputs/{number}")
        assert (answer.status_code, answer.data) == (200, data)
        assert answer.headers["Content-Type"] == f"image/{kind}"
        assert answer.headers["ETag"] == f'"{hashlib.sha256(data).hexdigest()}"'
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "immutable" in answer.headers["Cache-Control"]
    url = f"/tasks/{task_id}/inputs/0"
    part = client.get(url, headers={"Range": "bytes=1-3"})
    assert (part.status_code, part.data) == (206, FOX[1:4])
    same = client.get(url, headers={"If-None-Match": f'"{hashlib.sha256(FOX).hexdigest()}"'})
    assert (same.status_code, same.data) == (304, b"")
    assert "2 input images" in sentence(client.get(f"/tasks/{task_id}/inputs/2"), 404)
    assert client.get(f"/tasks/{UNKNOWN_ID}/inputs/0").status_code == 404
    (folder / name_of(FOX)).write_bytes(FOX[:-1])
    assert "no longer" in sentence(client.get(url), 410)
    (folder / name_of(FOX)).unlink()
    assert sentence(client.get(url), 410)


def test_whoever_may_see_a_picture_may_see_what_it_was_made_of(serve):
    client = serve(API_KEYS=KEYS).client
    key = {"X-API-Key": KEYS.split(",")[0]}
    data = form(("prompt", PROMPT), ("image", file(FOX)), ("response_format", "url"))
    answer = client.post("/v1/images/edits", data=data, content_type=FORM_TYPE, headers=key)
    name, _, signature = answer.json["data"][0]["url"].rpartition("/")[2].partition("?sig=")
    url = f"/tasks/{name.partition('.')[0]}/inputs/0"
    assert client.get(url).status_code == 401
    assert client.get(f"{url}?sig={signature}").data == FOX
    other = signature[:-1] + ("0" if signature[-1] != "0" else "1")
    assert client.get(f"{url}?sig={other}").status_code == 401
    assert client.get(url, headers=key).data == FOX


# What is kept, and for how long


def test_the_same_bytes_are_kept_once(client, kept):
    for _ in range(2):
        accepted(edit(client, (FOX, OWL, FOX), prompt=PROMPT))
    assert kept() == sorted([name_of(FOX), name_of(OWL, "jpg")])


def test_a_file_that_was_cut_short_is_made_good_by_the_same_bytes(client, kept, folder):
    accepted(edit(client, prompt=PROMPT))
    (folder / name_of(FOX)).write_bytes(b"x")
    accepted(edit(client, prompt=PROMPT))
    assert (folder / name_of(FOX)).read_bytes() == FOX


def test_a_file_goes_with_the_last_task_that_uses_it(client, kept):
    first, second = (
        finished(client, accepted(edit(client, images, prompt=PROMPT)))["id"]
        for images in ((FOX, OWL), (FOX,))
    )
    assert client.delete(f"/tasks/{first}").status_code == 204
    assert kept() == [name_of(FOX)]
    assert client.delete(f"/tasks/{second}").status_code == 204
    assert kept() == []


def test_a_retry_uses_the_same_files(client, kept, upstream):
    upstream.decide = lambda fields: Answer(status=400)
    first = finished(client, accepted(edit(client, (FOX, OWL), prompt=PROMPT)))
    upstream.decide = lambda fields: Answer()
    second = finished(client, accepted(client.post(f"/tasks/{first['id']}/retry")))
    assert second["status"] == "completed"
    facts = [{**i, "url": None} for i in first["inputs"]]
    assert [{**i, "url": None} for i in second["inputs"]] == facts
    assert second["inputs"][1]["url"] == f"/tasks/{second['id']}/inputs/1"
    assert sent(upstream)[1] == [FOX, OWL]
    client.delete(f"/tasks/{first['id']}")
    assert client.get(second["inputs"][1]["url"]).data == OWL


def test_all_that_failed_are_retried_with_their_inputs(client, upstream):
    upstream.decide = lambda fields: Answer(status=400)
    finished(client, accepted(edit(client, prompt=PROMPT)))
    upstream.decide = lambda fields: Answer()
    assert client.post("/tasks/retry").json == {"retried": 1}
    newest = client.get("/tasks?limit=1").json["tasks"][0]
    assert finished(client, newest["id"])["status"] == "completed"
    assert sent(upstream)[1] == [FOX]


def test_what_a_death_has_left_is_swept_at_the_start(serve, folder, kept):
    app = serve()
    accepted(edit(app.client, prompt=PROMPT))
    app.close()
    (folder / name_of(OWL, "jpg")).write_bytes(OWL)
    (folder / f".{'0' * 32}.upload").write_bytes(OWL)
    (folder / "notes.txt").write_text("of the user's own")
    app.open()
    app.client.get("/queue")
    wait_until(lambda: kept() == sorted([name_of(FOX), "notes.txt"]))


def test_what_arrives_while_another_process_starts_is_let_be(serve, folder, kept):
    from inputs import InputFolder

    with InputFolder(folder).arrival() as arrival:
        app = serve()
        app.client.get("/queue")
        (folder / f".{'0' * 32}.upload").write_bytes(OWL)
        app.restart()
        app.client.get("/queue")
        wait_until(lambda: kept() == [arrival.path.name])
    assert kept() == []


def test_a_key_is_of_the_images_too(client, upstream, kept):
    first = edit(client, prompt=PROMPT, key="k")
    again = edit(client, prompt=PROMPT, key="k")
    assert (again.status_code, again.json) == (202, first.json)
    assert again.headers["Idempotent-Replayed"] == "true"
    same = client.post(
        "/edit",
        json={"prompt": PROMPT, "images": [text_of(FOX)]},
        headers={"Idempotency-Key": "k"},
    )
    assert same.json == first.json
    for images in ((OWL,), (FOX, FOX)):
        assert "Idempotency-Key" in sentence(edit(client, images, prompt=PROMPT, key="k"), 422)
    assert kept() == [name_of(FOX)]
    assert len(client.get("/tasks").json["tasks"]) == 1


def test_a_key_is_of_the_order_of_the_images(client):
    accepted(edit(client, (FOX, OWL), prompt=PROMPT, key="k"))
    assert "Idempotency-Key" in sentence(edit(client, (OWL, FOX), prompt=PROMPT, key="k"), 422)


def test_many_at_once_with_the_same_bytes_keep_one_file(app, kept):
    ids, client = [], app.client.application.test_client
    threads = [
        threading.Thread(target=lambda: ids.append(accepted(edit(client(), prompt=PROMPT))))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 16
    assert kept() == [name_of(FOX)]


# What is refused: a sentence each, and nothing is stored


@pytest.fixture
def untouched(client, kept):
    """Return the client; when the test is over, nothing was stored."""
    yield client
    assert client.get("/tasks").json["tasks"] == []
    assert kept() == []


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, data=b"\0"):
    """Return a PNG that says it is so large, whatever its data is."""
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


NOT_ONE, TORN = "is not a PNG, JPEG or WebP image", "ends early, or does not decode"
LARGE = "is larger than 4096 x 4096 pixels"
BOMB = png(60_000, 60_000, bytes(1_000_000))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        *((b"GIF89a" + bytes(900), NOT_ONE), (b"%PDF-1.7" + bytes(900), NOT_ONE)),
        *((b"<svg xmlns=''/>", NOT_ONE), (b"", "is empty")),
        *((FOX[:-1], TORN), (FOX[:60], TORN), (OWL[: len(OWL) // 2], TORN), (CAT[:-9], TORN)),
        (FOX[:50] + b"\0" + FOX[51:], TORN),
        *((png(4097, 4096), LARGE), (BOMB, LARGE)),
    ],
    ids=["gif", "pdf", "svg", "empty", *"1234", "flipped", "large", "bomb"],
)
def test_a_bad_image_is_named(untouched, data, why):
    parts = [("images", file(OWL)), ("images", file(data)), ("images", file(FOX))]
    assert sentence(post_form(untouched, *parts)).startswith(f"images[1] {why}")
    if data:
        answer = edit_json(untouched, [text_of(OWL), f"data:,;base64,{text_of(data)}"])
        assert sentence(answer).startswith("images[1] ")


def test_a_large_one_in_json_is_named_too(untouched):
    text = text_of(BOMB)
    assert len(text) > 256
    assert sentence(edit_json(untouched, [text])) == f"images[0] {LARGE}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("fox", "is neither the id of a task here nor an image in base64"),
        ("", "is empty"),
        (text_of(BOMB)[:-1], "is not valid base64: its length is not a multiple of four"),
        (text_of(BOMB)[:300] + "*" + text_of(BOMB)[301:], "is not valid base64: only base64 data"),
        (
            text_of(BOMB)[:300] + "-_" + text_of(BOMB)[302:],
            "is not valid base64: only base64 data is allowed",
        ),
        (text_of(bytes(601)) + text_of(FOX), "is not valid base64: excess data after padding"),
        ("data:image/png," + "x" * 300, "is a data URL, but not one in base64"),
        ("data:image/png;" + "x" * 300, "is a data URL, but not one in base64"),
        (f"data:image/png;base64,{text_of(FOX)[:-2]}*=", "is not valid base64"),
        ("https://pictures.example/fox.png", "is an address, which is not fetched"),
        (f"HTTP://x/{'x' * 300}", "is an address, which is not fetched"),
        (UNKNOWN_ID, f"names the task {UNKNOWN_ID}, which there is not"),
        ("\0" * 8, "is neither"),
        ("ü" * 400, "is not valid base64"),
    ],
)
def test_a_bad_text_is_named(untouched, text, why):
    assert sentence(edit_json(untouched, [text_of(OWL), text])).startswith(f"images[1] {why}")


def test_the_end_of_base64_is_its_end_wherever_a_piece_ends(untouched, monkeypatch):
    monkeypatch.setattr(uploads, "_CHUNK", 300)
    text = text_of(FOX + bytes(3000 - len(FOX) % 3000 + 1))
    assert text.endswith("=")
    told = sentence(edit_json(untouched, [text + "    " * 100 + text]))
    assert told.startswith("images[0] is not valid base64: ")


@pytest.mark.parametrize("item", [7, None, True, {"image_url": "data:"}, ["x"]])
def test_an_image_that_is_no_text_is_named(untouched, item):
    told = sentence(edit_json(untouched, [text_of(FOX), item]))
    assert told == "images[1] must be text: base64, a data URL, or a task's id"


@pytest.mark.parametrize("images", ["x", {"0": "x"}, 7, True])
def test_images_are_a_list(untouched, images):
    answer = untouched.post("/edit", json={"prompt": PROMPT, "images": images})
    assert sentence(answer) == "images must be a list"


@pytest.mark.parametrize(("count", "model"), [(0, MODEL), (4, MODEL), (4, OTHER)])
def test_too_few_and_too_many_images_are_refused(untouched, count, model):
    expected = f"images must be 1 to 3 for {model}, not {count}"
    assert sentence(edit_json(untouched, [text_of(FOX)] * count, model=model)) == expected
    assert sentence(edit(untouched, (FOX,) * count, prompt=PROMPT, model=model)) == expected


def test_a_few_bytes_make_no_more_than_a_few_files(client, kept):
    made = submit(client)
    finished(client, made)
    told = sentence(edit_json(client, [made] * 100_000))
    assert told.startswith("images[16] is one too many: ")
    assert kept() == []


def test_images_for_generate_are_sent_to_edit(untouched):
    answer = untouched.post("/generate", json={"prompt": PROMPT, "images": [text_of(FOX)]})
    assert "POST /edit" in sentence(answer)


def test_no_images_at_all_are_too_few(untouched):
    for body in ({"prompt": PROMPT}, {"prompt": PROMPT, "images": None}):
        assert "1 to 3" in sentence(untouched.post("/edit", json=body))


def test_a_model_that_takes_none_is_refused(untouched):
    told = sentence(edit(untouched, prompt=PROMPT, model=NO_IMAGES))
    assert told.startswith(f"{NO_IMAGES} takes no images; ")
    assert "/generate" in told


def test_a_model_that_is_not_known_is_refused(untouched):
    told = sentence(edit(untouched, prompt=PROMPT, model="qwen-image-edit-2012"))
    assert told.startswith('"qwen-image-edit-2012" is not known to take images; ')


def test_a_prompt_alone_is_not_for_a_model_that_needs_images(untouched):
    told = sentence(untouched.post("/generate", json={"prompt": PROMPT, "model": MODEL}))
    assert "POST /edit" in told


@pytest.mark.parametrize("prompt", [None, "", "  ", ...])
def test_a_prompt_is_required(untouched, prompt):
    assert sentence(edit_json(untouched, prompt=prompt)) == "Prompt is required"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mask", "say in the prompt what is to change"),
        *(
            (n, "send images to POST /edit, as images")
            for n in ("image", "image_url", "image_b64s")
        ),
        ("file_id", "send the image itself"),
        ("widht", "did you mean width?"),
    ],
)
def test_a_field_that_is_none_is_named(untouched, name, hint):
    told = sentence(edit_json(untouched, **{name: "x"}))
    assert told.startswith(f'"{name}" is not a field; {hint}')


def test_the_fields_are_those_of_the_model(untouched):
    told = sentence(edit_json(untouched, guidance_scale=7))
    assert told.endswith(
        f"{MODEL} takes width, height, true_cfg_scale, num_inference_steps, negative_prompt, seed"
    )


@pytest.mark.parametrize("name", ["mask", "picture", "prompt"])
def test_a_file_that_is_no_image_of_the_task_is_named(untouched, name):
    answer = post_form(untouched, ("prompt", PROMPT), (name, file(OWL)), ("images", file(FOX)))
    assert sentence(answer).startswith(f"'{name}' is a file; only images may be one")


@pytest.mark.parametrize(
    "data",
    [
        form(("prompt", PROMPT), ("images", file(FOX)), end=False),
        form(("prompt", PROMPT), ("images", file(FOX)))[:-40],
        form(("prompt", PROMPT), ("images", file(FOX))).replace(b"form-data; name", b"form-data"),
        b"--another\r\n\r\n",
        f"--{BOUNDARY}\r\nContent-Type: text/plain\r\n\r\nx\r\n--{BOUNDARY}--\r\n".encode(),
        f"--{BOUNDARY}\r\nContent-Disposition: \xff\xfe\r\n\r\n".encode("latin-1"),
    ],
    ids=["no end", "cut", "no name", "another", "no disposition", "no text"],
)
def test_a_broken_form_is_refused(untouched, data):
    answer = untouched.post("/edit", data=data, content_type=FORM_TYPE)
    assert "form" in sentence(answer)


def test_a_form_without_a_boundary_is_refused(untouched):
    answer = untouched.post("/edit", data=b"x", content_type="multipart/form-data")
    assert "boundary" in sentence(answer)


def test_ten_thousand_parts_are_refused(untouched):
    for parts in ([("images", UNKNOWN_ID)] * 10_000, [(f"f{n}", "x") for n in range(10_000)]):
        assert sentence(post_form(untouched, ("images", file(FOX)), *parts))
    told = sentence(post_form(untouched, *((f"f{n}", "x") for n in range(10_000))))
    assert told.startswith("The form has more than 100 parts")


def test_a_name_of_a_megabyte_is_refused(untouched):
    for name in ("n" * 2**20, 'x"; filename="' + "n" * 2**20):
        told = sentence(post_form(untouched, ("images", file(FOX)), (name, "x")))
        assert "too long a name" in told


def test_texts_of_a_form_have_a_megabyte_in_all(untouched):
    told = sentence(post_form(untouched, ("prompt", "x" * (2**20 + 1))), 413)
    assert told == "prompt is too long: all fields may have 1 MiB"
    parts = [("images", file(FOX)), *((f"f{n}", "x" * 2**18) for n in range(5))]
    assert "1 MiB" in sentence(post_form(untouched, *parts), 413)
    assert "prompt" in sentence(edit(untouched, prompt="x" * 10_001))


def test_a_line_of_a_text_ends_as_it_was_typed(client):
    task_id = accepted(edit(client, prompt="one\r\ntwo"))
    assert client.get(f"/status/{task_id}").json["prompt"] == "one\ntwo"


def test_a_text_that_is_not_utf_8_is_refused(untouched):
    assert sentence(post_form(untouched, ("prompt", b"\xff"))) == "prompt is not UTF-8"


@pytest.mark.parametrize("path", ["/edit", "/v1/images/edits"])
def test_a_body_may_be_as_large_as_the_setting_says(serve, path, kept):
    client = serve(MAX_UPLOAD_MB=1).client
    large = png(10, 10) + bytes(2**20)
    answer = post_form(client, ("image", file(large)), path=path)
    assert answer.status_code == 413
    assert "larger than 1 MiB" in str(answer.json["error"])
    chunked = {"wsgi.input_terminated": True, "CONTENT_LENGTH": ""}
    data = io.BytesIO(form(("prompt", PROMPT), ("image", file(large))))
    answer = client.post(path, input_stream=data, content_type=FORM_TYPE, environ_overrides=chunked)
    assert answer.status_code == 413
    assert client.get("/tasks").json["tasks"] == []
    assert kept() == []


def test_a_body_of_exactly_the_limit_is_read(serve):
    client = serve(MAX_UPLOAD_MB=1).client
    fixed = [("prompt", PROMPT), ("images", file(FOX))]
    room = 2**20 - len(form(*fixed, ("images", file(b""))))
    for size, status in ((room, 202), (room + 1, 413)):
        parts = [*fixed, ("images", file(FOX + bytes(size - len(FOX))))]
        assert len(form(*parts)) == 2**20 + size - room
        assert post_form(client, *parts).status_code == status


def test_json_may_not_be_larger_than_a_form(serve):
    client = serve(MAX_UPLOAD_MB=1).client
    told = sentence(edit_json(client, ["x" * 2**20]), 413)
    assert told.startswith("The body is larger than 1 MiB of JSON; ")


def test_json_has_eight_megabytes_and_is_told_of_forms(untouched):
    told = sentence(edit_json(untouched, ["x" * 8 * 2**20]), 413)
    assert told.startswith("The body is larger than 8 MiB of JSON; ")
    assert "multipart/form-data" in told
    assert "images[0]" in sentence(edit_json(untouched, ["x" * (8 * 2**20 - 200)]))


def test_other_routes_keep_their_limit(untouched):
    answer = untouched.post("/generate", json={"prompt": "x" * 2**20})
    assert sentence(answer, 413) == "The body is larger than 1 MiB"


@pytest.mark.parametrize(
    ("kind", "body"), [("text/plain", b"x"), ("image/png", FOX), ("application/x-tar", b"x")]
)
def test_a_body_of_another_type_is_refused(untouched, kind, body):
    told = sentence(untouched.post("/edit", data=body, content_type=kind), 415)
    assert "application/json" in told and "multipart/form-data" in told


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"images": ' + b"[" * 10**5])
def test_a_body_that_is_no_json_object_is_refused(untouched, body):
    answer = untouched.post("/edit", data=body, content_type="application/json")
    assert "body" in sentence(answer)


def test_a_task_that_has_no_image_is_named(paused, kept):
    task_id = submit(paused)
    wait_until(lambda: paused.get(f"/status/{task_id}").json["status"] == "processing")
    told = sentence(edit_json(paused, [task_id]))
    assert told == f"images[0] names the task {task_id}, which has no image: it is processing"
    assert kept() == []


def test_a_task_whose_image_is_gone_is_named(client, tmp_path, kept):
    task = finished(client, submit(client))
    (tmp_path / "outputs" / f"{task['id']}.png").unlink()
    told = sentence(edit_json(client, [task["id"]]))
    assert told == f"images[0] names the task {task['id']}, whose image is no longer there"
    client.delete(f"/tasks/{task['id']}")
    assert "which there is not" in sentence(edit_json(client, [task["id"]]))
    assert kept() == []


def test_a_full_queue_and_a_low_disk_leave_nothing_behind(serve, kept, monkeypatch):
    app = serve(MAX_PENDING=1)
    app.client.post("/queue/pause")
    accepted(edit(app.client, prompt=PROMPT))
    assert "MAX_PENDING" in sentence(edit(app.client, (OWL,), prompt=PROMPT), 429)
    app.restart(MAX_PENDING=9, MIN_FREE_MB=1_000_000_000)
    for key in (None, "k"):
        told = sentence(edit(app.client, (OWL,), prompt=PROMPT, key=key), 507)
        assert "MIN_FREE_MB" in told
    assert kept() == [name_of(FOX)]


def test_nothing_is_received_where_the_disk_is_low(serve):
    client = serve(MIN_FREE_MB=1_000_000_000).client
    assert "MIN_FREE_MB" in sentence(edit(client, (b"no image",), prompt=PROMPT), 507)


def test_a_replay_needs_no_room(serve):
    app = serve()
    first = edit(app.client, prompt=PROMPT, key="k")
    app.restart(MIN_FREE_MB=1_000_000_000)
    assert edit(app.client, prompt=PROMPT, key="k").json == first.json


def test_a_commit_that_fails_leaves_no_file(app, kept, monkeypatch):
    from db import DatabaseError

    add = app.database.add

    def fail(tasks, now, limit, key, is_low, publish):
        add(tasks, now, limit, key, is_low, publish)
        rows.write(app.database.path, "DELETE FROM tasks")
        rows.write(app.database.path, "DELETE FROM inputs")
        raise DatabaseError("The database cannot be written: disk I/O error")

    monkeypatch.setattr(type(app.database), "add", staticmethod(fail))
    app.client.post("/queue/pause")
    assert "disk I/O error" in sentence(edit(app.client, prompt=PROMPT), 503)
    assert kept() == []


def test_an_input_that_is_gone_fails_its_task_alone(serve, folder):
    app = serve()
    app.client.post("/queue/pause")
    gone, there = (accepted(edit(app.client, (i,), prompt=PROMPT)) for i in (FOX, OWL))
    (folder / name_of(FOX)).unlink()
    app.client.post("/queue/resume")
    task = finished(app.client, gone)
    assert (task["status"], task["error_code"]) == ("failed", "storage")
    assert name_of(FOX) in task["error"] and str(folder) in task["error"]
    assert app.client.get("/queue").json["calls_today"] <= 1
    assert finished(app.client, there)["status"] == "completed"


@pytest.mark.parametrize(
    ("images", "number"),
    [("", "no"), ('images = { field = "image_b64s", maximum = 1 }\n', "at most 1")],
    ids=["none", "one"],
)
def test_a_model_that_takes_fewer_images_by_now_fails_its_tasks(
    serve, tmp_path, upstream, images, number
):
    app = serve()
    app.client.post("/queue/pause")
    task_id = accepted(edit(app.client, (FOX, OWL), prompt=PROMPT))
    models = tmp_path / "others.toml"
    models.write_text(f'["{MODEL}"]\nurl = "{upstream.url}"\n{images}')
    app.restart(MODELS_FILE=models)
    app.client.post("/queue/resume")
    task = finished(app.client, task_id)
    assert (task["error_code"], upstream.calls) == ("upstream_rejected", [])
    assert f"{MODEL} takes {number} input images by now, not 2" in task["error"]


def test_one_json_body_is_parsed_at_a_time(client, monkeypatch):
    parse, decode, alone = schemas.json_object, uploads._slices, []

    def watched(work):
        return lambda *given: alone.append(uploads._parsing.locked()) or work(*given)

    monkeypatch.setattr(schemas, "json_object", watched(parse))
    monkeypatch.setattr(uploads, "_slices", watched(decode))
    accepted(edit_json(client))
    assert alone == [True, True]
    assert not uploads._parsing.locked()
    sentence(edit_json(client, ["fox"]))
    assert not uploads._parsing.locked()


def test_the_records_name_an_input_by_its_facts(app):
    accepted(edit(app.client, (FOX, OWL), prompt=PROMPT))
    sql = "SELECT position, content_type, bytes, sha256 FROM inputs ORDER BY position"
    assert rows.read(app.database.path, sql) == [
        (0, "image/png", len(FOX), hashlib.sha256(FOX).hexdigest()),
        (1, "image/jpeg", len(OWL), hashlib.sha256(OWL).hexdigest()),
    ]
    (task,) = app.database.list_tasks(None, None, None, 1)
    assert all(isinstance(image, records.Image) for image in task.inputs)
