"""What a request may hold: its fields, their ranges, and the sentence for each fault."""

import difflib
import json
import re
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from config import model_name_error
from records import NewTask

MAX_TEXT = 10_000
_SHOWN_FAULTS = 3
_EXAMPLE = 'send one such as {"prompt": "a red fox"}'
# OpenAI's names for models, which no chute bears.
OPENAI_MODEL = r"((chat)?gpt-image|dall-e)(-[A-Za-z0-9._-]{0,80})?"
_SIDE = "(12[89]|1[3-9][0-9]|[2-9][0-9][0-9]|1[0-9]{3}|20[0-3][0-9]|204[0-8])"
_SIZE = rf"^((auto)?|{_SIDE}x{_SIDE})$"


class Invalid(ValueError):
    """A request that is refused; the message names the field, as `field` does, and the rule."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


def _plain_text(text: str | None) -> str | None:
    if text and "\0" in text:
        raise ValueError("must not hold a NUL character")
    return text


def _model_name(model: str, info: ValidationInfo) -> str:
    rule = model_name_error(model, info.context["model_in_url"])
    if rule:
        raise ValueError(f"must be {rule}")
    return model


_TEXT_RULE = f"text of at most {MAX_TEXT:,} characters, without NUL or half of a surrogate pair"
_TEXT = (
    Field(
        max_length=MAX_TEXT,
        description=_TEXT_RULE,
        json_schema_extra={"pattern": r"^[^\u0000]*$"},
    ),
    AfterValidator(_plain_text),
)
_NOT_BLANK = Field(json_schema_extra={"pattern": r"^[^\u0000]*[^\s\u0000][^\u0000]*$"})


def _whole(value: Any) -> Any:
    """Take 512.0 for 512, as JSON Schema does; a sender may have no other numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(least: int, most: int) -> tuple[Any, ...]:
    return (Field(ge=least, le=most, description=f"a number from {least} to {most}"),)


def _integer(least: int, most: int) -> tuple[Any, ...]:
    rule = f"an integer from {least} to {most}"
    return (Field(ge=least, le=most, description=rule), BeforeValidator(_whole))


class Generate(BaseModel):
    """The body of a request for one image; null for an optional field means its default."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    example: ClassVar[dict[str, Any]] = {
        "prompt": "a red fox in the snow",
        "width": 1024,
        "height": 768,
        "seed": 7,
    }

    prompt: Annotated[str, *_TEXT, _NOT_BLANK]
    model: Annotated[str, Field(description="text"), AfterValidator(_model_name)]
    guidance_scale: Annotated[float | None, *_number(0, 20)] = 7.5
    width: Annotated[int | None, *_integer(128, 2048)] = 1024
    height: Annotated[int | None, *_integer(128, 2048)] = 1024
    num_inference_steps: Annotated[int | None, *_integer(1, 100)] = 20
    negative_prompt: Annotated[str | None, *_TEXT] = None
    seed: Annotated[int | None, *_integer(0, 2**32 - 1)] = None
    true_cfg_scale: Annotated[float | None, *_number(0, 10)] = None
    priority: Annotated[int | None, *_integer(-100, 100)] = 0

    @field_validator("*")
    @classmethod
    def _default_for_null(cls, value: Any, info: ValidationInfo) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    def params(self) -> dict[str, Any]:
        """Return what Chutes is sent beside the prompt and the model."""
        return self.model_dump(include=_PARAMS, exclude_none=True)


_PARAMS = Generate.model_fields.keys() - {"prompt", "model", "priority"}


class Generations(Generate):
    """The body of a request for images in OpenAI's form; fields of no meaning here are ignored.

    The fields of a request for one image may be given beside OpenAI's own.
    """

    model_config = ConfigDict(extra="ignore")
    example: ClassVar[dict[str, Any]] = {"prompt": "a red fox", "size": "1024x768", "n": 2}

    n: Annotated[int | None, *_integer(1, 10)] = 1
    size: Annotated[
        str | None,
        Field(pattern=_SIZE, description="auto, or WIDTHxHEIGHT, each from 128 to 2048"),
    ] = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None, Field(description="b64_json or url")
    ] = None
    stream: Annotated[Literal[False] | None, Field(description="false: images come whole here")] = (
        None
    )

    def each(self) -> list[Generate]:
        """Return the request for each of the images.

        A seed counts up: the same one would pay for the same image again.
        """
        fields = self.model_dump(include=Generate.model_fields.keys() - {"seed"})
        if self.seed is None:
            return [Generate.model_construct(**fields) for _ in range(self.n)]
        seeds = [(self.seed + k) % 2**32 for k in range(self.n)]
        return [Generate.model_construct(**fields, seed=seed) for seed in seeds]


def new_task(wanted: Generate) -> NewTask:
    """Return the task that was asked for, with an id of its own."""
    task_id = str(uuid.uuid4())
    return NewTask(task_id, wanted.prompt, wanted.model, wanted.params(), wanted.priority)


_Kind = TypeVar("_Kind", bound=Generate)


def parse_generate(
    body: bytes, default_model: str, model_in_url: bool, models: Sequence[str] = ()
) -> Generate:
    """Read a request for one image from JSON, or raise Invalid; no `models` allow all."""
    return _validated(Generate, json_object(body), default_model, model_in_url, models)


def parse_generations(
    fields: dict[str, Any], default_model: str, model_in_url: bool, models: Sequence[str] = ()
) -> Generations:
    """Read a request for images in OpenAI's form, or raise Invalid; no `models` allow all.

    A width or height of its own counts more than `size`.
    """
    fields = dict(fields)
    if fields.get("model") == "" or is_openai_model(fields.get("model"), models):
        fields["model"] = None
    if isinstance(fields.get("size"), str) and re.fullmatch(_SIZE, fields["size"]):
        for name, side in zip(("width", "height"), fields["size"].split("x"), strict=False):
            if side.isdigit() and fields.get(name) is None:
                fields[name] = int(side)
    return _validated(Generations, fields, default_model, model_in_url, models)


def is_openai_model(model: Any, models: Sequence[str] = ()) -> bool:
    """Return whether the model is one of OpenAI's own, and none of `models`."""
    return (
        isinstance(model, str) and model not in models and bool(re.fullmatch(OPENAI_MODEL, model))
    )


def _validated(
    kind: type[_Kind],
    fields: dict[str, Any],
    default_model: str,
    model_in_url: bool,
    models: Sequence[str],
) -> _Kind:
    if _is_blank(fields.get("prompt")):
        raise Invalid("Prompt is required", "prompt")
    if fields.get("model") is None:
        fields = {**fields, "model": default_model}
    try:
        wanted = kind.model_validate(fields, context={"model_in_url": model_in_url})
    except ValidationError as error:
        raise Invalid(_sentence(error, kind), _field(error)) from error
    if fault := model_not_allowed(wanted.model, models):
        raise Invalid(fault, "model")
    return wanted


def model_not_allowed(model: str, models: Sequence[str]) -> str | None:
    """Return the sentence that names the models allowed, or None where this one is."""
    if not models or model in models:
        return None
    return f"model must be one of {', '.join(models)}, not {_shown(model)}"


def _is_blank(prompt: Any) -> bool:
    return prompt is None or (isinstance(prompt, str) and not prompt.strip())


def json_object(body: bytes) -> dict[str, Any]:
    """Read a JSON object, or raise Invalid."""
    try:
        value = json.loads(body, parse_int=_any_integer)
    except RecursionError:
        raise Invalid("The body is nested too deeply") from None
    except ValueError as error:
        raise Invalid(f"The body is not valid JSON ({_reason(error)}); {_EXAMPLE}") from error
    if not isinstance(value, dict):
        raise Invalid(f"The body is not a JSON object; {_EXAMPLE}")
    return value


def _any_integer(digits: str) -> int:
    """Read an integer of any length: past these digits it is out of every range anyway."""
    return int(digits[:100])


def _reason(error: ValueError) -> str:
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _field(error: ValidationError) -> str | None:
    name = (error.errors()[0]["loc"] or (None,))[0]
    return name if isinstance(name, str) else None


def _sentence(error: ValidationError, kind: type[Generate]) -> str:
    faults = error.errors(include_url=False)
    told = "; ".join(_fault(fault, kind) for fault in faults[:_SHOWN_FAULTS])
    more = len(faults) - _SHOWN_FAULTS
    return f"{told}; and {more} more" if more > 0 else told


def _fault(fault: dict[str, Any], kind: type[Generate]) -> str:
    if not fault["loc"]:
        return "The name of a field holds half of a surrogate pair"
    name = fault["loc"][0]
    if fault["type"] == "extra_forbidden":
        return f"{_shown(name)} is not a field{_nearest(name)}"
    if fault["type"] == "value_error":
        return f"{name} {fault['ctx']['error']}"
    rule = kind.model_fields[name].description
    return f"{name} must be {rule}, not {_shown(fault['input'])}"


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name[:100].lower(), Generate.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _shown(value: Any) -> str:
    """Show a refused value in a few plain characters, whatever it is."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, str) and len(value) > 40:
        return f"text of {len(value):,} characters"
    if isinstance(value, int) and abs(value) > 10**20:
        return "so large a number"
    return json.dumps(value)
