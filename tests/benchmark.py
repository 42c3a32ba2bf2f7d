"""Measure what the queue promises in milliseconds and megabytes; `script/benchmark` runs it."""

import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

from conftest import wait_until
from server import Server, memory
from upstream import Upstream, serving

from db import Database
from records import NewTask


def main():
    with tempfile.TemporaryDirectory() as folder, serving(Upstream()) as upstream:
        server = Server(Path(folder) / "server", upstream.url).ready()
        try:
            print(f"{'a task of this process starts after':45} {own(server, upstream)}")
            print(f"{'a task of a standby process starts after':45} {standby(server, upstream)}")
            print(f"{'two idle processes use':45} {idle(server)}")
            server.kill_all()
            for count in (10, 100_000):
                line = f"with {count:,} pending, a start begins work after"
                print(f"{line:45} {backlog(server.folder, upstream, count)}")
        finally:
            server.close()


def own(server, upstream):
    return median(server, upstream, lambda n: server.submit(f"own {n}"))


def standby(server, upstream):
    with closing(Database(server.folder / "tasks.sqlite3")) as database:
        return median(
            server,
            upstream,
            lambda n: database.add([NewTask(f"standby-{n}", f"standby {n}", "m", {})], time.time()),
        )


def median(server, upstream, add):
    """Add a task when nothing else runs, and time it to its arrival at the upstream."""
    server.running()
    taken = []
    for n in range(100):
        calls = len(upstream.calls)
        began = time.time()
        add(n)
        wait_until(lambda: len(upstream.times) > calls)  # noqa: B023
        taken.append((upstream.times[calls] - began) * 1000)
        wait_until(lambda: upstream.at_once == 0)
    return f"{statistics.median(taken):.1f} ms (median of 100, at most {max(taken):.1f})"


def idle(server):
    def ticks():
        return sum(
            sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
            for pid in server.workers()
        )

    before, began = ticks(), time.monotonic()
    wait_until(lambda: time.monotonic() > began + 5)
    return f"{(ticks() - before) / (time.monotonic() - began):.1f} % of a core"


def backlog(folder, upstream, count):
    with closing(Database(folder / "tasks.sqlite3")) as database, database._write() as connection:
        connection.executemany(
            """INSERT INTO tasks
                 (id, prompt, model, params, priority, status, created_at, updated_at)
               VALUES (?, ?, 'm', '{}', 0, 'pending', datetime(), datetime())""",
            ((f"{count}-{n}", "word " * 20) for n in range(count)),
        )
    upstream.gate.clear()
    calls, began = len(upstream.calls), time.monotonic()
    server = Server(folder, upstream.url, MAX_PENDING=1_000_000)
    try:
        wait_until(lambda: len(upstream.calls) > calls)
        taken = time.monotonic() - began
        return f"{taken:.2f} s, in {memory(server.running(), 'VmRSS') / 2**20:.0f} MiB"
    finally:
        server.kill_all()


if __name__ == "__main__":
    main()
