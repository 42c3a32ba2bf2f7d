"""The log lines: one each, with their facts, and never a secret."""

import json
import logging
import sys

import pytest
from conftest import TOKEN

import logs


def record(message, *args, **extra):
    made = logging.LogRecord("worker", logging.INFO, "", 0, message, args, None)
    vars(made).update(extra)
    return made


@pytest.fixture
def text(configure):
    return logs.formatter("text", configure().scrub)


@pytest.fixture
def as_json(configure):
    return logs.formatter("json", configure().scrub)


def test_a_line_ends_in_its_facts(text):
    line = text.format(record("attempt ended", task="t-1", status=200, reason=None))
    assert line.endswith(" INFO attempt ended task=t-1 status=200")


def test_text_from_outside_cannot_forge_a_line(text):
    line = text.format(record("no: %s", "a\r\n2026-01-01 INFO paid\x1b[2K\u2028", reason="x\ny"))
    assert "\n" not in line and "\r" not in line and "\x1b" not in line and "\u2028" not in line
    assert "a\\r\\n2026-01-01 INFO paid\\x1b[2K" in line


def test_json_is_one_object_a_line(as_json):
    line = as_json.format(record("no: %s", "a\nb", task="t-1"))
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["message"], fields["task"], fields["level"]) == ("no: a\nb", "t-1", "info")


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("spelt", [TOKEN, TOKEN.upper(), f"Bearer {TOKEN}!"])
def test_no_secret_in_message_facts_or_traceback(configure, log_format, spelt):
    try:
        raise ValueError(spelt)
    except ValueError:
        failed = record("no: %s", spelt, reason=spelt)
        failed.exc_info = sys.exc_info()
    line = logs.formatter(log_format, configure().scrub).format(failed)
    assert TOKEN.lower() not in line.lower()
    assert "Traceback" in line and "***" in line
