"""Run with .venv-compressed-tensors or -0.17: a checkpoint folder, by transformers and compressed-tensors on the CPU.

In float32, which holds the fp16 scales exactly: what differs is then the reading and not the arithmetic.

compressed-tensors 0.18 to 0.20 make room for zero points that are not packed, and fail on any checkpoint that has some:
`mend` makes that room as 0.17 does. Nothing of the reading itself is ours.
"""

import argparse
import json
from pathlib import Path

import reading
import torch
from compressed_tensors.compressors import BaseCompressor
from safetensors import safe_open
from transformers import AutoModelForCausalLM


def mend() -> None:
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    compress = compressor.compress

    def compressed(state: dict[str, torch.Tensor], scheme: object) -> dict[str, torch.Tensor]:
        made = compress(state, scheme)
        zero = made.get("weight_zero_point")
        if zero is not None and zero.dtype != torch.int32:
            rows, groups = zero.shape
            words = -(-rows * scheme.weights.num_bits // 32)
            made["weight_zero_point"] = torch.empty(words, groups, dtype=torch.int32, device=zero.device)
        return made

    compressor.compress = compressed


def word(module: torch.nn.Module) -> str:
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None:
        return "ignored"
    weights = scheme.weights
    group = f", group_size {weights.group_size}" if weights.group_size else ", a scale per row"
    return f"{weights.type} {weights.num_bits} bits{group}"


def read(arguments: argparse.Namespace) -> reading.Found:
    mend()
    model = AutoModelForCausalLM.from_pretrained(arguments.export, dtype=torch.float32).eval()
    config = json.loads((Path(arguments.export) / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    found = model.config.quantization_config.quantization_config
    assert len(found.config_groups) == len(config["config_groups"]) and found.format == config["format"]
    words = {name: word(module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    nbytes: dict[str, int] = {}
    with safe_open(Path(arguments.export) / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (a file is no dict)
            module = name.rpartition(".")[0]
            nbytes[module] = nbytes.get(module, 0) + file.get_tensor(name).nbytes
    return reading.Found(words, nbytes, reading.logits(model, arguments))


if __name__ == "__main__":
    reading.run("compressed-tensors", read)
