"""What an answer shows: tasks, the queue, and the words for what a task waits for."""

import time
from datetime import UTC, datetime
from typing import Any

from config import Config
from db import POSITIONS, midnight, stamp
from outputs import is_low_on_disk
from records import ALL_MODELS, QueueView, Task
from web.service import service
from worker import rate_limit


def tasks_json(tasks: list[Task]) -> list[dict[str, Any]]:
    """Show tasks; what the pending ones wait for is read at one instant for all."""
    pending = [task for task in tasks if task.status == "pending"]
    waits: dict[str, tuple[int | None, str]] = {}
    if pending:
        now, is_low = time.time(), is_low_on_disk(service.config)
        queue_views = service.database.queue_views(
            pending, rate_limit(service.config), now, service.config.max_per_day
        )
        for task, queue_view in zip(pending, queue_views, strict=True):
            position = queue_view.ahead + 1 if queue_view.ahead < POSITIONS else None
            waits[task.id] = position, waiting_for(task, queue_view, service.config, now, is_low)
    return [_task_json(task, *waits.get(task.id, (None, None))) for task in tasks]


def _task_json(task: Task, position: int | None, reason: str | None) -> dict[str, Any]:
    return {
        "id": task.id,
        "prompt": task.prompt,
        "status": task.status,
        "file_path": task.file_path,
        "error": task.error,
        "created_at": task.created_at,
        "updated_at": task.updated_at,
        "error_code": task.error_code,
        "model": task.model,
        "params": task.params,
        "priority": task.priority,
        "attempts": task.attempts,
        "queue_position": position,
        "waiting_for": reason,
        "started_at": task.started_at,
        "finished_at": task.finished_at,
        "image": _image_json(task),
        "retried_as": task.retried_as,
    }


def _image_json(task: Task) -> dict[str, Any] | None:
    if task.status != "completed":
        return None
    return {
        "url": f"/images/{task.id}",
        "content_type": task.content_type,
        "bytes": task.bytes,
        "width": task.width,
        "height": task.height,
        "sha256": task.sha256,
    }


def queue_json() -> dict[str, Any]:
    now = time.time()
    queue = service.database.queue(now)
    limit = service.config.rate_limit
    return {
        "pending": queue.pending,
        "processing": queue.processing,
        "paused": queue.paused,
        "pause_reason": queue.pause_reason,
        "concurrency": service.config.concurrency,
        "rate_limit": f"{limit.count}/{limit.seconds:g}" if limit else None,
        "oldest_pending_seconds": age(queue.oldest_pending, now),
        "calls_today": queue.calls_today,
        "held": [
            {"model": hold.model, "reason": hold.reason, "until": stamp(hold.until)}
            for hold in queue.holds
        ],
        "quota": queue.quota
        and dict(zip(("total", "used", "remaining"), queue.quota, strict=True)),
    }


def age(created_at: str | None, now: float) -> int | None:
    """Return the whole seconds since a time as the rows have it, or None."""
    if created_at is None:
        return None
    created = datetime.strptime(created_at, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    return max(0, int(now - created.timestamp()))


def waiting_for(
    task: Task, queue_view: QueueView, config: Config, now: float, low_on_disk: bool = False
) -> str:
    """Say what a pending task waits for: the first thing that would have to change."""
    if queue_view.paused:
        reason = queue_view.pause_reason
        return f"the queue is paused: {reason}" if reason else "the queue is paused"
    if low_on_disk:
        return f"less than {config.min_free_mb} MB are free on the disk (MIN_FREE_MB)"
    for hold in queue_view.holds:
        if hold.probe:
            return f"{hold.reason}; one task is trying now"
        if hold.until <= now:
            continue
        dated = hold.model == ALL_MODELS
        return f"{hold.reason}; next try at {_clock_time(hold.until, now, dated)}"
    if task.not_before and task.not_before > now:
        return (
            f"attempt {task.attempts + 1} of {config.max_attempts} "
            f"at {_clock_time(task.not_before, now)}, after: {task.last_error}"
        )
    most = config.max_per_day
    if most and queue_view.calls_today >= most:
        tomorrow = _clock_time(midnight(now) + 86400, now, dated=True)
        return f"the limit of {most} calls a day (MAX_PER_DAY); next start at {tomorrow}"
    if queue_view.next_start:
        limit = config.rate_limit
        return (
            f"the rate limit of {limit.count} in {limit.seconds:g} s; "
            f"next start at {_clock_time(queue_view.next_start, now)}"
        )
    if queue_view.ahead > POSITIONS:
        return f"more than {POSITIONS} tasks ahead"
    if queue_view.ahead:
        return f"{queue_view.ahead} task{'s' if queue_view.ahead > 1 else ''} ahead"
    if queue_view.processing >= config.concurrency:
        return f"all {config.concurrency} places are busy"
    return "it is about to start"


def _clock_time(when: float, now: float, dated: bool = False) -> str:
    """Write a time of today as its hour, of another day with its date."""
    moment, today = datetime.fromtimestamp(when, UTC), datetime.fromtimestamp(now, UTC)
    dated = dated or moment.date() != today.date()
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC" if dated else "%H:%M:%S UTC")
