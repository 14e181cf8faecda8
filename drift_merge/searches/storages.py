"""Optuna's storage of a study: a file of SQLite, or a server that several machines share."""

import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from drift_merge.errors import RecipeError

HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60
_OPENINGS = 10
_DRIVERS = {"psycopg": "'psycopg[binary]'", "MySQLdb": "mysqlclient"}  # module -> package


def opened(optuna: Any, url: str | None, again: Callable[..., None]) -> Any:
    """The storage at a URL of SQLAlchemy; None for one in memory.

    Args:
        optuna: the module.
        url: sqlite:///FILE, postgresql://USER@HOST/NAME and so on.
        again: called with (study, trial) for a trial whose process sends no heartbeat any more.

    Raises:
        RecipeError: it cannot be opened.
    """
    if url is None:
        return None
    storage = optuna.storages.RDBStorage
    new, old = "heartbeat_stale_trial_callback", "failed_trial_callback"  # before Optuna 4.9
    callback = new if new in signature(storage).parameters else old
    waits = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    for left in reversed(range(_OPENINGS)):
        try:
            with quiet():
                return storage(
                    url,
                    engine_kwargs=waits,
                    heartbeat_interval=HEARTBEAT_SECONDS,
                    grace_period=GRACE_SECONDS,
                    **{callback: again},
                )
        except Exception as error:
            if not (left and _has_met_another(error)):
                raise _cannot_open(url, error) from error
            time.sleep(random.uniform(0.1, 1.0))
    raise AssertionError  # not reached


def _has_met_another(error: Exception) -> bool:
    """Whether several processes made the tables of a server at once: all but one fail."""
    kinds = ("IntegrityError", "InternalError", "ProgrammingError")  # of SQLAlchemy
    return type(error).__name__ in kinds or "already exists" in str(error)


def _cannot_open(url: str, error: Exception) -> RecipeError:
    reason = str(error).splitlines()[0]
    remedy = (
        "Name a database that SQLAlchemy knows, whose driver is installed: "
        "sqlite:///search.db, postgresql://USER@HOST/NAME"
    )
    if isinstance(error, ImportError) and isinstance(error.__cause__, ImportError):
        missing = error.__cause__.name
        reason = f"its driver, {missing}, is not installed."
        remedy = f"pip install {_DRIVERS.get(missing or '', missing)}"
    return RecipeError(
        f"--storage {_without_password(url)} cannot be opened: {reason}", remedy=remedy
    )


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.partition('://')[0]}://...@{tail}" if at else url


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's warnings of features that it calls experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
