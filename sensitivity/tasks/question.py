"""A task's questions, read from a file of JSON lines.

A file is of one kind: {"prompt", "choices", "answer"} (choice), {"prompt", "answer"} (exact) or {"text"} (text).
`answer` of a choice is the number of the choice, from 0, or its text. Other fields and blank lines are ignored.
May import: formats.errors, sensitivity.reading.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitplan.formats.errors import UsageError
from bitplan.sensitivity.reading import parse_json, read_text

Kind = Literal["choice", "exact", "text"]
PREVIEW = 40
MOST_CHOICES = 1000
"""Each is a sequence of its own that the model runs."""


@dataclass(frozen=True)
class Question:
    """One item as words. `candidates` are pairs of what is given and what is scored; the right one is `answer`."""

    where: str
    """file:line, for messages."""
    kind: Kind
    candidates: tuple[tuple[str, str], ...]
    answer: int = 0


def read_questions(path: Path) -> list[Question]:
    """Raises UsageError that names the file and the line."""
    found: list[Question] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        question = _question(f"{path}:{number}", line)
        if found and question.kind != found[0].kind:
            raise UsageError(
                f"{question.where}: an item of the kind {question.kind!r} in a file that began with {found[0].kind!r} "
                f"({found[0].where}): give each kind a file of its own"
            )
        found.append(question)
    if not found:
        raise UsageError(f"{path}:1: the task file is empty: give one JSON object a line")
    return found


def _question(where: str, line: str) -> Question:
    entry = parse_json(line, where, UsageError)
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: a task's line is a JSON object, not {_short(entry)}")
    if "text" in entry and "prompt" not in entry:
        return Question(where, "text", (("", _text(where, entry, "text")),))
    for name in ("prompt", "answer"):
        if name not in entry:
            raise UsageError(f"{where}: no field {name!r}: give prompt and answer, with choices or without, or text")
    prompt = _text(where, entry, "prompt", empty=True)
    if "choices" not in entry:
        return Question(where, "exact", ((prompt, _text(where, entry, "answer")),))
    choices, answer = entry["choices"], entry["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise UsageError(f"{where}: 'choices' must be a list of two or more texts, not {_short(choices)}")
    if len(choices) > MOST_CHOICES:
        raise UsageError(f"{where}: {len(choices):,} choices, and {MOST_CHOICES:,} are the most that an item may have")
    texts = [_text(where, dict(enumerate(choices)), i) for i in range(len(choices))]
    if twice := sorted(text for text, count in Counter(texts).items() if count > 1):
        raise UsageError(f"{where}: the choice {_short(twice[0])} is there twice")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        right = answer
    elif isinstance(answer, str) and answer in texts:
        right = texts.index(answer)
    else:
        raise UsageError(
            f"{where}: the answer {_short(answer)} is not among the {len(texts)} choices: give the text of one, or its"
            f" number from 0 to {len(texts) - 1}"
        )
    return Question(where, "choice", tuple((prompt, text) for text in texts), right)


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "what is nested deeply"
    return text if len(text) <= PREVIEW else f"{text[:PREVIEW]}…"


def _text(where: str, entry: dict, key: str | int, empty: bool = False) -> str:
    value = entry[key]
    label = f"choice {key}" if isinstance(key, int) else repr(key)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise UsageError(f"{where}: {label} must be text that is not empty, not {_short(value)}")
    return value
