"""What a request may hold: its fields, their ranges, and the sentence for each fault."""

import difflib
import json
from collections.abc import Sequence
from typing import Annotated, Any

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

from config import model_fault

MAX_TEXT = 10_000
_SHOWN_FAULTS = 3
_EXAMPLE = 'send one such as {"prompt": "a red fox"}'


class Invalid(ValueError):
    """A request that is refused; the message names the field and the rule."""


def _plain_text(text: str | None) -> str | None:
    if text and "\0" in text:
        raise ValueError("must not hold a NUL character")
    return text


def _model_name(model: str, info: ValidationInfo) -> str:
    rule = model_fault(model, info.context["model_in_url"])
    if rule:
        raise ValueError(f"must be {rule}")
    return model


_TEXT_RULE = f"text of at most {MAX_TEXT:,} characters, without NUL or half of a surrogate pair"
_TEXT = (Field(max_length=MAX_TEXT, description=_TEXT_RULE), AfterValidator(_plain_text))


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

    prompt: Annotated[str, *_TEXT]
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
        return self.model_dump(exclude={"prompt", "model", "priority"}, exclude_none=True)


def parse_generate(
    body: bytes, default_model: str, model_in_url: bool, models: Sequence[str] = ()
) -> Generate:
    """Read a request for one image from JSON, or raise Invalid; no `models` allow all."""
    fields = _json_object(body)
    if _is_blank(fields.get("prompt")):
        raise Invalid("Prompt is required")
    if fields.get("model") is None:
        fields["model"] = default_model
    try:
        wanted = Generate.model_validate(fields, context={"model_in_url": model_in_url})
    except ValidationError as error:
        raise Invalid(_sentence(error)) from error
    if fault := model_not_allowed(wanted.model, models):
        raise Invalid(fault)
    return wanted


def model_not_allowed(model: str, models: Sequence[str]) -> str | None:
    """Return the sentence that names the models allowed, or None where this one is."""
    if not models or model in models:
        return None
    return f"model must be one of {', '.join(models)}, not {_shown(model)}"


def _is_blank(prompt: Any) -> bool:
    return prompt is None or (isinstance(prompt, str) and not prompt.strip())


def _json_object(body: bytes) -> dict[str, Any]:
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


def _sentence(error: ValidationError) -> str:
    faults = error.errors(include_url=False)
    told = "; ".join(_fault(fault) for fault in faults[:_SHOWN_FAULTS])
    more = len(faults) - _SHOWN_FAULTS
    return f"{told}; and {more} more" if more > 0 else told


def _fault(fault: dict[str, Any]) -> str:
    if not fault["loc"]:
        return "The name of a field holds half of a surrogate pair"
    name = fault["loc"][0]
    if fault["type"] == "extra_forbidden":
        return f"{_shown(name)} is not a field{_nearest(name)}"
    if fault["type"] == "value_error":
        return f"{name} {fault['ctx']['error']}"
    rule = Generate.model_fields[name].description
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
