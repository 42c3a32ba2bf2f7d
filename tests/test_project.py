"""What holds for the project as a whole: its structure, and that its documents tell the truth."""

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import config
from app import close, create_app
from models import Model
from records import ERROR_CODES

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
API, SETTINGS, HOW_IT_WORKS, MODELS = (
    (ROOT / "docs" / name).read_text()
    for name in ("api.md", "settings.md", "how-it-works.md", "models.md")
)
DOCUMENTS = (README, *sorted((ROOT / "docs").glob("*.md")))
# From the gunicorn hooks down: each module may import what stands in a line below its own.
LAYERS = [
    {"gunicorn.conf"},
    {"app", "gthread"},
    {"web.tasks", "web.images", "web.models", "web.openai", "web.health", "web.page"},
    {"web.uploads"},
    {"web.openapi", "web.params"},
    {"web.service"},
    {"web.access"},
    {"web.errors"},
    {"web.answers", "web.schemas"},
    {"worker"},
    {"registry", "inputs"},
    {"db", "chutes", "catalogue", "outputs", "waiters"},
    {"images", "config", "node"},
    {"models"},
    {"records", "redact", "logs", "doorbell", "urls"},
]
OURS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (*ROOT.glob("*.py"), *(ROOT / "web").glob("*.py"))
    if path.stem != "__init__"
}
WEB = {name for name in OURS if name.startswith("web.")}
# What only these know.
ONLY = {
    "flask": {"app", *WEB} - {"web.schemas"},
    "sqlite3": {"db"},
    "requests": {"chutes"},
    "urllib3": {"catalogue", "chutes"},
    "PIL": {"images"},
    "prometheus_client": {"web.health"},
    "zipstream": {"web.images"},
    "pydantic": {
        *("config", "models"),
        *("web.answers", "web.openapi", "web.params", "web.schemas"),
    },
    "dotenv": {"config"},
    "gunicorn": {"gthread", "gunicorn.conf"},
}


def imported(path):
    """Return all that a module imports, of ours with the modules in a package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def top_level(names):
    return {name.split(".")[0] for name in names}


def test_imports_go_one_way():
    assert set().union(*LAYERS) == set(OURS)
    below = set(OURS)
    for layer in LAYERS:
        below -= layer
        for name in layer:
            assert imported(OURS[name]) & set(OURS) <= below, name


def test_no_function_is_longer_than_forty_lines():
    scripts = (ROOT / "script").glob("*.py")
    lengths = {
        f"{path.name}: {node.name}": node.end_lineno - node.lineno + 1
        for path in (*OURS.values(), *scripts)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > 40} == {}
    assert statistics.median(lengths.values()) < 8


@pytest.mark.parametrize("library", ONLY)
def test_a_library_is_known_to_its_modules_alone(library):
    users = {name for name, path in OURS.items() if library in top_level(imported(path))}
    assert users == ONLY[library]


def test_the_simulator_is_a_program_of_its_own():
    found = top_level(imported(ROOT / "script" / "simulator.py"))
    assert found <= sys.stdlib_module_names | {"PIL"}


def test_importing_does_nothing(tmp_path):
    program = (
        "import os, sys, threading; before = set(os.listdir());"
        "import app, backup, benchmark, catalogue, chutes, config, db, images, list_models, logs;"
        "import outputs, restore, simulator, worker;"
        "assert threading.active_count() == 1; assert set(os.listdir()) == before"
    )
    subprocess.run(
        [sys.executable, "-B", "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'script'}"},
        check=True,
    )


def test_every_module_is_in_the_table():
    rows = re.findall(r"^\| (`.+?) \|", section(HOW_IT_WORKS, "The modules"), re.M)
    told = re.findall(r"`([^`/]+\.py|web/[^`]+\.py)`", "\n".join(rows))
    assert sorted(told) == sorted(str(path.relative_to(ROOT)) for path in OURS.values())


def test_every_key_of_a_model_is_in_the_table():
    rows = re.findall(r"^\| `(\w+)` \|", section(MODELS, "The file of models"), re.M)
    hidden = {"name", "source", "hot", "usd_per_hour"}
    assert set(rows) == Model.model_fields.keys() - hidden


def test_every_setting_is_in_the_table_and_in_the_example():
    rows = re.findall(r"^\| `([A-Z_]+)` \| [^|]+ \|", SETTINGS, re.M)
    example = re.findall(r"^([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.M)
    assert sorted(rows) == sorted(example) == sorted(config.NAMES)


def test_the_defaults_in_the_documents_are_those_in_force(tmp_path):
    example = dict(re.findall(r"^([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.M))
    values = {name: value for name, value in example.items() if value}
    plain = config.from_values({"CHUTES_API_TOKEN": "x"}, tmp_path)
    assert config.from_values({**values, "CHUTES_API_TOKEN": "x"}, tmp_path) == plain
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| `([^`]+)` \|", SETTINGS, re.M))
    assert len(rows) > 10
    assert config.from_values({**rows, "CHUTES_API_TOKEN": "x"}, tmp_path) == plain


def routes(configure):
    app = create_app(configure())
    rules = [
        (
            method,
            re.sub(r"<(?:\w+:)?\w+>", lambda m: "<n>" if "int:" in m[0] else "<id>", rule.rule),
        )
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    ]
    close(app)
    return set(rules)


def test_every_route_is_in_the_table_and_in_bruno(configure):
    told = set(re.findall(r"^\| `(GET|POST|DELETE) (/[^`?]*)[^`]*` \|", API, re.M))
    assert told == routes(configure)
    asked = set()
    for path in (ROOT / "bruno").glob("*.bru"):
        text = path.read_text()
        if path.name == "collection.bru":
            continue
        method = re.search(r"^(get|post|delete) \{", text, re.M)[1].upper()
        url = re.search(r"url: \{\{baseUrl\}\}([^?\s]*)", text)[1]
        asked.add((method, re.sub(r"\{\{\w+\}\}|0{8}-[-0-9]+", "<id>", url).replace("/0", "/<n>")))
    assert asked == routes(configure)


def test_no_document_names_a_route_that_is_not_there(configure):
    told = [
        route
        for document in DOCUMENTS
        for route in re.findall(r"`(GET|POST|DELETE) (/[^`?]*)[^`]*`", document.read_text())
    ]
    assert set(told) <= routes(configure)


def test_every_error_code_is_in_the_table():
    header, *rows = re.findall(r"^\| `(\w+)` \|", section(API, "Error codes of failed tasks"), re.M)
    assert header == "error_code"
    assert sorted(rows) == sorted(ERROR_CODES)


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_a_heading(document):
    links = re.findall(r"\]\((?!https?://)([^)\s#]*)#?([^)\s]*)\)", prose(document))
    assert links
    for name, anchor in links:
        target = document.parent / name if name else document
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f"{name}#{anchor}"


def anchors(document):
    """Return what links call the headings: lower case, with hyphens and without punctuation."""
    titles = re.findall(r"^#+ (.+)$", prose(document), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def prose(document):
    """Return the text of a document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)


def section(text, title):
    """Return what stands between a heading and the next one."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_locks_have_hashes_and_no_address():
    for name in ("requirements.txt", "requirements-dev.txt"):
        lock = (ROOT / name).read_text()
        pins = re.findall(r"^[a-z0-9_.-]+==", lock, re.M)
        assert len(pins) >= 15
        assert lock.count("--hash=sha256:") >= len(pins)
        assert "://" not in lock
