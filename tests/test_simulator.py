"""The simulated Chutes answers as the real one does."""

import io
import json

import pytest
import requests
from PIL import Image
from simulator import Simulator
from upstream import serving

TOKEN = "cpk_simulated"


@pytest.fixture
def simulate():
    """Return a maker of simulators, each with a function that posts to it."""
    running = []

    def make(**options):
        context = serving(Simulator(latency=0, **options))
        running.append(context)
        simulator = context.__enter__()

        def post(path="/generate", token=TOKEN, data=None, **fields):
            body = data or json.dumps({"model": "qwen-image", "prompt": "a fox", **fields})
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            address = simulator.url.replace("/generate", path)
            return requests.post(address, body, headers=headers, timeout=30)

        return post

    yield make
    for context in running:
        context.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("qwen-image", "JPEG"),
        ("FLUX.1-dev", "JPEG"),
        ("z-image-turbo", "PNG"),
        ("hunyuan-image-3", "WEBP"),
    ],
)
def test_each_model_draws_in_its_format_and_the_size_asked_for(simulate, model, kind):
    answer = simulate()(model=model, width=640, height=768, guidance_scale=2)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == f"image/{kind.lower()}"
    assert "Content-Length" not in answer.headers
    assert answer.headers["Transfer-Encoding"] == "chunked"
    assert answer.headers["X-Chutes-InvocationID"]
    picture = Image.open(io.BytesIO(answer.content))
    picture.load()
    assert (picture.format, picture.size) == (kind, (640, 768))


def test_another_prompt_or_seed_draws_another_picture(simulate):
    post = simulate()
    pictures = {
        post(width=256, height=256, **fields).content
        for fields in ({}, {"prompt": "a bear"}, {"seed": 1}, {"seed": 2})
    }
    assert len(pictures) == 4
    assert post(width=256, height=256, seed=1).content in pictures


def test_a_chutes_own_host_takes_no_model(simulate):
    post = simulate()
    body = json.dumps({"prompt": "a fox", "width": 256, "height": 256})
    assert post("/qwen-image/generate", data=body).status_code == 200
    body = json.dumps({"prompt": "a fox", "model": "qwen-image"})
    assert post("/qwen-image/generate", data=body).status_code == 400


def detail(answer):
    return answer.status_code, answer.json()["detail"]


NAUGHTY = (400, "bad request, naughty naughty")
OWN_CHECK = (400, 'Invalid request: Invalid request: {"detail":"Invalid input parameters"}')


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"priority": 1}, NAUGHTY),
        ({"width": 127}, NAUGHTY),
        ({"height": 2049}, NAUGHTY),
        ({"guidance_scale": 0.5}, NAUGHTY),
        ({"seed": 2**32}, NAUGHTY),
        ({"width": "512"}, NAUGHTY),
        ({"prompt": None}, NAUGHTY),
        ({"model": "FLUX.1-dev", "num_inference_steps": 31}, OWN_CHECK),
        ({"model": "z-image-turbo", "guidance_scale": 6}, OWN_CHECK),
        ({"model": "z-image-turbo", "width": 512}, OWN_CHECK),
        ({"model": "nobody"}, (404, "model not found: nobody")),
    ],
)
def test_a_bad_request_is_refused_in_chutes_words(simulate, fields, refusal):
    assert detail(simulate()(**fields)) == refusal


def test_null_is_fine_for_seed_and_true_cfg_scale_and_steps_are_clamped(simulate):
    fields = {"seed": None, "true_cfg_scale": None, "num_inference_steps": 90}
    assert simulate()(width=128, height=128, **fields).status_code == 200


def test_the_checks_come_in_chutes_order(simulate):
    post = simulate(token=TOKEN, quota=0, disabled=("FLUX.1-dev",), cold=60)
    wrong = {"path": "/elsewhere", "model": "nobody", "priority": 1}
    assert detail(post(token=None, data="{", path="/x"))[0] == 401
    assert detail(post(token="other", data="{")) == (401, "Invalid token or user not found")
    assert detail(post(data="{", path="/x"))[0] == 400
    assert detail(post(**wrong))[0] == 404
    assert detail(post(**{**wrong, "model": "FLUX.1-dev"})) == (
        503,
        "This chute is currently disabled.",
    )
    status, words = detail(post(**{**wrong, "model": "qwen-image"}))
    assert status == 402
    assert words["quota_reset_timestamp"].endswith("T00:00:00+00:00")
    post = simulate(cold=60)
    assert detail(post(**{**wrong, "model": "qwen-image"})) == (404, "No matching cord found!")
    assert detail(post(priority=1)) == NAUGHTY
    status, words = detail(post())
    assert (status, words[:43]) == (503, "No instances available (yet) for chute_id='")


def test_a_cold_model_warms_up(simulate):
    post = simulate(cold=0.2)
    assert post().status_code == 503
    while (answer := post(width=128, height=128)).status_code != 200:
        assert answer.status_code == 503


def test_the_quota_is_told_and_runs_out(simulate):
    post = simulate(quota=2)
    headers = [post(width=128, height=128).headers for _ in range(2)]
    told = [(h["X-Chutes-Quota-Total"], h["X-Chutes-Quota-Used"]) for h in headers]
    assert told == [("2", "1"), ("2", "2")]
    assert headers[1]["X-Chutes-Quota-Remaining"] == "0"
    assert post().status_code == 402


def test_at_its_capacity_it_says_429(simulate):
    answer = simulate(capacity=0)()
    assert detail(answer) == (429, "Infrastructure is at maximum capacity, try again later")


def test_it_speaks_to_this_machine_only():
    simulator = Simulator()
    assert simulator.server_address[0] == "127.0.0.1"
    simulator.server_close()
