"""gptqmodel's GPTQ on a model, on the CPU; weights are read back from its packed layers.

default: the tool's own settings but for asymmetric codes (and, where a group is a whole row, but for its group-aware
activation order, which needs groups). best: activation order (desc_act), which it leaves off.
"""

import argparse
import os
import time

import job
import torch


def quantize(arguments: argparse.Namespace) -> job.Quantized:
    # It counts on half the cores, and will not start where that makes one worker (7.6.0).
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear
    from gptqmodel.utils.cpp import load_pack_block_extension

    blocks = job.calibration(arguments.calibration)
    settings = {"desc_act": True} if arguments.recipe == "best" else {}
    if arguments.recipe == "best" or not arguments.group:
        settings["act_group_aware"] = False
    config = QuantizeConfig(
        bits=arguments.bits,
        group_size=arguments.group or -1,
        sym=False,
        device="cpu",
        # Without enough data, or when a Hessian will not invert, it would round to nearest and go on.
        fallback=None,
        # The first version of its layout stores zeros less one, and would give them back so before it is saved.
        format="gptq_v2",
        offload_to_disk=False,
        **settings,
    )
    source = job.full_precision(arguments.model)
    if arguments.bits not in {2, 4, 8} and (odd := job.odd(source)):
        raise ValueError(f"gptqmodel packs {arguments.bits} bits only where 32 divides both sides, not in {odd}")
    limit = source.config.max_position_embeddings
    if blocks.shape[1] > limit:
        raise ValueError(f"gptqmodel cuts blocks of {blocks.shape[1]} tokens to the model's {limit} positions")
    model = GPTQModel.load(arguments.model, config, dtype=torch.float32)
    load_pack_block_extension()  # compiled once for each machine, in half a minute, which is not quantizing
    start = time.perf_counter()
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in blocks], batch_size=1)
    seconds = time.perf_counter() - start

    weights = {}
    for name in job.layers(source):
        layer = model.model.get_submodule(name)
        if not isinstance(layer, BaseQuantLinear):
            raise ValueError(f"gptqmodel left {name} unquantized")
        # It keeps scales in float16 and would also multiply in it; codes and scales are exact in float32.
        layer.scales = layer.scales.float()
        weights[name] = layer.dequantize_weight().T.contiguous()
        job.require_grid(name, weights[name], arguments.bits, layer.g_idx)
    note = f"desc_act={config.desc_act}, act_group_aware={config.act_group_aware}, damp_percent={config.damp_percent}"
    note += ", float16 scales; seconds include packing"
    if uneven := job.ragged(source, arguments.group):
        note += f"; the last group is shorter in {len(uneven)} layers"
    return job.Quantized(weights, seconds, note)


if __name__ == "__main__":
    job.run("gptqmodel", quantize, ["best"])
