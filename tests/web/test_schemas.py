"""What a request may hold, and the sentence for each fault."""

import json
from pathlib import Path

import pytest

from config import from_values
from web import schemas
from web.schemas import Generate, Invalid

VALUES = {"CHUTES_API_TOKEN": "a token"}
PLAIN = from_values(VALUES, Path())
IN_URL = from_values({**VALUES, "CHUTES_API_URL": "https://{model}.chutes.ai/generate"}, Path())


def parse(body, model_in_url=False):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return schemas.parse(Generate, data, IN_URL if model_in_url else PLAIN)


def test_the_defaults():
    wanted = parse({"prompt": "a fox"})
    assert (wanted.prompt, wanted.model, wanted.priority) == ("a fox", "qwen-image", 0)
    assert wanted.params() == {
        "guidance_scale": 7.5,
        "width": 1024,
        "height": 1024,
        "num_inference_steps": 20,
    }


def test_null_means_the_default():
    names = ["model", "guidance_scale", "width", "height", "num_inference_steps", "seed"]
    names += ["negative_prompt", "true_cfg_scale", "priority"]
    assert parse({"prompt": "a fox", **dict.fromkeys(names)}) == parse({"prompt": "a fox"})


def test_all_that_is_given_is_passed_on():
    given = {
        "guidance_scale": 3,
        "width": 512,
        "height": 768,
        "num_inference_steps": 30,
        "negative_prompt": "",
        "seed": 0,
        "true_cfg_scale": 4.5,
    }
    wanted = parse({"prompt": " p ", "model": "FLUX.1-dev", "priority": -5, **given})
    assert wanted.params() == given
    assert (wanted.prompt, wanted.model, wanted.priority) == (" p ", "FLUX.1-dev", -5)


RANGES = {
    "guidance_scale": (0, 20),
    "width": (128, 2048),
    "height": (128, 2048),
    "num_inference_steps": (1, 100),
    "seed": (0, 4294967295),
    "true_cfg_scale": (0, 10),
    "priority": (-100, 100),
}


INTEGERS = [name for name in RANGES if not name.endswith("_scale")]


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_may_be_written_with_a_point_but_is_no_fraction(name):
    body = json.dumps({"prompt": "p", name: float(RANGES[name][1])}).encode()
    wanted = parse(body)
    assert (getattr(wanted, name), type(getattr(wanted, name))) == (RANGES[name][1], int)
    for value in (RANGES[name][1] - 0.5, 1e300):
        with pytest.raises(Invalid, match=f"{name} must be an integer"):
            parse({"prompt": "p", name: value})


@pytest.mark.parametrize(("name", "limits"), RANGES.items())
def test_a_range_holds_its_ends_and_nothing_beyond(name, limits):
    for value in limits:
        assert getattr(parse({"prompt": "p", name: value}), name) == value
    for value in (limits[0] - 1, limits[1] + 1):
        with pytest.raises(Invalid, match=rf"{name} must be .* from {limits[0]} to {limits[1]}"):
            parse({"prompt": "p", name: value})


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", ["512", True, [512], {"a": 1}, float("nan"), float("inf")])
def test_a_wrong_type_names_the_field_and_the_rule(name, value):
    with pytest.raises(Invalid, match=rf"{name} must be an? (integer|number) from"):
        parse({"prompt": "p", name: value})


@pytest.mark.parametrize("prompt", [None, "", "   ", "\n\t\u2003"])
def test_a_blank_prompt_is_required(prompt):
    with pytest.raises(Invalid) as error:
        parse({"prompt": prompt})
    assert str(error.value) == "Prompt is required"


def test_a_missing_prompt_is_required():
    with pytest.raises(Invalid) as error:
        parse({})
    assert str(error.value) == "Prompt is required"


def test_a_prompt_has_at_most_10000_characters():
    assert len(parse({"prompt": "\U0001f98a" * 10_000}).prompt) == 10_000
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(Invalid, match=rf"{name} must be text of at most 10,000"):
            parse({"prompt": "p", name: "x" * 10_001})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("widht", "; did you mean width?"),
        ("Prompt", "; did you mean prompt?"),
        ("frames", ""),
        ("steps", "; did you mean num_inference_steps?"),
        ("CFG_scale", "; did you mean guidance_scale?"),
        ("size", "; use width and height"),
        ("n", "; one task makes one image; send it n times"),
    ],
)
def test_an_unknown_field_is_named_with_what_was_meant(name, hint):
    with pytest.raises(Invalid) as error:
        parse({"prompt": "p", name: 1})
    assert str(error.value) == f'"{name}" is not a field{hint}'


def test_a_model_that_is_part_of_the_address_is_one_label():
    assert parse({"prompt": "p", "model": "z-image-turbo"}, True).model == "z-image-turbo"
    for model in ("evil.example", "a/b", "a-", "a" * 64):
        with pytest.raises(Invalid, match="model must be one DNS label"):
            parse({"prompt": "p", "model": model}, True)


def test_many_faults_make_one_short_sentence():
    with pytest.raises(Invalid) as error:
        parse({"prompt": "p", **{f"field{n}": 1 for n in range(1000)}})
    assert "and 997 more" in str(error.value)
    assert len(str(error.value)) < 300
