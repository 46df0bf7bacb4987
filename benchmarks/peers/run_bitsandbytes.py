"""bitsandbytes on a model: NF4 in its blocks of 64, float32 maxima, no double quantization. It uses no calibration."""

import argparse
import time

import job
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

BLOCK = 64


def quantize(arguments: argparse.Namespace) -> job.Quantized:
    if arguments.bits != 4:
        raise ValueError("NF4 has 4 bits")
    weights = {}
    seconds = 0.0
    for name, layer in job.layers(job.full_precision(arguments.model)).items():
        weight = job.rows(layer)
        if weight.numel() % BLOCK:
            raise ValueError(f"{name}: {weight.numel()} weights are no multiple of {BLOCK}")
        # A block may run over the end of a row. The codes are the same for [rows, columns], but the CPU code that turns
        # them back into floats then returns wrong ones for some shapes, 152 × 608 for one (0.50.2, AVX-512).
        blocks = weight.reshape(-1, BLOCK)
        start = time.perf_counter()
        codes, state = quantize_4bit(blocks, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
        seconds += time.perf_counter() - start
        made = dequantize_4bit(codes, state)
        job.require_grid(name, made, arguments.bits, job.column_groups(BLOCK, BLOCK))
        weights[name] = made.reshape(weight.shape)
    note = f"NF4; no calibration; blocks of {BLOCK} along the flattened weight, whatever group is asked for"
    return job.Quantized(weights, seconds, note, group=BLOCK)


if __name__ == "__main__":
    job.run("bitsandbytes", quantize)
