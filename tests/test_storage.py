"""Several processes work on one study: on a journal file, in SQLite and in PostgreSQL, killed or not."""

import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from bitplan.formats.errors import BitplanError, UsageError
from bitplan.search import storage as storage_module
from bitplan.search import study as study_module
from bitplan.search.storage import Storage
from bitplan.search.study import search
from tests.test_cli import FORMATS_OPTION, LITTLE, run  # noqa: F401 (a fixture)
from tests.test_study import BUDGET, PROBLEM, evaluate, mean

FORK = multiprocessing.get_context("fork")
"""A child has torch imported already."""
FACTS = {"name": "s", "facts": {"budget": "7"}}


def work(place, trials, pause, shared, sender):
    storage_module.HEARTBEAT, storage_module.GRACE, study_module.LOOK = 1, 8, 0.05

    def slow(allocation):
        for loss in evaluate(allocation):
            time.sleep(pause)
            yield loss

    found, _ = search(PROBLEM, BUDGET, slow, trials=trials, journal=place, shared=shared, **FACTS)
    sender.send(found.best.loss)


class Worker:
    """A process that works on a study; `best` is what it found in the end, None where it was killed."""

    def __init__(self, place, trials, pause=0.01, shared=True):
        self._receiver, sender = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=work, args=(place, trials, pause, shared, sender))
        self.process.start()
        sender.close()

    def kill(self):
        self.process.kill()
        self.process.join()

    def best(self, seconds=120):
        self.process.join(seconds)
        assert self.process.exitcode == 0
        return self._receiver.recv()


def read(place):
    """All trials of the study."""
    study = optuna.load_study(study_name="s", storage=Storage(place, shared=True).storage)
    return study.get_trials()


def ended(trials):
    return [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def check_shared(place, trials=12, workers=3):
    """The workers run so many trials together, the knapsack's plan among them, and find the same best."""
    processes = [Worker(place, trials) for _ in range(workers)]
    assert len({process.best() for process in processes}) == 1
    found = read(place)
    assert len(ended(found)) == trials
    assert all(trial.state in (*STATES, TrialState.FAIL) for trial in found)
    assert any(trial.user_attrs["plan"] == "knapsack" for trial in ended(found))
    drawn = [tuple(trial.params.values()) for trial in ended(found)]
    assert len(set(drawn)) >= trials - 2  # each worker draws with a seed of its own; two may begin at once
    assert len({trial.user_attrs["worker"] for trial in ended(found)}) > 1


STATES = (TrialState.COMPLETE, TrialState.PRUNED)


def test_three_processes_share_a_journal_file(tmp_path):
    check_shared(tmp_path / "journal.log")
    assert not list((tmp_path / "journal.log.workers").iterdir())


def check_killed(place, kills, seed):
    """Workers are killed at random moments and others come: no trial is lost or stuck."""
    draw, trials = random.Random(seed), 12
    processes = [Worker(place, trials, 0.05) for _ in range(3)]
    for _ in range(kills):
        time.sleep(draw.uniform(0, 1.5))
        processes.pop(draw.randrange(len(processes))).kill()
        processes.append(Worker(place, trials, 0.05))
    bests = {process.best() for process in processes}
    found = read(place)
    assert len(ended(found)) == trials
    assert not [trial for trial in found if trial.state in (TrialState.RUNNING, TrialState.WAITING)]
    again = {trial.user_attrs["run again"].split()[1].strip(",") for trial in found if "run again" in trial.user_attrs}
    assert again <= {str(trial.number) for trial in found if trial.state == TrialState.FAIL}
    assert bests == {min(trial.value for trial in found if trial.state == TrialState.COMPLETE)}


def test_a_killed_worker_leaves_no_stuck_trial_and_its_trial_is_run_again(tmp_path):
    place = tmp_path / "journal.log"
    one = Worker(place, 6, 0.2)
    while not (place.exists() and any("indices" in t.user_attrs for t in read(place))):
        time.sleep(0.05)
    one.kill()
    assert [trial.state for trial in read(place)] == [TrialState.RUNNING]
    found, exact = search(PROBLEM, BUDGET, evaluate, trials=6, journal=place, shared=True, **FACTS)
    trials = read(place)
    assert [trial.state for trial in trials].count(TrialState.FAIL) == 1 and len(ended(trials)) == found.trials == 6
    assert trials[1].params == trials[0].params and trials[1].user_attrs["run again"].startswith("trial 0,")
    assert found.first_loss == pytest.approx(mean(exact.allocation))


def test_a_line_that_a_kill_or_a_full_disk_cut_is_dropped(tmp_path):
    place = tmp_path / "journal.log"
    search(PROBLEM, BUDGET, evaluate, trials=4, journal=place, shared=True, **FACTS)
    content = place.read_bytes()
    for torn in (b"{", content.splitlines()[-1][:-3]):
        place.write_bytes(content + torn)
        found, _ = search(PROBLEM, BUDGET, evaluate, trials=6, journal=place, shared=True, **FACTS)
        assert found.trials == len(ended(read(place))) == 6
    place.write_bytes(b"a line of some other file")
    lock = storage_module.JournalLock(place)
    assert lock.acquire()
    lock.release()
    assert place.read_bytes() == b"a line of some other file"


@pytest.mark.parametrize("shared", [True, False])
def test_a_journal_on_a_full_disk_is_one_sentence(tmp_path, monkeypatch, shared):
    place, calls = tmp_path / "journal.log", []

    def full(number):
        calls.append(number)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("optuna.storages.journal._file.os.fsync", full)
    with pytest.raises(BitplanError, match=f"cannot write {place}: No space left on device$"):
        search(PROBLEM, BUDGET, evaluate, trials=4, journal=place, shared=shared, **FACTS)
    found, _ = search(PROBLEM, BUDGET, evaluate, trials=4, journal=place, shared=shared, **FACTS)
    assert found.trials == len(ended(read(place))) == 4


def test_a_disk_that_stays_full_is_the_same_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    def filling(allocation):
        losses = evaluate(allocation)
        yield losses[0]
        monkeypatch.setattr(storage_module.JournalFileBackend, "append_logs", full)  # nothing is written
        yield from losses[1:]

    place = tmp_path / "journal.log"
    with pytest.raises(BitplanError, match=f"cannot write {place}: No space left on device$"):
        search(PROBLEM, BUDGET, filling, trials=2, journal=place, **FACTS)


@pytest.mark.parametrize("when", ["in the middle", "at the end"])
def test_a_worker_that_was_taken_for_dead_goes_on_with_the_others(tmp_path, when):
    place, taken = tmp_path / "journal.log", []

    def too_slow(allocation):
        losses = evaluate(allocation)
        if not taken:
            yield from losses[: -1 if when == "at the end" else 2]
            other = Storage(place, shared=True)
            study = optuna.load_study(study_name="s", storage=other.storage)
            taken.append(study.get_trials()[0])
            other.storage.set_trial_state_values(taken[0]._trial_id, TrialState.FAIL)
            storage_module.run_again(study, taken[0])
            losses = losses[-1:] if when == "in the middle" else []
        yield from losses

    found, _ = search(PROBLEM, BUDGET, too_slow, trials=4, journal=place, shared=True, **FACTS)
    trials = read(place)
    assert len(ended(trials)) == found.trials == 4 and len(trials) == 5
    assert trials[0].state == TrialState.FAIL and trials[1].user_attrs["indices"] == trials[0].user_attrs["indices"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_random_moments_lose_nothing(tmp_path, seed):
    check_killed(tmp_path / "journal.log", 5, seed)


@pytest.mark.slow
def test_one_worker_killed_at_random_moments_finds_what_an_undisturbed_one_does(tmp_path):
    whole, _ = search(PROBLEM, BUDGET, evaluate, trials=10, journal=tmp_path / "whole", **FACTS)
    draw, kills = random.Random(0), 0
    while kills < 20:
        process = Worker(tmp_path / "cut", 10, 0.05, shared=False)
        process.process.join(draw.uniform(0, 0.6))
        if process.process.exitcode == 0:
            break
        process.kill()
        kills += 1
    resumed, _ = search(PROBLEM, BUDGET, evaluate, trials=10, journal=tmp_path / "cut", **FACTS)
    assert resumed == whole


@pytest.mark.slow
def test_workers_of_a_database_are_found_dead_by_their_heartbeats(tmp_path):
    check_killed(f"sqlite:///{tmp_path / 'study.db'}", 2, 0)


@pytest.mark.slow
def test_the_command_of_two_workers(run, checkpoint, tmp_path):  # noqa: F811
    """The second has no trial to run, and makes the same plan; another budget is refused."""
    model, place = checkpoint("llama"), tmp_path / "studies" / "journal.log"
    start = ("plan", model, *LITTLE, *FORMATS_OPTION, "--rounding", "nearest", "--trials", "2", "--json")
    shared = ("--storage", place, "--study", "mine")
    code, first, err = run(*start, "--bpw", "5", *shared)
    assert code == 0 and "2 plans were rounded" in err
    code, second, err = run(*start, "--bpw", "5", *shared)
    assert code == 0 and second == first and "plans were rounded" not in err
    code, _, err = run(*start, "--bpw", "6", *shared)
    assert code == 2 and "study 'mine' in" in err and "is of another budget" in err
    trials = optuna.load_study(study_name="mine", storage=Storage(place, shared=True).storage).get_trials()
    assert trials[0].user_attrs["plan"] == "knapsack" and "×" in trials[0].user_attrs["formats"]


def test_options_that_make_no_sense_together(run, tmp_path):  # noqa: F811
    for wrong, told in [
        (("--study", "mine"), "give --storage too"),
        (("--storage", tmp_path / "j", "--trials", "0"), "--trials 0 runs none"),
        (("--storage", tmp_path / "j", "--study", "mine", "--bpw", "6"), "each budget has its own"),
    ]:
        code, _, err = run("plan", "model", "--bpw", "5", *wrong)
        assert code == 2 and told in err


def test_a_storage_that_cannot_be_used_is_refused_before_the_model_is_read(run, tmp_path):  # noqa: F811
    code, _, err = run("plan", tmp_path / "model", "--bpw", "5", "--storage", tmp_path)
    assert code == 1 and f"cannot use the study's storage {tmp_path}: it is no file" in err


class TestRefused:
    def search(self, place, **options):
        return search(PROBLEM, BUDGET, evaluate, trials=2, journal=place, name="s", shared=True, **options)

    @pytest.mark.parametrize(
        ("place", "told"),
        [
            ("sqlite:////nowhere/study.db", "unable to open database file"),
            ("nosuch://user:secret@host/db", "Can't load plugin"),
            ("postgresql+nosuch://user:secret@host/db", "Can't load plugin"),
            ("sqlite//x:y://", "Could not parse"),
        ],
    )
    def test_storages_that_are_none(self, place, told):
        with pytest.raises(BitplanError, match="cannot use the study's storage") as caught:
            self.search(place)
        assert told in str(caught.value) and "secret" not in str(caught.value) and "\n" not in str(caught.value)

    def test_files_that_are_no_journal(self, tmp_path):
        garbled, folder = tmp_path / "garbled", tmp_path / "folder"
        garbled.write_text("not a journal\nat all\n", encoding="utf-8")
        folder.mkdir()
        for place, told in ((garbled, "no journal of Optuna's"), (folder, "it is no file"), (garbled / "x", "")):
            with pytest.raises(BitplanError, match="cannot use the study's storage") as caught:
                self.search(place)
            assert told in str(caught.value)

    def test_a_file_that_cannot_be_written(self, tmp_path):
        database, journal = tmp_path / "study.db", tmp_path / "journal.log"
        self.search(f"sqlite:///{database}")
        with pytest.raises(BitplanError, match=r"the study's storage .*attempt to write a readonly database"):
            self.search(f"sqlite:///file:{database}?mode=ro&uri=true")
        self.search(journal)
        journal.chmod(0o444)
        if os.access(journal, os.W_OK):
            pytest.skip("this user may write any file")
        with pytest.raises(BitplanError, match=r"cannot use the study's storage .*Permission denied"):
            self.search(journal)

    def test_studies_of_something_else(self, tmp_path):
        place = tmp_path / "j"
        self.search(place, facts={"model": "a", "budget": "1 byte"})
        with pytest.raises(UsageError, match="is of another budget, 1 byte, and this is 2 bytes: give another --study"):
            self.search(place, facts={"model": "a", "budget": "2 bytes"})
        foreign = Storage(tmp_path / "foreign", shared=True).storage
        optuna.create_study(storage=foreign, study_name="s").add_trial(optuna.create_trial(value=1.0))
        with pytest.raises(UsageError, match="none of bitplan's"):
            self.search(tmp_path / "foreign")

    def test_another_version_of_optuna(self, tmp_path):
        import sqlite3

        place = f"sqlite:///{tmp_path / 'old.db'}"
        self.search(place)
        with sqlite3.connect(tmp_path / "old.db") as database:
            database.execute("update alembic_version set version_num = 'v99'")
        with pytest.raises(BitplanError, match=r"cannot use the study's storage .*optuna"):
            self.search(place)


@pytest.fixture
def postgresql(tmp_path):
    """A PostgreSQL of the test's own on loopback; its URL."""
    psycopg = pytest.importorskip("psycopg")
    places = [shutil.which("initdb"), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    if not (initdb := next(filter(None, places), None)):
        pytest.skip("no PostgreSQL server here")
    folder, user = tmp_path / "cluster", {}
    folder.mkdir()
    if os.geteuid() == 0:  # the server refuses root
        import pwd

        account = next((name for name in ("postgres", "nobody") if name in {p.pw_name for p in pwd.getpwall()}), None)
        if account is None:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        user = {"user": account, "group": pwd.getpwnam(account).pw_gid, "extra_groups": []}
        shutil.chown(folder, account)
        for parent in list(tmp_path.parents)[:3]:
            parent.chmod(parent.stat().st_mode | 0o011)
        tmp_path.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/", **user}
    subprocess.run([initdb, "-D", folder, "-U", "tester", "-A", "trust", "--no-sync"], check=True, **quiet)
    server = Path(initdb).resolve().with_name("postgres")
    command = [server, "-D", folder, "-p", str(port), "-h", "127.0.0.1", "-k", "", "-F"]
    process = subprocess.Popen(command, **quiet)
    url = f"postgresql://tester@127.0.0.1:{port}/postgres"
    try:
        for _ in range(100):
            try:
                psycopg.connect(url).close()
                break
            except psycopg.OperationalError:
                time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


@pytest.mark.slow
def test_three_processes_share_a_postgresql(postgresql):
    check_shared(postgresql)


@pytest.mark.slow
def test_kills_of_workers_of_a_postgresql(postgresql):
    check_killed(postgresql, 2, 0)


@pytest.mark.slow
def test_a_postgresql_that_does_not_answer(postgresql, monkeypatch):
    monkeypatch.setattr(storage_module, "GRACE", 3)
    port = int(postgresql.rsplit(":", 1)[1].split("/")[0])
    url = postgresql.replace(str(port), "1").replace("tester@", "tester:secret@")
    with pytest.raises(BitplanError, match="cannot use the study's storage postgresql://tester:\\*\\*\\*@") as caught:
        Storage(url, shared=True)
    assert "secret" not in str(caught.value)
