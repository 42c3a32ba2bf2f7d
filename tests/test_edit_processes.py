"""Real gunicorn processes that edit images: killed at each step, filled, raced and left alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from edits import edit, png, sent
from server import Server

pytestmark = pytest.mark.processes


@pytest.fixture
def start(tmp_path, upstream):
    """Return a maker of servers that share one folder, one database and one upstream."""
    made = []

    def make(**values):
        values = {"CONCURRENCY": 3, "RETRY_BACKOFF": 0.05, **values}
        made.append(Server(tmp_path / "server", upstream.url, **values))
        return made[-1].ready()

    yield make
    upstream.gate.set()
    for server in made:
        server.close()


def proportional_size(server):
    """Return the memory of all processes in bytes, what they share counted once."""
    total = 0
    for pid in (server.process.pid, *server.workers()):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024


def test_large_uploads_and_their_calls_take_little_memory(start, upstream):
    pictures = [png(n, 2240) for n in range(10)]
    assert min(map(len, pictures)) > 15_000_000
    server = start(CONCURRENCY=10, WORKERS=2)
    server.running()
    with ThreadPoolExecutor(4) as pool:  # What each process loads with its first edit, stays.
        server.all_end(list(pool.map(lambda n: edit(server, png(n)), range(20))))
    upstream.calls.clear()
    before, peak, done = proportional_size(server), [], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak.append(proportional_size(server))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(10) as pool:
            ids = list(pool.map(lambda n: edit(server, pictures[n], prompt=f"{n}"), range(10)))
        tasks = server.all_end(ids)
    finally:
        done.set()
        watcher.join()
    assert {task["status"] for task in tasks} == {"completed"}
    for fields in upstream.calls:
        assert sent(fields) == [pictures[int(fields["prompt"])]]
    assert max(peak) - before < 24 * 2**20
