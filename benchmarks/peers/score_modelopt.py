"""Run with .venv-modelopt: what ModelOpt's auto_quantize, by gradients, takes to score layers in several formats.

The last line of stdout is a JSON list: seconds, and seconds of processor time, of calibration, scoring and search.
"""

import argparse
import json
import os
import time

import modelopt.torch.quantization as mtq
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def weights_only(bits: int, group: int) -> dict:
    """Symmetric integers in groups along a row, and inputs as they are."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "block_sizes": {-1: group}}},
            {"quantizer_name": "*input_quantizer", "enable": False},
            {"quantizer_name": "*output_quantizer", "enable": False},
        ],
        "algorithm": "max",
    }


def loss(output: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", required=True, help='safetensors file: token blocks "ids"')
    parser.add_argument("--formats", required=True, help="bits-group, by commas")
    arguments = parser.parse_args()
    stdout = os.dup(1)
    os.dup2(2, 1)
    blocks = list(load_file(arguments.ids)["ids"].split(1))
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    began, busy = time.perf_counter(), time.process_time()
    mtq.auto_quantize(
        model,
        constraints={"effective_bits": 6.0},
        quantization_formats=[weights_only(*map(int, name.split("-"))) for name in arguments.formats.split(",")],
        data_loader=blocks,
        forward_step=lambda model, ids: model(input_ids=ids, use_cache=False),
        loss_func=loss,
        num_calib_steps=1,  # weights alone are quantized: their scales need no text
        num_score_steps=len(blocks),
    )
    found = (time.perf_counter() - began, time.process_time() - busy)
    os.write(stdout, (json.dumps(found) + "\n").encode())


if __name__ == "__main__":
    main()
