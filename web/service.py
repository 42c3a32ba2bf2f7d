"""What a request may ask of the server: its settings, its database, its worker and its helpers."""

import functools
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

from flask import Response, after_this_request, current_app
from werkzeug.local import LocalProxy

from config import Config
from db import Database, DatabaseError
from images import Decoder, ImageError
from inputs import Arrival, InputFolder
from models import Model
from outputs import StorageError, image_path, is_low_on_disk
from records import IdempotencyKey, LowOnDisk, NewTask, Task
from registry import ModelRegistry
from web.access import Signer
from worker import Worker

log = logging.getLogger("service")


@dataclass(frozen=True)
class Service:
    """Hold what the application was built with."""

    config: Config
    database: Database
    worker: Worker
    decoder: Decoder
    signer: Signer
    registry: ModelRegistry
    inputs: InputFolder

    def add(
        self,
        tasks: list[NewTask],
        model: Model,
        key: IdempotencyKey | None,
        arrivals: Sequence[Arrival] = (),
    ) -> list[str]:
        """Add the tasks and return their ids, or those of the tasks that came with the key before.

        Their inputs are those that have arrived. Raises QueueFull, LowOnDisk, KeyReused, or
        StorageError where the inputs cannot be stored.
        """
        self.registry.await_unknown(model)
        is_low, limit = is_low_on_disk(self.config), self.config.max_pending
        try:
            publish = functools.partial(self.inputs.publish, arrivals)
            ids = self.database.add(tasks, time.time(), limit, key, is_low, publish)
        except (DatabaseError, StorageError):
            self._forget(arrivals)
            raise
        self.worker.wake()
        if ids != [task.id for task in tasks]:
            after_this_request(_mark_replay)
        return ids

    def _forget(self, arrivals: Sequence[Arrival]) -> None:
        """Remove the files of inputs that were given their names for a task that is not stored."""
        names = [self.inputs.path_of(arrival.image).name for arrival in arrivals]
        with suppress(DatabaseError, OSError):  # What stays is swept at the next start.
            if names:
                self.database.remove_inputs(names, self.inputs.remove)

    def with_image_facts(self, tasks: list[Task]) -> list[Task]:
        """Return the tasks, and of those of the Node server what the files of their images show.

        A file is read once: what it shows is kept. Without a `sha256` there is no whole image.
        """
        unread = [task for task in tasks if task.status == "completed" and task.sha256 is None]
        read = {task.id: facts for task in unread if (facts := self._read_image(task))}
        if not read:
            return tasks
        try:
            self.database.keep_image_facts(read)
        except DatabaseError as error:
            log.warning("what the files of images show is not kept: %s", error)
        return [replace(task, **read.get(task.id, {})) for task in tasks]

    def _read_image(self, task: Task) -> dict[str, Any] | None:
        try:
            path = image_path(self.config, task)
            size = path.stat().st_size
            if size == task.bytes:
                return None  # It was read before, and was no whole image.
            facts = dict(vars(self.decoder.inspect(path)))
        except ImageError:
            return {"bytes": size}
        except OSError:
            return None
        del facts["extension"]
        return facts

    def check_disk(self) -> None:
        """Raise LowOnDisk where less than MIN_FREE_MB is free."""
        if is_low_on_disk(self.config):
            raise LowOnDisk


def _mark_replay(response: Response) -> Response:
    response.headers["Idempotent-Replayed"] = "true"
    return response


service = cast(Service, LocalProxy(lambda: current_app.extensions["service"]))
