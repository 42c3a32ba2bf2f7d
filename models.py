"""Models: what each one takes, and where it is called, as `models.toml` and the catalogue say."""

import math
import random
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, StrictInt, ValidationError, model_validator

import urls

ROUTER = "https://image.chutes.ai/generate"
NAME = r"(?!.*\.\.)(?!.*//)[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}"
NAME_RULE = "a letter or digit, then at most 99 letters, digits or . _ : / - without '..' or '//'"
# What a request has beside the fields of its model.
RESERVED = {"prompt", "model", "priority", "images", "webhook", "webhook_events_filter"}

Number = StrictInt | Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Json = bool | int | float | str | None


def _name(name: str) -> str:
    if not re.fullmatch(NAME, name):
        raise ValueError(f"must be {NAME_RULE}")
    return name


Name = Annotated[str, AfterValidator(_name)]


class ModelError(ValueError):
    """A fault in a list of models; the message names the model, the key and the rule."""


class _Table(BaseModel, extra="forbid", strict=True, frozen=True):
    pass


class Length(_Table, frozen=True):
    """How many characters a text has."""

    minLength: Annotated[int | None, Field(ge=0)] = None
    maxLength: Annotated[int | None, Field(ge=0)] = None

    @model_validator(mode="after")
    def _check_range(self) -> "Length":
        if (self.minLength or 0) > (10**9 if self.maxLength is None else self.maxLength):
            raise ValueError("must have a minLength that is not above its maxLength")
        return self


class FieldRule(Length, frozen=True):
    """What a field takes, in JSON Schema's words; `default` is what Chutes does without it."""

    type: Literal["integer", "number", "string", "boolean", "array", "object"] | None = None
    minimum: Number | None = None
    maximum: Number | None = None
    enum: Annotated[list[_Json] | None, Field(min_length=1)] = None
    default: Any = None

    @model_validator(mode="after")
    def _check_limits(self) -> "FieldRule":
        if None not in (self.minimum, self.maximum) and self.minimum > self.maximum:  # type: ignore[operator]
            raise ValueError("must have a minimum that is not above its maximum")
        return self


# What any model may be asked for, as long as nothing else is known of it.
ANY_FIELDS = {
    "guidance_scale": FieldRule(type="number", minimum=0, maximum=20),
    "width": FieldRule(type="integer", minimum=128, maximum=2048),
    "height": FieldRule(type="integer", minimum=128, maximum=2048),
    "num_inference_steps": FieldRule(type="integer", minimum=1, maximum=100),
    "negative_prompt": FieldRule(type="string"),
    "seed": FieldRule(type="integer", minimum=0, maximum=2**32 - 1),
    "true_cfg_scale": FieldRule(type="number", minimum=0, maximum=10),
}


class Images(_Table, frozen=True):
    """The field that carries input images in base64; where `maximum` is 1, a text and no list."""

    field: str
    minimum: Annotated[int, Field(ge=0)] = 0
    maximum: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _check_range(self) -> "Images":
        if self.minimum > self.maximum:
            raise ValueError("must have a minimum that is not above its maximum")
        return self


class Model(_Table, frozen=True):
    """A model: `fields` is None where nothing is known, and then those of any model are taken.

    `model` is what the body says, and None where it says nothing. `send` is sent where the request
    does not give it. At most `concurrency` of its calls are made at once.
    """

    name: Name
    url: Annotated[str, AfterValidator(urls.check_upstream)]
    model: str | None = None
    aliases: list[Name] = []
    send: dict[str, Any] = {}
    fields: dict[str, FieldRule] | None = None
    images: Images | None = None
    prompt: Length = Length()
    concurrency: Annotated[int | None, Field(ge=1)] = None
    source: Literal["file", "catalogue", "setting"] = "file"
    hot: bool | None = None
    usd_per_hour: float | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> "Model":
        if reserved := RESERVED & (self.fields or {}).keys():
            raise ValueError(f"fields: {reserved.pop()} is never a field of a model")
        if unknown := self.send.keys() - (self.fields or {}).keys():
            raise ValueError(f"send: {unknown.pop()} must be one of fields")
        return self

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def known_fields(self) -> dict[str, FieldRule]:
        """Return the fields that may be asked for."""
        return ANY_FIELDS if self.fields is None else self.fields


def load(path: Path) -> dict[str, Model]:
    """Read the models of a file, by each of their names; the canonical ones come in its order.

    Raises ModelError, whose message is one line.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"is not valid TOML ({error})") from error
    return by_name([_read(name, table) for name, table in tables.items()])


def by_name(models: Iterable[Model]) -> dict[str, Model]:
    """Return the models by name and by alias, or raise ModelError where two share one."""
    found: dict[str, Model] = {}
    for model in models:
        for name in (model.name, *model.aliases):
            if name in found:
                raise ModelError(f"{model.name}: {name} is a name of {found[name].name} already")
            found[name] = model
    return found


def _read(name: str, table: Any) -> Model:
    if not isinstance(table, dict):
        raise ModelError(f"{name}: must be a table, [{name}]")
    if hidden := {"name", "source", "hot", "usd_per_hour"} & table.keys():
        raise ModelError(f"{name}: {hidden.pop()} is not a key; {_keys()}")
    try:
        return Model.model_validate({"name": name, **table})
    except ValidationError as error:
        raise ModelError(f"{name}: {_violation(error)}") from None


def _keys() -> str:
    known = [k for k in Model.model_fields if k not in ("name", "source", "hot", "usd_per_hour")]
    return f"there are {', '.join(known)}"


def _violation(error: ValidationError) -> str:
    """Say what is wrong first: the key, and the rule that its value breaks."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        where = f"{key} is not a key"
        return f"{where}; {_keys()}" if len(first["loc"]) == 1 else where
    rule = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    if not key:
        return rule
    return f"{key}: {rule[0].lower()}{rule[1:]}"


def of_setting(name: str, url: str) -> Model:
    """Return a model that is known by its name alone, as CHUTES_API_URL calls it."""
    return Model.model_construct(name=name, url=url, model=name, source="setting")


# A model of which nothing is known, not even its name.
ANY_MODEL = of_setting("", ROUTER)


def address(model: Model, router: str) -> tuple[str, str | None]:
    """Return where a model is called, and what `model` in its body says, if anything.

    `router` is CHUTES_API_URL, which takes the place of ROUTER.
    """
    if model.url not in (ROUTER, router):
        return model.url, model.model
    if "{model}" in router:
        return router.replace("{model}", model.name), None
    return router, model.model


def choose_seed(rule: FieldRule) -> int:
    """Return a seed that a field takes, chosen at random."""
    least = 0 if rule.minimum is None else math.ceil(rule.minimum)
    most = 2**32 - 1 if rule.maximum is None else math.floor(rule.maximum)
    return random.randint(least, max(least, most))


def rules(fields: Mapping[str, FieldRule]) -> dict[str, Any]:
    """Return the fields in JSON Schema's words, as they were given."""
    return {name: rule.model_dump(exclude_unset=True) for name, rule in fields.items()}
