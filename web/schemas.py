"""What a request may hold: its fields, their ranges, and the sentence for each violation."""

import difflib
import functools
import json
import logging
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    WithJsonSchema,
    create_model,
)
from pydantic_core import ErrorDetails, PydanticCustomError, ValidationError

import models
from config import Config, model_name_error
from models import FieldRule, Model
from records import Image, NewTask

MAX_TEXT = 10_000
_SHOWN_VIOLATIONS = 3
# A PNG of one pixel.
_EXAMPLE_URL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNw"
    "aDgAAAKEAYEml6crAAAAAElFTkSuQmCC"
)
_EXAMPLE = 'send one such as {"prompt": "a red fox"}'
# OpenAI's names for models, which no chute bears.
OPENAI_MODEL = r"((chat)?gpt-image|dall-e)(-[A-Za-z0-9._-]{0,80})?"
_SIDE = "(12[89]|1[3-9][0-9]|[2-9][0-9][0-9]|1[0-9]{3}|20[0-3][0-9]|204[0-8])"
_SIZE = rf"^((auto)?|{_SIDE}x{_SIDE})$"
_SIZE_RULE = "auto, or WIDTHxHEIGHT, each from 128 to 2048"
# What other programs call them, and what is no field of a request for one image.
HINTS = {
    "steps": "did you mean num_inference_steps?",
    "cfg_scale": "did you mean guidance_scale?",
    "size": "use width and height",
    "n": "one task makes one image; send it n times",
    "mask": "say in the prompt what is to change, and what is not",
    **dict.fromkeys(
        ("image", "images", "image_b64", "image_b64s", "image_url"),
        "send images to POST /edit, as images",
    ),
    "file_id": "send the image itself, in images",
}
_STREAM_RULE = "false: images come whole here"
_Format = Literal["b64_json", "url"]

log = logging.getLogger("openai")


class Invalid(ValueError):
    """A request that is refused; the message names the field, as `field` does, and the rule."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field and field[:50]


def _plain_text(text: str | None) -> str | None:
    if text and "\0" in text:
        raise ValueError("must not hold a NUL character")
    return text


def _model_name(model: str) -> str:
    if not re.fullmatch(models.NAME, model):
        raise ValueError(f"must be {models.NAME_RULE}")
    return model


def _whole(value: Any) -> Any:
    """Take 512.0 for 512, as JSON Schema does; a sender may have no other numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integer(minimum: int, maximum: int) -> tuple[Any, ...]:
    words = f"an integer from {minimum} to {maximum}"
    return Field(ge=minimum, le=maximum, description=words), BeforeValidator(_whole)


def _text(pattern: str = r"^[^\u0000]*$", least: int = 0, most: int = MAX_TEXT) -> tuple[Any, ...]:
    size = f"{least:,} to {most:,}" if least else f"at most {most:,}"
    rule = f"text of {size} characters, without NUL or half of a surrogate pair"
    field = Field(
        min_length=least, max_length=most, description=rule, json_schema_extra={"pattern": pattern}
    )
    return field, AfterValidator(_plain_text)


_PROMPT = r"^[^\u0000]*[^\s\u0000][^\u0000]*$"


class Generate(BaseModel, strict=True, extra="forbid", allow_inf_nan=False, frozen=True):
    """The body of a request for one image, beside the fields of its model.

    Null for an optional field means its default.
    """

    example: ClassVar = {"prompt": "a red fox in the snow", "width": 1024, "height": 768, "seed": 7}
    default_setting: ClassVar = "DEFAULT_MODEL"

    prompt: Annotated[str, *_text(_PROMPT)]
    model: Annotated[str, Field(description="text"), AfterValidator(_model_name)]
    priority: Annotated[int | None, *_integer(-100, 100)] = 0

    @classmethod
    def default_model(cls, config: Config) -> str:
        """Return the model of a request that names none."""
        name: str = getattr(config, cls.default_setting.lower())
        return name

    @classmethod
    def model_asked_for(cls, fields: Mapping[str, Any], config: Config) -> Any:
        """Return the model that a request names, or the default one."""
        return cls.default_model(config) if fields.get("model") is None else fields["model"]

    @classmethod
    def translated(cls, fields: dict[str, Any], model: Model) -> dict[str, Any]:
        """Return the fields of a request in this server's words."""
        return fields

    @property
    def count(self) -> int:
        """Return how many images are asked for."""
        return 1


class Generations(Generate, extra="ignore", frozen=True):
    """The body of a request for images in OpenAI's form; fields of no meaning here are ignored.

    The fields of a request for one image may be given beside OpenAI's own; a width or height
    counts more than `size`.
    """

    example: ClassVar = {"prompt": "a red fox", "size": "1024x768", "n": 2}

    n: Annotated[int | None, *_integer(1, 10)] = 1
    size: Annotated[str | None, Field(pattern=_SIZE, description=_SIZE_RULE)] = None
    response_format: Annotated[_Format | None, Field(description="b64_json or url")] = None
    stream: Annotated[Literal[False] | None, Field(description=_STREAM_RULE)] = None

    @classmethod
    def model_asked_for(cls, fields: Mapping[str, Any], config: Config) -> Any:
        asked = fields.get("model")
        is_openais = isinstance(asked, str) and re.fullmatch(OPENAI_MODEL, asked)
        if not is_openais or asked in config.models:
            return cls.default_model(config) if asked in (None, "") else asked
        log.info("a model of OpenAI's means %s", cls.default_setting, extra={"asked": asked})
        return cls.default_model(config)

    @classmethod
    def translated(cls, fields: dict[str, Any], model: Model) -> dict[str, Any]:
        fields, asked, size = dict(fields), fields.get("model"), fields.get("size")
        if fields.get("response_format") is None:
            fields["response_format"] = "url" if str(asked).startswith("dall-e") else "b64_json"
        if isinstance(size, str) and re.fullmatch(f"{_SIDE}x{_SIDE}", size):
            wanted = _in_words_of(model, size)
            fields.update((n, v) for n, v in wanted.items() if fields.get(n) is None)
            if "size" in model.known_fields and "size" not in wanted:
                del fields["size"]
        elif size == "auto":
            del fields["size"]
        return fields

    @property
    def count(self) -> int:
        return self.n or 1


_IMAGE_RULE = "each an image in base64, as a data URL, or the id of a completed task here"
_OPENAI_IMAGE = {
    "type": "object",
    "properties": {"image_url": {"type": "string", "pattern": "^data:[^,]*;base64,"}},
    "required": ["image_url"],
}


class Edit(Generate, frozen=True):
    """The body of a request to edit images, beside the fields of its model."""

    example: ClassVar = {"prompt": "make it night", "images": [_EXAMPLE_URL], "seed": 7}
    default_setting: ClassVar = "DEFAULT_EDIT_MODEL"

    images: Annotated[list[str], Field(min_length=1, description=_IMAGE_RULE)]


class Edits(Generations, extra="ignore", frozen=True):
    """The body of a request to edit images in OpenAI's form."""

    example: ClassVar = {"prompt": "make it night", "images": [{"image_url": _EXAMPLE_URL}]}
    default_setting: ClassVar = "DEFAULT_EDIT_MODEL"

    images: Annotated[
        list[str],
        Field(min_length=1),
        WithJsonSchema({"type": "array", "items": _OPENAI_IMAGE, "minItems": 1}),
    ]

    @classmethod
    def translated(cls, fields: dict[str, Any], model: Model) -> dict[str, Any]:
        if fields.get("mask") is not None:
            raise Invalid(f"mask is not taken: {HINTS['mask']}", "mask")
        return super().translated(fields, model)


def _in_words_of(model: Model, size: str) -> dict[str, Any]:
    """Return the fields of a model that ask for a size of WIDTHxHEIGHT; none where it has none."""
    known = model.known_fields
    if {"width", "height"} <= known.keys():
        return dict(zip(("width", "height"), map(int, size.split("x")), strict=True))
    return {name: size for name in ("size", "resolution") if name in known}


class Request:
    """A request that was understood: its own fields, its model, and what Chutes is sent."""

    def __init__(self, body: Generate, model: Model, inputs: Sequence[Image] = ()):
        self.body = body
        self.model = model
        self.inputs = tuple(inputs)
        given = body.model_dump(include=set(model.known_fields), exclude_none=True)
        self.params = self._in_order({**model.send, **given})

    def canonical_input(self) -> str:
        """Return what makes this request another than others: not what is chosen for it."""
        asked = [self.body.prompt, self.body.priority or 0, self.body.count, self.model.name]
        hashes = [image.sha256 for image in self.inputs]
        return json.dumps([*asked, self.params, *hashes], sort_keys=True)

    def new_tasks(self) -> list[NewTask]:
        """Return the tasks that were asked for, with ids of their own.

        A seed counts up: the same one would pay for the same image again. Where none was asked
        for, and the model is known to take one, it is chosen.
        """
        return [self._new_task(index) for index in range(self.body.count)]

    def _new_task(self, index: int) -> NewTask:
        params, rule = self.params, (self.model.fields or {}).get("seed")
        is_chosen = rule is not None and "seed" not in params
        if "seed" in params:
            params = {**params, "seed": (params["seed"] + index) % 2**32}
        elif rule:
            params = self._in_order({**params, "seed": models.choose_seed(rule)})
        return NewTask(
            *(str(uuid.uuid4()), self.body.prompt, self.model.name, params),
            priority=self.body.priority or 0,
            seed_chosen=is_chosen,
            inputs=self.inputs,
        )

    def _in_order(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return the fields as the model lists them: the same bytes sent again may cost less."""
        return {name: params[name] for name in self.model.known_fields if name in params}


def parse(
    kind: type[Generate], body: bytes, config: Config, find: Callable[[str], Model]
) -> Request:
    """Read a request from JSON, or raise Invalid; `find` returns what is known of a model."""
    return understand(kind, json_object(body), config, find)


def understand(
    kind: type[Generate],
    fields: dict[str, Any],
    config: Config,
    find: Callable[[str], Model],
    inputs: Sequence[Image] | None = None,
    is_form: bool = False,
) -> Request:
    """Check the fields of a request, or raise Invalid; `find` returns what is known of a model.

    `inputs` are the images that came with a request to edit some. Each field of a form is a
    list of texts.
    """
    fields = {n: v[0] if is_form and len(v) == 1 else v for n, v in fields.items()}
    prompt = fields.get("prompt")
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        raise Invalid("Prompt is required", "prompt")
    name = kind.model_asked_for(fields, config)
    name = _read_texts("model", name, None) if is_form else name
    is_name = isinstance(name, str) and re.fullmatch(models.NAME, name)
    model = find(name) if is_name else models.ANY_MODEL
    # Those of which nothing is known share a kind: anyone may make up names.
    kind = body_of(kind, models.ANY_MODEL if model.source == "setting" else model)
    fields = _read_form(fields, model) if is_form else fields
    fields = {**kind.translated(fields, model), "model": name}
    if inputs is not None:
        fields["images"] = [image.sha256 for image in inputs]
    # Null means the default; an unknown field is refused even so.
    given = {n: v for n, v in fields.items() if v is not None or n not in kind.model_fields}
    if inputs is not None and is_name:
        _check_inputs(model, len(inputs))
    try:
        request = Request(kind.model_validate(given), model, inputs or ())
    except ValidationError as error:
        raise _invalid(error, kind, model) from error
    check_allowed(model, config, len(request.inputs))
    return request


def check_allowed(model: Model, config: Config, inputs: int) -> None:
    """Raise Invalid where a model may not be used, or not with so many input images."""
    if config.models and not {model.name, *model.aliases} & {
        config.canonical(name) for name in config.models
    }:
        there_are = ", ".join(config.models)
        raise Invalid(f"model must be one of {there_are}, not {_shown(model.name)}", "model")
    if rule := model_name_error(model.name, config, model):
        raise Invalid(f"model must be {rule}", "model")
    if inputs:
        _check_inputs(model, inputs)
    elif model.images and model.images.minimum:
        sentence = f"{model.name} edits images: send it some, with POST /edit"
        raise Invalid(f"model must be one that takes a prompt alone; {sentence}", "model")


def _check_inputs(model: Model, count: int) -> None:
    """Raise Invalid where a model does not take so many images; none is never enough."""
    if model.source == "setting":
        advice = "GET /models tells which do"
        raise Invalid(f"{_shown(model.name)} is not known to take images; {advice}", "model")
    if model.images is None:
        advice = "name one whose images in GET /models is above 0, or use POST /generate"
        raise Invalid(f"{model.name} takes no images; {advice}", "model")
    minimum, maximum = max(1, model.images.minimum), model.images.maximum
    if not minimum <= count <= maximum:
        numbers = f"{minimum} to {maximum}" if minimum < maximum else f"{maximum}"
        raise Invalid(f"images must be {numbers} for {model.name}, not {count}", "images")


@functools.lru_cache(maxsize=512)
def body_of(kind: type[Generate], model: Model) -> type[Generate]:
    """Return the kind of body with the fields that a model has."""
    reserved = kind.model_fields.keys() - {"size"}
    own: dict[str, Any] = {
        name: (_annotation(rule), None)
        for name, rule in model.known_fields.items()
        if name not in reserved
    }
    if model.prompt.model_fields_set:
        least, most = model.prompt.minLength or 0, model.prompt.maxLength
        limits = _text(_PROMPT, least, MAX_TEXT if most is None else min(most, MAX_TEXT))
        own["prompt"] = (Annotated[str, *limits], ...)
    made: type[Generate] = create_model(kind.__name__, __base__=kind, __doc__=kind.__doc__, **own)
    return made


def _annotation(rule: FieldRule) -> Any:
    """Return the type of a field, with its limits and with its rule in words."""
    limits = Field(ge=rule.minimum, le=rule.maximum, description=rule_in_words(rule))
    if rule.enum:
        field = Field(description=rule_in_words(rule))
        return Annotated[Any, field, AfterValidator(functools.partial(_check_enum, rule.enum))]
    if rule.type == "string":
        most = MAX_TEXT if rule.maxLength is None else min(rule.maxLength, MAX_TEXT)
        return Annotated[str | None, *_text(least=rule.minLength or 0, most=most)]
    if rule.type == "integer":
        return Annotated[int | None, limits, BeforeValidator(_whole)]
    if rule.type == "number":
        return Annotated[float | None, limits]
    kinds: dict[str, Any] = {"boolean": bool | None, "array": list | None, "object": dict | None}
    return Annotated[kinds.get(rule.type or "", Any), Field(description=rule_in_words(rule))]


def _check_enum(words: list[Any], value: Any) -> Any:
    if (type(value), value) not in [(type(word), word) for word in words]:
        raise PydanticCustomError("enum", "it is none of them")
    return value


def rule_in_words(rule: FieldRule) -> str:
    """Say what a field takes."""
    if rule.enum:
        return f"one of {', '.join(map(str, rule.enum))}"
    kind = _KINDS.get(rule.type or "", "any value")
    if rule.minimum is not None and rule.maximum is not None:
        return f"{kind} from {rule.minimum} to {rule.maximum}"
    if rule.minimum is not None:
        return f"{kind} of at least {rule.minimum}"
    return kind if rule.maximum is None else f"{kind} of at most {rule.maximum}"


_KINDS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
}


# What a request has beside its model's fields, and that is no text.
_OWN_RULES = {
    "priority": FieldRule(type="integer"),
    "n": FieldRule(type="integer"),
    "stream": FieldRule(type="boolean"),
}


def _read_form(fields: Mapping[str, str | list[str]], model: Model) -> dict[str, Any]:
    """Return what the texts of a form mean for the fields of a request."""
    rules = {**_OWN_RULES, **model.known_fields}
    return {name: _read_texts(name, texts, rules.get(name)) for name, texts in fields.items()}


def _read_texts(name: str, texts: str | list[str], rule: FieldRule | None) -> Any:
    """Return the value of a field: only a list is given part by part."""
    if rule and rule.type == "array":
        return [texts] if isinstance(texts, str) else texts
    if isinstance(texts, list):
        raise Invalid(f"{_shown(name)} is given twice", name)
    return _read_text(texts, rule) if rule else texts


def _read_text(text: str, rule: FieldRule) -> Any:
    """Return the value of a text; what the rule does not take stays as it is, to be refused."""
    if rule.enum:
        return next((w for w in rule.enum if text in (w, json.dumps(w))), text)
    if rule.type == "string":
        return text
    if not text.strip():
        return None
    try:
        return json.loads(text.lower() if rule.type == "boolean" else text, parse_int=_any_integer)
    except (ValueError, RecursionError):
        return text


def json_object(body: bytes) -> dict[str, Any]:
    """Read a JSON object, or raise Invalid."""
    try:
        value = json.loads(body, parse_int=_any_integer)
    except RecursionError:
        raise Invalid("The body is nested too deeply") from None
    except ValueError as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise Invalid(f"The body is not valid JSON ({reason}); {_EXAMPLE}") from error
    if not isinstance(value, dict):
        raise Invalid(f"The body is not a JSON object; {_EXAMPLE}")
    return value


def _any_integer(digits: str) -> int:
    """Read an integer of any length: past these digits it is out of every range anyway."""
    return int(digits[:100])


def _invalid(error: ValidationError, kind: type[Generate], model: Model) -> Invalid:
    violations = error.errors(include_url=False)
    sentences = [_sentence(violation, kind, model) for violation in violations[:_SHOWN_VIOLATIONS]]
    if len(violations) > _SHOWN_VIOLATIONS:
        sentences.append(f"and {len(violations) - _SHOWN_VIOLATIONS} more")
    if model.fields is not None and any(v["type"] == "extra_forbidden" for v in violations):
        sentences.append(f"{model.name} takes {', '.join(model.fields) or 'a prompt alone'}")
    return Invalid("; ".join(sentences), next(map(str, violations[0]["loc"]), None))


def _sentence(violation: ErrorDetails, kind: type[Generate], model: Model) -> str:
    if not violation["loc"]:
        return "The name of a field holds half of a surrogate pair"
    name = str(violation["loc"][0])
    is_models = name in (model.fields or ()) or (name == "prompt" and model.prompt.model_fields_set)
    of_model = f" for {model.name}" if is_models else ""
    if violation["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name[:100].lower(), kind.model_fields, n=1)
        nearest = f"did you mean {close[0]}?" if close else ""
        hint = HINTS.get(name.lower(), nearest)
        return f"{_shown(name)} is not a field{f'; {hint}' if hint else ''}"
    if violation["type"] == "value_error":
        return f"{name} {violation['ctx']['error']}"
    rule = kind.model_fields[name].description
    return f"{name} must be {rule}{of_model}, not {_shown(violation['input'])}"


def _shown(value: Any) -> str:
    """Show a refused value in a few plain characters, whatever it is."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, str) and len(value) > 40:
        return f"text of {len(value):,} characters"
    if isinstance(value, int) and abs(value) > 10**20:
        return "so large a number"
    return json.dumps(value)
