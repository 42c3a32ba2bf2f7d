"""The queue in one process, for the tests that turn its clock."""

import threading
import uuid

import rows
from conftest import wait_until

import images
import worker
from chutes import Chutes
from db import Database
from records import NewTask
from registry import ModelRegistry
from web.answers import waiting_for
from worker import Worker


class Queue:
    """A worker, its database and an upstream, under a clock that a test turns."""

    def __init__(self, config, upstream, clock, jitter=0.0):
        config.output_dir.mkdir(exist_ok=True)
        self.config = config
        self.upstream = upstream
        self.clock = clock
        self.db = Database(config.database_path)
        self.decoder = images.Decoder()
        client = Chutes(config, clock)
        registry = ModelRegistry(config, self.db, clock=clock)
        self.worker = Worker(config, self.db, client, self.decoder, registry, clock, lambda: jitter)
        clock.turned[self] = self.worker.wake

    def add(self, prompt="p", model="m", priority=0, params=None):
        task_id = str(uuid.uuid4())
        self.db.add([NewTask(task_id, prompt, model, params or {}, priority)], self.clock())
        self.worker.wake()
        return task_id

    def start(self):
        self.worker.start()
        return self

    def task(self, task_id):
        return self.db.get(task_id)

    def until(self, task_id, **wanted):
        """Wait until the task's attributes are these, and return it."""

        def look():
            task = self.task(task_id)
            return all(getattr(task, k) == v for k, v in wanted.items()) and task

        return wait_until(look, what=f"{self.task(task_id)} did not become {wanted}")

    def ended(self, task_id):
        return wait_until(lambda: self.task(task_id).finished_at and self.task(task_id))

    def waits(self, task_id):
        task = self.task(task_id)
        limit = worker.rate_limit(self.config)
        queue_view = self.db.queue_view(task, limit, self.clock(), self.config.max_per_day)
        return waiting_for(task, queue_view, self.config, self.clock())

    def files(self):
        return sorted(file.name for file in self.config.output_dir.iterdir())

    def outcomes(self):
        sql = "SELECT outcome FROM calls ORDER BY started, number"
        return [outcome for (outcome,) in rows.read(self.db.path, sql)]

    def close(self):
        del self.clock.turned[self]
        self.worker.stop()
        self.decoder.close()
        self.db.close()


def ever(fact, looks=20):
    """Look again for as many turns of the queue as would let it happen."""
    return any(fact() or threading.Event().wait(0.02) for _ in range(looks))
