"""The API document: complete, and true to the last answer."""

import re
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import schemathesis
from conftest import KEYS, TOKEN, wait_until
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from app import close, create_app
from config import from_values
from web import openapi

quietly = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def document(**values):
    """Return the document of an application with these settings, which serves nobody."""
    with TemporaryDirectory() as folder:
        config = from_values(
            {"CHUTES_API_TOKEN": TOKEN, "CATALOGUE_URL": "off", **values}, Path(folder)
        )
        app = create_app(config)
        try:
            return openapi.document(app, config)
        finally:
            close(app)


# Any text may be a model's name, and is looked for.
ANYTHING = {"/models/{id}"}
MAKES_TASKS = ("/generate", "/edit", "/v1/images/generations", "/v1/images/edits")
CASES = [
    (path, method, mode)
    for path, item in document()["paths"].items()
    for method, operation in item.items()
    for mode in GenerationMode
    # Where nothing can be given, nothing can be given wrongly.
    if mode is GenerationMode.POSITIVE or (operation["parameters"] and path not in ANYTHING)
]
# Every check is on. What a right request may be told beside the checks' own: a picture that
# is under way is a 503 with Retry-After, one that failed a 409, a part beyond its end a 416;
# a key's second request is a 422, an order of the list without the status that it needs a 400,
# and so are bytes that are no image.
_OF_A_PICTURE = {
    "not_a_server_error": ["2xx", "3xx", "4xx", "503"],
    "positive_data_acceptance": ["2xx", "3xx", "404", "409", "416", "503"],
}
PROMISED = {
    "/generate": {"positive_data_acceptance": ["2xx", "422"]},
    "/tasks": {"positive_data_acceptance": ["2xx", "400"]},
    "/v1/images/generations": {"positive_data_acceptance": ["2xx", "422"]},
    "/edit": {"positive_data_acceptance": ["2xx", "400", "413", "422"]},
    "/v1/images/edits": {"positive_data_acceptance": ["2xx", "400", "413", "422"]},
    "/v1/images/variations": {"positive_data_acceptance": ["404"]},
    "/images/{id}": _OF_A_PICTURE,
    "/images/{id}/thumbnail": _OF_A_PICTURE,
}


@pytest.fixture
def app(serve):
    return serve(MAX_ATTEMPTS=1, OPENAI_WAIT=60)


@pytest.fixture
def api(app, monkeypatch):
    waiters = app.worker.waiters
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
    return schemathesis.openapi.from_wsgi("/openapi.json", app.client.application, config=config)


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_every_operation_does_as_the_document_says(api, path, method, mode):
    @quietly
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate()

    check()


def test_every_path_through_the_links_does_as_the_document_says(api, app):
    def has_settled():
        queue = app.database.queue(time.time())
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
        (method, re.sub(r"<(?:\w+:)?\w+>", "{id}", rule.rule.replace("<int:number>", "{n}")))
        for rule in client.application.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    assert told == rules


def test_the_links_lead_from_a_submit_to_the_status_and_the_image(client):
    links = client.get("/openapi.json").json["paths"]["/generate"]["post"]["responses"]["202"]
    assert {"status", "image"} <= set(links["links"])


def test_the_models_that_are_allowed_are_in_the_document():
    made = document(MODELS="qwen-image,x/y")
    model = made["components"]["schemas"]["Generate"]["properties"]["model"]
    assert model["enum"] == ["qwen-image", "x/y", None]


def test_the_keys_are_in_the_document_where_there_are_any():
    made = document(API_KEYS=KEYS)
    assert made["security"] == [{"bearer": []}, {"key": []}]
    assert document()["security"] == []
    assert not [key for key in KEYS.split(",") if key in str(made)]


def test_what_needs_no_key_is_as_the_document_says(serve):
    client = serve(API_KEYS=KEYS).client
    for path, item in document(API_KEYS=KEYS)["paths"].items():
        for method, operation in item.items():
            answer = client.open(path.replace("{id}", "x"), method=method.upper())
            assert (answer.status_code == 401) == (operation.get("security") != []), path
    assert client.get("/healthz").status_code == 200


def test_each_operation_has_a_name_of_its_own():
    paths = document()["paths"]
    names = [operation["operationId"] for item in paths.values() for operation in item.values()]
    assert sorted(names) == sorted(set(names))


def test_each_schema_is_called_by_its_own_name():
    schemas = document()["components"]["schemas"]
    assert {name: schema["title"] for name, schema in schemas.items()} == {n: n for n in schemas}


def test_each_operation_has_a_tag_that_is_described():
    made = document()
    described = {tag["name"] for tag in made["tags"] if tag["description"]}
    operations = [operation for item in made["paths"].values() for operation in item.values()]
    assert {name for operation in operations for name in operation["tags"]} == described
    assert all(len(operation["tags"]) == 1 for operation in operations)


def test_whatever_has_a_body_says_of_what_kind(client):
    for path, item in client.get("/openapi.json").json["paths"].items():
        for operation in item.values():
            for response in operation["responses"].values():
                for content in response.get("content", {}).values():
                    assert content["schema"], path


def test_images_are_binary_for_the_makers_of_clients_too():
    paths = document()["paths"]
    for path, kinds in (
        ("/images/{id}", ["image/png", "image/jpeg", "image/webp"]),
        ("/images/{id}/thumbnail", ["image/webp"]),
        ("/images.zip", ["application/zip"]),
    ):
        content = paths[path]["get"]["responses"]["200"]["content"]
        assert list(content) == [*kinds, "application/octet-stream"]
        schemas = [each["schema"] for each in content.values()]
        assert schemas == [{"type": "string", "format": "binary"}] * len(content)


def test_the_model_is_one_label_where_it_is_part_of_the_address():
    made = document(CHUTES_API_URL="https://{model}.chutes.ai/generate")
    model = made["components"]["schemas"]["Generate"]["properties"]["model"]
    assert re.fullmatch(model["pattern"], "a-model") and not re.fullmatch(model["pattern"], "a.b")


def test_the_servers_public_address_is_in_the_document():
    made = document(PUBLIC_URL="https://pictures.example")
    assert made["servers"] == [{"url": "https://pictures.example"}]


def test_an_idempotent_route_takes_a_key_and_tells_a_replay(client):
    paths = client.get("/openapi.json").json["paths"]
    for path, item in paths.items():
        for method, operation in item.items():
            taken = "Idempotency-Key" in [each["name"] for each in operation["parameters"]]
            assert taken == (method == "post" and path in MAKES_TASKS), path
            told = [r for r in operation["responses"].values() if "Idempotent-Replayed" in str(r)]
            assert (bool(told), "422" in operation["responses"]) == (taken, taken), path


def test_the_headers_that_answers_promise_are_in_the_document(client):
    paths = client.get("/openapi.json").json["paths"]
    added = paths["/generate"]["post"]["responses"]
    assert {"Location", "Idempotent-Replayed", "X-Request-ID"} <= set(added["202"]["headers"])
    assert all("Retry-After" in added[code]["headers"] for code in ("429", "503", "507"))
    assert "WWW-Authenticate" in added["401"]["headers"]
    assert "Link" in paths["/tasks"]["get"]["responses"]["200"]["headers"]
    assert "ETag" in paths["/images/{id}"]["get"]["responses"]["200"]["headers"]
