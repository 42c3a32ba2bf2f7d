"""Measure the speed and the size of the server on this machine; `script/benchmark` runs it.

Each row is measured on a server that is started for it. Beside the figure stands a reference of
the same run: ratios compare between machines and days, figures do not. A MB is 10^6 bytes.
"""

import argparse
import functools
import json
import os
import platform
import random
import re
import shlex
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import NamedTuple

from harness import LARGE, SMALL, Bench, body, inserts_per_second, milliseconds, run, wait_until

from db import Database

REPEATS, TOLERANCE = 3, 2


class Row(NamedTuple):
    """One line of the table: what is measured, in which unit, and what it is compared to."""

    name: str
    sentence: str
    unit: str
    reference: str


Pairs = list[tuple[float, float]]
Result = dict[str, float]
Measure = Callable[..., Pairs]
GROUPS: list[tuple[str, Measure, tuple[Row, ...]]] = []


def measures(part: str, *rows: Row) -> Callable[[Measure], Measure]:
    """Register a function that returns the figure and the reference of each of these rows.

    `part` is "quick" for every run, "full" for all but --quick, else the option that asks for it.
    """

    def register(measure: Measure) -> Measure:
        GROUPS.append((part, measure, rows))
        return measure

    return register


@measures("quick", Row("submit", "submit to image, idle, 100 kB", "ms", "curl from the upstream"))
def submit(bench: Bench) -> Pairs:
    """Ask the worker that does not run the queue: half of all requests meet it, the slower half."""

    def one() -> None:
        task = json.loads(server.ask("/generate", body(), client))["id"]
        server.ask(f"/images/{task}?wait=60", client=client)

    with bench.server() as server, closing(server.connect()) as client:
        server.make(1, body())
        with server.without(server.runner()):
            server.ask("/healthz", client=client)  # Who accepts a connection keeps it.
        times = []
        for _ in range(30):
            time.sleep(random.uniform(0.02, 0.06))  # Not in step with what polls.
            times.append(milliseconds(one))
    return [(median(times), bench.fetch(SMALL, 30, at_once=1)[0])]


@measures(
    "quick",
    Row("images", "images of 100 kB, 300 submitted at once", "per s", "curl, 4 at once"),
    Row("cpu", "CPU for such an image, all processes", "ms", "curl"),
)
def images(bench: Bench) -> Pairs:
    """Count from the first submit to the last image."""
    with bench.server() as server:
        used = server.cpu()
        each = milliseconds(lambda: server.make(300, body())) / 300
        cpu = (server.cpu() - used) / 300
    reference, reference_cpu = bench.fetch(SMALL, 300)
    return [(1000 / each, 1000 / reference), (cpu, reference_cpu)]


@measures(
    "full",
    Row("large", "MB of images of 20 MB, 30 submitted at once", "per s", "curl, 4 at once"),
    Row("peak", "memory at its highest meanwhile", "MB", "hello-world Flask"),
)
def large(bench: Bench) -> Pairs:
    """Look at the memory every few milliseconds."""
    with bench.server() as server, ThreadPoolExecutor(1) as pool:
        began, memory = time.monotonic(), []
        made = pool.submit(server.make, 30, body(LARGE))
        while not made.done():
            memory.append(server.megabytes())
            time.sleep(0.01)
        made.result()
        each = (time.monotonic() - began) * 1000 / 30
    with bench.server("hello") as hello:
        reference = bench.fetch(LARGE, 30)[0]
        rates = LARGE / 1000 / each, LARGE / 1000 / reference
        return [rates, (max(memory), hello.megabytes())]


@measures("quick", Row("generate", "POST /generate, 16 connections", "per s", "sqlite3 inserts"))
def generate(bench: Bench) -> Pairs:
    """Submit while the calls under way do not end; insert for half a second before and after."""
    with bench.server(MAX_PENDING=1_000_000) as server:
        before = inserts_per_second(server.folder)
        rate = server.rate("/generate", body(seconds=60))
        return [(rate, (before + inserts_per_second(server.folder)) / 2)]


@measures("quick", Row("status", "GET /status/<id>, 16 connections", "per s", "hello-world Flask"))
def status(bench: Bench) -> Pairs:
    """Ask for a task that has ended."""
    with bench.server() as server:
        task = json.loads(server.ask("/generate", body()))["id"]
        server.ask(f"/status/{task}?wait=60")
        rate = server.rate(f"/status/{task}")
    with bench.server("hello") as hello:
        return [(rate, hello.rate("/"))]


@measures(
    "quick",
    Row("memory", "memory, idle", "MB", "hello-world Flask"),
    Row("idle", "CPU, idle", "% of a core", "hello-world Flask"),
)
def idle(bench: Bench) -> Pairs:
    """Let each do nothing for two seconds, after one in which it comes to rest."""
    figures = []
    for code in ("server", "hello"):
        with bench.server(code) as server:
            time.sleep(1)
            used = server.cpu()
            time.sleep(2)
            figures.append((server.megabytes(), (server.cpu() - used) / 20))
    return list(zip(*figures, strict=True))


@measures("full", Row("share", "images of 0.5 s, CONCURRENCY=10", "per s", "the limit"))
def share(bench: Bench) -> Pairs:
    """Make 100, which take five seconds where there are always ten under way."""
    with bench.server(CONCURRENCY=10) as server:
        return [(100_000 / milliseconds(lambda: server.make(100, body(seconds=0.5))), 20)]


@measures("full", Row("busy", "POST /generate with 25 s of backlog", "ms", "with none"))
def busy(bench: Bench) -> Pairs:
    """Submit one at a time, before and after 200 tasks that take half a second each."""
    with bench.server() as server:
        before, after = [], []
        for _ in range(30):
            time.sleep(0.02)  # Each after a rest: who has just been at work answers sooner.
            before.append(milliseconds(lambda: server.ask("/generate", body())))
            server.finish()
        server.submit(200, body(seconds=0.5))
        for _ in range(30):
            time.sleep(0.02)
            after.append(milliseconds(lambda: server.ask("/generate", body())))
    return [(median(after), median(before))]


@measures("full", Row("backlog", "memory with 10,000 pending", "MB", "hello-world Flask"))
def backlog(bench: Bench) -> Pairs:
    """Start with as long a backlog as MAX_PENDING allows."""
    return long_backlog(bench, 10_000)[:1]


@measures(
    "backlog",
    Row("backlog-100k", "memory with 100,000 pending", "MB", "hello-world Flask"),
    Row("start-100k", "start to first call with 100,000 pending", "s", "with 10"),
)
def long_backlog(bench: Bench, pending: int = 100_000) -> Pairs:
    """List the newest tasks, too, before the memory is read."""
    seconds = []
    for count in (10, pending):
        with bench.server(pending=count, wait=False) as server:
            wait_until(lambda: server.queue()[1] > 0)
            seconds.append(time.monotonic() - server.began)
            wait_until(server.is_up)
            server.ask("/tasks")
            memory = server.megabytes()
    with bench.server("hello") as hello:
        return [(memory, hello.megabytes()), (seconds[1], seconds[0])]


OPERATIONS = ("submit", "status", "list", "queue", "metrics", "claim")


@measures(
    "growth",
    *(Row(f"{act}-100k", f"{act} with 100,000 pending", "ms", "with 1,000") for act in OPERATIONS),
    *(Row(f"{act}-1m", f"{act} with 1,000,000 pending", "ms", "with 1,000") for act in OPERATIONS),
)
def growth(bench: Bench) -> Pairs:
    """Do one at a time, without the limit of pending tasks."""
    base, *larger = [operations(bench, count) for count in (1_000, 100_000, 1_000_000)]
    return [pair for times in larger for pair in zip(times, base, strict=True)]


def operations(bench: Bench, pending: int) -> list[float]:
    """Return the milliseconds that each of OPERATIONS takes: the median of 20 turns."""
    with (
        bench.server(pending=pending, MAX_PENDING=100_000_000) as server,
        closing(Database(server.folder / "tasks.sqlite3")) as database,
    ):
        data = body(seconds=60)
        task = json.loads(server.ask("/generate", data))["id"]
        acts: list[Callable[[], object]] = [lambda: server.ask("/generate", data)]
        for path in (f"/status/{task}", "/tasks", "/queue", "/metrics"):
            acts.append(functools.partial(server.ask, path))
        acts.append(lambda: database.claim(time.time()))
        times = [median(milliseconds(act) for _ in range(20)) for act in acts]
        if server.queue()[1] < 20:
            raise RuntimeError("There was not always a task to claim")
        return times


# The table.


def summary(pairs: Pairs) -> Result:
    """Return what is kept of a row's repeats: the medians, their ratio, and the range."""
    figures, references = zip(*pairs, strict=True)
    found = {"figure": median(figures), "reference": median(references)}
    found["ratio"] = found["figure"] / found["reference"]
    found |= {"low": min(figures), "high": max(figures)}
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def is_worse(row: Row, ratio: float, kept: float) -> bool:
    """Return whether a ratio is less than half as good as the one that was kept."""
    return ratio < kept / TOLERANCE if row.unit == "per s" else ratio > kept * TOLERANCE


def short(value: float) -> str:
    """Write three digits, or all that stand before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def line(row: Row, new: Result, old: Result | None) -> str:
    """Return a line of the table, with new/old of figure and ratio where there is an old one."""
    ends = f"{short(new['low'])} - {short(new['high'])}"
    text = f"{row.name:13}{short(new['figure']):>7} {row.unit:12}{ends:>15}"
    text += f"{short(new['reference']):>11}{short(new['ratio']):>9}"
    if old:
        text += "".join(f"{short(new[key] / old[key]):>9}" for key in ("figure", "ratio"))
    return f"{text}   {row.sentence} : {row.reference}"


def kept(name: str) -> dict[str, Result]:
    """Read the rows that --json has kept."""
    try:
        rows: dict[str, Result] = json.loads(Path(name).read_text())["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{name} has no figures ({error})") from error
    return rows


def arguments() -> argparse.Namespace:
    """Read the command line."""
    rows = [row for _, _, rows in GROUPS for row in rows]
    parser = argparse.ArgumentParser(
        prog="script/benchmark",
        description="Measure the server on this machine: each figure beside a reference.",
        epilog="names:\n" + "\n".join(f"  {row.name:13}{row.sentence}" for row in rows),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, names = parser.add_argument, [row.name for row in rows]
    add("--only", action="append", metavar="NAME", choices=names, help="measure this row alone")
    add("--quick", action="store_true", help="measure the quickest rows, each once")
    add("--backlog", action="store_true", help="measure with 100,000 tasks pending, too")
    add("--growth", action="store_true", help="measure with up to 1,000,000 pending, too: minutes")
    add("--json", metavar="FILE", type=Path, help="keep the figures in this file")
    add("--against", metavar="FILE", type=kept, default={}, help="show new/old: figure and ratio")
    add("--check", metavar="FILE", type=kept, default={}, help="fail where a ratio is half as good")
    return parser.parse_args()


def results(options: argparse.Namespace) -> Iterator[tuple[Row, Result]]:
    """Measure what is asked for, and go from row to row."""
    parts = {"quick"} if options.quick else {"quick", "full"}
    parts |= {part for part in ("backlog", "growth") if vars(options)[part]}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for part, measure, rows in GROUPS:
            wanted = options.only or [row.name for row in rows if part in parts]
            if not {row.name for row in rows} & set(wanted):
                continue
            repeats = 1 if options.quick or part == "growth" else REPEATS
            runs = [measure(bench) for _ in range(repeats)]
            for row, *pairs in zip(rows, *runs, strict=True):
                if row.name in wanted:
                    yield row, summary(pairs)


def facts() -> dict[str, str]:
    """Return what the figures depend on."""
    model = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[:1]
    disk = run("stat", "-f", "-c", "%T", tempfile.gettempdir()).strip()
    versions = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} x {' '.join(model) or 'CPU'}, {disk}, {versions}",
        "command": shlex.join(["script/benchmark", *sys.argv[1:]]),
    }


def main() -> int:
    """Print the table; return 1 where --check finds a row worse, else 0."""
    options, about = arguments(), facts()
    rows: dict[str, Result] = {}
    worse = []
    print(*about.values(), sep="\n")
    print(f"{'':13}{'figure':>7} {'':12}{'from - to':>15}{'reference':>11}{'ratio':>9}", end="")
    print(f"{'new/old':>9}{'of ratio':>9}" if options.against else "")
    for row, result in results(options):
        rows[row.name] = result
        print(line(row, result, options.against.get(row.name)), flush=True)
        old = options.check.get(row.name)
        if old and is_worse(row, result["ratio"], old["ratio"]):
            worse.append(f"{row.name} ({short(result['ratio'])}, not {short(old['ratio'])})")
    if options.json:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    if worse:
        print(f"Less than half as good as in the file of --check: {', '.join(worse)}")
    return bool(worse)


if __name__ == "__main__":
    # What is started ends with this program.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
