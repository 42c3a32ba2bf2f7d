"""What a request may hold: its fields, their ranges, and the sentence for each violation."""

import difflib
import json
import logging
import re
import uuid
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationInfo
from pydantic_core import ErrorDetails, ValidationError

from config import Config, model_name_error
from records import NewTask

MAX_TEXT = 10_000
_SHOWN_VIOLATIONS = 3
_EXAMPLE = 'send one such as {"prompt": "a red fox"}'
# OpenAI's names for models, which no chute bears.
OPENAI_MODEL = r"((chat)?gpt-image|dall-e)(-[A-Za-z0-9._-]{0,80})?"
_SIDE = "(12[89]|1[3-9][0-9]|[2-9][0-9][0-9]|1[0-9]{3}|20[0-3][0-9]|204[0-8])"
_SIZE = rf"^((auto)?|{_SIDE}x{_SIDE})$"
_SIZE_RULE = "auto, or WIDTHxHEIGHT, each from 128 to 2048"
# What other programs call them, and what is no field of a request for one image.
_HINTS = {
    "steps": "did you mean num_inference_steps?",
    "cfg_scale": "did you mean guidance_scale?",
    "size": "use width and height",
    "n": "one task makes one image; send it n times",
}
_STREAM_RULE = "false: images come whole here"
_Format = Literal["b64_json", "url"]

log = logging.getLogger("openai")


class Invalid(ValueError):
    """A request that is refused; the message names the field, as `field` does, and the rule."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


def _plain_text(text: str | None) -> str | None:
    if text and "\0" in text:
        raise ValueError("must not hold a NUL character")
    return text


def _model_name(model: str, info: ValidationInfo[Config]) -> str:
    if rule := model_name_error(model, info.context.model_in_url):
        raise ValueError(f"must be {rule}")
    return model


def _whole(value: Any) -> Any:
    """Take 512.0 for 512, as JSON Schema does; a sender may have no other numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(minimum: int, maximum: int, kind: str = "a number") -> Any:
    return Field(ge=minimum, le=maximum, description=f"{kind} from {minimum} to {maximum}")


def _integer(minimum: int, maximum: int) -> tuple[Any, ...]:
    return _number(minimum, maximum, "an integer"), BeforeValidator(_whole)


def _text(pattern: str) -> tuple[Any, ...]:
    rule = f"text of at most {MAX_TEXT:,} characters, without NUL or half of a surrogate pair"
    field = Field(max_length=MAX_TEXT, description=rule, json_schema_extra={"pattern": pattern})
    return field, AfterValidator(_plain_text)


class Generate(BaseModel, strict=True, extra="forbid", allow_inf_nan=False, frozen=True):
    """The body of a request for one image; null for an optional field means its default."""

    example: ClassVar = {"prompt": "a red fox in the snow", "width": 1024, "height": 768, "seed": 7}

    prompt: Annotated[str, *_text(r"^[^\u0000]*[^\s\u0000][^\u0000]*$")]
    model: Annotated[str, Field(description="text"), AfterValidator(_model_name)]
    guidance_scale: Annotated[float | None, _number(0, 20)] = 7.5
    width: Annotated[int | None, *_integer(128, 2048)] = 1024
    height: Annotated[int | None, *_integer(128, 2048)] = 1024
    num_inference_steps: Annotated[int | None, *_integer(1, 100)] = 20
    negative_prompt: Annotated[str | None, *_text(r"^[^\u0000]*$")] = None
    seed: Annotated[int | None, *_integer(0, 2**32 - 1)] = None
    true_cfg_scale: Annotated[float | None, _number(0, 10)] = None
    priority: Annotated[int | None, *_integer(-100, 100)] = 0

    @classmethod
    def translated(cls, fields: dict[str, Any], config: Config) -> dict[str, Any]:
        """Return the fields of a request in this server's words."""
        return fields

    def params(self) -> dict[str, Any]:
        """Return what Chutes is sent beside the prompt and the model."""
        return self.model_dump(include=_PARAMS, exclude_none=True)

    def new_task(self) -> NewTask:
        """Return the task that was asked for, with an id of its own."""
        task_id, priority = str(uuid.uuid4()), self.priority or 0
        return NewTask(task_id, self.prompt, self.model, self.params(), priority)


_PARAMS = Generate.model_fields.keys() - {"prompt", "model", "priority"}


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
    def translated(cls, fields: dict[str, Any], config: Config) -> dict[str, Any]:
        fields, asked, size = dict(fields), fields.get("model"), fields.get("size")
        is_openais = isinstance(asked, str) and re.fullmatch(OPENAI_MODEL, asked)
        if is_openais and asked not in config.models:
            log.info("a model of OpenAI's means DEFAULT_MODEL", extra={"asked": asked})
            fields["model"] = None
        elif asked == "":
            fields["model"] = None
        if fields.get("response_format") is None:
            fields["response_format"] = "url" if str(asked).startswith("dall-e") else "b64_json"
        if isinstance(size, str) and re.fullmatch(_SIZE, size):
            for name, side in zip(("width", "height"), size.split("x"), strict=False):
                if side.isdigit() and fields.get(name) is None:
                    fields[name] = int(side)
        return fields

    def each(self) -> list[Self]:
        """Return the request for each of the images.

        A seed counts up: the same one would pay for the same image again.
        """
        if self.seed is None:
            return [self] * (self.n or 1)
        seeds = [(self.seed + k) % 2**32 for k in range(self.n or 1)]
        return [self.model_copy(update={"seed": seed}) for seed in seeds]


_Kind = TypeVar("_Kind", bound=Generate)


def parse(kind: type[_Kind], body: bytes, config: Config) -> _Kind:
    """Read a request from JSON, or raise Invalid."""
    fields = kind.translated(_json_object(body), config)
    prompt = fields.get("prompt")
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        raise Invalid("Prompt is required", "prompt")
    # Null means the default; an unknown field is refused even so.
    given = {n: v for n, v in fields.items() if v is not None or n not in kind.model_fields}
    try:
        wanted = kind.model_validate({"model": config.default_model, **given}, context=config)
    except ValidationError as error:
        raise _invalid(error, kind) from error
    check_allowed(wanted.model, config)
    return wanted


def check_allowed(model: str, config: Config) -> None:
    """Raise Invalid, which names the models allowed, where this one is none of them."""
    if config.models and model not in config.models:
        there_are = ", ".join(config.models)
        raise Invalid(f"model must be one of {there_are}, not {_shown(model)}", "model")


def _json_object(body: bytes) -> dict[str, Any]:
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


def _invalid(error: ValidationError, kind: type[Generate]) -> Invalid:
    violations = error.errors(include_url=False)
    sentences = [_sentence(violation, kind) for violation in violations[:_SHOWN_VIOLATIONS]]
    if len(violations) > _SHOWN_VIOLATIONS:
        sentences.append(f"and {len(violations) - _SHOWN_VIOLATIONS} more")
    return Invalid("; ".join(sentences), next(map(str, violations[0]["loc"]), None))


def _sentence(violation: ErrorDetails, kind: type[Generate]) -> str:
    if not violation["loc"]:
        return "The name of a field holds half of a surrogate pair"
    name = str(violation["loc"][0])
    if violation["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name[:100].lower(), Generate.model_fields, n=1)
        nearest = f"did you mean {close[0]}?" if close else ""
        hint = _HINTS.get(name.lower(), nearest)
        return f"{_shown(name)} is not a field{f'; {hint}' if hint else ''}"
    if violation["type"] == "value_error":
        return f"{name} {violation['ctx']['error']}"
    rule = kind.model_fields[name].description
    return f"{name} must be {rule}, not {_shown(violation['input'])}"


def _shown(value: Any) -> str:
    """Show a refused value in a few plain characters, whatever it is."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, str) and len(value) > 40:
        return f"text of {len(value):,} characters"
    if isinstance(value, int) and abs(value) > 10**20:
        return "so large a number"
    return json.dumps(value)
