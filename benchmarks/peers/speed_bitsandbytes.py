"""bitsandbytes' own layers in place of all Linear, the head too: nf4 (Linear4bit) or int8 (Linear8bitLt)."""

import pace
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def layer(name: str, weight: nn.Parameter, dtype: torch.dtype, device: str) -> nn.Module:
    """Rounded on its way to the device."""
    rows, columns = weight.shape
    if name == "nf4":
        made = Linear4bit(columns, rows, False, dtype, compress_statistics=False, quant_type=name, device="meta")
        made.weight = Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type=name, module=made)
    elif name == "int8":
        made = Linear8bitLt(columns, rows, False, has_fp16_weights=False, threshold=6.0, device="meta")
        made.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        raise ValueError(f"no format {name}")
    return made.to(device).eval()


def build(name: str, config: PreTrainedConfig, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, str]:
    model = pace.fill(pace.empty_model(config, dtype), "cpu")
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, layer(name, module.weight, dtype, device))
    return model.to(device), ""


if __name__ == "__main__":
    pace.run("bitsandbytes", build)
