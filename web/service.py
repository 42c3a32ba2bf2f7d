"""What a request may ask of the server: its settings, its database, its worker and its helpers."""

import time
from dataclasses import dataclass
from typing import cast

from flask import Response, after_this_request, current_app
from werkzeug.local import LocalProxy

from config import Config
from db import Database
from images import Decoder
from outputs import is_low_on_disk
from records import IdempotencyKey, LowOnDisk, NewTask
from web.access import Signer
from worker import Worker


@dataclass(frozen=True)
class Service:
    """Hold what the application was built with."""

    config: Config
    database: Database
    worker: Worker
    decoder: Decoder
    signer: Signer

    def add(self, tasks: list[NewTask], key: IdempotencyKey | None) -> list[str]:
        """Add the tasks and return their ids, or those of the tasks that came with the key before.

        Raises QueueFull, LowOnDisk or KeyReused.
        """
        is_low, limit = is_low_on_disk(self.config), self.config.max_pending
        ids = self.database.add(tasks, time.time(), limit, key, is_low)
        self.worker.wake()
        if ids != [task.id for task in tasks]:
            after_this_request(_mark_replay)
        return ids

    def check_disk(self) -> None:
        """Raise LowOnDisk where less than MIN_FREE_MB is free."""
        if is_low_on_disk(self.config):
            raise LowOnDisk


def _mark_replay(response: Response) -> Response:
    response.headers["Idempotent-Replayed"] = "true"
    return response


service = cast(Service, LocalProxy(lambda: current_app.extensions["service"]))
