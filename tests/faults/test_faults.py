"""Long commands that are killed, run beside each other, on a full disk, and on a cache with flipped bits: what they
write in the end has the bytes of an undisturbed run. `make test-faults`; KILLS=5 for less.

Each test prints its figures (`-s`), which docs/reliability.md has.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny

pytestmark = pytest.mark.faults
KILLS = int(os.environ.get("KILLS", "20"))
LITTLE = ("--tokens", "1024", "--block", "64", "--device", "cpu")
FORMATS = ("--formats", "int8,int4-g64,int3-g32")


def start(cache: Path, *words: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "bitplan.planner.cli", *map(str, words)],
        env=os.environ | {"BITPLAN_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


class Case:
    """A command that writes files, and the bytes of an undisturbed run."""

    def __init__(self, folder: Path, name: str, output: str, *words: object):
        self.folder, self.name, self.output, self.words = folder, name, output, words
        self.content: dict[str, bytes] = {}
        self.seconds = 0.0

    def command(self, place: Path, cache: Path) -> subprocess.Popen:
        option = "--save" if self.name == "apply" else "-o"
        return start(cache, *self.words, *([option, place / self.output] if self.output else ["--json"]))

    def result(self, place: Path, out: str) -> dict[str, bytes]:
        """The bytes of all that was written; where nothing is, of stdout."""
        if not self.output:
            return {"stdout": out.encode()}
        whole = place / self.output
        files = [whole] if whole.is_file() else sorted(whole.rglob("*"))
        return {str(path.relative_to(place)): path.read_bytes() for path in files if path.is_file()}

    def run(self, place: Path, cache: Path) -> dict[str, bytes]:
        place.mkdir(exist_ok=True)
        began = time.monotonic()
        code, out, err = finished(self.command(place, cache))
        self.seconds = time.monotonic() - began
        assert code == 0, err[-2000:]
        return self.result(place, out)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    model = tiny.saved("llama-tied", folder / "model")
    text = folder / "text.txt"
    text.write_text(" ".join(f"the {i} cats sat on {i * 7} mats." for i in range(800)), encoding="utf-8")
    read = ("--text", text, *LITTLE)
    made = {
        "audit": Case(folder, "audit", "profile.json", "audit", model, *read, *FORMATS),
        "plan": Case(folder, "plan", "plan.json", "plan", model, *read, *FORMATS, "--bpw", "4.6", "--trials", "4"),
        "compare": Case(folder, "compare", "", "compare", model, *read, "--formats", "int8,int4-g64"),
    }
    for case in made.values():
        case.content = case.run(folder / f"{case.name}-out", folder / f"{case.name}-cache")
    plan = folder / "plan-out" / "plan.json"
    made["apply"] = Case(folder, "apply", "saved", "apply", plan, "--model", model, "--text", text, *LITTLE)
    export = ("export", plan, "--model", model, "--to", "compressed-tensors", "--nearest", "--text", text)
    made["export"] = Case(folder, "export", "exported", *export, "--device", "cpu")
    for name in ("apply", "export"):
        made[name].content = made[name].run(folder / f"{name}-out", folder / f"{name}-cache")
    return made


def drop(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def without_times(content: dict[str, bytes]) -> dict[str, bytes]:
    """compare's rows hold tokens per second, which no two runs share."""
    kept = {}
    for name, value in content.items():
        if name == "stdout":
            rows = json.loads(value)["rows"]
            value = json.dumps(
                [{k: v for k, v in row.items() if not re.search("token|second|thread", k)} for row in rows]
            )
            kept[name] = value.encode()
        else:
            kept[name] = value
    return kept


@pytest.mark.parametrize("name", ["audit", "plan", "compare", "apply"])
def test_kills_at_random_moments(name, cases, tmp_path):
    case, random_ = cases[name], random.Random(name)
    cache, stopped, ended = tmp_path / "cache", 0, 0
    while stopped < KILLS and ended <= KILLS:
        process = case.command(tmp_path, cache)
        try:
            process.communicate(timeout=random_.uniform(0, case.seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            stopped += 1
        else:  # ended before: the next begins with an empty cache
            ended += 1
            shutil.rmtree(cache)
        if case.output and (tmp_path / case.output).exists():  # what is there is whole
            assert without_times(case.result(tmp_path, "")) == without_times(case.content)
            drop(tmp_path / case.output)
    assert without_times(case.run(tmp_path, cache)) == without_times(case.content)
    print(f"\n{name}: {stopped} runs killed; the next has the bytes of an undisturbed one")
    assert stopped


@pytest.mark.parametrize("name", ["audit", "plan", "compare"])
def test_four_processes_on_one_cache(name, cases, tmp_path):
    case = cases[name]
    places = [tmp_path / str(number) for number in range(4)]
    for place in places:
        place.mkdir()
    running = [case.command(place, tmp_path / "cache") for place in places]
    for place, process in zip(places, running, strict=True):
        code, out, err = finished(process)
        assert code == 0, err[-2000:]
        assert without_times(case.result(place, out)) == without_times(case.content)
    print(f"\n{name}: four at once have the bytes of an undisturbed run")


@pytest.mark.parametrize("name", ["audit", "plan", "compare"])
def test_flipped_bits_in_the_cache(name, cases, tmp_path):
    case, random_ = cases[name], random.Random(name)
    cache = shutil.copytree(case.folder / f"{name}-cache", tmp_path / "cache")
    entries = [path for path in sorted(cache.rglob("*")) if path.suffix in (".safetensors", ".json")]
    entries = [path for path in entries if path.name != "workspace.json"]
    for path in entries:
        content = bytearray(path.read_bytes())
        content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
        path.write_bytes(content)
    assert without_times(case.run(tmp_path, cache)) == without_times(case.content)
    print(f"\n{name}: a bit flipped in each of {len(entries)} entries; the bytes are those of an undisturbed run")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MiB, where one can be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here (it takes root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=False)


def leave(folder: Path, room: int) -> None:
    """Fill a file system until `room` bytes are left."""
    filler = folder / "filler"
    with open(filler, "ab", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
        file.truncate(max(0, file.tell() - room))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["audit", "plan", "compare", "apply", "export"])
def test_a_full_disk(name, cases, small_disk, tmp_path):
    """Full from the start, and while the command runs: with room for some of what it keeps in the cache, or writes."""
    case, whole = cases[name], tmp_path / "cache"
    kept, written = size_of(case.folder / f"{name}-cache"), sum(map(len, case.content.values())) if case.output else 0
    rooms = [(kept * part // 4, small_disk / "cache", tmp_path) for part in range(4)]
    rooms += [(room, whole, small_disk) for room in ((0, written // 2) if case.output else ())]
    for room, cache, place in rooms:
        leave(small_disk, room)
        code, out, err = finished(case.command(place, cache))
        assert (code, out) == (1, ""), (room, code, err[-2000:])
        assert "Traceback" not in err and str(small_disk) in err.strip().splitlines()[-1], (room, err[-2000:])
        assert not case.output or not (place / case.output).exists()
        assert {path.name for path in small_disk.iterdir()} <= {"filler", "cache"}
        assert not list(small_disk.rglob("*.part"))
        drop(small_disk / "filler")
        shutil.rmtree(small_disk / "cache", ignore_errors=True)
    assert without_times(case.run(tmp_path, whole)) == without_times(case.content)
    print(f"\n{name}: a full disk ends in one sentence with the path; with room, the bytes of an undisturbed run")


@pytest.mark.parametrize("name", ["audit", "plan", "compare", "apply"])
def test_a_cache_that_cannot_be_written(name, cases, tmp_path):
    """A path under a file, since what is read-only to others is not to root."""
    case = cases[name]
    (tmp_path / "file").write_bytes(b"")
    code, out, err = finished(case.command(tmp_path, tmp_path / "file" / "cache"))
    assert (code, out) == (1, ""), err[-2000:]
    assert "Traceback" not in err and str(tmp_path / "file") in err.strip().splitlines()[-1]
    assert not case.output or not (tmp_path / case.output).exists()
