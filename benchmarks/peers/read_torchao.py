"""Run with .venv-torchao: a quantization_config, by transformers and torchao on the CPU.

torchao rounds while it loads. Its 4-bit packing needs a GPU: a file that names it is parsed, and no model is loaded.
"""

import argparse
import json
from pathlib import Path

import reading
from torchao.core.config import config_to_dict
from torchao.quantization import Int4WeightOnlyConfig
from torchao.quantization.quantize_.workflows.int4.int4_packing_format import Int4PackingFormat
from transformers import AutoModelForCausalLM, TorchAoConfig


def word(config: object) -> str:
    if config is None:
        return "not quantized"
    group = getattr(config, "group_size", None)
    return type(config).__name__.removesuffix("Config") + (f", group_size {group}" if group else "")


def contains(told: object, kept: object) -> bool:
    """Whether all that was told is in what torchao writes of its own object."""
    if isinstance(told, dict) and isinstance(kept, dict):
        return all(contains(value, kept.get(name)) for name, value in told.items())
    # torchao writes some enums by their value and reads them by their name too
    return told == kept


def read(arguments: argparse.Namespace) -> reading.Found:
    content = json.loads(Path(arguments.export).read_text(encoding="utf-8"))
    config = TorchAoConfig.from_dict({name: value for name, value in content.items() if name != "quant_method"})
    named = config.quant_type.fqn_to_config
    words = {name.removesuffix(".weight"): word(entry) for name, entry in named.items()}
    for name, told in content["quant_type"]["default"]["_data"]["fqn_to_config"].items():
        if isinstance(named[name], Int4WeightOnlyConfig):
            assert named[name].int4_packing_format is Int4PackingFormat.TILE_PACKED_TO_4D
        elif told is not None:
            assert contains(told, config_to_dict(named[name])), name
    if any(isinstance(entry, Int4WeightOnlyConfig) for entry in named.values()):
        return reading.Found(words)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=config).eval()
    nbytes = {}
    for key, entry in named.items():
        name = key.removesuffix(".weight")
        weight = model.get_submodule(name).weight
        parts = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else []
        assert bool(parts) == (entry is not None), name
        nbytes[name] = sum(getattr(weight, part).nbytes for part in parts) or weight.nbytes
    return reading.Found(words, nbytes, reading.logits(model, arguments))


if __name__ == "__main__":
    reading.run("torchao", read)
