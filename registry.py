"""What is known of a model by its name: by MODELS_FILE, by the catalogue, or nothing else."""

import difflib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable

import models
from catalogue import CatalogueError, Reader
from config import Config
from db import Database, DatabaseError
from models import Model

# How old the catalogue may be, and how long a task whose model is not known waits for it.
MAX_AGE = 86400.0
MAX_WAIT = 5.0

log = logging.getLogger("registry")


class ModelRegistry:
    """Find models, and keep the catalogue that Chutes has of them.

    Whoever runs the queue calls `refresh_if_due`, which reads the catalogue in a thread and a
    process of its own; `close` ends both.
    """

    def __init__(
        self,
        config: Config,
        database: Database,
        reader: Reader | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self._config = config
        self._db = database
        self._clock = clock
        self._reader = reader or Reader()
        self._thread: threading.Thread | None = None

    def find(self, name: str) -> Model:
        """Return what is known of a model now, by any of its names."""
        if found := self._config.file_models.get(name):
            return found
        if self._config.catalogue_url and (entry := self._db.catalogue_entry(name)):
            return Model.model_validate_json(entry)
        return models.of_setting(name, self._config.chutes_api_url)

    def known(self) -> list[Model]:
        """Return the models that there are: those of MODELS alone, where it is set."""
        if self._config.models:
            found: Iterable[Model] = map(self.find, self._config.models)
        else:
            entries = self._db.catalogue_entries() if self._config.catalogue_url else []
            found = itertools.chain(
                self._config.file_models.values(),
                map(Model.model_validate_json, entries),
                [self.find(self._config.default_model)],
            )
        by_name: dict[str, Model] = {}
        for model in found:
            by_name.setdefault(model.name, model)
        return list(by_name.values())

    def get(self, name: str) -> Model | None:
        """Return a model that `known` has, by any of its names, or None."""
        model = self.find(name)
        if self._config.models:
            return model if model.name in {self.find(n).name for n in self._config.models} else None
        is_known = model.source != "setting" or name == self._config.default_model
        return model if is_known else None

    def nearest(self, name: str) -> list[str]:
        """Return the names that there are and that are most like this one."""
        names = {name for model in self.known() for name in (model.name, *model.aliases)}
        by_lower = {name.lower(): name for name in sorted(names)}
        return [by_lower[n] for n in difflib.get_close_matches(name.lower(), by_lower, 3, 0.5)]

    def choose_seed(self, name: str) -> int | None:
        """Return a seed for a model, or None where it is not known to take one."""
        rule = (self.find(name).fields or {}).get("seed")
        return models.choose_seed(rule) if rule else None

    def await_unknown(self, model: Model) -> None:
        """Let the tasks of a model that is not known wait for the catalogue, but not for long."""
        if model.source == "setting" and self._config.catalogue_url:
            step = self._config.retry_backoff
            self._db.await_catalogue(model.name, self._clock(), MAX_WAIT, step)

    @property
    def is_refreshing(self) -> bool:
        """Return whether this process reads the catalogue now."""
        return self._thread is not None and self._thread.is_alive()

    def refresh_if_due(self) -> None:
        """Begin to read the catalogue: at first, when it is old, and when a task waits for it."""
        if not self._config.catalogue_url or self.is_refreshing:
            return
        state, now = self._db.catalogue_state(), self._clock()
        is_old = state.tried_at is None or abs(now - state.tried_at) > MAX_AGE
        if self._thread is None or is_old or state.is_awaited:
            self._thread = threading.Thread(target=self._refresh, name="catalogue")
            self._thread.start()

    def close(self) -> None:
        """End a refresh that is under way; the catalogue of before stays."""
        self._reader.close()
        if self._thread:
            self._thread.join()

    def _refresh(self) -> None:
        try:
            self._db.begin_catalogue(self._clock())
            self._store()
        except DatabaseError as error:
            log.error("the catalogue is not kept: %s", error)

    def _store(self) -> None:
        try:
            found = self._reader.read(self._config.catalogue_url, self._config.chute_url)
        except CatalogueError as error:
            log.warning("%s. The models of before stay known", error)
            self._db.end_catalogue(self._clock(), error=str(error))
            return
        entries = [
            (model.model_dump_json(exclude_unset=True), (model.name, *model.aliases))
            for model in found
        ]
        self._db.end_catalogue(self._clock(), entries)
        log.info("the catalogue was read", extra={"models": len(entries)})
