"""Who may come in: the holders of a key, and no other site's pages."""

import fcntl
import functools
import hashlib
import hmac
import itertools
import os
import re
import secrets
import uuid
from pathlib import Path
from urllib.parse import urlsplit

from flask import request

from config import Config, ConfigError
from urls import is_loopback
from web.errors import Refusal

_SECRET_BYTES = 32
_SIGNATURE = 32


class Signer:
    """Sign the addresses of images, so that they can be fetched without a key.

    Each signature is for one image and nothing else, and holds for as long as the secret
    beside the database, which is made once, for this user's eyes alone.
    """

    def __init__(self, database_path: Path):
        path = Path(f"{database_path}.secret")
        self._secret = _secret(path)
        if len(self._secret) != _SECRET_BYTES:
            raise ConfigError(
                f"{path}: must hold {_SECRET_BYTES} bytes; remove it, and a new one is made, "
                "which the image addresses given out before do not fit"
            )

    def sign(self, task_id: str) -> str:
        """Return the signature for the image of this task; 100 of them fit into one address."""
        return self._digest(task_id)[:_SIGNATURE]

    def has_signed(self, task_id: str, signature: str) -> bool:
        """Return, in constant time, whether the signature is the one for this image."""
        digest, size = self._digest(task_id), len(signature)
        # Those that were given out once were the whole digest.
        is_long_enough = size in (_SIGNATURE, len(digest))
        return is_long_enough and hmac.compare_digest(digest[:size].encode(), _bytes(signature))

    def _digest(self, task_id: str) -> str:
        return hmac.new(self._secret, f"image {task_id}".encode(), "sha256").hexdigest()


def _secret(path: Path) -> bytes:
    """Read the secret; make it where there is none, once, whoever else does the same."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:
        os.fchmod(file.fileno(), 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        found = file.read()
        if not found:
            found = secrets.token_bytes(_SECRET_BYTES)
            file.write(found)
            file.flush()
            os.fsync(file.fileno())
        return found


def request_id(config: Config) -> str:
    """Return the X-Request-ID that came with the request, if it is a plain one, or a new one."""
    given = request.environ.get("HTTP_X_REQUEST_ID", "")
    if not given or not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given):
        return str(uuid.uuid4())
    return given if config.scrub(given) == given else str(uuid.uuid4())


def check_origin(config: Config) -> None:
    """Refuse with 403 what a page of another site has a browser ask for.

    Any page may post a form to a server on loopback, and with a name that it points
    there afterwards (DNS rebinding) read the answers.
    """
    environ = request.environ
    if environ.get("HTTP_SEC_FETCH_SITE", "").lower() == "cross-site":
        advice = "use the server under its own address, and set PUBLIC_URL to that"
        raise Refusal(403, f"A page of another site asks for this; {advice}")
    origin = environ.get("HTTP_ORIGIN")
    if origin is not None and origin.lower() not in _own_origins(config):
        fact = f"The page that asks for this is of another site ({origin[:100]!a})"
        advice = "if it is this server's own, set PUBLIC_URL to its address"
        raise Refusal(403, f"{fact}; {advice}")
    if not config.api_keys and not config.allow_anonymous and not _is_own_host(config.public_url):
        fact = f"This server is not known as {request.host[:100]!a}"
        advice = "set PUBLIC_URL to the address that clients use"
        or_any = "or API_KEYS (or ALLOW_ANONYMOUS=1) to allow any name"
        raise Refusal(403, f"{fact}; {advice}, {or_any}")


def authenticate(config: Config) -> str:
    """Return a name for the holder of the key, which tells nothing of it.

    Refuses with 401 a request without one of API_KEYS, where there are any.
    """
    if not config.api_keys:
        return ""
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    given = [request.headers.get("X-API-Key", "")]
    if scheme.lower() == "bearer":
        given.append(bearer.strip())
    # As bytes, and all of them: compare_digest takes no other text, and its time tells nothing.
    pairs = itertools.product(map(_bytes, given), map(_bytes, config.api_keys))
    matches = [key for one, key in pairs if hmac.compare_digest(one, key)]
    if not matches:
        sentence = "A key is needed: send Authorization: Bearer <key>, or X-API-Key: <key>"
        raise Refusal(401, sentence, {"WWW-Authenticate": "Bearer"})
    return hashlib.sha256(matches[0]).hexdigest()[:16]


def is_signed(signer: Signer) -> bool:
    """Return whether the request is for images, with the right signature of each.

    Who was given a picture may see what it was made of.
    """
    if request.endpoint == "images.image":
        ids = [(request.view_args or {})["name"].partition(".")[0]]
    elif request.endpoint == "images.input_image":
        ids = [(request.view_args or {})["task_id"]]
    elif request.endpoint == "images.archive":
        ids = request.args.getlist("id")
    else:
        return False
    if request.method not in ("GET", "HEAD"):
        return False
    signatures = request.args.getlist("sig")
    are_all = len(ids) == len(signatures) > 0
    return are_all and all(map(signer.has_signed, ids, signatures))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _own_origins(config: Config) -> set[str | None]:
    return {f"{request.scheme}://{request.host}".lower(), config.public_url}


def _is_own_host(public_url: str | None) -> bool:
    """Return whether it is the server's own name, and where proxies gave it, theirs for it too.

    A page of a rebound name can send X-Forwarded-Host, but no other Host.
    """
    before = request.environ.get("werkzeug.proxy_fix.orig", {}).get("HTTP_HOST")
    is_own = _is_own_name(request.host, public_url)
    return is_own and (not before or _is_own_name(before, public_url))


@functools.lru_cache(maxsize=256)
def _is_own_name(netloc: str, public_url: str | None) -> bool:
    try:
        host = urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return False
    return is_loopback(host) or host == urlsplit(public_url or "").hostname
