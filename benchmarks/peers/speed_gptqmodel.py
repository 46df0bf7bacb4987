"""gptqmodel on a checkpoint of random codes in GPTQ's layout, 4 or 8 bits in groups of 64, by the kernel that it picks.

The head stays in floats, as gptqmodel leaves it unless told otherwise.
"""

import json
import os
from pathlib import Path

import pace
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

GROUP = 64
BITS = {"int4-g64": 4, "int8-g64": 8}
MIDDLE = {4: 0x77777777, 8: 0x7F7F7F7F}
"""A word of zero points in the middle of the range; the layout stores them less one."""


def random_codes(rows: int, columns: int, bits: int) -> dict[str, Tensor]:
    """A layer in the layout that planner/gptq_layout.py describes; the scale gives weights pace's deviation."""
    groups = columns // GROUP
    return {
        "qweight": torch.randint(-(2**31), 2**31, (columns * bits // 32, rows), dtype=torch.int32),
        "qzeros": torch.full((groups, rows * bits // 32), MIDDLE[bits], dtype=torch.int32),
        "scales": torch.full((groups, rows), pace.DEVIATION / (2**bits / 12**0.5), dtype=torch.float16),
        "g_idx": torch.arange(columns, dtype=torch.int32) // GROUP,
    }


def write(folder: Path, config: PreTrainedConfig, bits: int) -> None:
    folder.mkdir()
    settings = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": bits, "group_size": GROUP, "sym": True}
    settings |= {"desc_act": False, "lm_head": False}
    content = config.to_dict() | {"quantization_config": settings, "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    model = pace.empty_model(config, torch.float16)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    tensors = {}
    for name, layer in layers.items():
        made = random_codes(layer.out_features, layer.in_features, bits)
        tensors |= {f"{name}.{part}": tensor for part, tensor in made.items()}
        layer.weight = nn.Parameter(torch.zeros(1), requires_grad=False)  # `fill` passes over it
    pace.fill(model, "cpu")
    kept = model.state_dict().items()
    tensors |= {name: tensor for name, tensor in kept if name.removesuffix(".weight") not in layers}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = Tokenizer(WordLevel({"word": 0}, "word"))  # it loads none without a tokenizer
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="word").save_pretrained(folder)


def build(name: str, config: PreTrainedConfig, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, str]:
    # It counts on half the cores, and will not start where that makes one worker (7.6.0).
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gptqmodel import GPTQModel

    if name not in BITS:
        raise ValueError(f"no format {name}")
    folder = Path("random")
    write(folder, config, BITS[name])
    threads = torch.get_num_threads()
    model = GPTQModel.load(str(folder), device=device, dtype=dtype).model.eval()
    torch.set_num_threads(threads)
    return model, f"its {type(model.model.layers[0].mlp.up_proj).__name__}; the head in floats"


if __name__ == "__main__":
    pace.run("gptqmodel", build)
