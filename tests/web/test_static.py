"""The page, in a real browser: what a person sees, hears and presses."""

import base64
import re
import shutil
import threading
import time
import zipfile
from contextlib import contextmanager
from datetime import datetime
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import pytest
import rows
from axe_playwright_python.sync_playwright import Axe
from conftest import KEYS, PROMPT, finished, submit, wait_until
from playwright.sync_api import expect, sync_playwright
from upstream import Answer, image_bytes, refusal
from werkzeug.serving import make_server

import images
from models import Model
from records import ERROR_CODES, Ending, NewTask

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(
        CHROMIUM is None, reason="the page is tested in Chromium: apt install chromium"
    ),
]
KEY = KEYS.split(",")[0]


# The browser


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


class Site:
    """An application, served on a socket; `client` reaches it without the browser."""

    def __init__(self, app):
        self.client, self.database = app.client, app.database
        self.server = make_server("127.0.0.1", 0, app.client.application, threaded=True)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.port}"


@pytest.fixture
def site(serve):
    """Return a maker of sites, which run until the test ends."""
    begun = []

    def make(**values):
        made = Site(serve(**{"RETRY_BACKOFF": 0.05, **values}))
        thread = threading.Thread(target=made.server.serve_forever, args=(0.02,))
        thread.start()
        begun.append((made.server, thread))
        return made

    yield make
    for server, thread in begun:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def visit(browser):
    """Return a function that opens the page of a site, and watch what it does there.

    No page may write an error to the console, but for answers that the test expects
    (`refusals`), or ask another host, or ask for two things at a time.
    """
    opened = []

    def open_page(site, refusals=(), context=None, before=None, path="/", **options):
        context = context or browser.new_context(**{"reduced_motion": "reduce", **options})
        page = context.new_page()
        page.set_default_timeout(15_000)
        watch(page, site, refusals)
        if before:
            before(page)
        page.goto(site.address + path)
        opened.append((context, page))
        return page

    yield open_page
    at_once = [page.evaluate("window.mostAtOnce") for _, page in opened]
    for context, _ in opened:
        context.close()
    assert [page.faults for _, page in opened] == [[]] * len(opened)
    assert at_once == [1] * len(opened)


def watch(page, site, refusals):
    page.faults, page.asked, page.answered = [], [], 0
    page.add_init_script(COUNT_REQUESTS)

    def note(message):
        is_expected = any(f"a status of {code}" in message.text for code in refusals)
        if message.type in ("error", "warning") and not is_expected:
            page.faults.append(message.text)

    def begin(request):
        address = urlsplit(request.url)
        if address.scheme not in ("blob", "data") and not request.url.startswith(site.address):
            page.faults.append(f"another host is asked: {request.url}")
        if request.resource_type == "fetch":
            page.asked.append((request.method, address.path, address.query))

    def end(request):
        page.answered += request.resource_type == "fetch"

    # Listened for from the start: else the first one may open before it is.
    page.on("filechooser", lambda chooser: None)
    page.on("console", note)
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", begin)
    page.on("requestfinished", end)


# Counts the requests that are under way, pictures and their archive left out.
COUNT_REQUESTS = """
window.mostAtOnce = 0;
let atOnce = 0;
const ask = window.fetch;
window.fetch = async (address, options) => {
  if (/^[/]images[/.]|[/]inputs[/]/.test(address)) return ask(address, options);
  atOnce += 1;
  window.mostAtOnce = Math.max(window.mostAtOnce, atOnce);
  try {
    return await ask(address, options);
  } finally {
    atOnce -= 1;
  }
};
"""


def look_again(page):
    """Have the page look at once, as it does when its tab is seen again."""
    page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")


def fill(page, **fields):
    for name, text in fields.items():
        page.locator(f"#{name}, #field-{name}").fill(text)


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def make_one(site, prompt=PROMPT, **fields):
    task_id = submit(site.client, prompt, **fields)
    assert finished(site.client, task_id)["status"] == "completed"
    return task_id


def add_pictures(site, folder, count):
    """Put so many finished pictures into the database, the last one the newest."""
    folder.mkdir(exist_ok=True)
    for n in range(count):
        path = folder / f"many-{n}.png"
        path.write_bytes(image_bytes(size=(8, 8)))
        site.database.add([NewTask(f"many-{n}", f"number {n}", "many", {"width": 8}, 100)], 1.8e9)
        task = site.database.claim(1.8e9)
        image = images.inspect(path)
        site.database.finish(task, Ending("completed", "completed", path=path, image=image), 1.8e9)


pictures = "#pictures a.image"
expect.set_options(timeout=15_000)


# From a prompt to a picture


def test_a_prompt_becomes_a_picture(site, visit, upstream):
    upstream.gate.clear()
    there = site(CONCURRENCY=1)
    page = visit(there)
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#model")).to_have_value("qwen-image")
    expect(page.locator("#prompt")).to_be_focused()
    fill(page, prompt="a first one", model="FLUX.1-dev")
    page.locator("#size").select_option("1280x832")
    press(page, "Make the picture")
    running = page.locator("#unfinished li").nth(0)
    expect(running).to_contain_text(re.compile(r"a first one\s*Running for \d+ s"))
    fill(page, model="", prompt="a second one")
    press(page, "Make the picture")
    waiting = page.locator("#unfinished li").nth(1)
    expect(waiting).to_contain_text("Waiting, place 1: all 1 places are busy")
    expect(page.locator("#facts")).to_contain_text("1 of 1 running")
    expect(page.locator("#facts")).to_contain_text("1 waiting")
    expect(page).to_have_title("(2) Image proxy")
    upstream.gate.set()
    expect(page.locator(pictures)).to_have_count(2)
    alts = page.locator(f"{pictures} img").evaluate_all("all => all.map((one) => one.alt)")
    assert alts == ["a second one", "a first one"]
    for image in page.locator(f"{pictures} img").all():
        expect(image).to_have_js_property("naturalWidth", 64)
    expect(page.locator("#live")).to_contain_text("Picture ready: a second one")
    expect(page.locator("#unfinished-part")).to_be_hidden()
    first, second = upstream.calls
    assert (first["model"], first["width"], first["height"]) == ("FLUX.1-dev", 1280, 832)
    assert (second["model"], second["width"]) == ("qwen-image", 1280)


def test_the_time_that_a_task_runs_counts_up(site, visit, upstream):
    upstream.gate.clear()
    there = site()
    submit(there.client)
    page = visit(there)
    state = page.locator("#unfinished .state")
    expect(state).to_contain_text("Running for")

    def seconds():
        return int(re.search(r"\d+", state.inner_text())[0])

    before = seconds()
    wait_until(lambda: page.wait_for_timeout(50) or seconds() > before)


def test_every_field_that_is_wrong_is_marked_in_the_words_of_its_label(site, visit, upstream):
    page = visit(site())
    press(page, "Make the picture")
    expect(page.locator("#make-error")).to_have_text("Please correct: Prompt")
    expect(page.locator("#prompt")).to_be_focused()
    expect(page.locator("#prompt")).to_have_accessible_description("Prompt must not be empty")
    page.locator("summary").click()
    fill(page, prompt="p" * 10_001, seed="seven", guidance_scale="20,5", num_inference_steps="1.5")
    page.locator("#size").select_option("other")
    fill(page, width="99999")
    page.locator("summary").click()
    press(page, "Make the picture")
    faults = {
        "prompt": "Prompt must be at most 10,000 characters long",
        "width": "Width must be a whole number from 128 to 2048",
        "seed": "Seed must be a whole number from 0 to 4294967295",
        "num_inference_steps": "Steps must be a whole number from 1 to 100",
        "guidance_scale": "Guidance scale must be a number from 0 to 20",
    }
    expect(page.locator("[aria-invalid]")).to_have_count(len(faults))
    for name, sentence in faults.items():
        field = page.locator(f"#{name}, #field-{name}")
        expect(field).to_be_visible()
        expect(field).to_have_accessible_description(sentence)
    labels = "Prompt, Width, Guidance scale, Steps, Seed"
    expect(page.locator("#make-error")).to_have_text(f"Please correct: {labels}")
    assert not [path for method, path, _ in page.asked if method == "POST"]
    fill(page, prompt="p", seed="7", guidance_scale="7,25", num_inference_steps="15", width="640")
    expect(page.locator("[aria-invalid]")).to_have_count(0)
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(1)
    expect(page.locator("#make-error")).to_be_empty()
    (call,) = upstream.calls
    assert (call["guidance_scale"], call["num_inference_steps"]) == (7.25, 15)


def test_what_the_server_refuses_is_told_in_the_words_of_the_labels_too(site, visit):
    page = visit(site(MODELS="qwen-image"), refusals=[400])
    fill(page, prompt="p", model="none")
    press(page, "Make the picture")
    expect(page.locator("#model")).to_be_focused()
    expect(page.locator("#model")).to_have_accessible_description(
        'Model must be one of qwen-image, not "none"'
    )
    several = "num_inference_steps must be less; width must be more; and 2 more"
    page.route("**/generate", lambda route: route.fulfill(status=400, json={"error": several}))
    press(page, "Make the picture")
    expect(page.locator("#make-error")).to_have_text("Please correct: Steps, Width")
    expect(page.locator("#field-num_inference_steps")).to_have_accessible_description(
        "Steps must be less"
    )
    expect(page.locator("#field-width")).to_have_accessible_description(
        "Width must be more; and 2 more"
    )
    page.unroute("**/generate")
    whole = "The queue is full; try again later"
    page.route("**/generate", lambda route: route.fulfill(status=400, json={"error": whole}))
    press(page, "Make the picture")
    expect(page.locator("#make-error")).to_have_text(whole)
    expect(page.locator("[aria-invalid]")).to_have_count(0)


def test_the_form_has_the_fields_and_the_rules_of_the_api(site, visit):
    there = site()
    page = visit(there)
    fields = page.evaluate("import('/page/fields.js').then((fields) => fields.FIELDS)")
    schemas = there.client.get("/openapi.json").json["components"]["schemas"]
    known = schemas["Generate"]["properties"]
    assert {"prompt", "model", *fields} == set(known)
    for name, rule in fields.items():
        default = known[name].get("default")
        assert rule.pop("default", None) == default, name
        (told,) = [kind for kind in known[name]["anyOf"] if kind["type"] != "null"]
        assert rule.items() <= told.items(), name
    failures = page.evaluate("import('/page/words.js').then((words) => words.FAILURES)")
    assert {*failures, "canceled"} == set(ERROR_CODES)


def test_all_settings_are_sent(site, visit, upstream):
    page = visit(site())
    page.locator("summary").click()
    given = {"seed": "7", "num_inference_steps": "12", "guidance_scale": "3.5"}
    fill(page, prompt="p", negative_prompt="a dog", true_cfg_scale="2", priority="-5", **given)
    page.locator("#size").select_option("other")
    fill(page, width="640", height="384")
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(1)
    (call,) = upstream.calls
    assert call == {
        **{"model": "qwen-image", "prompt": "p", "negative_prompt": "a dog", "seed": 7},
        **{"num_inference_steps": 12, "guidance_scale": 3.5, "true_cfg_scale": 2},
        **{"width": 640, "height": 384},
    }


def test_a_lost_answer_makes_no_second_picture(site, visit, upstream):
    there = site()

    def lose(route):
        route.fetch()
        route.abort()

    page = visit(there)
    page.route("**/generate", lose, times=1)
    fill(page, prompt="p")
    press(page, "Make the picture")
    expect(page.locator("#make-error")).to_contain_text("is not made twice")
    wait_until(lambda: page.wait_for_timeout(20) or page.faults)
    assert page.faults.pop() == "Failed to load resource: net::ERR_FAILED"
    press(page, "Make the picture")
    expect(page.locator("#make-error")).to_be_empty()
    expect(page.locator(pictures)).to_have_count(1)
    fill(page, prompt="another")
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(2)
    assert len(upstream.calls) == 2


# The model


def file_of(folder, tables, url):
    """Write a file of models, all called at one address, with qwen-image as the first."""
    names = re.findall(r"^\[([\w-]+)\]$", tables, re.M)
    for name in names:
        tables = tables.replace(f"[{name}]\n", f'[{name}]\nurl = "{url}"\n')
    path = folder / "models.toml"
    path.write_text(f'[qwen-image]\nurl = "{url}"\nmodel = "qwen-image"\n{tables}')
    return path


MANY = "".join(f"[style-{n}]\n" for n in range(300))
KINDS = """
[sided]
[sided.fields]
width = { type = "integer", minimum = 576, maximum = 2048, default = 768 }
height = { type = "integer", minimum = 576, maximum = 2048, default = 640 }
guidance_scale = { type = "number", minimum = 0, maximum = 5, default = 0 }
num_inference_steps = { type = "integer", minimum = 1 }
seed = { type = "integer", minimum = 0, maximum = 9 }

[shaped]
prompt = { minLength = 3, maxLength = 20 }

[shaped.fields]
resolution = { type = "string", enum = ["1024x1024", "768x1360"], default = "1024x1024" }
guidance_scale = { type = "number", minimum = 1, maximum = 20 }
tile = { type = "boolean", default = true }
style = { type = "string", minLength = 2, maxLength = 20 }
loras = { type = "array" }
constructor = {}
key = { type = "integer", maximum = 3 }

[editor]
images = { field = "image_b64s", minimum = 1, maximum = 3 }
"""
options = "#models [role=option]"


@pytest.fixture
def kinds(site, upstream, tmp_path):
    """Return a site with models that take different fields."""
    return site(MODELS_FILE=file_of(tmp_path, KINDS, upstream.url))


def choose(page, name):
    expect(page.locator("#model")).not_to_have_value("")
    page.locator("#model").click()
    page.locator("#models").get_by_role("option", name=name, exact=True).click()
    expect(page.locator("#model")).to_have_value(name)


def test_one_of_hundreds_of_models_is_found_with_the_keyboard(site, visit, upstream, tmp_path):
    there = site(MODELS_FILE=file_of(tmp_path, MANY, upstream.url))
    page = visit(there)
    model = page.get_by_role("combobox", name="Model", exact=True).first
    expect(model).to_have_value("qwen-image")
    fill(page, prompt="p")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(model).to_be_focused()
    expect(page.locator("#models")).to_be_hidden()
    page.keyboard.press("ArrowDown")
    expect(model).to_have_attribute("aria-expanded", "true")
    expect(page.locator(options)).to_have_count(301)
    chosen = page.locator("#models").get_by_role("option", selected=True)
    expect(chosen).to_have_text("qwen-image")
    page.keyboard.press("ArrowUp")
    expect(chosen).to_have_text("style-299")
    expect(chosen).to_be_in_viewport()
    expect(model).to_have_attribute("aria-activedescendant", chosen.get_attribute("id"))
    page.keyboard.press("Escape")
    expect(page.locator("#models")).to_be_hidden()
    expect(model).to_have_value("qwen-image")
    page.keyboard.press("ArrowDown")
    page.keyboard.type("29 Style")
    expect(page.locator(options)).to_have_count(13)
    expect(chosen).to_have_count(0)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(model).to_have_value("style-129")
    expect(page.locator("#models")).to_be_hidden()
    assert not upstream.calls
    page.keyboard.press("Enter")
    expect(page.locator(pictures)).to_have_count(1)
    (task,) = there.client.get("/tasks").json["tasks"]
    assert task["model"] == "style-129"


SENDING = """
[sending]
send = { width = 640, height = 512, guidance_scale = 2.5 }

[sending.fields]
width = { type = "integer", minimum = 128, maximum = 2048 }
height = { type = "integer", minimum = 128, maximum = 2048 }
guidance_scale = { type = "number", minimum = 0, maximum = 20, default = 4 }
seed = { type = "integer", minimum = 7, maximum = 7 }
"""


def test_what_is_sent_unasked_is_shown_as_the_default(site, visit, upstream, tmp_path):
    page = visit(site(MODELS_FILE=file_of(tmp_path, SENDING, upstream.url)))
    choose(page, "sending")
    page.locator("summary").click()
    expect(page.locator("#size option:checked")).to_have_text("640 \u00d7 512 (default)")
    guidance = page.locator("#field-guidance_scale")
    expect(guidance).to_have_accessible_description("0 to 20, default 2.5")
    fill(page, prompt="p")
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(1)
    asked = {"prompt": "p", "seed": 7}
    assert upstream.calls == [{**asked, "width": 640, "height": 512, "guidance_scale": 2.5}]


def test_a_model_is_chosen_with_a_finger(site, visit, upstream, tmp_path):
    there = site(MODELS_FILE=file_of(tmp_path, MANY, upstream.url))
    phone = {"has_touch": True, "is_mobile": True, "viewport": {"width": 390, "height": 600}}
    page = visit(there, **phone)
    expect(page.locator("#model")).to_have_value("qwen-image")
    page.locator("#model").tap()
    expect(page.locator("#models")).to_be_in_viewport(ratio=0.99)
    page.keyboard.type("style-7")
    expect(page.locator(options)).to_have_count(11)
    page.locator(options).nth(1).tap()
    expect(page.locator("#model")).to_have_value("style-70")
    expect(page.locator("#models")).to_be_hidden()
    page.locator("#model").tap()
    expect(page.locator(options)).to_have_count(301)
    page.locator("h1").tap()
    expect(page.locator("#models")).to_be_hidden()
    expect(page.locator("#model")).to_have_value("style-70")


def test_a_model_without_an_instance_is_marked_as_cold(site, visit, upstream, tmp_path):
    catalogue = {"CATALOGUE_URL": upstream.catalogue_url, "CHUTE_URL": upstream.chute_url}
    there = site(MODELS_FILE=file_of(tmp_path, "", upstream.url), **catalogue)
    wait_until(lambda: len(there.client.get("/models").json["models"]) == 5)
    page = visit(there)
    expect(page.locator("#model")).to_have_value("qwen-image")
    page.locator("#model").click()
    expect(page.locator(options)).to_have_text(
        ["qwen-image", "z-image-turbo", "hunyuan-image-3", "hidream cold"]
    )
    fill(page, model="chutes-hidream")
    expect(page.locator(options)).to_have_text("hidream cold")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_value("hidream")
    expect(page.locator("#model")).to_have_accessible_description("cold: may take minutes")
    choose(page, "z-image-turbo")
    expect(page.locator("#model")).to_have_accessible_description("")


def test_a_model_that_is_not_in_the_list_is_asked_for_by_its_name(kinds, visit, upstream):
    page = visit(kinds)
    fill(page, prompt="p", model="a/new-one")
    expect(page.locator("#models")).to_be_hidden()
    expect(page.locator("#model")).to_have_accessible_description("not in the list")
    expect(page.locator("#size option:checked")).to_have_text("default")
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(1)
    assert upstream.calls == [{"model": "a/new-one", "prompt": "p"}]
    fill(page, model=" ")
    page.locator("#prompt").focus()
    expect(page.locator("#model")).to_have_value("qwen-image")


def test_a_model_that_needs_images_is_not_offered(kinds, visit):
    page = visit(kinds)
    expect(page.locator("#model")).to_have_value("qwen-image")
    page.locator("#model").click()
    expect(page.locator(options)).to_have_text(["qwen-image", "sided", "shaped"])
    expect(page.locator("#find-model option")).to_have_count(5)


def test_the_form_has_the_fields_of_the_model_and_keeps_what_was_typed(kinds, visit, upstream):
    page = visit(kinds)
    expect(page.locator("#size")).to_be_visible()
    page.locator("summary").click()
    fill(page, prompt="a fox", negative_prompt="a dog", guidance_scale="3.5", seed="7")
    page.locator("#size").select_option("1280x832")
    choose(page, "shaped")
    named = page.locator("#make [data-field]").evaluate_all(
        "all => all.map((a) => a.dataset.field)"
    )
    assert sorted(named) == sorted(
        ["resolution", "guidance_scale", "tile", "style", "loras", "constructor", "key", "priority"]
    )
    expect(page.locator("#size")).to_be_hidden()
    expect(page.get_by_label("Resolution")).to_be_visible()
    expect(page.locator("#field-guidance_scale")).to_have_value("3.5")
    expect(page.locator("#field-guidance_scale")).to_have_accessible_description("1 to 20")
    page.locator("#field-tile").select_option(label="No")
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(1)
    assert upstream.calls == [{"prompt": "a fox", "guidance_scale": 3.5, "tile": False}]
    choose(page, "sided")
    expect(page.locator("#size")).to_have_value("1280x832")
    expect(page.locator("#size option").first).to_have_text("768 \u00d7 640 (default)")
    expect(page.locator("#field-guidance_scale")).to_have_accessible_description(
        "0 to 5, default 0"
    )
    expect(page.locator("#field-seed")).to_have_value("7")
    expect(page.locator("#field-negative_prompt")).to_have_count(0)
    choose(page, "qwen-image")
    expect(page.locator("#field-negative_prompt")).to_have_value("a dog")
    choose(page, "shaped")
    expect(page.locator("#field-tile")).to_have_value("false")


def test_what_a_model_does_not_take_is_told_before_it_is_sent(kinds, visit, upstream):
    page = visit(kinds)
    page.locator("summary").click()
    fill(page, prompt="p", guidance_scale="7.5", num_inference_steps="0")
    page.locator("#size").select_option("512x512")
    choose(page, "sided")
    press(page, "Make the picture")
    faults = {
        "width": "Width must be a whole number from 576 to 2048",
        "height": "Height must be a whole number from 576 to 2048",
        "guidance_scale": "Guidance scale must be a number from 0 to 5",
        "num_inference_steps": "Steps must be a whole number of at least 1",
    }
    expect(page.locator("[aria-invalid]")).to_have_count(len(faults))
    for name, sentence in faults.items():
        expect(page.locator(f"#field-{name}")).to_have_accessible_description(sentence)
    expect(page.locator("#field-width")).to_have_value("512")
    choose(page, "shaped")
    expect(page.locator("[aria-invalid]")).to_have_count(0)
    expect(page.locator("#make-error")).to_be_empty()
    expect(page.locator("#prompt")).to_have_accessible_description("3 to 20 characters")
    fill(page, style="x", loras="{}")
    page.locator("#field-key").fill("4")
    press(page, "Make the picture")
    faults = {
        "prompt": "Prompt must be at least 3 characters long",
        "field-style": "Style must be at least 2 characters long",
        "field-loras": "Loras must be a list in JSON",
        "field-key": "Key must be a whole number of at most 3",
    }
    expect(page.locator("[aria-invalid]")).to_have_count(len(faults))
    for name, sentence in faults.items():
        expect(page.locator(f"#{name}")).to_have_accessible_description(sentence)
    assert not [path for method, path, _ in page.asked if method == "POST"]
    fill(page, prompt="a fox", style="oil", loras='["a", {"b": 1}]', constructor="free")
    page.locator("#field-key").fill("-1")
    expect(page.locator("#prompt")).to_have_accessible_description("3 to 20 characters")
    page.locator("#field-resolution").select_option("768x1360")
    page.locator("#field-tile").select_option(label="Yes")
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(1)
    given = {"resolution": "768x1360", "guidance_scale": 7.5, "tile": True, "style": "oil"}
    assert upstream.calls == [
        {"prompt": "a fox", **given, "loras": ["a", {"b": 1}], "constructor": "free", "key": -1}
    ]
    page.locator("#field-style").fill("")
    page.locator(pictures).click()
    press(page, "Use again")
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(2)
    # True is what the model does anyway.
    assert upstream.calls[1] == {k: v for k, v in upstream.calls[0].items() if k != "tile"}


def test_the_seed_that_was_chosen_is_shown_and_can_be_taken_along(kinds, visit, upstream):
    make_one(kinds, model="sided")
    page = visit(kinds)
    page.locator(pictures).click()
    seed = upstream.calls[0]["seed"]
    expect(page.locator("#settings dt", has_text="Seed")).to_be_visible()
    expect(page.locator("#settings dt:text-is('Seed') + dd")).to_have_text(str(seed))
    press(page, "Use again")
    expect(page.locator("#field-seed")).to_have_value("")
    choose(page, "shaped")
    expect(page.locator("#seed-before")).to_be_hidden()
    choose(page, "sided")
    press(page, f"Use its seed too: {seed}")
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(2)
    assert upstream.calls[1] == upstream.calls[0]


def test_what_is_wrong_stays_told_when_the_models_come(kinds, visit):
    """Hold the list of models back until the form was submitted."""
    held = []
    page = visit(kinds, before=lambda page: page.route("**/models", lambda r: held.append(r)))
    wait_until(lambda: page.wait_for_timeout(20) or held)
    press(page, "Make the picture")
    expect(page.locator("#make-error")).to_have_text("Please correct: Prompt")
    held[0].continue_()
    expect(page.locator("#model")).to_have_value("qwen-image")
    expect(page.locator("#make-error")).to_have_text("Please correct: Prompt")
    expect(page.locator("#prompt")).to_have_accessible_description("Prompt must not be empty")


def test_the_models_are_listed_when_a_server_that_was_away_is_back(kinds, visit):
    def away(page):
        for path in ("queue?*", "models"):
            page.route(f"**/{path}", lambda route: route.abort())

    page = visit(kinds, before=away)
    expect(page.locator("#notices")).to_contain_text("The server does not answer")
    expect(page.locator("#field-seed")).to_be_attached()
    fill(page, model="sided")
    page.locator("summary").click()
    fill(page, seed="3")
    for path in ("queue?*", "models"):
        page.unroute(f"**/{path}")
    look_again(page)
    expect(page.locator("#size option").first).to_have_text("768 \u00d7 640 (default)")
    expect(page.locator("#model")).to_have_value("sided")
    expect(page.locator("#field-seed")).to_have_value("3")
    assert set(page.faults) == {"Failed to load resource: net::ERR_FAILED"}
    page.faults.clear()


def test_models_that_came_since_are_offered_and_nothing_typed_is_lost(
    site, visit, upstream, tmp_path
):
    """Let a catalogue be kept after the page has its list, and hold the next list back."""
    kinds = file_of(tmp_path, KINDS, upstream.url)
    there = site(MODELS_FILE=kinds, CATALOGUE_URL=f"{upstream.url}/none")
    page = visit(there)
    choose(page, "sided")
    page.locator("summary").click()
    fill(page, prompt="a fox", seed="3", guidance_scale="2")
    wait_until(lambda: there.client.get("/models").json["catalogue"]["error"])
    new = Model(name="shapely", url=upstream.url, source="catalogue")
    entry = new.model_dump_json(exclude_unset=True)
    there.database.end_catalogue(time.time(), [(entry, (new.name,))])
    held = []
    page.route("**/models", lambda route: held.append(route))
    fill(page, model="shap")
    page.keyboard.press("ArrowDown")
    expect(page.locator(options)).to_have_text(["shaped"])
    wait_until(lambda: page.wait_for_timeout(20) or held)
    held[0].continue_()
    expect(page.locator(options)).to_have_text(["shaped", "shapely"])
    expect(page.locator("#model")).to_have_value("shap")
    expect(page.locator(f"{options}[aria-selected=true]")).to_have_text("shaped")
    expect(page.locator("#find-model option", has_text="shapely")).to_be_attached()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_value("shapely")
    choose(page, "sided")
    assert len(held) == 1
    for name, text in {"prompt": "a fox", "field-seed": "3", "field-guidance_scale": "2"}.items():
        expect(page.locator(f"#{name}")).to_have_value(text)


# Tasks that fail or are ended


def test_a_failure_is_shown_with_its_reason_and_can_be_retried(site, visit, upstream):
    upstream.decide = lambda fields: refusal(400, "no such style")
    there = site()
    page = visit(there)
    fill(page, prompt="a bad one")
    press(page, "Make the picture")
    failed = page.locator("#failed li")
    expect(failed).to_contain_text("a bad one")
    expect(failed).to_contain_text("Chutes refused the request (400): no such style")
    expect(page.locator("#live")).to_contain_text("Failed: a bad one")
    upstream.decide = lambda fields: Answer()
    failed.get_by_role("button", name="Retry", exact=True).click()
    expect(page.locator(pictures)).to_have_count(1)
    expect(failed).to_contain_text("(It was retried.)")
    expect(failed.get_by_role("button", name="Retry", exact=True)).to_be_hidden()
    expect(page.locator("#retry-all")).to_be_hidden()


def test_all_that_failed_can_be_retried_at_once(site, visit, upstream):
    upstream.decide = lambda fields: refusal(400, "no")
    there = site()
    for n in range(7):
        finished(there.client, submit(there.client, f"bad {n}"))
    page = visit(there)
    expect(page.locator("#failed li")).to_have_count(5)
    press(page, "Show more")
    expect(page.locator("#failed li")).to_have_count(7)
    upstream.decide = lambda fields: Answer()
    press(page, "Retry all")
    expect(page.locator("#retry-all")).to_have_text("Really make 7 pictures again?")
    assert len(upstream.calls) == 7
    upstream.gate.clear()
    page.locator("#retry-all").click()
    expect(page.locator("#live")).to_contain_text("7 are made again")
    upstream.gate.set()
    expect(page.locator(pictures)).to_have_count(7)
    expect(page.locator("#retry-all")).to_be_hidden()


def canceled(site, prompt):
    task_id = submit(site.client, prompt)
    site.client.post(f"/tasks/{task_id}/cancel")
    return task_id


def test_what_was_canceled_is_no_failure(site, visit, upstream):
    upstream.decide = lambda fields: refusal(400, "no")
    there = site()
    finished(there.client, submit(there.client, "a bad one"))
    there.client.post("/queue/pause")
    ids = [canceled(there, f"canceled {n}") for n in range(3)]
    page = visit(there)
    expect(page.locator("#failed li")).to_have_count(1)
    press(page, "Retry all")
    expect(page.locator("#retry-all")).to_have_text("Really make 1 picture again?")
    page.goto(f"{there.address}/#{ids[0]}")
    expect(page.locator("#large-state")).to_have_text("Canceled")
    expect(page.locator("#frame")).not_to_have_class(re.compile("bad"))


def test_a_failure_is_found_below_all_that_was_canceled(site, visit):
    there = site()
    ended = {"status": "failed", "error": "no", "created_at": "2026-05-28 00:00:00"}
    codes = ["storage", "expired", *["canceled"] * 300]
    rows.insert(
        there.database.path,
        "tasks",
        [rows.task(f"task-{n}", **ended, error_code=code) for n, code in enumerate(codes)],
    )
    page = visit(there)
    expect(page.locator("#failed li")).to_have_count(2)


def test_a_running_task_is_canceled(site, visit, upstream):
    upstream.gate.clear()
    there = site()
    submit(there.client, "to be canceled")
    page = visit(there)
    expect(page.locator("#unfinished")).to_contain_text("Running for")
    page.locator("#unfinished").get_by_role("button", name="Cancel").click()
    expect(page.locator("#unfinished-part")).to_be_hidden()
    expect(page.locator("#failed-part")).to_be_hidden()
    assert upstream.cut == ["to be canceled"]
    expect(page.locator("#make-title")).to_be_focused()


def test_a_waiting_task_is_canceled_and_focus_stays_near(site, visit, upstream):
    upstream.gate.clear()
    there = site(CONCURRENCY=1)
    for prompt in ("runs", "waits", "waits too"):
        submit(there.client, prompt)
    page = visit(there)
    waits = page.locator("#unfinished li").nth(1)
    cancel = waits.get_by_role("button", name="Cancel")
    expect(cancel).to_have_accessible_description("waits")
    cancel.click()
    expect(page.locator("#unfinished li")).to_have_count(2)
    expect(page.locator("#unfinished li").nth(1).get_by_role("link")).to_be_focused()
    assert upstream.cut == []


def test_an_action_that_is_refused_is_told_beside_it(site, visit, upstream):
    upstream.gate.clear()
    there = site()
    submit(there.client)
    page = visit(there, refusals=[500])
    answer = {"status": 500, "json": {"error": "A defect of this server"}}
    page.route("**/cancel", lambda route: route.fulfill(**answer))
    page.locator("#unfinished").get_by_role("button", name="Cancel").click()
    expect(page.locator("#unfinished-error")).to_have_text("A defect of this server")


def test_a_failed_task_is_deleted_by_the_second_press_only(site, visit, upstream):
    upstream.decide = lambda fields: refusal(400, "no")
    there = site()
    for prompt in ("older", "newer"):
        finished(there.client, submit(there.client, prompt))
    page = visit(there)
    newer = page.locator("#failed li").nth(0)
    newer.get_by_role("button", name="Delete").click()
    expect(newer.get_by_role("button", name="Really delete?")).to_be_visible()
    page.locator("#prompt").focus()
    expect(newer.get_by_role("button", name="Delete", exact=True)).to_be_visible()
    newer.get_by_role("button", name="Delete").click()
    newer.get_by_role("button", name="Really delete?").click()
    expect(page.locator("#failed li")).to_have_count(1)
    expect(page.locator("#failed")).to_contain_text("older")
    expect(page.locator("#failed li a")).to_be_focused()
    assert len(there.client.get("/tasks").json["tasks"]) == 1


# What was submitted here


def send(page, prompt):
    fill(page, prompt=prompt)
    press(page, "Make the picture")


followed = "#followed li"
tiles = "#pictures a.words"


def test_what_was_submitted_here_is_followed_to_its_picture(site, visit, upstream):
    upstream.gate.clear()
    page = visit(site(CONCURRENCY=1))
    send(page, "runs")
    expect(page.locator(followed)).to_contain_text(re.compile(r"runs\s*Running for \d+ s"))
    send(page, "waits")
    expect(page.locator(followed)).to_have_count(2)
    expect(page.locator(followed).first).to_contain_text("Waiting, place 1: all 1 places are busy")
    expect(page.locator(tiles)).to_have_count(2)
    expect(page.locator(tiles).first).to_contain_text("waits")
    expect(page.locator(tiles).last).to_contain_text("Running for")
    page.locator(tiles).last.click()
    expect(page.locator("#large-state")).to_contain_text("Running for")
    expect(page.locator("#again")).to_be_hidden()
    expect(page.locator("#calls li")).to_have_count(1)
    upstream.gate.set()
    expect(page.locator("#large-image")).to_have_js_property("naturalWidth", 64)
    expect(page.locator("#cancel")).to_be_hidden()
    press(page, "Close")
    expect(page.locator(tiles)).to_have_count(0)
    expect(page.locator(pictures)).to_have_count(2)
    expect(page.locator("#pictures .running")).to_have_count(0)
    expect(page.locator(f"{followed} .state")).to_have_text(["Done", "Done"])
    expect(page.locator(f"{followed} img").first).to_have_js_property("naturalWidth", 64)
    send(page, "another")
    expect(page.locator(followed)).to_have_count(1)


def test_what_was_submitted_here_and_failed_says_why_until_it_is_dismissed(site, visit, upstream):
    upstream.decide = lambda f: Answer() if f["prompt"] == "good" else refusal(400, "no such style")
    page = visit(site())
    send(page, "bad")
    reason = "Chutes refused the request (400): no such style"
    expect(page.locator(followed)).to_contain_text(reason)
    send(page, "good")
    expect(page.locator(pictures)).to_have_count(1)
    expect(page.locator(followed)).to_have_count(2)
    expect(page.locator(followed).first).to_contain_text(reason)
    page.reload()
    expect(page.locator(followed)).to_have_count(1)
    expect(page.locator(followed)).to_contain_text(reason)
    page.locator(followed).get_by_role("button", name="Use again").click()
    expect(page.locator("#prompt")).to_have_value("bad")
    upstream.decide = lambda fields: Answer()
    page.locator(followed).get_by_role("button", name="Retry").click()
    expect(page.locator(f"{followed} .state")).to_have_text("Done")
    expect(page.locator(pictures)).to_have_count(2)
    page.locator(followed).get_by_role("button", name="Dismiss").click()
    expect(page.locator(followed)).to_have_count(0)
    upstream.decide = lambda fields: refusal(400, "no such style")
    send(page, "bad too")
    expect(page.locator(followed)).to_contain_text(reason)
    expect(page.locator("#failed li")).to_have_count(2)
    newest = page.locator("#failed li").first
    newest.get_by_role("button", name="Delete").click()
    newest.get_by_role("button", name="Really delete?").click()
    expect(page.locator(followed)).to_have_count(0)


def test_what_was_submitted_is_shown_although_the_server_has_gone_away_since(site, visit):
    there = site()
    there.client.post("/queue/pause")
    page = visit(there)
    expect(page.locator("#facts")).to_contain_text("waiting")
    page.route("**/queue?*", lambda route: route.abort())
    send(page, "mine")
    expect(page.locator(followed)).to_contain_text("Waiting")
    expect(page.locator("#notices")).to_contain_text("The server does not answer")
    page.unroute("**/queue?*")
    expect(page.locator(followed)).to_contain_text("Waiting, place 1: the queue is paused")
    assert set(page.faults) == {"Failed to load resource: net::ERR_FAILED"}
    page.faults.clear()


def test_what_was_submitted_here_is_followed_from_far_behind(site, visit, upstream):
    there = site()
    there.client.post("/queue/pause")
    for n in range(25):
        submit(there.client, f"earlier {n}")
    page = visit(there)
    send(page, "mine")
    expect(page.locator(followed)).to_contain_text("Waiting, place 26: the queue is paused")
    page.locator(followed).get_by_role("button", name="Cancel").click()
    expect(page.locator(f"{followed} .state")).to_have_text("Canceled")
    expect(page.locator(followed)).not_to_have_class(re.compile("bad"))
    expect(page.locator("#failed-part")).to_be_hidden()


# A picture, large


def test_a_picture_is_large_with_its_settings_and_calls(site, visit, upstream):
    answers = iter([refusal(500, "no"), Answer(body=image_bytes("JPEG", (300, 200)))])
    upstream.decide = lambda fields: next(answers)
    there = site()
    task_id = make_one(there, seed=7, width=640)
    page = visit(there)
    page.locator(pictures).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    expect(dialog.get_by_role("heading", name=PROMPT)).to_be_visible()
    expect(page.locator("#settings")).to_contain_text("640 \u00d7 1024")
    expect(page.locator("#settings")).to_contain_text("Seed")
    calls = page.locator("#calls li")
    expect(calls).to_have_count(2)
    expect(calls.nth(0)).to_contain_text("Chutes failed, HTTP 500")
    expect(calls.nth(1)).to_contain_text("Completed, HTTP 200")
    expect(page.locator("#large-image")).to_have_js_property("naturalWidth", 300)
    with page.expect_download() as download:
        dialog.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == f"{task_id}.jpg"
    expect(page).to_have_url(f"{there.address}/#{task_id}")
    press(page, "Close")
    expect(dialog).to_be_hidden()
    expect(page).to_have_url(f"{there.address}/")


def test_a_picture_is_opened_by_its_address(site, visit):
    there = site()
    task_id = make_one(there)
    page = visit(there)
    page.goto(f"{there.address}/#{task_id}")
    page.reload()
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.locator("#large-prompt")).to_have_text(PROMPT)
    page.go_back()
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_settings_are_copied_back_into_the_form(site, visit, upstream):
    there = site()
    fields = {"negative_prompt": "a dog", "seed": 0, "guidance_scale": 3.5, "priority": -5}
    make_one(there, "to be used again", width=1000, height=500, model="JuggernautXL", **fields)
    page = visit(there)
    page.locator(pictures).click()
    expect(page.locator("#settings")).to_contain_text("JuggernautXL")
    press(page, "Use again")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator("#prompt")).to_be_focused()
    expect(page.locator("#model")).to_have_value("JuggernautXL")
    expect(page.locator("#field-width")).to_have_value("1000")
    expect(page.locator("#field-seed")).to_have_value("")
    press(page, "Use its seed too: 0")
    expect(page.locator("#field-seed")).to_be_focused()
    expect(page.locator("#seed-before")).to_be_hidden()
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(2)
    first, second = upstream.calls
    assert first == second
    assert there.client.get("/tasks").json["tasks"][0]["priority"] == -5


def test_what_was_not_asked_for_is_not_put_into_the_form(site, visit):
    there = site()
    make_one(there)
    page = visit(there)
    page.locator("summary").click()
    fill(page, model="FLUX.1-dev", seed="7", guidance_scale="3", priority="1")
    page.locator("#size").select_option("other")
    fill(page, width="640")
    page.locator("summary").click()
    page.locator(pictures).click()
    expect(page.locator("#settings")).to_contain_text("7.5")
    press(page, "Use again")
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    values = page.locator("#make :is(input, select, textarea):not(#prompt, #files)").evaluate_all(
        "all => Object.fromEntries(all.map((one) => [one.id, one.value]))"
    )
    assert values.pop("model") == "qwen-image"
    assert len(values) == 9
    assert set(values.values()) == {""}
    expect(page.locator("#size option:checked")).to_have_text("1024 \u00d7 1024 (default)")
    expect(page.locator("#field-seed")).to_be_hidden()
    expect(page.locator("#field-width")).to_be_hidden()


def test_a_picture_is_made_again_and_deleted(site, visit, tmp_path):
    there = site()
    task_id = make_one(there)
    page = visit(there)
    page.locator(pictures).click()
    press(page, "Make again")
    expect(page.locator(pictures)).to_have_count(2)
    press(page, "Delete")
    press(page, "Really delete?")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator(pictures)).to_have_count(1)
    assert there.client.get(f"/status/{task_id}").status_code == 404
    assert not list((tmp_path / "outputs").glob(f"{task_id}.*"))


def test_a_picture_whose_file_is_gone_is_said_to_be(site, visit, tmp_path):
    there = site()
    make_one(there)
    for file in (tmp_path / "outputs").glob("*.png"):
        file.unlink()
    page = visit(there, refusals=[410])
    expect(page.locator(pictures)).to_contain_text(f"Cannot be shown: {PROMPT}")
    page.locator(pictures).click()
    expect(page.locator("#large-state")).to_contain_text("its file is gone")
    expect(page.locator("#download")).to_be_hidden()


def test_all_is_done_with_the_keyboard(site, visit):
    there = site()
    for n in range(3):
        make_one(there, prompt=f"number {n}")
    page = visit(there)
    expect(page.locator(pictures)).to_have_count(3)
    page.keyboard.type("typed")
    page.keyboard.press("Control+Enter")
    expect(page.locator(pictures)).to_have_count(4)
    page.locator(pictures).first.focus()
    page.keyboard.press("Enter")
    title = page.locator("#large-prompt")
    expect(title).to_have_text("typed")
    page.keyboard.press("ArrowRight")
    expect(title).to_have_text("number 2")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(title).to_have_text("number 0")
    expect(page.locator("#next")).to_be_disabled()
    page.keyboard.press("ArrowLeft")
    expect(title).to_have_text("number 1")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator(pictures).nth(2)).to_be_focused()
    outline = "one => getComputedStyle(one).outlineStyle"
    assert page.locator(pictures).nth(2).evaluate(outline) == "solid"


# Hostile text, and many pictures


def test_a_prompt_is_text_and_never_html(site, visit, upstream):
    prompt = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>&amp;"
    upstream.decide = lambda fields: refusal(400, prompt) if fields.get("seed") == 1 else Answer()
    there = site()
    finished(there.client, submit(there.client, prompt, seed=1))
    upstream.gate.clear()
    there.client.post("/queue/pause")
    submit(there.client, prompt, seed=3)
    page = visit(there)
    expect(page.locator("#failed .prompt")).to_have_text(prompt)
    expect(page.locator("#failed .state")).to_contain_text(prompt)
    expect(page.locator("#unfinished .prompt")).to_have_text(prompt)
    upstream.gate.set()
    press(page, "Resume")
    expect(page.locator(f"{pictures} img")).to_have_attribute("alt", prompt)
    page.locator(pictures).click()
    expect(page.locator("#large-prompt")).to_have_text(prompt)
    assert page.evaluate("window.hacked") is None


def test_a_double_click_does_nothing_twice(site, visit, upstream):
    upstream.decide = lambda f: refusal(400, "no") if f["prompt"] == "bad" else Answer()
    there = site()
    make_one(there)
    finished(there.client, submit(there.client, "bad"))
    page = visit(there)

    def count():
        return len(there.client.get("/tasks").json["tasks"])

    page.locator("#failed .retry").dblclick()
    expect(page.locator("#failed li")).to_have_count(2)
    assert count() == 3
    page.locator("#failed .danger").first.dblclick()
    expect(page.locator("#failed .danger").first).to_have_text("Really delete?")
    page.locator(pictures).click()
    page.locator("#again").dblclick()
    expect(page.locator("#large-note")).to_have_text("It is made again.")
    expect(page.locator(pictures)).to_have_count(2)
    page.locator("#delete").dblclick()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#delete")).to_have_text("Delete")
    press(page, "Close")
    fill(page, prompt="p")
    page.get_by_role("button", name="Make the picture").dblclick(delay=100)
    expect(page.locator(pictures)).to_have_count(3)
    assert count() == 5


def test_a_broken_answer_keeps_the_key_of_its_request(site, visit, upstream):
    there = site()

    def break_off(route):
        route.fulfill(response=route.fetch(), body='{"id": "tru')

    page = visit(there)
    page.route("**/generate", break_off, times=1)
    fill(page, prompt="p")
    press(page, "Make the picture")
    expect(page.locator("#make-error")).to_contain_text("202")
    press(page, "Make the picture")
    expect(page.locator("#followed li")).to_have_count(1)
    expect(page.locator(pictures)).to_have_count(1)
    assert len(upstream.calls) == 1


def test_a_picture_that_was_deleted_elsewhere_can_be_deleted(site, visit):
    there = site()
    task_id = make_one(there)
    page = visit(there, refusals=[404])
    page.locator(pictures).click()
    expect(page.locator("#calls li")).to_have_count(1)
    there.client.delete(f"/tasks/{task_id}")
    press(page, "Delete")
    press(page, "Really delete?")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator(pictures)).to_have_count(0)


def test_the_queue_stays_in_sight_and_hides_nothing_that_has_focus(site, visit, tmp_path):
    there = site()
    add_pictures(there, tmp_path / "outputs", 40)
    page = visit(there, viewport={"width": 390, "height": 700})
    expect(page.locator(pictures)).to_have_count(40)
    page.locator(pictures).last.focus()
    top = "one => one.getBoundingClientRect().top"
    assert page.locator("header").evaluate(top) == 0
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        focused = page.evaluate("() => document.activeElement.getBoundingClientRect().top")
        bottom = page.evaluate(
            "() => document.querySelector('header').getBoundingClientRect().bottom"
        )
        assert focused >= bottom


def test_two_hundred_pictures_are_scrolled_through(site, visit, tmp_path):
    there = site()
    add_pictures(there, tmp_path / "outputs", 205)
    page = visit(there)
    expect(page.locator(pictures).first).to_be_visible()
    assert page.locator(pictures).count() < 205, "more come as they are scrolled to"

    def scrolled():
        page.mouse.wheel(0, 4000)
        page.wait_for_timeout(20)
        return page.locator(pictures).count() == 205

    page.mouse.move(800, 500)
    wait_until(scrolled)
    alts = page.locator(f"{pictures} img").evaluate_all("all => all.map((one) => one.alt)")
    assert alts == [f"number {n}" for n in range(204, -1, -1)]
    last = page.locator(f"{pictures} img").last
    last.scroll_into_view_if_needed()
    expect(last).to_have_js_property("naturalWidth", 8)
    expect(page.locator("#end")).to_be_empty()


def test_a_task_that_ends_far_down_the_list_appears_in_its_place(site, visit, upstream, tmp_path):
    upstream.gate.clear()
    there = site(CONCURRENCY=1)
    submit(there.client, "the oldest")
    wait_until(lambda: upstream.at_once == 1)
    aged = "UPDATE tasks SET created_at = '2026-01-01 00:00:00'"
    rows.write(there.database.path, aged)
    add_pictures(there, tmp_path / "outputs", 41)
    page = visit(there)
    expect(page.locator(pictures)).to_have_count(40)
    page.locator("#end").scroll_into_view_if_needed()
    expect(page.locator(pictures)).to_have_count(41)
    upstream.gate.set()
    expect(page.locator(pictures)).to_have_count(42)
    expect(page.locator(f"{pictures} img").last).to_have_attribute("alt", "the oldest")


# Find, and take along


def test_pictures_are_found_by_the_words_of_their_prompts(site, visit):
    there = site()
    for prompt in ("a red fox", "a red house", "the foxes of <b>March</b>"):
        make_one(there, prompt)
    page = visit(there)
    shown = page.locator(f"{pictures} img")
    expect(shown).to_have_count(3)
    page.get_by_label("Words of the prompt").fill("Fox")
    expect(shown).to_have_count(2)
    expect(page.locator("#live")).to_contain_text("2 found")
    page.get_by_label("Words of the prompt").fill("red fox")
    expect(shown).to_have_count(1)
    expect(shown).to_have_attribute("alt", "a red fox")
    for words in ("!!!", '"*', "<b>", "none of these"):
        page.get_by_label("Words of the prompt").fill(words)
        page.keyboard.press("Enter")
        expect(shown).to_have_count(1 if words == "<b>" else 0)
    expect(page.locator("#none")).to_have_text("Nothing matches.")
    page.get_by_label("Words of the prompt").fill("")
    expect(shown).to_have_count(3)
    expect(page.locator("#none")).to_be_hidden()


def test_tasks_are_found_by_how_they_stand_and_by_model(site, visit, upstream):
    upstream.decide = lambda f: refusal(400, "no") if f["prompt"] == "bad" else Answer()
    there = site(CONCURRENCY=1)
    make_one(there, "good")
    make_one(there, "another", model="FLUX.1-dev")
    finished(there.client, submit(there.client, "bad"))
    upstream.gate.clear()
    for prompt in ("runs", "waits", "waits too"):
        submit(there.client, prompt)
    canceled(there, "was canceled")
    page = visit(there)
    show, model = page.get_by_label("Show"), page.locator("#find-model")
    shown = page.locator("#pictures a")
    expect(shown).to_have_count(3)

    def alone(label, *prompts):
        show.select_option(label=label)
        expect(shown).to_have_count(len(prompts))
        for link, prompt in zip(shown.all(), prompts, strict=True):
            expect(link).to_contain_text(prompt)

    alone("Waiting", "waits", "waits too")
    alone("Running", "runs")
    alone("Canceled", "was canceled")
    expect(page.locator("#pictures .bad")).to_have_count(0)
    alone("Failed: Chutes refused the request", "bad")
    expect(page.locator("#pictures .bad")).to_contain_text("Chutes refused the request (400): no")
    alone("Failed: It waited too long")
    page.route("**/status/**", lambda route: None)  # Then the wait for the end must give way.
    show.select_option(label="Everything")
    expect(shown).to_have_count(7)
    wait_until(lambda: page.wait_for_timeout(20) or page.asked[-1][2] == "wait=5")
    model.select_option("FLUX.1-dev")
    expect(shown).to_have_count(1)
    page.unroute("**/status/**")
    upstream.gate.set()
    model.select_option("")
    expect(page.locator(pictures)).to_have_count(5)
    expect(shown).to_have_count(7)
    show.select_option(label="Pictures")
    expect(shown).to_have_count(5)


@pytest.mark.parametrize("keys", [{}, {"API_KEYS": KEYS}])
def test_the_shown_or_the_selected_pictures_are_taken_along(site, visit, keys):
    there = site(**keys)
    if keys:
        there.client.environ_base["HTTP_X_API_KEY"] = KEY
    ids = [make_one(there, f"number {n}") for n in range(3)]

    def know(page):
        page.add_init_script(f"sessionStorage.setItem('key', '{KEY}')")

    page = visit(there, before=know if keys else None)
    expect(page.locator(pictures)).to_have_count(3)

    def taken(label):
        with page.expect_download() as download:
            press(page, label)
        with zipfile.ZipFile(download.value.path()) as file:
            return {name for name in file.namelist() if name != "manifest.jsonl"}

    assert taken("Download 3 shown") == {f"{task_id}.png" for task_id in ids}
    press(page, "Select")
    expect(page.locator("#take")).to_be_disabled()
    page.get_by_label("Select: number 0").check()
    page.locator(pictures).nth(0).click()
    expect(page.get_by_label("Select: number 2")).to_be_checked()
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert taken("Download 2 selected") == {f"{ids[0]}.png", f"{ids[2]}.png"}
    press(page, "Select")
    expect(page.locator("#take")).to_have_text("Download 3 shown")
    expect(page.locator(".pick").first).to_be_hidden()


# The queue


# Notes all that a person could see, after each change of the page.
RECORD = """
window.seen = [];
const look = () => document.querySelector("#facts b") && window.seen.push({
  running: Number(document.querySelectorAll("#facts b")[0].textContent),
  waiting: Number(document.querySelectorAll("#facts b")[1].textContent),
  listed: [...document.querySelectorAll("#unfinished li")].map((item) => item.className),
  tiles: document.querySelectorAll("#pictures li").length,
});
new MutationObserver(look).observe(document, { childList: true, subtree: true });
"""


def test_what_is_shown_was_true_at_one_instant(site, visit, upstream):
    there = site(CONCURRENCY=2)
    queue = lambda: there.client.get("/queue").json  # noqa: E731

    def begin():
        upstream.gate.clear()
        for _ in range(3):
            submit(there.client)
        wait_until(lambda: (queue()["processing"], queue()["pending"]) == (2, 1))

    def end():
        upstream.gate.set()
        wait_until(lambda: queue()["processing"] + queue()["pending"] == 0)

    def change_first(route):
        """Let the queue be another one at each request that the page makes."""
        if changes:
            changes.pop()()
        route.continue_()

    def before(page):
        page.add_init_script(RECORD)
        page.route(re.compile(r"/(queue|tasks)\?"), change_first)

    changes = [end, begin] * 6
    page = visit(there, before=before)
    wait_until(lambda: look_again(page) or page.wait_for_timeout(50) or not changes, 60)
    count = len(there.client.get("/tasks?limit=200").json["tasks"])
    expect(page.locator(pictures)).to_have_count(count)
    seen = page.evaluate("window.seen")
    assert seen[-1] == {"running": 0, "waiting": 0, "listed": [], "tiles": count}
    assert max(one["running"] for one in seen) == 2
    for one in seen:
        listed = one["listed"]
        assert len([words for words in listed if "running" in words]) == one["running"], one
        assert len(listed) == one["running"] + one["waiting"], one


def test_the_next_of_a_long_queue_are_shown_and_more_on_demand(site, visit, upstream):
    there = site()
    there.client.post("/queue/pause")
    for n in range(75):
        submit(there.client, f"number {n}")
    submit(there.client, "in a hurry", priority=5)
    page = visit(there)
    listed = page.locator("#unfinished .prompt")
    expect(listed).to_have_text(["in a hurry", *(f"number {n}" for n in range(19))])
    expect(page.locator("#unfinished-more")).to_have_text("56 wait after these")
    press(page, "Show more")
    expect(listed).to_have_count(60)
    expect(page.locator("#unfinished-more")).to_have_text("16 wait after these")
    press(page, "Show more")
    expect(listed).to_have_count(76)
    expect(page.locator("#unfinished-more")).to_be_empty()
    expect(page.locator("#pending-more")).to_be_hidden()


def test_all_that_waits_is_canceled_by_the_second_press_only(site, visit, upstream):
    there = site()
    there.client.post("/queue/pause")
    for n in range(30):
        submit(there.client, f"number {n}", model="other" if n % 3 == 0 else None)
    page = visit(there)
    pending = lambda: there.client.get("/queue").json["pending"]  # noqa: E731
    page.locator("#cancel-model").select_option("other")
    button = page.locator("#cancel-all")
    button.click()
    expect(button).to_have_text("Really cancel all 10 of other?")
    assert pending() == 30
    button.click()
    expect(page.locator("#live")).to_contain_text("10 canceled")
    expect(page.locator("#facts")).to_contain_text("20 waiting")
    page.locator("#cancel-model").select_option("")
    button.click()
    expect(button).to_have_text("Really cancel all 20?")
    button.click()
    expect(page.locator("#unfinished-part")).to_be_hidden()
    expect(page.locator("#failed-part")).to_be_hidden()
    assert pending() == 0


def test_all_times_are_in_the_zone_of_the_reader(site, visit, upstream):
    upstream.decide = lambda f: refusal(429, "later") if f.get("seed") == 1 else Answer()
    there = site(RETRY_BACKOFF=60)
    make_one(there)
    held = submit(there.client, seed=1)
    wait_until(lambda: there.client.get("/queue").json["held"])
    until = there.client.get("/queue").json["held"][0]["until"]
    page = visit(there, timezone_id="Pacific/Kiritimati", locale="en-GB")
    moment = datetime.fromisoformat(f"{until}+00:00").astimezone(ZoneInfo("Pacific/Kiritimati"))
    time = f"{moment:%H:%M:%S}"
    assert time not in until
    expect(page.locator("#unfinished li")).to_contain_text(f"next try at {time}")
    expect(page.locator("#notices")).to_contain_text(f"next try at {time}")
    page.goto(f"{there.address}/#{held}")
    expect(page.locator("#large-state")).to_contain_text(f"next try at {time}")
    assert "UTC" not in page.locator("body").inner_text()


def test_the_queue_is_paused_and_resumed(site, visit, upstream):
    there = site()
    page = visit(there)
    press(page, "Pause")
    expect(page.locator("#notices")).to_have_text("Paused")
    submit(there.client)
    look_again(page)
    expect(page.locator("#unfinished")).to_contain_text("the queue is paused")
    press(page, "Resume")
    expect(page.locator(pictures)).to_have_count(1)
    expect(page.locator("#notices")).to_be_empty()


def test_a_pause_of_its_own_and_a_hold_are_told_with_their_reasons(site, visit, upstream):
    upstream.decide = lambda fields: (
        refusal(429, "later") if fields.get("seed") == 1 else refusal(401, "no")
    )
    there = site(RETRY_BACKOFF=60)
    page = visit(there)
    submit(there.client, model="busy", seed=1)
    wait_until(lambda: there.client.get("/queue").json["held"])
    look_again(page)
    notices = page.locator("#notices")
    expect(notices).to_contain_text("On hold: Chutes has no free capacity for busy; next try at")
    expect(page.locator("#unfinished")).to_contain_text("Chutes has no free capacity for busy")
    finished(there.client, submit(there.client, seed=0))
    expect(notices).to_contain_text("Paused: Chutes refused the API token (401)")
    expect(page.locator("#live")).to_contain_text("Paused: Chutes refused the API token (401)")


def test_what_is_left_of_the_quota_is_told(site, visit, upstream):
    quota = {"Total": "300", "Used": "12", "Remaining": "288"}
    headers = {f"X-Chutes-Quota-{name}": value for name, value in quota.items()}
    upstream.decide = lambda fields: Answer(headers=headers)
    there = site()
    make_one(there)
    page = visit(there)
    expect(page.locator("#facts")).to_contain_text("288 of 300 left at Chutes")
    expect(page.locator("#facts")).to_contain_text("1 call today")


def test_a_server_that_is_away_is_told_and_found_again(site, visit):
    there = site()
    page = visit(there)
    expect(page.locator("#facts")).to_contain_text("running")
    page.route("**/queue?*", lambda route: route.abort())
    look_again(page)
    expect(page.locator("#notices")).to_contain_text("The server does not answer")
    page.unroute("**/queue?*")
    make_one(there)
    look_again(page)
    expect(page.locator(pictures)).to_have_count(1)
    expect(page.locator("#notices")).to_be_empty()
    assert set(page.faults) == {"Failed to load resource: net::ERR_FAILED"}
    page.faults.clear()


def test_a_picture_of_a_server_that_is_away_is_not_called_gone(site, visit):
    there = site()
    make_one(there)
    page = visit(there)
    expect(page.locator(pictures)).to_have_count(1)
    page.route("**/*", lambda route: route.abort())
    page.locator(pictures).click()
    state = page.locator("#large-state")
    expect(state).to_contain_text("The server does not answer. The picture is shown as soon as")
    expect(page.locator("#large-error")).to_have_text("The server does not answer")
    page.unroute("**/*")
    expect(page.locator("#large-image")).to_have_js_property("naturalWidth", 64)
    expect(state).to_be_empty()
    expect(page.locator("#calls li")).to_have_count(1)
    expect(page.locator("#large-error")).to_be_empty()
    assert set(page.faults) == {"Failed to load resource: net::ERR_FAILED"}
    page.faults.clear()


def test_pictures_that_could_not_be_shown_are_shown_when_the_server_is_back(site, visit):
    there = site()
    make_one(there)

    def away(page):
        page.route("**/thumbnail", lambda route: route.abort())

    page = visit(there, before=away)
    expect(page.locator(f"{pictures}.gone")).to_have_count(1)
    page.route("**/queue?*", lambda route: route.abort())
    look_again(page)
    expect(page.locator("#notices")).to_contain_text("The server does not answer")
    page.unroute("**/thumbnail")
    page.unroute("**/queue?*")
    look_again(page)
    expect(page.locator(f"{pictures} img")).to_have_js_property("naturalWidth", 64)
    assert set(page.faults) == {"Failed to load resource: net::ERR_FAILED"}
    page.faults.clear()


def test_a_tab_that_nobody_sees_asks_rarely(site, visit):
    there = site()

    def hide(page):
        page.clock.install()
        page.add_init_script(
            "window.unseen = true;"
            "Object.defineProperty(document, 'hidden', { get: () => window.unseen })"
        )

    page = visit(there, before=hide)
    wait_until(lambda: page.wait_for_timeout(50) or page.answered == 4)
    page.wait_for_timeout(100)
    asked = len(page.asked)
    page.clock.run_for(55_000)
    assert len(page.asked) == asked
    page.clock.run_for(10_000)
    wait_until(lambda: page.wait_for_timeout(20) or len(page.asked) > asked)
    make_one(there)
    page.evaluate("window.unseen = false; document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator(pictures)).to_have_count(1)


def test_the_page_waits_for_a_task_instead_of_asking_again_and_again(site, visit, upstream):
    upstream.gate.clear()
    there = site()
    task_id = submit(there.client)
    page = visit(there)
    wait = ("GET", f"/status/{task_id}", "wait=5")
    wait_until(lambda: page.wait_for_timeout(20) or page.asked.count(wait) == 2)
    looks = page.asked.count(("GET", "/queue", "tasks=20"))
    assert looks <= 3
    upstream.gate.set()
    expect(page.locator(pictures)).to_have_count(1)


# The key


def test_the_key_is_asked_for_once_and_kept_for_the_tab(site, visit, browser, upstream):
    there = site(API_KEYS=KEYS)
    there.client.environ_base["HTTP_X_API_KEY"] = KEY
    make_one(there)
    context = browser.new_context(reduced_motion="reduce")
    page = visit(there, refusals=[401], context=context)
    dialog = page.get_by_role("dialog", name="This server wants a key")
    expect(dialog).to_be_visible()
    expect(page.locator("#key")).to_be_focused()
    for _ in range(3):
        page.keyboard.press("Escape")
        expect(dialog).to_be_visible()
    fill(page, key="not a key")
    press(page, "Open")
    expect(page.locator("#ask-error")).to_contain_text("without spaces")
    fill(page, key="wrong")
    press(page, "Open")
    expect(page.locator("#ask-error")).to_have_text("The server does not know this key.")
    fill(page, key=KEY)
    press(page, "Open")
    expect(dialog).to_be_hidden()
    image = page.locator(f"{pictures} img")
    expect(image).to_have_attribute("src", re.compile("^blob:"))
    expect(image).to_have_js_property("naturalWidth", 64)
    page.locator(pictures).click()
    expect(page.locator("#large-image")).to_have_attribute("src", re.compile("^blob:"))
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.path().read_bytes() == image_bytes()
    press(page, "Close")
    fill(page, prompt="p")
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(2)
    page.reload()
    expect(page.locator(pictures)).to_have_count(2)
    expect(dialog).to_be_hidden()
    another = visit(there, refusals=[401], context=context)
    expect(another.get_by_role("dialog")).to_be_visible()


# Pictures that are edited


# Notes what each form holds that is sent: text as it is, a file by its name.
RECORD_FORMS = """
window.forms = [];
const append = FormData.prototype.append;
FormData.prototype.append = function (name, value) {
  if (name === "prompt") window.forms.push([]);
  window.forms.at(-1).push([name, typeof value === "string" ? value : `file ${value.name}`]);
  append.call(this, name, value);
};
"""
EDITOR = "qwen-image-edit-2511"
inputs = "#inputs li"


@pytest.fixture
def files(tmp_path):
    """Return a maker of files with pictures, each in another colour."""
    colours = iter(("red", "green", "blue", "white", "black"))

    def make_files(*names):
        paths = [tmp_path / name for name in names]
        for path in paths:
            kind = {"jpg": "JPEG", "webp": "WEBP"}.get(path.suffix[1:], "PNG")
            path.write_bytes(image_bytes(kind, (30, 20), next(colours)))
        return paths

    return make_files


def add_files(page, paths):
    """Choose files as a person does, once it is known what the models take."""
    expect(page.locator("#model")).not_to_have_value("")
    with page.expect_file_chooser() as chooser:
        press(page, "Add pictures\u2026")
    chooser.value.set_files(paths)


def drop_file(page, path, onto):
    """Drop a file, and return whether the page has taken it: else the browser opens it."""
    return page.locator(onto).evaluate(
        """(target, [name, bytes]) => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/jpeg" }));
          const told = { bubbles: true, cancelable: true, dataTransfer };
          target.dispatchEvent(new DragEvent("dragover", told));
          return !target.dispatchEvent(new DragEvent("drop", told));
        }""",
        [path.name, list(path.read_bytes())],
    )


def paste(page, path, text=None):
    """Copy a picture, maybe with a text, as other programs do, and press the keys that paste it."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """([bytes, text]) => navigator.clipboard.write([new ClipboardItem({
          "image/png": new Blob([new Uint8Array(bytes)], { type: "image/png" }),
          ...(text && { "text/plain": new Blob([text], { type: "text/plain" }) }),
        })])""",
        [list(path.read_bytes()), text],
    )
    page.keyboard.press("Control+v")


def edit(site, path, prompt="make it night", **fields):
    """Have a picture edited, without the browser."""
    data = {"prompt": prompt, "images": path.open("rb"), **fields}
    answer = site.client.post("/edit", data=data)
    assert answer.status_code == 202, answer.json
    return answer.json["id"]


def sent_images(call):
    return [base64.b64decode(image) for image in call["image_b64s"]]


def know_key(page):
    page.add_init_script(f"sessionStorage.setItem('key', '{KEY}')")


def test_pictures_that_are_chosen_and_dropped_are_edited(site, visit, upstream, files):
    paths = files("beach.png", "forest.webp", "street.jpg")
    page = visit(site(), before=lambda page: page.add_init_script(RECORD_FORMS))
    add_files(page, paths[:2])
    assert drop_file(page, paths[2], "#prompt")
    names = page.locator(f"{inputs} .name")
    expect(names).to_have_text(["beach.png", "forest.webp", "street.jpg"])
    for image in page.locator(f"{inputs} img").all():
        expect(image).to_have_js_property("naturalWidth", 30)
    expect(page.locator("#live")).to_contain_text("Added: beach.png, forest.webp")
    expect(page.locator("#model")).to_have_value(EDITOR)
    page.locator("summary").click()
    fill(page, prompt="all in one\nat night", true_cfg_scale="2.5")
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(1)
    (call,) = upstream.calls
    assert sent_images(call) == [path.read_bytes() for path in paths]
    assert (call["prompt"], call["true_cfg_scale"]) == ("all in one\nat night", 2.5)
    assert [path for method, path, _ in page.asked if method == "POST"] == ["/edit"]
    # The model that the server edits with was not chosen, and is not named.
    assert page.evaluate("window.forms") == [
        [
            *(["prompt", "all in one\nat night"], ["true_cfg_scale", "2.5"]),
            *(["images", f"file {path.name}"] for path in paths),
        ]
    ]


def test_a_picture_is_pasted_and_text_stays_text(site, visit, upstream, files):
    (path,) = files("beach.png")
    page = visit(site())
    expect(page.locator("#prompt")).to_be_focused()
    paste(page, path)
    expect(page.locator(inputs)).to_have_count(1)
    page.evaluate("document.activeElement.blur()")
    paste(page, path)
    expect(page.locator(f"{inputs} .name")).to_have_text(["image.png", "image.png (2)"])
    page.locator("#prompt").focus()
    paste(page, path, "a fox")
    expect(page.locator("#prompt")).to_have_value("a fox")
    expect(page.locator(inputs)).to_have_count(2)


def test_a_file_that_is_dropped_anywhere_does_not_leave_the_page(site, visit, files):
    there = site()
    make_one(there)
    page = visit(there)
    page.locator(pictures).click()
    (path,) = files("beach.jpg")
    assert drop_file(page, path, "#large")
    expect(page.locator(inputs)).to_have_count(0)
    press(page, "Close")
    assert drop_file(page, path, "#pictures")
    expect(page.locator(inputs)).to_have_count(1)
    expect(page.locator("#make")).not_to_have_class(re.compile("over"))


def test_without_its_pictures_the_form_asks_for_a_new_one_again(site, visit, upstream, files):
    page = visit(site())
    add_files(page, files("beach.png", "forest.png"))
    expect(page.locator("#model")).to_have_value(EDITOR)
    page.locator("#model").click()
    expect(page.locator(options)).to_have_text([EDITOR, "qwen-image-edit-2509"])
    page.keyboard.press("Escape")
    press(page, "Remove beach.png")
    expect(page.locator(f"{inputs} .name")).to_have_text("forest.png")
    expect(page.locator("#images")).to_be_focused()
    expect(page.locator("#live")).to_contain_text("Removed: beach.png")
    press(page, "Remove forest.png")
    expect(page.locator("#model")).to_have_value("qwen-image")
    fill(page, prompt="p")
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(1)
    assert [path for method, path, _ in page.asked if method == "POST"] == ["/generate"]


@pytest.mark.parametrize("is_dragged", [False, True])
def test_a_picture_of_the_page_is_edited_by_its_id_alone(site, visit, upstream, is_dragged):
    there = site()
    task_id = make_one(there)
    page = visit(there, before=lambda page: page.add_init_script(RECORD_FORMS))
    expect(page.locator(pictures)).to_have_count(1)
    fill(page, prompt="make it night")
    if is_dragged:
        page.drag_and_drop(pictures, "#prompt")
        expect(page.locator(f"{inputs} .name")).to_have_text(PROMPT)
    for _ in range(2):
        page.locator(pictures).click()
        press(page, "Edit this")
        expect(page.get_by_role("dialog")).to_be_hidden()
        expect(page.locator("#prompt")).to_be_focused()
        expect(page.locator(f"{inputs} .name")).to_have_text(PROMPT)
    expect(page.locator(f"{inputs} img")).to_have_js_property("naturalWidth", 64)
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(2)
    assert page.evaluate("window.forms") == [[["prompt", "make it night"], ["images", task_id]]]
    assert sent_images(upstream.calls[1]) == [image_bytes()]


def test_a_model_that_takes_no_pictures_is_told_with_what_to_do(site, visit, upstream, files):
    page = visit(site())
    expect(page.locator("#model")).not_to_have_value("")
    choose(page, "z-image-turbo")
    add_files(page, files("beach.png"))
    expect(page.locator("#model")).to_have_value("z-image-turbo")
    expect(page.locator("#fit")).to_have_text("z-image-turbo takes no pictures.")
    expect(page.locator("#live")).to_contain_text("z-image-turbo takes no pictures.")
    fill(page, prompt="make it night")
    press(page, "Make the picture")
    expect(page.locator("#make-error")).to_have_text("Please correct: Pictures to edit")
    expect(page.locator("#images")).to_be_focused()
    sentence = "z-image-turbo takes no pictures."
    expect(page.locator("#images")).to_have_accessible_description(sentence)
    expect(page.locator("#fit")).to_be_hidden()
    assert not [path for method, path, _ in page.asked if method == "POST"]
    choose(page, EDITOR)
    expect(page.locator("#make-error")).to_be_empty()
    fill(page, model="z-image-turbo")
    press(page, "Remove the pictures")
    expect(page.locator(inputs)).to_have_count(0)
    expect(page.locator("#fit")).to_be_empty()
    expect(page.locator("#images")).to_be_focused()
    expect(page.locator("#model")).to_have_value("z-image-turbo")
    add_files(page, files("forest.png"))
    press(page, f"Use {EDITOR}")
    expect(page.locator("#model")).to_have_value(EDITOR)
    expect(page.locator("#model")).to_be_focused()
    expect(page.locator("#use-editor")).to_be_hidden()
    expect(page.locator("#make-error")).to_be_empty()
    page.keyboard.press("Escape")
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(1)
    assert len(sent_images(upstream.calls[0])) == 1


def test_where_the_default_editor_is_not_listed_another_one_is_named(kinds, visit, upstream, files):
    page = visit(kinds)
    add_files(page, files("beach.png"))
    expect(page.locator("#model")).to_have_value("editor")
    fill(page, prompt="make it night")
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(1)
    assert len(sent_images(upstream.calls[0])) == 1


def test_what_is_no_picture_or_one_too_many_is_told_at_once(site, visit, tmp_path, upstream, files):
    one = '[editor]\nimages = { field = "image_b64s", minimum = 1, maximum = 3 }\n'
    another = '[single]\nimages = { field = "image_b64", minimum = 1, maximum = 1 }\n'
    models = file_of(tmp_path, one + another, upstream.url)
    page = visit(site(MODELS_FILE=models, DEFAULT_EDIT_MODEL="editor"))
    (tmp_path / "notes.txt").write_text("x")
    add_files(page, tmp_path / "notes.txt")
    error = page.locator("#inputs-error")
    expect(error).to_have_text("notes.txt is no PNG, JPEG or WebP picture.")
    expect(error).to_have_role("alert")
    expect(page.locator("#model")).to_have_value("qwen-image")
    add_files(page, files("a.png", "b.png", "c.png", "d.png"))
    expect(page.locator(inputs)).to_have_count(3)
    expect(error).to_have_text("d.png was left out: editor takes at most 3 pictures.")
    choose(page, "single")
    expect(page.locator("#fit")).to_have_text("single takes at most 1 picture: remove 2.")
    fill(page, prompt="p")
    press(page, "Make the picture")
    expect(page.locator("#make-error")).to_have_text("Please correct: Pictures to edit")
    choose(page, "editor")
    expect(error).not_to_be_empty()
    press(page, "Make the picture")
    expect(error).to_be_empty()
    expect(page.locator(pictures)).to_have_count(1)
    choose(page, "single")
    press(page, "Remove a.png")
    press(page, "Remove b.png")
    expect(page.locator("#fit")).to_be_empty()
    expect(page.locator("#make-error")).to_be_empty()
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(2)
    assert base64.b64decode(upstream.calls[1]["image_b64"]) == (tmp_path / "c.png").read_bytes()
    press(page, "Remove c.png")
    expect(page.locator("#fit")).to_have_text("single edits pictures: add one.")


def test_the_servers_refusals_name_the_picture_and_leave_all_in_the_form(
    site, visit, tmp_path, files
):
    there = site(MAX_UPLOAD_MB=1)
    task_id = make_one(there)
    page = visit(there, refusals=[400, 413])
    good, broken = files("good.png", "broken.png")
    broken.write_bytes(broken.read_bytes()[:40])
    add_files(page, [good, broken])
    fill(page, prompt="make it night")
    press(page, "Make the picture")
    sentence = "broken.png ends early, or does not decode: send the whole file"
    expect(page.locator("#images")).to_have_accessible_description(sentence)
    expect(page.locator("#images")).to_be_focused()
    expect(page.locator("#make-error")).to_have_text("Please correct: Pictures to edit")
    expect(page.locator(inputs)).to_have_count(2)
    press(page, "Remove broken.png")
    expect(page.locator("#make-error")).to_be_empty()
    large = tmp_path / "large.png"
    large.write_bytes(good.read_bytes() + bytes(2**21))
    add_files(page, large)
    press(page, "Make the picture")
    expect(page.locator("#make-error")).to_contain_text("1 MiB")
    expect(page.locator(f"{inputs} .name")).to_have_text(["good.png", "large.png"])
    expect(page.locator("#prompt")).to_have_value("make it night")
    press(page, "Remove large.png")
    page.locator(pictures).click()
    press(page, "Edit this")
    there.client.delete(f"/tasks/{task_id}")
    press(page, "Make the picture")
    gone = f"{PROMPT} is no longer there"
    expect(page.locator("#images")).to_have_accessible_description(gone)


def test_a_file_that_has_changed_since_is_told_and_can_be_added_again(site, visit, files):
    page = visit(site())
    (path,) = files("beach.png")
    add_files(page, path)
    expect(page.locator(f"{inputs} img")).to_have_js_property("naturalWidth", 30)
    path.unlink()
    fill(page, prompt="make it night")
    press(page, "Make the picture")
    expect(page.locator("#make-error")).to_have_text(
        "beach.png cannot be read: remove it, or add it again"
    )
    press(page, "Remove beach.png")
    add_files(page, files("beach.png"))
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(1)


def test_pictures_are_sent_once_and_it_shows_that_they_are_under_way(site, visit, upstream, files):
    there = site()
    page = visit(there)
    held = []
    page.route("**/edit", lambda route: held.append(route))
    add_files(page, files("beach.png"))
    fill(page, prompt="make it night")
    button = page.locator("#submit")
    button.dblclick(delay=100)
    expect(button).to_have_text("Sending the pictures\u2026")
    expect(button).to_have_attribute("aria-disabled", "true")
    expect(button).to_be_focused()
    expect(page.locator("#live")).to_contain_text("Sending the pictures")
    page.keyboard.press("Enter")
    wait_until(lambda: page.wait_for_timeout(20) or held)
    (route,) = held
    route.continue_()
    expect(page.locator(pictures)).to_have_count(1)
    expect(button).to_have_text("Make the picture")
    expect(button).to_have_attribute("aria-disabled", "false")
    expect(page.locator(inputs)).to_have_count(1)
    assert (len(held), len(upstream.calls)) == (1, 1)


LOSE_ANSWER = """
const ask = window.fetch;
window.fetch = async (address, options) => {
  const answer = await ask(address, options);
  if (address !== "/edit") return answer;
  window.fetch = ask;
  throw new TypeError("the answer is lost");
};
"""


def test_a_lost_answer_makes_no_second_edit(site, visit, upstream, files):
    page = visit(site())
    add_files(page, files("beach.png", "forest.png"))
    fill(page, prompt="make it night")
    page.evaluate(f"() => {{ {LOSE_ANSWER} }}")
    press(page, "Make the picture")
    expect(page.locator("#make-error")).to_contain_text("is not made twice")
    expect(page.locator(inputs)).to_have_count(2)
    press(page, "Make the picture")
    expect(page.locator("#make-error")).to_be_empty()
    expect(page.locator(f"{followed} .state")).to_have_text("Done")
    fill(page, prompt="make it day")
    page.evaluate(f"() => {{ {LOSE_ANSWER} }}")
    press(page, "Make the picture")
    expect(page.locator("#make-error")).to_contain_text("is not made twice")
    press(page, "Remove forest.png")  # Then it is another request.
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(3)
    expect(page.locator("#make-error")).to_be_empty()
    assert [len(call["image_b64s"]) for call in upstream.calls] == [2, 2, 1]


@pytest.mark.parametrize("width", [390, 1400])
def test_a_task_shows_what_it_edits_and_what_came_of_it(site, visit, upstream, files, width):
    upstream.gate.clear()
    there = site()
    page = visit(there, viewport={"width": width, "height": 900})
    add_files(page, files("beach.png", "forest.png"))
    fill(page, prompt="make it night")
    press(page, "Make the picture")
    for name in ("#unfinished", "#followed"):
        small = page.locator(f"{name} img")
        expect(small).to_have_attribute("alt", "Edits this picture and 1 more")
        expect(small).to_have_js_property("naturalWidth", 30)
    expect(page.locator(tiles)).to_have_count(1)
    expect(page.locator("#pictures li")).to_contain_text("Edited")
    page.locator(tiles).click()
    before = page.locator("#before img")
    expect(before).to_have_count(2)
    expect(page.locator("#after")).to_be_hidden()
    upstream.gate.set()
    after = page.get_by_role("img", name="make it night", exact=True).first
    expect(after).to_have_js_property("naturalWidth", 64)
    expect(page.locator("#after")).to_be_visible()
    alts = ["Picture 1 of 2 that is edited", "Picture 2 of 2 that is edited"]
    for image, alt in zip(before.all(), alts, strict=True):
        expect(image).to_have_attribute("alt", alt)
        expect(image).to_have_js_property("naturalWidth", 30)
        expect(image).to_be_in_viewport(ratio=0.99)
    made, edited = page.locator("#frame").bounding_box(), before.first.bounding_box()
    assert made["width"] * made["height"] > edited["width"] * edited["height"]
    if width == 390:
        assert edited["y"] >= made["y"] + made["height"]
    else:
        assert edited["x"] >= made["x"] + made["width"]
    press(page, "Close")
    make_one(there, "not an edit")
    expect(page.locator(pictures)).to_have_count(2)
    page.locator(pictures).first.click()
    expect(page.locator("#large-prompt")).to_have_text("not an edit")
    expect(before).to_have_count(0)
    expect(page.locator("#after")).to_be_hidden()
    press(page, "Close")
    expect(page.locator("#pictures .caption")).to_have_count(1)


def test_an_input_whose_file_is_gone_is_said_to_be(site, visit, tmp_path, files):
    there = site()
    task_id = edit(there, *files("beach.png"))
    finished(there.client, task_id)
    for file in (tmp_path / "inputs").glob("*.png"):
        file.unlink()
    page = visit(there, refusals=[410])
    page.locator(pictures).click()
    expect(page.locator("#before")).to_contain_text("It cannot be shown.")
    press(page, "Use again")
    press(page, "Make the picture")
    sentence = "Picture 1, as before cannot be read: remove it, or add it again"
    expect(page.locator("#make-error")).to_have_text(sentence)


@pytest.mark.parametrize("keys", [{}, {"API_KEYS": KEYS}])
def test_an_edit_is_used_again_with_its_pictures(site, visit, upstream, files, keys):
    there = site(**keys)
    if keys:
        there.client.environ_base["HTTP_X_API_KEY"] = KEY
    (path,) = files("beach.png")
    finished(there.client, edit(there, path, true_cfg_scale="2"))
    make_one(there, "not an edit")
    page = visit(there, before=know_key if keys else None)
    page.locator(pictures).last.click()
    before = page.locator("#before img")
    expect(before).to_have_js_property("naturalWidth", 30)
    expect(before).to_have_attribute("src", re.compile("^blob:" if keys else "^/tasks/"))
    press(page, "Use again")
    expect(page.locator(f"{inputs} .name")).to_have_text("Picture 1, as before")
    expect(page.locator(f"{inputs} img")).to_have_js_property("naturalWidth", 30)
    expect(page.locator("#model")).to_have_value(EDITOR)
    press(page, "Make the picture")
    expect(page.locator(pictures)).to_have_count(3)
    first, _, again = upstream.calls
    assert sent_images(again) == [path.read_bytes()]
    assert {**again, "seed": 0} == {**first, "seed": 0}
    page.locator(pictures).nth(1).click()
    press(page, "Use again")
    expect(page.locator(inputs)).to_have_count(0)
    expect(page.locator("#model")).to_have_value("qwen-image")


def test_an_edit_is_made_with_the_keyboard_alone(site, visit, upstream, files):
    page = visit(site())
    expect(page.locator("#model")).not_to_have_value("")
    page.keyboard.type("make it night")
    page.keyboard.press("Tab")
    add = page.get_by_role("button", name="Add pictures\u2026")
    expect(add).to_be_focused()
    expect(add).to_have_accessible_description("chosen, dropped or pasted")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(files("beach.png", "forest.png"))
    expect(page.locator(inputs)).to_have_count(2)
    expect(page.get_by_role("group", name="Pictures to edit")).to_be_visible()
    page.keyboard.press("Shift+Tab")
    removal = page.get_by_role("button", name="Remove forest.png", exact=True)
    expect(removal).to_be_focused()
    page.keyboard.press("Enter")
    expect(add).to_be_focused()
    expect(page.locator(f"{inputs} .name")).to_have_text("beach.png")
    page.locator("#prompt").focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator(pictures)).to_have_count(1)
    assert len(sent_images(upstream.calls[0])) == 1


# For everybody


@contextmanager
def all_states(site, upstream):
    """Yield a site with a picture, a failure, and tasks that run, wait and are held."""
    upstream.decide = lambda fields: {
        "bad": refusal(400, "no such style"),
        "held": refusal(429, "later"),
    }.get(fields["prompt"], Answer())
    there = site(CONCURRENCY=2, RETRY_BACKOFF=60)
    for prompt in ("good", "better"):
        make_one(there, prompt=prompt)
    finished(there.client, submit(there.client, "bad"))
    submit(there.client, "held", model="held")
    wait_until(lambda: there.client.get("/queue").json["held"])
    upstream.gate.clear()
    for n in range(4):
        submit(there.client, f"waits {n}")
    yield there
    upstream.gate.set()


def check_axe(page):
    results = Axe().run(
        page,
        options={
            "runOnly": {
                "type": "tag",
                "values": [
                    *("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")
                ],
            }
        },
    )
    assert results.response["passes"]
    assert results.response["violations"] == [], results.generate_report()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_axe_finds_nothing(site, visit, upstream, scheme, width):
    look = {"color_scheme": scheme, "viewport": {"width": width, "height": 900}}
    with all_states(site, upstream) as there:
        page = visit(there, refusals=[400], **look)
        expect(page.locator(pictures)).to_have_count(2)
        expect(page.locator("#failed li")).to_have_count(1)
        expect(page.locator("#notices li")).to_have_count(1)
        page.locator("summary").click()
        press(page, "Make the picture")
        expect(page.locator("#make-error")).not_to_be_empty()
        press(page, "Select")
        check_axe(page)
        page.locator("#model").click()
        page.keyboard.press("ArrowDown")
        expect(page.locator("#models")).to_be_visible()
        check_axe(page)
        page.keyboard.press("Escape")
        press(page, "Select")
        overflow = "document.scrollingElement.scrollWidth - innerWidth"
        assert page.evaluate(overflow) <= 0
        page.locator(pictures).first.click()
        expect(page.locator("#calls li")).to_have_count(1)
        check_axe(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_axe_finds_nothing_where_pictures_are_edited(
    site, visit, upstream, files, tmp_path, scheme, width
):
    there = site()
    long_name = f"{'w' * 200}.png"
    beach, long = files("beach.png", long_name)
    upstream.decide = lambda fields: Answer() if "night" in fields["prompt"] else refusal(400, "no")
    for prompt in ("make it night", "bad"):
        finished(there.client, edit(there, beach, prompt))
    look = {"color_scheme": scheme, "viewport": {"width": width, "height": 900}}
    page = visit(there, **look)
    (tmp_path / "notes.txt").write_text("x")
    add_files(page, [beach, long, tmp_path / "notes.txt"])
    expect(page.locator("#inputs-error")).not_to_be_empty()
    fill(page, model="z-image-turbo", prompt="p")
    press(page, "Make the picture")
    expect(page.locator("#images")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#failed .input")).to_have_js_property("naturalWidth", 30)
    check_axe(page)
    assert page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0
    page.locator(pictures).click()
    expect(page.locator("#before img")).to_have_js_property("naturalWidth", 30)
    expect(page.locator("#calls li")).to_have_count(1)
    check_axe(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_where_there_is_nothing_and_where_a_key_is_wanted(site, visit, scheme):
    page = visit(site(), color_scheme=scheme)
    expect(page.locator("#empty")).to_be_visible()
    check_axe(page)
    page = visit(site(API_KEYS=KEYS), refusals=[401], color_scheme=scheme)
    expect(page.get_by_role("dialog")).to_be_visible()
    check_axe(page)


def test_nothing_moves_where_that_is_not_wanted(site, visit, upstream):
    upstream.gate.clear()
    there = site()
    submit(there.client)
    for wanted, animation in (("reduce", "none"), ("no-preference", "run")):
        page = visit(there, reduced_motion=wanted)
        item = page.locator("#unfinished .running")
        expect(item).to_be_attached()
        style = item.evaluate("item => getComputedStyle(item, '::after').animationName")
        assert style == animation


@pytest.mark.parametrize("width", [320, 390, 1400])
def test_no_width_makes_the_page_scroll_sideways(site, visit, upstream, width):
    with all_states(site, upstream) as there:
        submit(there.client, "w" * 500)
        page = visit(there, viewport={"width": width, "height": 700})
        expect(page.locator(pictures)).to_have_count(2)
        expect(page.locator("#unfinished")).to_contain_text("w" * 500)
        assert page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0


# The page of the API document


def execute(page, operation):
    """Try an operation out, and return the status that is shown."""
    block = page.locator(f"#operations-{operation}")
    if not block.locator(".execute").is_visible():
        block.locator(".opblock-summary-control").click()
        block.locator(".try-out__btn").click()
    block.locator(".execute").click()
    return block.locator(".live-responses-table .response .response-col_status")


def test_the_documents_page_shows_every_operation(site, visit):
    there = site()
    page = visit(there, path="/docs")
    paths = there.client.get("/openapi.json").json["paths"]
    expect(page.locator(".opblock")).to_have_count(sum(map(len, paths.values())))
    expect(page).to_have_title("Image proxy: the API")


@pytest.mark.parametrize("values", [{}, {"PUBLIC_URL": "https://pictures.example"}])
def test_an_operation_is_tried_out_on_the_server_of_the_page(site, visit, values):
    page = visit(site(**values), path="/docs")
    expect(execute(page, "health-healthz")).to_have_text("200")
    expect(page.locator("#operations-health-healthz")).to_contain_text('"status": "ok"')


@pytest.mark.parametrize("scheme", ["bearer", "key"])
def test_a_key_that_is_told_to_the_documents_page_is_sent(site, visit, scheme):
    page = visit(site(API_KEYS=KEYS), path="/docs", refusals=[401])
    expect(execute(page, "tasks-queue")).to_contain_text("401")
    page.locator(".scheme-container .authorize").click()
    form = page.locator(".auth-container").filter(has=page.locator("h4", has_text=scheme))
    form.get_by_role("textbox").fill(KEY)
    form.locator("button.authorize").click()
    page.locator(".close-modal").click()
    expect(execute(page, "tasks-queue")).to_contain_text("200")
    expect(page.locator("#operations-tasks-queue")).to_contain_text('"pending": 0')
