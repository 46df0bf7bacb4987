"""auto-round (SignRound) on a model, on the CPU in float32.

default: the tool's own settings. best: those of its auto-round-best, which are 1000 steps (its 512 samples and its
sequence length give way to the blocks that all tools get).
"""

import argparse
import time

import job
from auto_round import AutoRound
from transformers import AutoTokenizer

ITERS = {"default": 200, "best": 1000}
BATCH = 8


def quantize(arguments: argparse.Namespace) -> job.Quantized:
    blocks = job.calibration(arguments.calibration)
    source = job.full_precision(arguments.model)
    todo = job.layers(source)
    # "int" leaves layers whose sides 32 does not divide unquantized, whatever is asked of them (its file formats cannot
    # hold them). "int_asym" is the rounding that "int" with sym=False resolves to, without that rule.
    odd = job.odd(source)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = None  # it would leave tokens equal to this out of attention and loss; there is no padding
    tool = AutoRound(
        job.full_precision(arguments.model),
        tokenizer,
        bits=arguments.bits,
        group_size=arguments.group or -1,  # its 0 is one group per tensor
        sym=False,
        data_type="int_asym" if odd else "int",
        dataset=list(blocks.split(BATCH)),
        seqlen=blocks.shape[1],
        nsamples=len(blocks),
        batch_size=BATCH,
        iters=arguments.iters or ITERS[arguments.recipe],
        device_map="cpu",
        amp=False,  # otherwise the model, its untouched weights too, is cast to bfloat16
        enable_torch_compile=False,
    )
    start = time.perf_counter()
    model, _ = tool.quantize()
    seconds = time.perf_counter() - start

    weights = {}
    for name in todo:
        weights[name] = job.rows(model.get_submodule(name)).float()
        columns = weights[name].shape[1]
        job.require_grid(name, weights[name], arguments.bits, job.column_groups(columns, arguments.group))
    note = f"{arguments.iters or ITERS[arguments.recipe]} steps, batches of {BATCH} blocks, float16 scales"
    if odd:
        note += f"; 32 does not divide {len(odd)} layers, which data_type int would have passed over: int_asym"
    if uneven := job.ragged(source, arguments.group):
        note += f"; the last group is shorter in {len(uneven)} layers"
    return job.Quantized(weights, seconds, note)


if __name__ == "__main__":
    job.run("auto-round", quantize)
