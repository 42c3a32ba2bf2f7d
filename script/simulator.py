"""Simulate Chutes on this machine: its catalogue, its checks, and an image drawn on the spot.

An image that is to be edited comes back in other colours, with the prompt's words on it.

A program of its own, which shares no code with the server and uses no network. What it does
is read from the public sources of Chutes' gateway.
"""

import argparse
import base64
import contextlib
import io
import itertools
import json
import math
import random
import re
import textwrap
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from PIL import Image, ImageDraw, ImageFont, ImageOps

TYPES = {
    "string": str,
    "integer": int,
    "number": int | float,
    "null": type(None),
    "array": list,
}


class Chute(NamedTuple):
    """A model: what its own check accepts, the format of its images, and whether it is routed."""

    name: str
    slug: str
    fields: dict[str, Any]
    kind: str
    is_routed: bool = False


def number(minimum: float, maximum: float, kind: str = "number") -> dict[str, Any]:
    """Return the rule of a number, as JSON Schema has it."""
    return {"type": kind, "minimum": minimum, "maximum": maximum}


def or_null(rule: dict[str, Any]) -> dict[str, Any]:
    """Return the rule of a value that may be null."""
    return {"anyOf": [rule, {"type": "null"}]}


TEXT, SEED = {"type": "string"}, or_null(number(0, 2**32 - 1, "integer"))
# The router's check. Any number of steps passes, and it makes 50 of more.
ROUTED = {
    "prompt": TEXT,
    "negative_prompt": TEXT,
    "width": number(128, 2048, "integer"),
    "height": number(128, 2048, "integer"),
    "num_inference_steps": number(1, math.inf, "integer"),
    "guidance_scale": number(1, 20),
    "seed": SEED,
    "true_cfg_scale": or_null(number(0, 10)),
}
TURBO = {
    "prompt": TEXT | {"minLength": 3, "maxLength": 1200},
    "width": number(576, 2048, "integer"),
    "height": number(576, 2048, "integer"),
    "num_inference_steps": number(1, 100, "integer"),
    "guidance_scale": number(0, 5),
    "shift": number(1, 10),
    "max_sequence_length": number(256, 2048, "integer"),
    "seed": SEED,
}
SIDE = r"(?:[12]\d|[1-9])\d\d"
HUNYUAN = {
    "prompt": TEXT,
    "size": TEXT | {"pattern": rf"auto|{SIDE}x{SIDE}|\d\d?:\d\d?"},
    "steps": number(10, 100, "integer"),
    "seed": SEED,
}
RESOLUTIONS = ["1024x1024", "768x1360", "1360x768", "880x1168", "1168x880", "1248x832", "832x1248"]
HIDREAM = {
    "prompt": TEXT,
    "resolution": TEXT | {"enum": RESOLUTIONS},
    "guidance_scale": number(0, 10),
    "num_inference_steps": number(5, 75, "integer"),
    "seed": SEED,
}
EDIT = {
    "prompt": TEXT,
    "image_b64s": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 3},
    "width": number(128, 2048, "integer"),
    "height": number(128, 2048, "integer"),
    "true_cfg_scale": number(0, 10),
    "num_inference_steps": number(1, 100, "integer"),
    "negative_prompt": TEXT,
    "seed": SEED,
}
CHUTES = [
    Chute("qwen-image", "chutes-qwen-image", ROUTED, "JPEG", is_routed=True),
    Chute("z-image-turbo", "vonkaiser-z-image-turbo", TURBO, "PNG"),
    Chute("hunyuan-image-3", "chutes-hunyuan-image-3", HUNYUAN, "WEBP"),
    Chute("hidream", "chutes-hidream", HIDREAM, "JPEG"),
    Chute("qwen-image-edit-2511", "vonkaiser-qwen-image-edit-2511", EDIT, "JPEG"),
]
CALLS_A_DAY = 300
CHUNK_BYTES = 16384


class Refusal(Exception):
    """An answer other than an image: a status, and the `detail` of its body."""


class Call(BaseHTTPRequestHandler):
    """Read one request, and send its answer as Chutes does: in chunks, without its length."""

    protocol_version = "HTTP/1.1"
    server: "Simulator"

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._send(*self.server.answer(self))

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        is_listed = url.path == "/chutes/"
        found = catalogue(dict(parse_qs(url.query))) if is_listed else {"detail": "Not Found"}
        headers = {"Content-Type": "application/json"}
        self._send(200 if is_listed else 404, headers, json.dumps(found).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chunks = [body[i : i + CHUNK_BYTES] for i in range(0, len(body), CHUNK_BYTES)]
        for chunk in (*chunks, b""):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))

    def log_message(self, *values: Any) -> None:
        """Stay silent: the server's own log tells of each call."""


class Simulator(ThreadingHTTPServer):
    """Serve the router at `/generate`, hosts at `/<slug>/generate`, the catalogue at `/chutes/`."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, latency: float = 0.0):
        super().__init__(("127.0.0.1", 0), Call)
        self._latency = latency
        self._calls = itertools.count(1)

    @property
    def url(self) -> str:
        """Return the address of the router, for CHUTES_API_URL."""
        return f"http://127.0.0.1:{self.server_address[1]}/generate"

    @property
    def catalogue_url(self) -> str:
        """Return the address of the catalogue, for CATALOGUE_URL."""
        return self.url.replace("/generate", "/chutes/")

    @property
    def chute_url(self) -> str:
        """Return the address of the hosts, for CHUTE_URL."""
        return self.url.replace("/generate", "/{slug}")

    def answer(self, call: Call) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body: an image after the latency, or a refusal at once."""
        try:
            fields, kind = check(call)
            time.sleep(self._latency)
            image = draw(fields, kind)
        except Refusal as refusal:
            status, detail = refusal.args
            body = json.dumps({"detail": detail}).encode()
            return status, {"Content-Type": "application/json"}, body
        return 200, {"Content-Type": f"image/{kind.lower()}", **self._count()}, image

    def _count(self) -> dict[str, str]:
        """Count a call, and return the headers that tell of it."""
        used = next(self._calls)
        return {
            "X-Chutes-InvocationID": str(uuid.uuid4()),
            "X-Chutes-Quota-Total": str(CALLS_A_DAY),
            "X-Chutes-Quota-Used": str(used),
            "X-Chutes-Quota-Remaining": str(max(0, CALLS_A_DAY - used)),
        }


def check(call: Call) -> tuple[dict[str, Any], str]:
    """Return a call's fields and the format of its image, or refuse it, in Chutes' order."""
    if not call.headers.get("Authorization", "").startswith("Bearer "):
        raise Refusal(401, "Authentication required.")
    fields = parse(call.body)
    host, _, path = call.path.removeprefix("/").rpartition("/")
    if host:
        chute = next((chute for chute in CHUTES if chute.slug == host), None)
        missing = "No matching chute found!"
    else:
        model = fields.pop("model", None)
        chute = next((chute for chute in CHUTES if chute.is_routed and chute.name == model), None)
        missing = f"model not found: {model}"
    if chute is None:
        raise Refusal(404, missing)
    if path != "generate":
        raise Refusal(404, "No matching cord found!")
    needed = {"prompt", "image_b64s"} & chute.fields.keys()
    if not needed <= fields.keys() or not accepts(chute.fields, fields):
        own = 'Invalid request: Invalid request: {"detail":"Invalid input parameters"}'
        raise Refusal(400, "bad request, naughty naughty" if chute.is_routed else own)
    return fields, chute.kind


def parse(body: bytes) -> dict[str, Any]:
    """Return the fields of a JSON object, or refuse it."""
    with contextlib.suppress(ValueError):
        if isinstance(fields := json.loads(body), dict):
            return fields
    raise Refusal(400, "Invalid JSON body")


def accepts(rules: dict[str, Any], fields: dict[str, Any]) -> bool:
    """Return whether there is a rule for each field, and its value keeps it."""
    return all(name in rules and fits(value, rules[name]) for name, value in fields.items())


def fits(value: Any, rule: dict[str, Any]) -> bool:
    """Return whether a value keeps a rule."""
    if "anyOf" in rule:
        return any(fits(value, half) for half in rule["anyOf"])
    if isinstance(value, bool) or not isinstance(value, TYPES[rule["type"]]):
        return False
    if isinstance(value, str):
        is_long = rule.get("minLength", 0) <= len(value) <= rule.get("maxLength", math.inf)
        matches = re.fullmatch(rule.get("pattern", "(?s).*"), value)
        return bool(is_long and matches and value in rule.get("enum", [value]))
    if isinstance(value, list):
        is_long = rule["minItems"] <= len(value) <= rule["maxItems"]
        return is_long and all(fits(each, rule["items"]) for each in value)
    return "minimum" not in rule or rule["minimum"] <= value <= rule["maximum"]


def catalogue(query: dict[str, list[str]]) -> dict[str, Any]:
    """Return a page of the catalogue: its chutes, and beside them how they are called."""
    template, page, limit = (
        query.get(name, [default])[0]
        for name, default in (("template", ""), ("page", "0"), ("limit", "25"))
    )
    found = [c for c in CHUTES if template in ("", "diffusion" if c.is_routed else "other")]
    chutes = found[int(page) * int(limit) :][: int(limit)]
    return {
        "total": len(found),
        "page": int(page),
        "limit": int(limit),
        "items": [
            {
                "chute_id": str(uuid.uuid5(uuid.NAMESPACE_DNS, chute.slug)),
                "name": chute.name,
                "slug": chute.slug,
                "standard_template": "diffusion" if chute.is_routed else None,
                "cords": None,
                "cord_ref_id": f"cords of {chute.slug}",
                "current_estimated_price": {"usd": {"hour": 1.5, "second": 0.0004}},
                "hot": chute.name != "hidream",
            }
            for chute in chutes
        ],
        "cord_refs": {f"cords of {chute.slug}": [cord(chute)] for chute in chutes},
    }


def cord(chute: Chute) -> dict[str, Any]:
    """Return what is published of how a chute is called, with the lies that were seen."""
    required = [name for name in ("prompt", "image_b64s") if name in chute.fields]
    schema: dict[str, Any] = {"properties": chute.fields, "required": required}
    if chute.is_routed:
        schema = {"properties": {"prompt": TEXT}}
    elif chute.fields is TURBO:
        wrapper = {"properties": {"input_args": {"$ref": "#/definitions/Input"}}}
        schema = wrapper | {"$defs": {"Input": schema}}
    return {
        "method": "POST",
        "public_api_path": "/generate",
        "public_api_method": "POST",
        "input_schema": schema,
        "output_content_type": "image/jpeg",
    }


def draw(fields: dict[str, Any], kind: str) -> bytes:
    """Write the prompt's words on the given image in other colours, or on a sky of their own."""
    chance = random.Random(f"{fields['prompt']} {fields.get('seed')}")
    image = edited(fields, chance) if "image_b64s" in fields else sky(fields, chance)
    width, height = image.size
    letter = max(12, min(image.size) // 16)
    words = textwrap.fill(fields["prompt"][:300], max(1, width * 2 // letter - 4))
    font = ImageFont.load_default(letter)
    style: dict[str, Any] = {
        "align": "center",
        "stroke_fill": "black",
        "stroke_width": letter // 12,
    }
    ImageDraw.Draw(image).text((width / 2, height / 2), words, "white", font, "mm", **style)
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def edited(fields: dict[str, Any], chance: random.Random) -> Image.Image:
    """Return the first of the given images as a duotone, in the size that was asked for."""
    try:
        data = base64.b64decode(fields["image_b64s"][0], validate=True)
        image = Image.open(io.BytesIO(data)).convert("L")
    except (ValueError, OSError):
        raise Refusal(500, "exhausted all available targets to no avail") from None
    size = fields.get("width", image.width), fields.get("height", image.height)
    dark, light = (f"hsl({chance.randrange(360)}, 90%, {lightness}%)" for lightness in (25, 75))
    return ImageOps.colorize(ImageOps.fit(image, size), dark, light)


def sky(fields: dict[str, Any], chance: random.Random) -> Image.Image:
    """Draw a sky with discs, whose colours come from the prompt and the seed."""
    told = re.findall(r"\d{3,4}", fields.get("resolution", fields.get("size", "")))
    width, height = size = fields.get("width", 1024), fields.get("height", 1024)
    if told:
        width, height = size = int(told[0]), int(told[1])
    top, bottom, *discs = (f"#{chance.randrange(2**24):06x}" for _ in range(14))
    image = ImageOps.colorize(Image.linear_gradient("L").resize(size), top, bottom)
    pen = ImageDraw.Draw(image)
    for colour in discs:
        centre = (chance.randrange(width), chance.randrange(height))
        pen.circle(centre, chance.randrange(9, 90), colour)
    return image


def main() -> None:
    """Serve until Ctrl-C; the first line on stdout is the address for CHUTES_API_URL."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, default=1.0, help="seconds for one image")
    with Simulator(parser.parse_args().latency) as simulator:
        print(simulator.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            simulator.serve_forever()


if __name__ == "__main__":
    main()
