"""auto-round (SignRound) on a model, on the CPU in float32.

default: the tool's own settings. best: those of its auto-round-best, which are 1000 steps (its 512 samples and its
sequence length give way to the blocks that all tools get). rtn: no steps, which it calls RTN.
With --average, its AutoScheme chooses each layer's bits first, on the same blocks; the time is both's.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["AR_ALLOW_W8_ASYM"] = "1"  # otherwise its 8 bits alone are symmetric
os.environ["AR_AUTO_SCHEME_CACHE"] = "scores"  # where it is run, not at home

import job
import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from transformers import AutoTokenizer, PreTrainedTokenizerBase

ITERS = {"default": 200, "best": 1000, "rtn": 0}
BATCH = 8
OFFERED = (2, 3, 4, 5, 6, 8)
"""Bits that AutoScheme chooses among."""


def in_file(blocks: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """The blocks as text, one a line, in a file: all that AutoScheme takes. Each is there twice, since a line of fewer
    tokens than a block is passed over, and a longer one cut."""
    path = Path("lines.jsonl").resolve()
    lines = [json.dumps({"text": tokenizer.decode(block)}) for block in blocks.repeat(1, 2).tolist()]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def quantize(arguments: argparse.Namespace) -> job.Quantized:
    blocks = job.calibration(arguments.calibration)
    source = job.full_precision(arguments.model)
    todo = job.layers(source)
    # "int" leaves layers whose sides 32 does not divide unquantized, whatever is asked of them (its file formats cannot
    # hold them). "int_asym" is the rounding that "int" with sym=False resolves to, without that rule.
    odd = job.odd(source)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = None  # it would leave tokens equal to this out of attention and loss; there is no padding
    scheme = QuantizationScheme(
        bits=arguments.bits,
        group_size=arguments.group or -1,  # its 0 is one group per tensor
        sym=False,
        data_type="int_asym" if odd else "int",
    )
    dataset: Any = list(blocks.split(BATCH))
    if arguments.average:
        dataset = in_file(blocks, tokenizer)
        scheme = AutoScheme(
            avg_bits=arguments.average,
            options=[replace(scheme, bits=bits) for bits in OFFERED],
            nsamples=len(blocks),
            seqlen=blocks.shape[1],
            batch_size=BATCH,
        )
    iters = ITERS[arguments.recipe]
    tool = AutoRound(
        job.full_precision(arguments.model),
        tokenizer,
        scheme=scheme,
        dataset=dataset,
        seqlen=blocks.shape[1],
        nsamples=len(blocks),
        batch_size=BATCH,
        iters=iters,
        device_map="cpu",
        amp=False,  # otherwise the model, its untouched weights too, is cast to bfloat16
        enable_torch_compile=False,
    )
    start = time.perf_counter()
    model, config = tool.quantize()
    seconds = time.perf_counter() - start

    weights = {}
    bits = {name: config[name]["bits"] for name in todo}
    for name in todo:
        weights[name] = job.rows(model.get_submodule(name)).float()
        columns = weights[name].shape[1]
        job.require_grid(name, weights[name], bits[name], job.column_groups(columns, arguments.group))
    note = f"AutoScheme among {', '.join(map(str, OFFERED))} bits; " if arguments.average else ""
    note += f"{iters} steps, batches of {BATCH} blocks, float16 scales"
    if odd:
        note += f"; 32 does not divide {len(odd)} layers, which data_type int would have passed over: int_asym"
    if uneven := job.ragged(source, arguments.group):
        note += f"; the last group is shorter in {len(uneven)} layers"
    return job.Quantized(weights, seconds, note, allocation=bits if arguments.average else None)


if __name__ == "__main__":
    job.run("auto-round", quantize, ["best", "rtn"])
