"""Who may come in."""

import hmac
import re
import sqlite3
import threading
import uuid

import pytest
from conftest import KEYS, finished, submit
from upstream import refusal

from web.access import Signer


@pytest.fixture
def guarded(serve):
    return serve(API_KEYS=KEYS).client


@pytest.mark.parametrize("key", KEYS.split(","))
@pytest.mark.parametrize(
    "header",
    [
        ("Authorization", "Bearer {}"),
        ("Authorization", "bearer {}"),
        ("Authorization", "BEARER  {} "),
        ("X-API-Key", "{}"),
    ],
)
def test_each_key_opens_in_each_way(guarded, header, key):
    name, value = header
    answer = guarded.get("/queue", headers={name: value.format(key)})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": ""},
        {"X-API-Key": "wrong"},
        {"X-API-Key": KEYS},
        {"X-API-Key": "first-key-of-the-test"},
        {"X-API-Key": "FIRST-KEY-OF-THE-TESTS"},
        {"X-API-Key": "clé-\u20ac".encode().decode("latin-1")},
        {"Authorization": "first-key-of-the-tests"},
        {"Authorization": "Basic first-key-of-the-tests"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer first-key-of-the-tests second"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/queue"), ("POST", "/generate"), ("GET", "/images/x"), ("GET", "/nowhere")],
)
def test_without_a_key_nothing_opens(guarded, upstream, headers, method, path):
    answer = guarded.open(path, method=method, headers=headers, json={"prompt": "p"})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "X-API-Key" in answer.json["error"]
    key = {"X-API-Key": KEYS.split(",")[0]}
    assert guarded.get("/tasks", headers=key).json["tasks"] == []


def test_without_keys_in_the_settings_none_is_asked_for(client):
    assert client.get("/queue").status_code == 200
    assert client.get("/queue", headers={"X-API-Key": "any"}).status_code == 200


def test_a_key_is_in_no_answer_and_no_line(guarded, upstream, logged):
    key = KEYS.split(",")[0]
    upstream.decide = lambda fields: refusal(400, f"no: {key}")
    headers = {"X-API-Key": key}
    task_id = guarded.post("/generate", json={"prompt": "p"}, headers=headers).json["id"]
    answer = guarded.get(f"/status/{task_id}?wait=60", headers=headers)
    assert answer.json["status"] == "failed"
    assert key not in answer.text
    assert not [line for line in logged if key in line]


def test_every_key_is_compared_in_constant_time_as_bytes(guarded, monkeypatch):
    compared = []

    def compare(one, other):
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    first, second = (key.encode() for key in KEYS.split(","))
    guarded.get("/queue", headers={"X-API-Key": first.decode()})
    assert compared == [(first, first), (first, second)]


def test_a_key_is_in_no_row(guarded, tmp_path):
    key = KEYS.split(",")[0]
    headers = {"X-API-Key": key, "Idempotency-Key": "k"}
    assert guarded.post("/generate", json={"prompt": "p"}, headers=headers).status_code == 202
    dump = tmp_path / "dump.sqlite3"
    connection = sqlite3.connect(f"file:{tmp_path}/tasks.sqlite3?mode=ro", uri=True)
    connection.execute("VACUUM INTO ?", (str(dump),)).fetchall()
    connection.close()
    assert b"qwen-image" in dump.read_bytes()
    assert key.encode() not in dump.read_bytes()


# Other people's pages


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "Cross-Site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://localhost:81"},
        {"Origin": "https://localhost"},
        {"Origin": "http://localhost.evil.example"},
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/generate"), ("GET", "/tasks")])
def test_a_page_of_another_site_is_refused(client, upstream, headers, method, path):
    form = "application/x-www-form-urlencoded"
    body = '{"prompt": "p"}' if method == "POST" else None
    answer = client.open(path, method=method, data=body, content_type=form, headers=headers)
    assert answer.status_code == 403
    assert "PUBLIC_URL" in answer.json["error"]
    assert client.get("/tasks").json["tasks"] == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "HTTP://LOCALHOST"},
        {"Sec-Fetch-Site": "none"},
        {},
    ],
)
def test_the_servers_own_pages_and_programs_come_in(client, headers):
    assert client.post("/generate", json={"prompt": "p"}, headers=headers).status_code == 202


@pytest.mark.parametrize("host", ["localhost:3000", "127.0.0.1:3000", "127.9.9.9", "[::1]:3000"])
def test_loopback_names_are_the_servers_own(client, host):
    assert client.get("/queue", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:3000", "localhost.evil.example", "192.0.2.1"]
)
def test_a_name_that_was_pointed_here_is_refused(client, host):
    """The page of a rebound name is of the same origin: only its name tells."""
    headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    answer = client.get("/tasks", headers=headers)
    assert answer.status_code == 403
    assert "PUBLIC_URL" in answer.json["error"] and "API_KEYS" in answer.json["error"]


def test_a_name_that_is_none_is_refused(client):
    assert client.get("/tasks", headers={"Host": "[bad"}).status_code == 403


def test_the_public_address_is_the_servers_own(serve):
    client = serve(PUBLIC_URL="https://Pictures.example").client
    headers = {"Host": "pictures.example", "Origin": "https://pictures.example"}
    assert client.get("/queue", headers=headers).status_code == 200
    assert client.get("/queue", headers={"Host": "localhost"}).status_code == 200
    assert client.get("/queue", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize("host", ["evilpictures.example", "pictures.example.evil.example"])
def test_a_name_like_the_public_one_is_not_the_servers_own(serve, host):
    client = serve(PUBLIC_URL="https://pictures.example").client
    assert client.get("/queue", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("values", [{"API_KEYS": "k" * 20}, {"ALLOW_ANONYMOUS": 1}])
def test_with_keys_or_on_purpose_any_name_will_do(serve, values):
    client = serve(**values).client
    headers = {"Host": "192.0.2.1:3000", "X-API-Key": "k" * 20}
    assert client.get("/queue", headers=headers).status_code == 200
    headers["Origin"] = "http://evil.example"
    assert client.get("/queue", headers=headers).status_code == 403


# Proxies


FORWARDED = {
    "X-Forwarded-For": "192.0.2.7",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "pictures.example",
}


def test_forwarded_headers_are_ignored_unless_proxies_are_trusted(client, logged):
    assert client.get("/queue", headers=FORWARDED).status_code == 200
    assert any("GET /queue 200" in line and "client=127.0.0.1" in line for line in logged)
    own = {**FORWARDED, "Origin": "https://pictures.example"}
    assert client.get("/queue", headers=own).status_code == 403


def test_a_trusted_proxy_tells_who_asks_and_by_which_name(serve, logged):
    client = serve(TRUSTED_PROXIES=1, PUBLIC_URL="https://pictures.example").client
    own = {**FORWARDED, "Origin": "https://pictures.example", "Host": "127.0.0.1:3000"}
    assert client.get("/queue", headers=own).status_code == 200
    assert any("client=192.0.2.7" in line for line in logged)
    rebound = {**own, "X-Forwarded-Host": "evil.example", "Origin": "https://evil.example"}
    assert client.get("/queue", headers=rebound).status_code == 403


def test_behind_two_proxies_the_second_last_is_believed(serve, logged):
    client = serve(TRUSTED_PROXIES=2, PUBLIC_URL="https://pictures.example").client
    headers = {
        "X-Forwarded-For": "forged, 192.0.2.7, 192.0.2.8",
        "X-Forwarded-Proto": "http, https, http",
        "X-Forwarded-Host": "evil.example, pictures.example, inner.example",
        "Origin": "https://pictures.example",
    }
    assert client.get("/queue", headers=headers).status_code == 200
    assert any("client=192.0.2.7" in line for line in logged)


def test_a_rebound_page_cannot_say_that_a_proxy_has_another_name(serve):
    client = serve(TRUSTED_PROXIES=1).client
    headers = {"Host": "evil.example", "X-Forwarded-Host": "localhost"}
    assert client.get("/tasks", headers=headers).status_code == 403
    headers["Host"] = "127.0.0.1:3000"
    assert client.get("/tasks", headers=headers).status_code == 200


def test_an_address_that_a_proxy_tells_cannot_forge_a_fact(serve, logged):
    client = serve(TRUSTED_PROXIES=1).client
    client.get("/queue", headers={"X-Forwarded-For": '"a b" request_id=forged'})
    (line,) = [line for line in logged if "GET /queue" in line]
    assert r'client="\"a b\" request_id=forged" request_id=' in line


# The id of a request


def test_a_request_id_is_taken_and_logged(client, logged):
    answer = client.get("/queue", headers={"X-Request-ID": "order-66.a_B"})
    assert answer.headers["X-Request-ID"] == "order-66.a_B"
    assert any("GET /queue 200" in line and "request_id=order-66.a_B" in line for line in logged)


@pytest.mark.parametrize("given", [None, "", "a b", "a" * 129, "a;b", "<script>"])
def test_a_request_id_is_made_where_there_is_no_plain_one(client, given):
    headers = {} if given is None else {"X-Request-ID": given}
    made = {client.get("/nowhere", headers=headers).headers["X-Request-ID"] for _ in range(2)}
    assert len(made) == 2
    assert all(str(uuid.UUID(one)) == one for one in made)


def test_a_secret_is_not_taken_for_an_id(serve):
    client = serve(API_KEYS=KEYS).client
    key = KEYS.split(",")[0]
    headers = {"X-Request-ID": key, "X-API-Key": key}
    assert key not in str(client.get("/queue", headers=headers).headers)
    assert key not in client.get(f"/{key}", headers=headers).text


def test_refusals_have_an_id_too(guarded):
    answer = guarded.get("/queue")
    assert answer.status_code == 401
    assert re.fullmatch(r"[0-9a-f-]{36}", answer.headers["X-Request-ID"])


def test_a_guarded_queue_works_as_any(serve, monkeypatch):
    client = serve(API_KEYS=KEYS).client
    client.environ_base["HTTP_X_API_KEY"] = KEYS.split(",")[1]
    assert finished(client, submit(client))["status"] == "completed"


# The secret that signs


def test_processes_that_start_together_have_one_secret(tmp_path):
    signatures, together = set(), threading.Barrier(8)

    def begin():
        together.wait(10)
        signatures.add(Signer(tmp_path / "database").sign("a task"))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(signatures) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["database.secret"]


def test_a_signature_that_was_given_out_at_its_full_length_still_holds(tmp_path):
    signer = Signer(tmp_path / "database")
    secret = (tmp_path / "database.secret").read_bytes()
    whole = hmac.new(secret, b"image a task", "sha256").hexdigest()
    assert signer.has_signed("a task", whole)
    assert signer.has_signed("a task", signer.sign("a task"))
    for wrong in ("", whole[:31], whole[:40], whole[:-1] + "g", "é" * 32, whole * 2):
        assert not signer.has_signed("a task", wrong)


def test_a_secret_that_is_not_whole_stops_the_start(tmp_path):
    (tmp_path / "database.secret").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"database\.secret: must hold 32 bytes; remove it"):
        Signer(tmp_path / "database")
