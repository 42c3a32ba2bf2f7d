"""What a request may ask of the server: its settings, its database, its worker and its helpers."""

from dataclasses import dataclass
from typing import cast

from flask import current_app
from werkzeug.local import LocalProxy

from config import Config
from db import Database
from images import Decoder
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


service = cast(Service, LocalProxy(lambda: current_app.extensions["service"]))
