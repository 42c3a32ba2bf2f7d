"""The simulated Chutes answers as the real one does."""

import io
import json
import subprocess
import sys

import pytest
import requests
import simulator
from PIL import Image
from upstream import serving

GOOD = {"model": "qwen-image", "prompt": "a fox", "width": 256, "height": 192}
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


def refusal(answer):
    return answer.status_code, answer.json()["detail"]


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("qwen-image", "JPEG"),
        ("FLUX.1-dev", "JPEG"),
        ("z-image-turbo", "PNG"),
        ("hunyuan-image-3", "WEBP"),
    ],
)
def test_each_model_draws_in_its_format_and_the_size_asked_for(post, model, kind):
    answer = post(model=model, width=640, height=768)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == f"image/{kind.lower()}"
    assert "Content-Length" not in answer.headers
    assert answer.headers["Transfer-Encoding"] == "chunked"
    assert answer.headers["X-Chutes-InvocationID"]
    image = Image.open(io.BytesIO(answer.content))
    image.load()
    assert (image.format, image.size) == (kind, (640, 768))


def test_another_prompt_or_seed_draws_another_image(post):
    images = {post(**fields).content for fields in ({}, {"prompt": "a bear"}, {"seed": 1})}
    assert len(images) == 3
    assert post(seed=1).content in images


def test_the_words_are_in_the_middle(post):
    image = Image.open(io.BytesIO(post(model="z-image-turbo", width=576, height=576).content))
    middle = image.crop((0, 270, 576, 306))
    assert (255, 255, 255) in {colour for _, colour in middle.getcolors(middle.width**2)}


def test_a_chutes_own_host_takes_no_model(post):
    data = json.dumps({"prompt": "a fox", "width": 256, "height": 256})
    assert post("/qwen-image/generate", data=data).status_code == 200
    assert refusal(post("/qwen-image/generate")) == NAUGHTY
    assert refusal(post("/nobody/generate")) == (404, "No matching chute found!")


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
        ({"model": "FLUX.1-dev", "num_inference_steps": 31}, OWN_CHECK),
        ({"model": "z-image-turbo", "width": 576, "height": 512}, OWN_CHECK),
        ({"model": "z-image-turbo", "width": 576, "height": 576, "guidance_scale": 6}, OWN_CHECK),
    ],
)
def test_a_bad_request_is_refused_in_chutes_words(post, changes, expected):
    assert refusal(post(**changes)) == expected


@pytest.mark.parametrize(
    "changes",
    [{"seed": None, "true_cfg_scale": None}, {"num_inference_steps": 90}, {"image_b64": []}],
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
