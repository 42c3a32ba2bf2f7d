"""`script/models` prints the catalogue as a file of models, and how it differs from yours."""

import subprocess
import sys
from pathlib import Path

import list_models
import pytest
from simulator import Simulator
from upstream import closed_port, serving

import models
from models import Model

ROOT = Path(models.__file__).parent


@pytest.fixture
def chutes():
    with serving(Simulator()) as chutes:
        yield chutes


@pytest.fixture
def run(chutes, tmp_path):
    """Return a function that runs the program with these settings: its status, and two texts."""

    def run(*arguments, **settings):
        environ = {"CATALOGUE_URL": chutes.catalogue_url, "CHUTE_URL": chutes.chute_url, **settings}
        done = subprocess.run(
            [sys.executable, list_models.__file__, *arguments],
            env={"PYTHONPATH": str(ROOT), "OUTPUT_DIR": str(tmp_path), **environ},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def read(tmp_path, text):
    (tmp_path / "models.toml").write_text(text)
    return models.load(tmp_path / "models.toml")


def test_it_prints_a_file_of_the_models_of_the_catalogue(run, chutes, tmp_path):
    status, text, error = run()
    assert (status, error) == (0, "")
    found = read(tmp_path, text)
    others = ["hidream", "qwen-image-edit-2511"]
    assert list(found) == ["qwen-image", "z-image-turbo", "hunyuan-image-3", *others]
    turbo = found["z-image-turbo"]
    assert turbo.url == chutes.chute_url.replace("{slug}", "vonkaiser-z-image-turbo") + "/generate"
    assert turbo.prompt.model_dump() == {"minLength": 3, "maxLength": 1200}
    assert turbo.fields["shift"].model_dump(exclude_unset=True) == {
        "type": "number",
        "minimum": 1,
        "maximum": 10,
    }
    assert found["qwen-image"].fields is None


@pytest.mark.parametrize(
    "known",
    [
        {"fields": None},
        {"fields": {}, "images": {"field": "image_b64s", "minimum": 1, "maximum": 3}},
        {"name": "a.b/c:d", "prompt": {"maxLength": 9}},
        {
            "fields": {
                "a.b": {"type": "string", "enum": ['\x7f"\\\n\t\u2028é😀', "'"], "default": "\x00"},
                "b": {"type": "number", "minimum": 1e-30, "maximum": 1e30, "default": -0.5},
                "c": {"type": "boolean", "default": False},
                "d": {"default": {"x y": [1, {"z": []}], "e": {}}},
                "e": {},
            }
        },
    ],
)
def test_what_it_prints_is_read_as_it_was(known, tmp_path):
    model = Model.model_validate({"name": "model", "url": "https://a.example/generate", **known})
    assert read(tmp_path, list_models.entry(model)) == {model.name: model}


def test_a_null_is_left_out():
    assert list_models.value({"a": None, "b": [1, None], "c": {"d": None}}) == "{ b = [1], c = {} }"


def test_the_difference_to_the_file_is_shown(run, tmp_path):
    text = run()[1]
    file = tmp_path / "mine.toml"
    changed = text.replace("[hidream", "[mine").replace("maximum = 5 }", "maximum = 6 }")
    file.write_text("# Mine.\n" + changed)
    status, shown, error = run("--diff", MODELS_FILE=str(file))
    assert (status, error) == (0, "")
    lines = shown.splitlines()
    assert {line for line in lines if line.startswith("+++")} == {
        "+++ catalogue: hidream",
        "+++ catalogue: mine",
        "+++ catalogue: z-image-turbo",
    }
    assert "+[hidream]" in lines
    assert "-[mine]" in lines
    assert '-guidance_scale = { type = "number", minimum = 0, maximum = 6 }' in lines
    assert '+guidance_scale = { type = "number", minimum = 0, maximum = 5 }' in lines
    assert " [z-image-turbo.fields]" in lines


def test_there_is_no_difference_to_what_it_printed_itself(run, tmp_path):
    (tmp_path / "mine.toml").write_text(run()[1])
    assert run("--diff", MODELS_FILE=str(tmp_path / "mine.toml")) == (0, "", "")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"CATALOGUE_URL": "off"}, "CATALOGUE_URL is off"),
        ({"CATALOGUE_URL": f"http://127.0.0.1:{closed_port()}/"}, "cannot be reached"),
        ({"CHUTE_URL": "http://127.0.0.1/"}, "CHUTE_URL=http://127.0.0.1/: must be"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(run, settings, why):
    status, text, error = run(**settings)
    assert (status, text, error.count("\n")) == (1, "", 1)
    assert why in error
