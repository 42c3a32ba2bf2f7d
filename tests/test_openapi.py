"""The API document: complete, and true to the last answer."""

import re
import time

import pytest
import schemathesis
from conftest import wait_until
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from web import openapi

quietly = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

CASES = [
    (path, method, mode)
    for path, item in openapi.paths().items()
    for method, operation in item.items()
    for mode in GenerationMode
    # Where nothing can be given, nothing can be given wrongly.
    if mode is GenerationMode.POSITIVE or operation["parameters"]
]
# Every check is on. What a right request may be told beside the checks' own: a picture that
# is under way is a 503 with Retry-After, one that failed a 409, a part beyond its end a 416;
# a key's second request is a 422.
_OF_A_PICTURE = {
    "not_a_server_error": ["2xx", "3xx", "4xx", "503"],
    "positive_data_acceptance": ["2xx", "3xx", "404", "409", "416", "503"],
}
PROMISED = {
    "/generate": {"positive_data_acceptance": ["2xx", "422"]},
    "/v1/images/generations": {"positive_data_acceptance": ["2xx", "422"]},
    "/images/{id}": _OF_A_PICTURE,
    "/images/{id}/thumbnail": _OF_A_PICTURE,
}


@pytest.fixture
def api(serve, monkeypatch):
    client = serve(MAX_ATTEMPTS=1, OPENAI_WAIT=1)
    waiters = client.application.extensions["worker"].waiters
    wait = waiters.wait

    def wait_a_little(task_id, seconds, **values):
        return wait(task_id, min(seconds, 0.1), **values)

    monkeypatch.setattr(waiters, "wait", wait_a_little)
    operations = [
        {
            "include-path": path,
            "checks": {name: {"expected-statuses": told} for name, told in checks.items()},
        }
        for path, checks in PROMISED.items()
    ]
    config = schemathesis.Config.from_dict({"operations": operations})
    return schemathesis.openapi.from_wsgi("/openapi.json", client.application, config=config)


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_every_operation_does_as_the_document_says(api, path, method, mode):
    @quietly
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate()

    check()


def test_every_path_through_the_links_does_as_the_document_says(api):
    database = api.app.extensions["database"]

    def has_settled():
        queue = database.queue(time.time())
        return queue.paused or not queue.pending + queue.processing

    class Client(api.as_state_machine()):
        def after_call(self, response, case):
            """Let the tasks end, so that the same path has the same answers each time."""
            wait_until(has_settled)

    Client.run(settings=settings(quietly, max_examples=30, stateful_step_count=6))


def test_every_route_is_in_the_document(client):
    made = client.get("/openapi.json").json
    assert made["openapi"].startswith("3.1")
    told = {(m.upper(), p) for p, item in made["paths"].items() for m in item}
    rules = {
        (method, re.sub(r"<(?:\w+:)?\w+>", "{id}", rule.rule))
        for rule in client.application.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    assert told == rules


def test_the_links_lead_from_a_submit_to_the_status_and_the_image(client):
    links = client.get("/openapi.json").json["paths"]["/generate"]["post"]["responses"]["202"]
    assert {"status", "image"} <= set(links["links"])


def test_the_models_that_are_allowed_are_in_the_document(serve):
    made = serve(MODELS="qwen-image,x/y").get("/openapi.json").json
    model = made["components"]["schemas"]["Generate"]["properties"]["model"]
    assert model["enum"] == ["qwen-image", "x/y", None]


def test_the_keys_are_in_the_document_where_there_are_any(serve):
    client = serve(API_KEYS="a-key")
    made = client.get("/openapi.json", headers={"X-API-Key": "a-key"}).json
    assert made["security"] == [{"bearer": []}, {"key": []}]
    assert made["paths"]["/healthz"]["get"]["security"] == []
    assert "a-key" not in str(made)


def test_the_model_is_one_label_where_it_is_part_of_the_address(configure):
    made = openapi.document(configure(CHUTES_API_URL="https://{model}.chutes.ai/generate"))
    model = made["components"]["schemas"]["Generate"]["properties"]["model"]
    assert re.fullmatch(model["pattern"], "a-model") and not re.fullmatch(model["pattern"], "a.b")


def test_the_servers_public_address_is_in_the_document(serve):
    made = serve(PUBLIC_URL="https://pictures.example").get("/openapi.json").json
    assert made["servers"] == [{"url": "https://pictures.example"}]


def test_the_headers_that_answers_promise_are_in_the_document(client):
    paths = client.get("/openapi.json").json["paths"]
    added = paths["/generate"]["post"]["responses"]
    assert {"Location", "Idempotent-Replayed", "X-Request-ID"} <= set(added["202"]["headers"])
    assert all("Retry-After" in added[code]["headers"] for code in ("429", "503", "507"))
    assert "WWW-Authenticate" in added["401"]["headers"]
    assert "Link" in paths["/tasks"]["get"]["responses"]["200"]["headers"]
    assert "ETag" in paths["/images/{id}"]["get"]["responses"]["200"]["headers"]
