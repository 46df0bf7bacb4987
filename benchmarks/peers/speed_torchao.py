"""torchao's weight-only int8 (a scale per row) and int4 (groups of 64) in all Linear, the head too.

On a CPU its stable int4 has no kernel; the one that it has lies under prototype (torchao 0.18.0).
"""

import pace
import torch
from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers import PreTrainedConfig, PreTrainedModel

GROUP = 64


def settings(name: str, device: str) -> object:
    if name == "int8":
        return Int8WeightOnlyConfig()
    if name != "int4-g64":
        raise ValueError(f"no format {name}")
    if device.startswith("cuda"):
        return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=GROUP)


def build(name: str, config: PreTrainedConfig, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, str]:
    model = pace.fill(pace.empty_model(config, dtype), device)
    quantize_(model, settings(name, device))
    return model, ""


if __name__ == "__main__":
    pace.run("torchao", build)
