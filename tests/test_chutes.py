"""One call to the upstream: what each answer and each fault means for the queue."""

import gzip
import hashlib
import json
import os
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import requests
import responses
from conftest import TOKEN
from upstream import Answer, closed_port, image_bytes, raw_server, refusal, until_gone

import chutes
from chutes import MAX_RETRY_AFTER, Canceled, CancelToken, Chutes, ChutesError
from models import ROUTER, of_setting
from records import Remedy

URL = "https://image.chutes.ai/generate"
PARAMS = {"width": 512}
MODEL = of_setting("m", ROUTER)


@pytest.fixture
def call(configure, tmp_path, clock):
    """Return a function that makes one call and returns the file, or raises what it raises."""

    def make(url=URL, token=None, model="m", seconds=600, sink=ignore, **values):
        config = configure(CHUTES_API_URL=url, **values)
        config = config.model_copy(update={"task_timeout": seconds})
        client = Chutes(config, clock)
        part = tmp_path / "part"
        client.generate(of_setting(model, url), "a fox", PARAMS, part, token or CancelToken(), sink)
        return part.read_bytes()

    return make


def ignore(data):
    pass


def refused(call, *args, **values):
    with pytest.raises(ChutesError) as caught:
        call(*args, **values)
    return caught.value


# What is sent, and what comes back


def test_the_body_is_flat_and_the_token_a_bearer(call, upstream):
    assert call(upstream.url) == image_bytes()
    assert upstream.calls == [{"model": "m", "prompt": "a fox", "width": 512}]
    path, headers = upstream.headers[0]
    assert path == "/generate"
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert headers["Accept-Encoding"] == "identity"
    assert headers["Content-Type"] == "application/json"
    assert "X-Chutes-Trace" not in headers


def test_a_model_in_the_address_is_not_in_the_body(call, upstream):
    call(upstream.url.replace("/generate", "/{model}/generate"), model="z-image")
    assert upstream.headers[0][0] == "/z-image/generate"
    assert upstream.calls == [{"prompt": "a fox", "width": 512}]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_bytes_on_disk_are_those_that_were_sent(call, upstream, kind):
    data = image_bytes(kind, (1000, 700)) + os.urandom(200_000)
    upstream.decide = lambda fields: Answer(body=data, headers={"Content-Type": "text/html"})
    assert hashlib.sha256(call(upstream.url)).digest() == hashlib.sha256(data).digest()


def test_the_bytes_are_handed_on_while_they_come(call):
    data, passed, some = os.urandom(200_000), bytearray(), threading.Event()

    def sink(piece):
        passed.extend(piece)
        some.set()

    def answer(connection):
        connection.sendall(HEAD + b"Content-Length: 200000\r\n\r\n" + data[:100_000])
        if some.wait(20):
            connection.sendall(data[100_000:])

    with raw_server(answer) as url:
        assert call(url, sink=sink) == passed == data


def test_every_call_has_a_connection_of_its_own(call):
    ports = []

    def answer(connection):
        ports.append(connection.getpeername()[1])
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")
        until_gone(connection)

    with raw_server(answer) as url:
        assert call(url) == call(url) == b"abc"
    assert len(set(ports)) == 2


def test_netrc_and_proxies_of_the_environment_are_ignored(call, upstream, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("default login someone password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    call(upstream.url)
    assert upstream.headers[0][1]["Authorization"] == f"Bearer {TOKEN}"


def test_the_invocation_is_kept(configure, upstream, tmp_path):
    upstream.decide = lambda fields: Answer(headers={"X-Chutes-InvocationID": "inv-7"})
    client = Chutes(configure(CHUTES_API_URL=upstream.url))
    reply = client.generate(MODEL, "p", {}, tmp_path / "part", CancelToken(), ignore)
    assert (reply.status, reply.invocation_id) == (200, "inv-7")


# Plain statuses

STATUSES = [
    (400, "bad request, naughty naughty", Remedy.FAIL, "upstream_rejected"),
    (401, "Invalid token.", Remedy.PAUSE, "upstream_auth"),
    (402, "Subscription usage cap exceeded.", Remedy.PAUSE, "upstream_payment"),
    (403, "Token does not have permission", Remedy.FAIL, "upstream_auth"),
    (404, "model not found: m", Remedy.FAIL, "upstream_rejected"),
    (405, "no", Remedy.FAIL, "upstream_rejected"),
    (408, "slow", Remedy.RETRY, "upstream_error"),
    (413, "large", Remedy.FAIL, "upstream_rejected"),
    (418, "teapot", Remedy.FAIL, "upstream_rejected"),
    (422, "no", Remedy.FAIL, "upstream_rejected"),
    (429, "Infrastructure is at maximum capacity", Remedy.HOLD_MODEL, "unavailable"),
    (429, "Free models limit reached for today - x", Remedy.HOLD_MODEL, "unavailable"),
    (500, "exhausted all available targets", Remedy.RETRY, "upstream_error"),
    (501, "no", Remedy.RETRY, "upstream_error"),
    (502, "bad gateway", Remedy.HOLD_MODEL, "unavailable"),
    (503, "No instances available (yet)", Remedy.HOLD_MODEL, "unavailable"),
    (503, "This chute is currently disabled.", Remedy.FAIL, "upstream_rejected"),
    (504, "gateway timeout", Remedy.HOLD_MODEL, "unavailable"),
    (507, "full", Remedy.RETRY, "upstream_error"),
    (519, "odd", Remedy.RETRY, "upstream_error"),
    *[(status, "edge", Remedy.HOLD_MODEL, "unavailable") for status in range(520, 525)],
    (525, "edge", Remedy.RETRY, "upstream_error"),
    *[(status, "moved", Remedy.FAIL, "upstream_rejected") for status in (300, 301, 302, 307, 308)],
]


INVALID = '{"detail":"Invalid input parameters"}'
WRAPPED = json.dumps({"detail": INVALID})
FIELDS = [
    {"type": "missing", "loc": ["body", "width"], "msg": "Field required"},
    {"type": "less", "loc": ["body", "seed"], "msg": "Input should be less than 9", "ctx": {}},
]


@responses.activate
@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"detail": f"Invalid request: Invalid request: {INVALID}"}, "Invalid input parameters"),
        ({"detail": f"Invalid request: {WRAPPED}"}, "Invalid input parameters"),
        ({"detail": f"It said {INVALID}, twice"}, "It said Invalid input parameters, twice"),
        ({"detail": "Invalid request: width is odd"}, "width is odd"),
        ({"detail": "Invalid request: "}, "Invalid request:"),
        ({"detail": FIELDS}, "width: Field required; seed: Input should be less than 9"),
        ({"detail": json.dumps({"detail": FIELDS[:1]})}, "width: Field required"),
        ({"detail": {"message": "no", "quota_reset_timestamp": None}}, "no"),
        ({"message": "no"}, "no"),
        # What holds no sentence is shown as it is.
        ({"detail": "use {} or {this}"}, "use {} or {this}"),
        ({"detail": 'odd: {"a": 1}'}, 'odd: {"a": 1}'),
        ({"detail": {"a": 1}}, '{"a": 1}'),
        ({"detail": [7]}, "7"),
    ],
)
def test_what_chutes_says_is_read_once_and_without_json(call, body, told):
    responses.post(URL, json=body, status=400)
    error = refused(call)
    assert str(error) == f"Chutes refused the request (400): {told}"


@responses.activate
@pytest.mark.parametrize("wrap", ['{"detail":%s}', "[%s]", '{"loc":%s}'])
def test_a_refusal_nested_without_end_is_no_fault_of_ours(call, wrap):
    bodies = ['"no"']
    while len(bodies) < 1100:
        bodies.append(wrap % bodies[-1])
    # Some are just not too deep to be read, but to be written.
    for body in bodies[900:]:
        responses.upsert("POST", URL, body=body, status=400)
        assert refused(call).code == "upstream_rejected"
    body = "no"
    for _ in range(12):
        body = json.dumps({"detail": body})
    responses.upsert("POST", URL, body=body, status=400)
    assert refused(call).code == "upstream_rejected"


@responses.activate
@pytest.mark.parametrize(("status", "detail", "remedy", "code"), STATUSES)
def test_a_status_says_what_to_do(call, status, detail, remedy, code):
    responses.post(URL, json={"detail": detail}, status=status)
    error = refused(call)
    assert (error.remedy, error.code) == (remedy, code)
    assert error.reply.status == status


@responses.activate
@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500])
def test_chutes_own_words_are_in_the_message(call, status):
    responses.post(URL, json={"detail": "its very own words"}, status=status)
    assert "its very own words" in str(refused(call))


@responses.activate
@pytest.mark.parametrize("body", ["plain words", '{"error": "plain words"}', '"plain words"'])
def test_a_refusal_need_not_be_as_promised(call, body):
    responses.post(URL, body=body, status=400)
    assert "plain words" in str(refused(call))


@responses.activate
def test_html_is_not_shown(call):
    responses.post(URL, body="<html><h1>Oh no</h1></html>", status=404)
    assert str(refused(call)) == "Chutes refused the request (404)"


@responses.activate
def test_words_without_end_are_shortened(call):
    responses.post(URL, body="x" * 1_000_000, status=400)
    assert len(str(refused(call))) < 400


@responses.activate
def test_deep_nesting_is_only_a_refusal(call):
    responses.post(URL, body="[" * 60_000, status=400)
    assert refused(call).code == "upstream_rejected"


@responses.activate
def test_a_402_with_a_reset_time_holds_all_until_then(call, clock):
    reset = datetime.fromtimestamp(clock.now, UTC) + timedelta(hours=5)
    detail = {"message": "Quota exceeded", "quota_reset_timestamp": reset.isoformat()}
    responses.post(URL, json={"detail": detail}, status=402)
    error = refused(call)
    assert (error.remedy, error.wait) == (Remedy.HOLD_ALL, 5 * 3600)
    assert error.headline == "Chutes' daily quota is used up"


@responses.activate
@pytest.mark.parametrize("reset", ["soon", None, 5, ""])
def test_a_402_with_no_known_reset_time_pauses(call, reset):
    detail = {"message": "Quota exceeded", "quota_reset_timestamp": reset}
    responses.post(URL, json={"detail": detail}, status=402)
    error = refused(call)
    assert (error.remedy, error.code) == (Remedy.PAUSE, "upstream_payment")
    assert error.headline == "Chutes wants payment (402)"


@responses.activate
def test_a_reset_time_beyond_all_quotas_is_tried_sooner(call):
    detail = {"message": "Quota", "quota_reset_timestamp": "9999-12-31T23:59:59-12:00"}
    responses.post(URL, json={"detail": detail}, status=402)
    error = refused(call)
    assert error.remedy is Remedy.HOLD_ALL
    assert error.wait == 32 * 86400


@responses.activate
def test_a_reset_time_gone_by_is_tried_after_the_backoff(call):
    detail = {"message": "Quota exceeded", "quota_reset_timestamp": "2020-01-01T00:00:00+00:00"}
    responses.post(URL, json={"detail": detail}, status=402)
    error = refused(call)
    assert (error.remedy, error.wait) == (Remedy.HOLD_ALL, None)


@responses.activate
@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("7", 7),
        ("0", None),
        ("-5", None),
        ("1000000000", MAX_RETRY_AFTER),
        ("9" * 400, MAX_RETRY_AFTER),
        ("soon", None),
        ("", None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", None),
        ("Thu, 99 Jan 2099 00:00:00 GMT", None),
    ],
)
@pytest.mark.parametrize("status", [429, 502, 503, 504, 520])
def test_retry_after_is_honoured_up_to_an_hour(call, status, value, wait):
    responses.post(URL, status=status, headers={"Retry-After": value})
    assert refused(call).wait == wait


@pytest.mark.parametrize("status", [502, 504, *range(520, 525)])
def test_a_gateway_that_gives_up_late_is_work_that_took_too_long(
    call, upstream, monkeypatch, status
):
    upstream.decide = lambda fields: Answer(status, b"<html>", {"Retry-After": "7"})
    with monkeypatch.context() as late:
        late.setattr("chutes.EDGE_SECONDS", 0.0)
        error = refused(call, upstream.url)
    assert (error.remedy, error.code) == (Remedy.RETRY, "upstream_timeout")
    assert "Lower num_inference_steps or the size" in str(error)
    assert refused(call, upstream.url).remedy is Remedy.HOLD_MODEL


def test_a_gateway_is_late_after_300_seconds():
    assert chutes.EDGE_SECONDS == 300


@pytest.mark.parametrize("status", [429, 503])
def test_a_lack_of_capacity_is_one_however_late(call, upstream, monkeypatch, status):
    upstream.decide = lambda fields: Answer(status, b"{}")
    monkeypatch.setattr("chutes.EDGE_SECONDS", 0.0)
    assert refused(call, upstream.url).remedy is Remedy.HOLD_MODEL


@responses.activate
def test_retry_after_may_be_a_date(call, clock):
    when = datetime.fromtimestamp(clock.now + 90, UTC)
    responses.post(URL, status=503, headers={"Retry-After": format_datetime(when, usegmt=True)})
    assert refused(call).wait == 90


# No connection


def test_nothing_listens(call):
    error = refused(call, f"http://127.0.0.1:{closed_port()}/generate")
    assert (error.remedy, error.code) == (Remedy.HOLD_MODEL, "unavailable")
    assert error.headline == "Chutes cannot be reached for m (Connection refused)"


def test_a_name_that_does_not_resolve(call):
    error = refused(call, "https://no-such-host.invalid/generate")
    assert error.remedy is Remedy.HOLD_MODEL
    assert error.headline.startswith("Chutes cannot be reached for m (")


def test_a_tls_handshake_that_stalls_is_no_connection(call):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        error = refused(call, f"https://127.0.0.1:{listener.getsockname()[1]}/g", seconds=0.4)
        assert time.monotonic() - began < 5
    assert error.remedy is Remedy.HOLD_MODEL


@contextmanager
def full_listener():
    """Listen, but accept no connection: the next one waits for its answer."""
    with socket.socket() as listener, ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            connection = waiting.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/generate"


def test_connecting_is_bounded_by_the_deadline(call):
    with full_listener() as url:
        began = time.monotonic()
        error = refused(call, url, seconds=0.4)
        assert time.monotonic() - began < 3
    assert (error.remedy, error.code) == (Remedy.HOLD_MODEL, "unavailable")
    assert "timed out" in error.headline


def test_all_addresses_of_a_name_share_the_time_to_connect(call, monkeypatch):
    with full_listener() as url:
        address = ("127.0.0.1", int(url.split(":")[2].split("/")[0]))
        found = (socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
        monkeypatch.setattr("chutes.socket.getaddrinfo", lambda *a, **v: [found] * 5)
        began = time.monotonic()
        refused(call, url, seconds=0.4)
        assert time.monotonic() - began < 3


def test_the_second_address_is_tried_when_the_first_refuses(call, upstream, monkeypatch):
    ports = (closed_port(), upstream.server_address[1])
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]
    monkeypatch.setattr("chutes.socket.getaddrinfo", lambda *a, **v: found)
    assert call(upstream.url) == image_bytes()


def test_a_dead_address_leaves_time_for_the_next(call, upstream, monkeypatch):
    with full_listener() as url:
        ports = (int(url.split(":")[2].split("/")[0]), upstream.server_address[1])
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]
        monkeypatch.setattr("chutes.socket.getaddrinfo", lambda *a, **v: found)
        assert call(upstream.url, seconds=2) == image_bytes()


def test_connecting_can_be_canceled(call):
    token = CancelToken()
    threading.Timer(0.2, token.cancel, ("shutdown",)).start()
    with full_listener() as url, pytest.raises(Canceled, match="shutdown"):
        began = time.monotonic()
        call(url, token)
    assert time.monotonic() - began < 5


def test_a_tls_handshake_can_be_canceled(call):
    token = CancelToken()
    threading.Timer(0.2, token.cancel, ("shutdown",)).start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/generate"
        began = time.monotonic()
        with pytest.raises(Canceled, match="shutdown"):
            call(url, token)
    assert time.monotonic() - began < 5


# A connection that breaks, stalls, drips or lies

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
PICTURE = image_bytes("PNG", (400, 300))
LENGTH = HEAD + b"Content-Length: %d\r\n\r\n" % len(PICTURE)


def sent(data):
    return lambda connection: connection.sendall(data)


BREAKS = {
    "no answer at all": (b"", "upstream_error"),
    "half a status line": (b"HTTP/1.1 2", "upstream_error"),
    "no status line": (b"hello\r\n\r\n", "upstream_error"),
    "too many headers": (HEAD + b"X: y\r\n" * 500 + b"\r\n", "upstream_error"),
    "a length and no body": (LENGTH, "upstream_truncated"),
    "less than its length": (LENGTH + PICTURE[:-1], "upstream_truncated"),
    "chunks without an end": (
        CHUNKED + b"%x\r\n%b\r\n" % (len(PICTURE), PICTURE),
        "upstream_truncated",
    ),
    "half a chunk": (CHUNKED + b"%x\r\n%b" % (len(PICTURE), PICTURE[:99]), "upstream_truncated"),
    "a chunk that is none": (CHUNKED + b"zz\r\n\r\n", "upstream_truncated"),
    "not gzip at all": (
        HEAD + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
        "upstream_truncated",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_answer_counts_as_an_attempt(call, name):
    data, code = BREAKS[name]
    with raw_server(sent(data)) as url:
        error = refused(call, url)
    assert (error.remedy, error.code) == (Remedy.RETRY, code)


def test_a_reset_after_sending_counts_as_an_attempt(call):
    def reset(connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with raw_server(reset) as url:
        error = refused(call, url)
    assert (error.remedy, error.code) == (Remedy.RETRY, "upstream_error")


def test_a_body_without_a_length_is_left_to_the_decoder(call):
    with raw_server(sent(HEAD + b"\r\n" + PICTURE[:50])) as url:
        assert call(url) == PICTURE[:50]


def test_an_encoding_nobody_asked_for_is_undone(call):
    body = gzip.compress(PICTURE)
    head = HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    with raw_server(sent(head + body)) as url:
        assert call(url) == PICTURE


SLOW = {
    "a length that is none": (HEAD + b"Content-Length: abc\r\n\r\n" + PICTURE[:99], b""),
    "no answer": (b"", b""),
    "headers that drip": (HEAD, b"X-Slow: 1\r\n"),
    "a header that drips": (HEAD + b"X-Slow: ", b"x"),
    "a body that stalls": (LENGTH + PICTURE[:99], b""),
    "a body that drips": (LENGTH, b"\x89"),
    "chunks that drip": (CHUNKED, b"1\r\nx\r\n"),
    "a body without a length that stalls": (HEAD + b"\r\n" + PICTURE[:99], b""),
    "a body without a length that drips": (HEAD + b"\r\n", b"\x89"),
}


@pytest.mark.parametrize("name", SLOW)
def test_the_deadline_holds_in_every_phase(call, name):
    first, then = SLOW[name]

    def answer(connection):
        connection.sendall(first)
        until_gone(connection, then)

    with raw_server(answer) as url:
        began = time.monotonic()
        error = refused(call, url, seconds=0.4)
        took = time.monotonic() - began
    assert (error.remedy, error.code) == (Remedy.RETRY, "upstream_timeout")
    assert 0.35 < took < 3


@pytest.mark.parametrize("reason", ["shutdown", "canceled"])
@pytest.mark.parametrize("name", SLOW)
def test_another_thread_can_cut_the_call_in_every_phase(call, name, reason):
    first, then = SLOW[name]
    token, reached = CancelToken(), threading.Event()

    def answer(connection):
        connection.sendall(first)
        reached.set()
        until_gone(connection, then)

    def cut():
        reached.wait(10)
        token.cancel(reason)

    threading.Thread(target=cut).start()
    with raw_server(answer) as url, pytest.raises(Canceled, match=reason):
        call(url, token)


def test_a_token_that_was_canceled_before_there_was_a_connection_stays_so(call, upstream):
    token = CancelToken()
    token.cancel("shutdown")
    with pytest.raises(Canceled):
        call(upstream.url, token)


def test_an_answer_that_was_whole_when_it_was_canceled_is_kept(call):
    token = CancelToken()

    def answer(connection):
        connection.sendall(LENGTH + PICTURE)
        until_gone(connection)
        token.cancel("shutdown")

    with raw_server(answer) as url:
        assert call(url, token) == PICTURE


def test_a_refusal_that_stalls_in_its_body_is_known_by_its_status(call, monkeypatch):
    monkeypatch.setattr("chutes.ERROR_BODY_SECONDS", 0.2)

    def answer(connection):
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 50\r\n\r\nthe model")
        until_gone(connection)

    with raw_server(answer) as url:
        error = refused(call, url)
    assert (error.remedy, error.code) == (Remedy.FAIL, "upstream_rejected")


@pytest.mark.parametrize("status", [b"200 OK", b"302 Found", b"400 Bad Request"])
def test_a_body_that_never_ends_is_cut_short(call, status):
    def answer(connection):
        head = b"HTTP/1.1 %b\r\nLocation: /elsewhere\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head % status)
        while True:
            connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")

    with raw_server(answer) as url:
        error = refused(call, url, MAX_IMAGE_MB=1)
    assert error.code in ("image_too_large", "upstream_rejected")
    assert error.remedy is Remedy.FAIL


def test_a_redirect_is_not_followed(call, upstream):
    answer = b"HTTP/1.1 307 Temporary\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n"
    with raw_server(sent(answer % upstream.url.encode())) as url:
        error = refused(call, url)
    assert (error.remedy, error.code) == (Remedy.FAIL, "upstream_rejected")
    assert upstream.calls == []


@pytest.mark.parametrize("declared", [True, False])
def test_an_image_over_the_limit_is_refused(call, upstream, declared):
    data = os.urandom(1024 * 1024 + 1)
    if declared:
        head = HEAD + b"Content-Length: %d\r\n\r\n" % len(data)
        with raw_server(sent(head)) as url:
            error = refused(call, url, MAX_IMAGE_MB=1)
    else:
        upstream.decide = lambda fields: Answer(body=data)
        error = refused(call, upstream.url, MAX_IMAGE_MB=1)
    assert (error.remedy, error.code) == (Remedy.FAIL, "image_too_large")
    upstream.decide = lambda fields: Answer(body=data[1:])
    assert len(call(upstream.url, MAX_IMAGE_MB=1)) == 1024 * 1024


# The token


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 429, 500, 503])
@pytest.mark.parametrize("shape", ["{}", "Bearer {}", "x" * 250 + "{}", "a {} b {}"])
def test_an_echoed_token_is_not_repeated(call, upstream, status, shape):
    echo = shape.replace("{}", TOKEN.upper())
    upstream.decide = lambda fields: refusal(status, echo, X_Chutes_InvocationID=TOKEN)
    error = refused(call, upstream.url)
    told = f"{error} {error.headline} {error.reply}".lower()
    assert TOKEN.lower() not in told
    assert TOKEN.lower()[:20] not in told


@pytest.mark.parametrize(
    "echo",
    [
        TOKEN[:40],
        TOKEN[-20:],
        "\n".join(TOKEN[n : n + 9] for n in range(0, len(TOKEN), 9)),
        "\u200b".join(TOKEN),
        TOKEN.replace("_", "%5f"),
        " " * 65_500 + TOKEN,
    ],
)
def test_a_part_or_a_disguise_of_the_token_is_not_repeated(call, upstream, echo):
    upstream.decide = lambda fields: Answer(400, f"no: {echo}".encode())
    told = str(refused(call, upstream.url))
    bare = "".join(told.split()).lower()
    assert not any(TOKEN[n : n + 12].lower() in bare for n in range(len(TOKEN) - 11))
    assert told.startswith("Chutes refused the request (400)")


@pytest.mark.parametrize("detail", ["{}", ["{}"], {"a": "{}"}, {"{}": 1}])
def test_a_token_with_quotes_is_not_repeated(call, upstream, detail):
    token = 'a"quoted\\token"of\'the tests'
    shown = json.loads(json.dumps(detail).replace("{}", json.dumps(token)[1:-1]))
    upstream.decide = lambda fields: refusal(400, shown)
    told = str(refused(call, upstream.url, CHUTES_API_TOKEN=token))
    assert "quoted" not in told


def test_words_that_only_resemble_the_token_are_shown(call, upstream):
    upstream.decide = lambda fields: refusal(400, "cpk_01234 is no size; cpk_ neither")
    assert "cpk_01234 is no size" in str(refused(call, upstream.url))


# The disk


def test_a_disk_that_fails_is_told_after_all_of_the_image(configure, upstream, tmp_path):
    data = os.urandom(400_000)
    upstream.decide = lambda fields: Answer(body=data)
    client = Chutes(configure(CHUTES_API_URL=upstream.url))
    got = bytearray()
    with pytest.raises(OSError, match="No space left on device"):
        client.generate(MODEL, "p", {}, Path("/dev/full"), CancelToken(), got.extend)
    assert got == data


def test_a_disk_that_fails_does_not_hide_that_an_image_is_too_large(configure, upstream):
    upstream.decide = lambda fields: Answer(body=os.urandom(1024 * 1024 + 1))
    client = Chutes(configure(CHUTES_API_URL=upstream.url, MAX_IMAGE_MB=1))
    with pytest.raises(ChutesError) as caught:
        client.generate(MODEL, "p", {}, Path("/dev/full"), CancelToken(), ignore)
    assert caught.value.code == "image_too_large"


def test_a_folder_that_cannot_be_written_costs_no_call(configure, upstream, tmp_path):
    client, token = Chutes(configure(CHUTES_API_URL=upstream.url)), CancelToken()
    with pytest.raises(FileNotFoundError):
        client.generate(MODEL, "p", {}, tmp_path / "none" / "part", token, ignore)
    assert (upstream.calls, token.connected) == ([], False)


def _raise(error):
    raise error


# What is left behind


def test_a_call_leaves_no_thread_and_no_descriptor(call, upstream):
    call(upstream.url)
    before = len(list(Path("/proc/self/fd").iterdir()))
    tokens = [CancelToken() for _ in range(10)]
    for token in tokens:
        call(upstream.url, token)
    refused(call, f"http://127.0.0.1:{closed_port()}/generate")
    assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer) and t.is_alive()]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


@responses.activate
def test_a_fault_of_the_library_is_ours_at_the_boundary(call):
    responses.post(URL, body=requests.exceptions.ChunkedEncodingError("cut"))
    assert isinstance(refused(call).__cause__, requests.RequestException)
