"""Where should `tuned` start: GPTQ's codes, or the weights? `make bench-tuned-starts`; `--also MODEL TEXT HELDOUT`.

Uniform plans by `gptq`, by `tuned` from either start in every block, and by `tuned` as it is, which keeps in each
block what loses least; on some numbers of calibration tokens. Embedding and head stay in full precision, with --blocks
all other blocks too. *Outputs* are those of a block on the text for each of its weights, by which `tuned` tries the
weights or not. May import: everything.
"""

import argparse
import itertools
import math
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import models
from benchmarks.machine import described
from bitplan.formats.base import Tensors
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.load import load_planned
from bitplan.planner.quantize import segment
from bitplan.planner.quantize.distillation import round_missing
from bitplan.planner.quantize.segment import Segment
from bitplan.planner.report.tables import table
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.chain import find_blocks
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.texts.read import read_texts
from bitplan.sensitivity.texts.text import Blocks

STARTS: dict[str, int | None] = {"gptq": 0, "tuned, from codes": 1, "tuned, from weights": 2, "tuned": None}
"""Which of a block's candidates is kept: GPTQ's codes, or what is learned from either start; None: as `tuned` does."""
LOSS, FEW = Segment._loss, segment.FEW


def keep(which: int | None) -> None:
    """Let `tuned` keep one candidate in all blocks."""
    if which is None:
        segment.FEW, Segment._loss = FEW, LOSS  # type: ignore[method-assign]
        return
    wanted, seen = which, itertools.count()

    def loss(_self: Segment, _tensors: dict[str, Tensors]) -> float:
        return abs(next(seen) % 3 - wanted)

    segment.FEW, Segment._loss = math.inf, loss  # type: ignore[method-assign]


def rows(files: tuple[str, str, str], arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    model, text, heldout = files
    source, made = sources.find(model), []
    most = max(32768, *arguments.tokens)  # held-out text is half of it, however little text there is for rounding
    texts = read_texts(source, files=[Path(text)], heldout=[Path(heldout)], tokens=most, length=256)
    session = open_session(source, texts, device="cpu")
    whole, units = session.model, session.graph.units
    reference, paths = session.reference(texts.heldout), find_blocks(whole)
    chosen = [paths[i] for i in arguments.blocks or range(len(paths))]
    kept = [unit.name for unit in units if not unit.name.startswith(tuple(f"{path}." for path in chosen))]
    weights = sum(p.numel() for p in whole.get_submodule(chosen[0]).parameters() if p.ndim > 1)
    for tokens in arguments.tokens:
        few = replace(texts, calibration=Blocks(texts.calibration.ids[: max(1, tokens // 256)]))
        for name, which in STARTS.items():
            keep(which)
            with tempfile.TemporaryDirectory() as cache:
                os.environ["BITPLAN_CACHE"] = cache
                session = open_session(source, few, tuple(kept), device="cpu")
                plan = uniform_plan(session, arguments.format, "gptq" if which == 0 else "tuned")
                began = time.process_time()
                round_missing(plan, session)
                seconds = time.process_time() - began
                found = reference.evaluate(load_planned(plan, source, "cpu"))
            outputs = few.calibration.ids.numel() * whole.config.hidden_size / weights
            losses = (f"{found.kl:.4f}", f"{found.kl_se:.4f}", f"{found.delta_nll:+.4f}", f"{found.delta_nll_se:.4f}")
            made.append((models.label(model), f"{tokens:,}", name, f"{outputs:.1f}", *losses, f"{seconds:.0f}"))
            print(*made[-1], file=sys.stderr, flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    models.add_options(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--blocks", type=int, nargs="+", help="numbers of the blocks that are quantized (default: all)")
    parser.add_argument("--format", default="int3-g64")
    arguments = parser.parse_args()
    found = [row for files in models.chosen(arguments) for row in rows(files, arguments)]
    head = ("model", "tokens", "rounding", "outputs per weight", "KL", "± se", "nats", "± se", "seconds of CPU")
    print(table(head, found, left=3))
    print(described())


if __name__ == "__main__":
    main()
