"""ModelOpt's auto_quantize on a model, on the CPU in float32: by gradients it chooses each layer's bits for --average.

Its weights-only integers are symmetric, with a scale for each group. Each format's codes are made by awq_lite, as those
of its INT4_AWQ_CFG are.
"""

import argparse
import time

import job
import modelopt.torch.quantization as mtq
import score_modelopt
import torch

OFFERED = (2, 3, 4, 5, 6, 8)
BATCH = 8
HEAD = "*lm_head*"


def awq(bits: int, group: int) -> dict:
    # As AutoScheme counts them; its own count leaves the scales out.
    made_by = {"algorithm": {"method": "awq_lite"}, "effective_bits": bits + (16 + bits) / group}
    return score_modelopt.weights_only(bits, group) | made_by


def quantize(arguments: argparse.Namespace) -> job.Quantized:
    batches = list(job.calibration(arguments.calibration).split(BATCH))
    model = job.full_precision(arguments.model)
    todo = job.layers(model)
    start = time.perf_counter()
    model, _ = mtq.auto_quantize(
        model,
        constraints={"effective_bits": arguments.average, "cost": {"excluded_module_name_patterns": [HEAD]}},
        quantization_formats=[awq(bits, arguments.group) for bits in OFFERED],
        data_loader=batches,
        forward_step=lambda model, ids: model(input_ids=ids, use_cache=False),
        loss_func=score_modelopt.loss,
        disabled_layers=[HEAD],
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )
    seconds = time.perf_counter() - start
    weights, bits = {}, {}
    for name in todo:
        layer = model.get_submodule(name)
        bits[name] = layer.weight_quantizer.num_bits
        with torch.no_grad():
            rounded = layer.weight_quantizer(layer.weight)
        groups = job.column_groups(rounded.shape[1], arguments.group)
        job.require_grid(name, rounded, bits[name], groups)
        scale = layer.input_quantizer.pre_quant_scale
        weights[name] = rounded if scale is None else rounded * scale
    note = f"auto_quantize among {', '.join(map(str, OFFERED))} bits; awq_lite, symmetric, float32 scales"
    return job.Quantized(weights, seconds, note, allocation=bits)


if __name__ == "__main__":
    job.run("nvidia-modelopt", quantize)
