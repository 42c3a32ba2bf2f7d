"""Chutes' catalogue: the models that it lists, read in a process of its own.

`python catalogue.py CATALOGUE_URL CHUTE_URL` prints each model as a line of JSON, busiest first,
or one line on stderr that says what is wrong. What a catalogue costs, whatever it holds, that
process pays: a page may be 32 MB of hostile JSON.
"""

import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import certifi
import urllib3
from urllib3.exceptions import HTTPError

import urls
from models import NAME, RESERVED, FieldRule, Length, Model

# Chutes without a template, as the newest are, are `other`.
TEMPLATES = ("diffusion", "other")
MAX_SECONDS = 30
MAX_MB, MAX_PAGES, MAX_MEMORY_MB = 32, 50, 512
MAX_MODELS, MAX_FIELDS, MAX_IMAGES = 2000, 200, 16
# Where a list of images has no maxItems.
DEFAULT_IMAGES = 4
_MAX_VALUE = 2000
_MAX_LINE = 65536
_MAX_OUTPUT = 4 * 2**20
# What a chain of $ref, anyOf and wrappers may hold: it may be a loop.
_MAX_STEPS = 20
_PATH = "/(?!.*//)(?!.*[.][.])[A-Za-z0-9._-][A-Za-z0-9._/-]{0,200}|/"
_FIELD = "[A-Za-z_][A-Za-z0-9_.-]{0,63}"
_ADVICE = "check CATALOGUE_URL, or set it to off to do without"
_WRAPPERS = ("input_args", "args", "params")
_IMAGES = ("image_b64s", "image_b64")

Table = dict[str, Any]


class CatalogueError(Exception):
    """The catalogue cannot be read; the message is one line that says why, and what to do."""


class Reader:
    """Read the catalogue, one at a time, in a process that `close` ends at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_closed = False
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, catalogue_url: str, chute_url: str) -> list[Model]:
        """Return the models that the catalogue lists, busiest first, or raise CatalogueError.

        Takes half a minute and a few seconds at most.
        """
        process = self._start(catalogue_url, chute_url)
        late = threading.Timer(MAX_SECONDS + 5, process.kill)
        late.start()
        try:
            with process:
                output, error = _output(process)
        finally:
            late.cancel()
        if self._is_closed:
            raise CatalogueError("The catalogue is not read: the server stops")
        if process.returncode or len(output) > _MAX_OUTPUT:
            raise CatalogueError(error or "The process that reads the catalogue was killed")
        try:
            return [Model.model_validate_json(line) for line in output.splitlines()]
        except ValueError as error:
            message = "The catalogue was read by another version; start the server again"
            raise CatalogueError(message) from error

    def close(self) -> None:
        """End a read that is under way, and all later ones."""
        with self._lock:
            self._is_closed = True
            if self._process:
                self._process.kill()

    def _start(self, *addresses: str) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._is_closed:
                raise CatalogueError("The catalogue is not read: the server stops")
            try:
                self._process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).resolve()), *addresses],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    # Not the server's: that holds the token. One arena: MAX_MEMORY_MB counts all.
                    env={"MALLOC_ARENA_MAX": "1"},
                )
            except OSError as error:
                message = f"No process can be started to read the catalogue ({error.strerror})"
                raise CatalogueError(message) from error
            return self._process


def _output(process: subprocess.Popen[bytes]) -> tuple[bytes, str]:
    """Return what a process prints, up to a little more than may be, and its last words."""
    assert process.stdout and process.stderr
    output = process.stdout.read(_MAX_OUTPUT + 1)
    if len(output) > _MAX_OUTPUT:
        process.kill()
    lines = process.stderr.read(_MAX_LINE).decode(errors="replace").split("\n")
    return output, next((line for line in reversed(lines) if line.strip()), "")[:500]


def read(catalogue_url: str, chute_url: str) -> Iterator[Model]:
    """Ask the catalogue for all pages, and yield the models, or raise CatalogueError."""
    taken: set[str] = set()
    try:
        urls.check_upstream(catalogue_url)
        urls.check_upstream(chute_url, "slug")
    except ValueError as error:
        raise CatalogueError(f"CATALOGUE_URL and CHUTE_URL: each {error}") from error
    try:
        for page in _pages(catalogue_url):
            yield from models_of(page, chute_url, taken)
    except CatalogueError as error:
        raise CatalogueError(f"The catalogue at {catalogue_url} {error}; {_ADVICE}") from error


def _pages(url: str) -> Iterator[Table]:
    left, asked = MAX_MB * 2**20, 0
    with urllib3.PoolManager(ca_certs=certifi.where(), retries=False, timeout=10) as http:
        for template in TEMPLATES:
            seen = 0
            for number in itertools.count():
                asked += 1
                if asked > MAX_PAGES:
                    raise CatalogueError(f"has more than {MAX_PAGES} pages")
                body = _get(http, _page_url(url, template, number), left)
                left -= len(body)
                page = parse(body)
                yield page
                seen += len(page["items"])
                if not page["items"] or seen >= page["total"]:
                    break


def _page_url(url: str, template: str, number: int) -> str:
    query = {
        "include_public": "true",
        "include_schemas": "true",
        "limit": 500,
        "template": template,
        "page": number,
    }
    return f"{url}?{urlencode(query)}"


def _get(http: urllib3.PoolManager, url: str, most: int) -> bytes:
    """Return the body of an answer, of at most so many bytes, or raise CatalogueError."""
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    try:
        answer = http.request("GET", url, headers=headers, redirect=False, preload_content=False)
        if 300 <= answer.status < 400:
            raise CatalogueError(f"answers with a redirect ({answer.status}): none is followed")
        if answer.status != 200:
            raise CatalogueError(f"answers with status {answer.status}")
        body = bytearray()
        for chunk in answer.stream(65536, decode_content=False):
            body += chunk
            if len(body) > most:
                raise CatalogueError(f"has more than {MAX_MB} MB")
    except (HTTPError, OSError) as error:
        raise CatalogueError(f"cannot be reached ({urls.cause(error)})") from error
    return bytes(body)


def parse(body: bytes) -> Table:
    """Return a page of the catalogue as it came, in Chutes' shape, or raise CatalogueError."""
    try:
        page = json.loads(body, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise CatalogueError("is not JSON that can be read") from error
    shape = {"items": list, "total": int, "cord_refs": dict}
    for key, kind in shape.items():
        if not isinstance(page, dict) or not isinstance(page.get(key), kind):
            raise CatalogueError(f"has another shape than Chutes' ({key} is not there)")
    return page  # type: ignore[no-any-return]


def _integer(digits: str) -> int | float:
    # Python refuses to read one of thousands of digits, and the page with it.
    return int(digits) if len(digits) < 100 else float(digits)


def models_of(page: Table, chute_url: str, taken: set[str]) -> Iterator[Model]:
    """Yield the models of a page; one that cannot be read is left out, and costs no other.

    `taken` holds the names that are given, and grows.
    """
    for chute in page["items"]:
        with suppress(ValueError, RecursionError):
            if model := _model(_table(chute), page["cord_refs"], chute_url, taken):
                taken.update((model.name, *model.aliases))
                yield model


def _model(chute: Table, cord_refs: Table, chute_url: str, taken: set[str]) -> Model | None:
    slug, cord = _text(chute.get("slug")), _image_cord(chute, cord_refs)
    found = (_text(chute.get(key)) for key in ("name", "slug", "chute_id"))
    names = dict.fromkeys(n for n in found if re.fullmatch(NAME, n) and n not in taken)
    if not names or cord is None or not re.fullmatch(urls.LABEL, slug):
        return None
    name, *aliases = names
    is_routed = chute.get("standard_template") == "diffusion"
    return Model.model_validate(
        {
            "name": name,
            "aliases": aliases,
            "url": chute_url.replace("{slug}", slug).rstrip("/") + cord["public_api_path"],
            # The router's own check overrides the schema of a diffusion chute.
            **({} if is_routed else read_schema(cord.get("input_schema"))),
            "source": "catalogue",
            "hot": chute["hot"] if isinstance(chute.get("hot"), bool) else None,
            "usd_per_hour": _price(chute),
        }
    )


def _image_cord(chute: Table, cord_refs: Table) -> Table | None:
    """Return the first cord that is called with POST and answers with an image, or None."""
    cords = chute.get("cords") or cord_refs.get(_text(chute.get("cord_ref_id")))
    for cord in map(_table, cords if isinstance(cords, list) else ()):
        method = cord.get("public_api_method") or cord.get("method")
        is_image = _text(cord.get("output_content_type")).lower().startswith("image/")
        path = _text(cord.get("public_api_path"))
        if method == "POST" and is_image and re.fullmatch(_PATH, path):
            return cord
    return None


def _price(chute: Table) -> float | None:
    price = _table(_table(chute.get("current_estimated_price")).get("usd")).get("hour")
    if isinstance(price, bool) or not isinstance(price, int | float):
        return None
    return float(price) if 0 <= price < math.inf else None


def read_schema(schema: Any) -> Table:
    """Return what a cord's schema says of its model: `fields`, `images` and `prompt`.

    Only what is JSON Schema counts: `min`, `max`, `gte` and `lte` are not, and nobody enforces
    them. There is no `fields` where the schema names none.
    """
    root = _table(schema)
    body = _unwrap(root)
    properties = _table(body.get("properties"))
    images = _images(root, body)
    fields = {
        name: _rule(_resolve(root, properties[name]))
        for name in itertools.islice(properties, MAX_FIELDS)
        if re.fullmatch(_FIELD, name) and name not in (*RESERVED, *_IMAGES)
    }
    said: Table = {"images": images} if images else {}
    if fields or images:
        said["fields"] = fields
    if prompt := _rule(_resolve(root, properties.get("prompt")), Length):
        said["prompt"] = prompt
    return said


def _unwrap(root: Table) -> Table:
    """Return the schema of the flat body that is sent, out of the arguments around it."""
    body = _resolve(root, root)
    for _ in range(_MAX_STEPS):
        properties = _table(body.get("properties"))
        inner = next((properties[name] for name in _WRAPPERS if name in properties), None)
        found = _resolve(root, inner)
        if "prompt" in properties or "properties" not in found:
            break
        body = found
    return body


def _resolve(root: Table, node: Any) -> Table:
    """Return what a node says, with its $ref followed and the half of anyOf that is not null."""
    said = dict(_table(node))
    for _ in range(_MAX_STEPS):
        if "$ref" in said:
            half = _definition(root, _text(said.pop("$ref")))
        elif word := next((word for word in ("anyOf", "oneOf", "allOf") if word in said), ""):
            halves = [half for half in _options(said.pop(word)) if half.get("type") != "null"]
            half = halves[0] if len(halves) == 1 else {}
        else:
            break
        said = {**half, **said}
    if isinstance(said.get("type"), list):
        kinds = [kind for kind in said["type"] if kind != "null"]
        said["type"] = kinds[0] if len(kinds) == 1 else None
    return said


def _options(said: Any) -> list[Table]:
    return [_table(option) for option in said] if isinstance(said, list) else []


def _definition(root: Table, reference: str) -> Table:
    """Return a definition by its name: some are said to stand where they do not."""
    name = reference.rpartition("/")[2]
    places = (_table(root.get(word)) for word in ("$defs", "definitions"))
    return next((_table(place[name]) for place in places if name in place), {})


def _images(root: Table, body: Table) -> Table | None:
    """Return the field that carries input images, and how many, or None."""
    required = body.get("required")
    for name in _IMAGES:
        node = _table(_table(body.get("properties")).get(name))
        said = [_resolve(root, each) for each in (node, *_options(node.get("anyOf")))]
        minimum = int(isinstance(required, list) and name in required)
        if array := next((each for each in said if each.get("type") == "array"), None):
            most = array.get("maxItems")
            most = most if type(most) is int and most > 0 else DEFAULT_IMAGES
            # Where one is the most, it is sent as a text: a list is a list of two.
            return {"field": name, "minimum": minimum, "maximum": min(max(2, most), MAX_IMAGES)}
        if name == "image_b64" and any(each.get("type") == "string" for each in said):
            return {"field": name, "minimum": minimum, "maximum": 1}
    return None


def _rule(said: Table, kind: type[Length] = FieldRule) -> Table:
    """Return the keys of a rule that can be read, if they can be together, else the type."""
    known = {key: said[key] for key in kind.model_fields if said.get(key) is not None}
    if not _is_readable(known, kind):
        known = {key: value for key, value in known.items() if _is_readable({key: value}, kind)}
    if not _is_readable(known, kind):
        known = {key: known[key] for key in ("type",) if key in known}
    return known


def _is_readable(rule: Table, kind: type[Length]) -> bool:
    try:
        text = json.dumps(rule, ensure_ascii=False, allow_nan=False)
        kind.model_validate(rule)
        return len(text.encode()) <= _MAX_VALUE
    except (ValueError, RecursionError):
        return False


def _table(value: Any) -> Table:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _lines(models: Iterable[Model]) -> Iterator[bytes]:
    """Yield each model as a line, as many as there may be; one that is too long is left out."""
    size = 0
    for model in itertools.islice(models, MAX_MODELS):
        line = model.model_dump_json(exclude_unset=True).encode() + b"\n"
        if len(line) > _MAX_LINE:
            continue
        size += len(line)
        if size > _MAX_OUTPUT:
            return
        yield line


def _limit() -> None:
    """Limit the memory of this process, and end it when the time is over, whatever it does."""

    def end() -> None:
        # By a thread, as a name that is looked up hears no signal.
        os.write(2, f"The catalogue took more than {MAX_SECONDS} s; {_ADVICE}\n".encode())
        os._exit(1)

    with suppress(ValueError):  # A lower limit is in force.
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_MB * 2**20,) * 2)
    with suppress(OSError):  # Where memory runs out, this process goes, and not the server.
        Path("/proc/self/oom_score_adj").write_text("1000")
    timer = threading.Timer(MAX_SECONDS, end)
    timer.daemon = True
    timer.start()


def main() -> None:
    """Print the models of the catalogue; exit with one line on stderr where that fails."""
    if len(sys.argv) != 3:
        sys.exit("Usage: python catalogue.py CATALOGUE_URL CHUTE_URL")
    _, catalogue_url, chute_url = sys.argv
    _limit()
    try:
        lines = b"".join(_lines(read(catalogue_url, chute_url)))
    except CatalogueError as error:
        sys.exit(str(error))
    except MemoryError:
        sys.exit(f"The catalogue takes more than {MAX_MEMORY_MB} MB of memory; {_ADVICE}")
    sys.stdout.buffer.write(lines)


if __name__ == "__main__":
    main()
