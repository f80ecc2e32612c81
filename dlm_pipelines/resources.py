"""What jobs and sensors share: one engine a process, and a context in their name."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import dagster as dg
from sqlalchemy import Engine

from dlm_core.catalogue.dsn import catalogue_url
from dlm_core.catalogue.engine import make_engine
from dlm_core.lifecycle.work import Context, StoragePool
from dlm_core.settings import Settings, load_settings


@lru_cache(maxsize=4)
def engine_for(url: str) -> Engine:
    """One pool of connections a process and catalogue."""
    return make_engine(url)


_STORAGES = StoragePool()


class Catalogue(dg.ConfigurableResource[Any]):
    """The catalogue and the storages, from the ``DLM_*`` settings of the process."""

    def settings(self, **overrides: object) -> Settings:
        """The settings of this process, some of them as given. Raises InvalidValueError."""
        return load_settings(**overrides)

    def context(self, actor: str, settings: Settings | None = None) -> Context:
        """A context in the name of ``actor``, e.g. ``run:<id>`` or ``sensor:<name>``."""
        settings = settings or self.settings()
        return Context(
            engine_for(catalogue_url(settings)),
            settings,
            actor,
            storages=_STORAGES,
            stop=threading.Event(),
        )
