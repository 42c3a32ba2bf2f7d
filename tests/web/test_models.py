"""The routes of models, and requests that name one: what is known of it says what they may hold."""

import socket
import time

import pytest
from conftest import PROMPT, finished, submit, wait_until
from upstream import Answer, closed_port, refusal

from models import Model

TURBO = """
["z-image-turbo"]
url = "{url}"
aliases = ["z"]
prompt = {{ minLength = 3 }}
concurrency = {concurrency}

["z-image-turbo".fields]
guidance_scale = {{ type = "number", minimum = 0, maximum = 5 }}
seed = {{ type = "integer", minimum = 0, maximum = 9 }}
"""


@pytest.fixture
def start(serve, tmp_path, upstream):
    """Return a maker of applications with one model in the file, called at a path of its own."""

    def start(concurrency=1, **values):
        file = tmp_path / "my-models.toml"
        url = upstream.url.replace("/generate", "/turbo/generate")
        file.write_text(TURBO.format(url=url, concurrency=concurrency))
        values = {"DEFAULT_MODEL": "z", **values}
        return serve(MODELS_FILE=file, **values)

    return start


def test_the_models_are_listed_with_what_they_take(start):
    told = start().client.get("/models").json
    assert told == {
        "models": [
            {
                "name": "z-image-turbo",
                "aliases": ["z"],
                "source": "file",
                "default": True,
                "default_edit": False,
                "fields": {
                    "guidance_scale": {"type": "number", "minimum": 0, "maximum": 5},
                    "seed": {"type": "integer", "minimum": 0, "maximum": 9},
                },
                "send": {},
                "prompt": {"minLength": 3},
                "images": 0,
                "hot": None,
                "usd_per_hour": None,
            }
        ],
        "catalogue": None,
    }


def test_only_who_runs_the_queue_reads_the_catalogue(serve, monkeypatch):
    readers = []
    monkeypatch.setattr("catalogue.Reader.read", lambda self, *of: readers.append(self) or [])
    first, second = (serve(CATALOGUE_URL="http://127.0.0.1:9/chutes/") for _ in range(2))
    for app in (first, second):
        app.client.get("/models")
    wait_until(lambda: readers)
    finished(second.client, submit(second.client))
    assert len(readers) == 1
    first.close()
    wait_until(lambda: len(readers) == 2)
    assert readers[0] is not readers[1]
    first.open()


def test_what_is_sent_unasked_is_told(serve, tmp_path, upstream):
    file = tmp_path / "my-models.toml"
    file.write_text(
        f'[sized]\nurl = "{upstream.url}"\nsend = {{ steps = 4, style = "ink" }}\n'
        "fields = { steps = {}, style = {}, seed = {} }\n"
    )
    client = serve(MODELS_FILE=file, DEFAULT_MODEL="sized").client
    (told,) = client.get("/models").json["models"]
    task = finished(client, submit(client, seed=7))
    assert told["send"] == {"steps": 4, "style": "ink"}
    assert task["params"] == {**told["send"], "seed": 7}
    assert client.get("/models/sized").json == told


def test_the_defaults_are_told_by_the_names_of_their_models(start):
    client = start(DEFAULT_EDIT_MODEL="z").client
    (model,) = client.get("/models").json["models"]
    assert (model["default"], model["default_edit"]) == (True, True)


def test_a_model_is_found_by_each_name_and_else_the_nearest_are_named(start):
    client = start(DEFAULT_MODEL="new").client
    assert client.get("/models/z").json == client.get("/models/z-image-turbo").json
    assert client.get("/models/new").json["source"] == "setting"
    assert client.get("/models/new").json["fields"] is None
    refused = client.get("/models/z-image-trubo")
    assert refused.status_code == 404
    assert "did you mean z-image-turbo" in refused.json["error"]
    assert client.get("/v1/models/z-image-trubo").json["error"]["code"] == "model_not_found"


def keep(app, *found):
    """Let the catalogue be kept that has these models."""
    entries = [
        (model.model_dump_json(exclude_unset=True), (model.name, *model.aliases)) for model in found
    ]
    app.database.end_catalogue(time.time(), entries)


@pytest.fixture
def catalogued(serve):
    """Return an application whose catalogue cannot be read, and has been tried."""
    url = f"http://127.0.0.1:{closed_port()}/"
    app = serve(CATALOGUE_URL=url, RETRY_BACKOFF=0.01)
    wait_until(lambda: app.client.get("/models").json["catalogue"]["error"])
    return app


def of_catalogue(url, **values):
    return Model(name="new", url=url, source="catalogue", **values)


def test_a_model_of_the_catalogue_is_told_by_name_slug_and_id(catalogued, upstream):
    model = of_catalogue(upstream.url, aliases=["new-slug", "id-7"], hot=False, usd_per_hour=1.5)
    keep(catalogued, model)
    client = catalogued.client
    told = client.get("/models/new").json
    assert (told["source"], told["hot"], told["usd_per_hour"]) == ("catalogue", False, 1.5)
    assert told in client.get("/models").json["models"]
    assert [client.get(f"/models/{name}").json for name in model.aliases] == [told, told]
    assert client.get("/v1/models/id-7").json["id"] == "new"


def test_a_task_that_waits_goes_where_its_model_has_moved(catalogued, upstream):
    client, gone = catalogued.client, f"http://127.0.0.1:{closed_port()}/generate"
    keep(catalogued, of_catalogue(gone))
    task_id = submit(client, model="new")
    wait_until(lambda: client.get(f"/tasks/{task_id}").json["calls"])
    assert upstream.calls == []
    keep(catalogued, of_catalogue(upstream.url))
    assert finished(client, task_id)["status"] == "completed"
    assert len(upstream.calls) == 1


def test_to_retry_all_chooses_each_seed_anew(start, upstream):
    app = start(MAX_ATTEMPTS=1)
    upstream.decide = lambda fields: Answer(body=b"no image")
    ids = [submit(app.client) for _ in range(20)]
    before = [finished(app.client, task_id)["params"] for task_id in ids]
    assert app.client.post("/tasks/retry").json == {"retried": 20}
    new = [app.client.get(f"/status/{task_id}").json["retried_as"] for task_id in ids]
    after = [app.client.get(f"/status/{task_id}").json["params"] for task_id in new]
    assert after != before  # As often as in 10**20 times.


def test_with_models_only_those_are_listed(start):
    client = start(MODELS="z,other").client
    names = [model["name"] for model in client.get("/models").json["models"]]
    assert names == ["z-image-turbo", "other"]
    assert [model["id"] for model in client.get("/v1/models").json["data"]] == names
    assert client.post("/generate", json={"prompt": "p q", "model": "new"}).status_code == 400
    assert submit(client, model="z-image-turbo")


def test_a_model_of_the_file_is_called_at_its_own_address(start, upstream):
    client = start().client
    task = finished(client, submit(client, model="z", guidance_scale=2))
    assert task["model"] == "z-image-turbo"
    assert upstream.headers[0][0] == "/turbo/generate"
    assert upstream.calls == [
        {"prompt": PROMPT, "guidance_scale": 2, "seed": task["params"]["seed"]}
    ]
    calls = client.get(f"/tasks/{task['id']}").json["calls"]
    assert [call["host"] for call in calls] == ["127.0.0.1"]


def test_a_value_out_of_range_is_refused_and_nothing_is_stored(start):
    client = start().client
    refused = client.post("/generate", json={"prompt": PROMPT, "guidance_scale": 7.5})
    assert refused.status_code == 400
    words = "guidance_scale must be a number from 0 to 5 for z-image-turbo, not 7.5"
    assert refused.json == {"error": words}
    assert client.get("/tasks").json["tasks"] == []


def test_a_chosen_seed_stays_over_attempts_and_a_retry_chooses_anew(start, upstream):
    app = start(MAX_ATTEMPTS=3, RETRY_BACKOFF=0.01)
    upstream.decide = lambda fields: Answer(body=b"no image")
    task = finished(app.client, submit(app.client))
    assert {call["seed"] for call in upstream.calls} == {task["params"]["seed"]}
    assert len(upstream.calls) == 3
    seeds = {task["params"]["seed"]}
    while len(seeds) < 2:
        retried = app.client.post(f"/tasks/{task['id']}/retry").json["id"]
        seeds.add(app.client.get(f"/status/{retried}").json["params"]["seed"])


def test_a_seed_that_was_asked_for_is_retried(start, upstream):
    app = start(MAX_ATTEMPTS=1)
    upstream.decide = lambda fields: Answer(body=b"no image")
    task = finished(app.client, submit(app.client, seed=7))
    for _ in range(5):
        retried = app.client.post(f"/tasks/{task['id']}/retry").json["id"]
        assert app.client.get(f"/status/{retried}").json["params"] == {"seed": 7}


def test_the_same_key_is_the_same_request_whatever_seed_was_chosen(start):
    client = start().client
    first, second = (
        client.post("/generate", json={"prompt": PROMPT}, headers={"Idempotency-Key": "k"})
        for _ in range(2)
    )
    assert first.json == second.json
    assert second.headers["Idempotent-Replayed"] == "true"


def test_a_models_own_concurrency_holds_no_other_model(start, upstream):
    client = start(CONCURRENCY=4).client
    upstream.gate.clear()
    ids = [submit(client) for _ in range(2)]
    other = submit(client, model="other")
    wait_until(lambda: upstream.at_once == 2)
    waiting = client.get(f"/status/{ids[1]}").json
    assert waiting["waiting_for"] == "the place of z-image-turbo is busy"
    assert client.get(f"/status/{other}").json["status"] == "processing"
    upstream.gate.set()
    assert all(finished(client, task_id)["status"] == "completed" for task_id in [*ids, other])
    assert len(upstream.calls) == 3


def test_several_places_of_a_model_are_named_as_such(start, upstream):
    client = start(concurrency=2).client
    upstream.gate.clear()
    ids = [submit(client) for _ in range(3)]
    wait_until(lambda: upstream.at_once == 2)
    waiting = client.get(f"/status/{ids[2]}").json
    assert waiting["waiting_for"] == "all 2 places of z-image-turbo are busy"


def test_the_failure_of_a_model_that_nobody_knows_names_the_nearest(start, upstream):
    client = start().client
    upstream.decide = lambda fields: refusal(404, f"model not found: {fields['model']}")
    task = finished(client, submit(client, model="z-image-trubo"))
    assert task["error_code"] == "upstream_rejected"
    assert task["error"].endswith("did you mean z-image-turbo?")
    upstream.decide = lambda fields: refusal(404, "No matching chute found!")
    assert "did you mean" not in finished(client, submit(client, model="z"))["error"]


def test_a_task_of_a_name_that_is_not_known_waits_for_the_catalogue_but_not_for_long(serve):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        client = serve(CATALOGUE_URL=url).client
        task_id, other = submit(client, model="a-new-one"), submit(client)
        waiting = client.get(f"/status/{task_id}").json["waiting_for"]
        assert waiting == "the catalogue is read for a-new-one"
        assert finished(client, other)["status"] == "completed"
        assert client.get("/models").json["catalogue"] == {"read_at": None, "error": None}
        assert client.get(f"/status/{task_id}").json["attempts"] == 0
        task = finished(client, task_id)
    assert (task["status"], task["attempts"]) == ("completed", 1)
    assert len(client.get(f"/tasks/{task_id}").json["calls"]) == 1
