"""Where studies lie, and who works on them: Optuna's own storages, a journal file or a database.

Workers are processes of the same command line. A trial that a killed worker left running is ended as failed, and run
again with the parameters that it had. In a database Optuna's heartbeats tell which those are; beside a journal file
each worker holds a lock, which the system releases when it dies. May import: formats.errors, sensitivity.store.
"""

import inspect
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from bitplan.formats.errors import BitplanError, first_line
from bitplan.sensitivity.store import writing

HEARTBEAT = 15
"""Seconds between two signs of life of a trial in a database."""
GRACE = 60
"""Seconds without one, after which its worker counts as dead; also of a trial that names no worker yet."""
DRIVERS = ("psycopg", "psycopg2")
"""Of PostgreSQL, the first that is installed; which one SQLAlchemy takes by default is a matter of its version."""
TRIES = 10
"""To open a database, whose tables another worker may be making."""
LINE = b'{"op_code":'
"""What each line of a journal begins with."""
WORKING = (SQLAlchemyError, StorageInternalError)
OPENING = (OSError, ImportError, RuntimeError, ValueError, KeyError)
"""What opening a storage raises beside: by its driver, of another version of Optuna, of a file that is no journal."""


class JournalLock(JournalFileOpenLock):
    """The lock under which a journal is written. A last line that a kill or a full disk cut is dropped first: nothing
    behind it would be read."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.path = path

    def acquire(self) -> bool:
        got = super().acquire()
        with open(self.path, "a+b") as file:
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    start = (content := file.read()).rfind(b"\n") + 1
                    if content[start:][: len(LINE)] == LINE[: end - start]:  # and not of some other file
                        file.truncate(start)
        return got


class Journal(JournalFileBackend):
    """A journal file whose full disk is one sentence."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with writing(Path(self._file_path)):
            super().append_logs(logs)


class Storage:
    """An open storage with this process as one of its workers; `place` is a path or a URL. Unless `shared`, the caller
    knows that no other process works on the study. Raises BitplanError where it cannot be used."""

    def __init__(self, place: Path | str, shared: bool):
        self.shared, self.url = shared, str(place) if "://" in str(place) else None
        self.path = None if self.url else Path(place)
        self.name = f"{socket.gethostname()} {os.getpid()} {uuid4().hex[:8]}"
        self.seed = [int(self.name[-8:], 16)] if shared else []
        """Makes the draws of workers different."""
        with self.refusals():
            self.storage = self._open()

    def _open(self) -> BaseStorage:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self.path.is_file():  # devices are read without an end
                raise BitplanError(f"cannot use the study's storage {self.shown()}: it is no file")
            lock = JournalLock(self.path)
            lock.acquire()  # raises where it cannot be written
            lock.release()
            return JournalStorage(Journal(str(self.path), lock_obj=lock))
        assert self.url is not None
        name, _, rest = self.url.partition("://")
        driver = next((each for each in DRIVERS if find_spec(each)), DRIVERS[0])
        url = f"postgresql+{driver}://{rest}" if name == "postgresql" else self.url
        known = inspect.signature(RDBStorage.__init__).parameters
        after = next(name for name in ("heartbeat_stale_trial_callback", "failed_trial_callback") if name in known)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            beats: dict[str, Any] = {"heartbeat_interval": HEARTBEAT, "grace_period": GRACE, after: run_again}
            if name.startswith("sqlite"):
                beats["engine_kwargs"] = {"connect_args": {"timeout": GRACE}}  # of other writers' locks
            elif name == "postgresql":
                beats["engine_kwargs"] = {"connect_args": {"connect_timeout": GRACE}}  # a host may not answer at all
            for _ in range(TRIES):
                try:
                    return RDBStorage(url, **beats)
                except (IntegrityError, ProgrammingError):
                    time.sleep(0.3)
            return RDBStorage(url, **beats)

    @contextmanager
    def refusals(self, opening: bool = True) -> Iterator[None]:
        """What the storage raises inside is one sentence, in which no password is; where it is not `opening`, only what
        nothing but a database raises."""
        try:
            yield
        except BitplanError:
            raise
        except (*OPENING, *WORKING) as error:
            if not opening and not isinstance(error, WORKING):
                raise
            cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
            reason = getattr(cause, "strerror", None) or first_line(cause)  # type: ignore[arg-type]
            raise BitplanError(f"cannot use the study's storage {self.shown()}: {reason}{self._hint(error)}") from None

    def shown(self) -> str:
        """Its path, or its URL without the password."""
        if self.url is None:
            return str(self.path)
        try:
            return make_url(self.url).render_as_string(hide_password=True)
        except SQLAlchemyError:
            return self.url.partition("://")[0] + "://…"

    def _hint(self, error: Exception) -> str:
        if isinstance(error, ImportError) and self.url:
            return " (pip install 'bitplan[postgresql]')" if self.url.startswith("postgresql") else ""
        if isinstance(error, ValueError | KeyError) and self.path:
            return ": it is no journal of Optuna's"
        return ""

    # Workers --------------------------------------------------------------------------------------------------------

    def _lock(self, worker: str) -> FileLock:
        assert self.path is not None
        return FileLock(self.path.with_name(f"{self.path.name}.workers") / worker.replace(" ", "-"))

    @contextmanager
    def working(self) -> Iterator[None]:
        """While inside, other processes see that this one lives."""
        if not self.shared or self.path is None:
            yield
            return
        lock = self._lock(self.name)
        with self.refusals():
            Path(lock.lock_file).parent.mkdir(exist_ok=True)
            lock.acquire()
        try:
            yield
        finally:
            with suppress(OSError):
                os.unlink(lock.lock_file)
            lock.release()

    def end_stale(self, study: optuna.Study) -> None:
        """End the trials of dead workers as failed, and enqueue them again."""
        if self.path is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                optuna.storages.fail_stale_trials(study)
            return
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not self._lives(trial):
                with suppress(UpdateFinishedTrialError):  # another worker was first
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                    run_again(study, trial)

    def _lives(self, trial: FrozenTrial) -> bool:
        if not self.shared:
            return False
        worker = trial.user_attrs.get("worker")
        if worker is None:  # it begins just now
            assert trial.datetime_start is not None
            return datetime.now() - trial.datetime_start < timedelta(seconds=GRACE)
        if worker == self.name:
            return True
        lock = self._lock(worker)
        if not Path(lock.lock_file).exists():
            return False
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        with suppress(OSError):
            os.unlink(lock.lock_file)
        return False


def run_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Enqueue a trial that was cut off, with the parameters and the allocation that it had."""
    kept = {name: value for name, value in trial.user_attrs.items() if name not in ("worker", "loss")}
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={**kept, "run again": f"trial {trial.number}, whose worker ended"},
        )
    )
