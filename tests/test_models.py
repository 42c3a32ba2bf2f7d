"""The list of models in a file: what it may say, and the line for each fault."""

import pytest

import models
from models import ModelError

URL = 'url = "https://m.example/generate"'


@pytest.fixture
def load(tmp_path):
    def load(text):
        (tmp_path / "models.toml").write_text(text)
        return models.load(tmp_path / "models.toml")

    return load


def test_a_model_is_found_by_each_of_its_names(load):
    found = load(f'[a]\n{URL}\naliases = ["b", "org/c"]\n')
    assert list(found) == ["a", "b", "org/c"]
    assert {model.name for model in found.values()} == {"a"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", ["x: must be a table"]),
        ("[a", ["not valid TOML"]),
        ("[a]", ["a: url:", "required"]),
        ("[a]\nurl = 3", ["a: url:"]),
        ('[a]\nurl = "http://m.example/"', ["a: url:", "https address"]),
        ('[a]\nurl = "https://u:p@m.example/"', ["a: url:", "without user"]),
        (f"[a]\n{URL}\nurll = 1", ["a: urll is not a key", "there are url, model"]),
        (f'[a]\n{URL}\nsource = "file"', ["a: source is not a key"]),
        (f'[a]\n{URL}\naliases = ["a"]', ["a: a is a name of a already"]),
        (f'[a]\n{URL}\naliases = ["b"]\n[b]\n{URL}', ["b: b is a name of a already"]),
        (f'["a b"]\n{URL}', ["a b: name:", "letter or digit"]),
        (f"[a]\n{URL}\nsend = {{ width = 1 }}", ["a: send: width must be one of fields"]),
        (f"[a]\n{URL}\nconcurrency = 0", ["a: concurrency:"]),
        (f"[a]\n{URL}\nconcurrency = true", ["a: concurrency:"]),
        (f"[a]\n{URL}\nprompt = {{ minLength = 3, maxLength = 2 }}", ["a: prompt:", "minLength"]),
        (f'[a]\n{URL}\nimages = {{ field = "i", minimum = 3 }}', ["a: images:", "minimum"]),
        (f"[a]\n{URL}\n[a.fields]\nprompt = {{}}", ["a: fields: prompt is never a field"]),
        (f'[a]\n{URL}\n[a.fields]\nw = {{ type = "int" }}', ["a: fields.w.type:"]),
        (
            f"[a]\n{URL}\n[a.fields]\nw = {{ minimum = 2, maximum = 1 }}",
            ["a: fields.w:", "minimum"],
        ),
        (f"[a]\n{URL}\n[a.fields]\nw = {{ minimum = nan }}", ["a: fields.w.minimum"]),
        (f"[a]\n{URL}\n[a.fields]\nw = {{ min = 1 }}", ["a: fields.w.min is not a key"]),
        (f"[a]\n{URL}\n[a.fields]\nw = {{ enum = [] }}", ["a: fields.w.enum"]),
    ],
)
def test_a_fault_is_one_line_that_names_model_key_and_rule(load, text, words):
    with pytest.raises(ModelError) as error:
        load(text)
    for part in words:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["prompt", "model", "priority", "images", "webhook", "webhook_events_filter"]
)
def test_what_a_request_has_by_itself_is_never_a_field(load, name):
    with pytest.raises(ModelError, match=f"^a: fields: {name} is never a field of a model$"):
        load(f"[a]\n{URL}\n[a.fields]\n{name} = {{}}\n")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        models.load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("name", "router", "address"),
    [
        ("qwen-image", models.ROUTER, (models.ROUTER, "qwen-image")),
        ("qwen-image", "https://r.example/g", ("https://r.example/g", "qwen-image")),
        ("qwen-image", "https://{model}.example/g", ("https://qwen-image.example/g", None)),
        (
            "z-image-turbo",
            "https://{model}.example/g",
            ("https://vonkaiser-z-image-turbo.chutes.ai/generate", None),
        ),
        ("flux", models.ROUTER, ("https://vonkaiser-imageclassic.chutes.ai/generate", "flux")),
        ("new", "https://r.example/g", ("https://r.example/g", "new")),
        ("new", "https://{model}.example/g", ("https://new.example/g", None)),
    ],
)
def test_a_model_is_called_where_it_is(configure, name, router, address):
    config = configure(CHUTES_API_URL=router)
    model = config.file_models.get(name) or models.of_setting(name, router)
    assert models.address(model, router) == address
