"""The text that every Python carries: the standard library's own sources.

Whole modules are held out, so nothing that trains, calibrates or chooses ever sees them.
May import: the standard library only.
"""

import random
import sysconfig
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


def sources() -> dict[str, Path]:
    """Every hand-written module of the running Python, by its path under the library's folder, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(GENERATED) and not set(path.relative_to(root).parts) & set(TESTS):
            found[name] = path
    return found


def training_documents() -> list[str]:
    """The modules that may train, calibrate and choose."""
    return [read(path) for name, path in sources().items() if name not in HELD_OUT]


def held_out_documents() -> list[str]:
    """The modules kept for the numbers that are reported."""
    found = sources()
    return [read(found[name]) for name in HELD_OUT if name in found]


def calibration_text(characters: int = 600_000) -> str:
    """Training modules in a fixed shuffled order, cut at `characters`: the text where none is given."""
    documents = training_documents()
    random.Random(CALIBRATION_SEED).shuffle(documents)
    return "\n".join(documents)[:characters]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
