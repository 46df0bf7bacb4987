"""hqq on a model: its own layer with its default optimiser, groups along the rows (axis 1). It uses no calibration."""

import argparse
import time

import job
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from transformers.pytorch_utils import Conv1D


def quantize(arguments: argparse.Namespace) -> job.Quantized:
    model = job.full_precision(arguments.model)
    if uneven := job.ragged(model, arguments.group):
        raise ValueError(f"hqq's groups of {arguments.group} would run over the ends of rows in {uneven}")
    weights = {}
    seconds = 0.0
    todo = job.layers(model)
    for name, layer in todo.items():
        weight = job.rows(layer)
        columns = weight.shape[1]
        # None is hqq's own way to say a whole row, but its 3-bit unpacking breaks on it; a number must be 8's multiple.
        group = arguments.group or (columns if arguments.bits == 3 else None)
        linear = torch.nn.Linear(columns, weight.shape[0], bias=False)
        linear.weight.data = weight.clone()
        config = BaseQuantizeConfig(nbits=arguments.bits, group_size=group, axis=1)
        start = time.perf_counter()
        made = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        seconds += time.perf_counter() - start
        weights[name] = made.dequantize().detach()
        job.require_grid(name, weights[name], arguments.bits, job.column_groups(columns, arguments.group))
    note = "no calibration; scales and unrounded zeros in float32"
    if any(isinstance(layer, Conv1D) for layer in todo.values()):
        note += "; hqq itself replaces Linear only: each Conv1D was handed to it as the Linear that it is"
    return job.Quantized(weights, seconds, note)


if __name__ == "__main__":
    job.run("hqq", quantize)
