"""Doorbells: what rings wakes at once, what is lost costs a moment, and nobody is held up."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import Clock, wait_until
from upstream import Answer, refusal

import doorbell
import worker
from doorbell import Doorbell

FOREVER = 3600
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bell():
    bell = Doorbell()
    yield bell
    bell.close()


@pytest.fixture
def asleep(bell):
    """Return a function that has the bell's thread sleep, until it is rung."""
    threads = []

    def sleep():
        threads.append(threading.Thread(target=bell.wait, args=(FOREVER,)))
        threads[-1].start()
        return threads[-1]

    yield sleep
    for thread in threads:
        while thread.is_alive():
            bell.ring()
            thread.join(0.05)


def python(program, *arguments):
    """Start a Python process of our own that says a line when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
    )
    assert process.stdout.readline()
    return process


LISTENER = """
import sys
from pathlib import Path
from doorbell import Doorbell
bell = Doorbell()
bell.listen(Path(sys.argv[1]))
print("listens", flush=True)
bell.wait(3600)
print("rung", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def listener(tmp_path):
    with python(LISTENER, tmp_path / "bell") as process:
        yield process
        process.kill()


def test_a_ring_wakes_who_sleeps(bell, asleep):
    thread = asleep()
    bell.ring()
    thread.join(10)
    assert not thread.is_alive()


def test_a_ring_before_the_sleep_is_not_lost(bell):
    bell.ring()
    bell.wait(FOREVER)


def test_another_process_is_rung(listener, tmp_path):
    assert doorbell.ring(tmp_path / "bell")
    assert listener.stdout.readline() == b"rung\n"


def test_another_thread_rings_through_the_fifo(bell, asleep, tmp_path):
    bell.listen(tmp_path / "bell")
    thread = asleep()
    assert doorbell.ring(tmp_path / "bell")
    thread.join(10)
    assert not thread.is_alive()


def test_nobody_is_rung_where_nobody_listens(tmp_path):
    assert not doorbell.ring(tmp_path / "bell")
    os.mkfifo(tmp_path / "bell")
    assert not doorbell.ring(tmp_path / "bell")


def test_a_frozen_reader_holds_nobody_up(listener, tmp_path):
    listener.send_signal(signal.SIGSTOP)
    for _ in range(70_000):  # More than the pipe holds.
        assert doorbell.ring(tmp_path / "bell")
    listener.send_signal(signal.SIGCONT)
    assert listener.stdout.readline() == b"rung\n"


def test_the_death_of_who_listens_wakes_who_watches(listener, bell, asleep, tmp_path):
    bell.watch(tmp_path / "bell")
    thread = asleep()
    listener.kill()
    thread.join(10)
    assert not thread.is_alive()


def test_a_fifo_that_was_removed_is_made_again(bell, tmp_path):
    path = tmp_path / "bell"
    bell.listen(path)
    path.unlink()
    assert not doorbell.ring(path)
    bell.wait(0)
    assert doorbell.ring(path)
    bell.wait(FOREVER)


def test_another_file_in_its_place_is_left_alone(bell, tmp_path):
    path = tmp_path / "bell"
    path.write_text("not a doorbell")
    bell.listen(path)
    doorbell.ring(path)
    bell.wait(0)
    assert path.read_text() == "not a doorbell"


def test_a_folder_that_takes_no_fifo_costs_only_the_ring(bell, tmp_path):
    bell.listen(tmp_path / "no such folder" / "bell")
    bell.ring()
    bell.wait(FOREVER)


def test_nothing_is_left_open(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    bell = Doorbell()
    bell.listen(tmp_path / "bell")
    bell.watch(tmp_path / "another")
    bell.close()
    bell.close()
    bell.ring()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# Between the processes of a server: each worker here has connections and a doorbell of its own.


@pytest.fixture
def only_rings_wake(monkeypatch):
    """Let nobody look up by himself."""
    monkeypatch.setattr(worker, "MAX_SLEEP", FOREVER)


@pytest.fixture
def both(make, upstream):
    """Return the process that runs the queue, and one that stands by."""
    clock = Clock()
    first, second = make(clock), make(clock)
    first.start().until(first.add(), status="completed")
    second.start()
    return first, second


@pytest.mark.usefixtures("only_rings_wake")
def test_what_is_added_in_another_process_is_begun_at_once(both):
    _, second = both
    assert second.until(second.add(), status="completed")


@pytest.mark.usefixtures("only_rings_wake")
def test_what_is_canceled_in_another_process_is_cut_at_once(both, upstream):
    first, second = both
    upstream.gate.clear()
    task_id = first.add()
    wait_until(lambda: upstream.at_once)
    second.worker.cancel(task_id)
    assert first.ended(task_id).error_code == "canceled"


@pytest.mark.usefixtures("only_rings_wake")
def test_what_ends_in_another_process_wakes_who_waits_at_once(both, upstream):
    first, second = both
    upstream.gate.clear()
    task_id = first.add()
    wait_until(lambda: upstream.at_once)
    waiter = threading.Thread(target=second.worker.waiters.wait, args=(task_id, FOREVER))
    waiter.start()
    wait_until(lambda: second.worker.waiters)
    upstream.gate.set()
    waiter.join(20)
    assert not waiter.is_alive()
    names = [path.name for path in second.config.database_path.parent.iterdir()]
    assert [name for name in names if ".bell." in name] == []


@pytest.mark.usefixtures("only_rings_wake")
def test_who_stands_by_takes_over_at_once(both):
    first, second = both
    first.worker.stop()
    assert second.until(second.add(), status="completed")


class RealClock(Clock):
    def __call__(self):
        return time.time()


@pytest.mark.usefixtures("only_rings_wake")
def test_the_loop_sleeps_until_the_next_thing_is_due(make, upstream):
    answers = iter([refusal(500, "no"), refusal(429, "later"), Answer()])
    upstream.decide = lambda fields: next(answers)
    q = make(RealClock(), RETRY_BACKOFF=0.2, RATE_LIMIT="2/0.5").start()
    assert q.until(q.add(), status="completed").calls == 3


def test_a_lost_ring_costs_a_moment_and_no_task(both):
    first, second = both
    bell = Path(f"{first.config.database_path}.bell")
    bell.unlink()
    assert second.until(second.add(), status="completed")
    bell.unlink(missing_ok=True)
    bell.write_text("in the way")
    assert second.until(second.add(), status="completed")


def test_what_a_dead_process_left_is_removed(both, upstream):
    first, _ = both
    left = Path(f"{first.config.database_path}.bell.1-dead")
    os.mkfifo(left)
    first.until(first.add(), status="completed")
    wait_until(lambda: not left.exists())


def test_who_stops_listening_after_the_end_does_no_harm(tmp_path):
    bell = Doorbell()
    bell.listen(tmp_path / "bell")
    bell.close()
    bell.stop_listening(tmp_path / "bell")
    assert not doorbell.ring(tmp_path / "bell")
