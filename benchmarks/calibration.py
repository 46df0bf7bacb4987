"""How much calibration text does rounding gain from, and which? `make bench-calibration`; `--also MODEL TEXT HELDOUT`.

Uniform plans, rounded by `gptq` in sequence on 4,096 to 131,072 tokens of three texts: the user's own, of the same kind
as the held-out text; the default, the sources of Python's standard library; and what the model itself writes when
sampled. May import: everything.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import models
from benchmarks.machine import described
from bitplan.formats.errors import TextTooShort
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.evaluate.objective import Objective
from bitplan.planner.load import load_planned
from bitplan.planner.quantize.distillation import round_missing
from bitplan.planner.report.tables import table
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.session import open_session, read_texts
from bitplan.sensitivity.texts.text import Texts

TOKENS = (4096, 16384, 32768, 131072)
FORMATS = ("int4-g64", "int3-g64")


def loss(source: sources.Source, texts: Texts, format: str) -> str:
    session = open_session(source, texts, device="cpu")
    plan = uniform_plan(session, format, "gptq")
    round_missing(plan, session)
    found = Objective(session).heldout(load_planned(plan, source, "cpu"))
    return f"{found.kl:.4f} ± {found.kl_se or 0:.4f}"


def rows(model: str, text: str, heldout: str, counts: list[int], formats: list[str]) -> list[tuple[str, ...]]:
    source, made = sources.find(model), []
    held = read_texts(source, files=[Path(text)], heldout=[Path(heldout)], tokens=min(TOKENS[2], max(counts)))
    kinds = {"own text": {"files": [Path(text)]}, "default text": {}, "model's samples": {"sampled": True}}
    for tokens in counts:
        for kind, options in kinds.items():
            try:
                texts = read_texts(source, heldout=[Path(heldout)], tokens=tokens, **options)  # type: ignore[arg-type]
            except TextTooShort:
                continue
            count = texts.calibration.ids.numel()
            if count >= tokens // 2:
                texts = replace(texts, search=held.search, heldout=held.heldout)
                row = (kind, f"{count:,}", *(loss(source, texts, format) for format in formats))
                made.append((models.label(model), *row))
                print(*made[-1], file=sys.stderr, flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    models.add_options(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    arguments = parser.parse_args()
    found = [row for files in models.chosen(arguments) for row in rows(*files, arguments.tokens, arguments.formats)]
    head = ("model", "calibration", "tokens", *(f"{name}: held-out KL" for name in arguments.formats))
    print(table(head, found, left=2))
    print(described("cpu"))


if __name__ == "__main__":
    main()
