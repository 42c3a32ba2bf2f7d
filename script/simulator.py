"""Simulate Chutes on this machine: its checks, its refusals, and an image drawn on the spot.

A program of its own, which shares no code with the server and uses no network. What it does
is read from the public sources of Chutes' gateway.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import random
import textwrap
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

NUMBER = int | float
# A field's type and range. Any number of steps passes the router, which makes 50 of more.
ROUTER = {
    "prompt": (str,),
    "negative_prompt": (str,),
    "width": (int, 128, 2048),
    "height": (int, 128, 2048),
    "num_inference_steps": (int, 1, math.inf),
    "guidance_scale": (NUMBER, 1, 20),
    "seed": (int | None, 0, 2**32 - 1),
    "img_guidance_scale": (NUMBER, 0, 20),
    "image_b64": (list,),
    "true_cfg_scale": (NUMBER | None, 0, 10),
}
SIDES = {"width": (int, 576, 2048), "height": (int, 576, 2048)}
# What a model accepts of what has passed, and the format of its images.
MODELS = {
    "qwen-image": (ROUTER, "JPEG"),
    "FLUX.1-dev": (ROUTER | {"num_inference_steps": (int, 1, 30)}, "JPEG"),
    "z-image-turbo": (ROUTER | SIDES | {"guidance_scale": (NUMBER, 0, 5)}, "PNG"),
    "hunyuan-image-3": (ROUTER, "WEBP"),
}
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
        status, headers, body = self.server.answer(self)
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
    """Serve each model at `/generate`, as the router, and at `/<model>/generate`, as its host."""

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

    def answer(self, call: Call) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body: an image after the latency, or a refusal at once."""
        try:
            fields, kind = check(call)
        except Refusal as refusal:
            status, detail = refusal.args
            body = json.dumps({"detail": detail}).encode()
            return status, {"Content-Type": "application/json"}, body
        time.sleep(self._latency)
        return 200, {"Content-Type": f"image/{kind.lower()}", **self._count()}, draw(fields, kind)

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
    model = host or str(fields.pop("model", None))
    if model not in MODELS:
        raise Refusal(404, "No matching chute found!" if host else f"model not found: {model}")
    if path != "generate":
        raise Refusal(404, "No matching cord found!")
    accepted, kind = MODELS[model]
    if "prompt" not in fields or not accepts(ROUTER, fields):
        raise Refusal(400, "bad request, naughty naughty")
    if not accepts(accepted, fields):
        words = '{"detail":"Invalid input parameters"}'
        raise Refusal(400, f"Invalid request: Invalid request: {words}")
    return fields, kind


def parse(body: bytes) -> dict[str, Any]:
    """Return the fields of a JSON object, or refuse it."""
    with contextlib.suppress(ValueError):
        if isinstance(fields := json.loads(body), dict):
            return fields
    raise Refusal(400, "Invalid JSON body")


def accepts(rules: dict[str, tuple[Any, ...]], fields: dict[str, Any]) -> bool:
    """Return whether there is a rule for each field, and its value keeps it."""
    return all(name in rules and fits(value, *rules[name]) for name, value in fields.items())


def fits(value: Any, kind: Any, *limits: float) -> bool:
    """Return whether a value is of the kind and, where it is a number, within the limits."""
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    return value is None or not limits or limits[0] <= value <= limits[1]


def draw(fields: dict[str, Any], kind: str) -> bytes:
    """Draw the prompt's words on a sky whose colours come from the prompt and the seed."""
    width, height = size = fields.get("width", 1024), fields.get("height", 1024)
    chance = random.Random(f"{fields['prompt']} {fields.get('seed')}")
    top, bottom, *discs = (f"#{chance.randrange(2**24):06x}" for _ in range(14))
    image = ImageOps.colorize(Image.linear_gradient("L").resize(size), top, bottom)
    pen = ImageDraw.Draw(image)
    for colour in discs:
        centre = (chance.randrange(width), chance.randrange(height))
        pen.circle(centre, chance.randrange(9, 90), colour)
    letter = max(12, min(size) // 16)
    words = textwrap.fill(fields["prompt"][:300], width * 2 // letter - 4)
    font = ImageFont.load_default(letter)
    outline = {"stroke_width": letter // 12, "stroke_fill": "black"}
    pen.text((width / 2, height / 2), words, "white", font, "mm", align="center", **outline)
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


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
