"""What is passed between the modules: tasks, calls, holds, images, and the lists of words."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args

ALL_MODELS = "*"
Status = Literal["pending", "processing", "completed", "failed"]
ErrorCode = Literal[
    "upstream_auth",
    "upstream_payment",
    "upstream_rejected",
    "upstream_error",
    "upstream_timeout",
    "upstream_truncated",
    "not_an_image",
    "image_too_large",
    "interrupted",
    "expired",
    "canceled",
    "storage",
    "internal",
]
STATUSES: tuple[str, ...] = get_args(Status)
ERROR_CODES: tuple[str, ...] = get_args(ErrorCode)


class QueueFull(Exception):
    """There are as many pending tasks as are allowed; nothing was stored."""


class LowOnDisk(Exception):
    """Less disk space is free than the floor allows; nothing was stored."""


class KeyReused(Exception):
    """The idempotency key came with another input before; nothing was stored."""


@dataclass(frozen=True)
class IdempotencyKey:
    """An idempotency key of a client, and the fingerprint of the input that it came with."""

    client: str
    value: str
    fingerprint: str


@dataclass(frozen=True)
class Image:
    """The facts of a whole image file; `extension` is without the dot."""

    content_type: str
    extension: str
    bytes: int
    width: int
    height: int
    sha256: str


@dataclass(frozen=True)
class Task:
    """One image to make, as it stood when it was read.

    `attempts` are those that counted, `calls` all that were made; a call is known by
    the number that `calls` had while it ran. `not_before` is epoch seconds, and null
    where the task may run at once; the other times are UTC text. `bytes`, `width`,
    `height` and `sha256` are the finished image's. `lost_images` came, and could not be stored.
    `inputs` are the images that it edits.
    """

    seq: int
    id: str
    prompt: str
    status: str
    file_path: str | None
    error: str | None
    created_at: str
    updated_at: str
    error_code: str | None
    model: str
    params: dict[str, Any]
    priority: int
    attempts: int
    calls: int
    not_before: float | None
    last_error: str | None
    started_at: str | None
    finished_at: str | None
    content_type: str | None
    bytes: int | None
    width: int | None
    height: int | None
    sha256: str | None
    canceling: int
    retried_as: str | None
    lost_images: int
    retry_of: str | None
    inputs: tuple[Image, ...] = ()


@dataclass(frozen=True)
class NewTask:
    """One image to make, as it is added; `params` is what is sent beside prompt and model.

    A retry chooses the seed anew where it was chosen here, and not asked for. `inputs` are the
    images that it edits.
    """

    id: str
    prompt: str
    model: str
    params: dict[str, Any]
    priority: int = 0
    seed_chosen: bool = False
    inputs: tuple[Image, ...] = ()


@dataclass(frozen=True)
class PastCall:
    """One upstream call of a task; `seconds` and `outcome` are null while it runs."""

    number: int
    started: str
    seconds: float | None
    http_status: int | None
    outcome: str | None
    invocation_id: str | None
    host: str | None


@dataclass(frozen=True)
class Hold:
    """Why the tasks of a model (or of ALL_MODELS) wait, and until when (epoch seconds).

    `step` is the wait in seconds that the next failure doubles, `room` the bytes that
    it must be possible to write, `probe` the one task that tries while the others wait.
    """

    model: str
    reason: str
    until: float
    step: float
    room: int
    probe: str | None


@dataclass(frozen=True)
class NewHold:
    """A hold to be set: `wait` seconds if Chutes named them, else `step`, which doubles."""

    model: str
    reason: str
    step: float
    maximum: float
    wait: float | None = None
    room: int = 0


@dataclass(frozen=True)
class CatalogueState:
    """When Chutes' catalogue was read last, and tried last (epoch seconds), and why in vain.

    `is_awaited` while a task waits for it.
    """

    read_at: float | None
    tried_at: float | None
    is_reading: bool
    error: str | None
    is_awaited: bool


@dataclass(frozen=True)
class Queue:
    """How the whole queue stands. `quota` is Chutes' own: total, used and remaining."""

    pending: int
    processing: int
    paused: bool
    pause_reason: str | None
    oldest_pending: str | None
    calls_today: int
    holds: tuple[Hold, ...]
    quota: tuple[float, float, float] | None


@dataclass(frozen=True)
class Stats:
    """Numbers of all processes since the first start; only tasks and failures can shrink.

    `calls` are those that were sent and have ended, by model. `buckets` are upper bounds in
    seconds, and how many calls took at most that long.
    """

    tasks: dict[str, int]
    failures: dict[str, int]
    calls: dict[str, int]
    buckets: tuple[tuple[float, int], ...]
    upstream_seconds: float
    image_bytes: int


@dataclass(frozen=True)
class QueueView:
    """What a pending task waits for: its place in the line and all that holds it."""

    ahead: int
    processing: int
    paused: bool
    pause_reason: str | None
    holds: tuple[Hold, ...]
    next_start: float | None
    calls_today: int = 0
    processing_of_model: int = 0


@dataclass(frozen=True)
class Limits:
    """What bounds the calls that are started.

    `rate` are so many in so many seconds, `per_day` those that are sent a day (0: no limit),
    and `at_once` those under way at once, by model.
    """

    rate: tuple[int, float] | None = None
    per_day: int = 0
    at_once: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What an answer of Chutes said beside its body; nothing where there was none.

    `quota` is the day's: total, used and remaining.
    """

    status: int | None = None
    invocation_id: str | None = None
    quota: tuple[float, float, float] | None = None


class Remedy(Enum):
    """What a failed call asks of the queue."""

    FAIL = "the task has failed"
    PAUSE = "the task has failed, and so would all others: pause the queue"
    RETRY = "the attempt counts; another may help"
    HOLD_MODEL = "not the task's fault: hold its model, no attempt counted"
    HOLD_ALL = "not the task's fault: hold all tasks, no attempt counted"


class AttemptError(Exception):
    """A call that made no image; the message is a sentence to act on, free of secrets.

    `remedy` says what the queue is to do, `code` is the task's error_code, or a word for
    the record where the task lives on. For a hold: `headline` is a short reason, `wait`
    the seconds that were named, `room` the bytes that could not be written, and
    `has_lost_image` says whether they were paid for.
    """

    remedy = Remedy.RETRY
    code = ""
    headline = ""
    wait: float | None = None
    room = 0
    has_lost_image = False
    reply: Reply | None = None


@dataclass(frozen=True)
class Ending:
    """How a call ended, and what becomes of its task.

    The task's `status` is then completed (with the image and its path), failed, or pending
    again, at once or after `not_before` (epoch seconds). `outcome` is a word for the call,
    and the error_code of a task that failed. A call that was not `counted` used up no
    attempt, and one that was not `sent` is none of the day's calls. `hold` and `pause_reason`
    are for the tasks that wait. `seconds` is what the call took, and `host` where it went, if
    it was this process that made it.
    """

    outcome: str
    status: str
    counted: bool = True
    sent: bool = True
    error: str | None = None
    not_before: float | None = None
    reply: Reply = Reply()
    path: Path | None = None
    image: Image | None = None
    hold: NewHold | None = None
    pause_reason: str | None = None
    has_lost_image: bool = False
    seconds: float | None = None
    host: str | None = None


CANCELED = Ending("canceled", "failed", counted=False, error="A client canceled the task")
SHUTDOWN = Ending("shutdown", "pending", counted=False)
