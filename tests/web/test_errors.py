"""What goes wrong, in the form of the path: this server's own, and OpenAI's."""

import pytest
from conftest import KEYS

from db import DatabaseError
from records import KeyReused, LowOnDisk, QueueFull
from web.errors import Refusal
from web.schemas import Invalid

KEY = KEYS.split(",")[0]
CASES = [
    (Refusal(410, "It is gone", {"X-More": "m"}), 410, "It is gone", {"X-More": "m"}),
    (Invalid("seed must be", "seed"), 400, "seed must be", {}),
    (KeyReused(), 422, "Idempotency-Key came with another request", {}),
    (QueueFull(), 429, "at most 7 tasks may be pending (MAX_PENDING)", {"Retry-After": "30"}),
    (LowOnDisk(), 507, "Less than 5 MB are free", {"Retry-After": "60"}),
    (DatabaseError("It is full", full=True), 507, "Free some disk space", {"Retry-After": "10"}),
    (DatabaseError("It is broken"), 503, "Look at the log", {"Retry-After": "10"}),
    (ZeroDivisionError("inside"), 500, "Internal server error; see the server log", {}),
]


@pytest.fixture
def failing(serve, monkeypatch):
    """Return a maker of clients, of whose routes one in each form raises an exception."""

    def make(error, **values):
        def fail(*_):
            raise error

        values = {"CATALOGUE_URL": "http://127.0.0.1:9/", **values}
        app = serve(MAX_PENDING=7, MIN_FREE_MB=5, **values)
        for name in ("get", "catalogue_entries"):
            monkeypatch.setattr(app.database, name, fail)
        return app.client

    return make


@pytest.mark.parametrize(("error", "status", "words", "headers"), CASES)
def test_every_exception_tells_the_same_in_both_forms(failing, error, status, words, headers):
    client = failing(error)
    own, openais = client.get("/status/x"), client.get("/v1/models")
    for answer in (own, openais):
        assert (answer.status_code, answer.content_type) == (status, "application/json")
        assert answer.data.endswith(b"}\n")
        assert {name: answer.headers.get(name) for name in headers} == headers
        assert "X-Should-Retry" not in answer.headers
    assert list(own.json) == ["error"]
    assert words in own.json["error"]
    assert list(openais.json["error"]) == ["message", "type", "param", "code"]
    assert openais.json["error"]["message"] == own.json["error"]


def test_a_refusal_tells_each_form_its_own_keys(failing):
    openais = {"type": "a_type", "param": "a field", "code": "a_code"}
    client = failing(Refusal(409, "No", status="failed", error_code="expired", **openais))
    own = client.get("/status/x").json
    assert own == {"error": "No", "status": "failed", "error_code": "expired"}
    assert list(own) == ["error", "status", "error_code"]
    assert client.get("/v1/models").json == {"error": {"message": "No", **openais}}


def test_a_secret_is_in_no_refusal(failing):
    client = failing(Refusal(400, f"not {KEY}"), API_KEYS=KEYS)
    for path in ("/status/x", "/v1/models"):
        answer = client.get(path, headers={"X-API-Key": KEY})
        assert answer.status_code == 400
        assert KEY not in answer.text


def test_what_nobody_foresaw_is_logged_with_its_traceback(failing, logged):
    failing(ZeroDivisionError("inside")).get("/status/x")
    (line,) = [line for line in logged if "internal server error" in line]
    assert "ZeroDivisionError: inside" in line


@pytest.mark.parametrize(("full", "status"), [(True, 507), (False, 503)])
def test_a_database_that_fails_is_told_and_nothing_is_promised(
    app, client, monkeypatch, full, status
):
    def fail(*values):
        raise DatabaseError("The database cannot be written: disk", full=full)

    monkeypatch.setattr(app.database, "add", fail)
    answer = client.post("/generate", json={"prompt": "p"})
    assert answer.status_code == status
    assert "nothing was changed" in answer.json["error"]
    assert int(answer.headers["Retry-After"]) > 0


def test_a_defect_is_json_too(app, client, monkeypatch, caplog):
    def fail(*values):
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(app.database, "get", fail)
    answer = client.get("/status/x")
    assert (answer.status_code, list(answer.json)) == (500, ["error"])
    assert "inside" not in answer.json["error"]
    assert "ZeroDivisionError" in caplog.text
