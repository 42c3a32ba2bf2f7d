"""Values out of a request: its body, its query and its headers."""

import gzip
import io
import json

import pytest
from conftest import PROMPT, submit

from web.params import MAX_BODY, patience

# The body: 37 that broke plain handlers, and what each must be told.

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
def test_a_hostile_body_is_refused_by_name(app, client, caplog, body, fault):
    answer = client.post("/generate", data=body, content_type="application/json")
    assert answer.status_code == 400
    assert answer.is_json
    assert fault in answer.json["error"]
    assert len(answer.json["error"]) < 400
    assert "Traceback" not in caplog.text
    assert app.database.list_tasks(None, None, None, 1) == []


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


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations"])
def test_a_compressed_body_is_refused(client, path):
    body = gzip.compress(json.dumps({"prompt": PROMPT}).encode())
    for encoding in ("gzip", "br", "GZIP"):
        answer = client.post(
            path,
            data=body,
            content_type="application/json",
            headers={"Content-Encoding": encoding},
        )
        assert answer.status_code == 415
        assert f"encoded as {encoding.lower()}; send it as it is" in answer.text


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
def test_a_body_may_be_said_to_be_as_it_is(client, encoding):
    headers = {"Content-Encoding": encoding}
    assert client.post("/generate", json={"prompt": PROMPT}, headers=headers).status_code == 202


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


def test_a_body_that_does_not_come_is_refused(client):
    class Stalled(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            raise TimeoutError

    environ = {"wsgi.input": Stalled(), "CONTENT_LENGTH": "15"}
    answer = client.post("/generate", environ_overrides=environ)
    assert answer.status_code == 400
    assert answer.json == {"error": "The body could not be read to its end"}


# The query


@pytest.mark.parametrize("wait", ["0", "61", "-1", "1.5", "", "x", "1e1", "٣"])
@pytest.mark.parametrize("path", ["/images/{}", "/status/{}", "/tasks/{}"])
def test_a_wait_is_an_integer_from_1_to_60(client, path, wait):
    answer = client.get(path.format(submit(client)), query_string={"wait": wait})
    assert answer.status_code == 400
    assert "wait must be an integer from 1 to 60" in answer.json["error"]


# The headers


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 280),
        ({"X-Stainless-Read-Timeout": "600"}, 280),
        ({"X-Stainless-Read-Timeout": "60"}, 58),
        ({"X-Stainless-Read-Timeout": "60.5", "X-Stainless-Timeout": "30"}, 58.5),
        ({"X-Stainless-Timeout": "30"}, 28),
        ({"X-Stainless-Read-Timeout": "3"}, 1.5),
        ({"X-Stainless-Timeout": "0"}, 0.25),
        ({"X-Stainless-Read-Timeout": "nan", "X-Stainless-Timeout": "30"}, 28),
    ],
)
def test_the_shorter_patience_counts_less_a_margin(client, headers, seconds):
    with client.application.test_request_context(headers=headers):
        assert patience() == seconds
