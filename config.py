"""The settings: read from the environment and `.env`, checked once, then frozen."""

import difflib
import errno
import functools
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
)

import models
import redact
import urls
from models import Model
from urls import is_loopback

ROOT = Path(__file__).resolve().parent
# How similar a name in .env must be to a setting's to count as a misspelling of it, 0 to 1.
_SIMILARITY = 0.8

log = logging.getLogger("config")


class ConfigError(ValueError):
    """A setting that stops the start; the message names it, its value and the rule."""


@dataclass(frozen=True)
class RateLimit:
    """At most `count` calls started in any `seconds`."""

    count: int
    seconds: float


def _rule(
    words: str, pattern: str = "(?s).*", read: Callable[[str], Any] = str, **constraints: Any
) -> tuple[Any, ...]:
    """Return what has a text match the pattern and be read, before pydantic sees it.

    Pydantic alone reads too much: 1_0 as an integer, nan as seconds, yes as a flag.
    """

    def check(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError
        return read(text)

    return (Field(description=words, **constraints), BeforeValidator(check))


def _integer(minimum: int, maximum: int) -> tuple[Any, ...]:
    words = f"an integer from {minimum} to {maximum}"
    return _rule(words, "[0-9]{1,18}", ge=minimum, le=maximum)


def _seconds(minimum: float, maximum: float) -> tuple[Any, ...]:
    words = f"seconds, from {minimum} to {maximum}"
    return _rule(words, r"[0-9]{1,9}(\.[0-9]{1,9})?", ge=minimum, le=maximum)


def _split(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _below_root(path: str | Path, info: ValidationInfo) -> Path:
    return Path(info.context or ROOT, path)


def _rate_limit(text: str) -> RateLimit:
    count, seconds = text.split("/")
    if int(count) < 1 or float(seconds) <= 0:
        raise ValueError
    return RateLimit(int(count), float(seconds))


def _origin(url: str) -> str:
    """Return the address as browsers write it in Origin: without the scheme's own port."""
    parts = urlsplit(url.rstrip("/").lower())
    if parts.port == {"http": 80, "https": 443}[parts.scheme]:
        return parts.geturl().removesuffix(f":{parts.port}")
    return parts.geturl()


_TOKEN = _rule("printable ASCII", "[ -~]+", repr=False)
_URL = _rule(urls.RULE, read=functools.partial(urls.check_upstream, variable="model"))
_CHUTE_URL = _rule(
    f"{urls.RULE}, with {{slug}} in it",
    r".*\{slug\}.*",
    functools.partial(urls.check_upstream, variable="slug"),
)
_CATALOGUE_URL = _rule(
    f"off, or {urls.RULE}", read=lambda url: "" if url == "off" else urls.check_upstream(url)
)
_HOST = _rule("a host name or an address", r"[A-Za-z0-9.:\[\]%_-]+", lambda host: host.strip("[]"))
_RATE = _rule(
    "CALLS/SECONDS, for example 60/60", r"[0-9]{1,9}/[0-9]{1,9}(\.[0-9]{1,9})?", _rate_limit
)
_KEYS = _rule(
    "keys of printable ASCII without spaces, separated by commas",
    read=_split,
    min_length=1,
    repr=False,
)
_NAMES = _rule("names, separated by commas", read=_split, min_length=1)
_ORIGIN = _rule(
    "an http or https address without a path, such as https://pictures.example",
    r"https?://([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\])(:\d+)?/?",
    _origin,
)
_Key = Annotated[str, Field(pattern="^[!-~]+$")]
_Path = Annotated[
    Path, Field(description="a path", validate_default=True), BeforeValidator(_below_root)
]


# A file that comes with the code, wherever the other files are.
_ShippedPath = Annotated[
    Path,
    Field(description="a path", validate_default=True),
    BeforeValidator(lambda path: ROOT / path),
]


class Config(BaseModel, frozen=True, alias_generator=str.upper):
    """Hold every setting, checked; a field is named as its variable, in lower case.

    Its description is the rule for its value; repr=False keeps a secret out of errors, too.
    """

    chutes_api_token: Annotated[str, *_TOKEN]
    chutes_api_url: Annotated[str, *_URL] = "https://image.chutes.ai/generate"
    default_model: Annotated[str, *_rule("the name of a model")] = "qwen-image"
    default_edit_model: Annotated[str, *_rule("the name of a model")] = "qwen-image-edit-2511"
    host: Annotated[str, *_HOST] = "127.0.0.1"
    port: Annotated[int, *_integer(1, 65535)] = 3000
    workers: Annotated[int, *_integer(1, 32)] = Field(
        default_factory=lambda: min(2, os.cpu_count() or 1)
    )
    threads: Annotated[int, *_integer(2, 256)] = 16
    database_path: _Path = Path("tasks.sqlite3")
    output_dir: _Path = Path("outputs")
    input_dir: _Path = Path("inputs")
    concurrency: Annotated[int, *_integer(1, 64)] = 4
    rate_limit: Annotated[RateLimit | None, *_RATE] = None
    task_timeout: Annotated[float, *_seconds(1, 1_000_000)] = 600.0
    max_attempts: Annotated[int, *_integer(1, 100)] = 3
    retry_backoff: Annotated[float, *_seconds(0.01, 3600)] = 5.0
    task_ttl: Annotated[int, *_integer(0, 3_000_000_000)] = 604800
    interrupted: Annotated[Literal["retry", "fail"], *_rule("retry or fail")] = "retry"
    shutdown_grace: Annotated[float, *_seconds(0, 3600)] = 25.0
    max_image_mb: Annotated[int, *_integer(1, 1_000_000)] = 50
    max_upload_mb: Annotated[int, *_integer(1, 200)] = 20
    log_format: Annotated[Literal["text", "json"], *_rule("text or json")] = "text"
    allow_anonymous: Annotated[bool, *_rule("0 or 1", "[01]")] = False
    api_keys: Annotated[tuple[_Key, ...], *_KEYS] = ()
    max_pending: Annotated[int, *_integer(1, 1_000_000_000)] = 10000
    max_per_day: Annotated[int, *_integer(0, 1_000_000_000)] = 0
    models: Annotated[tuple[str, ...], *_NAMES] = ()
    models_file: _ShippedPath = Path("models.toml")
    catalogue_url: Annotated[str, *_CATALOGUE_URL] = "https://api.chutes.ai/chutes/"
    chute_url: Annotated[str, *_CHUTE_URL] = "https://{slug}.chutes.ai"
    min_free_mb: Annotated[int, *_integer(0, 1_000_000_000)] = 200
    retention_days: Annotated[int, *_integer(0, 36_500)] = 0
    openai_wait: Annotated[float, *_seconds(1, 86_400)] = 280.0
    public_url: Annotated[str | None, *_ORIGIN] = None
    trusted_proxies: Annotated[int, *_integer(0, 10)] = 0

    _file_models: dict[str, Model] = PrivateAttr(default_factory=dict)

    @property
    def file_models(self) -> dict[str, Model]:
        """Return the models of MODELS_FILE, by each of their names."""
        return self._file_models

    def canonical(self, name: str) -> str:
        """Return what a model of MODELS_FILE is called beside its aliases, or the name itself."""
        model = self._file_models.get(name)
        return model.name if model else name

    @property
    def model_in_url(self) -> bool:
        """Return whether the model is part of the address instead of the body."""
        return "{model}" in self.chutes_api_url

    def scrub(self, text: str) -> str:
        """Return the text with the secrets of the settings replaced by `***`."""
        return redact.scrub(text, self._secrets)

    def reveals_secret(self, text: str) -> bool:
        """Return whether a text repeats one of the secrets, or a part of one."""
        return redact.reveals_secret(text, self._secrets)

    @property
    def _secrets(self) -> tuple[str, ...]:
        return (self.chutes_api_token, *self.api_keys)


# The settings' names, as the environment and .env spell them.
NAMES = tuple(name.upper() for name in Config.model_fields)
_in_force: Config | None = None


def load(environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> Config:
    """Read the settings from `root/.env` and the environment, which wins.

    An empty value counts as not set. Raises ConfigError. A name in `.env` that is no
    setting is logged, and one that is nearly a setting's is an error. The environment is
    not changed, so that a later edit of `.env` is seen at the next reload.
    """
    return from_values(read(environ, root), root)


def read(environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> dict[str, str]:
    """Return the values that `load` checks, as they are written. Raises ConfigError."""
    try:
        values = dotenv_values(root / ".env", interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{root / '.env'} cannot be read: {error}") from error
    _check_names(values, root / ".env")
    values.update((name, value) for name, value in environ.items() if value.strip())
    return {k: v.strip() for k, v in values.items() if v and v.strip()}


def _check_names(names: Iterable[str], file: Path) -> None:
    for name in names:
        if name in NAMES:
            continue
        if close := difflib.get_close_matches(name.upper(), NAMES, 1, _SIMILARITY):
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
    """Check the values, fill in the defaults and return the Config, or raise ConfigError.

    Makes OUTPUT_DIR and INPUT_DIR where there are none; relative paths are below `root`.
    """
    try:
        config = Config.model_validate(values, context=root)
    except ValidationError as error:
        raise _setting_error(error.errors()[0], values) from None
    _read_models(config)
    _check_models(config)
    if violation := bind_error(config, config.host):
        raise ConfigError(violation)
    _check_paths(config)
    return config


def _setting_error(error: Mapping[str, Any], values: Mapping[str, str]) -> ConfigError:
    name = error["loc"][0]
    if error["type"] == "missing":
        return ConfigError(
            f"{name} is not set: put it into .env (see .env.example), "
            "or run `sh script/demo`, which needs no token"
        )
    field = Config.model_fields[name.lower()]
    shown = f"={values[name][:200]}" if field.repr else ""
    return ConfigError(f"{name}{shown}: must be {field.description}")


def _rule_error(name: str, value: object, rule: str) -> ConfigError:
    return ConfigError(f"{name}={value}: must be {rule}")


def _read_models(config: Config) -> None:
    try:
        config.file_models.update(models.load(config.models_file))
    except models.ModelError as error:
        raise ConfigError(f"MODELS_FILE={config.models_file}: {error}") from None


def _check_models(config: Config) -> None:
    defaults = ("DEFAULT_MODEL", "DEFAULT_EDIT_MODEL")
    names = {name: [getattr(config, name.lower())] for name in defaults}
    for name, values in {**names, "MODELS": config.models}.items():
        for model in values:
            if rule := model_name_error(model, config):
                raise _rule_error(name, model, rule)
    allowed = {config.canonical(name) for name in config.models}
    if allowed and config.canonical(config.default_model) not in allowed:
        rule = f"one of MODELS, {', '.join(config.models)}"
        raise _rule_error("DEFAULT_MODEL", config.default_model, rule)


def _check_paths(config: Config) -> None:
    database = config.database_path
    if not os.access(database.parent, os.W_OK | os.X_OK) or database.is_dir():
        rule = "a file, in a folder that exists and is writable"
        raise _rule_error("DATABASE_PATH", database, rule)
    for name, folder in (("OUTPUT_DIR", config.output_dir), ("INPUT_DIR", config.input_dir)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _rule_error(name, folder, f"a folder ({error.strerror})") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise _rule_error(name, folder, "a writable folder")


def model_name_error(name: str, config: Config, model: Model | None = None) -> str | None:
    """Return the rule that a model's name breaks, or None; `model` is what is known of it.

    A name that becomes part of a host name must be a single label: anything else could send
    the token to another host.
    """
    if not re.fullmatch(models.NAME, name):
        return models.NAME_RULE
    model = model or config.file_models.get(name)
    is_in_url = config.model_in_url and (
        model is None or model.url in (models.ROUTER, config.chutes_api_url)
    )
    if is_in_url and not re.fullmatch(urls.LABEL, model.name if model else name):
        return "one DNS label: letters, digits and inner '-', at most 63"
    return None


def bind_error(config: Config, host: str) -> str | None:
    """Return why the server may not listen on this host, or None."""
    if config.api_keys or config.allow_anonymous or is_loopback(host):
        return None
    return (
        f"HOST={host}: anyone who reaches this address could spend your Chutes quota; "
        "set API_KEYS, or HOST to 127.0.0.1, or ALLOW_ANONYMOUS=1 if you mean it"
    )


def port_error(host: str, port: int) -> str | None:
    """Return why nobody can listen at this address, or None; listens there for a moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        advice = "correct HOST and PORT"
        if error.errno == errno.EADDRINUSE:
            advice = f"set another PORT, or stop what listens there (ss -ltnp sport = :{port})"
        return f"HOST={host} PORT={port}: {(error.strerror or '').partition(' (')[0]}; {advice}"
    return None


def listening_error(config: Config) -> str | None:
    """Return why this process may not listen where it does, whoever has told it to, or None.

    A process that gunicorn has forked listens on what its master does.
    """
    return next(filter(None, (bind_error(config, host) for host in _listening_hosts())), None)


def _listening_hosts() -> Iterator[str]:
    for entry in Path("/dev/fd").iterdir():
        with suppress(OSError):  # It is no socket.
            found = socket.socket(fileno=int(entry.name))
            listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            address = found.getsockname()
            found.detach()
            if listens and isinstance(address, tuple):
                yield address[0]
