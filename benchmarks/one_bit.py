"""Is a model of 1 bit per weight still a model? `make bench-one-bit`.

The embedded model, every unit (embedding and head too) in a format below 2 bits, rounded by `gptq`, against a bigram of
the calibration text, interpolated with its unigram and with the uniform distribution at the weights that suit the
held-out text best, which favours the bigram. Research stage. May import: everything.
"""

import sys

import torch
from torch import Tensor

from bitplan.planner.assemble import uniform_plan
from bitplan.planner.demo import CALIBRATION, HELDOUT, MODEL
from bitplan.planner.load import load_planned, resident_bytes
from bitplan.planner.quantize.distillation import round_missing
from bitplan.planner.report.tables import table
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.loss import Reference
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.texts.read import read_texts

FORMATS = ("binary-g64",)
PARTS = [i / 20 for i in range(20)]


def bigram_nats(calibration: Tensor, heldout: Tensor, vocabulary: int) -> float:
    """Nats per token of held-out blocks int64 [blocks, length] by a bigram of calibration blocks."""
    pairs = torch.zeros(vocabulary, vocabulary)
    first, second = calibration[:, :-1].flatten(), calibration[:, 1:].flatten()
    pairs.index_put_((first, second), torch.ones(len(first)), accumulate=True)
    singles = torch.bincount(calibration.flatten(), minlength=vocabulary).float()
    bigram = pairs / pairs.sum(1, keepdim=True).clamp(min=1)
    first, second = heldout[:, :-1].flatten(), heldout[:, 1:].flatten()
    by_pair, by_single = bigram[first, second], (singles / singles.sum())[second]
    best = float("inf")
    for a in PARTS:
        for b in (part for part in PARTS if a + part < 1):
            best = min(best, float(-(a * by_pair + b * by_single + (1 - a - b) / vocabulary).log().mean()))
    return best


def main() -> None:
    names = sys.argv[1:] or FORMATS
    source = sources.find(MODEL)
    texts = read_texts(source, files=[CALIBRATION], heldout=[HELDOUT])
    session = open_session(source, texts, device="cpu")
    reference = Reference(session.model, texts.heldout)
    vocabulary = session.model.config.vocab_size
    nats = bigram_nats(texts.calibration.ids, texts.heldout.ids, vocabulary)
    rows = [("bigram", "", f"{torch.tensor(nats).exp():.1f}", f"{nats:.4f}")]
    for name in names:
        plan = uniform_plan(session, name, "gptq")
        round_missing(plan, session)
        model = load_planned(plan, source, "cpu")
        evaluation = reference.evaluate(model)
        bits = resident_bytes(model) * 8 / plan.provenance.model.parameters
        rows.append((f"{name} (research stage)", f"{bits:.3f}", f"{evaluation.ppl:.1f}", f"{evaluation.nll:.4f}"))
    rows.append(("full precision", "", f"{reference.nll.mean().exp():.1f}", f"{reference.nll.mean():.4f}"))
    print(table(("", "bits per weight", "perplexity", "nats per token"), rows))


if __name__ == "__main__":
    main()
