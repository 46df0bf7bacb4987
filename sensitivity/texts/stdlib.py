"""The text that every Python carries: the standard library's own sources.

Whole modules are held out, so nothing that trains, calibrates or chooses ever sees them.
May import: the standard library only.
"""

import os
import random
import sysconfig
from functools import cache
from pathlib import Path

HELD_OUT = (
    "argparse.py",
    "configparser.py",
    "csv.py",
    "dataclasses.py",
    "heapq.py",
    "json/__init__.py",
    "json/decoder.py",
    "json/encoder.py",
    "shutil.py",
    "statistics.py",
    "tarfile.py",
    "textwrap.py",
)
# Left out of both parts: tables written by programs, vendored wheels, and tests that some distributions strip.
GENERATED = ("_sysconfigdata", "config-", "encodings", "ensurepip", "lib-dynload", "pydoc_data", "site-packages")
TESTS = ("test", "tests", "idle_test", "dist-packages")
CALIBRATION_SEED = 1234


@cache
def sources() -> dict[str, Path]:
    """Every hand-written module of the running Python, by its path under the library's folder, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, inner, files in os.walk(root):
        at = Path(folder)
        # What is left out is not walked either: site-packages may hold a hundred times as many files.
        inner[:] = [
            n for n in inner if n not in TESTS and not (at / n).relative_to(root).as_posix().startswith(GENERATED)
        ]
        found += [at / name for name in files if name.endswith(".py")]
    names = {path.relative_to(root).as_posix(): path for path in sorted(found)}
    return {name: path for name, path in names.items() if not name.startswith(GENERATED)}


def training_documents() -> list[str]:
    """The modules that may train, calibrate and choose."""
    return [read(path) for name, path in sources().items() if name not in HELD_OUT]


def held_out_documents() -> list[str]:
    """The modules kept for the numbers that are reported."""
    found = sources()
    return [read(found[name]) for name in HELD_OUT if name in found]


def calibration_text(characters: int = 600_000) -> str:
    """Training modules in a fixed shuffled order, cut at `characters`: the text where none is given."""
    paths = [path for name, path in sources().items() if name not in HELD_OUT]
    random.Random(CALIBRATION_SEED).shuffle(paths)
    documents: list[str] = []
    while paths and sum(len(document) + 1 for document in documents) <= characters:
        documents.append(read(paths.pop(0)))
    return "\n".join(documents)[:characters]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
