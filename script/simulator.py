"""Chutes on this machine: the same checks, codes and bodies, and a picture drawn on the spot.

A program of its own, for demos and tests; it shares no code with the server. What it
does is read from the public sources of Chutes' gateway; the network is never used.
"""

import argparse
import contextlib
import hashlib
import io
import json
import random
import re
import sys
import textwrap
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, ImageDraw, ImageFont

# What each model answers with, and what it accepts beyond the router's own ranges.
MODELS: dict[str, dict[str, Any]] = {
    "qwen-image": {"format": "JPEG"},
    "FLUX.1-dev": {"format": "JPEG", "steps": (1, 30)},
    "z-image-turbo": {"format": "PNG", "guidance": (0, 5), "side": (576, 2048)},
    "hunyuan-image-3": {"format": "WEBP"},
}
_ROUTER_FIELDS = {
    "prompt": (str, None),
    "negative_prompt": (str, None),
    "width": (int, (128, 2048)),
    "height": (int, (128, 2048)),
    "num_inference_steps": (int, (1, None)),
    "guidance_scale": ((int, float), (1, 20)),
    "seed": (int, (0, 2**32 - 1)),
    "img_guidance_scale": ((int, float), (0, 20)),
    "image_b64": (list, None),
    "true_cfg_scale": ((int, float), (0, 10)),
}
_MAX_STEPS = 50
_CHUNK = 16384


class Refusal(Exception):
    """An answer other than a picture: a status and the `detail` of its body."""

    def __init__(self, status: int, detail: Any):
        super().__init__(status, detail)
        self.status = status
        self.detail = detail


class Simulator(ThreadingHTTPServer):
    """Serve `/generate` as the router does, and `/<model>/generate` as a chute's own host.

    It counts as it serves: `calls` are the pictures that were asked for and not refused,
    `most_at_once` how many of them ran together.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        port: int = 0,
        latency: float = 1.0,
        token: str | None = None,
        quota: int = 300,
        capacity: int = 64,
        cold: float = 0.0,
        disabled: tuple[str, ...] = (),
    ):
        super().__init__(("127.0.0.1", port), _Handler)
        self.latency = latency
        self.token = token
        self.quota = quota
        self.capacity = capacity
        self.cold = cold
        self.disabled = disabled
        self.calls = 0
        self.most_at_once = 0
        self._at_once = 0
        self._warm_at: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Return the address of the router, for CHUTES_API_URL."""
        return f"http://127.0.0.1:{self.server_address[1]}/generate"

    def answer(self, path: str, authorization: str, body: bytes) -> tuple[str, bytes]:
        """Return the type and bytes of a picture, after its latency, or raise Refusal."""
        self._check_token(authorization)
        fields = _json(body)
        model, path = self._model(path, fields)
        if model in self.disabled:
            raise Refusal(503, "This chute is currently disabled.")
        self._check_quota()
        if path != "/generate":
            raise Refusal(404, "No matching cord found!")
        _check_fields(fields, MODELS[model])
        self._check_instances(model)
        return self._run(model, fields)

    def quota_headers(self) -> dict[str, str]:
        """Return the headers that tell the day's quota."""
        used = min(self.calls, self.quota)
        return {
            "X-Chutes-Quota-Total": str(self.quota),
            "X-Chutes-Quota-Used": str(used),
            "X-Chutes-Quota-Remaining": str(self.quota - used),
        }

    def _check_token(self, authorization: str) -> None:
        scheme, _, token = authorization.partition(" ")
        if scheme != "Bearer" or not token:
            raise Refusal(401, "Authentication required.")
        if self.token and token != self.token:
            raise Refusal(401, "Invalid token or user not found")

    def _model(self, path: str, fields: dict[str, Any]) -> tuple[str, str]:
        own_host = re.fullmatch(r"/([^/]+)(/[^/]+)", path)
        if own_host:
            model, path = own_host.groups()
            if model not in MODELS:
                raise Refusal(404, "No matching chute found!")
            return model, path
        model = fields.pop("model", None)
        if model not in MODELS:
            raise Refusal(404, f"model not found: {model}")
        return model, path

    def _check_quota(self) -> None:
        if self.calls < self.quota:
            return
        tomorrow = datetime.now(UTC).date() + timedelta(days=1)
        raise Refusal(
            402,
            {
                "message": "Quota exceeded and account balance is $0.0, please pay with fiat",
                "quota_reset_timestamp": f"{tomorrow}T00:00:00+00:00",
            },
        )

    def _check_instances(self, model: str) -> None:
        """Say 503 while the model is cold; the first request makes it start."""
        with self._lock:
            warm_at = self._warm_at.setdefault(model, time.monotonic() + self.cold)
        if time.monotonic() < warm_at:
            chute = uuid.uuid5(uuid.NAMESPACE_DNS, model)
            raise Refusal(503, f"No instances available (yet) for chute_id='{chute}'")

    def _run(self, model: str, fields: dict[str, Any]) -> tuple[str, bytes]:
        with self._lock:
            if self._at_once >= self.capacity:
                raise Refusal(429, "Infrastructure is at maximum capacity, try again later")
            self.calls += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.latency)
            kind = MODELS[model]["format"]
            return f"image/{kind.lower()}", draw(fields, kind)
        finally:
            with self._lock:
                self._at_once -= 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Simulator

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        try:
            kind, picture = self.server.answer(path, self.headers.get("Authorization", ""), body)
        except Refusal as refusal:
            self._send_json(refusal)
        else:
            self._send_picture(kind, picture)

    def _send_json(self, refusal: Refusal) -> None:
        body = json.dumps({"detail": refusal.detail}).encode()
        self.send_response(refusal.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_picture(self, kind: str, picture: bytes) -> None:
        """Send the bytes as Chutes does: in chunks, without their length."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("X-Chutes-InvocationID", str(uuid.uuid4()))
        for name, value in self.server.quota_headers().items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(picture), _CHUNK):
            piece = picture[start : start + _CHUNK]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, form: str, *values: Any) -> None:
        print("simulator:", form % values, file=sys.stderr)


def draw(fields: dict[str, Any], kind: str) -> bytes:
    """Draw the prompt's words on a sky whose colours come from the prompt and the seed."""
    prompt = fields["prompt"]
    size = (fields.get("width", 1024), fields.get("height", 1024))
    seed = hashlib.sha256(f"{prompt} {fields.get('seed')}".encode()).digest()
    chance = random.Random(seed)
    top, bottom = ([chance.randrange(256) for _ in range(3)] for _ in range(2))
    mask = Image.linear_gradient("L").resize(size)
    picture = Image.composite(
        Image.new("RGB", size, tuple(bottom)), Image.new("RGB", size, tuple(top)), mask
    )
    pen = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y, r = chance.randrange(size[0]), chance.randrange(size[1]), chance.randrange(9, 90)
        colour = tuple(chance.randrange(256) for _ in range(3))
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    height = max(12, min(size) // 16)
    words = textwrap.fill(prompt[:300], max(8, size[0] * 2 // height - 4))
    pen.multiline_text(
        (size[0] / 2, size[1] / 2),
        words,
        anchor="mm",
        align="center",
        font=ImageFont.load_default(height),
        fill="white",
        stroke_width=max(1, height // 16),
        stroke_fill="black",
    )
    out = io.BytesIO()
    picture.save(out, kind)
    return out.getvalue()


def _json(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise Refusal(400, "Invalid JSON body")
    return fields


def _check_fields(fields: dict[str, Any], model: dict[str, Any]) -> None:
    for name, value in fields.items():
        if not _router_accepts(name, value):
            raise Refusal(400, "bad request, naughty naughty")
    if not isinstance(fields.get("prompt"), str):
        raise Refusal(400, "bad request, naughty naughty")
    steps = min(fields.get("num_inference_steps") or 20, _MAX_STEPS)
    sides = (fields.get("width") or 1024, fields.get("height") or 1024)
    if not (
        _within(steps, model.get("steps"))
        and _within(fields.get("guidance_scale") or 1, model.get("guidance"))
        and all(_within(side, model.get("side")) for side in sides)
    ):
        refusal = '{"detail":"Invalid input parameters"}'
        raise Refusal(400, f"Invalid request: Invalid request: {refusal}")


def _router_accepts(name: str, value: Any) -> bool:
    if name not in _ROUTER_FIELDS:
        return False
    kind, limits = _ROUTER_FIELDS[name]
    if value is None:
        return name in ("seed", "true_cfg_scale")
    return isinstance(value, kind) and not isinstance(value, bool) and _within(value, limits)


def _within(value: Any, limits: tuple | None) -> bool:
    if limits is None:
        return True
    least, most = limits
    return value >= least and (most is None or value <= most)


def main() -> None:
    """Serve until Ctrl-C; the first line on stdout is the address for CHUTES_API_URL."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0 (the default) takes a free one")
    parser.add_argument("--latency", type=float, default=1.0, help="seconds for one picture")
    parser.add_argument("--token", help="refuse every other token with 401")
    parser.add_argument("--quota", type=int, default=300, help="pictures until 402")
    parser.add_argument("--capacity", type=int, default=64, help="pictures at once until 429")
    parser.add_argument("--cold", type=float, default=0.0, help="seconds of 503 at first")
    parser.add_argument("--disabled", action="append", default=[], help="a model that is off")
    options = vars(parser.parse_args())
    options["disabled"] = tuple(options["disabled"])
    with Simulator(**options) as simulator:
        print(simulator.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            simulator.serve_forever()


if __name__ == "__main__":
    main()
