"""The demo shows the server at work, whatever the last one has left, and ends when told to."""

import os
import shutil
import signal
import subprocess
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from conftest import wait_until
from server import alive, checkout
from upstream import closed_port

from db import Database
from records import NewTask

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.processes


@pytest.fixture
def demo(tmp_path):
    """Return a starter of demos in one folder, apart from the user's own."""
    folder = checkout(tmp_path / "demo")
    shutil.copytree(ROOT / "script", folder / "script")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    # The packages are there: a folder with a link to them would be taken for one that moved.
    (folder / "script" / "bootstrap").write_text("#!/bin/sh\n")
    made = []

    def start(latency=3):
        script = folder / "script" / "demo"
        script.write_text(script.read_text().replace("--latency 3", f"--latency {latency}"))
        made.append(Demo(folder))
        return made[-1]

    yield start
    for each in made:
        each.close()


class Demo:
    """A demo that runs, and what it has said."""

    def __init__(self, folder):
        self.folder = folder
        self.port = closed_port()
        environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "PORT": str(self.port)}
        self.output = folder / "output"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                ["sh", "script/demo"],
                cwd=folder,
                env=environ,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def says(self, words):
        wait_until(lambda: words in self.output.read_text(), 30, self.output.read_text())

    def pause(self):
        address = f"http://127.0.0.1:{self.port}/queue/pause"
        request = urllib.request.Request(address, method="POST")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request):
            pass

    def interrupt(self):
        """Send what Ctrl-C sends, to all processes; return the seconds that its end takes."""
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        group = [pid for pid in pids if self._has(pid)]
        began = time.monotonic()
        os.killpg(self.process.pid, signal.SIGINT)
        assert self.process.wait(30) == 0
        assert not any(alive(pid) for pid in group)
        return time.monotonic() - began

    def _has(self, pid):
        try:
            return os.getpgid(pid) == self.process.pid
        except ProcessLookupError:
            return False

    def close(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)


def test_a_demo_that_was_paused_goes_on_when_it_is_started_again(demo):
    first = demo()
    first.says("The picture is there")
    first.pause()
    first.interrupt()
    second = demo()
    second.says("The queue was paused when the demo ended last; it goes on.")
    second.says("The picture is there")


def test_what_its_task_waits_for_is_told(demo):
    first = demo()
    first.says("one task is under way")
    first.interrupt()
    with closing(Database(first.folder / ".demo" / "tasks.sqlite3")) as database:
        database.add([NewTask(str(n), "p", "qwen-image", {}, 9) for n in range(40)], time.time())
    demo().says("The task waits: ")


def test_ctrl_c_says_so_and_waits_for_no_call(demo):
    running = demo(latency=60)
    running.says("one task is under way")
    # The usual grace is 25 seconds.
    assert running.interrupt() < 15
    assert "Stopping ..." in running.output.read_text()
