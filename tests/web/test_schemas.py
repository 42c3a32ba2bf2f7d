"""What a request may hold, and the sentence for each fault."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import models
from config import from_values
from web import schemas
from web.schemas import Generate, Generations, Invalid

VALUES = {"CHUTES_API_TOKEN": "a token", "CATALOGUE_URL": "off"}
PLAIN = from_values(VALUES, Path())
IN_URL = from_values({**VALUES, "CHUTES_API_URL": "https://{model}.chutes.ai/generate"}, Path())


def parse(body, kind=Generate, config=PLAIN):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def find(name):
        return config.file_models.get(name) or models.of_setting(name, config.chutes_api_url)

    return schemas.parse(kind, data, config, find)


def new_task(body, **values):
    (task,) = parse(body, **values).new_tasks()
    return task


def refused(body, **values):
    with pytest.raises(Invalid) as error:
        parse(body, **values)
    return str(error.value)


def test_the_original_request_is_sent_as_ever_with_a_seed_beside_it():
    task = new_task({"prompt": "a fox"})
    assert (task.prompt, task.model, task.priority) == ("a fox", "qwen-image", 0)
    assert task.params.pop("seed") in range(2**32)
    assert task.params == {
        "guidance_scale": 7.5,
        "width": 1024,
        "height": 1024,
        "num_inference_steps": 20,
    }


@pytest.mark.parametrize("model", ["z-image-turbo", "FLUX.1-dev", "hunyuan-image-3", "hidream"])
def test_no_other_model_is_sent_what_nobody_asked_for_but_a_seed(model):
    assert new_task({"prompt": "a fox", "model": model}).params.keys() == {"seed"}


def test_a_model_of_which_nothing_is_known_is_sent_nothing_that_nobody_asked_for():
    assert new_task({"prompt": "a fox", "model": "new"}).params == {}


def test_names_that_are_made_up_cost_no_memory():
    before = schemas.body_of.cache_info().currsize
    for n in range(20):
        assert new_task({"prompt": "a fox", "model": f"made-up-{n}"}).model == f"made-up-{n}"
    assert schemas.body_of.cache_info().currsize <= before + 1


def test_null_means_the_default():
    names = ["model", "guidance_scale", "width", "height", "num_inference_steps"]
    names += ["negative_prompt", "true_cfg_scale", "priority"]
    asked = {"prompt": "a fox", "seed": 1}
    with_nulls, without = new_task({**asked, **dict.fromkeys(names)}), new_task(asked)
    assert replace(with_nulls, id="") == replace(without, id="")
    assert new_task({"prompt": "a fox", "seed": None}).seed_chosen


@pytest.mark.parametrize("model", ["new", "qwen-image"])
def test_all_that_is_given_is_passed_on(model):
    given = {
        "guidance_scale": 3,
        "width": 512,
        "height": 768,
        "num_inference_steps": 30,
        "negative_prompt": "",
        "seed": 0,
        "true_cfg_scale": 4.5,
    }
    task = new_task({"prompt": " p ", "model": model, "priority": -5, **given})
    assert task.params == given
    assert list(task.params) == list(given)
    assert (task.prompt, task.model, task.priority) == (" p ", model, -5)


def test_a_chosen_seed_makes_no_other_request_of_it():
    first, second = parse({"prompt": "p"}), parse({"prompt": "p", "seed": None})
    assert first.canonical_input() == second.canonical_input()
    assert first.new_tasks()[0].params != second.new_tasks()[0].params
    for other in ({"seed": 1}, {"width": 512}, {"model": "FLUX.1-dev"}, {"priority": 1}):
        assert parse({"prompt": "p", **other}).canonical_input() != first.canonical_input()


# The fields of a model


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"guidance_scale": 7.5},
            ["guidance_scale must be a number from 0 to 5 for z-image-turbo, not 7.5"],
        ),
        ({"width": 512}, ["width must be an integer from 576 to 2048 for z-image-turbo, not 512"]),
        (
            {"shfit": 3},
            ['"shfit" is not a field; did you mean shift?', "z-image-turbo takes width"],
        ),
        ({"true_cfg_scale": 4}, ['"true_cfg_scale" is not a field', "z-image-turbo takes width"]),
        ({"prompt": "no"}, ["prompt must be text of 3 to 1,200 characters", "z-image-turbo"]),
        ({"prompt": "x" * 1201}, ["prompt must be text of 3 to 1,200 characters"]),
    ],
)
def test_what_a_model_does_not_take_is_refused(fields, words):
    sentence = refused({"prompt": "a fox", "model": "z-image-turbo", **fields})
    for part in words:
        assert part in sentence


def test_a_field_of_few_values_takes_no_other():
    asked = {"prompt": "a fox", "model": "hidream"}
    assert new_task({**asked, "resolution": "768x1360"}).params["resolution"] == "768x1360"
    for value in ("1x1", 7, True, ["768x1360"]):
        sentence = refused({**asked, "resolution": value})
        assert "resolution must be one of 1024x1024, 768" in sentence


def test_a_model_that_edits_images_takes_no_prompt_alone():
    assert "qwen-image-edit-2511" in refused({"prompt": "p", "model": "qwen-image-edit-2511"})


@pytest.mark.parametrize(
    ("model", "params"),
    [
        ("z-image-turbo", {"width": 1024, "height": 768}),
        ("new", {"width": 1024, "height": 768}),
        ("hunyuan-image-3", {"size": "1024x768"}),
    ],
)
def test_a_size_of_openais_is_asked_for_in_words_of_the_model(model, params):
    asked = {"prompt": "a fox", "model": model, "size": "1024x768", "seed": 1}
    task = new_task(asked, kind=Generations)
    assert {name: task.params.get(name) for name in params} == params
    assert task.params.keys() <= {*params, "seed"}


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        (["resolution", "style"], {"resolution": "1024x768"}),
        (["style"], {}),
        (["width", "style"], {}),
        (["width", "height", "size"], {"width": 1024, "height": 768}),
    ],
)
def test_a_size_goes_where_a_model_has_a_place_for_it_or_nowhere(fields, params):
    any_value = dict.fromkeys(fields, models.FieldRule())
    model = models.Model(name="m", url=models.ROUTER, fields=any_value)
    body = json.dumps({"prompt": "a fox", "model": "m", "size": "1024x768"}).encode()
    (task,) = schemas.parse(Generations, body, PLAIN, lambda name: model).new_tasks()
    assert task.params == params


def test_a_seed_of_several_images_counts_up():
    seeds = [
        task.params["seed"]
        for task in parse({"prompt": "p", "seed": 7, "n": 3}, kind=Generations).new_tasks()
    ]
    assert seeds == [7, 8, 9]


# The fields of any model


RANGES = {
    "guidance_scale": (0, 20),
    "width": (128, 2048),
    "height": (128, 2048),
    "num_inference_steps": (1, 100),
    "seed": (0, 4294967295),
    "true_cfg_scale": (0, 10),
    "priority": (-100, 100),
}


def value_of(task, name):
    return task.priority if name == "priority" else task.params[name]


INTEGERS = [name for name in RANGES if not name.endswith("_scale")]


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_may_be_written_with_a_point_but_is_no_fraction(name):
    body = json.dumps({"prompt": "p", name: float(RANGES[name][1])}).encode()
    value = value_of(new_task(body), name)
    assert (value, type(value)) == (RANGES[name][1], int)
    for value in (RANGES[name][1] - 0.5, 1e300):
        with pytest.raises(Invalid, match=f"{name} must be an integer"):
            parse({"prompt": "p", name: value})


@pytest.mark.parametrize(("name", "limits"), RANGES.items())
def test_a_range_holds_its_ends_and_nothing_beyond(name, limits):
    for value in limits:
        assert value_of(new_task({"prompt": "p", name: value}), name) == value
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
    assert len(new_task({"prompt": "\U0001f98a" * 10_000}).prompt) == 10_000
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
    assert refused({"prompt": "p", "model": "new", name: 1}) == f'"{name}" is not a field{hint}'


def test_a_model_that_is_part_of_the_address_is_one_label():
    assert new_task({"prompt": "p", "model": "new-model"}, config=IN_URL).model == "new-model"
    for model in ("evil.example", "a/b", "a-", "a" * 64, "FLUX.1-dev"):
        with pytest.raises(Invalid, match="model must be one DNS label"):
            parse({"prompt": "p", "model": model}, config=IN_URL)


def test_many_faults_make_one_short_sentence():
    with pytest.raises(Invalid) as error:
        parse({"prompt": "p", **{f"field{n}": 1 for n in range(1000)}})
    assert "and 997 more" in str(error.value)
    assert len(str(error.value)) < 400
