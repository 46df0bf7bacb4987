"""Random changes of files, seeded: each reader takes the file or refuses it with a BitplanError, whatever the change.

`make fuzz` runs this for longer.
"""

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from bitplan.formats.errors import BitplanError
from bitplan.planner.plan import Plan
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.profile import Profile, read
from bitplan.sensitivity.tasks.question import read_questions
from tests.attacks.test_readers import folder, model  # noqa: F401 (fixtures)

SECONDS = float(os.environ.get("SECONDS", "0.5"))
"""How long each reader is fuzzed."""
PLAN = (Path(__file__).parent.parent / "data" / "plan-schema-3.json").read_bytes()
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1 << 63,
    1e308,
    "",
    "\x1b[2J",
    "../x",
    "a.b",
    [],
    [[]],
    {},
    {"a": {}},
    "x" * 5000,
]
SNIPPETS = [b"NaN", b"1e999", b"\x00", b"\xff", b'"', b"{", b"]" * 50, b"[" * 5000, b"\\ud800", b"9" * 500, b"-"]


def changed_value(chance: random.Random, value: Any) -> Any:
    """The same JSON value with one part, at any depth, replaced, dropped or doubled."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        return chance.choice(ODD)
    value = dict(value) if isinstance(value, dict) else list(value)
    key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
    match chance.randrange(6):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[chance.choice(["x", "\x1b", "bytes", "units"])] = value[key]
        case 1:
            value.append(value[key])
        case _:
            value[key] = changed_value(chance, value[key])
    return value


def changed_bytes(chance: random.Random, content: bytes) -> bytes:
    at, until = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    match chance.randrange(4):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + chance.choice(SNIPPETS) + content[at:]
        case 2:
            return content[:at] + content[until:]
        case _:
            at = min(at, len(content) - 1)
            return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]


def fuzz(path: Path, content: bytes, reader: Callable[[Path], Any]) -> None:
    """Ends at the first change that makes `reader` raise anything but a BitplanError, with the file left there."""
    chance, end, refused, number = random.Random(0), time.monotonic() + SECONDS, 0, 0
    while time.monotonic() < end or number < 30:
        number += 1
        changed = content
        if chance.random() < 0.7:
            value = json.loads(content)
            for _ in range(chance.randrange(1, 4)):
                value = changed_value(chance, value)
            changed = json.dumps(value).encode()
        if changed == content or chance.random() < 0.2:
            changed = changed_bytes(chance, changed)
        path.write_bytes(changed)
        try:
            reader(path)
        except BitplanError as error:
            refused += 1
            assert str(error).isprintable()
    assert refused


def test_plans(tmp_path):
    fuzz(tmp_path / "plan.json", PLAN, lambda path: read(path, Plan))


def test_profiles(tmp_path, session_of):
    from bitplan.sensitivity.audit import sizes

    profile = sizes(session_of("llama"), ("int8", "int4-g64"))
    fuzz(tmp_path / "profile.json", profile.model_dump_json().encode(), lambda path: read(path, Profile))


def test_configs(folder):  # noqa: F811
    path = folder / "config.json"
    fuzz(path, path.read_bytes(), lambda _: sources.block_length(sources.find(folder), 512))


@pytest.mark.parametrize("item", [{"prompt": "a", "choices": ["b", "c"], "answer": 0}, {"prompt": "a", "answer": "b"}])
def test_tasks(tmp_path, item):
    fuzz(tmp_path / "task.jsonl", json.dumps(item).encode(), read_questions)


def test_headers(folder):  # noqa: F811
    """The header of a safetensors file, with its length right or as it was."""
    path, chance = folder / "model.safetensors", random.Random(1)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.unlink()  # a hard link to another test's

    def reader(changed: Path) -> None:
        header = changed.read_bytes()
        size = len(header) if chance.random() < 0.9 else length
        path.write_bytes(size.to_bytes(8, "little") + header + content[8 + length :])
        sources.find(folder)
        load_file(path)  # what is taken, safetensors takes too

    fuzz(folder / "header", content[8 : 8 + length], reader)
