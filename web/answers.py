"""What goes out: the models that build each JSON answer and document it, and `waiting_for`."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from flask import Response
from pydantic import BaseModel, Field, WithJsonSchema

import records
from config import Config
from db import CATALOGUE_AWAITED, POSITIONS, midnight
from records import ALL_MODELS, ErrorCode, QueueView, Status

_Id = Annotated[str, Field(json_schema_extra={"format": "uuid"})]
_Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", description="UTC")]
# 300 is shown as 300, not as 300.0.
_Number = Annotated[int | float, WithJsonSchema({"type": "number"})]


class Answer(BaseModel, extra="forbid", json_schema_serialization_defaults_required=True):
    """A JSON object, with every key there and no other."""

    status_code: ClassVar[int] = 200
    # What the document says beside the body: headers, and operations that take its id.
    headers: ClassVar[dict[str, str]] = {}
    links: ClassVar[dict[str, str]] = {}

    @classmethod
    def of(cls, record: Any, **more: Any) -> Self:
        """Show what a record knows of the answer's keys; `more` are the others.

        Nothing is checked: a row that is not as documented must not fail a page of others.
        """
        return cls.model_construct(**{**vars(record), **more})

    def response(self, headers: Mapping[str, str] | None = None, status: int = 0) -> Response:
        """Return the keys that were given, as one line."""
        text = self.model_dump_json(exclude_unset=True, warnings=False) + "\n"
        return Response(text, status or self.status_code, headers, content_type="application/json")


class Accepted(Answer):
    """A task that was added: it is on disk, and Location names its status."""

    status_code: ClassVar[int] = 202
    headers: ClassVar[dict[str, str]] = {"Location": "the status of the new task"}
    links: ClassVar[dict[str, str]] = {
        "status": "the task",
        "task": "the task, with its calls",
        "image": "its picture, once it is there",
        "cancel": "end it",
    }

    id: _Id
    status: Literal["pending"]
    message: str


class Image(Answer):
    """The facts of a picture: one that was made, or one that is edited."""

    url: str
    content_type: Literal["image/png", "image/jpeg", "image/webp"]
    bytes: int
    width: int
    height: int
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Task(Answer):
    """How a task stands."""

    id: str
    prompt: str
    status: Status
    file_path: str | None
    error: str | None
    created_at: _Time
    updated_at: _Time
    error_code: ErrorCode | None
    model: str
    params: dict[str, Any]
    priority: int
    attempts: Annotated[int, Field(ge=0, description="those that counted")]
    queue_position: Annotated[int | None, Field(ge=1, le=POSITIONS, description="1 is next")]
    waiting_for: str | None
    started_at: _Time | None
    finished_at: _Time | None
    image: Image | None
    retried_as: Annotated[str | None, Field(description="the last task that retries this one")]
    retry_of: Annotated[str | None, Field(description="the task that this one retries")]
    inputs: Annotated[list[Image], Field(description="the images that it edits")]


class Call(Answer):
    """One call to Chutes."""

    number: int
    started: _Time
    seconds: float | None
    http_status: int | None
    outcome: str | None
    invocation_id: str | None
    host: str | None


class TaskWithCalls(Task):
    """How a task stands, and what happened call by call."""

    calls: list[Call]


class Tasks(Answer):
    """A page of tasks."""

    headers: ClassVar[dict[str, str]] = {"Link": 'the next page, as `rel="next"`'}

    tasks: list[Task]
    next: str | None


class Retried(Answer):
    """How many tasks were added anew."""

    status_code: ClassVar[int] = 202

    retried: Annotated[int, Field(ge=0)]


class Canceled(Answer):
    """How many tasks were canceled."""

    canceled: Annotated[int, Field(ge=0)]


class Count(Answer):
    """How many tasks a request of the same address by POST would mean now."""

    count: Annotated[int, Field(ge=0)]


class Model(Answer):
    """A model: `fields` in JSON Schema's words, null where nothing is known of them."""

    name: str
    aliases: list[str]
    source: Annotated[Literal["file", "catalogue", "setting"], Field(description="who knows of it")]
    default: bool
    default_edit: Annotated[bool, Field(description="the default where images come along")]
    fields: dict[str, dict[str, Any]] | None
    send: Annotated[
        dict[str, Any], Field(description="fields that are sent where a request does not give them")
    ]
    prompt: Annotated[dict[str, int], Field(description="the prompt's minLength and maxLength")]
    images: Annotated[int, Field(ge=0, description="the most input images that it takes")]
    hot: Annotated[bool | None, Field(description="whether an instance is ready")]
    usd_per_hour: _Number | None


class Catalogue(Answer):
    """When Chutes' catalogue was read last, and why it could not be read since."""

    read_at: _Time | None
    error: str | None


class Models(Answer):
    """The models that are known, or those of MODELS."""

    models: list[Model]
    catalogue: Catalogue | None


class Hold(Answer):
    """Why the tasks of a model, or of all (`*`), wait."""

    model: str
    reason: str
    until: _Time


class Quota(Answer):
    """Chutes' quota, as it was told last."""

    total: _Number
    used: _Number
    remaining: _Number


class Queue(Answer):
    """How the queue stands."""

    pending: int
    processing: int
    paused: bool
    pause_reason: str | None
    concurrency: int
    rate_limit: str | None
    oldest_pending_seconds: int | None
    calls_today: int
    held: list[Hold]
    quota: Quota | None


class QueueAndTasks(Queue, json_schema_serialization_defaults_required=False):
    """How the queue stands, and if `tasks` are asked for, what runs and what is next."""

    running: list[Task] = []
    next: Annotated[list[Task], Field(description="pending, as they are taken")] = []


class Resumed(Queue):
    """How the queue stands, and what failed since the last resume by the cause of the pause."""

    failed_meanwhile: Annotated[int, Field(ge=0)]
    retry: Annotated[str | None, Field(description="what to POST to, to retry those tasks")]


class Health(Answer):
    """The process lives."""

    status: Literal["ok"]


class Ready(Health):
    """Nothing is wrong."""

    problems: Annotated[list[str], Field(max_length=0)]


class Error(Answer, extra="allow"):
    """What is wrong, and what to do; other keys may follow."""

    error: str


class OpenAIImage(Answer, json_schema_serialization_defaults_required=False):
    """A picture in OpenAI's form: either key, as `response_format` says, or as the model does."""

    b64_json: Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})] = ""
    url: Annotated[str, Field(description="signed, so that it needs no key")] = ""


class OpenAIImages(Answer):
    """The pictures, when all are there."""

    created: int
    data: Annotated[list[OpenAIImage], Field(min_length=1, max_length=10)]


class OpenAIModel(Answer):
    """A model that may be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class OpenAIModels(Answer):
    """The models that are known, or those of MODELS."""

    object: Literal["list"]
    data: list[OpenAIModel]


class OpenAIErrorBody(Answer):
    """What is wrong, and what to do; `param` names the field, `code` is a task's error_code."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(Answer):
    """An error in OpenAI's form."""

    error: OpenAIErrorBody


def age(created_at: str | None, now: float) -> int | None:
    """Return the whole seconds since a time as the rows have it, or None."""
    if created_at is None:
        return None
    return max(0, int(now - datetime.fromisoformat(f"{created_at}Z").timestamp()))


def waiting_for(
    task: records.Task, queue_view: QueueView, config: Config, now: float, low_on_disk: bool = False
) -> str:
    """Say what a pending task waits for: the first thing that would have to change."""
    if queue_view.paused:
        reason = queue_view.pause_reason
        return f"the queue is paused: {reason}" if reason else "the queue is paused"
    if low_on_disk:
        return f"less than {config.min_free_mb} MB are free on the disk (MIN_FREE_MB)"
    for hold in queue_view.holds:
        if hold.reason.startswith(CATALOGUE_AWAITED):
            return hold.reason
        if hold.probe:
            return f"{hold.reason}; one task is trying now"
        if hold.until > now:
            until = _clock_time(hold.until, now, dated=hold.model == ALL_MODELS)
            return f"{hold.reason}; next try at {until}"
    if task.not_before and task.not_before > now:
        return (
            f"attempt {task.attempts + 1} of {config.max_attempts} "
            f"at {_clock_time(task.not_before, now)}, after: {task.last_error}"
        )
    maximum = config.max_per_day
    if maximum and queue_view.calls_today >= maximum:
        tomorrow = _clock_time(midnight(now) + 86400, now, dated=True)
        return f"the limit of {maximum} calls a day (MAX_PER_DAY); next start at {tomorrow}"
    limit = config.rate_limit
    if limit and queue_view.next_start:
        return (
            f"the rate limit of {limit.count} in {limit.seconds:g} s; "
            f"next start at {_clock_time(queue_view.next_start, now)}"
        )
    return _place_in_line(task, queue_view, config)


def _place_in_line(task: records.Task, queue_view: QueueView, config: Config) -> str:
    """Say what a task waits for that nothing holds: others, or a place of its own."""
    if queue_view.ahead > POSITIONS:
        return f"more than {POSITIONS} tasks ahead"
    if queue_view.ahead:
        return f"{queue_view.ahead} task{'s' if queue_view.ahead > 1 else ''} ahead"
    if queue_view.processing >= config.concurrency:
        return f"all {config.concurrency} places are busy"
    model = config.file_models.get(task.model)
    if model and model.concurrency and queue_view.processing_of_model >= model.concurrency:
        if model.concurrency == 1:
            return f"the place of {task.model} is busy"
        return f"all {model.concurrency} places of {task.model} are busy"
    return "it is about to start"


def _clock_time(when: float, now: float, dated: bool = False) -> str:
    """Write a time of today as its hour, of another day with its date."""
    moment, today = datetime.fromtimestamp(when, UTC), datetime.fromtimestamp(now, UTC)
    dated = dated or moment.date() != today.date()
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC" if dated else "%H:%M:%S UTC")
