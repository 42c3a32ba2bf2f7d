"""How it goes: whether the process lives, whether it can serve, and numbers for Prometheus."""

import time
from collections.abc import Iterator, Mapping

from flask import Blueprint, Response
from prometheus_client import core
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from db import DatabaseError
from outputs import is_low_on_disk
from records import ERROR_CODES, STATUSES
from web import answers
from web.errors import Refusal
from web.openapi import operation
from web.service import service

_TEXT = {"type": "string"}
_QUOTA = ("total", "used", "remaining")

bp = Blueprint("health", __name__)


@bp.get("/healthz")
@operation(answers.Health, public=True)
def healthz() -> Response:
    """Ask if the process lives."""
    return answers.Health(status="ok").response()


@bp.get("/readyz")
@operation(answers.Ready)
def readyz() -> Response:
    """Ask if it can serve."""
    if problems := list(_problems()):
        sentence = f"Not ready: {'; '.join(problems)}"
        raise Refusal(503, sentence, {"Retry-After": "10"}, problems=problems)
    return answers.Ready(status="ok", problems=[]).response()


@bp.get("/metrics")
@operation({200: {"description": "Text", "content": {"text/plain": {"schema": _TEXT}}}})
def metrics() -> Response:
    """Read the numbers for Prometheus."""
    return Response(generate_latest(_Collector()), content_type=CONTENT_TYPE_PLAIN_0_0_4)


def _problems() -> Iterator[str]:
    try:
        service.database.check_writable()
        reason = service.database.queue(time.time()).pause_reason
    except DatabaseError as error:
        yield str(error)
    else:
        if reason:
            yield f"the queue is paused: {reason}"
    for fault in service.worker.check_folders():
        yield fault.headline
    if is_low_on_disk(service.config):
        yield f"less than {service.config.min_free_mb} MB are free on the disk (MIN_FREE_MB)"
    if service.worker.is_draining:
        yield "this process is stopping"
    if not service.worker.is_run_by_any():
        yield "no process runs the queue"


class _Collector(Collector):
    """Read the numbers from the database at each scrape: they hold over processes and restarts."""

    def collect(self) -> Iterator[core.Metric]:
        now = time.time()
        stats, queue = service.database.stats(), service.database.queue(now)
        yield _by_label("tasks", "Tasks by status.", "status", STATUSES, stats.tasks)
        by_code = "Failed tasks by error_code."
        yield _by_label("failures", by_code, "error_code", ERROR_CODES, stats.failures)
        under_way = queue.pending + queue.processing
        age = answers.age(queue.oldest_pending, now) or 0
        yield _gauge("queue_depth", "Tasks that wait or run.", under_way)
        yield _gauge("oldest_pending_seconds", "Age of the task that waits longest.", age)
        yield _gauge("held_models", "Holds of models, or of all.", len(queue.holds))
        yield _gauge("paused", "1 while the queue is paused.", queue.paused)
        yield _gauge("calls_today", "Calls to Chutes since 00:00 UTC.", queue.calls_today)
        quota = dict(zip(_QUOTA, queue.quota or (), strict=False))
        yield _by_label("quota", "Chutes' quota, as last reported.", "kind", tuple(quota), quota)
        calls = core.CounterMetricFamily(
            "image_proxy_calls", "Calls to Chutes that have ended, by model.", labels=["model"]
        )
        for model, count in stats.calls.items():
            calls.add_metric([model], count)
        yield calls
        yield core.HistogramMetricFamily(
            "image_proxy_upstream_seconds",
            "Seconds that calls to Chutes took.",
            buckets=[(floatToGoString(b), n) for b, n in stats.buckets],  # type: ignore[no-untyped-call]
            sum_value=stats.upstream_seconds,
        )
        yield core.CounterMetricFamily(
            "image_proxy_image_bytes", "Bytes of all images that were stored.", stats.image_bytes
        )


def _gauge(name: str, text: str, value: float) -> core.Metric:
    return core.GaugeMetricFamily(f"image_proxy_{name}", text, value)


def _by_label(
    name: str, text: str, label: str, words: tuple[str, ...], counts: Mapping[str, float]
) -> core.Metric:
    family = core.GaugeMetricFamily(f"image_proxy_{name}", text, labels=[label])
    for word in words:
        family.add_metric([word], counts.get(word, 0))
    return family
