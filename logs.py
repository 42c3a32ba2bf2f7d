"""The log lines: their two formats, and the promise that no secret is in one."""

import functools
import json
import logging
import re
import time
from collections.abc import Callable

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_AMBIGUOUS = re.compile(r'[\s="]')
_OWN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Formatter(logging.Formatter):
    """Format a record as one line, scrubbed of secrets; only a traceback adds lines.

    What was passed as `extra` follows the message as key=value. Control characters
    are escaped and values quoted, so that no text from outside can forge a line or a fact.
    """

    _time_format = "%Y-%m-%d %H:%M:%S"

    def __init__(self, scrub: Callable[[str], str]):
        super().__init__()
        self._scrub = scrub

    def format(self, record: logging.LogRecord) -> str:
        return self._scrub(self._lay_out(record))

    def _lay_out(self, record: logging.LogRecord) -> str:
        words = [f"{self._when(record)} {record.process} {record.levelname}"]
        words.append(_one_line(record.getMessage()))
        words += [f"{key}={_value(value)}" for key, value in _extra(record).items()]
        line = " ".join(words)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line

    def _when(self, record: logging.LogRecord) -> str:
        return f"{_second(self._time_format, int(record.created))}.{int(record.msecs):03d}"


class JsonFormatter(Formatter):
    """Format a record as one JSON object on one line, its traceback included."""

    _time_format = "%Y-%m-%dT%H:%M:%S"

    def _lay_out(self, record: logging.LogRecord) -> str:
        fields = {
            "time": f"{self._when(record)}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(
            {
                key: self._scrub(value) if isinstance(value, str) else value
                for key, value in fields.items()
            },
            default=str,
        )


def formatter(log_format: str, scrub: Callable[[str], str]) -> Formatter:
    """Return the formatter for a LOG_FORMAT."""
    return (JsonFormatter if log_format == "json" else Formatter)(scrub)


def to_stderr(log_format: str, scrub: Callable[[str], str]) -> None:
    """Send every record of this process to stderr, unless someone has seen to it already."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(log_format, scrub))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


@functools.lru_cache(maxsize=8)
def _second(form: str, second: int) -> str:
    return time.strftime(form, time.gmtime(second))


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {
        key: value
        for key, value in vars(record).items()
        if key not in _OWN_FIELDS and value is not None
    }


def _value(value: object) -> str:
    """Quote what would not end where the next fact begins."""
    text = str(value)
    return _one_line(json.dumps(text, ensure_ascii=False) if _AMBIGUOUS.search(text) else text)


def _one_line(text: str) -> str:
    if text.isprintable():
        return text
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
