"""What the benchmark makes of the figures, and that it measures a row."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import benchmark
import harness
import pytest
from conftest import wait_until

ROOT = Path(__file__).resolve().parent.parent
SERVER = ROOT / "script" / "server"
RATE = benchmark.Row("speed", "how fast it is", "per s", "the fastest")
TIME = benchmark.Row("delay", "how slow it is", "ms", "the slowest")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a runner of the benchmark on made-up repeats: its exit code and what it kept."""
    monkeypatch.setattr(benchmark, "Bench", lambda folder: None)

    def run(repeats, *arguments):
        turns = iter(repeats)
        group = ("quick", lambda bench: next(turns), (RATE, TIME))
        monkeypatch.setattr(benchmark, "GROUPS", [group])
        file = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["benchmark", "--json", str(file), *arguments])
        return benchmark.main(), json.loads(file.read_text())

    return run


@pytest.fixture
def kept(tmp_path):
    """Return a maker of files with a ratio for each row."""

    def write(**ratios):
        file = tmp_path / "kept.json"
        rows = {name: {"figure": ratio * 10, "ratio": ratio} for name, ratio in ratios.items()}
        file.write_text(json.dumps({"rows": rows}))
        return str(file)

    return write


def test_a_row_is_the_medians_of_its_repeats_their_ratio_and_the_range(run):
    repeats = [[(10, 40), (1, 2)], [(90, 30), (8, 2)], [(20, 95), (3, 2)]]
    code, found = run(repeats)
    assert code == 0
    assert found["rows"]["speed"] == {
        "figure": 20,
        "reference": 40,
        "ratio": 0.5,
        "low": 10,
        "high": 90,
    }
    assert found["rows"]["delay"]["ratio"] == 1.5


def test_a_quick_run_measures_once_and_only_a_row_shows_that_row(run):
    code, found = run([[(10, 40), (1, 2)]], "--quick", "--only", "delay")
    assert code == 0
    assert list(found["rows"]) == ["delay"]


@pytest.mark.parametrize(
    ("row", "ratio", "verdict"),
    [
        (RATE, 0.51, 0),
        (RATE, 0.49, 1),
        (RATE, 9, 0),
        (TIME, 1.99, 0),
        (TIME, 2.01, 1),
        (TIME, 0, 0),
    ],
)
def test_the_check_fails_where_a_ratio_is_less_than_half_as_good(
    run, kept, capsys, row, ratio, verdict
):
    pairs = [(ratio * 100, 100) if each is row else (100, 100) for each in (RATE, TIME)]
    code, _ = run([pairs], "--quick", "--check", kept(speed=1, delay=1))
    assert code == verdict
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Less than half") == bool(verdict)
    assert (row.name in last) or not verdict


def test_a_row_that_was_not_kept_is_not_checked(run, kept):
    assert run([[(1, 100), (100, 100)]], "--quick", "--check", kept(delay=1))[0] == 0


def test_beside_each_row_stands_how_many_times_the_old_one_it_is(run, kept, capsys):
    run([[(60, 20), (1, 1)]], "--quick", "--against", kept(speed=2))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-2].startswith("speed 60.0 per s 60.0 - 60.0 20.0 3.00 3.00 1.50 how fast")
    assert lines[-1].startswith("delay 1.00 ms 1.00 - 1.00 1.00 1.00 how slow")


def test_a_file_without_figures_is_refused_before_anything_is_measured(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run([], "--check", str(tmp_path / "none.json"))
    assert "none.json has no figures" in capsys.readouterr().err


def test_what_wrk_prints_is_a_rate_only_where_all_was_answered():
    output = "  7105 requests in 2.01s, 1.31MB read\nRequests/sec:   3534.66\n"
    assert harness.wrk_rate(output) == 3534.66
    for fault in ("  Non-2xx or 3xx responses: 3\n", "  Socket errors: connect 0, read 9\n"):
        with pytest.raises(RuntimeError, match="Not all requests were answered"):
            harness.wrk_rate(fault + output)


def test_every_row_but_those_of_growth_is_on_the_page_and_in_the_file_to_check_against():
    groups = [rows for part, _, rows in benchmark.GROUPS if part != "growth"]
    names = [row.name for rows in groups for row in rows]
    page = (ROOT / "docs" / "speed.md").read_text()
    assert re.findall(r"^\| `([a-z0-9-]+)` \|", page, re.M) == names * 2
    assert list(json.loads((ROOT / "docs" / "speed.json").read_text())["rows"]) == names


def test_the_server_is_measured_with_what_it_is_shipped_with(configure):
    plain, added = configure(), re.findall(r"^export (\w+)=", SERVER.read_text(), re.M)
    assert harness.SHIPPED.keys() == {"WORKERS", "THREADS", *added}
    assert harness.SHIPPED["THREADS"] == plain.threads


@pytest.mark.processes
def test_one_row_is_measured_and_kept_and_nothing_stays(tmp_path):
    file = tmp_path / "figures.json"
    subprocess.run(
        [sys.executable, "script/benchmark.py", "--quick", "--only", "status", "--json", file],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        check=True,
    )
    found = json.loads(file.read_text())
    assert list(found) == ["date", "machine", "command", "rows"]
    assert list(found["rows"]) == ["status"]
    row = found["rows"]["status"]
    assert list(row) == ["figure", "reference", "ratio", "low", "high"]
    assert row["low"] == row["figure"] == row["high"] > 0
    assert row["ratio"] == pytest.approx(row["figure"] / row["reference"], rel=1e-3)
    assert list(tmp_path.iterdir()) == [file]
    wait_until(lambda: not processes_of(tmp_path))


def processes_of(folder):
    """Return the processes whose environment names the folder."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if os.fsencode(folder) in environ.read_bytes():
                found.append(environ)
    return found
