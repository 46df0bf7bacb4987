"""Run with .venv-gptqmodel: load a folder in GPTQ's layout with gptqmodel on the CPU, and write its logits.

`--ids` is a safetensors file with `ids` [texts, tokens]; `--out` becomes one with `logits`, float32, and the reader's
version. The weights that gptqmodel unpacks are multiplied in float32, so that what differs is the reading and not the
arithmetic. May import: gptqmodel, torch, safetensors.
"""

import argparse
import os
from importlib.metadata import version

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file, save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--ids", "--out"):
        parser.add_argument(name, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # float16 is the type of the scales: another would round them while they are read.
    loaded = GPTQModel.load(arguments.model, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    model = loaded.model.float().eval()
    with torch.no_grad():
        logits = model(input_ids=load_file(arguments.ids)["ids"]).logits
    save_file({"logits": logits.float().contiguous()}, arguments.out, {"version": version("gptqmodel")})


if __name__ == "__main__":
    main()
