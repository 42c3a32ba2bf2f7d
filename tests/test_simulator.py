"""The simulated Chutes answers as the real one does."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import simulator
from PIL import Image
from upstream import image_bytes, serving

import models
from catalogue import Reader

GOOD = {"model": "qwen-image", "prompt": "a fox", "width": 256, "height": 192}
TURBO, HUNYUAN, HIDREAM, EDIT = (
    f"/{slug}/generate"
    for slug in (
        *("vonkaiser-z-image-turbo", "chutes-hunyuan-image-3", "chutes-hidream"),
        "vonkaiser-qwen-image-edit-2511",
    )
)
GIVEN = base64.b64encode(image_bytes("PNG", (320, 200), "teal")).decode()
TOKEN = {"Authorization": "Bearer cpk_simulated"}
NAUGHTY = (400, "bad request, naughty naughty")
OWN_CHECK = (400, 'Invalid request: Invalid request: {"detail":"Invalid input parameters"}')


@pytest.fixture
def server():
    with serving(simulator.Simulator()) as server:
        yield server


@pytest.fixture
def post(server):
    """Return a function that posts a good call with these changes, and returns the answer."""

    def post(path="/generate", headers=TOKEN, data=None, **changes):
        url = server.url.replace("/generate", path)
        return requests.post(url, data or json.dumps(GOOD | changes), headers=headers, timeout=30)

    return post


@pytest.fixture
def ask(post):
    """Return a function that posts a prompt and these fields alone, as a host takes them."""
    return lambda path, **fields: post(path, data=json.dumps({"prompt": "a fox", **fields}))


def refusal(answer):
    return answer.status_code, answer.json()["detail"]


@pytest.mark.parametrize(
    ("path", "fields", "kind"),
    [
        ("/generate", {"model": "qwen-image", "width": 640, "height": 768}, "JPEG"),
        ("/chutes-qwen-image/generate", {"width": 640, "height": 768}, "JPEG"),
        (TURBO, {"width": 640, "height": 768}, "PNG"),
        (HUNYUAN, {"size": "640x768"}, "WEBP"),
    ],
)
def test_each_model_draws_in_its_format_and_the_size_asked_for(ask, path, fields, kind):
    answer = ask(path, **fields)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == f"image/{kind.lower()}"
    assert "Content-Length" not in answer.headers
    assert answer.headers["Transfer-Encoding"] == "chunked"
    assert answer.headers["X-Chutes-InvocationID"]
    image = Image.open(io.BytesIO(answer.content))
    image.load()
    assert (image.format, image.size) == (kind, (640, 768))


def test_an_edit_is_the_given_image_changed(ask):
    answer = ask(EDIT, image_b64s=[GIVEN])
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/jpeg")
    image = Image.open(io.BytesIO(answer.content))
    assert image.size == (320, 200)
    assert image.getpixel((5, 5)) != (0, 128, 128)
    other = Image.open(io.BytesIO(ask(EDIT, image_b64s=[GIVEN], width=256, height=512).content))
    assert other.size == (256, 512)


@pytest.mark.parametrize("given", ["", "data:image/png;base64," + GIVEN, "eA=="])
def test_an_image_that_is_none_exhausts_all_targets(ask, given):
    expected = (500, "exhausted all available targets to no avail")
    assert refusal(ask(EDIT, image_b64s=[given])) == expected


@pytest.mark.parametrize(
    "given", [{}, *({"image_b64s": each} for each in ([], GIVEN, [GIVEN] * 4))]
)
def test_an_edit_needs_one_to_three_images(ask, given):
    assert refusal(ask(EDIT, **given)) == OWN_CHECK


def test_a_resolution_and_a_ratio_are_sizes_too(ask):
    sizes = [
        Image.open(io.BytesIO(ask(path, **fields).content)).size
        for path, fields in ((HIDREAM, {"resolution": "768x1360"}), (HUNYUAN, {"size": "16:9"}))
    ]
    assert sizes == [(768, 1360), (1024, 1024)]


def test_another_prompt_or_seed_draws_another_image(post):
    images = {post(**fields).content for fields in ({}, {"prompt": "a bear"}, {"seed": 1})}
    assert len(images) == 3
    assert post(seed=1).content in images


def test_the_words_are_in_the_middle(ask):
    image = Image.open(io.BytesIO(ask(TURBO, width=576, height=576).content))
    middle = image.crop((0, 270, 576, 306))
    assert (255, 255, 255) in {colour for _, colour in middle.getcolors(middle.width**2)}


def test_a_chutes_own_host_takes_no_model(ask):
    assert refusal(ask("/chutes-qwen-image/generate", model="qwen-image")) == NAUGHTY
    assert refusal(ask(TURBO, model="z-image-turbo")) == OWN_CHECK
    assert refusal(ask("/nobody/generate")) == (404, "No matching chute found!")


def test_the_router_knows_its_own_models_alone(ask):
    assert refusal(ask("/generate", model="hidream")) == (404, "model not found: hidream")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"priority": 1}, NAUGHTY),
        ({"width": 127}, NAUGHTY),
        ({"height": 2049}, NAUGHTY),
        ({"guidance_scale": 0.5}, NAUGHTY),
        ({"seed": 2**32}, NAUGHTY),
        ({"seed": True}, NAUGHTY),
        ({"width": "512"}, NAUGHTY),
        ({"width": None}, NAUGHTY),
        ({"prompt": None}, NAUGHTY),
        ({"data": '{"model": "qwen-image"}'}, NAUGHTY),
        ({"model": []}, (404, "model not found: []")),
    ],
)
def test_a_bad_request_is_refused_in_chutes_words(post, changes, expected):
    assert refusal(post(**changes)) == expected


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (TURBO, {"height": 512}),
        (TURBO, {"guidance_scale": 7.5}),
        (TURBO, {"prompt": "ab"}),
        (TURBO, {"prompt": "a" * 1201}),
        (TURBO, {"negative_prompt": ""}),
        (HUNYUAN, {"size": "huge"}),
        (HUNYUAN, {"width": 1024}),
        (HIDREAM, {"resolution": "640x480"}),
    ],
)
def test_each_host_has_a_check_of_its_own(ask, path, fields):
    assert refusal(ask(path, **fields)) == OWN_CHECK


@pytest.mark.parametrize(
    "changes",
    [{"seed": None, "true_cfg_scale": None}, {"num_inference_steps": 90}],
)
def test_what_else_passes_the_router(post, changes):
    assert post(**changes).status_code == 200


def test_the_checks_come_in_chutes_order(post):
    wrong = {"path": "/elsewhere", "model": "nobody", "priority": 1}
    assert refusal(post(**wrong, data="{", headers={})) == (401, "Authentication required.")
    assert refusal(post(**wrong, data="{")) == (400, "Invalid JSON body")
    assert refusal(post(**wrong)) == (404, "model not found: nobody")
    wrong["model"] = "qwen-image"
    assert refusal(post(**wrong)) == (404, "No matching cord found!")


def test_the_quota_is_told_and_counts_no_refusals(post):
    assert post(width=0).status_code == 400
    names = [f"X-Chutes-Quota-{name}" for name in ("Total", "Used", "Remaining")]
    told = [[answer.headers[name] for name in names] for answer in (post(), post())]
    assert told == [["300", "1", "299"], ["300", "2", "298"]]


def listed(server, **query):
    answer = requests.get(server.catalogue_url, query, timeout=30)
    assert answer.status_code == 200
    return answer.json()


def test_the_catalogue_has_pages(server):
    whole = listed(server)
    assert (whole["page"], whole["limit"], whole["total"]) == (0, 25, 5)
    second = listed(server, limit=3, page=1)
    assert (second["page"], second["limit"], second["total"]) == (1, 3, 5)
    assert second["items"] == whole["items"][3:]
    assert second["cord_refs"].keys() == {chute["cord_ref_id"] for chute in second["items"]}
    assert second["items"][0]["cords"] is None
    names = {
        template: [chute["name"] for chute in listed(server, template=template)["items"]]
        for template in ("diffusion", "other")
    }
    others = ["z-image-turbo", "hunyuan-image-3", "hidream", "qwen-image-edit-2511"]
    assert names == {"diffusion": ["qwen-image"], "other": others}
    assert requests.get(server.url, timeout=30).status_code == 404


def test_the_catalogue_is_read_with_its_lies(server, ask):
    reader = Reader()
    found = {m.name: m for m in reader.read(server.catalogue_url, server.chute_url)}
    reader.close()
    assert list(found) == [chute.name for chute in simulator.CHUTES]
    assert found["qwen-image"].fields is None
    turbo, hidream = found["z-image-turbo"], found["hidream"]
    assert (turbo.prompt.minLength, turbo.prompt.maxLength) == (3, 1200)
    assert models.rules(turbo.fields)["guidance_scale"] == {
        "type": "number",
        "minimum": 0,
        "maximum": 5,
    }
    assert hidream.fields["resolution"].enum == simulator.RESOLUTIONS
    assert (hidream.hot, hidream.usd_per_hour) == (False, 1.5)
    for model in found.values():
        given = {model.images.field: [GIVEN]} if model.images else {}
        assert ask(model.url.removeprefix(server.chute_url[:-7]), **given).status_code == 200


def test_each_model_of_the_demos_file_is_simulated(server, ask, tmp_path):
    demo = Path(simulator.__file__).with_name("demo").read_text()
    lines = re.search(r"^simulated=.*?>\$MODELS_FILE$", demo, re.M | re.S)[0]
    command = f"chutes={server.chute_url[:-7]} MODELS_FILE={tmp_path}/models.toml\n{lines}"
    subprocess.run(["sh", "-c", command], check=True, cwd=Path(models.__file__).parent)
    known = models.load(tmp_path / "models.toml")
    told = ["qwen-image", "z-image-turbo", "qwen-image-edit-2511", "hunyuan-image-3"]
    assert list(known) == told
    for model in known.values():
        address, name = models.address(model, server.url)
        fields = model.send | ({"model": name} if name else {})
        fields |= {model.images.field: [GIVEN]} if model.images else {}
        assert ask(address.removeprefix(server.url[:-9]), **fields).status_code == 200


def test_it_listens_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"


def test_the_program_prints_its_address_and_takes_its_time():
    command = [sys.executable, simulator.__file__, "--latency", "0.3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            url = process.stdout.readline().decode().strip()
            answer = requests.post(url, json.dumps(GOOD), headers=TOKEN, timeout=30)
        finally:
            process.terminate()
    assert answer.status_code == 200
    assert answer.elapsed.total_seconds() >= 0.3
