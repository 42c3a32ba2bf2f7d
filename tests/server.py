"""The real server in real processes, for the tests that kill it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import rows
from conftest import PROMPT, TOKEN, check_lines, wait_until
from upstream import closed_port, local_models

import images

ROOT = Path(__file__).resolve().parent.parent


def checkout(folder):
    """Copy what gunicorn needs, so that no .env and no database of the user's is touched."""
    folder.mkdir(exist_ok=True)
    for file in (*ROOT.glob("*.py"), ROOT / "schema.sql", ROOT / "models.toml"):
        shutil.copy2(file, folder)
    # What is compiled need not be compiled again by each process of each test.
    for name in ("web", "__pycache__"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    return folder


class Server:
    """One gunicorn with its processes; `folder` holds its code, its database and its images."""

    def __init__(self, folder, url, command=("-m", "gunicorn"), **values):
        self.folder = checkout(folder)
        if url:
            (folder / "models.toml").write_text(local_models(url))
        self.port = closed_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / f"server-{self.port}.log"
        environ = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")}
        environ |= {
            "CHUTES_API_TOKEN": TOKEN,
            "CHUTES_API_URL": url,
            "CATALOGUE_URL": "off",
            "PORT": str(self.port),
            "WORKERS": "2",
            **{name: str(value) for name, value in values.items()},
        }
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                env=environ,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def ready(self):
        """Wait until it answers and, unless another one does, runs the queue."""
        wait_until(self._answers, what=f"no answer:\n{self.log()}")
        return self

    def running(self):
        """Wait until one of its processes runs the queue, and return that one's pid."""
        return wait_until(self.runner, what=f"nobody runs the queue:\n{self.log()}")

    def _answers(self):
        assert self.process.poll() is None, self.log()
        try:
            return self.request("GET", "/healthz")[0] == 200
        except OSError:
            return False

    def log(self):
        return self.log_path.read_text(errors="replace")

    def runner(self):
        """Return the pid of the living process that has said last that it runs the queue."""
        said = [line for line in self.log().splitlines() if "this process runs the queue" in line]
        pids = [int(line.split()[2]) for line in said]
        return pids[-1] if pids and alive(pids[-1]) else None

    def workers(self):
        """Return the pids of the master's living children."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def request(self, method, path, body=None, timeout=30):
        """Return the status, the headers and the JSON of an answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path,
            data,
            {"Content-Type": "application/json"},
            method=method,
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as answer:
                return answer.status, answer.headers, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, json.load(error)

    def submit(self, prompt=PROMPT, **fields):
        status, _, task = self.request("POST", "/generate", {"prompt": prompt, **fields})
        assert status == 202, task
        return task["id"]

    def status(self, task_id):
        return self.request("GET", f"/status/{task_id}")[2]

    def all_end(self, ids, seconds=60):
        """Wait until every task has ended, and return them."""
        tasks = {}
        deadline = time.monotonic() + seconds
        for task_id in ids:
            while True:
                tasks[task_id] = self.status(task_id)
                if tasks[task_id]["status"] in ("completed", "failed"):
                    break
                assert time.monotonic() < deadline, f"{tasks[task_id]}\n{self.log()}"
                time.sleep(0.01)
        return list(tasks.values())

    def send(self, number, pid=None):
        os.kill(pid or self.process.pid, number)

    def kill_all(self):
        """Kill master and workers in the same instant, as a loss of power would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def reload(self):
        """Reload by SIGHUP, and return when all processes are others."""
        before = set(self.workers())
        self.send(signal.SIGHUP)
        wait_until(lambda: not before & set(self.workers()), seconds=40, what=self.log())

    def stop(self, number=signal.SIGTERM):
        """Tell the master to stop and return its exit code."""
        self.send(number)
        return self.process.wait(60)

    def close(self):
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(40)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        check_lines(self.log())

    def rows(self, sql):
        return rows.read(self.folder / "tasks.sqlite3", sql)

    def check_files(self, tasks):
        """Assert that each completed task has its whole file, and that there is no other."""
        expected = set()
        for task in tasks:
            if task["status"] == "completed":
                path = Path(task["file_path"])
                image = images.inspect(path)
                assert (image.sha256, image.bytes) == (
                    task["image"]["sha256"],
                    task["image"]["bytes"],
                )
                expected.add(path.name)
        assert {file.name for file in (self.folder / "outputs").iterdir()} == expected


def alive(pid):
    """Return whether the process runs, and is not only waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def memory(pid, name):
    """Return a figure of /proc/PID/status in bytes, such as VmRSS or VmHWM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name} in /proc/{pid}/status")
