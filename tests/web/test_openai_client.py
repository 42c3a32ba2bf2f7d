"""The endpoint in OpenAI's form, as its official client uses it: a real server, real sockets."""

import base64
import http.client
import io
import json
import random
import re
import signal
import threading
import urllib.request

import openai
import pytest
from conftest import KEYS, PROMPT, wait_until
from PIL import Image
from server import ROOT, Server, memory
from upstream import Answer, Upstream, closed_port, image_bytes, refusal, serving

from models import load

pytestmark = pytest.mark.processes
KEY = KEYS.split(",")[0]
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Yield a server with keys and its upstream, for the tests that need no others."""
    with serving(Upstream()) as upstream:
        folder = tmp_path_factory.mktemp("service") / "server"
        values = {"MAX_ATTEMPTS": 2, "MAX_IMAGE_MB": 1, "RETRY_BACKOFF": 0.05}
        server = Server(folder, upstream.url, API_KEYS=KEYS, **values)
        try:
            server.ready().running()
            yield server, upstream
        finally:
            upstream.gate.set()
            server.close()


@pytest.fixture
def shared(service):
    """Return the server and its upstream, which answers as it did at the first test."""
    upstream = service[1]
    upstream.gate.set()
    upstream.calls.clear()
    upstream.decide = lambda fields: Answer()
    return service


@pytest.fixture
def client(shared):
    with openai_client(shared[0]) as client:
        yield client


@pytest.fixture
def upstream(shared):
    return shared[1]


@pytest.fixture
def start(tmp_path):
    """Return a maker of servers of their own, each with an upstream."""
    with serving(Upstream()) as upstream:
        made = []

        def make(**values):
            folder = tmp_path / "server"
            made.append(
                Server(folder, upstream.url, **{"RETRY_BACKOFF": 0.05, "WORKERS": 1, **values})
            )
            made[-1].ready().running()
            return made[-1], upstream

        yield make
        upstream.gate.set()
        for server in made:
            server.close()


def openai_client(server, key=KEY, **values):
    values = {"max_retries": 2, "timeout": 60, **values}
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, **values)


def fetch(url):
    """Return the status and bytes of an address, asked for without any header of ours."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def ids_in(error):
    return re.findall(r"[0-9a-f]{8}-[0-9a-f-]{27}", error.body["message"])


# Pictures


def test_a_picture_comes_as_base64(client, upstream):
    made = client.images.generate(model="qwen-image", prompt=PROMPT, size="512x768")
    assert base64.b64decode(made.data[0].b64_json, validate=True) == image_bytes()
    assert isinstance(made.created, int)
    assert made.data[0].url is None
    (call,) = upstream.calls
    assert (call["prompt"], call["width"], call["height"]) == (PROMPT, 512, 768)


def test_a_picture_comes_as_an_address_that_needs_no_key(client, shared):
    made = client.images.generate(model="qwen-image", prompt=PROMPT, response_format="url")
    assert made.data[0].b64_json is None
    assert made.data[0].url.startswith(f"{shared[0].address}/images/")
    assert fetch(made.data[0].url) == (200, image_bytes())


def test_the_answer_has_one_key_for_each_picture(client):
    for form in ("b64_json", "url"):
        made = client.images.with_raw_response.generate(
            model="qwen-image", prompt=PROMPT, response_format=form, n=2
        )
        told = json.loads(made.text)
        assert set(told) == {"created", "data"}
        assert [set(one) for one in told["data"]] == [{form}] * 2
        assert made.text.endswith("\n")
        assert made.headers["x-request-id"]


def test_three_pictures_are_three_tasks(client, upstream):
    colours = iter(COLOURS)
    upstream.decide = lambda fields: Answer(body=image_bytes(colour=next(colours)))
    made = client.images.generate(model="qwen-image", prompt=PROMPT, n=3)
    found = {base64.b64decode(one.b64_json) for one in made.data}
    assert found == {image_bytes(colour=colour) for colour in COLOURS}
    assert len(upstream.calls) == 3


def test_the_pictures_come_in_the_order_of_their_seeds(client, upstream):
    upstream.decide = lambda fields: Answer(body=image_bytes(colour=COLOURS[fields["seed"]]))
    for form in ("b64_json", "url"):
        made = client.images.generate(
            prompt=PROMPT, n=3, response_format=form, extra_body={"seed": 0}
        )
        found = [
            base64.b64decode(one.b64_json) if one.b64_json else fetch(one.url)[1]
            for one in made.data
        ]
        assert found == [image_bytes(colour=colour) for colour in COLOURS]


def test_the_length_is_told_before(shared):
    server, _ = shared
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    body = json.dumps({"prompt": PROMPT, "n": 2})
    connection.request("POST", "/v1/images/generations", body, {"X-API-Key": KEY})
    answer = connection.getresponse()
    assert answer.headers["Transfer-Encoding"] is None
    length = int(answer.headers["Content-Length"])
    assert len(answer.read()) == length
    connection.close()


def test_this_servers_own_fields_are_taken(client, upstream):
    given = {
        "seed": 4294967295,
        "negative_prompt": "a dog",
        "num_inference_steps": 12,
        "guidance_scale": 3.5,
        "true_cfg_scale": 2,
        "width": 640,
        "height": 384,
    }
    client.images.generate(
        model="qwen-image", prompt=PROMPT, size="512x512", extra_body={**given, "priority": 5}
    )
    assert upstream.calls == [{"model": "qwen-image", "prompt": PROMPT, **given}]


def test_a_seed_counts_up_so_that_no_picture_is_paid_for_twice(client, upstream):
    client.images.generate(model="qwen-image", prompt=PROMPT, n=3, extra_body={"seed": 4294967294})
    assert sorted(call["seed"] for call in upstream.calls) == [0, 4294967294, 4294967295]


def test_what_has_no_meaning_here_is_ignored(client, upstream):
    client.images.generate(
        model="qwen-image",
        prompt=PROMPT,
        quality="hd",
        style="vivid",
        background="transparent",
        user="u-1",
        moderation="low",
        output_format="png",
        extra_body={"something": {"else": 1}},
    )
    assert set(upstream.calls[0]) == {
        *("model", "prompt", "width", "height", "guidance_scale", "num_inference_steps", "seed")
    }


@pytest.mark.parametrize("size", ["auto", "", None])
def test_any_size_is_the_default_one(client, upstream, size):
    client.images.generate(model="qwen-image", prompt=PROMPT, size=size)
    assert (upstream.calls[0]["width"], upstream.calls[0]["height"]) == (1024, 1024)


@pytest.mark.parametrize(
    ("model", "form"),
    [
        *(("dall-e-3", "url"), ("dall-e-2", "url"), ("dall-e", "url")),
        *(("gpt-image-1.5", "b64_json"), ("chatgpt-image-latest", "b64_json")),
    ],
)
def test_openais_own_models_mean_the_default_one(client, shared, upstream, model, form):
    made = client.images.generate(model=model, prompt=PROMPT)
    assert getattr(made.data[0], form)
    assert upstream.calls[0]["model"] == "qwen-image"
    assert f"DEFAULT_MODEL asked={model}" in shared[0].log()


def test_without_a_model_the_default_one_is_meant(client, upstream):
    client.images.generate(prompt=PROMPT)
    client.images.generate(prompt=PROMPT, model="")
    assert [call["model"] for call in upstream.calls] == ["qwen-image"] * 2


def test_null_means_nothing_given(client, upstream):
    nothing = dict.fromkeys(["n", "response_format", "user"])
    own = dict.fromkeys(["stream", "width", "height", "seed", "priority"])
    client.images.generate(prompt=PROMPT, size="512x768", **nothing, extra_body=own)
    client.images.generate(prompt=PROMPT, extra_body={"stream": False})
    first, second = upstream.calls
    assert (first["width"], first["height"]) == (512, 768)
    assert (second["width"], second["height"]) == (1024, 1024)


def test_base64_of_large_pictures_needs_little_memory(start):
    noise = random.Random(7).randbytes(2000 * 2000 * 3)
    out = io.BytesIO()
    Image.frombytes("RGB", (2000, 2000), noise).save(out, "PNG", compress_level=0)
    server, upstream = start()
    upstream.decide = lambda fields: Answer(body=out.getvalue())
    with openai_client(server) as client:
        one = client.images.generate(prompt=PROMPT)
        before = memory(server.runner(), "VmHWM")
        many = client.images.generate(prompt=PROMPT, n=10)
    assert {base64.b64decode(each.b64_json) for each in [*one.data, *many.data]} == {out.getvalue()}
    assert memory(server.runner(), "VmHWM") - before < 2 * len(out.getvalue())


# Edits

FOX, OWL = image_bytes(), image_bytes("JPEG", colour="orange")
EDITS = "qwen-image-edit-2511"


def given(call):
    """Return the pictures that Chutes was given."""
    return [base64.b64decode(text, validate=True) for text in call["image_b64s"]]


@pytest.fixture
def fox(tmp_path):
    path = tmp_path / "fox.png"
    path.write_bytes(FOX)
    return path


def test_a_file_is_edited(client, upstream, fox):
    upstream.decide = lambda fields: Answer(body=OWL)
    with fox.open("rb") as file:
        made = client.images.edit(image=file, prompt=PROMPT)
    assert base64.b64decode(made.data[0].b64_json, validate=True) == OWL
    (call,) = upstream.calls
    assert (call["prompt"], given(call)) == (PROMPT, [FOX])
    assert upstream.headers[-1][0].endswith(f"{EDITS}/generate")


@pytest.mark.parametrize(
    "image",
    [
        *(FOX, io.BytesIO(FOX), ("a.gif", FOX), ("a.txt", FOX, "text/plain")),
        *([FOX], (None, FOX, "application/octet-stream")),
    ],
    ids=["bytes", "a stream", "a wrong name", "a wrong type", "a list", "no name"],
)
def test_whatever_the_client_takes_for_a_file_is_edited(client, upstream, image):
    client.images.edit(image=image, prompt=PROMPT)
    assert given(upstream.calls[-1]) == [FOX]


def test_several_files_are_edited_as_one(client, upstream):
    client.images.edit(image=[FOX, ("owl", OWL), FOX], prompt=PROMPT)
    assert given(upstream.calls[-1]) == [FOX, OWL, FOX]


def test_each_of_several_edits_is_a_task(client, upstream):
    made = client.images.edit(image=FOX, prompt=PROMPT, n=3, extra_body={"seed": 8})
    assert len(made.data) == 3
    assert sorted(call["seed"] for call in upstream.calls) == [8, 9, 10]
    assert all(given(call) == [FOX] for call in upstream.calls)


def test_an_edit_comes_as_an_address(client, shared):
    made = client.images.edit(image=FOX, prompt=PROMPT, response_format="url")
    assert fetch(made.data[0].url) == (200, image_bytes())


def test_the_size_and_this_servers_own_fields_of_an_edit_are_taken(client, upstream):
    own = {"num_inference_steps": 8, "true_cfg_scale": 2.5, "negative_prompt": "7", "seed": 3}
    client.images.edit(
        image=FOX, prompt=PROMPT, model=EDITS, size="512x768", extra_body={**own, "priority": 5}
    )
    expected = {"prompt": PROMPT, "width": 512, "height": 768, **own}
    assert {k: v for k, v in upstream.calls[-1].items() if k != "image_b64s"} == expected


@pytest.mark.parametrize("model", ["gpt-image-1", "dall-e-2", "chatgpt-image-latest", ""])
def test_openais_own_models_mean_the_default_one_that_edits(client, upstream, model):
    client.images.edit(image=FOX, prompt=PROMPT, model=model, size="auto", quality="high")
    assert upstream.headers[-1][0].endswith(f"{EDITS}/generate")


def test_the_same_edit_with_its_key_is_paid_once(client, upstream):
    for _ in range(2):
        headers = {"Idempotency-Key": "an edit"}
        client.images.edit(image=FOX, prompt=PROMPT, extra_headers=headers)
    assert len(upstream.calls) == 1
    with pytest.raises(openai.UnprocessableEntityError):
        client.images.edit(image=OWL, prompt=PROMPT, extra_headers=headers)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image": b"GIF89a" + bytes(99)}, "images[0] is not a PNG, JPEG or WebP image"),
        ({"image": [FOX, FOX[:-4]]}, "images[1] ends early"),
        ({"image": [FOX] * 4}, "images must be 1 to 3"),
        ({"image": []}, "images must be 1 to 3"),
        ({"mask": FOX}, "say in the prompt what is to change"),
        ({"prompt": " "}, "Prompt is required"),
        ({"n": 11}, "n must be an integer from 1 to 10"),
        ({"size": "17x17"}, "size must be"),
        ({"extra_body": {"stream": True}}, "stream must be"),
        ({"model": "qwen-image"}, "takes no images"),
        ({"model": "no-such"}, "not known to take images"),
        ({"extra_body": {"seed": "x"}}, "seed must be an integer"),
    ],
)
def test_a_bad_edit_is_a_bad_request_and_stores_nothing(client, shared, fields, words):
    server, upstream = shared
    before = server.rows("SELECT count(*) FROM tasks"), kept_inputs(server)
    with pytest.raises(openai.BadRequestError) as error:
        client.images.edit(**{"image": FOX, "prompt": PROMPT, **fields})
    check_form(error.value, 400)
    assert words in error.value.body["message"]
    assert (server.rows("SELECT count(*) FROM tasks"), kept_inputs(server)) == before
    assert upstream.calls == []


def kept_inputs(server):
    return sorted(path.name for path in (server.folder / "inputs").iterdir())


def test_a_variation_is_not_found_and_told_what_to_do(client):
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(openai.NotFoundError, match="POST /v1/images/edits") as error,
    ):
        client.images.create_variation(image=FOX)
    check_form(error.value, 404)


def post_v1(server, body, headers=None):
    """Post as programs without the official client do; return the status and the JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Authorization": f"Bearer {KEY}", **(headers or {})}
    is_stream = not isinstance(body, bytes)
    connection.request("POST", "/v1/images/edits", body, headers, encode_chunked=is_stream)
    answer = connection.getresponse()
    status, told = answer.status, json.load(answer)
    connection.close()
    return status, told


def url_of(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def test_openais_json_form_is_taken(shared):
    server, upstream = shared
    images = [{"image_url": url_of(FOX)}, {"image_url": url_of(OWL), "file_id": None}]
    body = {"prompt": PROMPT, "images": images, "model": "gpt-image-1", "mask": None}
    status, told = post_v1(server, json.dumps(body).encode(), {"Content-Type": "application/json"})
    assert (status, list(told)) == (200, ["created", "data"])
    assert given(upstream.calls[-1]) == [FOX, OWL]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"images": [{"image_url": "https://x.example/a.png"}]}, "images[0] is an address, which"),
        ({"images": [{"file_id": "file-1"}]}, "images[0] must be"),
        ({"images": [{"image_url": url_of(FOX)}, {}]}, "images[1] must be"),
        ({"images": [url_of(FOX)]}, "images[0] must be"),
        ({"images": [{"image_url": "iVBOR"}]}, "images[0] must be"),
        ({"mask": {"image_url": url_of(FOX)}}, "say in the prompt what is to change"),
        ({"mask": {"file_id": "file-1"}}, "say in the prompt what is to change"),
    ],
)
def test_what_of_the_json_form_is_not_taken_is_told(shared, fields, words):
    server, upstream = shared
    body = {"prompt": PROMPT, "images": [{"image_url": url_of(FOX)}], **fields}
    status, told = post_v1(server, json.dumps(body).encode(), {"Content-Type": "application/json"})
    assert status == 400
    assert words in told["error"]["message"]
    assert told["error"]["type"] == "invalid_request_error"
    assert upstream.calls == []


@pytest.mark.parametrize(
    ("parts", "is_chunked"),
    [
        # Open WebUI, with one picture and with two.
        ({"model": EDITS, "prompt": PROMPT, "n": "1", "size": "512x512", "image": 1}, False),
        ({"prompt": PROMPT, "response_format": "b64_json", "image[]": 2}, False),
        # LibreChat, whose body has no length where it is read from a stream.
        ({"model": "gpt-image-1", "prompt": PROMPT, "quality": "auto", "image[]": 2}, True),
        # n8n.
        ({"model": "dall-e-2", "prompt": PROMPT, "image": 1, "response_format": "b64_json"}, False),
        # Vercel's SDK, which reads base64 alone.
        ({"model": EDITS, "prompt": PROMPT, "n": "1", "image": 1}, False),
    ],
    ids=["open-webui", "open-webui-two", "librechat", "n8n", "vercel"],
)
def test_what_programs_send_is_edited(shared, parts, is_chunked):
    server, upstream = shared
    boundary, body = "----formdata-undici-042", b""
    for name, value in parts.items():
        pictures = [FOX, OWL][:value] if isinstance(value, int) else [None]
        for picture in pictures:
            named = '; filename="image.png"\r\nContent-Type: image/png' if picture else ""
            body += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'.encode()
            body += f"{named}\r\n\r\n".encode() + (picture or value.encode()) + b"\r\n"
    body += f"--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    pieces = (body[start : start + 700] for start in range(0, len(body), 700))
    status, told = post_v1(server, pieces if is_chunked else body, headers)
    assert status == 200, told
    assert base64.b64decode(told["data"][0]["b64_json"]) == image_bytes()
    count = next(value for value in parts.values() if isinstance(value, int))
    assert given(upstream.calls[-1]) == [FOX, OWL][:count]


# The signature


@pytest.fixture
def signed(client):
    made = client.images.generate(model="qwen-image", prompt=PROMPT, response_format="url")
    return made.data[0].url


def test_a_signature_is_for_one_image_and_nothing_else(client, signed):
    address, _, signature = signed.partition("?sig=")
    other = client.images.generate(prompt=PROMPT, response_format="url").data[0].url
    assert fetch(f"{address}?sig={other.partition('?sig=')[2]}")[0] == 401
    for wrong in ("", signature[:-1], signature.upper(), "é", "0" * 64):
        assert fetch(f"{address}?sig={urllib.parse.quote(wrong)}")[0] == 401
    stem = address.removesuffix(".png")
    assert fetch(f"{stem}?sig={signature}")[0] == 200
    head = urllib.request.Request(signed, method="HEAD")
    with urllib.request.urlopen(head, timeout=30) as answer:
        assert answer.status == 200
    root = address.partition("/images/")[0]
    task_id = stem.rpartition("/")[2]
    for path in (f"/images/{task_id}/thumbnail", f"/status/{task_id}", f"/tasks/{task_id}"):
        assert fetch(f"{root}{path}?sig={signature}")[0] == 401


def test_a_signature_lets_nobody_delete(service, signed):
    task_id, signature = re.search(r"images/([0-9a-f-]+)\.png\?sig=(.+)", signed).groups()
    status, _, _ = service[0].request("DELETE", f"/tasks/{task_id}?sig={signature}")
    assert status == 401
    status, _, _ = service[0].request("POST", f"/images/{task_id}?sig={signature}")
    assert status == 401


def test_a_page_of_another_site_may_show_a_signed_image_and_no_other(signed):
    address = signed.partition("?")[0]
    for url, status in ((signed, 200), (address, 403)):
        request = urllib.request.Request(url, headers={"Sec-Fetch-Site": "cross-site"})
        assert fetch(request)[0] == status


def test_an_address_is_good_over_processes_and_restarts(start):
    server, _ = start(API_KEYS=KEYS)
    with openai_client(server) as client:
        url = client.images.generate(prompt=PROMPT, response_format="url").data[0].url
    secret = server.folder / "tasks.sqlite3.secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert [name for name in server.folder.iterdir() if "secret" in name.name] == [secret]
    server.stop()
    secret.chmod(0o644)
    again, _ = start(API_KEYS=KEYS)
    assert fetch(url.replace(server.address, again.address)) == (200, image_bytes())
    assert secret.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("host", ["image_proxy:3000", "[::1]:3000"])
def test_the_address_is_by_the_name_that_was_used(client, host):
    made = client.images.generate(
        prompt=PROMPT, response_format="url", extra_headers={"Host": host}
    )
    assert made.data[0].url.startswith(f"http://{host}/images/")


def test_a_name_that_makes_no_address_is_refused_before_it_costs(client, upstream):
    with pytest.raises(openai.BadRequestError, match="set PUBLIC_URL") as error:
        client.images.generate(
            prompt=PROMPT, response_format="url", extra_headers={"Host": "user@evil"}
        )
    check_form(error.value, 400)
    assert upstream.calls == []


# Models


def test_the_models_are_those_that_are_known_and_the_default_one(start):
    server, upstream = start(DEFAULT_MODEL="of-ours")
    upstream.decide = lambda fields: refusal(404, "model not found")
    with openai_client(server) as client:
        with pytest.raises(openai.BadRequestError):
            client.images.generate(prompt=PROMPT, model="misspelt")
        models = list(client.models.list())
    assert [model.id for model in models] == [
        *dict.fromkeys(model.name for model in load(ROOT / "models.toml").values()),
        "of-ours",
    ]
    assert {(model.object, type(model.created)) for model in models} == {("model", int)}


def test_the_models_are_those_that_are_allowed(start):
    server, _ = start(MODELS="qwen-image, x/y")
    with openai_client(server) as client:
        assert [model.id for model in client.models.list()] == ["qwen-image", "x/y"]
        one = client.models.retrieve("x/y")
        assert one == list(client.models.list())[1]
        with pytest.raises(openai.NotFoundError, match="There is no model z;") as missing:
            client.models.retrieve("z")
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError, match="qwen-image, x/y") as error:
            client.images.generate(prompt=PROMPT, model="z")
        assert error.value.param == "model"
        client.images.generate(prompt=PROMPT, model="gpt-image-1")


def test_a_model_that_is_allowed_by_name_is_itself(start):
    server, upstream = start(MODELS="qwen-image,gpt-image-of-ours")
    with openai_client(server) as client:
        client.images.generate(prompt=PROMPT, model="gpt-image-of-ours")
    assert upstream.calls[0]["model"] == "gpt-image-of-ours"


# Errors, each as the class that the client raises


TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def check_form(error, status, kind=None):
    assert error.status_code == status
    told = error.response.json()
    assert error.response.text.endswith("}\n")
    assert set(told) == {"error"}
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert told["error"]["message"] and told["error"]["code"]
    usual = "server_error" if status >= 500 else "invalid_request_error"
    assert told["error"]["type"] == (kind or TYPES.get(status, usual))
    assert error.request_id


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": "two"}, "n"),
        ({"size": "64x64"}, "size"),
        ({"size": "1024"}, "size"),
        ({"size": "1024x4096"}, "size"),
        ({"size": "512x51\u0662"}, "size"),
        ({"response_format": "png"}, "response_format"),
        ({"extra_body": {"stream": True}}, "stream"),
        ({"extra_body": {"seed": -1}}, "seed"),
        ({"extra_body": {"width": "wide"}}, "width"),
        ({"extra_body": {"height": 4096}}, "height"),
        ({"extra_body": {"priority": 101}}, "priority"),
        ({"extra_body": {"guidance_scale": 21}}, "guidance_scale"),
        ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"extra_body": {"true_cfg_scale": 11}}, "true_cfg_scale"),
        ({"extra_body": {"negative_prompt": 7}}, "negative_prompt"),
        ({"prompt": " "}, "prompt"),
        ({"model": "../x"}, "model"),
    ],
)
def test_a_bad_request_names_its_field_and_stores_nothing(client, shared, fields, param):
    server, upstream = shared
    before = server.rows("SELECT count(*) FROM tasks")
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(**{"prompt": PROMPT, "model": "qwen-image", **fields})
    check_form(error.value, 400)
    assert error.value.param == param
    assert error.value.type == "invalid_request_error"
    assert server.rows("SELECT count(*) FROM tasks") == before
    assert upstream.calls == []


def test_a_key_is_in_no_error(client):
    for field in ("size", "response_format", "n"):
        with pytest.raises(openai.BadRequestError) as error:
            client.images.generate(prompt=PROMPT, **{field: KEY})
        assert KEY not in error.value.response.text


def test_a_wrong_key_is_an_authentication_error(shared):
    with openai_client(shared[0], key="wrong") as client:
        for call in (client.models.list, lambda: client.images.generate(prompt=PROMPT)):
            with pytest.raises(openai.AuthenticationError, match="A key is needed") as error:
                call()
            check_form(error.value, 401)
            assert error.value.response.headers["www-authenticate"].lower() == "bearer"


def test_another_sites_page_is_a_permission_error(client):
    with pytest.raises(openai.PermissionDeniedError, match="another site") as error:
        client.images.generate(prompt=PROMPT, extra_headers={"Origin": "https://evil.example"})
    check_form(error.value, 403)


def test_an_unknown_route_is_a_not_found_error(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.moderations.create(input=PROMPT)
    check_form(error.value, 404)


def test_a_key_with_another_request_is_an_unprocessable_entity_error(client, upstream):
    headers = {"Idempotency-Key": "another request"}
    client.images.generate(prompt=PROMPT, extra_headers=headers)
    with pytest.raises(openai.UnprocessableEntityError, match="Idempotency-Key") as error:
        client.images.generate(prompt=PROMPT, n=2, extra_headers=headers)
    check_form(error.value, 422)
    assert len(upstream.calls) == 1


def test_a_canceled_task_is_a_conflict_error(client, shared):
    server, upstream = shared
    upstream.gate.clear()
    thread = threading.Timer(0, cancel_all, (server, upstream))
    thread.start()
    with pytest.raises(openai.ConflictError, match="canceled") as error:
        client.images.generate(prompt=PROMPT)
    thread.join()
    check_form(error.value, 409)
    assert error.value.code == "canceled"
    assert error.value.response.headers["x-should-retry"] == "false"
    assert len(upstream.calls) == 1


def cancel_all(server, upstream):
    wait_until(lambda: upstream.at_once)
    for (task_id,) in server.rows("SELECT id FROM tasks WHERE status = 'processing'"):
        request = urllib.request.Request(
            f"{server.address}/tasks/{task_id}/cancel", b"", {"X-API-Key": KEY}
        )
        urllib.request.urlopen(request, timeout=30).close()


def test_a_full_queue_is_a_rate_limit_error(start):
    server, _ = start(MAX_PENDING=2)
    server.request("POST", "/queue/pause")
    with openai_client(server, max_retries=0) as client:
        with pytest.raises(openai.RateLimitError, match="MAX_PENDING") as error:
            client.images.generate(prompt=PROMPT, n=3)
        check_form(error.value, 429)
    assert int(error.value.response.headers["retry-after"]) > 0
    assert "x-should-retry" not in error.value.response.headers
    assert server.rows("SELECT count(*) FROM tasks") == [(0,)]


FAILURES = [
    (refusal(400, "no"), openai.BadRequestError, 400, "upstream_rejected"),
    (refusal(402, "Please add balance"), openai.RateLimitError, 429, "upstream_payment"),
    (refusal(401, "Invalid token."), openai.InternalServerError, 502, "upstream_auth"),
    (refusal(500, "no"), openai.InternalServerError, 502, "upstream_error"),
    (Answer(body=b"not an image"), openai.InternalServerError, 502, "not_an_image"),
    (Answer(body=image_bytes()[:-9]), openai.InternalServerError, 502, "upstream_truncated"),
    (Answer(body=bytes(2**21)), openai.InternalServerError, 502, "image_too_large"),
]


@pytest.mark.parametrize(("answer", "kind", "status", "code"), FAILURES)
def test_a_failed_task_is_an_error_that_is_not_tried_again(
    client, shared, upstream, answer, kind, status, code
):
    before = shared[0].rows("SELECT count(*) FROM tasks")[0][0]
    upstream.decide = lambda fields: answer
    with pytest.raises(kind) as error:
        client.images.generate(prompt=PROMPT)
    resume(shared[0])  # Some failures pause the queue.
    check_form(error.value, status, "insufficient_quota" if status == 429 else None)
    assert error.value.code == code
    assert error.value.response.headers["x-should-retry"] == "false"
    tries = 2 if code in ("upstream_error", "not_an_image", "upstream_truncated") else 1
    assert len(upstream.calls) == tries, "the client did not pay again"
    assert shared[0].rows("SELECT count(*) FROM tasks") == [(before + 1,)]


def resume(server):
    request = urllib.request.Request(f"{server.address}/queue/resume", b"", {"X-API-Key": KEY})
    urllib.request.urlopen(request, timeout=30).close()


def test_a_timeout_and_what_waited_too_long_are_timeouts(start):
    server, upstream = start(TASK_TIMEOUT=1, MAX_ATTEMPTS=1, TASK_TTL=1, CONCURRENCY=1)
    upstream.gate.clear()
    with openai_client(server) as client, pytest.raises(openai.InternalServerError) as error:
        client.images.generate(prompt=PROMPT)
    check_form(error.value, 504)
    assert error.value.code == "upstream_timeout"
    server.request("POST", "/queue/pause")
    with openai_client(server) as client, pytest.raises(openai.InternalServerError) as error:
        client.images.generate(prompt=PROMPT)
    check_form(error.value, 504)
    assert error.value.code == "expired"


def test_one_of_three_that_fails_is_an_error_at_once_with_all_ids(client, upstream):
    """The others may take long: they are not waited for, but named."""
    others = threading.Event()

    def decide(fields):
        if fields["seed"] == 1:
            return refusal(400, "no")
        others.wait(60)
        return Answer()

    upstream.decide = decide
    try:
        with pytest.raises(openai.BadRequestError) as error:
            client.images.generate(prompt=PROMPT, n=3, extra_body={"seed": 0})
    finally:
        others.set()
    failed, *stored = ids_in(error.value)
    assert len(stored) == len(set(stored)) == 3
    assert failed == stored[1]
    assert error.value.code == "upstream_rejected"


def test_a_wait_that_is_over_is_an_error_and_the_tasks_go_on(start):
    server, upstream = start(OPENAI_WAIT=1)
    upstream.gate.clear()
    with openai_client(server) as client, pytest.raises(openai.InternalServerError) as error:
        client.images.generate(prompt=PROMPT, n=2)
    check_form(error.value, 504)
    assert error.value.response.headers["x-should-retry"] == "false"
    ids = ids_in(error.value)
    assert len(ids) == 2
    upstream.gate.set()
    assert {task["status"] for task in server.all_end(ids)} == {"completed"}
    assert len(upstream.calls) == 2


def test_a_client_that_tells_its_patience_is_answered_before_it_ends(client, upstream):
    upstream.gate.clear()
    with pytest.raises(openai.InternalServerError) as error:
        client.with_options(timeout=1).images.generate(prompt=PROMPT)
    assert error.value.status_code == 504


@pytest.mark.parametrize("told", ["nan", "-1", "", "soon", "1e999"])
def test_a_patience_of_no_sense_is_no_patience(client, told):
    made = client.images.generate(prompt=PROMPT, extra_headers={"X-Stainless-Read-Timeout": told})
    assert made.data[0].b64_json


def test_a_client_that_hangs_up_cancels_nothing(shared):
    server, upstream = shared
    upstream.gate.clear()
    silent = {"X-Stainless-Read-Timeout": openai.Omit()}
    hasty = openai_client(server, max_retries=0, timeout=0.5)
    with hasty as client, pytest.raises(openai.APITimeoutError):
        client.images.generate(prompt=PROMPT, extra_headers=silent)
    wait_until(lambda: upstream.at_once == 1)
    ((task_id,),) = server.rows("SELECT id FROM tasks ORDER BY seq DESC LIMIT 1")
    upstream.gate.set()
    wait_until(
        lambda: server.rows(f"SELECT 1 FROM tasks WHERE id = '{task_id}' AND status = 'completed'")
    )
    assert len(upstream.calls) == 1


def test_a_client_that_hangs_up_frees_its_place(start):
    server, upstream = start(THREADS=2)
    upstream.gate.clear()
    body = json.dumps({"prompt": PROMPT})
    gone = http.client.HTTPConnection("127.0.0.1", server.port)
    gone.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
    wait_until(lambda: upstream.at_once == 1)
    gone.close()
    with openai_client(server, max_retries=0, timeout=1) as client:
        wait_until(lambda: _status_of(client) == 504)


def _status_of(client):
    with pytest.raises(openai.APIStatusError) as error:
        client.images.generate(prompt=PROMPT)
    return error.value.status_code


def test_nobody_there_is_a_connection_error():
    port = closed_port()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
    with client, pytest.raises(openai.APIConnectionError):
        client.images.generate(prompt=PROMPT)


def test_calls_past_half_of_the_threads_are_refused_and_store_nothing(start):
    server, upstream = start(THREADS=4)
    upstream.gate.clear()
    made = []

    def call():
        with openai_client(server) as client:
            made.append(client.images.generate(prompt=PROMPT))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: upstream.at_once == 2)
    refused = pytest.raises(openai.RateLimitError, match="half of THREADS")
    with openai_client(server, max_retries=0) as client, refused as error:
        client.images.generate(prompt=PROMPT)
    check_form(error.value, 429)
    assert int(error.value.response.headers["retry-after"]) > 0
    assert "x-should-retry" not in error.value.response.headers
    assert server.rows("SELECT count(*) FROM tasks") == [(2,)]
    # Those of ?wait= have the same places.
    ((task_id,), _) = server.rows("SELECT id FROM tasks")
    assert server.request("GET", f"/status/{task_id}?wait=60")[2]["status"] == "processing"
    upstream.gate.set()
    for thread in threads:
        thread.join(30)
    assert len(made) == len(upstream.calls) == 2


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/v1/images/generations", {}, 405),
        ("POST", "/v1/models", {}, 405),
        ("POST", "/v1/images/generations", {"Content-Type": "text/plain"}, 415),
        ("POST", "/v1/images/generations", {"Content-Length": str(2**21)}, 413),
        ("POST", "/v1/images/generations", {"Idempotency-Key": ""}, 400),
        ("GET", "/v1/", {}, 404),
        ("GET", "/v1/models/x", {}, 404),
    ],
)
def test_every_error_has_openais_form(shared, method, path, headers, status):
    connection = http.client.HTTPConnection("127.0.0.1", shared[0].port, timeout=30)
    body = json.dumps({"prompt": PROMPT}) if method == "POST" else None
    connection.request(method, path, body, {"X-API-Key": KEY, **headers})
    answer = connection.getresponse()
    told = json.load(answer)
    connection.close()
    assert answer.status == status
    assert set(told) == {"error"}
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["X-Request-ID"]
    assert ("Allow" in answer.headers) == (status == 405)


def test_slow_readers_keep_their_places(start):
    data = image_bytes() + bytes(20_000_000)
    server, upstream = start(THREADS=4)
    upstream.decide = lambda fields: Answer(body=data)
    body = json.dumps({"prompt": PROMPT})
    readers = []
    for _ in range(2):
        readers.append(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60))
        readers[-1].request("POST", "/v1/images/generations", body)
        readers[-1].getresponse().read(100)
    with openai_client(server, max_retries=0) as client:
        with pytest.raises(openai.RateLimitError, match="half of THREADS"):
            client.images.generate(prompt=PROMPT)
        for reader in readers:
            reader.close()
        upstream.decide = lambda fields: Answer()
        wait_until(lambda: _is_made(client))


def _is_made(client):
    try:
        return client.images.generate(prompt=PROMPT)
    except openai.RateLimitError:
        return None


# Idempotency, deletion, and the end of the server


def test_the_same_key_is_answered_with_the_same_pictures(client, shared, upstream):
    colours = iter(COLOURS)
    upstream.decide = lambda fields: Answer(body=image_bytes(colour=next(colours)))
    made = [
        client.images.with_raw_response.generate(
            prompt=PROMPT, n=2, response_format=form, extra_headers={"Idempotency-Key": "twice"}
        )
        for form in ("b64_json", "b64_json", "url")
    ]
    assert len(upstream.calls) == 2
    first, again, urls = (one.parse().data for one in made)
    assert [one.b64_json for one in first] == [one.b64_json for one in again]
    assert [fetch(one.url)[1] for one in urls] == [base64.b64decode(one.b64_json) for one in first]
    assert [one.headers.get("idempotent-replayed") for one in made] == [None, "true", "true"]


def test_a_replay_waits_for_what_is_under_way(client, upstream):
    upstream.gate.clear()
    headers = {"Idempotency-Key": "under way"}
    with pytest.raises(openai.InternalServerError):
        client.with_options(timeout=1).images.generate(prompt=PROMPT, extra_headers=headers)
    upstream.gate.set()
    assert client.images.generate(prompt=PROMPT, extra_headers=headers).data[0].b64_json
    assert len(upstream.calls) == 1


def test_a_reload_lets_those_that_wait_have_their_pictures(start):
    server, upstream = start()
    upstream.gate.clear()
    made = []

    def call():
        with openai_client(server) as client:
            made.append(client.images.generate(prompt=PROMPT))

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(lambda: upstream.at_once == 1)
    before = set(server.workers())
    server.send(signal.SIGHUP)
    wait_until(lambda: set(server.workers()) - before)
    upstream.gate.set()
    thread.join(30)
    assert base64.b64decode(made[0].data[0].b64_json) == image_bytes()
    assert len(upstream.calls) == 1


def test_a_server_that_stops_answers_those_that_wait(start):
    server, upstream = start(SHUTDOWN_GRACE=1)
    upstream.gate.clear()
    errors = []

    def call():
        with openai_client(server) as client, pytest.raises(openai.APIStatusError) as error:
            client.images.generate(prompt=PROMPT)
        errors.append(error.value)

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(lambda: upstream.at_once == 1)
    server.stop(signal.SIGTERM)
    thread.join(30)
    assert errors[0].status_code == 504
    assert errors[0].response.headers["x-should-retry"] == "false"
    assert len(ids_in(errors[0])) == 1
