"""Make the bundled task: `python -m bitplan.planner.demo.make_task`.

Each item is some lines of a held-out module of the standard library and four candidates for the line after them: the
one that follows, whose names the prompt mostly has, and three from other places of the module, of like length and
indented like it. The beginnings of the modules, which `text/heldout.txt` has, are left out: a plan that this task chose
can still be evaluated on that text.
May import: sensitivity.texts.stdlib.
"""

import argparse
import io
import json
import keyword
import random
import re
import tokenize
from pathlib import Path

from bitplan.sensitivity.texts import stdlib

BEGINNING = 6_500
"""Characters of each module in `text/heldout.txt` (`planner.demo.train.write_texts`)."""
ITEMS = 200
SEED = 0
PROMPT = 280
"""Characters of a prompt at most, in whole lines: some 90 tokens of the embedded model."""
LINE = (16, 48)
"""Characters of a candidate, without its indentation, at least and at most."""
SIMILAR = 0.25
"""A distractor's length is within this part of the right line's."""
SHARED = 0.5
"""Part of the right line's names, two or more, that occur in the prompt: what nobody could guess asks nothing."""


def code_lines(document: str) -> dict[int, str]:
    """Lines of code by number, from 0, past the beginning: no comments, nothing inside strings of several lines."""
    inside: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(document).readline):
        if token.start[0] != token.end[0]:
            inside |= set(range(token.start[0] - 1, token.end[0]))
    found, at = {}, 0
    for number, line in enumerate(document.split("\n")):
        at += len(line) + 1
        short = LINE[0] <= len(line.strip()) <= LINE[1]
        if at > BEGINNING + PROMPT and short and number not in inside and not line.strip().startswith("#"):
            found[number] = line
    return found


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def names(text: str) -> set[str]:
    return {word for word in re.findall(r"[A-Za-z_]\w+", text) if not keyword.iskeyword(word)}


def items_of(document: str, generator: random.Random) -> list[dict]:
    """An item for each line of a module that its prompt points to and has three distractors, in a random order."""
    lines, code, made = document.split("\n"), code_lines(document), []
    indented: dict[int, set[str]] = {}
    for line in code.values():
        indented.setdefault(indentation(line), set()).add(line)
    for number, right in code.items():
        size = len(right.strip())
        near = lines[max(0, number - 8) : number + 4]
        others = sorted(
            {
                line
                for line in indented[indentation(right)]
                if abs(len(line.strip()) - size) <= SIMILAR * size and line not in near
            }
        )
        start = number
        while start and sum(len(line) + 1 for line in lines[start - 1 : number]) <= PROMPT:
            start -= 1
        prompt = "".join(f"{line}\n" for line in lines[start:number])
        shared = len(names(right) & names(prompt))
        if len(others) < 3 or len(prompt) < PROMPT // 2 or shared < max(2, SHARED * len(names(right))):
            continue
        choices = [right, *generator.sample(others, 3)]
        generator.shuffle(choices)
        made.append({"prompt": prompt, "choices": choices, "answer": choices.index(right)})
    generator.shuffle(made)
    return made


def make(documents: list[str], count: int = ITEMS) -> list[dict]:
    """`count` items, or all there are, from the documents in turn; the same documents give the same items."""
    generator = random.Random(SEED)
    piles = [items_of(document, generator) for document in documents]
    return [pile[i] for i in range(max(map(len, piles))) for pile in piles if i < len(pile)][:count]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "task" / "completion.jsonl")
    parser.add_argument("--items", type=int, default=ITEMS)
    arguments = parser.parse_args()
    items = make(stdlib.held_out_documents(), arguments.items)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    print(f"{len(items)} items, {arguments.out.stat().st_size:,} bytes: {arguments.out}")
