"""Does the paired interval cover the true difference? `python -m benchmarks.interval [--also MODEL TEXT …]`.

A known answer: a model in full precision and in a format is scored on ITEMS items of each kind made from text, and
these items are taken for all that there are, so that the true difference is their mean. Then REPETITIONS times `pairs`
of them are drawn with replacement, as a user's task is drawn from all that could have been asked, and `paired` gives
its 95 % interval. The table tells in how many of 100 repetitions the interval covers the true difference, and its mean
width.
May import: everything.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import described
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.demo import HELDOUT, MODEL
from bitplan.planner.load import load_planned
from bitplan.planner.report.tables import table
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.reading import read_text
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.tasks.paired import paired
from bitplan.sensitivity.tasks.question import Question
from bitplan.sensitivity.tasks.score import score
from bitplan.sensitivity.tasks.task import Task, make_task
from bitplan.sensitivity.texts.read import read_texts

ITEMS, REPETITIONS, PAIRS = 200, 1000, (50, 200)
FORMATS = ("int8", "int4-g64", "int2-g64")
PROMPT, ANSWER = 160, 24
"""Characters of an item's prompt, and of each of its four choices; a text has PROMPT + ANSWER."""
LOWEST = 90
"""Of 100, for an interval that says 95."""


def questions(text: str) -> dict[str, list[Question]]:
    """ITEMS of text, and ITEMS whose right choice is how the text goes on, the others from other places of it."""
    generator, size = random.Random(0), PROMPT + ANSWER
    starts = [generator.randrange(len(text) - size) for _ in range(4 * ITEMS)]
    ends = [text[at + PROMPT : at + size] for at in starts]
    prose, choice = [], []
    for i, at in enumerate(starts[:ITEMS]):
        prompt, own = text[at : at + PROMPT], list(dict.fromkeys((ends[i], *ends[ITEMS + 3 * i : ITEMS + 3 * i + 3])))
        prose.append(Question(f"item {i}", "text", (("", prompt + ends[i]),)))
        choice.append(Question(f"item {i}", "choice", tuple((prompt, end) for end in own)))
    return {"accuracy": choice, "nats per token": prose}


def values(model: str, text: Path) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """(measure, format) → the items' values in full precision and in the format, float64 [ITEMS]."""
    source = sources.find(model)
    tokenizer, length = sources.load_tokenizer(source), sources.block_length(source, 1 << 20)
    session = open_session(source, read_texts(source, files=[text], tokens=2048), device="cpu")
    tasks: dict[str, Task] = {
        measure: make_task(measure, asked, tokenizer, length) for measure, asked in questions(read_text(text)).items()
    }
    base = {measure: score(session.model, task).values for measure, task in tasks.items()}
    plans = [(name, uniform_plan(session, name, "nearest")) for name in FORMATS]
    session.give_up_model()
    found = {}
    for name, plan in plans:
        loaded = load_planned(plan, source, "cpu")
        for measure, task in tasks.items():
            found[measure, name] = base[measure], score(loaded, task).values
    return found


def covered(base: Tensor, other: Tensor, pairs: int) -> tuple[float, float]:
    """Of 100 intervals, how many hold the mean difference of all items; and their mean width."""
    truth, generator = float((other - base).mean()), np.random.default_rng(pairs)
    hits, widths = 0, []
    for _ in range(REPETITIONS):
        drawn = torch.from_numpy(generator.integers(len(base), size=pairs))
        found = paired(base[drawn], other[drawn])
        hits += found.low - 1e-12 <= truth <= found.high + 1e-12
        widths.append(found.high - found.low)
    return 100 * hits / REPETITIONS, float(np.mean(widths))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--also", nargs=2, action="append", default=[], metavar=("MODEL", "TEXT"))
    rows, lowest = [], 100.0
    for model, text in [(str(MODEL), str(HELDOUT)), *parser.parse_args().also]:
        for (measure, name), (base, other) in progress(values(model, Path(text)).items(), desc=Path(model).name):
            cells = []
            for pairs in PAIRS:
                share, width = covered(base, other, pairs)
                lowest = min(lowest, share)
                cells += [f"{share:.1f}", f"{width:.4f}"]
            rows.append(
                (
                    Path(model).name if model != str(MODEL) else "embedded",
                    measure,
                    name,
                    f"{float((other - base).mean()):+.4f}",
                    *cells,
                )
            )
    heads = [head for pairs in PAIRS for head in (f"covers, {pairs} pairs", "width")]
    print(table(("", "measure", "format", "true difference", *heads), rows, left=3))
    print(f"lowest {lowest:.1f} of 100, wanted {LOWEST}; {described()}")
    return int(lowest < LOWEST)


if __name__ == "__main__":
    raise SystemExit(main())
