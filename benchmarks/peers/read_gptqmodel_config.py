"""Run with .venv-gptqmodel: a quantization_config, by gptqmodel's own QuantizeConfig.

What it says of each module is asked as its loader asks: `dynamic` first, and the settings for all where no rule is met.
"""

import argparse
import json
from pathlib import Path

import reading
import torch
from gptqmodel import QuantizeConfig
from transformers import AutoConfig, AutoModelForCausalLM


def read(arguments: argparse.Namespace) -> reading.Found:
    config = QuantizeConfig.from_quant_config(json.loads(Path(arguments.export).read_text(encoding="utf-8")))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(arguments.model))
    words = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            if config.dynamic_get(name) is False:
                words[name] = "not quantized"
                continue
            bits = config.dynamic_get(name, "bits", config.bits)
            words[name] = f"{int(bits)} bits, group_size {config.dynamic_get(name, 'group_size', config.group_size)}"
    return reading.Found(words)


if __name__ == "__main__":
    reading.run("gptqmodel", read)
