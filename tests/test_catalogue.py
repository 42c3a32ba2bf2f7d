"""The catalogue is read whole or not at all, costs the server nothing, and hurts nobody."""

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import wait_until
from upstream import closed_port, serving, until_gone

import catalogue
from catalogue import CatalogueError, Reader, models_of, parse, read_schema
from models import rules

ROOT = Path(catalogue.__file__).parent
CHUTE_URL = "https://{slug}.chutes.ai"
SEED = {"type": "integer", "minimum": 0, "maximum": 4294967295}
# As one was published.
PUBLISHED = {
    "type": "object",
    "required": ["input_args"],
    "properties": {"input_args": {"$ref": "#/definitions/GenerationInput"}},
    "definitions": {
        "GenerationInput": {
            "type": "object",
            "required": ["prompt", "image_b64s"],
            "properties": {
                "prompt": {"type": "string"},
                "image_b64s": {
                    "type": "array",
                    "items": {"type": "string"},
                    "minItems": 1,
                    "maxItems": 3,
                },
                "width": {"type": "integer", "minimum": 128, "maximum": 2048, "default": 1024},
                "true_cfg_scale": {"type": "number", "minimum": 0, "maximum": 10, "default": 4},
                "seed": {"anyOf": [SEED, {"type": "null"}], "default": None},
            },
        }
    },
}


def schema(required=("prompt",), **properties):
    return {"properties": {"prompt": {"type": "string"}, **properties}, "required": list(required)}


def chute(name="model", input_schema=None, cord=None, **changes):
    """Return a chute with its cord in it, as it comes where one alone is asked for."""
    cord = {
        "method": "POST",
        "path": "/generate",
        "public_api_path": "/generate",
        "public_api_method": "POST",
        "input_schema": schema(seed=SEED) if input_schema is None else input_schema,
        "output_content_type": "image/jpeg",
        **(cord or {}),
    }
    return {
        "chute_id": f"id-of-{name}",
        "name": name,
        "slug": f"someone-{name}",
        "standard_template": None,
        "cords": [cord],
        "hot": True,
        "current_estimated_price": {"usd": {"hour": 1.5, "second": 0.0004}},
        **changes,
    }


def page(*chutes, **changes):
    return {"total": len(chutes), "items": list(chutes), "cord_refs": {}, **changes}


def taken(*chutes, **changes):
    return list(models_of(page(*chutes, **changes), CHUTE_URL, set()))


def names(models):
    return [model.name for model in models]


def test_a_chute_becomes_a_model():
    (model,) = taken(chute())
    assert model.model_dump(exclude_unset=True) == {
        "name": "model",
        "aliases": ["someone-model", "id-of-model"],
        "url": "https://someone-model.chutes.ai/generate",
        "fields": {"seed": SEED},
        "source": "catalogue",
        "hot": True,
        "usd_per_hour": 1.5,
    }


def test_cords_of_a_list_are_found_by_their_reference():
    listed = chute()
    cords = {"some-uuid": listed.pop("cords")}
    listed |= {"cords": None, "cord_ref_id": "some-uuid"}
    assert names(taken(listed, cord_refs=cords)) == ["model"]


def test_a_model_is_called_at_the_address_that_its_slug_and_path_give():
    found = chute(slug="a-b", cord={"public_api_path": "/v1/text_to.image"})
    assert taken(found)[0].url == "https://a-b.chutes.ai/v1/text_to.image"
    (model,) = models_of(page(found), "http://127.0.0.1:5000/{slug}/", set())
    assert model.url == "http://127.0.0.1:5000/a-b/v1/text_to.image"


@pytest.mark.parametrize(
    "cord",
    [
        {"public_api_method": "GET"},
        {"output_content_type": None},
        {"output_content_type": "application/json"},
        {"output_content_type": ["image/png"]},
        {"public_api_path": None},
    ],
)
def test_what_makes_no_image_is_left_out(cord):
    assert names(taken(chute("other", cord=cord), chute())) == ["model"]


def test_the_cord_that_makes_the_image_counts():
    found = chute()
    found["cords"].insert(0, {**found["cords"][0], "output_content_type": "text/plain"})
    found["cords"][0]["public_api_path"] = "/words"
    assert taken(found)[0].url == "https://someone-model.chutes.ai/generate"


def test_between_equal_names_the_first_wins_and_the_other_is_known_by_its_slug():
    first, second = taken(chute(slug="busy"), chute(slug="idle", chute_id="other"))
    assert (first.name, first.aliases) == ("model", ["busy", "id-of-model"])
    assert (second.name, second.aliases) == ("idle", ["other"])


def test_a_name_is_taken_over_all_pages():
    given = set()
    assert len(list(models_of(page(chute()), CHUTE_URL, given))) == 1
    assert list(models_of(page(chute()), CHUTE_URL, given)) == []


def test_a_name_that_is_none_gives_way_to_the_slug():
    (model,) = taken(chute("two words", slug="two-words"))
    assert (model.name, model.aliases) == ("two-words", [])


@pytest.mark.parametrize("price", [None, "1", True, -1, float("nan"), float("inf"), {}])
def test_a_price_that_is_none_is_null(price):
    assert taken(chute(current_estimated_price={"usd": {"hour": price}}))[0].usd_per_hour is None


@pytest.mark.parametrize(("hot", "expected"), [(False, False), (None, None), ("yes", None)])
def test_hot_is_a_boolean_or_null(hot, expected):
    assert taken(chute(hot=hot))[0].hot is expected


def test_the_routers_check_counts_for_a_diffusion_chute():
    found = chute(standard_template="diffusion", input_schema=PUBLISHED)
    (model,) = taken(found)
    assert (model.fields, model.images) == (None, None)


def fields(**properties):
    return read_schema(schema(**properties)).get("fields")


def test_the_published_schema_is_read():
    assert read_schema(PUBLISHED) == {
        "fields": {
            "width": {"type": "integer", "minimum": 128, "maximum": 2048, "default": 1024},
            "true_cfg_scale": {"type": "number", "minimum": 0, "maximum": 10, "default": 4},
            "seed": SEED,
        },
        "images": {"field": "image_b64s", "minimum": 1, "maximum": 3},
    }


@pytest.mark.parametrize("wrapper", ["input_args", "args", "params"])
@pytest.mark.parametrize("place", ["definitions", "$defs"])
def test_a_wrapper_and_a_reference_that_names_another_place_are_followed(wrapper, place):
    wrapped = {
        "properties": {wrapper: {"anyOf": [{"$ref": "#/definitions/X"}, {"type": "null"}]}},
        place: {"X": schema(size={"$ref": "#/$defs/Size"}), "Size": {"type": "string"}},
    }
    assert read_schema(wrapped) == {"fields": {"size": {"type": "string"}}}


def test_a_field_named_as_a_wrapper_is_a_field():
    assert fields(params={"type": "object", "properties": {}}) == {"params": {"type": "object"}}


@pytest.mark.parametrize(
    "nothing", [schema(), {}, None, [], "x", {"properties": 1}, {"$ref": "#/$defs/none"}]
)
def test_a_schema_that_names_no_field_says_nothing(nothing):
    assert read_schema(nothing) == {}
    assert taken(chute(input_schema=nothing or []))[0].fields is None


def test_ranges_that_nobody_enforces_are_ignored():
    lies = {"type": "number", "min": 1, "max": 2, "gte": 1, "lte": 2}
    assert fields(guidance_scale=lies) == {"guidance_scale": {"type": "number"}}


@pytest.mark.parametrize(
    "either",
    [
        {"anyOf": [SEED, {"type": "null"}]},
        {"oneOf": [{"type": "null"}, SEED]},
        {"allOf": [SEED]},
        {**SEED, "type": ["integer", "null"]},
    ],
)
def test_a_field_that_may_be_null_counts_as_its_other_half(either):
    assert fields(seed={**either, "default": None}) == {"seed": SEED}


def test_a_field_that_may_be_either_of_two_things_is_any():
    assert fields(loras={"anyOf": [{"type": "string"}, {"type": "array"}]}) == {"loras": {}}
    assert fields(loras={"type": ["string", "array"]}) == {"loras": {}}


def test_what_a_request_has_by_itself_is_never_a_field():
    reserved = "model", "priority", "images", "webhook", "webhook_events_filter", "image_b64"
    assert fields(**{name: {"type": "integer"} for name in reserved}) is None


def test_the_prompts_length_is_read():
    said = schema(prompt={"type": "string", "minLength": 3, "maxLength": 1200, "default": "x"})
    assert read_schema(said) == {"prompt": {"minLength": 3, "maxLength": 1200}}


@pytest.mark.parametrize(
    ("field", "said", "required", "expected"),
    [
        ("image_b64s", {"type": "array", "maxItems": 3}, True, (1, 3)),
        ("image_b64s", {"type": "array"}, False, (0, catalogue.DEFAULT_IMAGES)),
        ("image_b64s", {"type": "array", "maxItems": 10**6}, True, (1, catalogue.MAX_IMAGES)),
        ("image_b64", {"type": "string"}, True, (1, 1)),
        ("image_b64", {"anyOf": [{"type": "string"}, {"type": "null"}]}, False, (0, 1)),
        ("image_b64", {"type": "array", "maxItems": 2}, True, (1, 2)),
        ("image_b64", {"anyOf": [{"type": "string"}, {"type": "array"}]}, True, (1, 4)),
        # A list, as more than one is none that is sent as a text.
        ("image_b64s", {"type": "array", "maxItems": 1}, True, (1, 2)),
    ],
)
def test_the_images_of_a_model_are_read(field, said, required, expected):
    required = ["prompt", field] if required else ["prompt"]
    images = {"field": field, "minimum": expected[0], "maximum": expected[1]}
    assert read_schema(schema(required, **{field: said})) == {"fields": {}, "images": images}


def test_a_list_is_not_taken_where_it_is_said_to_be_a_text():
    assert "images" not in read_schema(schema(image_b64s={"type": "string"}))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"type": "integer", "minimum": "1", "maximum": 9}, {"type": "integer", "maximum": 9}),
        ({"type": "integer", "minimum": 9, "maximum": 1}, {"type": "integer"}),
        ({"type": "tuple", "default": 1}, {"default": 1}),
        ({"type": "number", "maximum": float("inf")}, {"type": "number"}),
        ({"type": "number", "maximum": True}, {"type": "number"}),
        ({"enum": []}, {}),
        ({"enum": ["\ud800"], "minLength": -1}, {}),
        ({"enum": ["x" * 3000], "type": "string"}, {"type": "string"}),
        ({"type": ["integer", "null", {}]}, {}),
        ({"type": {}}, {}),
        (3, {}),
    ],
)
def test_a_rule_keeps_of_itself_what_can_be_read(said, expected):
    assert fields(field=said) == {"field": expected}


def test_loops_end():
    loop = {
        "$ref": "#/$defs/A",
        "$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"anyOf": [{"$ref": "#/$defs/A"}]}},
    }
    assert read_schema(loop) == {}
    wrapper = {"properties": {"args": {"$ref": "#/$defs/W"}}}
    assert read_schema({**wrapper, "$defs": {"W": wrapper}}) == {"fields": {"args": {}}}


def deep(levels, inside):
    for _ in range(levels):
        inside = {"anyOf": [inside]}
    return inside


HOSTILE = [
    *(chute(slug=slug) for slug in ("a/b", "a@b", "a.b", "", "-a", "a" * 64, "a\n", "ä", 1, None)),
    *(
        chute(cord={"public_api_path": path})
        for path in (
            "//evil",
            "/a//b",
            "/../a",
            "/a..b",
            "generate",
            "@evil",
            "/a b",
            "/a?b",
            "/a\n",
        )
    ),
    chute(cords=[]),
    chute(cords={"a": 1}),
    chute(cords=[None, 1, [], {"public_api_path": []}]),
    chute(name=None, slug=None, chute_id=[]),
    None,
    [],
    1,
    "chute",
    {},
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_a_chute_that_cannot_be_read_costs_that_chute_alone(hostile):
    assert names(taken(hostile, chute("good"))) == ["good"]


def test_a_schema_that_cannot_be_read_costs_no_more_than_itself():
    default = {"type": "string", "default": deep(150, "x" * 2000)}
    nested = chute("nested", input_schema=schema(seed=deep(150, SEED), size=default))
    wide = chute("wide", input_schema=schema(**{f"f{n}": SEED for n in range(10**6)}))
    models = taken(nested, wide, chute("good"))
    assert names(models) == ["nested", "wide", "good"]
    assert rules(models[0].fields) == {"seed": {}, "size": {"type": "string"}}
    assert len(models[1].fields) == catalogue.MAX_FIELDS - 1
    assert fields(**{"<b>": SEED, "a\n": SEED, "a" * 65: SEED}) is None


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "is not JSON"),
        (b"<html>", "is not JSON"),
        (b'{"items": [', "is not JSON"),
        (b"\xff\xfe\xfd", "is not JSON"),
        (b"[" * 10_000 + b"]" * 10_000, "is not JSON"),
        (b"[]", "items is not there"),
        (b"null", "items is not there"),
        (b'{"detail": "Not found"}', "items is not there"),
        (b'{"items": {}, "total": 1, "cord_refs": {}}', "items is not there"),
        (b'{"items": [], "total": "1", "cord_refs": {}}', "total is not there"),
        (b'{"items": [], "total": 1, "cord_refs": null}', "cord_refs is not there"),
    ],
)
def test_what_is_no_catalogue_is_an_error(body, why):
    with pytest.raises(CatalogueError, match=why):
        parse(body)


def test_a_number_of_thousands_of_digits_costs_its_chute_alone():
    found = chute(input_schema=schema(seed={"type": "integer", "maximum": 7}))
    body = json.dumps(page(found, chute("good"))).replace(": 7", ": " + "7" * 5000)
    models = list(models_of(parse(body.encode()), CHUTE_URL, set()))
    assert names(models) == ["model", "good"]
    assert models[0].fields["seed"].maximum is None


class Listing(ThreadingHTTPServer):
    """Serve a catalogue: `answer(template, page)` gives each body, and `asked` keeps the books."""

    daemon_threads = True

    def __init__(self, answer, status=200, headers=()):
        super().__init__(("127.0.0.1", 0), Request)
        self.answer, self.status, self.headers = answer, status, dict(headers)
        self.asked = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/chutes/"

    def handle_error(self, request, client_address):
        """Stay silent: some clients go away."""


class Request(BaseHTTPRequestHandler):
    def do_GET(self):
        query = parse_qs(urlsplit(self.path).query)
        self.server.asked.append((self.path, dict(self.headers)))
        body = self.server.answer(query["template"][0], int(query["page"][0]))
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        self.end_headers()
        self.wfile.write(body) if isinstance(body, bytes) else body(self.connection)

    def log_message(self, *values):
        pass


@contextmanager
def listing(*arguments, **options):
    with serving(Listing(*arguments, **options)) as server:
        yield server


@pytest.fixture
def reader():
    reader = Reader()
    yield reader
    reader.close()


def program(url, chute_url=CHUTE_URL, code=(catalogue.__file__,), **options):
    """Return the exit status of the program, and what it prints."""
    command = [sys.executable, *code, url, chute_url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    return done.returncode, done.stdout, done.stderr


def two_pages(template, number):
    """List three chutes without a template on two pages, and one with."""
    if template == "diffusion":
        return page(chute("routed", standard_template="diffusion"))
    chutes = [chute("a"), chute("b"), chute("c")]
    return page(*chutes[2 * number : 2 * number + 2], total=3)


def test_all_pages_of_both_templates_are_read_in_order(reader):
    with listing(two_pages) as server:
        models = reader.read(server.url, CHUTE_URL)
    assert names(models) == ["routed", "a", "b", "c"]
    assert models[1] == taken(chute("a"))[0]
    queries = [dict(parse_qs(urlsplit(path).query)) for path, _ in server.asked]
    assert [(q["template"], q["page"]) for q in queries] == [
        (["diffusion"], ["0"]),
        (["other"], ["0"]),
        (["other"], ["1"]),
    ]
    for query in queries:
        assert query["include_public"] == query["include_schemas"] == ["true"]
        assert query["limit"] == ["500"]


def test_the_program_prints_a_line_for_each_model():
    with listing(two_pages) as server:
        status, out, error = program(server.url, "http://127.0.0.1:9/{slug}")
    assert (status, error) == (0, "")
    assert [json.loads(line)["name"] for line in out.splitlines()] == ["routed", "a", "b", "c"]
    assert json.loads(out.splitlines()[1])["url"] == "http://127.0.0.1:9/someone-a/generate"


def test_no_token_cookie_proxy_or_netrc_is_used(tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("default login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    environment = {
        "HOME": str(tmp_path),
        "http_proxy": f"http://127.0.0.1:{closed_port()}",
        "CHUTES_API_TOKEN": "cpk_secret",
    }
    with listing(two_pages, headers={"Set-Cookie": "a=b"}) as server:
        status, _, error = program(server.url, env=environment)
    assert (status, error) == (0, "")
    told = {name for _, headers in server.asked for name in headers}
    assert told == {"Host", "Accept", "Accept-Encoding", "User-Agent"}


def test_the_process_has_nothing_of_the_servers_environment(reader, monkeypatch):
    monkeypatch.setenv("CHUTES_API_TOKEN", "cpk_secret")
    seen = []

    def answer(template, number):
        seen.append(Path(f"/proc/{reader._process.pid}/environ").read_text())
        return page()

    with listing(answer) as server:
        assert reader.read(server.url, CHUTE_URL) == []
    assert seen == ["MALLOC_ARENA_MAX=1\0"] * 2


def test_where_memory_runs_out_the_process_goes_first(reader):
    seen = []

    def answer(template, number):
        seen.append(Path(f"/proc/{reader._process.pid}/oom_score_adj").read_text())
        return page()

    with listing(answer) as server:
        reader.read(server.url, CHUTE_URL)
    assert seen == ["1000\n"] * 2


def fails(server_url, reader, why):
    """Assert that a read fails with one line that says why, and what to do."""
    with pytest.raises(CatalogueError, match=why) as raised:
        reader.read(server_url, CHUTE_URL)
    assert "\n" not in str(raised.value)
    assert "CATALOGUE_URL" in str(raised.value)


def test_a_catalogue_that_is_down_is_an_error(reader):
    fails(f"http://127.0.0.1:{closed_port()}/", reader, "cannot be reached .Connection refused")


@pytest.mark.parametrize(
    ("answer", "status", "why"),
    [
        (lambda *_: b"<html>", 200, "is not JSON"),
        (lambda *_: {"detail": "x"}, 200, "has another shape"),
        (lambda *_: b"x" * (50 * 2**20), 200, "has more than 32 MB"),
        (lambda *_: page(chute("a"), total=10**9), 200, "has more than 50 pages"),
        (lambda *_: b"[" * 10_000, 200, "is not JSON"),
        (lambda *_: page(), 503, "status 503"),
    ],
)
def test_what_is_no_catalogue_is_an_error_in_a_line(reader, answer, status, why):
    with listing(answer, status) as server:
        fails(server.url, reader, why)
    assert len(server.asked) <= catalogue.MAX_PAGES


def test_what_was_packed_unasked_is_not_unpacked(reader):
    body = gzip.compress(json.dumps(page()).encode())
    with listing(lambda *_: body, headers={"Content-Encoding": "gzip"}) as server:
        fails(server.url, reader, "is not JSON")


def test_the_size_of_all_pages_together_is_bounded(reader):
    def answer(template, number):
        return page(chute("a", readme="x" * 10 * 2**20), total=100)

    with listing(answer) as server:
        fails(server.url, reader, "has more than 32 MB")
    assert len(server.asked) == 4


def test_a_redirect_is_not_followed(reader):
    with (
        listing(two_pages) as other,
        listing(two_pages, 302, {"Location": other.url}) as server,
    ):
        fails(server.url, reader, "redirect .302")
    assert other.asked == []


def test_hostile_json_costs_the_process_its_memory_and_no_more(reader):
    body = b'{"items": [' + b'{"":0},' * (3 * 2**20) + b"{}]}"
    with listing(lambda *_: body) as server:
        fails(server.url, reader, "512 MB of memory")


def test_a_read_that_drips_ends_in_time():
    def drip(connection):
        until_gone(connection, b" ", 0.2)

    with listing(lambda *_: drip) as server:
        begun = time.monotonic()
        code = "import catalogue; catalogue.MAX_SECONDS = 2; catalogue.main()"
        status, out, error = program(server.url, code=("-c", code), cwd=ROOT)
    assert 2 < time.monotonic() - begun < 20
    assert (status, out) == (1, "")
    assert "more than 2 s" in error
    assert error.count("\n") == 1


def test_there_are_30_seconds():
    assert catalogue.MAX_SECONDS == 30


def test_a_stop_does_not_wait_for_a_read(reader):
    begun, raised = threading.Event(), []

    def silent(connection):
        begun.set()
        until_gone(connection)

    def read():
        try:
            reader.read(server.url, CHUTE_URL)
        except CatalogueError as error:
            raised.append(str(error))

    with listing(lambda *_: silent) as server:
        thread = threading.Thread(target=read)
        thread.start()
        assert begun.wait(20)
        stopped = time.monotonic()
        reader.close()
        thread.join(20)
        assert time.monotonic() - stopped < 5
    assert raised == ["The catalogue is not read: the server stops"]
    with pytest.raises(CatalogueError, match="the server stops"):
        reader.read(server.url, CHUTE_URL)


def test_a_process_that_is_killed_is_an_error(reader):
    def kill(connection):
        os.kill(reader._process.pid, 9)
        until_gone(connection)

    with (
        listing(lambda *_: kill) as server,
        pytest.raises(CatalogueError, match="was killed"),
    ):
        reader.read(server.url, CHUTE_URL)
    assert wait_until(lambda: reader._process.returncode) == -9


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ('print(\'{"name": "a", "a_new_key": 1}\')', "another version"),
        ("import sys; sys.exit('first line\\n\\nthe reason')", "^the reason$"),
        ("while True: print('x' * 10**6)", "was killed"),
        ("import time; time.sleep(60)", "was killed"),
    ],
)
def test_whatever_the_process_does_is_an_error_in_time(reader, tmp_path, monkeypatch, code, why):
    (tmp_path / "catalogue.py").write_text(code)
    monkeypatch.setattr(catalogue, "__file__", str(tmp_path / "catalogue.py"))
    monkeypatch.setattr(catalogue, "MAX_SECONDS", -3)
    with pytest.raises(CatalogueError, match=why):
        reader.read("http://127.0.0.1:9/", CHUTE_URL)


@pytest.mark.parametrize(
    ("catalogue_url", "chute_url"),
    [
        ("http://catalogue.example/", CHUTE_URL),
        ("ftp://127.0.0.1/", CHUTE_URL),
        ("https://me@127.0.0.1/", CHUTE_URL),
        ("http://127.0.0.1:9/", "http://{slug}.example"),
    ],
)
def test_an_address_beyond_this_machine_is_https(catalogue_url, chute_url):
    status, _, error = program(catalogue_url, chute_url)
    assert (status, error.count("\n")) == (1, 1)
    assert "must be an https address, or http on loopback" in error
