"""Waiting for a task to end, without using up the threads that answer."""

import threading

import pytest
from conftest import wait_until

from doorbell import Doorbell
from waiters import Waiters


class Ends:
    """A database of which a test says what has not ended."""

    def __init__(self, *unfinished):
        self.left = set(unfinished)
        self.looks = []

    def unfinished(self, ids):
        self.looks.append(set(ids))
        return self.left & set(ids)


@pytest.fixture
def make(tmp_path):
    """Return a maker of waiters, with a doorbell each."""
    bells = []

    def build(unfinished, maximum):
        bells.append(Doorbell())
        return Waiters(unfinished, maximum, bells[-1], tmp_path / "bell")

    yield build
    for bell in bells:
        bell.close()


@pytest.fixture
def wait():
    """Return a function that waits in a thread, which is ended with the test."""
    begun = []

    def begin(waiters, task_id, seconds=30, **values):
        thread = threading.Thread(target=waiters.wait, args=(task_id, seconds), kwargs=values)
        thread.start()
        begun.append((waiters, thread))
        return thread

    yield begin
    for waiters, thread in begun:
        waiters.release()
        thread.join()


def waiting(waiters, count):
    wait_until(lambda: waiters.count == count)


def test_the_end_of_a_task_wakes_its_waiters_and_no_others(make, wait):
    waiters = make(Ends("a", "b").unfinished, 10)
    first, second, other = wait(waiters, "a"), wait(waiters, "a"), wait(waiters, "b")
    waiting(waiters, 3)
    waiters.ended("a")
    first.join(10), second.join(10)
    assert [first.is_alive(), second.is_alive(), other.is_alive()] == [False, False, True]


def test_the_end_of_many_tasks_wakes_the_waiters_of_each(make, wait):
    waiters = make(Ends("a", "b", "c").unfinished, 10)
    threads = [wait(waiters, name) for name in "abc"]
    waiting(waiters, 3)
    waiters.ended("a", "c", "d")
    threads[0].join(10), threads[2].join(10)
    assert [thread.is_alive() for thread in threads] == [False, True, False]


def test_a_task_that_has_ended_is_not_waited_for(make, wait):
    assert not wait(make(Ends().unfinished, 10), "a").join(10)


def test_one_look_finds_what_other_processes_have_ended(make, wait):
    ends = Ends("a", "b", "c")
    waiters = make(ends.unfinished, 10)
    threads = {name: wait(waiters, name) for name in ("a", "b", "c")}
    waiting(waiters, 3)
    ends.left = {"c"}
    ends.looks.clear()
    waiters.poll()
    threads["a"].join(10), threads["b"].join(10)
    assert threads["c"].is_alive()
    assert ends.looks == [{"a", "b", "c"}]


def test_without_waiters_nothing_is_looked_for(make):
    ends = Ends()
    make(ends.unfinished, 10).poll()
    assert ends.looks == []


def test_past_the_most_one_is_answered_at_once(make, wait):
    waiters = make(Ends("a").unfinished, 2)
    wait(waiters, "a"), wait(waiters, "a")
    waiting(waiters, 2)
    waiters.wait("a", 60)
    urgent = wait(waiters, "a", force=True)
    waiting(waiters, 3)
    assert urgent.is_alive()


def test_a_place_is_free_again_when_the_time_is_over(make):
    waiters = make(Ends("a").unfinished, 1)
    waiters.wait("a", 0.01)
    assert waiters.count == 0


def test_all_are_released_and_no_one_waits_any_more(make, wait):
    waiters = make(Ends("a").unfinished, 10)
    thread = wait(waiters, "a")
    waiting(waiters, 1)
    waiters.release()
    thread.join(10)
    assert not thread.is_alive()
    waiters.wait("a", 60)


def test_a_database_that_fails_leaves_no_waiter_behind(make):
    def fail(ids):
        raise OSError("disk")

    waiters = make(fail, 1)
    with pytest.raises(OSError, match="disk"):
        waiters.wait("a", 60)
    assert waiters.count == 0
