"""Run with .venv-auto-gptq: load a folder in GPTQ's layout with auto-gptq on the CPU, and write its logits.

`--ids` is a safetensors file with `ids` [texts, tokens]; `--out` becomes one with `logits`, float32, and the reader's
version. Without CUDA auto-gptq runs its plain torch QuantLinear, which unpacks into the type of its scales: float32
here, so that what differs is the reading and not the arithmetic. May import: auto_gptq, torch, safetensors.
"""

import argparse
import os
from importlib.metadata import version

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors.torch import load_file, save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--ids", "--out"):
        parser.add_argument(name, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = AutoGPTQForCausalLM.from_quantized(
        arguments.model,
        device="cpu",
        torch_dtype=torch.float32,
        use_triton=False,
        use_marlin=False,
        disable_exllama=True,
        disable_exllamav2=True,
        inject_fused_attention=False,
        inject_fused_mlp=False,
        use_safetensors=True,
    )
    model = loaded.model.float().eval()
    with torch.no_grad():
        logits = model(input_ids=load_file(arguments.ids)["ids"]).logits
    save_file({"logits": logits.float().contiguous()}, arguments.out, {"version": version("auto-gptq")})


if __name__ == "__main__":
    main()
