"""The settings: read from the environment and `.env`, checked once, then frozen."""

import difflib
import ipaddress
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dotenv import dotenv_values

import redact

ROOT = Path(__file__).resolve().parent
# How alike a name in .env must be to a setting's to be taken for a slip of the pen, 0 to 1.
_NEARLY = 0.8

_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}")
_MODEL_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


log = logging.getLogger("config")


class ConfigError(ValueError):
    """A setting that stops the start; the message names it, its value and the rule."""


@dataclass(frozen=True)
class RateLimit:
    """At most `count` calls started in any `seconds`."""

    count: int
    seconds: float


@dataclass(frozen=True)
class Config:
    """Hold every setting, checked; a field is named as its variable, in lower case."""

    chutes_api_token: str = field(repr=False)
    chutes_api_url: str
    default_model: str
    host: str
    port: int
    workers: int
    threads: int
    database_path: Path
    output_dir: Path
    concurrency: int
    rate_limit: RateLimit | None
    task_timeout: float
    max_attempts: int
    retry_backoff: float
    task_ttl: int
    interrupted: str
    shutdown_grace: float
    max_image_mb: int
    log_format: str
    allow_anonymous: bool
    api_keys: tuple[str, ...] = field(repr=False)
    public_url: str | None
    trusted_proxies: int
    max_pending: int
    max_per_day: int
    models: tuple[str, ...]
    min_free_mb: int
    retention_days: int
    openai_wait: float

    @property
    def model_in_url(self) -> bool:
        """Tell whether the model is part of the address instead of the body."""
        return "{model}" in self.chutes_api_url

    def scrub(self, text: str) -> str:
        """Return the text with the secrets of the settings replaced by `***`."""
        return redact.scrub(text, self._secrets)

    def reveals_secret(self, text: str) -> bool:
        """Tell whether a text repeats one of the secrets, or a part of one."""
        return redact.reveals_secret(text, self._secrets)

    @property
    def _secrets(self) -> tuple[str, ...]:
        return (self.chutes_api_token, *self.api_keys)


def model_fault(model: str, one_label: bool) -> str | None:
    """Return the rule that a model's name breaks, or None.

    With `one_label` the name becomes part of a host name, so that it must be a
    single DNS label: anything else could send the token to another host.
    """
    if one_label:
        rule = "one DNS label: letters, digits and inner '-', at most 63"
        return None if _MODEL_LABEL.fullmatch(model) else rule
    if not _MODEL.fullmatch(model) or ".." in model or "//" in model:
        return (
            "a letter or digit, then at most 99 letters, digits or . _ : / - without '..' or '//'"
        )
    return None


def load(environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> Config:
    """Read the settings from `root/.env` and the environment, which wins.

    An empty value counts as not set. Raises ConfigError. A name in `.env` that is no
    setting is logged, and one that is nearly a setting's is an error. The environment is
    not changed, so that a later edit of `.env` is seen at the next reload.
    """
    try:
        values = dotenv_values(root / ".env", interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{root / '.env'} cannot be read: {error}") from error
    _check_names(values, root / ".env")
    values.update((name, value) for name, value in environ.items() if value.strip())
    return from_values({k: v.strip() for k, v in values.items() if v and v.strip()}, root)


def _check_names(names: Iterable[str], file: Path) -> None:
    for name in names:
        if name in _SETTINGS:
            continue
        if close := difflib.get_close_matches(name.upper(), _SETTINGS, 1, _NEARLY):
            raise ConfigError(f"{name} in {file} is not a setting; did you mean {close[0]}?")
        log.warning("%s in %s is not a setting; it is ignored", name, file)


def reload(check: Callable[[Config], None] = lambda config: None) -> Config:
    """Read the settings anew and put them in force for this process and its forks.

    Where they are bad, or `check` raises ConfigError, those in force stay, and stderr
    says why; raises it where there are none yet.
    """
    global _in_force
    try:
        config = load()
        check(config)
        _in_force = config
    except ConfigError as error:
        if _in_force is None:
            raise
        print(f"{error}. The settings of before stay in force", file=sys.stderr)
    return _in_force


def in_force() -> Config:
    """Return the settings that `reload` put in force, else read them."""
    return _in_force or load()


def from_values(values: Mapping[str, str], root: Path = ROOT) -> Config:
    """Check the values, fill in the defaults and return the Config, or raise ConfigError."""
    settings = {
        name.lower(): _setting(name, values, default, parse)
        for name, (default, parse) in _SETTINGS.items()
    }
    for name in ("database_path", "output_dir"):
        settings[name] = root / settings[name]
    config = Config(**settings)
    _check_together(config)
    return config


def bind_fault(config: Config, host: str) -> str | None:
    """Return why the server may not listen on this host, or None."""
    if config.api_keys or config.allow_anonymous or is_loopback(host):
        return None
    return (
        f"HOST={host}: anyone who reaches this address could spend your Chutes quota; "
        "set API_KEYS, or HOST to 127.0.0.1, or ALLOW_ANONYMOUS=1 if you mean it"
    )


def listening_fault(config: Config) -> str | None:
    """Return why this process may not listen where it does, whoever has told it to, or None.

    A process that gunicorn has forked listens on what its master does.
    """
    return next(filter(None, (bind_fault(config, host) for host in _listened_on())), None)


def _listened_on() -> Iterator[str]:
    for entry in Path("/dev/fd").iterdir():
        with suppress(OSError):  # It is no socket.
            found = socket.socket(fileno=int(entry.name))
            listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            address = found.getsockname()
            found.detach()
            if listens and isinstance(address, tuple):
                yield address[0]


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address can be reached from this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _check_together(config: Config) -> None:
    rule = model_fault(config.default_model, config.model_in_url)
    if rule:
        raise ConfigError(f"DEFAULT_MODEL={config.default_model}: must be {rule}")
    for model in config.models:
        if rule := model_fault(model, config.model_in_url):
            raise ConfigError(f"MODELS={model}: must be {rule}")
    if config.models and config.default_model not in config.models:
        raise ConfigError(
            f"DEFAULT_MODEL={config.default_model}: must be one of MODELS, "
            f"{', '.join(config.models)}"
        )
    if fault := bind_fault(config, config.host):
        raise ConfigError(fault)
    folder = config.database_path.parent
    if not os.access(folder, os.W_OK | os.X_OK) or config.database_path.is_dir():
        raise ConfigError(
            f"DATABASE_PATH={config.database_path}: "
            f"must be a file, in a folder that exists and is writable"
        )
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR={config.output_dir}: must be a folder ({error.strerror})"
        ) from error
    if not os.access(config.output_dir, os.W_OK | os.X_OK):
        raise ConfigError(f"OUTPUT_DIR={config.output_dir}: must be a writable folder")


def _setting(name: str, values: Mapping[str, str], default: Any, parse: Callable) -> Any:
    if name not in values:
        if default is _REQUIRED:
            raise ConfigError(
                f"{name} is not set: put it into .env (see .env.example), "
                "or run `sh script/demo`, which needs no token"
            )
        return default() if callable(default) else default
    try:
        return parse(values[name])
    except ValueError as error:
        shown = "" if parse in (_secret, _secrets) else f"={values[name][:200]}"
        raise ConfigError(f"{name}{shown}: must be {error}") from None


def _secret(text: str) -> str:
    if not re.fullmatch(r"[\x20-\x7e]+", text):
        raise ValueError("printable ASCII")
    return text


def _secrets(text: str) -> tuple[str, ...]:
    keys = tuple(key.strip() for key in text.split(",") if key.strip())
    if not keys or not all(re.fullmatch(r"[\x21-\x7e]+", key) for key in keys):
        raise ValueError("keys of printable ASCII without spaces, separated by commas")
    return keys


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ValueError("names, separated by commas")
    return names


def _public_url(text: str) -> str:
    rule = "an http or https address without a path, such as https://pictures.example"
    if not re.fullmatch(r"https?://([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\])(:\d+)?/?", text):
        raise ValueError(rule)
    try:
        parts = urlsplit(text.rstrip("/").lower())
        port = parts.port
    except ValueError:
        raise ValueError(rule) from None
    # As browsers write it in Origin: without the port that goes without saying.
    if port == {"http": 80, "https": 443}[parts.scheme]:
        return parts.geturl().removesuffix(f":{port}")
    return parts.geturl()


def _url(text: str) -> str:
    rule = "an https address, or http on loopback, without user, query or fragment"
    try:
        parts = urlsplit(text.replace("{model}", "model"))
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError(rule) from None
    if not host or not re.fullmatch(r"[\x21-\x7e]+", text) or re.search(r"[?#@\\]", text):
        raise ValueError(rule)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        raise ValueError(rule)
    return text


def _host(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.:\[\]%_-]+", text):
        raise ValueError("a host name or an address")
    return text.strip("[]")


def _integer(least: int, most: int | None = None) -> Callable[[str], int]:
    rule = f"an integer from {least} to {most}" if most else f"an integer, at least {least}"

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or not _within(int(text), least, most):
            raise ValueError(rule)
        return int(text)

    return parse


def _seconds(least: float, most: float | None = None) -> Callable[[str], float]:
    rule = f"seconds, from {least} to {most}" if most else f"seconds, at least {least}"

    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
            raise ValueError(rule)
        if not _within(float(text), least, most):
            raise ValueError(rule)
        return float(text)

    return parse


def _within(number: float, least: float, most: float | None) -> bool:
    return least <= number and (most is None or number <= most)


def _choice(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(" or ".join(words))
        return text

    return parse


def _flag(text: str) -> bool:
    return _choice("0", "1")(text) == "1"


def _rate_limit(text: str) -> RateLimit:
    rule = "CALLS/SECONDS, for example 60/60"
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9}(?:\.[0-9]{1,9})?)", text)
    if not found or int(found[1]) < 1 or float(found[2]) <= 0:
        raise ValueError(rule)
    return RateLimit(int(found[1]), float(found[2]))


def _default_workers() -> int:
    return min(2, os.cpu_count() or 1)


_REQUIRED = object()
_in_force: Config | None = None

_SETTINGS: dict[str, tuple[Any, Callable]] = {
    "CHUTES_API_TOKEN": (_REQUIRED, _secret),
    "CHUTES_API_URL": ("https://image.chutes.ai/generate", _url),
    "DEFAULT_MODEL": ("qwen-image", str),
    "HOST": ("127.0.0.1", _host),
    "PORT": (3000, _integer(1, 65535)),
    "WORKERS": (_default_workers, _integer(1, 32)),
    "THREADS": (16, _integer(2, 256)),
    "DATABASE_PATH": ("tasks.sqlite3", str),
    "OUTPUT_DIR": ("outputs", str),
    "CONCURRENCY": (4, _integer(1, 64)),
    "RATE_LIMIT": (None, _rate_limit),
    "TASK_TIMEOUT": (600.0, _seconds(1, 1_000_000)),
    "MAX_ATTEMPTS": (3, _integer(1, 100)),
    "RETRY_BACKOFF": (5.0, _seconds(0.01, 3600)),
    "TASK_TTL": (604800, _integer(0, 3_000_000_000)),
    "INTERRUPTED": ("retry", _choice("retry", "fail")),
    "SHUTDOWN_GRACE": (25.0, _seconds(0, 3600)),
    "MAX_IMAGE_MB": (50, _integer(1, 1_000_000)),
    "LOG_FORMAT": ("text", _choice("text", "json")),
    "ALLOW_ANONYMOUS": (False, _flag),
    "API_KEYS": (tuple, _secrets),
    "MAX_PENDING": (10000, _integer(1, 1_000_000_000)),
    "MAX_PER_DAY": (0, _integer(0, 1_000_000_000)),
    "MODELS": (tuple, _names),
    "MIN_FREE_MB": (200, _integer(0, 1_000_000_000)),
    "RETENTION_DAYS": (0, _integer(0, 36_500)),
    "OPENAI_WAIT": (280.0, _seconds(1, 86_400)),
    "PUBLIC_URL": (None, _public_url),
    "TRUSTED_PROXIES": (0, _integer(0, 10)),
}
