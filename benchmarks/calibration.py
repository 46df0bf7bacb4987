"""How much calibration text does rounding gain from, and which? `make bench-calibration`; `--also MODEL TEXT HELDOUT`.

Uniform plans, rounded by `gptq` in sequence on 4,096 to 131,072 tokens of three texts: the user's own, of the same kind
as the held-out text; the default, the sources of Python's standard library; and what the model itself writes when
sampled; and on the user's own with second moments that are not shrunk. May import: everything.
"""

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks import models
from benchmarks.machine import described
from bitplan.formats.errors import TextTooShort
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.evaluate.objective import Objective
from bitplan.planner.load import load_planned
from bitplan.planner.quantize.distillation import round_missing
from bitplan.planner.report.tables import table
from bitplan.sensitivity import shrinkage
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.texts.read import read_texts
from bitplan.sensitivity.texts.text import Texts

TOKENS = (4096, 16384, 32768, 131072)
FORMATS = ("int4-g64", "int3-g64")


UNSHRUNK = "own text, not shrunk"
KINDS = ("own text", UNSHRUNK, "default text", "model's samples")


@contextmanager
def unshrunk() -> Iterator[None]:
    """Second moments as they are, and a cache of their own for what follows from them."""
    with (
        tempfile.TemporaryDirectory() as cache,
        patch.dict(os.environ, {"BITPLAN_CACHE": cache}),
        patch.object(shrinkage, "_variance", lambda squares, within, samples: torch.zeros_like(within)),
    ):
        yield


def loss(source: sources.Source, texts: Texts, format: str) -> str:
    session = open_session(source, texts, device="cpu")
    plan = uniform_plan(session, format, "gptq")
    round_missing(plan, session)
    found = Objective(session).heldout(load_planned(plan, source, "cpu"))
    return f"{found.kl:.4f} ± {found.kl_se or 0:.4f}"


def rows(files: tuple[str, str, str], counts: list[int], kinds: list[str], formats: list[str]) -> list[tuple[str, ...]]:
    model, text, heldout = files
    source, made = sources.find(model), []
    held = read_texts(source, files=[Path(text)], heldout=[Path(heldout)], tokens=min(TOKENS[2], max(counts)))
    for tokens, kind in itertools.product(counts, kinds):
        options = {"default text": {}, "model's samples": {"sampled": True}}.get(kind, {"files": [Path(text)]})
        try:
            texts = read_texts(source, heldout=[Path(heldout)], tokens=tokens, **options)  # type: ignore[arg-type]
        except TextTooShort:
            continue
        count = texts.calibration.ids.numel()
        if count >= tokens // 2:
            texts = replace(texts, search=held.search, heldout=held.heldout)
            with unshrunk() if kind == UNSHRUNK else nullcontext():
                losses = [loss(source, texts, format) for format in formats]
            made.append((models.label(model), kind, f"{count:,}", *losses))
            print(*made[-1], file=sys.stderr, flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    models.add_options(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), metavar="KIND", help="; ".join(KINDS))
    given = parser.parse_args()
    found = [row for files in models.chosen(given) for row in rows(files, given.tokens, given.kinds, given.formats)]
    head = ("model", "calibration", "tokens", *(f"{name}: held-out KL" for name in given.formats))
    print(table(head, found, left=2))
    print(described("cpu"))


if __name__ == "__main__":
    main()
